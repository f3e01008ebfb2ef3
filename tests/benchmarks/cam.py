"""How long a map takes, and what it holds in memory, beside a bare forward pass and three other
packages.

    PYTHONPATH=. python tests/benchmarks/cam.py \
        [--arch resnet18,resnet50] [--batch 1,8] [--repetitions 5]
        [--threads N] [--device cpu] [--out FOLDER]

Each contender gets the same images, weights, targets and memory layout (channels-last, in which
networks are loaded), and a copy of the network of its own, used as its documentation shows. Maps
are compared before anything is timed: a ratio stands only beside equal maps. Writes cam.csv,
cam_memory.csv, cam_start.csv and cam.png to --out.
"""

import argparse
import copy
import itertools
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import timing
import torch
import torchcam.methods
from captum.attr import LayerGradCam
from pytorch_grad_cam import GradCAM, LayerCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from timing import cc

ALPHAS = np.linspace(0, 1, 21).tolist()
DEPTHS = {
    "layer4": ("layer4", "layer4"),
    "layer2 + layer4": ("layer4", "layer2"),
}  # (Grad-CAM's layer, LayerCAM's)


def network(arch):
    """The shipped ResNet-18; for a network that does not ship, seeded random weights (its speed is
    the same).
    """
    if arch in ("resnet18", "squeezenet1_1"):
        return cc.networks.load(arch)[0]
    torch.manual_seed(0)
    return cc.networks.torchvision.models.get_model(arch, weights=None).eval()


def pictures(count, device, size=224):
    """Smooth noise, as preprocessed images: (count, 3, size, size)."""
    draw = torch.Generator().manual_seed(0)
    coarse = torch.randn(count, 3, 14, 14, generator=draw)
    x = torch.nn.functional.interpolate(
        coarse, size=(size, size), mode="bicubic", align_corners=False
    )
    return x.to(device, memory_format=torch.channels_last)


def our_maps(model, x, depth, target):
    """Both maps, each at its layer's own resolution, divided by its maximum."""
    deep, shallow = DEPTHS[depth]
    captured = cc.capture(model, x, [shallow, deep], target)
    a = cc.grad_cam(captured.activations[deep], captured.gradients[deep])
    b = cc.layer_cam(captured.activations[shallow], captured.gradients[shallow])
    return cc.normalise(a), cc.normalise(b)


def with_hybrids(model, x, depth, target):
    """Both maps and their product with 21 weights, at the finer one's resolution."""
    a, b = our_maps(model, x, depth, target)
    size = None if a.shape == b.shape else tuple(b.shape[1:])
    return a, b, [cc.hybrid(a, b, alpha, size) for alpha in ALPHAS]


def make_contenders(arch, depth, batch, device="cpu", only=None):
    """{name: function without arguments}; the targets are classes whose maps are not zero."""
    device = torch.device(device)
    original = network(arch).to(device, memory_format=torch.channels_last)
    x, (deep, shallow) = pictures(batch, device), DEPTHS[depth]
    target = visible_targets(original, x, depth)
    made = {}
    for name, make in CONTENDERS.items():
        if name in (only or CONTENDERS):
            model = copy.deepcopy(original).requires_grad_(name in LEARNING)
            made[name] = make(model, x, deep, shallow, depth, target)
    return made


def visible_targets(model, x, depth):
    """For each image the first class for which neither map is zero everywhere: two zero maps are
    equal to anything.
    """
    found = torch.full((len(x),), -1)
    for k in range(20):
        a, b = (m.amax((1, 2)).cpu() for m in our_maps(model, x, depth, k % model(x[:1]).shape[1]))
        found = torch.where((found < 0) & (a > 0) & (b > 0), k, found)
        if (found >= 0).all():
            return found.tolist()
    raise SystemExit(
        "some image has a zero map for each of the first 20 classes: choose other weights."
    )


def forward(model, x, deep, shallow, depth, target):
    def run():
        with torch.inference_mode():
            return model(x)

    return run


def torchcam_each(model, x, deep, shallow, depth, target):
    """An extractor, a forward pass and a backward pass for each map, as its documentation shows."""

    def run():
        maps = []
        for kind, name in ((torchcam.methods.GradCAM, deep), (torchcam.methods.LayerCAM, shallow)):
            with kind(model, name) as extractor:
                maps.append(cc.normalise(extractor(target, model(x), normalized=False)[0].detach()))
        return maps

    return run


def torchcam_two(model, x, deep, shallow, depth, target):
    """One forward pass and two backward passes, which is the least it needs: both extractors hear
    the same pass.
    """
    extractors = torchcam.methods.GradCAM(model, deep), torchcam.methods.LayerCAM(model, shallow)

    def run():
        scores = model(x)
        a = extractors[0](target, scores, normalized=False, retain_graph=True)[0]
        return cc.normalise(a.detach()), cc.normalise(
            extractors[1](target, scores, normalized=False)[0].detach()
        )

    return run


