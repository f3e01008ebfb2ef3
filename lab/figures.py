"""One visual language: how methods are called and coloured, maps over images, and the plots of the
notebooks.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from numbers import Real
from pathlib import Path

import cv2
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lab import RUN_ID, nearest
from lab.drawing import CLASSES
from lab.networks import IMAGENET, Preprocessing
from lab.pictures import as_rgb

# seaborn takes two seconds to import, so only the figures that are drawn with it wait for it.

# ---- methods: names and colours

# name -> (label in tables and figures, colour from Okabe and Ito's colour-blind safe set or a grey
# for controls)
STYLE: dict[str, tuple[str, str]] = {
    "grad_cam": ("Grad-CAM", "#0072B2"),
    "layer_cam": ("LayerCAM", "#E69F00"),
    "hybrid": ("Hybrid", "#D55E00"),
    "hybrid_same": ("Same-layer hybrid", "#CC79A7"),
    "fused_mean": ("Fusion: arithmetic mean", "#E377C2"),
    "fused_maximum": ("Fusion: maximum", "#AA3377"),
    "hybrid_deep": ("Hybrid of the last Grad-CAM", "#882255"),
    "grad_cam_pp": ("Grad-CAM++", "#56B4E9"),
    "hires_cam": ("HiResCAM", "#009E73"),
    "xgrad_cam": ("XGrad-CAM", "#7B61A8"),
    "rise": ("RISE", "#000000"),
    "layer_cam_shallow": ("Shallow LayerCAM", "#F0C75E"),
    "grad_cam_coarse": ("Hybrid's Grad-CAM", "#2F6F9F"),
    "grad_cam_finer": ("Grad-CAM one stage finer", "#4C9FD0"),
    "times_sobel": ("Grad-CAM × Sobel", "#8C6D31"),
    "times_activation": ("Grad-CAM × mean activation", "#B5894A"),
    "times_other": ("Grad-CAM × another's LayerCAM", "#D8B26E"),
    "hybrid_coarse": ("Hybrid on the deep grid", "#E0A080"),
    "sobel": ("Sobel edges", "#666666"),
    "activation": ("Shallow mean activation", "#808080"),
    "noise": ("Pixel noise", "#999999"),
    "smooth_noise": ("Smooth noise", "#777777"),
    "centre": ("Centre", "#555555"),
}


def label(method: str) -> str:
    """The name of a method as tables and figures print it."""
    return STYLE.get(method, (method, ""))[0]


def colour(method: str) -> str:
    """The one colour that a method has in every figure."""
    return STYLE.get(method, ("", "#222222"))[1]


# ---- maps over images


def colours(
    cam: np.ndarray | Tensor, size: tuple[int, int] | None = None, colormap: str = "inferno"
) -> np.ndarray:
    """A map in colours: (h, w) in [0, 1] -> uint8 (H, W, 3), enlarged bilinearly to size = (H, W)
    where it is given. A tensor may be on any device; (1, h, w) is taken as well.

    colormap: a name of matplotlib's. The default is even to the eye, in lightness too, so no value
    stands out but the high ones; "jet", which much of the literature uses, is not. Raises
    ValueError for a map that is not in [0, 1] and for an unknown name.
    """
    cam = _as_map(cam)
    if not isinstance(colormap, str) or colormap not in matplotlib.colormaps:
        known = nearest(str(colormap), list(matplotlib.colormaps))
        raise ValueError(f"colormap={colormap!r}: matplotlib has none. {known}")
    if size is not None:
        cam = cv2.resize(cam, size[::-1], interpolation=cv2.INTER_LINEAR)
    table = matplotlib.colormaps[colormap](np.arange(256), bytes=True)[:, None, :3]
    # as matplotlib does, in a tenth of the memory; twelve times as fast as table[steps]
    steps = np.minimum(cam * 256, 255).astype(np.uint8)
    return cv2.applyColorMap(steps, np.ascontiguousarray(table))


def _as_map(cam: np.ndarray | Tensor) -> np.ndarray:
    """A map as float32 (h, w), axes of length one before and after it left out."""
    try:
        cam = cam.detach().float().cpu() if isinstance(cam, Tensor) else cam
        values = np.asarray(cam, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"cam must be a map (h, w) in [0, 1]; got {type(cam).__name__}: {error}"
        ) from error
    shape = values.shape
    while values.ndim > 2 and values.shape[0] == 1:
        values = values[0]
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if values.ndim != 2 or not values.size or not (values.min() >= 0 and values.max() <= 1):
        found = f", values from {values.min()} to {values.max()}" if values.size else ""
        raise ValueError(
            f"cam must be one map (h, w) in [0, 1]; got shape {shape}{found}. "
            "Divide a map by its maximum; of several give one, such as cam[0]."
        )
    return values


def overlay(
    image: Image.Image | np.ndarray | Tensor | str | Path,
    cam: np.ndarray | Tensor,
    opacity: float = 0.75,
    colormap: str = "inferno",
) -> np.ndarray:
    """(1 - a) * image + a * colours(cam) with a = opacity * cam: uint8 (H, W, 3) at the image's own
    size.

    Where the map is zero the image stays as it is; the higher the attribution, the more of its
    colour is seen. image: a PIL image, array, tensor or file, see `pictures.as_rgb`. cam: (h, w) in
    [0, 1]. Raises ValueError for an opacity outside [0, 1], and as `colours` and `as_rgb` do.
    """
    pixels = np.asarray(as_rgb(image))
    if not isinstance(opacity, Real) or not 0 <= opacity <= 1:
        raise ValueError(f"opacity={opacity!r} must lie in [0, 1].")
    coloured = colours(cam, pixels.shape[:2], colormap)
    large = cv2.resize(_as_map(cam), pixels.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    mixed = coloured.astype(np.float32)
    mixed -= pixels  # in place: a photograph may have 80 million pixels
    mixed *= (opacity * large)[..., None]
    mixed += pixels
    return mixed.round(out=mixed).astype(np.uint8)


def edge_overlay(
    image: Image.Image | np.ndarray | Tensor | str | Path,
    cam: np.ndarray | Tensor,
    colormap: str = "inferno",
) -> np.ndarray:
    """The map in colours with the image's Canny edges drawn over it in white: uint8 (H, W, 3) at
    the image's own size. image and cam: as `overlay` takes them.

    Canny, IEEE PAMI 1986, from OpenCV, on the grey image shrunk to at most 500 pixels a side and
    smoothed by 1/300 of the longer one, with thresholds 50 and 100: they count per pixel, so the
    same edge would pass in a small photograph and not in a large one. Shows where a map ends at an
    edge, with none of the image's brightness in the way.
    """
    image = as_rgb(image)
    small, drawn = image.convert("L"), colours(cam, image.size[::-1], colormap)
    small.thumbnail((500, 500), Image.Resampling.BOX)
    grey = np.asarray(small)
    edges = cv2.Canny(cv2.GaussianBlur(grey, (0, 0), max(grey.shape) / 300), 50, 100)
    drawn[cv2.resize(edges, image.size, interpolation=cv2.INTER_LINEAR) > 100] = 255
    return drawn


def save_pictures(
    folder: str | Path,
    name: str,
    image: Image.Image | np.ndarray | Tensor | str | Path,
    cam: np.ndarray | Tensor,
    colormap: str = "inferno",
) -> None:
    """Five pictures of one explanation, at the image's own size: folder/NAME_original.png,
    _grayscale (the map, 0 black to 1 white), _heatmap (the map in colours), _overlay and _edges
    (`edge_overlay`). image and cam: as `overlay` takes them.
    """
    image = as_rgb(image)
    size = image.size[::-1]
    pictures = {
        "original": lambda: np.asarray(image),
        "grayscale": lambda: colours(cam, size, "gray")[..., 0],
        "heatmap": lambda: colours(cam, size, colormap),
        "overlay": lambda: overlay(image, cam, colormap=colormap),
        "edges": lambda: edge_overlay(image, cam, colormap),
    }

    def write(kind: str) -> None:
        _write_png(Path(folder) / f"{name}_{kind}.png", pictures[kind]())

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        list(threads.map(write, pictures))  # a list: what fails in a thread is raised here


# Measured with five pictures of a photograph of one megapixel: 0.16 s instead of 0.35 with Pillow's
# level 2, and 15 % larger; of one of 12 megapixels with a camera's noise as large.
QUICK_PNG = [
    *(cv2.IMWRITE_PNG_COMPRESSION, 1),
    *(cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE),
    *(cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_SUB),
]


def _write_png(file: Path, pixels: np.ndarray) -> None:
    """Pixels, uint8 (H, W) in grey or (H, W, 3) in RGB, as a PNG file."""
    if pixels.ndim == 3:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    # into memory first: OpenCV's own files take no name that is not ASCII everywhere, and a full
    # disk is not told
    file.write_bytes(cv2.imencode(".png", pixels, QUICK_PNG)[1])


def panel(ax, image, cam=None, mask=None, title: str = "", opacity: float = 0.75) -> None:
    """One picture of a grid: the image, with a map laid over it and the contour of a mask (white on
    black) where they are given, whatever the mask's size. A large image is shown with 800 pixels on
    its longer side, a grey one without a map in its own range. image: as `overlay` takes it.
    """
    picture = as_rgb(image)
    grey_alone = cam is None and (getattr(image, "mode", "") == "L" or np.ndim(image) == 2)
    pixels = np.asarray(picture.convert("L") if grey_alone else picture)
    if max(pixels.shape[:2]) > 800:
        pixels = cv2.resize(
            pixels,
            None,
            fx=800 / max(pixels.shape[:2]),
            fy=800 / max(pixels.shape[:2]),
            interpolation=cv2.INTER_AREA,
        )
    ax.imshow(
        pixels if cam is None else overlay(pixels, cam, opacity),
        cmap="gray" if grey_alone else None,
    )
    if mask is not None:
        shape = cv2.resize(
            np.asarray(mask).astype(np.uint8), pixels.shape[1::-1], interpolation=cv2.INTER_NEAREST
        )
        for contour in cv2.findContours(shape, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)[0]:
            closed = np.vstack([contour[:, 0], contour[:1, 0]])
            ax.plot(*closed.T, color="black", linewidth=2.2)
            ax.plot(*closed.T, color="white", linewidth=1.0)
    ax.set_title(title)
    ax.set_axis_off()


# ---- saving


def save(fig, path: str | Path) -> None:
    """Write the figure as PNG and, beside it, as PDF (the run's id in the metadata, no date, so
    equal runs give equal bytes), show it in a notebook, close it.
    """
    fig.savefig(path, metadata={"Software": None, "Run": RUN_ID})
    fig.savefig(Path(path).with_suffix(".pdf"), metadata={"CreationDate": None, "Keywords": RUN_ID})
    fig.set_layout_engine(
        "none"
    )  # the layout is settled; the inline picture need not compute it again
    if "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None:
        sys.modules["IPython"].display.display(fig)
    plt.close(fig)


# ---- notebook 04


def overlays_and_maps(image: Image.Image, maps: Mapping, mask=None):
    """The image, and beside it maps laid over it, with the same maps alone below: {title: map (H,
    W)}.
    """
    places = [["image", *maps], ["image", *(f"{title}, alone" for title in maps)]]
    widths = [2] + [1] * len(maps)
    height = 3.6 * image.height / image.width + 0.5
    size = {"figsize": (1.8 * sum(widths), height), "width_ratios": widths}
    fig, axes = plt.subplot_mosaic(places, **size)
    panel(axes["image"], image, None, mask, "the image")
    for title, cam in maps.items():
        panel(axes[title], image, cam, mask, title)
        axes[f"{title}, alone"].imshow(colours(cam, image.size[::-1]))
        axes[f"{title}, alone"].set_axis_off()
    return fig


def map_rows(
    image: Image.Image,
    rows: Sequence[Mapping],
    mask=None,
    width: float = 1.7,
    alone: bool = False,
):
    """One image under rows of maps, {title: map (H, W)}, or the maps alone; each panel is `width`
    inches wide.
    """
    columns = max(len(row) for row in rows)
    height = (width * image.height / image.width + 0.45) * len(rows)
    size = (width * columns, height)
    fig, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        for ax in line:
            ax.set_axis_off()
        for ax, (title, cam) in zip(line, row.items(), strict=False):
            if alone:
                panel(ax, colours(cam, image.size[::-1]), None, mask, title)
            else:
                panel(ax, image, cam, mask, title)
            ax.title.set_fontsize(8)
    return fig


def image_rows(
    images: Sequence[Image.Image], columns: Mapping, masks: Sequence, names: Sequence[str]
):
    """A row for each image, with its name, and a column for each kind of map: {title: maps (B, H,
    W)}.
    """
    tall = max(image.height / image.width for image in images)
    size = (1.6 * len(columns), (1.5 * tall + 0.02) * len(images) + 0.5)
    fig, axes = plt.subplots(len(images), len(columns), figsize=size, squeeze=False)
    for k, line in enumerate(axes):
        for ax, (title, maps) in zip(line, columns.items(), strict=True):
            panel(ax, images[k], maps[k], masks[k], title if k == 0 else "")
        place = {"transform": line[0].transAxes, "rotation": 90, "va": "center", "ha": "right"}
        line[0].text(-0.08, 0.5, names[k], **place)
    return fig


def fusion_rules(rules: Mapping, alpha: float = 0.5):
    """What each rule, {name: function of two maps and alpha}, makes of all pairs of values in [0,
    1].
    """
    size = (1.9 * len(rules) + 0.9, 2.2)
    fig, axes = plt.subplots(1, len(rules), figsize=size, squeeze=False, sharex=True, sharey=True)
    b, a = np.mgrid[0:1:101j, 0:1:101j]
    for ax, (name, rule) in zip(axes[0], rules.items(), strict=True):
        fused = rule(Tensor(a), Tensor(b), alpha).numpy()
        levels = np.linspace(0, 1, 11)
        drawn = ax.contourf(a, b, fused / fused.max(), levels=levels, cmap="inferno")
        ax.set(title=f"{name}, α = {alpha:g}", aspect="equal", xlabel="a (Grad-CAM)")
    axes[0, 0].set_ylabel("b (LayerCAM)")
    fig.colorbar(drawn, ax=axes, label="fusion", shrink=0.8)
    return fig


def fusion_surface(gain, pairs: Sequence[str], rules: Sequence[str], alphas, star: tuple):
    """A panel for each rule, a row for each pair of layers, a column for each weight.

    gain: a series by (pair, rule, alpha). All panels share one colour scale with its white at zero.
    The cell `star` gets a frame and a star.
    """
    values = np.array(
        [gain[pair, rule, alpha] for rule in rules for pair in pairs for alpha in alphas]
    )
    values = values.reshape(len(rules), len(pairs), len(alphas))
    limit = np.abs(values).max() or 1.0
    across = min(2, len(rules))
    down = -(-len(rules) // across)
    size = (0.7 * across * len(alphas) + 3.2, (0.3 * len(pairs) + 0.85) * down + 0.7)
    fig, axes = plt.subplots(down, across, figsize=size, sharex=True, sharey=True, squeeze=False)
    for ax in axes.flat[len(rules) :]:
        ax.set_axis_off()
    ends = {0: "0\nLayerCAM", 1: "1\nGrad-CAM"}
    for ax, rule, part in zip(axes.flat, rules, values, strict=False):
        drawn = ax.imshow(part, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        ax.set(title=f"rule: {rule}", yticks=range(len(pairs)), yticklabels=pairs)
        ax.set_xticks(range(len(alphas)), [ends.get(alpha, f"{alpha:g}") for alpha in alphas])
        for (i, j), value in np.ndenumerate(part):
            starred = (pairs[i], rule, alphas[j]) == star
            ink = "white" if abs(value) > 0.6 * limit else "black"
            text = f"★ {value:+.4f}" if starred else f"{value:+.4f}"
            ax.text(j, i, text, ha="center", va="center", fontsize=7, color=ink)
            if starred:
                frame = {"fill": False, "linewidth": 2.2}
                ax.add_patch(plt.Rectangle((j - 0.48, i - 0.48), 0.96, 0.96, **frame))
    label = "insertion − deletion,\nmean difference to Grad-CAM"
    fig.colorbar(drawn, ax=axes, label=label, shrink=0.8)
    fig.supxlabel("weight α of Grad-CAM", fontsize=9)
    fig.supylabel("layers: Grad-CAM × LayerCAM", fontsize=9)
    return fig


def shares_won(share, star: tuple, most: int = 12):
    """Bars of how often each candidate wins, a series by cell; those with at least one win in a
    hundred.
    """
    often = share[share >= 0.01].sort_values(ascending=False, kind="stable").head(most)[::-1]
    names = [f"{pair}, {rule}, α = {alpha:g}" for pair, rule, alpha in often.index]
    inks = [colour("hybrid") if cell == star else "#bbbbbb" for cell in often.index]
    fig, ax = plt.subplots(figsize=(6.4, 0.27 * len(often) + 1.2))
    drawn = ax.barh(names, often, color=inks)
    ax.bar_label(drawn, [f"{value:.0%}" for value in often], padding=3, fontsize=8)
    ax.set(xlabel="share of the resamples won", xlim=(0, 1.12 * often.max()))
    return fig, ax


WEIGHT_AXIS = "α (0 = LayerCAM alone, 1 = Grad-CAM alone)"


def weight_curves(paired, used: float):
    """The criterion's difference to Grad-CAM over the weight, by pixels and by blocks, with
    intervals.

    paired: rows of `compare` with unit and alpha; hybrid_same, the prior's fusion, becomes a
    diamond. used: the weight to mark.
    """
    curve = paired.sort_values("alpha")
    for bound in ("low", "high"):  # empty where all differences are equal
        curve[bound] = curve[bound].fillna(curve["difference"])
    fig, ax = plt.subplots(figsize=(6, 3.5))
    styles = {
        "pixels": ("pixels", colour("hybrid"), "o-"),
        "blocks": ("16 × 16 blocks", "#444444", "s--"),
    }
    on_row = ~curve["method"].isin(["hybrid_same", "grad_cam"])
    for unit, (name, ink, style) in styles.items():
        line = curve[on_row & (curve["unit"] == unit)]
        ax.plot(line["alpha"], line["difference"], style, color=ink, label=name)
        ax.fill_between(
            line["alpha"], line["low"], line["high"], color=ink, alpha=0.15, linewidth=0
        )
    prior = curve[(curve["unit"] == "pixels") & (curve["method"] == "hybrid_same")].iloc[0]
    ink = colour("hybrid_same")
    ax.plot(prior["alpha"], prior["difference"], "D", color=ink, label="the prior, pixels")
    ax.vlines(prior["alpha"], prior["low"], prior["high"], color=ink)
    ax.axhline(0, color="black", linewidth=0.8)
    ax.axvline(used, color="black", linewidth=0.8, linestyle=":")
    ax.set(xlabel=WEIGHT_AXIS, ylabel="insertion − deletion,\ndifference to Grad-CAM")
    ax.legend()
    return fig, ax


def energy_curves(energies: Mapping, weights: np.ndarray, used: float):
    """The energy in the mask over the weight, {name of a method: (images, weights)}: mean and 95 %
    normal band.
    """
    fig, ax = plt.subplots(figsize=(5.6, 3.2))
    for method, values in energies.items():
        mean = values.mean(0)
        error = 1.96 * values.std(0, ddof=min(1, len(values) - 1)) / np.sqrt(len(values))
        low, high = mean - error, mean + error
        ax.plot(weights, mean, color=colour(method), label=label(method))
        ax.fill_between(weights, low, high, color=colour(method), alpha=0.15, linewidth=0)
    ax.axvline(used, color="black", linewidth=0.8, linestyle=":")
    ax.set(xlabel=WEIGHT_AXIS)
    ax.legend()
    return fig, ax


def side_by_side(image: Image.Image, maps: Sequence, colormap: str = "inferno") -> bytes:
    """Overlays in a row as the bytes of a PNG, small enough to be drawn while a slider moves."""
    small = image.copy()
    small.thumbnail((320, 320))
    drawn = [overlay(small, cam, colormap=colormap) for cam in maps]
    return cv2.imencode(".png", np.hstack(drawn)[..., ::-1])[1].tobytes()


# ---- notebook 02


def short(name: str, most: int = 20) -> str:
    """A name for a title: cut after `most` characters."""
    return name if len(name) <= most else name[: most - 1] + "…"


def as_picture(x: Tensor, how: Preprocessing = IMAGENET) -> np.ndarray:
    """A preprocessed image (C, H, W) as it looks: uint8 (H, W, C). how: its preprocessing."""
    pixels = x.detach().cpu().permute(1, 2, 0).numpy() * np.array(how.std) + np.array(how.mean)
    return (pixels.clip(0, 1) * 255).round().astype(np.uint8)


def grid(panels: Sequence[Mapping | None], columns: int = 0, title: str = "", width: float = 1.8):
    """A figure of panels, row by row, `width` inches each; 0 columns: all in one row.

    A panel is a dictionary of what `panel` takes (image, cam, mask, title), or None for an empty
    place. One with "wrong": True has a red title.
    """
    columns = columns or len(panels)
    rows = -(-len(panels) // columns)
    lines = max(entry.get("title", "").count("\n") + 1 for entry in panels if entry)
    height = rows * (width + 0.17 * lines) + 0.35
    fig, axes = plt.subplots(rows, columns, figsize=(width * columns, height), squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, entry in zip(axes.flat, panels, strict=False):
        if entry is None:
            continue
        wrong = entry.get("wrong", False)
        panel(ax, **{key: value for key, value in entry.items() if key != "wrong"})
        ax.title.set_color(colour("hybrid") if wrong else "black")
        ax.title.set_fontsize(9 if width > 1.5 else 7)
    fig.suptitle(title)
    return fig


def channels(picture: Image.Image, maps: Tensor, titles: Sequence[str], title: str):
    """The picture and up to six activation maps (n, h, w) beside it, in two rows, on one scale."""
    places = [["picture", 0, 1, 2], ["picture", 3, 4, 5]]
    fig, axes = plt.subplot_mosaic(places, figsize=(8.4, 4.0), width_ratios=[1.6, 1, 1, 1])
    for ax in axes.values():
        ax.set_axis_off()
    panel(axes["picture"], picture)
    scale = {"vmin": float(maps.min()), "vmax": float(maps.max())}
    for place, (values, text) in enumerate(zip(maps.cpu().numpy(), titles, strict=True)):
        shown = axes[place].imshow(values, cmap="viridis", **scale)
        axes[place].set_title(text)
    beside = [axes[place] for place in range(6)]
    fig.colorbar(shown, ax=beside, label="activation $A_k$", shrink=0.8)
    fig.suptitle(title)
    return fig


def steps_to_map(
    weighted: Tensor, rectified: Tensor, enlarged: Tensor, picture: Image.Image, title: str
):
    """From the weighted sum, drawn in two colours, through ReLU and enlarging to the map over the
    picture.
    """
    fig, axes = plt.subplots(1, 4, figsize=(10, 2.9))
    limit = float(weighted.abs().max()) or 1.0
    drawn = [
        (weighted, "RdBu_r", -limit, limit, "weighted sum"),
        (rectified, "inferno", 0, limit, "after ReLU"),
        (enlarged, "inferno", 0, 1, "normalised and enlarged"),
    ]
    for ax, (values, colormap, low, high, text) in zip(axes, drawn, strict=False):
        shown = ax.imshow(values.cpu().numpy(), cmap=colormap, vmin=low, vmax=high)
        fig.colorbar(shown, ax=ax, shrink=0.7)
        ax.set(title=text, xticks=[], yticks=[])
        ax.spines[:].set_visible(True)
    panel(axes[3], picture, enlarged, title="over the image")
    fig.suptitle(title)
    return fig


def expansion(factors: Tensor, curves: Mapping[str, tuple[Tensor, Tensor]], ylabel: str):
    """For each layer the true score and the expansion's straight line, over a factor on the layer's
    activations.
    """
    factors = factors.numpy()
    size = (3.6 * len(curves), 2.9)
    fig, axes = plt.subplots(1, len(curves), figsize=size, sharey=True, squeeze=False)
    for ax, (layer, (true, line)) in zip(axes[0], curves.items(), strict=True):
        line = line.numpy()
        ax.plot(factors, true.numpy(), color="black", label="network")
        ax.plot(
            factors, line, color=colour("hybrid"), linestyle="--", label="first-order expansion"
        )
        ax.plot(1, np.interp(1, factors, line), "o", color="black")
        ax.set(title=f"activations scaled at {layer}", xlabel="factor t on all activations")
    axes[0, 0].set_ylabel(ylabel)
    axes[0, 0].legend()
    return fig


def vanishing(factor: Tensor, ratio: Tensor, title: str):
    """The ratio of two gradients' norms against p(1 - p), one point for each image, on logarithmic
    axes.
    """
    factor = factor.clamp_min(1e-9).numpy()
    ratio = ratio.clamp_min(1e-9).numpy()
    least = float(min(factor.min(), ratio.min()))
    ends = [min(1e-3, least / 2), 0.5]
    fig, ax = plt.subplots(figsize=(4.6, 3.4))
    ax.loglog(
        ends, ends, color="black", linestyle="--", linewidth=0.8, label="ratio = $p_c(1-p_c)$"
    )
    ax.loglog(factor, ratio, "o", color=colour("grad_cam"), markersize=4, label="one image")
    ax.set(xlabel="$p_c\\,(1-p_c)$", ylabel="gradient norm, probability / logit", title=title)
    ax.minorticks_off()
    ax.legend()
    return fig


# ---- notebook 03


def method_rows(pictures: Sequence, masks: Sequence, titles: Sequence[str], maps: Mapping, heights):
    """Grad-CAM above LayerCAM for each picture, a column for each layer.

    maps: {(method, layer): (B, H, W)}. heights: {layer: height of its map}, from shallow to deep.
    The picture stands at the left with its title, and below it with the contour of its mask, if it
    has one.
    """
    shape = (2 * len(pictures), 1 + len(heights))
    size = (1.8 * shape[1] + 0.3, 1.8 * shape[0] + 0.6)
    fig, axes = plt.subplots(*shape, figsize=size, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for k, picture in enumerate(pictures):
        panel(axes[2 * k, 0], picture, title=titles[k])
        if masks[k] is not None:
            panel(axes[2 * k + 1, 0], picture, mask=masks[k])
        for line, method in zip(axes[2 * k : 2 * k + 2], ("grad_cam", "layer_cam"), strict=True):
            for ax, name in zip(line[1:], heights, strict=True):
                panel(ax, picture, maps[method, name][k], masks[k])
            place = {"transform": line[1].transAxes, "rotation": 90, "va": "center", "ha": "right"}
            line[1].text(-0.03, 0.5, label(method), fontsize=10, **place)
    for ax, (name, height) in zip(axes[0, 1:], heights.items(), strict=True):
        ax.set_title(f"{_wrapped(name)}\n{height} × {height}")
    return fig


def channel_gradients(picture: Image.Image, channels: Mapping[str, tuple[int, Tensor, Tensor]]):
    """One channel of each layer: its activation A_k, its gradient G_k and ReLU(G_k) A_k.

    channels: {layer: (k, A_k (h, w), G_k (h, w))}, a row for each.
    """
    size = (9.6, 2.4 * len(channels) + 0.4)
    widths = [1, 1.15, 1.15, 1.15]
    fig, axes = plt.subplots(len(channels), 4, figsize=size, width_ratios=widths, squeeze=False)
    for line, (name, (k, A, G)) in zip(axes, channels.items(), strict=True):
        limit = float(G.abs().max()) or 1.0
        span = f"{float(G.min()):.2g} to {float(G.max()):.2g}"
        drawn = [
            (A, "viridis", {}, f"{_wrapped(name)}\nactivation $A_k$, k = {k}"),
            (G, "RdBu_r", {"vmin": -limit, "vmax": limit}, f"gradient $G_k$\n{span}"),
            (G.relu() * A, "inferno", {}, "ReLU$(G_k)\\,A_k$"),
        ]
        line[0].set_axis_off()
        for ax, (values, colormap, scale, title) in zip(line[1:], drawn, strict=True):
            shown = ax.imshow(values.cpu(), cmap=colormap, **scale)
            fig.colorbar(shown, ax=ax, shrink=0.8).formatter.set_powerlimits((-2, 3))
            ax.set(title=title, xticks=[], yticks=[])
            ax.spines[:].set_visible(True)
    panel(axes[0, 0], picture, title="the image")
    return fig


def signed_maps(maps: Mapping[str, Tensor], picture: Image.Image, cam: Tensor):
    """Maps with negative values, {title: (h, w)}, and at the right cam (H, W) over the picture.

    Each is drawn as a share of its largest absolute value, on one scale of two colours.
    """
    size = (2.4 * (len(maps) + 1) + 0.2, 3.0)
    fig, axes = plt.subplots(1, len(maps) + 1, figsize=size)
    for ax, (title, values) in zip(axes, maps.items(), strict=False):
        share = values / values.abs().max().clamp_min(1e-12)
        shown = ax.imshow(share.cpu(), cmap="RdBu_r", vmin=-1, vmax=1)
        ax.set(title=title, xticks=[], yticks=[])
        ax.spines[:].set_visible(True)
    fig.colorbar(shown, ax=list(axes[:-1]), shrink=0.7, label="share of largest value")
    panel(axes[-1], picture, cam, title="enlarged,\nover the image")
    return fig


def means_by_layer(table, titles: Mapping[str, str], chance: float, seed: int = 0):
    """Means over the images by layer and method, with 95 % bootstrap intervals.

    table: columns layer, method, metric and value, layers in the order to be drawn. titles:
    {metric: title}, a panel for each. chance: what a map without information reaches, drawn dotted.
    """
    import seaborn as sns

    order = list(table["layer"].unique())
    palette = {label(method): colour(method) for method in table["method"].unique()}
    fig, axes = plt.subplots(1, len(titles), figsize=(4.1 * len(titles), 3.3), sharey=True)
    for ax, (metric, title) in zip(axes, titles.items(), strict=True):
        part = table[table["metric"] == metric]
        sns.pointplot(
            part.assign(method=part["method"].map(label)),
            x="layer",
            y="value",
            hue="method",
            order=order,
            palette=palette,
            errorbar=("ci", 95),
            seed=seed,
            dodge=0.15,
            linewidth=1.5,
            legend=ax is axes[0],
            ax=ax,
        )
        ax.axhline(chance, color="black", linestyle=":", linewidth=1)
        ax.set(xlabel="layer, from fine to coarse", ylabel="mean over images", title=title)
        ax.set_ylim(0, 1.03)
        _slant(ax, order)
    axes[0].legend(title="")
    return fig


def values_by_layer(table, panels: Mapping[str, tuple[str, str, float]], seed: int = 0):
    """A dot for each image and a line at the mean, by layer.

    table: a column layer, in the order to be drawn, and one for each panel. panels:
    {column: (title, label of the y axis, lowest y)}; the highest y is 1.
    """
    order = list(table["layer"].unique())
    draw = np.random.default_rng(seed)
    fig, axes = plt.subplots(1, len(panels), figsize=(3.4 * len(panels), 3.4))
    for ax, (column, (title, ylabel, lowest)) in zip(axes, panels.items(), strict=True):
        for place, name in enumerate(order):
            values = table.loc[table["layer"] == name, column]
            sideways = draw.uniform(-0.15, 0.15, len(values))  # so that dots do not hide each other
            style = {"color": colour("layer_cam"), "s": 14, "alpha": 0.6, "linewidths": 0}
            ax.scatter(place + sideways, values, **style)
            ax.plot([place - 0.3, place + 0.3], [values.mean()] * 2, color="black")
        ax.set_xticks(range(len(order)), order)
        ax.axhline(0, color="black", linewidth=0.6, linestyle=":")
        ax.set(title=title, xlabel="layer, from fine to coarse", ylabel=ylabel)
        ax.set_ylim(lowest - 0.05, 1.05)
        _slant(ax, order)
    return fig


def _wrapped(name: str, most: int = 24) -> str:
    """A layer's dotted name in lines of at most so many characters, as far as its dots allow."""
    lines = textwrap.wrap(name.replace(".", ". "), most, break_long_words=False)
    return "\n".join(lines).replace(". ", ".")


