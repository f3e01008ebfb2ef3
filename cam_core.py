"""Grad-CAM, LayerCAM and their fusion for PyTorch image classifiers, and how such explanations are judged.

One idea carries this module: a class activation map (CAM) is a pure function of activations and gradients. `capture` is
the only place that touches a network; everything behind it is small batched tensor code. Read it from top to bottom:

    1  torchvision       the one place that makes it importable next to a CPU-only torch
    2  capture           one forward pass and a part of the backward pass -> logits, activations, gradients
    3  CAMs              grad_cam, layer_cam and relatives: (A, G) -> (B, h, w)
    4  fusion            normalise, enlarge, hybrid
    5  models            load_model, default_layers
    6  images and data   read_image, preprocess, read_dataset, load_batch, load_masks
    7  explain, overlay  one image in one call
    8  method_maps       every method of the study, and its controls, from one capture
    9  faithfulness      insertion and deletion curves, AUC
    10 localisation      pointing game, energy in the mask, average precision
    11 statistics        paired differences with intervals
    12 runs and figures  seeds, output folders, one visual language

Notation: B images, C channels, h x w the size of a captured map, H x W the size of the input, K classes. Maps are
(B, height, width) float32 tensors, non-negative; "normalised" means divided by their maximum, so in [0, 1].
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn

# -------------------------------------------------------------------------------------------------------- 1 torchvision


def _declare_torchvision_ops() -> None:
    """Make `import torchvision` possible where its C++ operators cannot load.

    A torchvision wheel linked against CUDA finds no operators beside a CPU-only torch, and torchvision 0.28.0 then
    fails while it registers shape functions for `nms` and `qnms`. Nothing here calls them, so declaring the two schemas
    is enough. Where the operators do load, this function is never called.
    """
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declare_torchvision_ops.library = library  # the declaration lives as long as this object


try:
    import torchvision
except RuntimeError as error:
    if "torchvision::" not in str(error):
        raise
    for _name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
        del sys.modules[_name]  # halves of the failed import
    _declare_torchvision_ops()
    import torchvision

# ------------------------------------------------------------------------------------------------------------ 2 capture


@dataclass(frozen=True)
class Capture:
    """What one forward and one partial backward pass leave behind. All tensors are detached; B is the batch size.

    logits: (B, K). target: (B,) class indices. activations[layer], gradients[layer]: (B, C, h, w), in order of
    execution; gradients[layer][b] = d logits[b, target[b]] / d activations[layer][b].
    """

    logits: Tensor
    target: Tensor
    activations: dict[str, Tensor]
    gradients: dict[str, Tensor]


def capture(
    model: nn.Module, x: Tensor, layers: str | Sequence[str], target: int | Sequence[int] | Tensor | None = None
) -> Capture:
    """Activations A_l and gradients G_l = d y_t / d A_l of the target logit y_t, for any number of layers, in one pass.

    model: a classifier whose output is (B, K) logits, or an object with `.logits`. x: (B, C, H, W), as the model
    expects it. layers: dotted module names (`"layer4"`, `"features.29"`), or one of them. target: a class index for all
    images, one per image, or None for the predicted class of each.

    The model runs in eval mode with its parameters frozen; the output of the first captured layer becomes the leaf of
    the graph, so nothing in front of it is recorded, and every captured layer hands on a clone, so in-place operations
    behind it cannot alter what was captured. Afterwards, exceptions included, the model is as it was: hooks, modes,
    buffers, `requires_grad`, `.grad`. `DataParallel` and `torch.compile` wrappers are unwrapped with a warning. Works
    under `torch.no_grad` and `torch.inference_mode`.

    Raises ValueError for an unknown layer (names the nearest), one that runs twice or never, one without a spatial (B,
    C, h, w) output with h*w > 1, one that the target logit does not depend on, a target out of range, and logits that
    are not finite.
    """
    model = _unwrap(model)
    names = [layers] if isinstance(layers, str) else list(layers) if isinstance(layers, list | tuple) else [layers]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"layers={layers!r} must be dotted module names, such as 'layer4', not modules or other objects."
        )
    names = list(dict.fromkeys(names))
    modules = dict(model.named_modules())
    _check_input(model, x)
    if not names:
        raise ValueError("layers is empty: give at least one dotted module name, such as 'layer4'.")
    for name in names:
        if name not in modules or not name:
            raise ValueError(
                f"layer={name!r} is not in this {type(model).__name__}. {_nearest(name, [m for m in modules if m])}"
            )

    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            if name in outputs:
                raise ValueError(
                    f"layer={name!r} runs more than once in a pass, so its map is ambiguous. Choose one that runs once."
                )
            if not isinstance(output, Tensor) or output.ndim != 4 or output.shape[2] * output.shape[3] < 2:
                seen = f"{tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
                raise ValueError(
                    f"layer={name!r} has no spatial output: got {seen}, need (B, C, h, w), h*w > 1. Try an earlier one."
                )
            outputs[name] = output if output.requires_grad else output.detach().requires_grad_()
            return outputs[name].clone()

        return hook

    with _borrowed(model, {name: keep(name) for name in names}):
        logits = _logits(model(x.detach().clone()))  # a copy, as a first layer may work in place
        for name in names:
            if name not in outputs:
                raise ValueError(
                    f"layer={name!r} did not run in this forward pass. Choose a layer that the model uses."
                )
        chosen = _targets(target, logits)
        score = logits.gather(1, chosen[:, None]).sum()  # images do not mix in eval mode: one backward serves the batch
        if not score.requires_grad:
            raise ValueError(f"The logits do not depend on layer={names}. Choose a layer on the way to the logits.")
        gradients = torch.autograd.grad(score, list(outputs.values()), allow_unused=True)
    for name, gradient in zip(outputs, gradients, strict=True):
        if gradient is None:
            raise ValueError(
                f"The target logit does not depend on layer={name!r}. Choose a layer on the way to the logits."
            )
    if not bool(torch.isfinite(logits).all()):
        raise ValueError(
            "The model's logits contain NaN or infinity for this input. Check the input's scaling and the weights."
        )
    return Capture(
        logits.detach(),
        chosen,
        {n: a.detach() for n, a in outputs.items()},
        {n: g.detach() for n, g in zip(outputs, gradients, strict=True)},
    )


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Every submodule in eval mode; afterwards each in its own."""
    modes = [(m, m.training) for m in model.modules()]
    try:
        for m, _ in modes:
            m.training = False  # not .eval(), which a model may override
        yield
    finally:
        for m, training in modes:
            m.training = training


@contextmanager
def _borrowed(model: nn.Module, hooks: Mapping[str, Callable]) -> Iterator[None]:
    """The model in eval mode, frozen, with forward hooks by layer name and autograd on; afterwards as it was, whatever
    happened.
    """
    modules = dict(model.named_modules())
    trainable = [p for p in model.parameters() if p.requires_grad]
    handles = []
    try:
        for p in trainable:
            p.requires_grad_(False)
        for name, hook in hooks.items():
            handles.append(modules[name].register_forward_hook(hook))
        with _eval_mode(model), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for p in trainable:
            p.requires_grad_(True)


def _unwrap(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        elif hasattr(model, "_orig_mod"):  # torch.compile
            inner = model._orig_mod
        else:
            return model
        warnings.warn(
            f"{type(model).__name__} is unwrapped: the plain module inside is explained, on one device.", stacklevel=3
        )
        model = inner


def _logits(output) -> Tensor:
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor) or output.ndim != 2:
        got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"The model's output must be logits of shape (B, K); got {got}. Wrap the model so that it returns them."
        )
    return output


