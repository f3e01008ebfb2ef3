"""How long the metrics take that score many pictures, beside bare forward passes of as many and the
codes of others: insertion and deletion curves, deletion alone, and ROAD.

    PYTHONPATH=. python tests/benchmarks/faithfulness.py \
        [--arch resnet18] [--steps 28] [--repetitions 5]
        [--threads N] [--device cpu] [--out FOLDER]

Four images, one map each, without ties, so that there is one order of the pixels; the baseline is
mean grey at both ends. Areas, curves and imputed images are compared before anything is timed.
Quantus is measured where it is installed (`pip install --no-deps quantus==0.6.0`: what it asks for
would put a second OpenCV in the place of the project's). Writes faithfulness.csv,
faithfulness_bf16.csv, growth.csv and faithfulness.png to --out.
"""

import argparse
import contextlib
import functools
import unittest.mock

import cam
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import timing
import torch
from pytorch_grad_cam.metrics.road import NoisyLinearImputer, ROADCombined
from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget
from timing import cc
from torchcam.metrics import DeletionInsertionMetric

try:
    import quantus
    from quantus.functions.perturb_func import noisy_linear_imputation
except ImportError:
    quantus = None

IMAGES, BATCH = 4, 8
SOFTMAX = functools.partial(torch.softmax, dim=-1)


def setting(arch, device, count=IMAGES, size=224):
    """(model, images, targets, maps): the predicted classes; of Grad-CAM the order of the pixels
    alone, in even steps from 1 down, so that no two pixels have the same value.
    """
    model = cam.network(arch).to(device, memory_format=torch.channels_last)
    x = cam.pictures(count, device, size)
    cc.probabilities(model, torch.cat([x, x]))  # what a network is asked once is asked before
    deep, _ = cc.default_layers(model, x[:1])
    captured = cc.capture(model, x, deep)
    maps = cc.enlarge(
        cc.grad_cam(captured.activations[deep], captured.gradients[deep]), x.shape[2:]
    )
    ranks = cc.pixel_rank(maps, range(count))
    return model, x, captured.target, 1 - ranks / ranks[0].numel()


def ours(model, x, target, maps, steps, precision="float32"):
    """{metric: areas (images,)}"""
    grey = torch.zeros_like(x)
    settings = {"steps": steps, "batch_size": BATCH, "precision": precision}
    curves = cc.faithfulness(
        model, x, {"map": maps}, target, list(range(len(x))), grey, grey, **settings
    )
    return {metric: cc.auc(c["map"]) for metric, c in curves.items()}


class Given:
    """What TorchCAM's metric asks an extractor for, with the maps given: none of its time is for
    making maps.
    """

    def __init__(self, model, maps):
        self.model, self.maps = model, maps

    def __call__(self, class_idx=None, scores=None, normalized=True, **others):
        return [self.maps]

    def fuse_cams(self, maps):
        return maps[0]

    def _hooks_off(self):
        return contextlib.nullcontext()


def torchcam_metric(model, x, target, maps, steps):
    metric = DeletionInsertionMetric(Given(model, maps), SOFTMAX, steps=steps, batch_size=BATCH)
    metric.update(x, target.tolist())
    return {name: metric.summary()[f"{name}_auc"] for name in ("insertion", "deletion")}


