"""How long insertion and deletion curves take, beside bare forward passes of as many pictures and
two other codes.

    PYTHONPATH=. python tests/benchmarks/faithfulness.py \
        [--arch resnet18] [--steps 28,224] [--repetitions 3]
        [--threads N] [--device cpu] [--out FOLDER]

Eight images, one map each, without ties, so that there is one order of the pixels; the baseline is
mean grey at both ends. Areas under the curves are compared before anything is timed. Writes
faithfulness.csv, faithfulness_bf16.csv, growth.csv and faithfulness.png to --out.
"""

import argparse
import contextlib
import functools
import time

import cam
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import timing
import torch
from timing import cc
from torchcam.metrics import DeletionInsertionMetric

IMAGES, BATCH = 8, 8
SOFTMAX = functools.partial(torch.softmax, dim=-1)


def setting(arch, layout, device, count=IMAGES):
    """(model, images, targets, maps): the predicted classes, and Grad-CAM with a little noise
    against ties.
    """
    model = cam.network(arch).to(device, memory_format=timing.LAYOUTS[layout])
    x = cam.pictures(count, layout, device)
    deep, _ = cc.default_layers(model, x[:1])
    captured = cc.capture(model, x, deep)
    maps = cc.enlarge(cc.grad_cam(captured.activations[deep], captured.gradients[deep]), (224, 224))
    noise = torch.rand(maps.shape, generator=torch.Generator().manual_seed(1)).to(maps)
    return model, x, captured.target, cc.normalise(maps + 1e-3 * noise)


def ours(model, x, target, maps, steps, precision="float32"):
    """{metric: areas (images,)}"""
    grey = torch.zeros_like(x)
    curves = cc.faithfulness(
        model, x, {"map": maps}, target, list(range(len(x))), grey, grey, 0, steps, BATCH, precision
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


def compare_speed(arch, layout, steps, repetitions, device):
    """Each code's time, the pictures it scored, its rate beside bare passes, and its time beside
    ours.
    """
    given = setting(arch, layout, device)
    model = given[0]
    codes = {"ours": ours, "TorchCAM's metric": torchcam_metric, "RISE's loop": reference_loop}
    areas, pictures = {}, {}
    for name, code in codes.items():
        with counted(model) as sizes:
            areas[name] = code(*given, steps)
        pictures[name] = sum(sizes)
    differs = {
        n: max(abs(np.mean(a[m]) - areas["ours"][m].mean()) for m in a) for n, a in areas.items()
    }
    if max(differs.values()) > 1e-5:
        raise SystemExit(
            f"areas under the curves differ: {differs}. A ratio would compare unequal things."
        )
    bare = pictures["bare forward passes"] = pictures["ours"]
    made = {"bare forward passes": lambda: forward(model, given[1], bare)}
    made |= {name: lambda code=code: code(*given, steps) for name, code in codes.items()}
    times = timing.repeat(made, repetitions, device, warm=True)  # each code ran for its areas
    table = timing.ratios(times, "ours")
    table["pictures"] = table["name"].map(pictures)
    table["per_s"] = 1e3 * table["pictures"] / table["ms"]
    per_picture = times.assign(seconds=times["seconds"] / times["name"].map(pictures))
    rate = timing.ratios(per_picture, "bare forward passes").set_index("name")["ratio"]
    table["rate_to_bare"] = 1 / table["name"].map(rate)
    table["auc_difference"] = table["name"].map(differs)
    return table.assign(arch=arch, layout=layout, steps=steps, images=IMAGES)


def compare_precision(arch, repetitions, device):
    """bfloat16 scoring beside float32: how much faster, and how far the areas lie apart."""
    given = setting(arch, "channels_last", device)
    areas = {precision: ours(*given, 28, precision) for precision in ("float32", "bf16")}
    apart = np.concatenate([np.abs(areas["bf16"][m] - areas["float32"][m]) for m in areas["bf16"]])
    times = timing.repeat({p: lambda p=p: ours(*given, 28, p) for p in areas}, repetitions, device)
    table = timing.ratios(times, "bf16")
    return table.assign(
        arch=arch, mean_error=apart.mean(), largest_error=apart.max(), curves=len(apart)
    )


def score_many(arch, count, steps, device="cpu"):
    """A function that scores `count` images, sixteen at a time, as notebook 05 does; and forgets
    them.
    """
    model, x, target, maps = setting(arch, "channels_last", torch.device(device), 16)
    ours(model, x, target, maps, 2)  # once: kernels are chosen and buffers made at the first pass

    def work():
        for begin in range(0, count, 16):
            k = min(16, count - begin)
            ours(model, x[:k] + 0.001 * begin, target[:k], maps[:k], steps)

    return work


def growth(arch, device):
    """Seconds and peak memory for more images, and for more steps."""
    rows = []
    for varied, settings in {
        "images": [(n, 2) for n in (16, 64, 256, 1024)],
        "steps": [(16, s) for s in (7, 28, 112, 448)],
    }.items():
        for count, steps in settings:
            work = score_many(arch, count, steps, device)
            begin = time.perf_counter()
            work()
            timing.settle(device)
            seconds = time.perf_counter() - begin
            row = {"varied": varied, "images": count, "steps": steps, "seconds": seconds}
            row["peak_mib"] = np.nan
            if device.type == "cpu":
                row["peak_mib"] = timing.peak_growth(score_many, arch, count, steps)
            rows.append(row)
            print(row, flush=True)
    return pd.DataFrame(rows).assign(arch=arch)


def draw(table, grown, file):
    fig, axes = plt.subplots(1, 3, figsize=(11, 3.2))
    first = table[(table["steps"] == table["steps"].min()) & (table["layout"] == "channels_last")]
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
    axes[1].set(yscale="log", title=f"{grown['arch'].iloc[0]}: time grows in proportion")
    axes[2].set_title("memory hardly grows")
    axes[2].set_ylim(0, 1.3 * grown["peak_mib"].max() if grown["peak_mib"].notna().all() else None)
    axes[1].legend(frameon=False)
    fig.savefig(file, dpi=150)
    print(f"-> {file}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--steps", default="28,224")
    parser.add_argument(
        "--growth",
        default="squeezenet1_1",
        help="the network of the growth figure; empty: leave it out",
    )
    args, device = timing.start(parser, 3)
    timing.keep_freed_memory()
    tables = []
    for steps in map(int, args.steps.split(",")):
        many = steps >= 100  # they take minutes: once, in the faster layout alone
        for layout in list(timing.LAYOUTS)[: 1 if many else 2]:
            tables.append(
                compare_speed(args.arch, layout, steps, 1 if many else args.repetitions, device)
            )
            print(f"\n{args.arch}, {steps} steps, {layout}")
            print(
                tables[-1]
                .drop(columns=["arch", "layout", "steps", "to"])
                .round(4)
                .to_string(index=False),
                flush=True,
            )
    table = pd.concat(tables, ignore_index=True)
    timing.save(table, args.out / "faithfulness.csv", device)
    if cc.networks.native_bf16(device):
        bf16 = compare_precision(args.arch, args.repetitions, device)
        print("\nbfloat16\n" + bf16.round(5).to_string(index=False))
        timing.save(bf16, args.out / "faithfulness_bf16.csv", device)
    else:
        print(
            "\nThis processor has no bfloat16 instructions: precision=bf16 would not be faster, so "
            "it "
            "is not measured."
        )
    if args.growth:
        grown = growth(args.growth, device)
        timing.save(grown, args.out / "growth.csv", device)
        draw(table, grown, args.out / "faithfulness.png")


if __name__ == "__main__":
    main()