def _targets(target, logits: Tensor) -> Tensor:
    batch, classes = logits.shape
    if target is None:
        return logits.detach().argmax(1)
    try:
        chosen = target.clone() if isinstance(target, Tensor) else torch.tensor(target)
        chosen = chosen.to(logits.device)
    except (TypeError, ValueError, RuntimeError):
        chosen = torch.empty(0, 0)  # refused below
    if chosen.is_floating_point() or chosen.dtype == torch.bool or chosen.ndim > 1:
        raise ValueError(
            f"target={target!r} must be a class index, one index per image, or None for the predicted class."
        )
    chosen = chosen.long().expand(batch) if chosen.ndim == 0 else chosen.long()
    if len(chosen) != batch:
        raise ValueError(
            f"target has {len(chosen)} entries for {batch} images: give one class index for all, or one per image."
        )
    if bool(((chosen < 0) | (chosen >= classes)).any()):
        raise ValueError(f"target={target!r} is out of range: the model has {classes} classes, 0 to {classes - 1}.")
    return chosen


def _check_input(model: nn.Module, x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.ndim != 4 or not x.is_floating_point() or not len(x):
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be a float tensor (B, C, H, W) with B > 0; got {got}. See `preprocess`.")
    tensors = [*model.parameters(), *model.buffers()]
    if tensors and tensors[0].device != x.device:
        raise ValueError(
            f"x is on {x.device} and the model on {tensors[0].device}: move one of them with `.to(device)`."
        )
    if any(t.is_inference() for t in tensors):
        raise ValueError(
            "The model was created under torch.inference_mode, so no gradient can pass it. Load it outside."
        )


def _nearest(name: str, known: Sequence[str], most: int = 60) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    top = [k for k in known if k.count(".") < 2][:most]
    return (
        f"Nearest: {', '.join(close)}. " if close else ""
    ) + f"Known: {', '.join(top)}{', ...' if len(known) > len(top) else ''}"


# --------------------------------------------------------------------------------------------------------------- 3 CAMs
# All take activations A and gradients G, both (B, C, h, w), and return rectified maps (B, h, w) in float32, not yet
# normalised. Indices: k channel, (i, j) position; sums over what is not on the left.


def grad_cam(A: Tensor, G: Tensor) -> Tensor:
    """ReLU(sum_k w_k A_k), w_k = mean_ij G_k(i, j). Selvaraju et al., ICCV 2017, eq. 1 and 2."""
    A, G = A.float(), G.float()
    return torch.einsum("bk,bkhw->bhw", G.mean((2, 3)), A).relu()


def layer_cam(A: Tensor, G: Tensor) -> Tensor:
    """ReLU(sum_k ReLU(G_k(i, j)) A_k(i, j)). Jiang et al., IEEE TIP 2021, eq. 6 to 8."""
    return (G.float().relu() * A.float()).sum(1).relu()


def hires_cam(A: Tensor, G: Tensor) -> Tensor:
    """ReLU(sum_k G_k(i, j) A_k(i, j)). Draelos and Carin, 2020 (arXiv 2011.08891), eq. 5; rectified here as the others
    are.
    """
    return (G.float() * A.float()).sum(1).relu()


def grad_cam_pp(A: Tensor, G: Tensor) -> Tensor:
    """ReLU(sum_k w_k A_k), w_k = sum_ij a_k(i, j) ReLU(G_k(i, j)), a = G^2 / (2 G^2 + S_k G^3), S_k = sum_ij A_k.

    Chattopadhyay et al., WACV 2018, eq. 10 and 19 (the target score enters as exp(y), whose higher derivatives are
    powers of G). Computed as a = 1 / (2 + S_k G), the same where G != 0, without squares of small numbers.
    """
    A, G = A.float(), G.float()
    denominator = 2 + A.sum((2, 3), keepdim=True) * G
    a = torch.where(denominator.abs() > 1e-6, 1 / denominator, torch.zeros_like(G))
    return torch.einsum("bk,bkhw->bhw", (a * G.relu()).sum((2, 3)), A).relu()


def xgrad_cam(A: Tensor, G: Tensor) -> Tensor:
    """ReLU(sum_k w_k A_k), w_k = sum_ij G_k A_k / sum_ij A_k. Fu et al., BMVC 2020, eq. 8. A channel that sums to zero
    gets weight zero.
    """
    A, G = A.float(), G.float()
    total = A.sum((2, 3))
    w = torch.where(total.abs() > 1e-7, (G * A).sum((2, 3)) / total, torch.zeros_like(total))
    return torch.einsum("bk,bkhw->bhw", w, A).relu()


# A CAM of your own: write it like one above and add it, `cc.CAMS["my_cam"] = my_cam`; all tables and figures have it.
CAMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "grad_cam": grad_cam,
    "layer_cam": layer_cam,
    "grad_cam_pp": grad_cam_pp,
    "hires_cam": hires_cam,
    "xgrad_cam": xgrad_cam,
}

# ------------------------------------------------------------------------------------------------------------- 4 fusion


def normalise(maps: Tensor) -> Tensor:
    """m / max(m), per image; (B, h, w) -> (B, h, w) in [0, 1]. A map that is zero everywhere stays zero.

    Division by the maximum, not min-max: min-max forces a zero into every map, and a zero in one factor kills a
    product. Raises ValueError for maps that are not (B, h, w), not finite, or negative somewhere.
    """
    if maps.ndim != 3:
        raise ValueError(f"maps must have shape (B, h, w); got {tuple(maps.shape)}.")
    maps = maps.float()
    low, high = maps.aminmax() if maps.numel() else (maps.new_zeros(()), maps.new_zeros(()))
    if not (bool(low >= 0) and math.isfinite(high)):  # aminmax hands a NaN on, and NaN >= 0 is false
        raise ValueError(
            f"maps must be finite and non-negative; got {float(low)} to {float(high)}. CAMs are rectified first."
        )
    peak = maps.amax((1, 2), keepdim=True)
    return torch.where(peak > 0, maps / peak, torch.zeros_like(maps)).clamp(max=1)