def pytorch_grad_cam_two(model, x, deep, shallow, depth, target):
    """Two objects, two calls; it returns maps of the image's size, scaled to min 0 and max 1."""
    cams = [
        kind(model, [model.get_submodule(n)]) for kind, n in ((GradCAM, deep), (LayerCAM, shallow))
    ]
    asked = [ClassifierOutputTarget(k) for k in target]
    return lambda: tuple(torch.from_numpy(cam(input_tensor=x, targets=asked)) for cam in cams)


def captum_one(model, x, deep, shallow, depth, target):
    """It has Grad-CAM and no LayerCAM."""
    method, asked = (
        LayerGradCam(model, model.get_submodule(deep)),
        torch.tensor(target, device=x.device),
    )
    return lambda: (
        cc.normalise(method.attribute(x, asked, relu_attributions=True).detach()[:, 0]),
    )


def ours_one(model, x, deep, shallow, depth, target):
    def run():
        captured = cc.capture(model, x, deep, target)
        return (cc.normalise(cc.grad_cam(captured.activations[deep], captured.gradients[deep])),)

    return run


def ours_enlarged(model, x, deep, shallow, depth, target):
    return lambda: tuple(cc.enlarge(m, (224, 224)) for m in our_maps(model, x, depth, target))


CONTENDERS = {
    "bare forward pass": forward,
    "ours: Grad-CAM": ours_one,
    "captum: Grad-CAM": captum_one,
    "ours: both maps": lambda model, x, deep, shallow, depth, t: (
        lambda: our_maps(model, x, depth, t)
    ),
    "TorchCAM: both maps": torchcam_each,
    "TorchCAM: both maps, sharing a pass": torchcam_two,
    "ours: both maps at 224 px": ours_enlarged,
    "pytorch-grad-cam: both maps at 224 px": pytorch_grad_cam_two,
    "ours: both maps, 21 hybrids": lambda model, x, deep, shallow, depth, t: (
        lambda: with_hybrids(model, x, depth, t)
    ),
}
LEARNING = {
    n for n in CONTENDERS if n.startswith(("captum", "TorchCAM", "pytorch"))
}  # they need gradients everywhere
PAIRS = {  # a peer, and what of ours returns the same
    "captum: Grad-CAM": "ours: Grad-CAM",
    "TorchCAM: both maps": "ours: both maps",
    "TorchCAM: both maps, sharing a pass": "ours: both maps",
    "pytorch-grad-cam: both maps at 224 px": "ours: both maps at 224 px",
}


def largest_difference(peer, own):
    """The largest difference between two lists of maps; those with a minimum above 0 are scaled to
    min 0 and max 1 on both sides, as pytorch-grad-cam does to its own.
    """

    def scaled(m):
        m = m.detach().float().cpu()
        low, high = m.amin((1, 2), keepdim=True), m.amax((1, 2), keepdim=True)
        return (m - low) / (high - low)

    return max(float((scaled(a) - scaled(b)).abs().max()) for a, b in zip(peer, own, strict=True))


def compare_maps(made):
    """{peer: largest difference to ours}; ends the benchmark where maps differ."""
    found = {peer: largest_difference(made[peer](), made[own]()) for peer, own in PAIRS.items()}
    for peer, difference in found.items():
        if not difference < 1e-4:
            raise SystemExit(
                f"{peer} and ours differ by {difference:.2g}: a ratio would compare unequal things."
            )
    return found


def slider_times(repetitions):
    """Seconds of what notebook 04 computes anew when its slider moves: a fusion and three overlays,
    as PNG.
    """
    import cv2
    from PIL import Image

    draw = np.random.default_rng(0)
    photo = Image.fromarray(draw.integers(0, 255, (260, 260, 3), np.uint8))
    a, b = (torch.from_numpy(draw.random((1, 224, 224), np.float32)) for _ in range(2))

    def fused():
        three = [cc.figures.overlay(photo, m, 0.5) for m in (a[0], cc.hybrid(a, b, 0.35)[0], b[0])]
        return cv2.imencode(".png", np.hstack(three)[..., ::-1])

    return timing.repeat({"slider": fused}, repetitions, torch.device("cpu"))


def import_times(repetitions):
    """Seconds to import torch and torchvision, and to import cam_core, in fresh processes."""
    probe = "import torch, torchvision"
    if subprocess.run([sys.executable, "-c", probe], capture_output=True).returncode:
        probe = WITHOUT_OPERATORS
    ours = f"import sys; sys.path.insert(0, {str(timing.HOME)!r}); import cam_core"
    start = {
        "torch and torchvision": lambda: subprocess.run([sys.executable, "-c", probe], check=True),
        "cam_core": lambda: subprocess.run([sys.executable, "-c", ours], check=True),
    }
    return timing.repeat(start, repetitions, torch.device("cpu"))