def reference_loop(model, x, target, maps, steps):
    """The loop of RISE's published evaluation, for a batch of images: after every step the pictures
    are scored, and then the next pixels copied over through NumPy's indices.
    """
    n, channels, pixels = len(x), x.shape[1], maps[0].numel()
    order = torch.argsort(maps.flatten(1), dim=1, descending=True, stable=True).cpu().numpy()
    rows, size, found = np.arange(n)[:, None], -(-pixels // steps), {}
    for metric, (begin, end) in {
        "insertion": (torch.zeros_like(x), x),
        "deletion": (x, torch.zeros_like(x)),
    }.items():
        picture, final = begin.cpu().contiguous().clone(), end.cpu().contiguous()
        flat, goal = (t.view(n, channels, pixels).numpy() for t in (picture, final))
        scores = np.empty((steps + 1, n))
        for step in range(steps + 1):
            with torch.no_grad():
                p = torch.cat([SOFTMAX(model(part.to(x.device))) for part in picture.split(BATCH)])
            scores[step] = p.gather(1, target[:, None])[:, 0].cpu().numpy()
            if step < steps:
                chosen = order[:, step * size : (step + 1) * size]
                flat[rows, :, chosen] = goal[rows, :, chosen]
        found[metric] = (scores.sum(0) - scores[0] / 2 - scores[-1] / 2) / steps
    return found


def forward(model, x, count):
    """Bare passes over `count` pictures, in batches as the others'."""
    batch = torch.cat([x] * -(-BATCH // len(x)))[:BATCH].contiguous(
        memory_format=torch.channels_last
        if x.is_contiguous(memory_format=torch.channels_last)
        else torch.contiguous_format
    )
    with torch.inference_mode():
        for begin in range(0, count, BATCH):
            model(batch[: min(BATCH, count - begin)])


@contextlib.contextmanager
def counted(model):
    """A list that gets the size of every batch that the model is given."""
    sizes = []
    hook = model.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    try:
        yield sizes
    finally:
        hook.remove()


def our_deletion(model, x, target, maps, steps):
    """The curves without their first point, the images themselves: (images, steps)."""
    ranks = cc.pixel_rank(maps, range(len(x)))[:, None]
    settings = {"steps": steps, "batch_size": BATCH}
    return cc.perturbation_curves(model, x, torch.zeros_like(x), ranks, target, **settings)[
        :, 0, 1:
    ]


def pixel_flipping(model, x, target, maps, steps):
    """Quantus' deletion, which begins behind the first step. A pixel is as many features as it has
    channels.
    """
    features = x[0].numel() // steps
    metric = quantus.PixelFlipping(
        features, normalise=False, perturb_baseline=0.0, disable_warnings=True
    )
    arrays = {"x_batch": x, "y_batch": target, "a_batch": maps[:, None]}
    arrays = {name: tensor.cpu().numpy() for name, tensor in arrays.items()}
    how = {"channel_first": True, "batch_size": BATCH, "device": str(x.device)}
    return torch.from_numpy(np.array(metric(model=model, **arrays, **how)))


def removed_pixels(maps):
    """What ROAD removes, the highest and the lowest 10 % to 90 %: (18 * images, H, W)."""
    pixels = maps[0].numel()
    ranks = cc.pixel_rank(maps, range(len(maps)))
    parts = []
    for fraction in cc.ROAD_FRACTIONS:
        cut = round(fraction * pixels)
        parts += [ranks < cut, ranks >= pixels - cut]
    return torch.cat(parts)


def our_imputation(x, removed):
    return cc.imputed(x.repeat(len(removed) // len(x), 1, 1, 1), removed, noise=0)


def their_imputation(x, removed):
    """pytorch-grad-cam's, a picture at a time."""
    impute, kept = NoisyLinearImputer(noise=0), (~removed).float().cpu()
    x = x.cpu().contiguous()
    return torch.stack([impute(x[k % len(x)], kept[k]) for k in range(len(kept))])


def quantus_imputation(x, removed):
    """Quantus', a picture at a time."""
    x, removed = x.cpu().contiguous().numpy(), removed.cpu().numpy()
    pictures = [
        noisy_linear_imputation(x[k % len(x)], np.flatnonzero(gone), noise=0)
        for k, gone in enumerate(removed)
    ]
    return torch.from_numpy(np.stack(pictures))


def our_road(model, x, target, maps):
    """What pytorch-grad-cam's ROADCombined gives: (images,)"""
    curves = cc.road(model, x, {"map": maps}, target, list(range(len(x))), batch_size=BATCH)
    return cc.road_score(curves)["map"] / 2


def their_road(model, x, target, maps):
    percentiles = [100 - 100 * fraction for fraction in cc.ROAD_FRACTIONS]
    asked = [ClassifierOutputSoftmaxTarget(k) for k in target.tolist()]
    return ROADCombined(percentiles)(x, maps.cpu().numpy(), asked, model)


def timed(made, pictures, repetitions, device, **about):
    """Each code's time beside ours, and the rate at which it scores pictures beside bare passes.
    Every code ran before, when its results were compared.
    """
    times = timing.repeat(made, repetitions, device, warm=True)
    table = timing.ratios(times, "ours")
    table["pictures"] = table["name"].map(pictures)
    table["per_s"] = 1e3 * table["pictures"] / table["ms"]
    bare = "bare forward passes"
    if bare in made:
        per_picture = times.assign(seconds=times["seconds"] / times["name"].map(pictures))
        rate = timing.ratios(per_picture, bare).set_index("name")["ratio"]
        table["rate_to_bare"] = 1 / table["name"].map(rate)
    return table.assign(**about)


def run_once(codes, given):
    """What each code returns for the same arguments, and how many pictures it scores."""
    found, pictures = {}, {}
    for name, code in codes.items():
        with counted(given[0]) as sizes:
            found[name] = code(*given)
        pictures[name] = sum(sizes)
    return found, pictures


def must_be_equal(differs, most, what):
    """End the benchmark where results lie further apart than `most`."""
    if not max(differs.values()) <= most:
        raise SystemExit(f"{what} differ: {differs}. A ratio would compare unequal things.")


def beside_bare(codes, given, pictures):
    """The codes as functions without arguments, and bare passes of as many pictures as ours."""
    bare = pictures["bare forward passes"] = pictures["ours"]
    made = {"bare forward passes": lambda: forward(given[0], given[1], bare)}
    return made | {name: functools.partial(code, *given) for name, code in codes.items()}


def compare_areas(arch, steps, repetitions, device):
    """Insertion and deletion: equal areas, and how long they take."""
    given = (*setting(arch, device), steps)
    codes = {"ours": ours, "TorchCAM's metric": torchcam_metric, "RISE's loop": reference_loop}
    areas, pictures = run_once(codes, given)
    own = areas["ours"]
    differs = {n: max(abs(np.mean(a[m]) - own[m].mean()) for m in a) for n, a in areas.items()}
    must_be_equal(differs, 1e-5, "areas under the curves")
    made = beside_bare(codes, given, pictures)
    about = {"metric": "insertion and deletion", "arch": arch, "steps": steps, "images": IMAGES}
    table = timed(made, pictures, repetitions, device, **about)
    return table.assign(difference=table["name"].map(differs))


def compare_deletion(arch, repetitions, device, size=240, steps=30):
    """Deletion alone, which Quantus has: equal curves. It wants features, the channels of a pixel
    each for itself, whose number in a step divides the number of pixels: 30 steps at 240 px do.
    """
    given = (*setting(arch, device, size=size), steps)
    codes = {"ours": our_deletion, "Quantus: PixelFlipping": pixel_flipping}
    curves, pictures = run_once(codes, given)
    differs = {name: float((c - curves["ours"]).abs().max()) for name, c in curves.items()}
    must_be_equal(differs, 1e-5, "deletion curves")
    made = beside_bare(codes, given, pictures)
    about = {"metric": "deletion", "arch": arch, "steps": steps, "images": IMAGES}
    table = timed(made, pictures, repetitions, device, **about)
    return table.assign(difference=table["name"].map(differs))


def compare_imputation(arch, repetitions, device, count=1):
    """ROAD's pictures without their noise: equal to 1e-4, and how long making them takes."""
    _, x, _, maps = setting(arch, device, count)
    removed = removed_pixels(maps)
    codes = {"ours": our_imputation, "pytorch-grad-cam: imputer": their_imputation}
    if quantus:
        codes["Quantus: imputation"] = quantus_imputation
    found = {name: code(x, removed).cpu() for name, code in codes.items()}
    differs = {name: float((f - found["ours"]).abs().max()) for name, f in found.items()}
    must_be_equal(differs, 1e-4, "imputed images")
    made = {name: functools.partial(code, x, removed) for name, code in codes.items()}
    pictures = dict.fromkeys(made, len(removed))
    about = {"metric": "imputation", "arch": arch, "steps": 9, "images": count}
    table = timed(made, pictures, repetitions, device, **about)
    return table.assign(difference=table["name"].map(differs))


class WithoutNoise(NoisyLinearImputer):
    def __init__(self):
        super().__init__(noise=0)


def compare_road(arch, repetitions, device, count=1):
    """All of ROAD beside pytorch-grad-cam's: both orders, nine fractions. The scores are compared
    without the noise, which each code draws in its own way.
    """
    given = setting(arch, device, count)
    codes = {"ours": our_road, "pytorch-grad-cam: ROADCombined": their_road}
    with (
        unittest.mock.patch("pytorch_grad_cam.metrics.road.NoisyLinearImputer", WithoutNoise),
        unittest.mock.patch.object(cc, "ROAD_NOISE", 0),
    ):
        scores, pictures = run_once(codes, given)
    differs = {name: float(np.abs(s - scores["ours"]).max()) for name, s in scores.items()}
    must_be_equal(differs, 1e-3, "ROAD's scores")
    made = beside_bare(codes, given, pictures)
    about = {"metric": "ROAD", "arch": arch, "steps": 9, "images": count}
    table = timed(made, pictures, repetitions, device, **about)
    return table.assign(difference=table["name"].map(differs))


def compare_precision(arch, repetitions, device):
    """bfloat16 scoring beside float32: how much faster, and how far the areas lie apart."""
    given = (*setting(arch, device), 28)
    areas = {precision: ours(*given, precision) for precision in ("float32", "bf16")}
    apart = np.concatenate([np.abs(areas["bf16"][m] - areas["float32"][m]) for m in areas["bf16"]])
    times = timing.repeat({p: lambda p=p: ours(*given, p) for p in areas}, repetitions, device)
    table = timing.ratios(times, "bf16")
    return table.assign(
        arch=arch, mean_error=apart.mean(), largest_error=apart.max(), curves=len(apart)
    )


def score_many(arch, count, steps, device="cpu"):
    """A function that scores `count` images, sixteen at a time, as notebook 05 does; and forgets
    them.
    """
    model, x, target, maps = setting(arch, torch.device(device), 16)
    ours(model, x, target, maps, 2)  # once: kernels are chosen and buffers made at the first pass

    def work():
        for begin in range(0, count, 16):
            k = min(16, count - begin)
            ours(model, x[:k] + 0.001 * begin, target[:k], maps[:k], steps)

    return work


def growth(arch, device):
    """Seconds and peak memory for more images, and for more steps, each in a process of its own."""
    rows = []
    for varied, settings in {
        "images": [(n, 2) for n in (16, 64, 256)],
        "steps": [(16, s) for s in (7, 28, 112)],
    }.items():
        for count, steps in settings:
            peak, seconds = timing.alone(score_many, arch, count, steps, str(device))
            row = {"varied": varied, "images": count, "steps": steps, "seconds": seconds}
            rows.append(row | {"peak_mib": peak if device.type == "cpu" else np.nan})
            print(rows[-1], flush=True)
    return pd.DataFrame(rows).assign(arch=arch)


def draw(table, grown, file):
    fig, axes = plt.subplots(1, 3, figsize=(11, 3.2))
    first = table[table["metric"] == "insertion and deletion"]
    first = first[first["steps"] == first["steps"].min()]
    axes[0].barh(
        first["name"],
        first["per_s"],
        color=["#0072B2" if n == "ours" else "#999999" for n in first["name"]],
    )
    for y, rate in enumerate(first["per_s"]):
        axes[0].text(rate, y, f"  {rate:.0f}", va="center", fontsize=8)
    axes[0].set(
        xlabel="pictures scored per second",
        xlim=(0, 1.15 * first["per_s"].max()),
        title=f"{first['arch'].iloc[0]}, {IMAGES} images, {first['steps'].iloc[0]} steps",
    )
    axes[0].invert_yaxis()
    for ax, column, label in (
        (axes[1], "seconds", "seconds"),
        (axes[2], "peak_mib", "peak memory on top, MiB"),
    ):
        for varied, part in grown.groupby("varied", sort=False):
            least = part.iloc[0]
            ax.plot(
                part[varied] / least[varied],
                part[column],
                marker="o",
                label=f"{varied}, from {least[varied]} to {part[varied].iloc[-1]}",
            )
        ax.set(xscale="log", xlabel="times as many", ylabel=label)
    axes[1].set(yscale="log", title=f"{grown['arch'].iloc[0]}: time")
    axes[2].set_title("memory")
    axes[2].set_ylim(0, 1.3 * grown["peak_mib"].max() if grown["peak_mib"].notna().all() else None)
    axes[1].legend(frameon=False)
    fig.savefig(file, dpi=150)
    print(f"-> {file}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--steps", default="28")
    parser.add_argument(
        "--growth",
        default="squeezenet1_1",
        help="the network of the growth figure; empty: leave it out",
    )
    args, device = timing.start(parser, 5)
    timing.keep_freed_memory()
    settings = (args.arch, args.repetitions, device)
    work = [
        functools.partial(compare_areas, args.arch, int(steps), args.repetitions, device)
        for steps in args.steps.split(",")
    ]
    if quantus:
        work.append(functools.partial(compare_deletion, *settings))
    else:
        print("Quantus is not installed: it is not measured.")
    few = min(args.repetitions, 3)  # the others' imputation takes ten times as long, and minutes
    work.append(functools.partial(compare_imputation, args.arch, few, device))
    work.append(functools.partial(compare_road, *settings))
    tables = []
    for compare in work:
        tables.append(compare())
        print(f"\n{tables[-1]['metric'].iloc[0]}, {args.arch}, {tables[-1]['steps'].iloc[0]} steps")
        shown = tables[-1].drop(columns=["metric", "arch", "steps", "to"])
        print(shown.round(6).to_string(index=False), flush=True)
    table = pd.concat(tables, ignore_index=True)
    timing.save(table, args.out / "faithfulness.csv", device)
    (args.out / "faithfulness_bf16.csv").unlink(missing_ok=True)  # perhaps of another machine
    if cc.networks.native_bf16(device):
        bf16 = compare_precision(args.arch, args.repetitions, device)
        print("\nbfloat16\n" + bf16.round(5).to_string(index=False))
        timing.save(bf16, args.out / "faithfulness_bf16.csv", device)
    else:
        print("\nThis processor has no bfloat16 instructions: bf16 is not measured.")
    if args.growth:
        grown = growth(args.growth, device)
        timing.save(grown, args.out / "growth.csv", device)
        draw(table, grown, args.out / "faithfulness.png")


if __name__ == "__main__":
    main()