def enlarge(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Normalised, enlarged bilinearly (`align_corners=False`) to size = (H, W), normalised again; (B, h, w) -> (B, H,
    W) in [0, 1].
    """
    return normalise(
        F.interpolate(normalise(maps)[:, None], size=tuple(size), mode="bilinear", align_corners=False)[:, 0]
    )


def hybrid(a: Tensor, b: Tensor, alpha: float, size: tuple[int, int] | None = None) -> Tensor:
    """The weighted geometric mean a^alpha * b^(1-alpha) of two maps, each normalised before and their product
    normalised after.

    a: usually Grad-CAM at a deep layer, (B, h, w); b: usually LayerCAM, at the same or a shallower layer, (B, h', w').
    size = (H, W) enlarges both first (see `enlarge`) and is required where their sizes differ. alpha in [0, 1]; alpha=1
    gives a / max(a) and alpha=0 gives b / max(b), exactly. Returns (B, H, W) in [0, 1]; zero everywhere where one
    factor or their overlap is. Raises ValueError for alpha outside [0, 1] and for maps whose shapes do not fit.

    The formula with alpha = 0.7 at one common layer is from hirthickraj2015, Grad-Cam_Analysis_of_Cnn_Decisions; see
    Sources in the README.
    """
    if not isinstance(alpha, Real) or not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha!r} must be a number in [0, 1]: 1 is the first map alone, 0 the second.")
    if size is None and a.shape != b.shape:
        raise ValueError(
            f"The maps have shapes {tuple(a.shape)} and {tuple(b.shape)}: give size=(H, W) to enlarge both to one size."
        )
    a, b = (normalise(a), normalise(b)) if size is None else (enlarge(a, size), enlarge(b, size))
    if a.shape != b.shape:
        raise ValueError(f"The maps belong to different batches: {a.shape[0]} and {b.shape[0]} images.")
    return normalise(a.pow(alpha) * b.pow(1 - alpha))  # pow, not exp(log): 0 ** 0 is 1, so alpha = 0 and 1 are exact


# ------------------------------------------------------------------------------------------------------------- 5 models

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet; the shipped networks use the same
HOME = Path(__file__).resolve().parent


def pick_device(name: str = "auto") -> torch.device:
    """The torch device for "auto" (CUDA, else MPS, else CPU), "cpu", "cuda", "cuda:N" or "mps". ValueError where it is
    not there.
    """
    if name == "auto":
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", str(name)):
        raise ValueError(f"device={name!r} is not one of auto, cpu, cuda, cuda:N, mps.")
    device = torch.device(name)
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}[device.type]
    if not there or (device.index or 0) >= max(1, torch.cuda.device_count()):
        raise ValueError(
            f"device={name!r} is not available on this machine. Use device=cpu, or auto to take what there is."
        )
    return device


def imagenet_classes() -> list[str]:
    """The 1000 ImageNet class names, from torchvision's metadata (offline)."""
    return list(torchvision.models.ResNet18_Weights.IMAGENET1K_V1.meta["categories"])


def load_model(
    arch: str = "resnet18", weights: str | Path = "auto", device: str | torch.device = "cpu"
) -> tuple[nn.Module, dict]:
    """A torchvision classifier with weights, in eval mode, frozen, channels-last (the faster layout), on `device`; and
    what is known of it.

    arch: any name of `torchvision.models.list_models`. weights: "auto" (the checkpoint that ships in data/checkpoints),
    "imagenet" (torchvision downloads and caches them), or a file: a state dict, or a checkpoint with `model_state_dict`
    and, where it has them, `class_names`, `test_acc`, ... Files are loaded with `weights_only=True`, so nothing in them
    is executed. Returns (model, info); info has arch, weights (name), sha256 (of the file), class_names, and the
    checkpoint's own plain entries. Raises ValueError for an unknown arch or a file that does not fit it (says which
    keys and shapes), FileNotFoundError for a missing file, ConnectionError when ImageNet weights cannot be downloaded
    (says what to do).
    """
    known = torchvision.models.list_models(module=torchvision.models)
    if arch not in known:
        raise ValueError(f"arch={arch!r} is not a torchvision classifier. {_nearest(arch, known)}")
    weights = HOME / "data" / "checkpoints" / f"{arch}.pth" if str(weights) == "auto" else weights
    if str(weights) == "imagenet":
        entry = torchvision.models.get_model_weights(arch).DEFAULT
        try:
            model = torchvision.models.get_model(arch, weights=entry)
        except OSError as error:  # urllib's URLError is one
            raise ConnectionError(
                f"ImageNet weights for {arch} could not be downloaded ({error}). Without a network, fetch "
                f"{Path(entry.url).name} elsewhere and give its path, weights=FILE.pth, or put it into "
                f"{Path(torch.hub.get_dir()) / 'checkpoints'}."
            ) from None
        info = {"arch": arch, "weights": str(entry), "sha256": "", "class_names": list(entry.meta["categories"])}
    else:
        model, info = _load_checkpoint(arch, Path(weights))
    device = pick_device(str(device))
    return model.eval().requires_grad_(False).to(device=device, memory_format=torch.channels_last), info


def _load_checkpoint(arch: str, file: Path) -> tuple[nn.Module, dict]:
    if not file.is_file():
        shipped = sorted(p.stem for p in (HOME / "data" / "checkpoints").glob("*.pth"))
        raise FileNotFoundError(
            f"weights: there is no file {file}. Checkpoints that ship: {', '.join(shipped) or 'none'}."
        )
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types here; all mean: not a file of tensors
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ValueError(f"weights={file} is not a PyTorch file of plain tensors ({reason}).") from None
    inside = next(
        (content[k] for k in ("model_state_dict", "state_dict") if isinstance(content, dict) and k in content), content
    )
    if not isinstance(inside, dict) or not inside or not all(isinstance(v, Tensor) for v in inside.values()):
        raise ValueError(
            f"weights={file} holds no state dict: expected tensors by name, or a 'model_state_dict' entry."
        )
    state = {k.removeprefix("module."): v.float() if v.is_floating_point() else v for k, v in inside.items()}
    state = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", k): v for k, v in state.items()
    }  # older DenseNets
    extra = {k: v for k, v in content.items() if inside is not content and v is not inside}
    own = extra.get("arch", arch)
    if own != arch:
        raise ValueError(f"weights={file} was saved for arch={own!r}, not {arch!r}. Give arch={own}.")
    head = list(state.values())[-1]
    if head.ndim == 0:
        raise ValueError(
            f"weights={file} does not end in a classifier but in {list(state)[-1]!r}: its head is missing."
        )
    classes = len(head)
    model = torchvision.models.get_model(arch, weights=None, num_classes=classes)
    if classes == 1000 and hasattr(model, "transform_input"):
        model.transform_input = (
            True  # torchvision's GoogLeNet and Inception were trained on inputs scaled in another way
        )
    for name, buffer in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            state.setdefault(
                name, buffer
            )  # files from before torch 0.4.1 have no such counters, and nothing reads them
    expected = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    found = {k: tuple(v.shape) for k, v in state.items()}
    if expected != found:
        missing, surplus = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        shapes = [
            f"{k} {found[k]} instead of {expected[k]}" for k in expected if k in found and found[k] != expected[k]
        ]
        parts = [
            f"{what}: {', '.join(v[:4])}{f' and {len(v) - 4} more' if len(v) > 4 else ''}"
            for what, v in (("missing", missing), ("unknown", surplus), ("shape", shapes))
            if v
        ]
        raise ValueError(f"weights={file} does not fit arch={arch}. {'; '.join(parts)}.")
    model.load_state_dict(state)
    names = list(
        extra.get("class_names") or (imagenet_classes() if classes == 1000 else [f"class {k}" for k in range(classes)])
    )
    info = {**extra, "arch": arch, "weights": file.name, "sha256": sha256(file), "class_names": names}
    return model, info


def resolve_weights(arch: str, weights: str, dataset: str, data: Path, retrain: bool = False) -> str:
    """The `weights` argument of `load_model` that a notebook's parameters mean.

    "auto" is the shipped checkpoint for the synthetic data (with `retrain`, the one that notebook 01 trained here) and
    ImageNet else.
    """
    if weights != "auto":
        return weights
    if dataset != "synthetic":
        return "imagenet"
    return str(data / dataset / "checkpoints" / f"{arch}.pth") if retrain else "auto"