def _slant(ax, names: Sequence[str]) -> None:
    """Long names of layers are written at an angle, so that they do not run into each other."""
    if max(len(name) for name in names) > 8:
        ax.tick_params(axis="x", labelrotation=20)


# ---- notebook 05


def maps_beside_images(pictures, masks, columns, titles, heading: str):
    """A row for each image: the image, and then a map in every column.

    pictures: arrays (H, W, 3). masks: for each the object's mask, or None. columns: {title: (maps
    (B, H, W), notes)}, a note being a line below the title for each image. titles: of the images.
    """
    size = (1.85 * (len(columns) + 1), 1.95 * len(pictures) + 0.5)
    fig, axes = plt.subplots(len(pictures), len(columns) + 1, figsize=size, squeeze=False)
    for i, row in enumerate(axes):
        panel(row[0], pictures[i], None, masks[i], titles[i])
        for ax, (name, (maps, notes)) in zip(row[1:], columns.items(), strict=True):
            parts = [name] if i == 0 else []
            parts += [notes[i]] if notes else []
            panel(ax, pictures[i], maps[i], masks[i], "\n".join(parts))
        for ax in row:
            ax.title.set_fontsize(7)
    fig.suptitle(heading, fontsize=9)
    return fig


def all_maps(pictures, masks, maps, titles, heading: str, columns: int = 8):
    """Every method's map of each image, in lines of eight. maps: {method: (B, H, W)}; the rest as
    above.
    """
    lines = -(-(len(maps) + 1) // columns)
    size = (1.2 * columns, 1.42 * lines * len(pictures) + 0.4)
    fig, axes = plt.subplots(lines * len(pictures), columns, figsize=size, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for i, picture in enumerate(pictures):
        group = axes[i * lines : (i + 1) * lines].flat
        panel(group[0], picture, None, None, titles[i])
        for ax, (method, cams) in zip(group[1:], maps.items(), strict=False):
            title = label(method).replace(" × ", " ×\n").replace(": ", ":\n")
            panel(ax, picture, cams[i], masks[i], title)
    for ax in axes.flat:
        ax.title.set_fontsize(6)
    fig.suptitle(heading, fontsize=8)
    return fig


def difference_panels(table, kinds, lines, lower, heading: str, key: str = "method", primary=()):
    """Mean paired differences with their intervals, a panel for each metric, mirrored where lower
    is better: right of the line is better everywhere.

    table: rows of `compare`. kinds: (metric, baseline) of each panel. lines: what stands on the
    vertical axis, values of the column `key`. lower: the metrics where lower is better. primary:
    the kinds that were fixed beforehand.
    """
    columns = len(kinds) if len(kinds) < 7 else 4
    rows = -(-len(kinds) // columns)
    size = (2.0 * columns + 1.8, (0.17 * len(lines) + 0.75) * rows + 0.3)
    fig, axes = plt.subplots(rows, columns, figsize=size, sharey=True, squeeze=False)
    for ax, kind in zip(axes.flat, kinds, strict=False):
        metric, baseline = kind
        part = table[(table["metric"] == metric) & (table["baseline"] == baseline)]
        _intervals(ax, part[part[key].isin(lines)], lines, key, -1 if metric in lower else 1)
        title = metric.replace("_", " ") + (f" ({baseline})" if baseline else "")
        title = f"{title}, n = {part['n'].max()}"
        if kind in primary:
            ax.set_title(f"PRIMARY\n{title}", fontsize=7, fontweight="bold")
        else:
            ax.set_title(title, fontsize=7)
    for ax in axes.flat[len(kinds) :]:
        ax.remove()
    axes[0, 0].invert_yaxis()
    fig.suptitle(heading, fontsize=9)
    return fig


def _intervals(ax, table, lines, key: str, sign: int) -> None:
    """A dot and its interval for each row, at the height of its name in lines."""
    for row in table.to_dict("records"):
        y = lines.index(row[key])
        ends = np.nan_to_num([sign * row["low"], sign * row["high"]])
        ax.plot(ends, [y, y], color=colour(row[key]), linewidth=2)
        ax.plot(sign * row["difference"], y, "o", color=colour(row[key]), markersize=3.5)
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_yticks(range(len(lines)), [label(name) for name in lines], fontsize=6.5)
    ax.tick_params(axis="x", labelsize=6.5)
    ax.xaxis.get_offset_text().set_fontsize(6)
    ax.locator_params(axis="x", nbins=4)


def mean_curves(curves, baselines, methods, seed: int):
    """Mean insertion and deletion curves with 95 % bootstrap bands, a line of panels for each
    baseline.

    curves: records with `points`, the probabilities of a curve.
    """
    import seaborn as sns

    long = curves[curves["method"].isin(methods)].explode("points")
    keys = ["image", "method", "metric", "baseline"]
    curve = long.groupby(keys)
    long["fraction"] = curve.cumcount() / (curve["points"].transform("size") - 1)
    long["probability"] = long["points"].astype(float)
    long["map"] = long["method"].map(label)
    palette = {label(m): colour(m) for m in methods}
    size = (8.2, 2.9 * len(baselines))
    fig, axes = plt.subplots(
        len(baselines), 2, figsize=size, squeeze=False, sharex=True, sharey=True
    )
    for row, baseline in zip(axes, baselines, strict=True):
        for ax, metric in zip(row, ("insertion", "deletion"), strict=True):
            part = long[(long["metric"] == metric) & (long["baseline"] == baseline)]
            sns.lineplot(
                part,
                x="fraction",
                y="probability",
                hue="map",
                palette=palette,
                seed=seed,
                ax=ax,
                legend=ax is axes[0, 0],
            )
            ax.set_title(f"{metric}, baseline {baseline}, n = {part['image'].nunique()}")
            ax.set_xlabel("fraction of pixels replaced")
            ax.set_ylabel("probability of the predicted class")
    axes[0, 0].legend(title=None, fontsize=7, loc="lower right")
    return fig


def difference_by_group(table, kinds, lower, axis: str, heading: str):
    """The hybrid's difference to Grad-CAM in each group of images, with interval and number of
    images: a panel for each of kinds, (metric, baseline).
    """
    fig, axes = plt.subplots(1, len(kinds), figsize=(1.9 * len(kinds), 2.5), squeeze=False)
    for ax, (metric, baseline) in zip(axes.flat, kinds, strict=True):
        part = table[(table["metric"] == metric) & (table["baseline"] == baseline)]
        rows = part.to_dict("records")
        for x, row in enumerate(rows):
            ends = np.nan_to_num([row["low"], row["high"]])
            ax.plot([x, x], ends, color=colour("hybrid"), linewidth=2)
            ax.plot(x, row["difference"], "o", color=colour("hybrid"), markersize=4)
        ax.axhline(0, color="black", linewidth=0.8)
        names = [f"{row['group']}\n({row['n']})" for row in rows]
        ax.set_xticks(range(len(rows)), names, fontsize=6)
        ending = " (lower is better)" if metric in lower else ""
        ax.set_title(f"{metric.replace('_', ' ')}{ending}", fontsize=7)
        ax.tick_params(axis="y", labelsize=6)
        ax.yaxis.get_offset_text().set_fontsize(6)
    axes[0, 0].set_ylabel("hybrid − Grad-CAM", fontsize=8)
    fig.supxlabel(f"{axis} (number of images)", fontsize=8)
    fig.suptitle(heading, fontsize=9)
    return fig


def difference_by_number(table, methods, heading: str):
    """The difference to Grad-CAM on the first n images, with its interval, for insertion and
    deletion.
    """
    fig, axes = plt.subplots(1, 2, figsize=(8.6, 3.1), sharex=True)
    for ax, metric in zip(axes, ("insertion", "deletion"), strict=True):
        for k, method in enumerate(methods):
            rows = table[(table["metric"] == metric) & (table["method"] == method)]
            x = rows["n"] * 1.04 ** (k - 1)  # beside each other
            ax.vlines(
                x, rows["low"].fillna(0), rows["high"].fillna(0), color=colour(method), linewidth=2
            )
            style = {"markersize": 4, "linewidth": 0.8}
            ax.plot(x, rows["difference"], "o-", color=colour(method), label=label(method), **style)
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set(
            xscale="log",
            xlabel="number of images",
            title=f"{metric}: difference to Grad-CAM, 95 % BCa",
        )
        ax.set_xticks(sorted(set(table["n"])), sorted(set(table["n"])))
        ax.set_xlim(table["n"].min() / 1.4, table["n"].max() * 1.4)
        ax.minorticks_off()
    axes[1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    fig.suptitle(heading, fontsize=9)
    return fig


def win_loss(values, rounding: float, heading: str):
    """A dot for each image, above the diagonal where the hybrid's value is higher. values: {title:
    table with the columns grad_cam and hybrid}.
    """
    fig, axes = plt.subplots(1, len(values), figsize=(3.1 * len(values), 3.9), squeeze=False)
    for ax, (name, table) in zip(axes.flat, values.items(), strict=True):
        gain = table["hybrid"] - table["grad_cam"]
        wins = int((gain > rounding).sum())
        losses = int((gain < -rounding).sum())
        ax.scatter(
            table["grad_cam"],
            table["hybrid"],
            s=14,
            color=colour("hybrid"),
            alpha=0.6,
            linewidths=0,
        )
        ends = [table.min().min(), table.max().max()]
        ax.plot(ends, ends, color="black", linewidth=0.8)
        ax.set(xlabel="Grad-CAM", ylabel="hybrid", aspect="equal")
        ax.set_title(
            f"{name}\nhybrid better on {wins}, worse on {losses} of {len(table)}", fontsize=8
        )
    fig.suptitle(heading, fontsize=9)
    return fig


def shares_on_the_right_lesion(table, methods, heading: str):
    """Which share of a map lies on the lesion asked for, and on how many images it does so for both
    questions.
    """
    titles = {
        "discrimination": "energy on the lesion asked for\n(0.5: does not follow the question)",
        "both_right": "right lesion for both questions",
    }
    size = (8.4, 0.19 * len(methods) + 1.1)
    fig, axes = plt.subplots(1, 2, figsize=size, sharey=True)
    for ax, (metric, title) in zip(axes, titles.items(), strict=True):
        means = table[table["metric"] == metric].set_index("method")["mean"].reindex(methods)
        ax.barh([label(m) for m in methods], means, color=[colour(m) for m in methods])
        ax.set(xlim=(0, 1), title=title)
        ax.tick_params(axis="y", labelsize=7)
    axes[0].axvline(0.5, color="black", linewidth=0.8, linestyle=":")
    axes[0].invert_yaxis()
    fig.suptitle(heading, fontsize=9)
    return fig


def forgetting(means, methods, heading: str):
    """Similarity with the original map while the network is randomised. means: method, metric,
    stage, layer, value.
    """
    fig, axes = plt.subplots(1, 2, figsize=(10.5, 3.4), sharex=True)
    names = ["none", *dict.fromkeys(means.sort_values("stage")["layer"])]
    for ax, metric in zip(axes, ("spearman", "ssim"), strict=True):
        for method in methods:
            rows = means[(means["metric"] == metric) & (means["method"] == method)]
            style = {"color": colour(method), "label": label(method), "markersize": 3}
            ax.plot([0, *rows["stage"]], [1, *rows["value"]], "o-", **style)
        ax.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
        ax.set(
            xlabel="randomised down to",
            title={"spearman": "rank correlation", "ssim": "SSIM"}[metric],
        )
        ax.axhline(0, color="black", linewidth=0.8)
    axes[1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    fig.suptitle(heading, fontsize=9)
    return fig


def energy_on_the_marker(exposed, methods, area: float, heading: str):
    """From the honest network (open circle) to the cheating one (dot), and the paired difference
    with its interval. area: the marker's share of the image, which a map that knows nothing puts
    there.
    """
    energy = exposed[exposed["metric"] == "energy"].set_index("method").loc[list(methods)]
    fig, axes = plt.subplots(1, 2, figsize=(9, 0.24 * len(methods) + 1.3), sharey=True)
    for y, (method, row) in enumerate(energy.iterrows()):
        shade = colour(method)
        axes[0].plot([row["honest"], row["cheating"]], [y, y], color=shade, linewidth=1.5)
        axes[0].plot(row["honest"], y, "o", color=shade, markerfacecolor="white", markersize=5)
        axes[0].plot(row["cheating"], y, "o", color=shade, markersize=5)
        axes[1].plot([row["low"], row["high"]], [y, y], color=shade, linewidth=2)
        axes[1].plot(row["difference"], y, "o", color=shade, markersize=4)
    axes[0].axvline(area, color="black", linewidth=0.8, linestyle=":")
    axes[1].axvline(0, color="black", linewidth=0.8)
    axes[0].set_yticks(range(len(energy)), [label(m) for m in energy.index], fontsize=7)
    axes[0].set_xlabel("energy on the marker: ○ honest, ● cheating")
    axes[1].set_xlabel("cheating − honest, 95 % BCa interval")
    axes[0].invert_yaxis()
    fig.suptitle(heading, fontsize=9)
    return fig


# ---- notebook 01


def grey(picture: np.ndarray, low: float = 0, high: float = 200) -> np.ndarray:
    """Grey levels as a picture, uint8 (H, W, 3), low black and high white, so that several can be
    compared: `panel` would stretch each one to its own range.
    """
    scaled = (np.asarray(picture, np.float32) - low) / (high - low)
    pixels = (255 * scaled.clip(0, 1)).astype(np.uint8)
    return np.stack([pixels] * 3, axis=2)


def draw_boxes(ax, boxes: Sequence[Sequence[float]], scale: float = 1.0) -> None:
    """Boxes [x0, y0, x1, y1] as orange frames, in pixels of an image that is shown at `scale`."""
    for x0, y0, x1, y1 in np.reshape(boxes, (-1, 4)) * scale:
        frame = plt.Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor="tab:orange")
        ax.add_patch(frame)


def images_and_twins(drawings: Sequence, image_p: np.ndarray, twin_p: np.ndarray):
    """Drawings with their lesion's contour above, their twins below, each with the probability of
    the drawing's class. image_p, twin_p: (n, K).
    """
    above = []
    below = []
    for drawing, p, q in zip(drawings, image_p, twin_p, strict=True):
        kind = drawing.classes[0]
        k = CLASSES.index(kind)
        title = f"{kind}: p = {p[k]:.2f}"
        above.append({"image": drawing.image, "mask": drawing.masks[kind], "title": title})
        below.append({"image": drawing.twin, "title": f"without it: p = {q[k]:.2f}"})
    return grid(above + below, columns=len(above), width=2.1)


def gallery(pictures: Sequence[Image.Image], titles: Sequence[str], boxes: Sequence = ()):
    """Up to five pictures in a row, with their boxes where these are given."""
    panels = []
    for picture, title in zip(pictures, titles, strict=True):
        panels.append({"image": picture, "title": title})
    fig = grid(panels, columns=min(5, len(panels)), width=2)
    for ax, picture, found in zip(fig.axes, pictures, boxes, strict=False):
        draw_boxes(ax, found, min(1, 800 / max(picture.size)))  # `panel` shows no more pixels
    return fig


def two_masks(pictures: Sequence, masks: Sequence, others: Sequence, titles: Sequence[str]):
    """Pictures in rows of six, each with the contours of two masks: first orange, second blue."""
    panels = []
    for picture, title in zip(pictures, titles, strict=True):
        panels.append({"image": picture, "title": title})
    fig = grid(panels, columns=6, width=1.7)
    for ax, first, second in zip(fig.axes, masks, others, strict=False):
        ax.contour(first, levels=[0.5], colors="tab:orange", linewidths=1)
        ax.contour(second, levels=[0.5], colors="tab:blue", linewidths=1)
    return fig


def audit(table):
    """How often simple features tell the class. table: feature, accuracy, low, high, chance, n."""
    fig, ax = plt.subplots(figsize=(7, 0.5 * len(table) + 0.9))
    y = np.arange(len(table))
    reach = np.stack([table["accuracy"] - table["low"], table["high"] - table["accuracy"]])
    ax.barh(y, table["accuracy"], height=0.5, color="#8FB7D9")
    ax.errorbar(table["accuracy"], y, xerr=reach, fmt="none", color="black", capsize=3)
    for row, (chance, n) in enumerate(zip(table["chance"], table["n"], strict=True)):
        ax.plot([chance, chance], [row - 0.4, row + 0.4], color="black", linestyle=":")
        ax.text(1.01, row, f"n = {n}", va="center", fontsize=8)
    ax.set_yticks(y, table["feature"])
    ax.set(xlim=(0, 1), xlabel="accuracy on the test split (dotted: guessing)")
    ax.invert_yaxis()
    return fig


def size_and_contrast(lesions, classes: Sequence[str]):
    """Extent and summed grey levels of the lesions: for each class the share that is smaller."""
    import seaborn as sns

    fig, axes = plt.subplots(1, 2, figsize=(9, 2.9), sharey=True)
    names = {"area": "area of the hulls / image", "summed_contrast": "sum of image − twin"}
    for ax, (column, name) in zip(axes, names.items(), strict=True):
        sns.ecdfplot(lesions, x=column, hue="label", hue_order=classes, log_scale=True, ax=ax)
        ax.set(xlabel=name, ylabel="share of the lesions")
        ax.xaxis.set_minor_formatter("")
        sns.move_legend(ax, "upper left", title=None)
    fig.suptitle(f"all lesions but those of pairs, n = {len(lesions)}")
    return fig


def learning_curves(history, kept: int, title: str):
    """Loss and accuracy of each epoch, on the training and on the validation images.

    history: a table with train_loss, val_loss, train_acc, val_acc. kept: the epoch whose weights
    are used, counted from 1.
    """
    fig, axes = plt.subplots(1, 2, figsize=(8.5, 2.7), sharex=True)
    epochs = np.arange(1, len(history) + 1)
    names = {"loss": "cross-entropy", "acc": "accuracy"}
    for ax, (kind, name) in zip(axes, names.items(), strict=True):
        for part in ("train", "val"):
            ax.plot(epochs, history[f"{part}_{kind}"], marker=".", label=part)
        ax.axvline(kept, color="grey", linestyle=":", label=f"kept: epoch {kept}")
        ax.set(xlabel="epoch", ylabel=name)
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[0].legend()
    fig.suptitle(title)
    return fig


def confusion(truth, predicted, names: Sequence[str], title: str):
    """How many images of each class are taken for which."""
    import seaborn as sns

    counts = np.zeros((len(names), len(names)), int)
    np.add.at(counts, (np.asarray(truth), np.asarray(predicted)), 1)
    fig, ax = plt.subplots(figsize=(1.6 + 0.55 * len(names), 1.1 + 0.45 * len(names)))
    sns.heatmap(
        counts,
        annot=True,
        fmt="d",
        cmap="Blues",
        cbar=False,
        ax=ax,
        xticklabels=names,
        yticklabels=names,
    )
    ax.set(xlabel="predicted", ylabel="true", title=title)
    ax.tick_params(axis="y", labelrotation=0)
    return fig


def difficulty(levels, lesions, classes: Sequence[str], title: str):
    """Accuracy at each level with its interval, and what taking the lesion away costs.

    levels: a table by level with accuracy, low, high. lesions: one row per image with a lesion,
    with label and drop, the fall of its class's probability on the twin.
    """
    import seaborn as sns

    fig, axes = plt.subplots(1, 2, figsize=(8.5, 2.9))
    reach = [levels["accuracy"] - levels["low"], levels["high"] - levels["accuracy"]]
    axes[0].errorbar(levels.index, levels["accuracy"], reach, fmt="o", capsize=3)
    axes[0].set(xlabel="complexity level", ylabel="accuracy", xticks=levels.index)
    axes[0].set_ylim(min(0.6, levels["low"].min() - 0.05), 1.02)
    sns.histplot(
        lesions,
        x="drop",
        hue="label",
        hue_order=classes,
        ax=axes[1],
        multiple="stack",
        bins=20,
        binrange=(-1, 1),
    )
    axes[1].axvline(0.5, color="grey", linestyle=":")
    axes[1].set(xlabel="p(image) − p(twin), true class", ylabel="images")
    sns.move_legend(axes[1], "upper left", title=None)
    fig.suptitle(title)
    return fig


def moved_letters(pictures: Mapping, answers: Mapping, markers, labels, classes: Sequence[str]):
    """Images as the clinics mark them above, the same with the letters exchanged below, the letter
    in a frame.

    pictures: {"file": [...], "moved": [...]}. answers[name, column]: class probabilities (n, K) of
    the network `name` for one of the two. markers: booleans. labels: the true class of each image.
    """
    panels = []
    for column, row in pictures.items():
        for k, picture in enumerate(row):
            lines = [labels[k]] if column == "file" else []
            for (name, asked), p in answers.items():
                if asked == column:
                    lines.append(f"{name}: {classes[int(p[k].argmax())]} {float(p[k].max()):.2f}")
            panels.append({"image": picture, "title": "\n".join(lines)})
    fig = grid(panels, columns=len(markers), width=2.1)
    for ax, marker in zip(fig.axes, [*markers, *markers], strict=True):
        x, y, width, height = cv2.boundingRect(np.asarray(marker).astype(np.uint8))
        draw_boxes(ax, [[x - 3, y - 3, x + width + 2, y + height + 2]])
    return fig