WITHOUT_OPERATORS = """
import torch
library = torch.library.Library("torchvision", "DEF")  # as lab.networks does
for name in ("nms", "qnms"):
    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import torchvision
"""


def draw(table, file, device):
    """Ratios to the bare forward pass, for the largest batch."""
    shown = table[table["batch"] == table["batch"].max()]
    groups = list(shown.groupby(["arch", "depth"], sort=False))
    fig, axes = plt.subplots(
        1, len(groups), figsize=(3.0 * len(groups) + 2.2, 3.2), sharey=True, sharex=True
    )
    for ax, ((arch, depth), part) in zip(np.atleast_1d(axes), groups, strict=True):
        colours = ["#0072B2" if n.startswith("ours") else "#999999" for n in part["name"]]
        ax.barh(part["name"], part["ratio"], color=colours)
        ax.errorbar(
            part["ratio"],
            range(len(part)),
            xerr=[part["ratio"] - part["low"], part["high"] - part["ratio"]],
            fmt="none",
            ecolor="black",
            linewidth=1,
        )
        for y, (ratio, high) in enumerate(
            zip(part["ratio"], part["high"].fillna(part["ratio"]), strict=True)
        ):
            ax.text(high, y, f"  {ratio:.2f}", va="center", fontsize=8)
        ax.axvline(1, color="black", linewidth=0.8, linestyle=":")
        ax.set(
            title=f"{arch}, {depth}",
            xlabel="time, bare forward pass = 1",
            xlim=(0, 1.2 * shown["high"].max()),
        )
        ax.invert_yaxis() if ax is np.atleast_1d(axes)[0] else None
    fig.suptitle(f"Time of an explanation, batch of {shown['batch'].max()} images, {device.type}")
    fig.savefig(file, dpi=150)
    print(f"-> {file}")


def compare_speed(arch, depth, batch, repetitions, device):
    """Every contender's time beside the bare forward pass, and each peer's beside what of ours
    returns the same.
    """
    made = make_contenders(arch, depth, batch, device)
    differs = compare_maps(made)
    times = timing.repeat(made, repetitions, device)
    found = timing.ratios(times, "bare forward pass").set_index("name")
    for peer, own in PAIRS.items():
        to = timing.ratios(times, own).set_index("name").loc[peer]
        found.loc[peer, ["to_ours", "to_ours_low", "to_ours_high"]] = to[
            ["ratio", "low", "high"]
        ].to_list()
        found.loc[peer, "largest_difference"] = differs[peer]
    return found.reset_index().assign(arch=arch, depth=depth, batch=batch)


def compare_memory(arch, depth, device, batch=8):
    """What each contender makes autograd keep, and by how much the peak of a process of its own
    grows, in MiB.
    """
    rows = []
    for name in CONTENDERS:
        held = timing.bytes_for_backward(one_contender(arch, depth, name, device)) / 2**20
        grown = np.nan
        if device.type == "cpu":
            grown, _ = timing.alone(one_contender, arch, depth, name)
        rows.append(
            dict(arch=arch, depth=depth, batch=batch, name=name, held_mib=held, peak_mib=grown)
        )
    return pd.DataFrame(rows)


def one_contender(arch, depth, name, device="cpu"):
    return make_contenders(arch, depth, 8, device, [name])[name]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--arch", default="resnet18,resnet50")
    parser.add_argument("--batch", default="1,8")
    args, device = timing.start(parser, 5)
    archs, batches = args.arch.split(","), [int(b) for b in args.batch.split(",")]
    rows = []
    for arch, depth, batch in itertools.product(archs, DEPTHS, batches):
        # one image is quick, and its times scatter more
        rounds = args.repetitions * (4 if batch == 1 else 1)
        rows.append(compare_speed(arch, depth, batch, rounds, device))
        print(f"\n{arch}, {depth}, batch {batch}")
        shown = rows[-1].drop(columns=["to", "arch", "depth", "batch"])
        print(shown.round(3).to_string(index=False), flush=True)
    table = pd.concat(rows, ignore_index=True)
    timing.save(table, args.out / "cam.csv", device)
    memory = compare_memory(archs[-1], "layer4", device)
    print(f"\n{archs[-1]}, layer4, batch 8: MiB held for the backward pass, growth of the peak")
    print(memory.drop(columns=["arch", "depth"]).round(1).to_string(index=False), flush=True)
    timing.save(memory, args.out / "cam_memory.csv", device)
    other = [timing.ratios(slider_times(args.repetitions), "slider")]
    other.append(timing.ratios(import_times(args.repetitions), "torch and torchvision"))
    print("\n" + pd.concat(other).round(3).to_string(index=False))
    timing.save(pd.concat(other), args.out / "cam_start.csv", device)
    draw(table, args.out / "cam.png", device)


if __name__ == "__main__":
    main()