def default_layers(model: nn.Module, x: Tensor) -> tuple[str, str]:
    """(deep, shallow): where Grad-CAM and where LayerCAM look by default, found by a few probe passes with one image.

    Candidates are the outputs (B, C, h, w), h*w > 1, of modules that run once, are no pooling layers (nor containers
    that end in one), lie in front of the classifier (the last module with weights that runs), and that everything
    passes through (not one branch of a block). deep = the last candidate; shallow = the last one at the finer
    resolution nearest to four times deep's. Where several names share one output, the outermost counts. For ResNet:
    layer4, layer2.

    Raises ValueError when a model has no such layer. A model of one resolution has no finer one: then shallow = deep.
    """
    model = _unwrap(model)
    _check_input(model, x)
    x = x[:1].detach().clone()
    runs: list[tuple[str, int]] = []  # name and height of what came out, in order of execution
    often: dict[str, int] = {}
    pooled: list = []  # the outputs themselves: a container that ends in pooling hands on the same object
    last = 0  # how many had run when the last module with weights did

    def record(name: str, module: nn.Module) -> Callable:
        def hook(_, args: tuple, output) -> None:
            nonlocal last
            often[name] = often.get(name, 0) + 1
            if "Pool" in type(module).__name__:
                pooled.append(output)
            if any(True for _ in module.parameters(recurse=False)):
                last = len(runs)
            spatial = isinstance(output, Tensor) and output.ndim == 4 and output.shape[2] * output.shape[3] > 1
            hands_on = isinstance(module, nn.Identity | nn.modules.dropout._DropoutNd)
            wide = spatial and abs(output.shape[2] * x.shape[3] - output.shape[3] * x.shape[2]) <= max(x.shape[2:])
            if wide and not hands_on and not any(output is p for p in pooled):
                runs.append((name, output.shape[2]))

        return hook

    with _borrowed(model, {n: record(n, m) for n, m in model.named_modules() if n}):
        model(x)
    found = [(n, h) for n, h in runs[:last] if often[n] == 1]
    deep, low = next(((n, h) for n, h in reversed(found) if _all_passes(model, x, n)), ("", 0))
    if not deep:
        raise ValueError(
            f"{type(model).__name__} has no layer with a spatial output before its classifier: name one with layer=."
        )
    for height in sorted({h for _, h in found if h > low}, key=lambda h: abs(math.log(h / (4 * low)))):
        for name in [n for n, h in reversed(found) if h == height]:
            if _all_passes(model, x, name):
                return deep, name
    return deep, deep


def _all_passes(model: nn.Module, x: Tensor, layer: str) -> bool:
    """Whether all that reaches the logits passes through the layer: with its output cut off, they no longer depend on
    the input.
    """
    with _borrowed(model, {layer: lambda module, args, output: output.detach()}):
        return not _logits(model(x.clone().requires_grad_().clone())).requires_grad


def resolve_layers(model: nn.Module, x: Tensor, layer: str = "auto", shallow_layer: str = "auto") -> tuple[str, str]:
    """(deep, shallow) as a notebook's parameters mean them: a name is kept, "auto" is what `default_layers` finds."""
    if "auto" not in (layer, shallow_layer):
        return layer, shallow_layer
    deep, shallow = default_layers(model, x)
    return deep if layer == "auto" else layer, shallow if shallow_layer == "auto" else shallow_layer


# ---------------------------------------------------------------------------------------------------- 6 images and data

IMAGE_TYPES = {".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".webp", ".tif", ".tiff"}


def read_image(file: str | Path) -> Image.Image:
    """An image file as RGB, turned as its EXIF says, 16-bit grey scaled to 8, transparency laid on white. ValueError
    names a bad file.
    """
    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened)
    except FileNotFoundError:
        raise ValueError(f"image: there is no file {file}.") from None
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"image: {file} cannot be read ({error}).") from None
    if image.mode.startswith(("I", "F")):
        grey = np.asarray(image, dtype=np.float64)
        if not (grey.min() >= 0 and grey.max() < np.inf):
            raise ValueError(
                f"image: {file} has grey values from {grey.min()} to {grey.max()}; scale them to 0 and more."
            )
        full = max(grey.max(), 65535 if image.mode.startswith("I") else 1)
        image = Image.fromarray((grey / full * 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def preprocess(images: Image.Image | Sequence[Image.Image], size: int = 224) -> Tensor:
    """RGB images -> (B, 3, size, size) float32: squashed to a square, scaled to [0, 1], minus ImageNet's mean, over its
    deviation.

    The whole picture is squashed, not its centre cut out, so a map covers the whole photograph and can be laid over it
    at any size.
    """
    images = [images] if isinstance(images, Image.Image) else images
    pixels = np.stack([np.asarray(i.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)) for i in images])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255  # stays channels-last in memory
    return (x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def to_pixels(x: Tensor) -> np.ndarray:
    """The inverse of `preprocess`'s scaling: (B, 3, H, W) -> uint8 (B, H, W, 3)."""
    x = x.detach().float().cpu() * torch.tensor(STD).view(1, 3, 1, 1) + torch.tensor(MEAN).view(1, 3, 1, 1)
    return (x.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def read_dataset(folder: str | Path, split: str | None = None):
    """A data set as a pandas table, one row per image, sorted; files as absolute paths.

    folder has either a manifest.csv, as notebook 01 writes it, or images in one of these layouts, with or without
    train/ val/ test/ above: `{label}_{number}.jpg`, one folder per class, or plain files without labels. masks/ and
    twins/ beside them, with the same relative names (.png), are found. Columns: id, split ("all" where there are no
    splits), label ("" if unknown), file, mask, twin ("" if there is none), and whatever else a manifest has. split:
    only these rows. Raises ValueError for a folder without images or without the asked split.
    """
    import pandas as pd

    folder = Path(folder).resolve()
    if (folder / "manifest.csv").is_file():
        frame = pd.read_csv(folder / "manifest.csv", keep_default_na=False, dtype={"id": str})
        for column in [c for c in frame if c in ("file", "mask", "hull", "twin", "mask_b")]:
            frame[column] = [str(folder / name) if name else "" for name in frame[column]]
        frame = frame.sort_values("id", kind="stable")
    elif folder.is_dir():
        frame = pd.DataFrame(_scan(folder), columns=["id", "split", "label", "file", "mask", "twin"])
    else:
        raise ValueError(
            f"dataset: there is no folder {folder}. Run notebook 01 for the synthetic data, or give a folder of images."
        )
    if frame.empty:
        raise ValueError(f"dataset: {folder} holds no images ({', '.join(sorted(IMAGE_TYPES))}).")
    if split is not None:
        known = sorted(frame.split.unique())
        frame = frame[frame.split == split]
        if frame.empty:
            raise ValueError(f"dataset: {folder} has no split {split!r}; it has {', '.join(known)}.")
    return frame.reset_index(drop=True)


def _scan(folder: Path) -> list[tuple]:
    side = ("masks", "twins", "hulls", "checkpoints")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_TYPES and p.is_file())
    parts = [p.relative_to(folder).parts for p in files]
    kept = [
        (p, q) for p, q in zip(files, parts, strict=True) if q[0] not in side and not any(s.startswith(".") for s in q)
    ]
    numbered = [re.fullmatch(r"(.+)_(\d+)", p.stem) for p, _ in kept]
    named = bool(kept) and all(numbered) and len({m[1] for m in numbered}) > 1  # IMG_0001, IMG_0002 ... are no labels
    stems = [p.relative_to(folder).with_suffix("").as_posix() for p, _ in kept]
    often = Counter(stems)
    rows = []
    for (file, part), match, stem in zip(kept, numbered, stems, strict=True):
        split = part[0] if part[0] in ("train", "val", "test") and len(part) > 1 else "all"
        inner = part[1:-1] if split != "all" else part[:-1]
        label = inner[0] if inner else match[1] if named else ""
        beside = [folder / name / file.relative_to(folder).with_suffix(".png") for name in ("masks", "twins")]
        mask, twin = (str(p) if p.is_file() else "" for p in beside)
        image_id = stem if often[stem] == 1 else f"{stem}{file.suffix}"
        rows.append((image_id, split, label, str(file), mask, twin))
    if len({row[2] for row in rows}) == 1:  # one name for all, such as a folder called "photos", tells no classes apart
        rows = [(*row[:2], "", *row[3:]) for row in rows]
    return rows


def dataset_folder(repo: Path, data_dir: str, dataset: str) -> Path:
    """Where the data set of the parameters lies: data_dir/synthetic for the synthetic one, else the given folder."""
    return Path(repo) / data_dir / dataset if dataset == "synthetic" else (Path(repo) / Path(dataset).expanduser())


def split_rows(frame, split: str):
    """The rows of a split, "val" or "test", for choosing and for measuring.

    A set without splits and with 40 or more images is halved by the hash of each file, so a file stays on its side
    when others are added. A smaller one has no validation rows (an empty table) and all of it is for measuring.
    """
    named, loose = frame[frame["split"] == split], frame[frame["split"] == "all"]
    if not named.empty or (frame["split"] != "all").any():
        return named.reset_index(drop=True)
    if len(loose) < 40:
        return loose if split == "test" else loose.iloc[:0]
    odd = np.array([int(sha256(f)[:8], 16) % 2 == 1 for f in loose["file"]])
    return loose[odd == (split == "test")].reset_index(drop=True)


def subset(frame, n: int, seed: int):
    """The first n rows of a seeded permutation of the table (n = 0 or too large: all of it), so a smaller run is a
    subset of a larger one.
    """
    order = np.random.default_rng([seed, 7]).permutation(len(frame))
    return frame.iloc[order[: n or None]].reset_index(drop=True)


def load_batch(frame, column: str = "file", size: int = 224) -> Tensor:
    """The images of a table's column ("file" or "twin"), preprocessed: (B, 3, size, size)."""
    return preprocess([read_image(f) for f in frame[column]], size)


def load_masks(frame, column: str = "mask", size: int = 224) -> Tensor:
    """The masks of a table's column as booleans, (B, size, size). ValueError names an empty mask, or a row that has
    none.
    """
    masks = []
    for row_id, file in zip(frame["id"], frame[column], strict=True):
        if not file:
            raise ValueError(f"image {row_id} has no {column}: keep only rows that have one.")
        mask = np.asarray(read_image(file).convert("L").resize((size, size), Image.Resampling.NEAREST)) > 127
        if not mask.any():
            raise ValueError(f"the {column} of image {row_id} is empty ({file}); what counts are values above 127.")
        masks.append(mask)
    return torch.from_numpy(np.stack(masks))


def safe_name(image_id: str) -> str:
    """An image's id as a file name: everything but letters, digits, `.`, `+`, `-` becomes `_`, so it stays in its
    folder, and a checksum follows where anything changed, so two ids never share a name.
    """
    name = re.sub(r"[^\w.+-]", "_", str(image_id)).lstrip(".") or "_"
    return name if name == str(image_id) else f"{name}-{zlib.crc32(str(image_id).encode()):08x}"


# --------------------------------------------------------------------------------------------------- 7 explain, overlay


@dataclass(frozen=True)
class Explanation:
    """cam: (H, W) float32 array in [0, 1]; target: the class explained; probability: its softmax; method and layers as
    used.
    """

    cam: np.ndarray
    target: int
    probability: float
    method: str
    layer: str
    shallow_layer: str
    alpha: float


def explain(
    model: nn.Module,
    image: str | Path | Image.Image | Tensor,
    target: int | None = None,
    method: str = "hybrid",
    layer: str | None = None,
    shallow_layer: str | None = None,
    alpha: float = 0.5,
    size: int = 224,
) -> Explanation:
    """One image, one map, one call.

    image: a path or PIL image (squashed to size x size, ImageNet-normalised), or a preprocessed tensor (3, H, W) or (1,
    3, H, W). target: class index, or None for the predicted class. method: "hybrid" (Grad-CAM at `layer` x LayerCAM at
    `shallow_layer`, weighted by alpha) or a name in CAMS (at `layer`). Layers default to `default_layers`. The map has
    the size of the model's input; `overlay` fits it to the photograph. Raises ValueError for an unknown method, and
    what `capture` and `hybrid` raise.
    """
    if not isinstance(image, str | Path | Image.Image | Tensor):
        raise ValueError(f"image must be a path, a PIL image or a tensor; got {type(image).__name__}.")
    if isinstance(image, Tensor):
        x = image[None] if image.ndim == 3 else image
    else:
        x = preprocess(image if isinstance(image, Image.Image) else read_image(image), size)
    if x.ndim != 4 or len(x) != 1:
        raise ValueError(
            f"image: one at a time; got a tensor {tuple(image.shape)}. For batches use capture and the CAMs."
        )
    if method != "hybrid" and method not in CAMS:
        raise ValueError(f"method={method!r} is unknown. {_nearest(method, ['hybrid', *CAMS])}")
    first = next(model.parameters(), x)
    x = x.to(device=first.device, dtype=first.dtype)
    deep, shallow = (
        (layer, shallow_layer) if layer and (shallow_layer or method != "hybrid") else default_layers(model, x)
    )
    deep, shallow = layer or deep, shallow_layer or shallow
    shot = capture(model, x, [deep, shallow] if method == "hybrid" else [deep], target)
    A, G = shot.activations, shot.gradients
    if method == "hybrid":
        maps = hybrid(grad_cam(A[deep], G[deep]), layer_cam(A[shallow], G[shallow]), alpha, x.shape[2:])
    else:
        maps = enlarge(CAMS[method](A[deep], G[deep]), x.shape[2:])
    index = int(shot.target[0])
    probability = float(shot.logits.float().softmax(1)[0, index])
    return Explanation(
        maps[0].cpu().numpy(), index, probability, method, deep, shallow if method == "hybrid" else "", float(alpha)
    )


def overlay(
    image: Image.Image | np.ndarray, cam: np.ndarray | Tensor, opacity: float = 0.4, colormap: str = "inferno"
) -> np.ndarray:
    """(1 - opacity) * image + opacity * colormap(cam), uint8 (H, W, 3) at the image's own size; the map is enlarged to
    it bilinearly.

    image: PIL, or uint8 (H, W) or (H, W, 3). cam: (h, w) in [0, 1]. Raises ValueError for an opacity or a map outside
    [0, 1].
    """
    import cv2
    import matplotlib

    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    pixels = np.repeat(pixels[..., None], 3, 2) if pixels.ndim == 2 else pixels
    cam = np.asarray(cam.detach().cpu() if isinstance(cam, Tensor) else cam, dtype=np.float32)
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity={opacity!r} must lie in [0, 1].")
    if cam.ndim != 2 or not (cam.min() >= 0 and cam.max() <= 1):
        raise ValueError(
            f"cam must be a map (h, w) in [0, 1]; got shape {cam.shape}, values from {cam.min()} to {cam.max()}."
        )
    cam = cv2.resize(cam, (pixels.shape[1], pixels.shape[0]), interpolation=cv2.INTER_LINEAR)
    colours = matplotlib.colormaps[colormap](cam, bytes=True)[..., :3]
    return cv2.addWeighted(np.ascontiguousarray(pixels), 1 - opacity, np.ascontiguousarray(colours), opacity, 0)


# -------------------------------------------------------------------------------------------------------- 8 method_maps

# name -> (label in tables and figures, colour from Okabe and Ito's colour-blind safe set or a grey for controls)
STYLE: dict[str, tuple[str, str]] = {
    "grad_cam": ("Grad-CAM", "#0072B2"),
    "layer_cam": ("LayerCAM", "#E69F00"),
    "layer_cam_shallow": ("LayerCAM, shallow", "#F0C75E"),
    "hybrid_same": ("Hybrid, same layer", "#CC79A7"),
    "hybrid": ("Hybrid, cross-layer", "#D55E00"),
    "grad_cam_pp": ("Grad-CAM++", "#56B4E9"),
    "hires_cam": ("HiResCAM", "#009E73"),
    "xgrad_cam": ("XGrad-CAM", "#7B61A8"),
    "noise": ("Pixel noise", "#999999"),
    "smooth_noise": ("Smooth noise", "#777777"),
    "centre": ("Centre", "#555555"),
}
PRIOR_ALPHA = 0.7  # of the same-layer hybrid, as the prior project published it


def label(method: str) -> str:
    """The name of a method as tables and figures print it."""
    return STYLE.get(method, (method, ""))[0]


def colour(method: str) -> str:
    """The one colour that a method has in every figure."""
    return STYLE.get(method, ("", "#222222"))[1]


def method_maps(
    shot: Capture, layer: str, shallow_layer: str, alpha: float, size: tuple[int, int], ids: Sequence[str], seed: int
) -> dict[str, Tensor]:
    """Every method of the study and its uninformative controls, from one capture: name -> (B, H, W) in [0, 1].

    All CAMS at `layer`; layer_cam_shallow at `shallow_layer`; hybrid_same = Grad-CAM x LayerCAM at `layer` with the
    prior's alpha (0.7); hybrid = Grad-CAM at `layer` x LayerCAM at `shallow_layer` with `alpha`; noise (uniform, every
    pixel), smooth_noise (7 x 7 uniform noise enlarged like a deep map) and centre (Gaussian, standard deviation a
    quarter of the side). Noise depends on (seed, id) alone.
    """
    (A, G), (a, g) = ((shot.activations[n], shot.gradients[n]) for n in (layer, shallow_layer))
    maps = {name: enlarge(cam(A, G), size) for name, cam in CAMS.items()}
    maps["layer_cam_shallow"] = enlarge(layer_cam(a, g), size)
    maps["hybrid_same"] = hybrid(maps["grad_cam"], maps["layer_cam"], PRIOR_ALPHA)
    maps["hybrid"] = hybrid(maps["grad_cam"], maps["layer_cam_shallow"], alpha)
    draws = [_generator(seed, i, 1) for i in ids]
    coarse = torch.from_numpy(np.stack([d.random((7, 7), np.float32) for d in draws]))
    fine = torch.from_numpy(np.stack([d.random(tuple(size), np.float32) for d in draws]))
    y, x = (torch.linspace(-1, 1, n) for n in size)
    blob = torch.exp(-(y[:, None] ** 2 + x[None, :] ** 2) / (2 * 0.5**2)).expand(len(ids), -1, -1)
    for name, control in (
        ("noise", normalise(fine)),
        ("smooth_noise", enlarge(coarse, size)),
        ("centre", normalise(blob)),
    ):
        maps[name] = control.to(A.device)
    order = [n for n in STYLE if n in maps] + [n for n in maps if n not in STYLE]
    return {name: maps[name] for name in order}


def _generator(seed: int, image_id: str, stream: int) -> np.random.Generator:
    """Random numbers that depend on seed, image and purpose, not on which images are grouped together."""
    return np.random.default_rng([seed, stream, zlib.crc32(str(image_id).encode())])


# ------------------------------------------------------------------------------------------------------- 9 faithfulness


@torch.inference_mode()
def probabilities(model: nn.Module, x: Tensor, batch_size: int = 32, precision: str = "float32") -> Tensor:
    """softmax(model(x)) in batches and in eval mode: (B, K) float32. precision: "float32" or "bf16" (autocast)."""
    if precision not in ("float32", "bf16"):
        raise ValueError(f"precision={precision!r} must be 'float32' or 'bf16'.")
    device = next(model.parameters(), x).device
    rows = []
    with _eval_mode(model), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        for part in x.split(batch_size):
            part = part.to(device).contiguous(memory_format=torch.channels_last)
            rows.append(_logits(model(part)).float().softmax(1))
    return torch.cat(rows)


def measurable(model: nn.Module, frame, n: int = 0, seed: int = 0, batch_size: int = 32, precision: str = "float32"):
    """The images on which explanations are judged: (rows, number left out).

    Walks through a seeded permutation of the table until n images are found (0 = all). Each gets the columns target
    (the predicted class) and p_image (its probability); where the data has twins (the same image without its lesion)
    also p_twin, and only images whose lesion the network really uses count: p_image - p_twin > 0.5. Images without a
    twin in such a data set, which show nothing to find, are passed over uncounted.
    """
    import pandas as pd

    twins = bool((frame["twin"] != "").any())
    frame = subset(frame[frame["twin"] != ""] if twins else frame, 0, seed)
    kept, left_out, found = [], 0, 0
    for begin in range(0, len(frame), batch_size):
        part = frame.iloc[begin : begin + batch_size]
        p, target = probabilities(model, load_batch(part), batch_size, precision).max(1)
        part = part.assign(target=target.cpu().numpy(), p_image=p.cpu().numpy())
        if twins:
            without = probabilities(model, load_batch(part, "twin"), batch_size, precision)
            part = part.assign(p_twin=without.gather(1, target[:, None])[:, 0].cpu().numpy())
            uses = (part.p_image - part.p_twin > 0.5).to_numpy()
        else:
            uses = np.ones(len(part), bool)
        wanted = n - found if n else len(part)
        stop = int(np.flatnonzero(uses)[wanted - 1]) + 1 if uses.sum() >= wanted else len(part)
        kept.append(part.iloc[:stop][uses[:stop]])
        left_out, found = left_out + int((~uses[:stop]).sum()), found + int(uses[:stop].sum())
        if n and found >= n:
            break
    return pd.concat(kept).reset_index(drop=True), left_out


def pixel_order(maps: Tensor, ids: Sequence[str], seed: int = 0) -> Tensor:
    """Pixel indices by descending attribution, (B, H, W) -> (B, H*W). Ties are broken by one seeded permutation per
    image, the same for every method, so a flat region is visited in random order and not from its upper left corner.
    """
    flat = maps.flatten(1)
    if len(ids) != len(flat):
        raise ValueError(f"ids has {len(ids)} entries for {len(flat)} maps: give one id for each image.")
    shuffle = np.stack([_generator(seed, i, 2).permutation(flat.shape[1]) for i in ids])
    shuffle = torch.from_numpy(shuffle).to(maps.device)
    return shuffle.gather(1, torch.argsort(flat.gather(1, shuffle), dim=1, descending=True, stable=True))


def tie_fraction(maps: Tensor) -> np.ndarray:
    """The share of pixels whose value another pixel of the same map has too: (B, H, W) -> (B,)."""
    counts = [np.unique(m.cpu().numpy(), return_counts=True)[1] for m in maps]
    return np.array([c[c > 1].sum() / c.sum() for c in counts])


def perturbation_curves(
    model: nn.Module,
    start: Tensor,
    end: Tensor,
    orders: Tensor,
    target: Tensor,
    steps: int = 28,
    batch_size: int = 32,
    precision: str = "float32",
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Target probability while pixels of `start` are replaced by those of `end` in the given order: (N, steps + 1).

    start, end: (N, C, H, W); orders: (N, H*W) pixel indices; target: (N,). Point s of a curve has the first
    floor(s*H*W/steps) pixels replaced, all channels together, so the first point is `start`, the last is `end`, groups
    differ by at most one pixel and none is dropped. Deletion: start = image, end = baseline. Insertion: start =
    baseline, end = image (Petsiuk et al., BMVC 2018, Algorithm 1). Perturbed images are made on the device, batch_size
    at a time. progress(n) is called after every n evaluations. Raises ValueError for steps outside 1 to H*W.
    """
    n, area = len(orders), orders.shape[1]
    if not 1 <= steps <= area:
        raise ValueError(f"steps={steps} must lie between 1 and the number of pixels, {area}.")
    device = next(model.parameters(), start).device
    start, end, orders, target = (t.to(device) for t in (start, end, orders, target))
    rank = torch.empty_like(orders).scatter_(1, orders, torch.arange(area, device=device).expand(n, area))
    rank = rank.view(n, 1, *start.shape[2:])
    cut = torch.arange(steps + 1, device=device) * area // steps
    values = torch.empty(n * (steps + 1), device=device)
    for job in torch.arange(len(values), device=device).split(batch_size):
        i, s = job // (steps + 1), job % (steps + 1)
        mixed = torch.where(rank[i] < cut[s].view(-1, 1, 1, 1), end[i], start[i])
        p = probabilities(model, mixed, batch_size, precision)
        values[job] = p.gather(1, target[i][:, None])[:, 0]
        if progress:
            progress(len(job))
    return values.view(n, steps + 1).cpu()


def auc(curves: Tensor | np.ndarray) -> np.ndarray:
    """Normalised trapezoid along the last axis: (sum - first/2 - last/2) / (n - 1). For probabilities, in [0, 1]."""
    c = np.asarray(curves, dtype=np.float64)
    return (c.sum(-1) - c[..., 0] / 2 - c[..., -1] / 2) / (c.shape[-1] - 1)


def blur(x: Tensor) -> Tensor:
    """RISE's blurred image: each channel convolved, zero-padded, with an 11 x 11 kernel made by Gaussian-filtering a
    unit impulse with sigma = 5 and SciPy's reflecting border (Petsiuk et al., their evaluation code); on normalised
    pixels, so the padding is mean grey.
    """
    from scipy.ndimage import gaussian_filter

    impulse = np.zeros((11, 11))
    impulse[5, 5] = 1
    kernel = torch.from_numpy(gaussian_filter(impulse, 5)).to(x)
    return F.conv2d(x, kernel.expand(x.shape[1], 1, 11, 11), padding=5, groups=x.shape[1])


def baselines(x: Tensor, name: str, twin: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(where insertion starts, where deletion ends) for preprocessed images x: (B, 3, H, W) each.

    "rise": the blurred image, mean grey (zero after normalisation). "black": black, black. "twin": the same image
    without its lesion, both.
    """
    if name == "rise":
        return blur(x), torch.zeros_like(x)
    if name == "black":
        black = (-torch.tensor(MEAN) / torch.tensor(STD)).to(x).view(1, 3, 1, 1).expand_as(x)
        return black, black
    if name == "twin" and twin is not None:
        return twin, twin
    raise ValueError(f"baseline={name!r} must be 'rise', 'black', or, where the data has twins, 'twin'.")


def faithfulness(
    model: nn.Module,
    x: Tensor,
    maps: Mapping[str, Tensor],
    target: Tensor,
    ids: Sequence[str],
    start: Tensor,
    end: Tensor,
    seed: int = 0,
    steps: int = 28,
    batch_size: int = 32,
    precision: str = "float32",
    progress: Callable[[int], object] | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Insertion and deletion curves of every method: {"insertion": {method: (B, steps + 1)}, "deletion": {...}}.

    maps: name -> (B, H, W). start is where insertion starts and end where deletion ends, as `baselines` returns them.
    Where two methods order an image's pixels the same way, its curves are evaluated once. The score is the softmax
    probability of target: (B,).
    """
    seen: dict[tuple[int, bytes], int] = {}
    rows: list[tuple[int, Tensor]] = []
    place = {}
    for name, m in maps.items():
        orders = pixel_order(m, ids, seed)
        for i, order in enumerate(orders):
            key = (i, hashlib.sha256(order.cpu().numpy().tobytes()).digest())
            if key not in seen:
                seen[key] = len(rows)
                rows.append((i, order))
            place[name, i] = seen[key]
    image = torch.tensor([i for i, _ in rows])
    orders = torch.stack([o for _, o in rows])
    settings = dict(steps=steps, batch_size=batch_size, precision=precision, progress=progress)
    target, x, start, end = target.cpu(), x.cpu(), start.cpu(), end.cpu()
    found = {
        "insertion": perturbation_curves(model, start[image], x[image], orders, target[image], **settings),
        "deletion": perturbation_curves(model, x[image], end[image], orders, target[image], **settings),
    }
    return {k: {name: c[[place[name, i] for i in range(len(x))]] for name in maps} for k, c in found.items()}


# ------------------------------------------------------------------------------------------------------ 10 localisation


def _check_masks(maps: Tensor, masks: Tensor) -> None:
    if maps.shape != masks.shape or masks.dtype != torch.bool:
        raise ValueError(
            f"masks must be boolean and of the maps' shape {tuple(maps.shape)}; got {masks.dtype} {tuple(masks.shape)}."
        )
    if not bool(masks.flatten(1).any(1).all()):
        raise ValueError(
            "masks: at least one mask is empty; an image without an object cannot be localised. Leave it out."
        )


def pointing_game(maps: Tensor, masks: Tensor, tolerance: int = 0) -> np.ndarray:
    """1 where the map's maximum lies in the mask, or at most `tolerance` pixels from it, else 0: (B, H, W) twice ->
    (B,).

    A map that is zero everywhere points nowhere and is no hit. Zhang et al., ECCV 2016 (their tolerance: 15 px).
    ValueError: empty mask.
    """
    from scipy.ndimage import distance_transform_edt

    _check_masks(maps, masks)
    peak = maps.flatten(1).max(1)
    hits = []
    for mask, index, value in zip(masks.cpu().numpy(), peak.indices.tolist(), peak.values.tolist(), strict=True):
        distance = distance_transform_edt(~mask).flat[index]
        hits.append(float(value > 0 and distance <= tolerance))
    return np.array(hits)


def energy_in_mask(maps: Tensor, masks: Tensor) -> np.ndarray:
    """sum(map * mask) / sum(map), in [0, 1]; zero for a map that is zero everywhere. Wang et al., CVPR-W 2020, section
    4.4.
    """
    _check_masks(maps, masks)
    maps = maps.double()
    total = maps.sum((1, 2))
    return torch.where(total > 0, (maps * masks).sum((1, 2)) / total.clamp_min(1e-300), 0.0).cpu().numpy()


def average_precision(maps: Tensor, masks: Tensor) -> np.ndarray:
    """Area under precision and recall of the pixels, ranked by attribution, without a threshold: (B,) in (0, 1]. From
    scikit-learn.
    """
    from sklearn.metrics import average_precision_score

    _check_masks(maps, masks)
    pairs = zip(masks.flatten(1).cpu().numpy(), maps.flatten(1).cpu().numpy(), strict=True)
    return np.array([average_precision_score(mask, m) for mask, m in pairs])


# -------------------------------------------------------------------------------------------------------- 11 statistics

LOWER_IS_BETTER = {"deletion"}
ROUNDING = 1e-6  # what float32 arithmetic in another order may change; a difference below it is none


def compare(metrics, reference: str = "grad_cam", seed: int = 0, resamples: int = 10_000):
    """Every method against the reference, paired by image: one row per metric, baseline and method.

    metrics: a table with columns image, method, metric, baseline, value. Returns n, mean, reference_mean, difference
    (mean of value minus the reference's), low and high (95 % BCa bootstrap interval of it), p (sign-flip permutation
    test of the mean; exact McNemar for values that are all 0 or 1), effect (mean over standard deviation of the
    differences), won (share of images strictly better; deletion: lower is better) and identical (every difference is
    zero: nothing to test, p and interval are empty). Efron 1987 for BCa; SciPy computes it. Raises ValueError when the
    reference is missing or an image lacks a method.
    """
    import pandas as pd
    from scipy.stats import binomtest, bootstrap, permutation_test

    rows = []
    for (metric, baseline), part in metrics.groupby(["metric", "baseline"], sort=False, dropna=False):
        wide = part.pivot(index="image", columns="method", values="value")
        if reference not in wide:
            raise ValueError(f"method {reference!r} has no values of {metric}: nothing to compare with.")
        if wide.isna().any(axis=None):
            raise ValueError(f"{metric}: not every image has a value for every method, so they cannot be paired.")
        for method in part.method.unique():
            value, base = wide[method].to_numpy(float), wide[reference].to_numpy(float)
            d, n = value - base, len(wide)
            row = dict(
                metric=metric,
                baseline=baseline,
                method=method,
                n=n,
                mean=value.mean(),
                reference_mean=base.mean(),
                difference=d.mean(),
            )
            same = bool(np.abs(d).max() < ROUNDING)
            row.update(low=np.nan, high=np.nan, p=np.nan, effect=np.nan, identical=same, reference=reference)
            row["won"] = float(((-d if metric in LOWER_IS_BETTER else d) > ROUNDING).mean())
            if not same and n > 1:
                spread = d.std(ddof=1) if np.ptp(d) > ROUNDING else 0.0
                row["effect"] = d.mean() / spread if spread > 0 else np.nan
                if spread > 0:
                    interval = bootstrap(
                        (d,), np.mean, n_resamples=resamples, method="BCa", rng=np.random.default_rng(seed)
                    ).confidence_interval
                    row.update(low=interval.low, high=interval.high)
                if set(np.unique([value, base])) <= {0.0, 1.0}:
                    row["p"] = binomtest(int((d > 0).sum()), int((d != 0).sum())).pvalue
                else:
                    test = permutation_test(
                        (d,),
                        np.mean,
                        permutation_type="samples",
                        n_resamples=resamples,
                        rng=np.random.default_rng(seed),
                    )
                    row["p"] = test.pvalue
            rows.append(row)
    return pd.DataFrame(rows)


def holm(p: Sequence[float]) -> np.ndarray:
    """Holm's step-down adjusted p-values (Scand. J. Statist., 1979); NaN stays NaN and is not counted."""
    p = np.asarray(p, dtype=float)
    order = [i for i in np.argsort(p) if not np.isnan(p[i])]
    adjusted, running = np.full(len(p), np.nan), 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(order) - rank) * p[i]))
        adjusted[i] = running
    return adjusted


def verdict(row: Mapping, p_column: str = "p") -> str:
    """One sentence on a row of `compare`, as the numbers allow: "better" or "worse" needs an interval without zero and
    p < 0.05.
    """
    name, reference, metric = label(row["method"]), label(row["reference"]), str(row["metric"]).replace("_", " ")
    if row["identical"]:
        return f"{name}: {metric} identical to {reference} on all {row['n']} images."
    if np.isnan(row["low"]):
        numbers = f"{row['difference']:+.4f}, no interval"
        return f"{name}: {metric}, no difference to {reference} shown at n = {row['n']} ({numbers})."
    if not (row["low"] > 0 or row["high"] < 0) or not row[p_column] < 0.05:
        return f"{name}: {metric}, no difference to {reference} shown at n = {row['n']} ({_difference(row, p_column)})."
    word = "better" if (row["difference"] > 0) != (row["metric"] in LOWER_IS_BETTER) else "worse"
    return f"{name}: {metric} {word} than {reference} ({_difference(row, p_column)}, n = {row['n']})."


def _difference(row: Mapping, p_column: str) -> str:
    return f"{row['difference']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}], p = {row[p_column]:.2g}"


# -------------------------------------------------------------------------------------------------- 12 runs and figures

RUN_ID = os.environ.get("HYBRID_CAM_RUN", "interactive")  # the runner sets it; every file written below carries it


def start_run(repo: str | Path, results_dir: str | Path, seed: int = 0, threads: int = 0) -> Path:
    """The run's output folder with figures/, tables/ and images/ in it; seeds torch, sets CPU threads (0 = torch's
    choice) and the figure style.
    """
    import matplotlib.pyplot as plt

    out = Path(repo) / results_dir
    for name in ("figures", "tables", "images"):
        (out / name).mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    if threads:
        torch.set_num_threads(threads)
    plt.rcParams.update({
        "figure.dpi": 100, "savefig.dpi": 150, "savefig.bbox": "tight", "figure.constrained_layout.use": True,
        "font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False,
        "legend.frameon": False, "image.interpolation": "nearest", "axes.grid": False,
    })  # fmt: skip
    return out


def save_figure(fig, path: str | Path) -> None:
    """Write the figure as PNG (the run's id in its metadata, no date, so equal runs give equal bytes), show it in a
    notebook, close it.
    """
    import matplotlib.pyplot as plt

    fig.savefig(path, metadata={"Software": None, "Run": RUN_ID})
    fig.set_layout_engine("none")  # the layout is settled; the inline picture need not compute it again
    if "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None:
        sys.modules["IPython"].display.display(fig)
    plt.close(fig)


def save_table(frame, path: str | Path) -> None:
    """Write the table as CSV with the run's id as its last column, floats with nine significant digits."""
    frame.assign(run=RUN_ID).to_csv(path, index=False, float_format="%.9g", lineterminator="\n")


def save_json(content: Mapping, path: str | Path) -> None:
    """Write a small JSON file with sorted keys and the run's id."""
    Path(path).write_text(
        json.dumps({**content, "run": RUN_ID}, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def sha256(file: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def panel(ax, image, cam=None, mask=None, title: str = "", opacity: float = 0.5) -> None:
    """One picture of a grid: the image, with a map laid over it and the contour of a mask (white on black) where they
    are given.
    """
    import cv2

    pixels = np.asarray(image)
    ax.imshow(pixels if cam is None else overlay(pixels, cam, opacity), cmap="gray" if pixels.ndim == 2 else None)
    if mask is not None:
        shape = np.asarray(mask).astype(np.uint8)
        for contour in cv2.findContours(shape, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)[0]:
            closed = np.vstack([contour[:, 0], contour[:1, 0]])
            ax.plot(*closed.T, color="black", linewidth=2.2)
            ax.plot(*closed.T, color="white", linewidth=1.0)
    ax.set_title(title)
    ax.set_axis_off()
