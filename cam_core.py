"""Grad-CAM, LayerCAM and their fusion for PyTorch image classifiers, and how such explanations are judged.

One idea carries this module: a class activation map (CAM) is a pure function of activations and gradients. `capture` is
the only place that touches a network; everything behind it is small batched tensor code. Read it from top to bottom:

    1  capture           one forward pass and a part of the backward pass -> logits, activations, gradients
    2  CAMs              grad_cam, layer_cam and relatives: (A, G) -> (B, h, w); gradients of the pixels
    3  fusion            normalise, enlarge, hybrid, fuse_layers
    4  layers            layer_shapes, stages, default_layers: where a network can be asked
    5  explain           one image in one call, and its pictures
    6  method_maps       every method of the study, and its controls, from one capture
    7  faithfulness      insertion and deletion curves, AUC, change of confidence; RISE for comparison
    8  localisation      pointing game, energy in the mask, average precision, IoU of masks and boxes
    9  sanity            similarity of maps, a network randomised layer by layer
    10 statistics        paired differences with intervals
    11 runs and figures  seeds, output folders, one visual language

What comes from outside, networks, images and data sets, is read by `cam_inputs`, whose functions are here too.

Notation: B images, C channels, h x w the size of a captured map, H x W the size of the input, K classes. Maps are
(B, height, width) float32 tensors, non-negative; "normalised" means divided by their maximum, so in [0, 1].
"""

from __future__ import annotations

import ast
import copy
import functools
import hashlib
import inspect
import json
import math
import operator
import os
import re
import sys
import textwrap
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from types import CodeType

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from cam_inputs import (  # noqa: F401  (notebooks and users take all of it from here)
    DATASETS,
    HOME,
    MEAN,
    STD,
    arch_name,
    class_indices,
    dataset_folder,
    imagenet_classes,
    load_batch,
    load_boxes,
    load_masks,
    load_model,
    nearest,
    pick_device,
    preprocess,
    read_dataset,
    read_image,
    readable,
    resolve_weights,
    safe_name,
    sha256,
    split_readable,
    split_rows,
    subset,
    torchvision,
    trained_folder,
    words,
)

# ------------------------------------------------------------------------------------------------------------ 1 capture


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
    under `torch.no_grad` and `torch.inference_mode`. Outputs with channels last, (B, h, w, C) as in Swin, and tokens,
    (B, n, C) as in ViT, are handed back as (B, C, h, w) too; tokens in front of the patches (class, registers) are left
    out.

    Raises ValueError for an unknown layer (names the nearest and all there are), one that runs twice or never, one
    without a spatial output with h*w > 1, one that the target logit does not depend on, a target out of range, an x
    that does not fit the model, and NaN or infinity in the logits, activations or gradients.
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
            there = {n: " × ".join(map(str, shape)) for n, shape in layer_shapes(model, x).items()}
            raise ValueError(f"layer={name!r} is not in this {type(model).__name__}. {nearest(name, there)}")
        if isinstance(modules[name], torch.jit.ScriptModule):
            raise ValueError(f"layer={name!r} is a scripted module, which takes no hooks. Give the unscripted model.")

    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            if name in outputs:
                raise ValueError(
                    f"layer={name!r} runs more than once in a pass, so its map is ambiguous. Choose one that runs once."
                )
            if _maps(output, x) is None:
                seen = f"{tuple(output.shape)} {output.dtype}" if isinstance(output, Tensor) else type(output).__name__
                raise ValueError(
                    f"layer={name!r} has no spatial output: got {seen}, need floats (B, C, h, w), h*w > 1. Try an "
                    "earlier one."
                )
            outputs[name] = output if output.requires_grad else output.detach().requires_grad_()
            return outputs[name].clone()

        return hook

    with _borrowed(model, {name: keep(name) for name in names}):
        logits = _logits(_forward(model, x.detach().clone()), x)  # a copy, as a first layer may work in place
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
    parts = {f"activations of layer={n!r}": a for n, a in outputs.items()}
    parts |= {f"gradients of layer={n!r}": g for n, g in zip(outputs, gradients, strict=True) if g is not None}
    _check_finite(x, {"logits": logits, **parts})
    found = {}
    for (name, output), gradient in zip(outputs.items(), gradients, strict=True):
        if gradient is None:
            raise ValueError(
                f"The target logit does not depend on layer={name!r}. Choose a layer on the way to the logits."
            )
        found[name] = tuple(_maps(t.detach(), x) for t in (output, gradient))
        if output.ndim == 3 and not found[name][1].any():
            raise ValueError(
                f"layer={name!r}: the logits depend on none of its patches, as behind the last attention of a network "
                f"that reads its class token alone. Choose an earlier one, such as {default_layers(model, x)[0]!r}."
            )
    return Capture(
        logits.detach(), chosen, {n: a for n, (a, _) in found.items()}, {n: g for n, (_, g) in found.items()}
    )


def _maps(output, x: Tensor) -> Tensor | None:
    """A module's output for the input x as maps (B, C, h, w), h*w > 1; None where it has no positions.

    Four dimensions are (B, C, h, w), or (B, h, w, C) if only then h : w is as in the input. Three are tokens (B, n, C):
    n = h*w patches, in rows as in the input, and up to eight more in front of them.
    """
    if not isinstance(output, Tensor) or output.ndim not in (3, 4) or len(output) != len(x):
        return None
    if not output.is_floating_point():
        return None
    if output.ndim == 4:
        last = _as_wide(output.shape[1:3], x) and not _as_wide(output.shape[2:], x)
        maps = output.permute(0, 3, 1, 2) if last else output
        return maps if maps.shape[2] * maps.shape[3] > 1 else None
    for extra in range(min(9, output.shape[1] - 1)):
        patches = output.shape[1] - extra
        h = max(1, round(math.sqrt(patches * x.shape[2] / x.shape[3])))
        if patches % h == 0 and _as_wide((h, patches // h), x):
            return output[:, extra:].unflatten(1, (h, patches // h)).permute(0, 3, 1, 2)
    return None


def _as_wide(size: Sequence[int], x: Tensor) -> bool:
    """Whether h : w is as in the input, up to rounding to whole cells."""
    return abs(size[0] * x.shape[3] - size[1] * x.shape[2]) <= max(x.shape[2:])


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Every submodule in eval mode; afterwards each in its own."""
    training = [m for m in model.modules() if m.training]
    try:
        for m in training:
            m.training = False  # not .eval(), which a model may override
        yield
    finally:
        for m in training:
            m.training = True


@contextmanager
def _borrowed(model: nn.Module, hooks: Mapping[str, Callable]) -> Iterator[None]:
    """The model in eval mode, frozen, with forward hooks by layer name and autograd on; afterwards as it was, whatever
    happened.
    """
    modules = dict(model.named_modules())
    trainable = [p for m in modules.values() for p in m._parameters.values() if p is not None and p.requires_grad]
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
    _check_model(model)
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


def _check_model(model) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model={model!r} must be a torch.nn.Module.")


def _forward(model: nn.Module, x: Tensor):
    """model(x). What torch says there against its shape or type becomes a ValueError that names x; what a model raises
    itself is handed on.
    """
    try:
        return model(x)
    except (RuntimeError, AssertionError) as error:
        raised_in = [f.f_globals.get("__name__", "") for f, _ in traceback.walk_tb(error.__traceback__)][-1]
        # exactly these: running out of memory and a device's failure are kinds of RuntimeError too, and not x's fault
        about_x = type(error) in (RuntimeError, NotImplementedError, AssertionError)
        if not about_x or raised_in.split(".")[0] not in ("torch", "torchvision"):
            raise
        weights = next((f", its weights are {p.dtype}" for p in model.parameters()), "")
        raise ValueError(
            f"x={x.dtype} {tuple(x.shape)} does not fit this {type(model).__name__}{weights}: {error} "
            "Give x the type, channels and size that the model expects."
        ) from error


def _logits(output, x: Tensor) -> Tensor:
    output = getattr(output, "logits", output)
    right = isinstance(output, Tensor) and output.is_floating_point() and output.ndim == 2
    if not right or len(output) != len(x) or not output.shape[1]:
        got = f"{output.dtype} {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"The model's output must be logits of shape (B, K), floats, here ({len(x)}, K); got {got}. Wrap the model "
            "so that it returns them."
        )
    return output


def _check_finite(x: Tensor, tensors: Mapping[str, Tensor]) -> None:
    """Refuse NaN and infinity in what a network made of x: {what it is: tensor (B, ...)}.

    A sum is finite only if all that it adds up is: one pass, no copy. Only if it is not, and large values may have made
    it so, each value is looked at.
    """
    sums = [t.detach().sum(dtype=torch.float32 if t.dtype == torch.float16 else None) for t in tensors.values()]
    if bool(torch.stack([s.float().to(x.device) for s in sums]).isfinite().all()):
        return
    for what, t in tensors.items():
        wrong = (~t.detach().isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        if wrong:
            source = "x is finite" if bool(x.isfinite().all()) else "x contains them too"
            hidden = "" if what == "logits" else " The logits show nothing of it."
            raise ValueError(
                f"The model's {what} contain NaN or infinity in images {wrong[:5]} of x ({source}); all must be "
                f"finite. Check the input's scaling and the weights.{hidden}"
            )


def _targets(target, logits: Tensor) -> Tensor:
    batch, classes = logits.shape
    if target is None:
        return logits.detach().argmax(1)
    try:
        chosen = target.clone() if isinstance(target, Tensor) else torch.tensor(target)
        chosen = chosen.to(logits.device)
    except (TypeError, ValueError, RuntimeError):
        chosen = torch.empty(0, 0)  # refused below
    whole = not (chosen.is_floating_point() or chosen.is_complex() or chosen.dtype == torch.bool)
    if not whole or chosen.ndim > 1 or chosen.layout != torch.strided:
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
    dense = isinstance(x, Tensor) and x.layout == torch.strided
    if not dense or x.ndim != 4 or not x.is_floating_point() or not x.numel():
        got = f"{x.dtype} {tuple(x.shape)}, {x.layout}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be a float tensor (B, C, H, W), none of them 0; got {got}. See `preprocess`.")
    tensors = [t for m in model.modules() for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
    if tensors and tensors[0].device != x.device:
        raise ValueError(
            f"x is on {x.device} and the model on {tensors[0].device}: move one of them with `.to(device)`."
        )
    if any(t.is_inference() for t in tensors):
        raise ValueError(
            "The model was created under torch.inference_mode, so no gradient can pass it. Load it outside."
        )


# --------------------------------------------------------------------------------------------------------------- 2 CAMs
# All take activations A and gradients G, both (B, C, h, w), and return rectified maps (B, h, w) in float32, not yet
# normalised. Indices: k channel, (i, j) position; sums over what is not on the left.


def _pair(A: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    for name, t in (("A", A), ("G", G)):
        if not isinstance(t, Tensor) or t.ndim != 4 or t.shape != A.shape or t.is_complex():
            got = f"{t.dtype} {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"{name} must be a real tensor (B, C, h, w), A and G of one shape; got {got}.")
    return A.float(), G.float()


def grad_cam(A: Tensor, G: Tensor) -> Tensor:
    """ReLU(sum_k w_k A_k), w_k = mean_ij G_k(i, j). Selvaraju et al., ICCV 2017, eq. 1 and 2."""
    A, G = _pair(A, G)
    return torch.einsum("bk,bkhw->bhw", G.mean((2, 3)), A).relu()


def layer_cam(A: Tensor, G: Tensor) -> Tensor:
    """ReLU(sum_k ReLU(G_k(i, j)) A_k(i, j)). Jiang et al., IEEE TIP 2021, eq. 6 to 8."""
    A, G = _pair(A, G)
    return (G.relu() * A).sum(1).relu()


def hires_cam(A: Tensor, G: Tensor) -> Tensor:
    """ReLU(sum_k G_k(i, j) A_k(i, j)). Draelos and Carin, 2020 (arXiv 2011.08891), eq. 5; rectified here as the others
    are.
    """
    A, G = _pair(A, G)
    return (G * A).sum(1).relu()


def grad_cam_pp(A: Tensor, G: Tensor) -> Tensor:
    """ReLU(sum_k w_k A_k), w_k = sum_ij a_k(i, j) ReLU(G_k(i, j)), a = G^2 / (2 G^2 + S_k G^3), S_k = sum_ij A_k.

    Chattopadhyay et al., WACV 2018, eq. 10 and 19 (the target score enters as exp(y), whose higher derivatives are
    powers of G). Computed as a = 1 / (2 + S_k G), the same where G != 0, without squares of small numbers.
    """
    A, G = _pair(A, G)
    denominator = 2 + A.sum((2, 3), keepdim=True) * G
    a = torch.where(denominator.abs() > 1e-6, 1 / denominator, torch.zeros_like(G))
    return torch.einsum("bk,bkhw->bhw", (a * G.relu()).sum((2, 3)), A).relu()


def xgrad_cam(A: Tensor, G: Tensor) -> Tensor:
    """ReLU(sum_k w_k A_k), w_k = sum_ij G_k A_k / sum_ij A_k. Fu et al., BMVC 2020, eq. 8. A channel that sums to zero
    gets weight zero.
    """
    A, G = _pair(A, G)
    total, spoken = A.sum((2, 3)), (G * A).sum((2, 3))
    w = torch.where(total.abs() > 1e-7, spoken / total, 0 * spoken)  # 0 times a NaN is NaN still
    return torch.einsum("bk,bkhw->bhw", w, A).relu()


# A CAM of your own: write it like one above and add it, `cc.CAMS["my_cam"] = my_cam`; the tables have it, and the
# figures that show all methods.
CAMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "grad_cam": grad_cam,
    "layer_cam": layer_cam,
    "grad_cam_pp": grad_cam_pp,
    "hires_cam": hires_cam,
    "xgrad_cam": xgrad_cam,
}


def input_gradient(
    model: nn.Module, x: Tensor, target: int | Sequence[int] | Tensor | None = None, guided: bool = False
) -> Tensor:
    """d y_t / d x of the target logit: (B, C, H, W) float32, signed; model, x and target as in `capture`.

    The vanilla gradient (Simonyan et al., ICLR workshop 2014) or, guided, guided backpropagation (Springenberg et al.,
    ICLR workshop 2015), where every ReLU hands back only what is positive of its gradient. A saliency map is
    `g.abs().amax(1)`. Guided Grad-CAM (Selvaraju et al., ICCV 2017, section 3.2) is `g * cam[:, None]` with the guided
    gradient and the enlarged Grad-CAM.

    The rule is applied to the graph of this one pass, wherever a ReLU was called (ReLU6 and clamping from 0 on are
    ReLUs too), as a module or a function, in place or not; modules are not touched. Raises what `capture` raises, and
    ValueError where the pass holds a rectifier without such a rule, by name: another activation (GELU, SiLU, ...), a
    maximum or `where`, a scripted or custom function. A ReLU written as a product, `x * (x > 0)`, is not recognised.
    """
    model = _unwrap(model)
    _check_input(model, x)
    with _borrowed(model, {}):
        leaf = x.detach().clone().requires_grad_()
        logits = _logits(_forward(model, leaf.clone()), x)  # a clone, as a first layer may work in place
        score = logits.gather(1, _targets(target, logits)[:, None]).sum()
        if guided:
            _guide(score)
        gradient = torch.autograd.grad(score, leaf, allow_unused=True)[0] if score.requires_grad else None
    _check_finite(x, {"logits": logits} | ({} if gradient is None else {"gradients of the input": gradient}))
    if gradient is None:
        raise ValueError("The target logit does not depend on the input.")
    return gradient.detach().float()


# What autograd calls rectifiers: those that are a ReLU if their lower end, saved under this name, is 0 ...
RELUS = {"Relu": "", "Hardtanh": "_saved_min_val", "Threshold": "_saved_threshold"}
RELUS |= {"ClampMin": "_saved_min", "Clamp": "_saved_min"}
# ... and those for which guided backpropagation has no rule.
OTHER_RECTIFIERS = set("Gelu Silu Hardswish LeakyRelu Elu Mish Softplus PreluKernel RreluWithNoise Glu".split())
OTHER_RECTIFIERS |= set("Maximum Where DifferentiableGraph".split())


def _guide(score: Tensor) -> None:
    """Make every ReLU in the graph behind a score hand back positive gradients only."""
    todo, seen, other = [score.grad_fn], set(), set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [below for below, _ in node.next_functions]
        kind = re.sub(r"Backward\d*$", "", node.name())
        if kind in RELUS and getattr(node, RELUS[kind], 0) == 0:
            node.register_hook(lambda gradients, _: tuple(g if g is None else g.relu() for g in gradients))
        elif kind in OTHER_RECTIFIERS or isinstance(node, torch.autograd.function.BackwardCFunction):
            other.add(kind)
    if other:
        raise ValueError(
            f"guided: guided backpropagation has a rule for ReLU alone; this network uses {', '.join(sorted(other))} "
            "too. Use the vanilla gradient, guided=False."
        )


# ------------------------------------------------------------------------------------------------------------- 3 fusion


def normalise(maps: Tensor) -> Tensor:
    """m / max(m), per image; (B, h, w) -> (B, h, w) in [0, 1]. A map that is zero everywhere stays zero.

    Division by the maximum, not min-max: min-max forces a zero into every map, and a zero in one factor kills a
    product. Raises ValueError for maps that are not (B, h, w), not finite, or negative somewhere.
    """
    if not isinstance(maps, Tensor) or maps.is_complex() or maps.layout != torch.strided:
        got = f"{maps.dtype}, {maps.layout}" if isinstance(maps, Tensor) else type(maps).__name__
        raise ValueError(f"maps must be a dense tensor of real numbers, of shape (B, h, w); got {got}.")
    if maps.ndim != 3 or not maps.shape[1] * maps.shape[2]:
        raise ValueError(f"maps must have shape (B, h, w), h*w > 0; got {tuple(maps.shape)}.")
    maps = maps.float()
    low, high = maps.aminmax() if maps.numel() else (maps.new_zeros(()), maps.new_zeros(()))
    if not (bool(low >= 0) and math.isfinite(high)):  # aminmax hands a NaN on, and NaN >= 0 is false
        raise ValueError(
            f"maps must be finite and non-negative; got {float(low)} to {float(high)}. CAMs are rectified first."
        )
    peak = maps.amax((1, 2), keepdim=True)
    return torch.where(peak > 0, maps / peak, torch.zeros_like(maps)).clamp(max=1)


def enlarge(maps: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """Normalised, enlarged to size = (H, W), normalised again; (B, h, w) -> (B, H, W) in [0, 1].

    mode: "bilinear" or "bicubic" (both with `align_corners=False`; what bicubic overshoots below 0 is cut), or
    "nearest", which shows the layer's cells. Raises ValueError for another mode, and as `normalise` does.
    """
    if mode not in ("nearest", "bilinear", "bicubic"):
        raise ValueError(f"mode={mode!r} must be 'nearest', 'bilinear' or 'bicubic'.")
    try:
        height, width = map(operator.index, size)
    except (TypeError, ValueError):
        height = width = 0  # refused here
    if height < 1 or width < 1:
        raise ValueError(f"size={size!r} must be (H, W), two whole numbers from 1 on.")
    settings = {"mode": "nearest-exact"} if mode == "nearest" else {"mode": mode, "align_corners": False}
    large = F.interpolate(normalise(maps)[:, None], size=(height, width), **settings)[:, 0]
    return normalise(large.clamp(min=0) if mode == "bicubic" else large)


FLOOR = 0.1  # of the floored product, as a share of each map's maximum


def product(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    return a.pow(alpha) * b.pow(1 - alpha)


def floored(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    fused = ((a + FLOOR).pow(alpha) * (b + FLOOR).pow(1 - alpha) - FLOOR).relu()
    return torch.where((a > 0) | (b > 0), fused, 0)  # rounding would leave 1e-9 where both are zero


def mean(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    return alpha * a + (1 - alpha) * b


def maximum(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    return torch.maximum(alpha * a, (1 - alpha) * b)


# How two normalised maps become one; `hybrid` tells the formulas. Add one of your own as with CAMS.
FUSIONS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "product": product,
    "floored": floored,
    "mean": mean,
    "maximum": maximum,
}


def hybrid(a: Tensor, b: Tensor, alpha: float, size: tuple[int, int] | None = None, rule: str = "product") -> Tensor:
    """The weighted geometric mean a^alpha * b^(1-alpha) of two maps, each normalised before and their product
    normalised after.

    a: usually Grad-CAM at a deep layer, (B, h, w); b: usually LayerCAM, at the same or a shallower layer, (B, h', w').
    size = (H, W) enlarges both first (see `enlarge`) and is required where their sizes differ. alpha in [0, 1]; alpha=1
    gives a / max(a) and alpha=0 gives b / max(b), exactly, whatever the rule. rule: "product" (above), "floored" =
    (a + f)^alpha * (b + f)^(1-alpha) - f with f = 0.1, which keeps an order where one factor is zero, "mean" =
    alpha * a + (1-alpha) * b, "maximum" = max(alpha * a, (1-alpha) * b), or a name of your own in FUSIONS. Returns
    (B, H, W) in [0, 1]; the product is zero everywhere where one factor or their overlap is. Raises ValueError for
    alpha outside [0, 1], an unknown rule, and maps whose shapes do not fit.

    The formula with alpha = 0.7 at one common layer is from hirthickraj2015, Grad-Cam_Analysis_of_Cnn_Decisions; see
    Sources in the README.
    """
    alpha = _alpha(alpha)
    if not isinstance(rule, str) or rule not in FUSIONS:
        raise ValueError(f"rule={rule!r} is no fusion rule. {nearest(str(rule), list(FUSIONS))}")
    for m in (a, b):
        if not isinstance(m, Tensor):
            raise ValueError(f"The maps must be tensors (B, h, w); got {type(m).__name__}.")
    if size is None and a.shape != b.shape:
        raise ValueError(
            f"The maps have shapes {tuple(a.shape)} and {tuple(b.shape)}: give size=(H, W) to enlarge both to one size."
        )
    a, b = (normalise(a), normalise(b)) if size is None else (enlarge(a, size), enlarge(b, size))
    if a.shape != b.shape:
        raise ValueError(f"The maps belong to different batches: {a.shape[0]} and {b.shape[0]} images.")
    if alpha in (0, 1):
        return a if alpha == 1 else b
    return normalise(FUSIONS[rule](a, b, alpha))


def _alpha(alpha: float) -> float:
    if not isinstance(alpha, Real) or isinstance(alpha, bool) or not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha!r} must be a number in [0, 1]: 1 is the first map alone, 0 the second.")
    return float(alpha) if alpha >= torch.finfo(torch.float32).tiny else 0.0  # float32's pow may take less for 0


def fuse_layers(maps: Sequence[Tensor], size: tuple[int, int], fuse: str = "product") -> Tensor:
    """Maps of several layers, each (B, h, w) at its own resolution, as one: (B, H, W) in [0, 1], size = (H, W).

    Each is enlarged first. fuse: "product" (geometric mean), "mean", "maximum", or "layercam": the maximum of the maps,
    all but the coarsest scaled by tanh(2 m / max m), as Jiang et al., IEEE TIP 2021, section III-C, fuse the stages of
    a VGG16 (they scale the first three of five). Raises ValueError for another name.
    """
    if not isinstance(fuse, str) or fuse not in LAYER_FUSIONS:
        raise ValueError(f"fuse={fuse!r} is no fusion of layers. {nearest(str(fuse), list(LAYER_FUSIONS))}")
    counts = [len(m) if isinstance(m, Tensor) and m.ndim == 3 else type(m).__name__ for m in maps]
    if not counts or counts != counts[:1] * len(counts) or not isinstance(counts[0], int):
        raise ValueError(f"maps={counts} must be tensors (B, h, w), at least one, all of the same B images.")
    large = [enlarge(m, size) for m in sorted(maps, key=lambda m: -m.shape[1])]  # the coarsest last
    return large[0] if len(large) == 1 else normalise(LAYER_FUSIONS[fuse](torch.stack(large)))


LAYER_FUSIONS: dict[str, Callable[[Tensor], Tensor]] = {  # (layers, B, H, W), the coarsest last -> (B, H, W)
    "product": lambda m: m.prod(0) ** (1 / len(m)),
    "mean": lambda m: m.mean(0),
    "maximum": lambda m: m.amax(0),
    "layercam": lambda m: torch.cat([torch.tanh(2 * m[:-1]), m[-1:]]).amax(0),
}


def cam_at(
    shot: Capture,
    cam: Callable[[Tensor, Tensor], Tensor],
    layers: str,
    size: tuple[int, int],
    fuse: str = "product",
) -> Tensor:
    """A CAM at a layer, enlarged to size = (H, W): (B, H, W) in [0, 1]. Of several layers, joined by "+" as in
    "layer2+layer3", the maps become one as `fuse_layers` says. Raises ValueError for a layer that was not captured.
    """
    for name in str(layers).split("+"):
        if name not in shot.activations:
            raise ValueError(f"layer={name!r} was not captured. {nearest(name, list(shot.activations))}")
    return fuse_layers([cam(shot.activations[n], shot.gradients[n]) for n in layers.split("+")], size, fuse)


# ------------------------------------------------------------------------------------------------------------- 4 layers


def _probe(model: nn.Module, x: Tensor) -> list[tuple[str, nn.Module, object]]:
    """(name, module, output) of all modules, each time one ends, in one pass with the first image."""
    _check_input(model, x)
    ended: list[tuple[str, nn.Module, object]] = []

    def record(name: str) -> Callable:
        return lambda module, args, output: ended.append((name, module, output))

    hooked = [n for n, m in model.named_modules() if n and not isinstance(m, torch.jit.ScriptModule)]
    with _borrowed(model, {name: record(name) for name in hooked}):
        _forward(model, x[:1].detach().clone())
    return ended


def layer_shapes(model: nn.Module, x: Tensor) -> dict[str, tuple[int, int, int]]:
    """Every layer that `capture` can take, in order of execution: {dotted name: (C, h, w)}. One pass, one image."""
    model = _unwrap(model)
    ended = _probe(model, x)
    often = Counter(name for name, _, _ in ended)
    maps = {name: _maps(output, x[:1]) for name, _, output in ended if often[name] == 1}
    return {name: tuple(m.shape[1:]) for name, m in maps.items() if m is not None}


def stages(model: nn.Module, x: Tensor, until: str = "") -> dict[str, int]:
    """Where a map can be taken, {layer: height of its map}, in order of execution: at each resolution the last layer
    that everything passes through. Found by a few probe passes with one image.

    Candidates are the layers of `layer_shapes` whose maps are shaped like the input, that are no pooling layers (nor
    containers that end in one), lie in front of the classifier (the last module with weights that runs), and that
    everything passes through (not one branch of a block). Where several names share one output, the outermost counts.
    For ResNet: relu, layer1, layer2, layer3, layer4. A network of one resolution that works on tokens (ViT) has four
    stages, evenly spaced: the last layer whose patches still reach the logits, and its like in earlier blocks. For
    ViT-B: encoder.layers.encoder_layer_2.ln_1, then 5, 8, 11.

    until: only what is finer than this layer, or in a network of one resolution ends before it; and the layer itself.
    """
    model = _unwrap(model)
    ended, x = _probe(model, x), x[:1].detach()
    often = Counter(name for name, _, _ in ended)
    pooled = [output for _, module, output in ended if "Pool" in type(module).__name__]
    weighted = [k for k, (_, module, _) in enumerate(ended) if any(True for _ in module.parameters(recurse=False))]
    heights, flat = {}, []
    for name, module, output in ended[: max(weighted, default=0)]:
        maps = _maps(output, x) if often[name] == 1 else None
        hands_on = isinstance(module, nn.Identity | nn.modules.dropout._DropoutNd)
        if maps is not None and _as_wide(maps.shape[2:], x) and not hands_on and not any(output is p for p in pooled):
            heights[name] = maps.shape[2]
            flat += [name] * (output.ndim == 3)
    if flat and len({heights[name] for name in flat}) == 1:
        found = _blocks(flat, next((n for n in reversed(flat) if _patches_count(model, x, n)), ""))
    else:
        found = []
        for name in reversed(heights):
            if heights[name] not in [heights[n] for n in found] and _all_passes(model, x, name):
                found.insert(0, name)
    if until:
        order, height = [name for name, _, _ in ended], capture(model, x, until).activations[until].shape[2]
        one_size = len({heights[name] for name in found}) == 1
        before = [n for n in found if heights[n] > height or (one_size and order.index(n) < order.index(until))]
        return {name: heights[name] for name in before} | {until: height}
    return {name: heights[name] for name in found}


def _blocks(names: Sequence[str], deep: str) -> list[str]:
    """Four names, evenly spaced, that differ from `deep` in their first number alone; the last of them is `deep`."""
    alike = re.compile(re.sub(r"\d+", r"\\d+", re.escape(deep), count=1))
    blocks = [name for name in names if alike.fullmatch(name)]
    blocks = blocks[: blocks.index(deep) + 1] if deep else []
    return list(dict.fromkeys(blocks[len(blocks) * k // 4 - 1] for k in range(1, 5) if len(blocks) * k // 4))


def default_layers(model: nn.Module, x: Tensor) -> tuple[str, str]:
    """(deep, shallow): where Grad-CAM and where LayerCAM look by default: the last of `stages`, and the one whose
    resolution is nearest to four times deep's. For ResNet: layer4, layer2. A model of one resolution has no finer one:
    then the middle stage is shallow (ViT-B: the sixth of twelve blocks), or deep itself if it is the only one.

    Raises ValueError when a model has no such layer.
    """
    found = stages(model, x)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no layer with a spatial output before its classifier: name one with layer=."
        )
    deep, low = list(found.items())[-1]
    finer = sorted((h, n) for n, h in found.items() if h > low)
    middle = (low, list(found)[(len(found) - 1) // 2])
    return deep, min(finer, key=lambda pair: abs(math.log(pair[0] / (4 * low))), default=middle)[1]


def _all_passes(model: nn.Module, x: Tensor, layer: str) -> bool:
    """Whether all that reaches the logits passes through the layer: with its output cut off, they no longer depend on
    the input.
    """
    with _borrowed(model, {layer: lambda module, args, output: output.detach()}):
        return not _logits(_forward(model, x.clone().requires_grad_().clone()), x).requires_grad


def _patches_count(model: nn.Module, x: Tensor, layer: str) -> bool:
    """Whether the logits depend on what a layer has for the patches, or on its class token alone."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[0].clone()

    with _borrowed(model, {layer: keep}):
        score = _logits(_forward(model, x.clone()), x).amax()
        gradient = torch.autograd.grad(score, kept, allow_unused=True)[0] if score.requires_grad else None
    return gradient is not None and bool(_maps(gradient, x).any())


def matching_layers(layers: str, stages_here: Sequence[str], stages_there: Sequence[str]) -> str:
    """The layers of another network that lie as many stages before its last as `layers` ("layer2", "layer2+layer3") do
    here. Raises ValueError for a layer that is no stage.
    """
    here, there = list(stages_here), list(stages_there)
    for name in layers.split("+"):
        if name not in here:
            raise ValueError(f"layer={name!r} is no stage of the first network ({', '.join(here)}): name one of these.")
    places = [here.index(name) - len(here) for name in layers.split("+")]
    return "+".join(dict.fromkeys(there[max(place, -len(there))] for place in places))


def resolve_layers(model: nn.Module, x: Tensor, layer: str = "auto", shallow_layer: str = "auto") -> tuple[str, str]:
    """(deep, shallow) as a notebook's parameters mean them: a name is kept, "auto" is what `default_layers` finds."""
    if "auto" not in (layer, shallow_layer):
        return layer, shallow_layer
    deep, shallow = default_layers(model, x)
    return deep if layer == "auto" else layer, shallow if shallow_layer == "auto" else shallow_layer


# ------------------------------------------------------------------------------------------------------------ 5 explain


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
    size: int | None = None,
    rule: str = "product",
    fuse: str = "product",
) -> Explanation:
    """One image, one map, one call.

    image: a path or PIL image (squashed to size x size, ImageNet-normalised), or a preprocessed tensor (3, H, W) or (1,
    3, H, W). target: class index, or None for the predicted class. method: "hybrid" (Grad-CAM at `layer` with LayerCAM
    at `shallow_layer`, by `rule` and alpha; see `hybrid`) or a name in CAMS (at `layer`). Layers default to
    `default_layers`; both may be several, "layer2+layer3", joined by `fuse` (see `fuse_layers`). size: the side of the
    model's input, else its `image_size`, else 224; the map has this size, and `overlay` fits it to the photograph.
    Raises ValueError for an unknown method, and what `capture` and `hybrid` raise.
    """
    _check_model(model)
    alpha = _alpha(alpha)
    for name, value in (("layer", layer), ("shallow_layer", shallow_layer)):
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{name}={value!r} must be a dotted module name, such as 'layer4', or None.")
    if not isinstance(image, str | Path | Image.Image | Tensor):
        raise ValueError(f"image must be a path, a PIL image or a tensor; got {type(image).__name__}.")
    if isinstance(image, Tensor) and not image.is_floating_point():
        raise ValueError(f"image: a tensor must be preprocessed, so hold floats; got {image.dtype}. See `preprocess`.")
    if isinstance(image, Tensor):
        x = image[None] if image.ndim == 3 else image
    else:
        side = size or getattr(model, "image_size", 224)
        if not isinstance(side, int) or side < 1:
            raise ValueError(f"size={side!r} must be a whole number from 1 on, the side of the model's input.")
        x = preprocess(image if isinstance(image, Image.Image) else read_image(image), side)
    if x.ndim != 4 or len(x) != 1:
        raise ValueError(
            f"image: one at a time; got a tensor {tuple(image.shape)}. For batches use capture and the CAMs."
        )
    if not isinstance(method, str) or method not in ("hybrid", *CAMS):
        raise ValueError(f"method={method!r} is unknown. {nearest(str(method), ['hybrid', *CAMS])}")
    first = next(model.parameters(), x)
    x = x.to(device=first.device, dtype=first.dtype)
    deep, shallow = (
        (layer, shallow_layer) if layer and (shallow_layer or method != "hybrid") else default_layers(model, x)
    )
    deep, shallow = layer or deep, shallow_layer or shallow or deep
    both = list(dict.fromkeys([*shallow.split("+"), *deep.split("+")]))
    shot = capture(model, x, both if method == "hybrid" else deep.split("+"), target)
    at = tuple(x.shape[2:]), fuse
    if method == "hybrid":
        maps = hybrid(cam_at(shot, grad_cam, deep, *at), cam_at(shot, layer_cam, shallow, *at), alpha, rule=rule)
    else:
        maps = cam_at(shot, CAMS[method], deep, *at)
    index = int(shot.target[0])
    probability = float(shot.logits.float().softmax(1)[0, index])
    return Explanation(
        maps[0].cpu().numpy(), index, probability, method, deep, shallow if method == "hybrid" else "", alpha
    )


def colours(cam: np.ndarray | Tensor, size: tuple[int, int] | None = None, colormap: str = "inferno") -> np.ndarray:
    """A map in colours: (h, w) in [0, 1] -> uint8 (H, W, 3), enlarged bilinearly to size = (H, W) where it is given.

    colormap: a name of matplotlib's. The default is even to the eye, in lightness too, so no value stands out but the
    high ones; "jet", which much of the literature uses, is not. Raises ValueError for a map that is not in [0, 1] and
    for an unknown name.
    """
    import cv2
    import matplotlib

    try:
        cam = np.asarray(cam.detach().float().cpu() if isinstance(cam, Tensor) else cam, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"cam must be a map (h, w) in [0, 1]; got {type(cam).__name__}: {error}") from error
    if cam.ndim != 2 or not cam.size or not (cam.min() >= 0 and cam.max() <= 1):
        values = f", values from {cam.min()} to {cam.max()}" if cam.size else ""
        raise ValueError(f"cam must be a map (h, w) in [0, 1]; got shape {cam.shape}{values}.")
    if not isinstance(colormap, str) or colormap not in matplotlib.colormaps:
        known = nearest(str(colormap), list(matplotlib.colormaps))
        raise ValueError(f"colormap={colormap!r}: matplotlib has none. {known}")
    if size is not None:
        cam = cv2.resize(cam, size[::-1], interpolation=cv2.INTER_LINEAR)
    table = matplotlib.colormaps[colormap](np.arange(256), bytes=True)[:, :3]
    return table[np.minimum(cam * 256, 255).astype(np.uint8)]  # as matplotlib does, in a tenth of the memory


def overlay(
    image: Image.Image | np.ndarray, cam: np.ndarray | Tensor, opacity: float = 0.4, colormap: str = "inferno"
) -> np.ndarray:
    """(1 - opacity) * image + opacity * colours(cam), uint8 (H, W, 3) at the image's own size.

    image: PIL, or uint8 (H, W) or (H, W, 3). cam: (h, w) in [0, 1]. Raises ValueError for an opacity outside [0, 1],
    and as `colours` does.
    """
    import cv2

    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    pixels = np.repeat(pixels[..., None], 3, 2) if pixels.ndim == 2 else pixels
    if not isinstance(opacity, Real) or not 0 <= opacity <= 1:
        raise ValueError(f"opacity={opacity!r} must lie in [0, 1].")
    coloured = colours(cam, pixels.shape[:2], colormap)
    return cv2.addWeighted(np.ascontiguousarray(pixels), 1 - opacity, coloured, opacity, 0)


def edge_overlay(image: Image.Image, cam: np.ndarray | Tensor, colormap: str = "inferno") -> np.ndarray:
    """The map in colours with the image's Canny edges drawn over it in white: uint8 (H, W, 3) at the image's own size.

    Canny, IEEE PAMI 1986, from OpenCV, on the grey image shrunk to at most 500 pixels a side and smoothed by 1/300 of
    the longer one, with thresholds 50 and 100: they count per pixel, so the same edge would pass in a small photograph
    and not in a large one. Shows where a map ends at an edge, with none of the image's brightness in the way.
    """
    import cv2

    small, drawn = image.convert("L"), colours(cam, image.size[::-1], colormap)
    small.thumbnail((500, 500), Image.Resampling.BOX)
    grey = np.asarray(small)
    edges = cv2.Canny(cv2.GaussianBlur(grey, (0, 0), max(grey.shape) / 300), 50, 100)
    drawn[cv2.resize(edges, image.size, interpolation=cv2.INTER_LINEAR) > 100] = 255
    return drawn


def save_pictures(
    folder: Path, name: str, image: Image.Image, cam: np.ndarray | Tensor, colormap: str = "inferno"
) -> None:
    """Five pictures of one explanation, at the image's own size: folder/NAME_original.png, _grayscale (the map, 0 black
    to 1 white), _heatmap (the map in colours), _overlay and _edges (`edge_overlay`).
    """
    size = image.size[::-1]
    pictures = {
        "original": np.asarray(image.convert("RGB")),
        "grayscale": colours(cam, size, "gray"),
        "heatmap": colours(cam, size, colormap),
        "overlay": overlay(image, cam, colormap=colormap),
        "edges": edge_overlay(image, cam, colormap),
    }
    for kind, pixels in pictures.items():
        Image.fromarray(pixels[..., 0] if kind == "grayscale" else pixels).save(folder / f"{name}_{kind}.png")


def top_classes(p: Tensor, class_names: Sequence[str], ids: Sequence[str], k: int = 5):
    """The k most likely classes of each image as a table with image, rank (from 1), class, name and probability; p:
    (B, K), as `probabilities` gives it.
    """
    import pandas as pd

    values, indices = p.topk(min(k, p.shape[1]), dim=1)
    return pd.DataFrame([
        dict(image=image, rank=rank, name=class_names[c], probability=value) | {"class": c}
        for image, row, chosen in zip(ids, values.tolist(), indices.tolist(), strict=True)
        for rank, (value, c) in enumerate(zip(row, chosen, strict=True), 1)
    ])  # fmt: skip


# -------------------------------------------------------------------------------------------------------- 6 method_maps

# name -> (label in tables and figures, colour from Okabe and Ito's colour-blind safe set or a grey for controls)
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
# What shares the hybrid's resolution: its factors, and fusions without the evidence. Its own gain is what they lack.
# The last goes the other way: the hybrid at Grad-CAM's resolution.
MATCHED = ("layer_cam_shallow", "grad_cam_coarse", "grad_cam_finer", "times_sobel", "times_activation")
MATCHED += ("times_other", "hybrid_coarse")
PRIOR_ALPHA = 0.7  # of the same-layer hybrid, as the prior project published it


def label(method: str) -> str:
    """The name of a method as tables and figures print it."""
    return STYLE.get(method, (method, ""))[0]


def colour(method: str) -> str:
    """The one colour that a method has in every figure."""
    return STYLE.get(method, ("", "#222222"))[1]


def sobel_edges(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """The length of the Sobel gradient of the mean over colours, averaged to a grid (h, w): (B, 3, H, W) -> (B, h, w).
    It knows the image, at a layer's resolution, and nothing of the network.
    """
    grey = F.pad(x.float().mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    kernel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], device=x.device)
    both = F.conv2d(grey, torch.stack([kernel, kernel.T])[:, None])
    return F.adaptive_avg_pool2d(both.norm(dim=1, keepdim=True), grid)[:, 0]


def method_maps(
    shot: Capture,
    x: Tensor,
    layers: Mapping[str, str],
    alpha: float,
    rule: str,
    ids: Sequence[str],
    seed: int,
) -> dict[str, Tensor]:
    """Every single-pass method of the study and its controls, from one capture: name -> (B, H, W) in [0, 1].

    x: (B + 1, 3, H, W), the images explained and one more, whose map "times_other" gives to the last of them. shot: the
    capture of all of x at all `layers`: deep (where CAMs look), coarse and shallow (the hybrid's Grad-CAM and LayerCAM;
    each may be several, see `cam_at`), finer (the stage before deep). ids: of the B images; random controls depend on
    (seed, id) alone.

    All CAMS at deep. hybrid = Grad-CAM at coarse with LayerCAM at shallow by `rule` and `alpha`; hybrid_same = the
    product of both at deep with the prior's alpha, 0.7; hybrid_deep = as hybrid, but with Grad-CAM at deep;
    fused_mean, fused_maximum: the other rules with the same alpha. Controls: MATCHED, that is the hybrid's two factors
    alone (layer_cam_shallow, grad_cam_coarse), grad_cam_finer, the hybrid's Grad-CAM fused in the same way with Sobel
    edges, the mean rectified activation or another image's LayerCAM, and the hybrid averaged to deep's grid; the same
    edges and activation alone; noise (uniform, every pixel), smooth_noise (7 x 7 uniform noise enlarged like a deep
    map), centre (Gaussian, standard deviation a quarter of the side).
    """
    size, own, (A, G) = tuple(x.shape[2:]), slice(len(ids)), (shot.activations, shot.gradients)
    deep, shallow, finer = (layers[k] for k in ("deep", "shallow", "finer"))
    maps = {name: enlarge(cam(A[deep], G[deep])[own], size) for name, cam in CAMS.items()}
    coarse, every = cam_at(shot, grad_cam, layers["coarse"], size)[own], cam_at(shot, layer_cam, shallow, size)
    maps["grad_cam_coarse"] = coarse
    fine = maps["layer_cam_shallow"] = every[own]
    grid = A[shallow.split("+")[0]]
    maps["grad_cam_finer"] = enlarge(grad_cam(A[finer], G[finer])[own], size)
    maps["sobel"] = enlarge(sobel_edges(x[own], tuple(grid.shape[2:])), size)
    maps["activation"] = enlarge(grid[own].float().relu().mean(1), size)
    maps["hybrid"] = hybrid(coarse, fine, alpha, rule=rule)
    maps["hybrid_same"] = hybrid(maps["grad_cam"], maps["layer_cam"], PRIOR_ALPHA)
    maps["hybrid_deep"] = hybrid(maps["grad_cam"], fine, alpha, rule=rule)
    maps["fused_mean"] = hybrid(coarse, fine, alpha, rule="mean")
    maps["fused_maximum"] = hybrid(coarse, fine, alpha, rule="maximum")
    maps["times_sobel"] = hybrid(coarse, maps["sobel"], alpha, rule=rule)
    maps["times_activation"] = hybrid(coarse, maps["activation"], alpha, rule=rule)
    maps["times_other"] = hybrid(coarse, every[1:], alpha, rule=rule)
    maps["hybrid_coarse"] = enlarge(F.adaptive_avg_pool2d(maps["hybrid"], A[deep].shape[2:]), size)
    draws = [_generator(seed, i, 1) for i in ids]
    smooth = torch.from_numpy(np.stack([d.random((7, 7), np.float32) for d in draws]))
    noise = torch.from_numpy(np.stack([d.random(size, np.float32) for d in draws]))
    down, right = (torch.linspace(-1, 1, n) for n in size)
    blob = torch.exp(-(down[:, None] ** 2 + right[None, :] ** 2) / (2 * 0.5**2)).expand(len(ids), -1, -1)
    maps |= {"noise": normalise(noise), "smooth_noise": enlarge(smooth, size), "centre": normalise(blob)}
    order = [n for n in STYLE if n in maps] + [n for n in maps if n not in STYLE]
    return {name: maps[name].to(x.device) for name in order}


def _generator(seed: int, image_id: str, stream: int) -> np.random.Generator:
    """Random numbers that depend on seed, image and purpose, not on which images are grouped together."""
    return np.random.default_rng([seed, stream, zlib.crc32(str(image_id).encode())])


# ------------------------------------------------------------------------------------------------------- 7 faithfulness


@torch.inference_mode()
def probabilities(model: nn.Module, x: Tensor, batch_size: int = 8, precision: str = "float32") -> Tensor:
    """softmax(model(x)) in batches and in eval mode: (B, K) float32. precision: "float32" or "bf16" (autocast)."""
    if precision not in ("float32", "bf16"):
        raise ValueError(f"precision={precision!r} must be 'float32' or 'bf16'.")
    device = next(model.parameters(), x).device
    rows = []
    with _eval_mode(model), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        for part in x.split(batch_size):
            part = part.to(device).contiguous(memory_format=torch.channels_last)
            rows.append(_logits(_forward(model, part), part).float().softmax(1))
    return torch.cat(rows)


def native_bf16() -> bool:
    """Whether the CPU multiplies in bfloat16; without that, `precision="bf16"` gains nothing on it."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _check_probabilities(p: Tensor) -> None:
    """Refuse NaN, which comparisons would hide: NaN > 0.5 is false. Not in `probabilities`, where it would make every
    batch wait for the GPU.
    """
    if bool(p.isnan().any()):
        raise ValueError(
            f"{int(p.isnan().sum())} of the model's {p.numel()} probabilities are NaN: its logits contain NaN or "
            "infinity. Check the pictures' scaling and the weights."
        )


def measurable(
    model: nn.Module,
    frame,
    n: int = 0,
    seed: int = 0,
    batch_size: int = 8,
    precision: str = "float32",
    strict: bool = False,
    size: int = 224,
):
    """The images on which explanations are judged: (rows, left out).

    Walks through a seeded permutation of the table until n images are found (0 = all). Each gets the columns target
    (the predicted class) and p_image (its probability); where the data has twins (the same image without its lesion)
    also p_twin, and only images whose lesion the network really uses count: p_image - p_twin > 0.5. Images without a
    twin in such a data set, which show nothing to find, are passed over uncounted. Where the table has a column known
    (`class_indices`) and boxes, images whose known class is another than the predicted one do not count either: a map
    of another class need not lie in the box. left out: a table of id, file and reason, those of the files that cannot
    be read among them (with strict they raise); see `report_left_out`.
    """
    import pandas as pd

    twins = bool((frame["twin"] != "").any())
    frame = subset(frame[frame["twin"] != ""] if twins else frame, 0, seed)
    boxed = "known" in frame and not twins and bool((frame["truth"] == "boxes").any())
    kept, left_out, found = [frame.iloc[:0].assign(target=0, p_image=0.0)], [], 0
    for begin in range(0, len(frame), batch_size):
        part, bad = split_readable(frame.iloc[begin : begin + batch_size], strict)
        left_out += bad
        if part.empty:
            continue
        p, target = probabilities(model, load_batch(part, size=size), batch_size, precision).max(1)
        _check_probabilities(p)
        part, uses = part.assign(target=target.cpu().numpy(), p_image=p.cpu().numpy()), np.ones(len(part), bool)
        if twins:
            without = probabilities(model, load_batch(part, "twin", size), batch_size, precision)
            _check_probabilities(without)
            part = part.assign(p_twin=without.gather(1, target[:, None])[:, 0].cpu().numpy())
            uses = (part.p_image - part.p_twin > 0.5).to_numpy()
        elif boxed:
            uses = ((part["known"] == part["target"]) | (part["known"] < 0)).to_numpy()
        wanted = n - found if n else len(part)
        stop = int(np.flatnonzero(uses)[wanted - 1]) + 1 if uses.sum() >= wanted else len(part)
        kept.append(part.iloc[:stop][uses[:stop]])
        unused = part.iloc[:stop][~uses[:stop]]
        left_out += unused[["id", "file"]].assign(reason=UNUSED if twins else MISTAKEN).to_dict("records")
        found += int(uses[:stop].sum())
        if n and found >= n:
            break
    rows = pd.concat(kept[1:] or kept).reset_index(drop=True)
    return rows, pd.DataFrame(left_out, columns=["id", "file", "reason"])


def pixel_rank(maps: Tensor, ids: Sequence[str], seed: int = 0) -> Tensor:
    """The place of every pixel by descending attribution, 0 = highest: (B, H, W) -> (B, H, W) int32. Ties are broken by
    one seeded permutation per image, the same for every method, so a flat region is visited in random order and not
    from its upper left corner. Raises ValueError for NaN.
    """
    flat = maps.flatten(1)
    if len(ids) != len(flat):
        raise ValueError(f"ids has {len(ids)} entries for {len(flat)} maps: give one id for each image.")
    if bool(flat.isnan().any()):
        raise ValueError("maps contain NaN, which has no place in an order.")
    shuffle = np.stack([_generator(seed, i, 2).permutation(flat.shape[1]) for i in ids])
    shuffle = torch.from_numpy(shuffle).to(maps.device)
    order = shuffle.gather(1, torch.argsort(flat.gather(1, shuffle), dim=1, descending=True, stable=True))
    places = torch.arange(flat.shape[1], dtype=torch.int32, device=maps.device).expand(len(flat), -1)
    return torch.empty_like(places).scatter_(1, order, places).view(maps.shape)


def block_rank(maps: Tensor, ids: Sequence[str], seed: int = 0, block: int = 16) -> Tensor:
    """The place of every pixel's block by descending mean attribution, 0 = highest: (B, H, W) -> (B, H, W) int32. The
    blocks are block x block pixels; those at the right and lower border may be smaller. A gain that pixels show and
    blocks do not is fragmentation of the image. Ties as in `pixel_rank`.
    """
    means = F.avg_pool2d(maps[:, None].double(), block, ceil_mode=True, count_include_pad=False)[:, 0].float()
    ranks = pixel_rank(means, ids, seed).repeat_interleave(block, 1).repeat_interleave(block, 2)
    return ranks[:, : maps.shape[1], : maps.shape[2]]


def tie_fraction(maps: Tensor) -> np.ndarray:
    """The share of pixels whose value another pixel of the same map has too: (B, H, W) -> (B,)."""
    counts = [np.unique(m.cpu().numpy(), return_counts=True)[1] for m in maps]
    return np.array([c[c > 1].sum() / c.sum() for c in counts])


def perturbation_curves(
    model: nn.Module,
    start: Tensor,
    end: Tensor,
    ranks: Tensor,
    target: Tensor,
    steps: int = 28,
    batch_size: int = 8,
    precision: str = "float32",
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Target probability while pixels of `start` are replaced by those of `end`, lowest rank first: (N, M, steps + 1).

    start, end: (N, C, H, W); ranks: (N, M, H, W), M orders for each image as `pixel_rank` or `block_rank` give them, G
    different places; target: (N,). Point s of a curve has the first floor(s*G/steps) places replaced, all channels
    together, so the first point is `start`, the last is `end`, groups differ by at most one place and none is dropped.
    Deletion: start = image, end = baseline. Insertion: start = baseline, end = image (Petsiuk et al., BMVC 2018,
    Algorithm 1).

    Every distinct picture is evaluated once: orders that agree, the ends, also where they are another image's ends, and
    points between which only pixels were replaced that are the same in start and end (with a twin as baseline, most of
    the image). Pictures are made on the device, batch_size at a time. progress(n) is called when n more points are
    known. Raises ValueError for steps outside 1 to G.
    """
    n, m = ranks.shape[:2]
    places = int(ranks.max()) + 1
    if not 1 <= steps <= places:
        raise ValueError(f"steps={steps} must lie between 1 and the number of places in the order, {places}.")
    device = next(model.parameters(), start).device
    start, end, ranks, target = (t.to(device) for t in (start, end, ranks, target))
    cuts = torch.arange(steps + 1, device=device) * places // steps
    replaced_at = torch.bucketize(ranks, cuts.int(), right=True, out_int32=True)  # the point from which on a pixel is
    differs = (start != end).any(1).flatten(1)[:, None].expand(n, m, -1)
    changed = torch.zeros(n, m, steps + 1, dtype=torch.long, device=device)
    changed = changed.scatter_add_(2, replaced_at.flatten(2).long(), differs.long()).cumsum(2).cpu().numpy()
    first: dict[tuple[int, bytes], int] = {}
    same = [[first.setdefault((i, hashlib.sha256(r.tobytes()).digest()), k) for k, r in enumerate(row)]
            for i, row in enumerate(replaced_at.cpu().numpy())]  # fmt: skip
    still: dict[tuple[int, bytes], int] = {}  # the ends, numbered by what they show and which class is asked for
    first_end, last_end = (
        np.array([still.setdefault((int(c), hashlib.sha256(e.numpy().tobytes()).digest()), -1 - len(still))
                  for c, e in zip(target.cpu(), ends.cpu(), strict=True)])[:, None, None]
        for ends in (start, end)
    )  # fmt: skip
    untouched, done = changed == 0, changed == changed[..., -1:]
    image = np.where(untouched, first_end, np.where(done, last_end, np.arange(n)[:, None, None]))
    order, count = (np.where(untouched | done, -1, v) for v in (np.array(same)[..., None], changed))
    pictures = np.stack(np.broadcast_arrays(image, order, count), -1).reshape(-1, 3)
    _, jobs, inverse = np.unique(pictures, axis=0, return_index=True, return_inverse=True)
    if progress:
        progress(len(pictures) - len(jobs))
    values = []
    jobs = torch.from_numpy(np.stack(np.unravel_index(jobs, (n, m, steps + 1)))).to(device)  # all at once: no waiting
    for i, k, s in (part.unbind() for part in jobs.split(batch_size, dim=1)):
        mixed = torch.where((replaced_at[i, k] <= s.view(-1, 1, 1))[:, None], end[i], start[i])
        p = probabilities(model, mixed, batch_size, precision)
        values.append(p.gather(1, target[i][:, None])[:, 0])
        if progress:
            progress(len(i))
    found = torch.cat(values).cpu()
    _check_probabilities(found)
    return found[torch.from_numpy(inverse.reshape(n, m, steps + 1))]


def auc(curves: Tensor | np.ndarray) -> np.ndarray:
    """Normalised trapezoid along the last axis: (sum - first/2 - last/2) / (n - 1). For probabilities, in [0, 1].
    Raises ValueError for fewer than two points.
    """
    c = np.asarray(curves, dtype=np.float64)
    if c.ndim < 1 or c.shape[-1] < 2:
        raise ValueError(f"curves must have at least two points along their last axis; got shape {c.shape}.")
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

    "rise": the blurred image, mean grey (zero after normalisation). "zero": mean grey, mean grey. "black": black,
    black. "twin": the same image without its lesion, both.
    """
    if name == "rise":
        return blur(x), torch.zeros_like(x)
    if name == "zero":
        return torch.zeros_like(x), torch.zeros_like(x)
    if name == "black":
        black = (-torch.tensor(MEAN) / torch.tensor(STD)).to(x).view(1, 3, 1, 1).expand_as(x)
        return black, black
    if name == "twin" and twin is not None:
        return twin, twin
    raise ValueError(f"baseline={name!r} must be 'rise', 'zero', 'black', or, where the data has twins, 'twin'.")


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
    batch_size: int = 8,
    precision: str = "float32",
    progress: Callable[[int], object] | None = None,
    block: int = 0,
) -> dict[str, dict[str, Tensor]]:
    """Insertion and deletion curves of every method: {"insertion": {method: (B, steps + 1)}, "deletion": {...}}.

    maps: name -> (B, H, W). start is where insertion starts and end where deletion ends, as `baselines` returns them.
    The score is the softmax probability of target: (B,). block: pixel by pixel (0), or in blocks of block x block.
    """
    rank = [block_rank(m, ids, seed, block) if block else pixel_rank(m, ids, seed) for m in maps.values()]
    begins, ends, ranks = torch.cat([start, x]), torch.cat([x, end]), torch.stack(rank, 1).repeat(2, 1, 1, 1)
    curves = perturbation_curves(
        model, begins, ends, ranks, target.repeat(2), steps, batch_size, precision, progress
    )  # both in one call, so that what they share, the image itself, is evaluated once
    halves = zip(("insertion", "deletion"), curves.split(len(x)), strict=True)
    return {metric: dict(zip(maps, half.unbind(1), strict=True)) for metric, half in halves}


def confidence_change(
    model: nn.Module,
    x: Tensor,
    maps: Tensor,
    target: int | Sequence[int] | Tensor,
    clean: Tensor | np.ndarray,
    batch_size: int = 8,
    precision: str = "float32",
) -> dict[str, np.ndarray]:
    """What becomes of the target's probability when only what a map shows is left of the image: each (B,), in [0, 1].

    x: (B, C, H, W), preprocessed. maps: (B, H, W) in [0, 1], of one method. target: as in `capture`. clean: (B,), the
    target's probability Y on x itself. With O its probability on x * map (where the map is 0, the image is mean grey):

        drop = max(0, Y - O) / Y        increase = 1 if O > Y else 0        gain = max(0, O - Y) / (1 - Y)

    Drop and increase: Chattopadhyay et al., WACV 2018 (average drop, increase in confidence). Gain: Zhang et al.,
    Opti-CAM, CVIU 2024 (average gain). A difference within ROUNDING, or one on an image that its map leaves as it is,
    counts as none, so a map of ones has no increase in any precision; 0 / 0 (Y = 0 or Y = 1) is 0. Raises ValueError
    for maps outside [0, 1] or of another size than x, and for a clean that is not one probability per image.
    """
    _check_unit(maps, (len(x), *x.shape[2:]))
    before = torch.as_tensor(clean).double().cpu().numpy()
    if before.shape != (len(x),) or not (before.min() >= 0 and before.max() <= 1):
        raise ValueError(f"clean must be {len(x)} probabilities in [0, 1], one per image; got shape {before.shape}.")
    shown = x * maps[:, None].to(x)
    p = probabilities(model, shown, batch_size, precision)
    _check_probabilities(p)
    change = p.gather(1, _targets(target, p)[:, None])[:, 0].double().cpu().numpy() - before
    change[(np.abs(change) <= ROUNDING) | (shown == x).flatten(1).all(1).cpu().numpy()] = 0
    drop, gain = np.zeros_like(change), np.zeros_like(change)
    np.divide(-change, before, out=drop, where=change < 0)
    np.divide(change, 1 - before, out=gain, where=(change > 0) & (before < 1))
    return {"drop": drop, "increase": (change > 0).astype(float), "gain": gain}


def _check_unit(maps: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(maps.shape) != tuple(shape) or not (maps.min() >= 0 and maps.max() <= 1):  # NaN >= 0 is false
        raise ValueError(
            f"maps must have shape {tuple(shape)} and lie in [0, 1]; got {tuple(maps.shape)}, "
            f"{float(maps.min())} to {float(maps.max())}."
        )


def rise(
    model: nn.Module,
    x: Tensor,
    target: int | Sequence[int] | Tensor,
    ids: Sequence[str],
    masks: int = 2000,
    cells: int = 7,
    keep: float = 0.5,
    seed: int = 0,
    batch_size: int = 8,
    precision: str = "float32",
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """sum_n p(x * M_n) M_n / (masks * keep), then normalised: (B, H, W) in [0, 1]; p is the target's probability.

    Petsiuk et al., BMVC 2018, sections 3.1 and 3.2: each M_n is a grid of cells x cells ones (with probability keep)
    and zeros, enlarged bilinearly to (cells + 1) times a cell's size and cut to H x W at a random shift of up to one
    cell. A cell's size is rounded up where cells does not divide H or W, so that every shift fits. Every image has
    masks of its own, which depend on (seed, id) alone: drawing them costs little beside the passes (`masks` for each
    image), and images then err independently, as paired statistics assume. target: as in `capture`. progress(n) is
    called after every n passes. The map is a mean over masks: its minimum lies far above 0, so its order says more than
    its values. Raises ValueError for masks or cells below 1, keep outside (0, 1], and ids that do not fit.
    """
    if masks < 1 or cells < 1 or not 0 < keep <= 1 or len(ids) != len(x):
        raise ValueError(
            f"masks={masks} and cells={cells} must be at least 1, keep={keep} lie in (0, 1], and ids name every image; "
            f"got {len(ids)} ids for {len(x)} images."
        )
    device, size = next(model.parameters(), x).device, tuple(x.shape[2:])
    maps, target = torch.zeros(len(x), *size, device=device), torch.as_tensor(target).expand(len(x)).tolist()
    for i, image in enumerate(x.to(device)):
        draw = _generator(seed, ids[i], 3)
        grids = torch.from_numpy((draw.random((masks, cells, cells)) < keep).astype(np.float32)).to(device)
        shifts = draw.integers(0, [math.ceil(side / cells) + 1 for side in size], (masks, 2)).tolist()
        for begin in range(0, masks, batch_size):
            part = _rise_masks(grids[begin : begin + batch_size], shifts[begin : begin + batch_size], size)
            p = probabilities(model, image * part[:, None], batch_size, precision)
            maps[i] += (p.gather(1, _targets(target[i], p)[:, None])[..., None] * part).sum(0)
            if progress:
                progress(len(part))
    return normalise(maps / (masks * keep))


def _rise_masks(grids: Tensor, shifts: Sequence[Sequence[int]], size: tuple[int, int]) -> Tensor:
    """Grids (N, cells, cells), enlarged and cut at their shifts: (N, H, W)."""
    (height, width), cells = size, grids.shape[1]
    wide = [(cells + 1) * math.ceil(side / cells) for side in size]
    large = F.interpolate(grids[:, None], size=wide, mode="bilinear", align_corners=False)[:, 0]
    return torch.stack([m[y : y + height, x : x + width] for m, (y, x) in zip(large, shifts, strict=True)])


# ------------------------------------------------------------------------------------------------------- 8 localisation


def _check_masks(maps: Tensor, masks: Tensor) -> None:
    normalise(maps)  # refuses NaN, infinity and negative values: they would rank or sum to a number that means nothing
    if not isinstance(masks, Tensor) or maps.shape != masks.shape or masks.dtype != torch.bool:
        got = f"{masks.dtype} {tuple(masks.shape)}" if isinstance(masks, Tensor) else type(masks).__name__
        raise ValueError(f"masks must be boolean and of the maps' shape {tuple(maps.shape)}; got {got}.")
    if not bool(masks.flatten(1).any(1).all()):
        raise ValueError(
            "masks: at least one mask is empty; an image without an object cannot be localised. Leave it out."
        )


def pointing_game(maps: Tensor, masks: Tensor, tolerance: int = 0) -> np.ndarray:
    """1 where the map's maximum lies in the mask, or at most `tolerance` pixels from it, else 0: (B, H, W) twice ->
    (B,).

    Zhang et al., ECCV 2016 (their tolerance: 15 px), who say nothing of a maximum that several pixels share (a coarse
    map whose peak is at the border has one: enlarged, it is flat there). Here it counts as the share of these pixels
    that hit, which is the expected hit when one of them is drawn. Taking the first prefers the upper left; a hit if any
    is in the mask lets a constant map always hit; only if all are punishes coarse maps. So a constant map gets the
    mask's share of the image, which is chance, and a map that is zero everywhere points nowhere: 0. Raises ValueError
    for an empty mask, and for maps that are not finite, negative somewhere, or of another size than the masks.
    """
    from scipy.ndimage import distance_transform_edt

    _check_masks(maps, masks)
    hits = []
    for m, mask in zip(maps.cpu().numpy(), masks.cpu().numpy(), strict=True):
        near = distance_transform_edt(~mask) <= tolerance
        hits.append(float(near[m == m.max()].mean()) if m.max() > 0 else 0.0)
    return np.array(hits)


def energy_in_mask(maps: Tensor, masks: Tensor) -> np.ndarray:
    """sum(map * mask) / sum(map), in [0, 1]; zero for a map that is zero everywhere. Wang et al., CVPR-W 2020, section
    4.4. Raises ValueError as `pointing_game` does.
    """
    _check_masks(maps, masks)
    maps = maps.double()
    total, inside = maps.sum((1, 2)), (maps * masks.to(maps.device)).sum((1, 2))
    return torch.where(total > 0, inside / total.clamp_min(1e-300), 0.0).cpu().numpy()


def average_precision(maps: Tensor, masks: Tensor) -> np.ndarray:
    """Area under precision and recall of the pixels, ranked by attribution, without a threshold: (B,) in (0, 1]. From
    scikit-learn. Of equal values all count at once, so a constant map, zero included, gets the mask's share of the
    image. Raises ValueError as `pointing_game` does.
    """
    from sklearn.metrics import average_precision_score

    _check_masks(maps, masks)
    pairs = zip(masks.flatten(1).cpu().numpy(), maps.flatten(1).cpu().numpy(), strict=True)
    return np.array([average_precision_score(mask, m) for mask, m in pairs])


def iou(maps: Tensor, masks: Tensor, threshold: float) -> np.ndarray:
    """|R and mask| / |R or mask|, R = the pixels where map / max(map) >= threshold: (B, H, W) twice -> (B,) in [0, 1].

    A map that is zero everywhere has an empty R: 0. Raises ValueError for a threshold outside (0, 1], and as
    `pointing_game` does.
    """
    _check_masks(maps, masks)
    region, masks = _above(maps, threshold), masks.to(maps.device)
    return ((region & masks).sum((1, 2)) / (region | masks).sum((1, 2)).double()).cpu().numpy()


def _above(maps: Tensor, threshold: float) -> Tensor:
    if not isinstance(threshold, Real) or not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold!r} must lie in (0, 1]: it is compared with map / max(map).")
    return normalise(maps) >= threshold


THRESHOLDS = tuple(k / 20 for k in range(1, 20))  # 0.05, 0.10, ..., 0.95


def best_threshold(maps: Tensor, masks: Tensor, candidates: Sequence[float] = THRESHOLDS) -> float:
    """The candidate with the highest mean `iou`, to be chosen on validation images; of equal ones the first."""
    return float(candidates[int(np.argmax([iou(maps, masks, t).mean() for t in candidates]))])


def box_iou(maps: Tensor, boxes: Sequence[Sequence[Sequence[float]]], threshold: float) -> np.ndarray:
    """IoU of the box around the largest region where map / max(map) >= threshold with the best of the image's boxes:
    (B,).

    boxes: for each image a list of [x0, y0, x1, y1] in pixels, x1 and y1 exclusive, as in the manifest of notebook 01.
    Regions are connected over edges and corners; of equally large ones the first in reading order counts. A map that is
    zero everywhere has none: 0. BoxAcc is the share of images with box_iou >= 0.5 (Choe et al., CVPR 2020, section 4;
    their MaxBoxAcc takes the best threshold, here the threshold is given). Raises ValueError for an image without a
    box, boxes that are empty or reach beyond the map, a threshold outside (0, 1], and maps as in `pointing_game`.
    """
    import cv2

    regions = _above(maps, threshold).cpu().numpy().astype(np.uint8)
    height, width = regions.shape[1:]
    if len(boxes) != len(maps):
        raise ValueError(f"boxes has {len(boxes)} entries for {len(maps)} maps: give a list of boxes for each image.")
    found = []
    for region, own in zip(regions, boxes, strict=True):
        b = np.asarray(own, dtype=float).reshape(-1, 4).T
        inside = (b[:2] >= 0).all() and (b[:2] < b[2:]).all() and (b[2] <= width).all() and (b[3] <= height).all()
        if not b.size or not inside:
            raise ValueError(f"boxes={own} must be [x0, y0, x1, y1] with x0 < x1 <= {width} and y0 < y1 <= {height}.")
        count, labels, stats, _ = cv2.connectedComponentsWithStats(region, connectivity=8)
        sizes = stats[1:, cv2.CC_STAT_AREA]
        if count == 1:
            found.append(0.0)
            continue
        largest = min(1 + np.flatnonzero(sizes == sizes.max()), key=lambda k: np.argmax(labels == k))
        x0, y0, w, h = stats[largest, :4]
        overlap = np.minimum(b[2], x0 + w) - np.maximum(b[0], x0), np.minimum(b[3], y0 + h) - np.maximum(b[1], y0)
        both = overlap[0].clip(0) * overlap[1].clip(0)
        found.append(float((both / (w * h + (b[2] - b[0]) * (b[3] - b[1]) - both)).max()))
    return np.array(found)


# ------------------------------------------------------------------------------------------------------------- 9 sanity


def similarity(a: Tensor, b: Tensor) -> dict[str, np.ndarray]:
    """How alike two maps of the same image are, (B, H, W) in [0, 1] twice: three arrays (B,).

    "spearman": the rank correlation over pixels, in [-1, 1]; 0 where either map is constant. "constant": whether either
    is, to be counted. "ssim": Wang et al., IEEE TIP 2004, data_range = 1 and 7 x 7 windows, from scikit-image; two
    constant maps of one value have 1. Both measures as Adebayo et al., NeurIPS 2018, use them. Raises ValueError for
    maps of different shapes, outside [0, 1] or smaller than 7 x 7.
    """
    from scipy.stats import spearmanr
    from skimage.metrics import structural_similarity

    _check_unit(a, tuple(a.shape))
    _check_unit(b, tuple(a.shape))
    pairs = list(zip(a.double().cpu().numpy(), b.double().cpu().numpy(), strict=True))
    constant = np.array([np.ptp(p) == 0 or np.ptp(q) == 0 for p, q in pairs])
    rank = [0.0 if c else spearmanr(p, q, axis=None).statistic for (p, q), c in zip(pairs, constant, strict=True)]
    ssim = [structural_similarity(p, q, data_range=1) for p, q in pairs]
    return {"spearman": np.array(rank), "ssim": np.array(ssim), "constant": constant}


def randomise_cascade(model: nn.Module, seed: int = 0) -> Iterator[tuple[str, nn.Module]]:
    """The network, more and more of it re-initialised from the classifier downward: (stage, copy of the model), in
    turn.

    Each copy has the named stage and all behind it re-initialised, the last one everything (Adebayo et al., NeurIPS
    2018, cascading randomisation). A stage is a submodule with weights; plain `nn.Sequential` and lists are opened, and
    one with vectors only (batch norm) belongs to the stage in front of it. For ResNet-18: fc, layer4.1, layer4.0, ...,
    layer1.0, conv1, which are ten. Order is that of definition, which in torchvision's classifiers is that of
    execution. Every layer gets PyTorch's own default initialisation (its `reset_parameters`; batch norm also forgets
    its running statistics), not the scheme its architecture was trained from, with a seed made of `seed` and its name;
    a bare parameter without such a method (a class token) is drawn with standard deviation 0.02. The caller's model,
    its random state, frozen parameters, modes and memory format stay as they are.
    """
    device = next(model.parameters()).device
    work = copy.deepcopy(_unwrap(model)).cpu()  # drawn on the CPU, so every device gets the same values
    stages: list[tuple[str, list]] = []
    for name, unit in _units(work):
        layers = [(f"{name}.{inner}".rstrip("."), layer) for inner, layer in unit.named_modules()]
        if stages and not any(p.ndim > 1 for p in unit.parameters()):
            stages[-1][1].extend(layers)
        else:
            stages.append((name, layers))
    stages[0][1].append(("", work))  # parameters that the network itself holds
    for stage, layers in reversed(stages):
        for name, layer in layers:
            _reinitialise(layer, int(_generator(seed, name, 4).integers(2**62)))
        yield stage, copy.deepcopy(work).to(device)


def _units(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if type(child) in (nn.Sequential, nn.ModuleList, nn.ModuleDict):
            yield from _units(child, f"{prefix}{name}.")
        elif any(True for _ in [*child.parameters(), *child.buffers()]):
            yield f"{prefix}{name}", child


def _reinitialise(layer: nn.Module, seed: int) -> None:
    """New values for what this one module holds, and not for what its children hold."""
    parameters = list(layer.parameters(recurse=False))
    if not parameters and not any(True for _ in layer.buffers(recurse=False)):
        return
    reset = getattr(layer, "reset_parameters", getattr(layer, "_reset_parameters", None))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        if reset:
            reset()
        else:
            for p in parameters:
                p.normal_(std=0.02)


# -------------------------------------------------------------------------------------------------------- 10 statistics

LOWER_IS_BETTER = {"deletion", "deletion_blocks", "deletion_fine", "drop", "class_spearman", "class_ssim"}
ROUNDING = 1e-6  # what float32 arithmetic in another order may change; a difference below it is none


def compare(metrics, reference: str = "grad_cam", seed: int = 0, resamples: int = 10_000):
    """Every method against the reference, paired by image: one row per metric, baseline and method.

    metrics: a table with columns image, method, metric, baseline, value. Returns n, mean, reference_mean, difference
    (mean of value minus the reference's), low and high (95 % BCa bootstrap interval of it), p (sign-flip permutation
    test of the mean; exact McNemar for values that are all 0 or 1), effect (mean over standard deviation of the
    differences), won (share of images strictly better; deletion: lower is better) and identical (every difference is
    zero: nothing to test, p and interval are empty). Efron 1987 for BCa; SciPy computes it. Interval, p, effect and won
    are those of the differences cut to whole multiples of ROUNDING, so that rounding errors break no ties. Raises
    ValueError when the reference is missing or an image lacks a method.
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
            d, n = np.trunc((value - base) / ROUNDING), len(wide)  # whole numbers: their sums tie alike on any machine
            row = dict(
                metric=metric,
                baseline=baseline,
                method=method,
                n=n,
                mean=value.mean(),
                reference_mean=base.mean(),
                difference=(value - base).mean(),
            )
            same = not d.any()
            row.update(low=np.nan, high=np.nan, p=np.nan, effect=np.nan, identical=same, reference=reference)
            row["won"] = float(((-d if metric in LOWER_IS_BETTER else d) > 0).mean())
            if not same and n > 1:
                spread = d.std(ddof=1) if np.ptp(d) > 1 else 0.0
                row["effect"] = d.mean() / spread if spread > 0 else np.nan
                if spread > 0:
                    interval = bootstrap(
                        (d,), np.mean, n_resamples=resamples, method="BCa", rng=np.random.default_rng(seed)
                    ).confidence_interval
                    row.update(low=interval.low * ROUNDING, high=interval.high * ROUNDING)
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


def judgement(row: Mapping, p_column: str = "p") -> str:
    """ "better", "worse", "no difference" or "identical": what a row of `compare` allows to say of its method against
    its reference. "better" and "worse" need an interval without zero and p < 0.05.
    """
    if row["identical"]:
        return "identical"
    if not (row["low"] > 0 or row["high"] < 0) or not row[p_column] < 0.05:
        return "no difference"
    return "better" if (row["difference"] > 0) != (row["metric"] in LOWER_IS_BETTER) else "worse"


def verdict(row: Mapping, p_column: str = "p") -> str:
    """One sentence on a row of `compare`, as `judgement` allows."""
    name, reference, metric = label(row["method"]), label(row["reference"]), str(row["metric"]).replace("_", " ")
    word, numbers = judgement(row, p_column), f"{row['difference']:+.4f}, no interval"
    if not np.isnan(row["low"]):
        low, high = f"{row['low']:+.4f}", f"{row['high']:+.4f}"
        numbers = f"{row['difference']:+.4f} [{low}, {high}], p = {row[p_column]:.2g}"
    if word == "identical":
        return f"{name}: {metric} identical to {reference} on all {row['n']} images."
    if word == "no difference":
        return f"{name}: {metric}, no difference to {reference} shown at n = {row['n']} ({numbers})."
    return f"{name}: {metric} {word} than {reference} ({numbers}, n = {row['n']})."


# -------------------------------------------------------------------------------------------------- 11 runs and figures

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
    plt.style.use(HOME / "cam_core.mplstyle")
    return out


def save_figure(fig, path: str | Path) -> None:
    """Write the figure as PNG and, beside it, as PDF (the run's id in the metadata, no date, so equal runs give equal
    bytes), show it in a notebook, close it.
    """
    import matplotlib.pyplot as plt

    fig.savefig(path, metadata={"Software": None, "Run": RUN_ID})
    fig.savefig(Path(path).with_suffix(".pdf"), metadata={"CreationDate": None, "Keywords": RUN_ID})
    fig.set_layout_engine("none")  # the layout is settled; the inline picture need not compute it again
    if "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None:
        sys.modules["IPython"].display.display(fig)
    plt.close(fig)


def save_table(frame, path: str | Path, caption: str = "") -> None:
    """Write the table as CSV with the run's id as its last column, floats with nine significant digits; with a caption
    also as LaTeX (booktabs) beside it, floats with four decimals.
    """
    frame.assign(run=RUN_ID).to_csv(path, index=False, float_format="%.9g", lineterminator="\n")
    if caption:
        style = frame.style.hide(axis="index").format(precision=4, na_rep="--", escape="latex")
        caption = re.sub(r"(?<!\\)([%&#_])", r"\\\1", caption)
        text = style.format_index(escape="latex", axis=1).to_latex(
            hrules=True, caption=caption, position="htbp", label=f"tab:{Path(path).stem}"
        )
        Path(path).with_suffix(".tex").write_text(f"% run {RUN_ID}, for the booktabs package\n{text}", "utf-8")


UNUSED, MISTAKEN = "the network does not use its lesion", "the network sees another class in it"


def report_left_out(left_out, out: Path, notebook: str) -> None:
    """Say how many images were left out and why; write those whose files cannot be read to tables/NN_skipped.csv, which
    the runner repeats at the end of the run.
    """
    broken = left_out[~left_out["reason"].isin([UNUSED, MISTAKEN])]
    for reason, count in left_out["reason"].drop(broken.index).value_counts().items():
        print(f"{count} left out because {reason}")
    if len(broken):
        save_table(broken, Path(out) / "tables" / f"{notebook}_skipped.csv")
        print(f"{len(broken)} left out because a file cannot be read:", *broken["reason"].head(5), sep="\n  ")


def save_json(content: Mapping, path: str | Path) -> None:
    """Write a small JSON file with sorted keys and the run's id."""
    Path(path).write_text(
        json.dumps({**content, "run": RUN_ID}, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def code_hash(*functions: Callable) -> str:
    """SHA-256 of the functions' code and of all that it reaches: functions and plain values of this module,
    `cam_inputs`, the notebook, and the modules of registered CAMs and fusions; docstrings and comments aside. It tells
    whether finished work is still what today's code would make. Not followed: functools.partial, callable objects, and
    what lists or dicts hold beyond functions; delete data/cache after changing such.
    """
    registered = [*functions, *CAMS.values(), *FUSIONS.values()]
    modules = {__name__, "cam_inputs", "__main__", *(getattr(f, "__module__", "") for f in registered)}
    parts: dict[str, str] = {}
    todo: list = list(functions)
    while todo:
        item = todo.pop()
        code, place = getattr(item, "__code__", None), f"{getattr(item, '__module__', '')}.{id(item)}"
        if getattr(item, "__module__", "") not in modules or place in parts or not hasattr(item, "__qualname__"):
            continue
        parts[place] = text = textwrap.dedent(inspect.getsource(item))
        try:
            tree = ast.parse(text)
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
                    node.body = node.body[1:]
            parts[place] = ast.dump(tree)
        except SyntaxError:  # a lambda inside an expression has no source of its own: its text has to do
            pass
        inner = [code] if code else []
        names = set()
        while inner:
            names |= set(inner[-1].co_names)
            inner += [c for c in inner.pop().co_consts if isinstance(c, CodeType)]
        known = {**globals(), **getattr(item, "__globals__", {})}
        found = {n: known[n] for n in sorted(names) if n in known}
        found |= {f"cell {k}": c.cell_contents for k, c in enumerate(getattr(item, "__closure__", None) or ())}
        for name, value in found.items():
            if isinstance(value, Mapping):
                todo += value.values()
                value = tuple((str(k), getattr(v, "__qualname__", type(v).__name__)) for k, v in value.items())
            if isinstance(value, str | Real | tuple):
                parts[f"{place} {name}"] = f"{name} = {value!r}"
            todo.append(value)
    return hashlib.sha256("\n".join(sorted(parts.values())).encode()).hexdigest()


@functools.cache
def _clear_leftovers(folder: Path) -> None:
    """Once a process: remove the parts of files that killed runs left in a cache an hour or more ago. Writing one takes
    milliseconds, so no other run, here or on another machine, is still at it.
    """
    for part in folder.glob("*.part"):
        with suppress(FileNotFoundError):  # another run may clear them away as well
            if time.time() - part.lstat().st_mtime > 3600:
                part.unlink()


def numerics(device: str | torch.device = "cpu") -> dict:
    """What the last bits of a result depend on beside code, data and the shape of a batch: versions, threads, device,
    instructions of the CPU, and torch's determinism and TF32 flags. Part of cache keys and of the manifest, and what
    the workers of a cluster must share.
    """
    place = torch.device(device)
    return {
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else place.type,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "tf32": [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32],
    }


def dataset_hash(frame) -> str:
    """SHA-256 of a data set's table: of ids, splits, labels, boxes and the bytes of images, twins, masks and hulls."""
    columns = [c for c in ("id", "split", "label", "class", "boxes", "file", "twin", "mask", "hull") if c in frame]
    digest = hashlib.sha256()
    for row in frame[columns].sort_values("id", kind="stable").astype(str).to_dict("records"):
        row |= {c: sha256(row[c]) for c in ("file", "twin", "mask", "hull") if row.get(c)}
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()


def save_resolved(out: str | Path, info: Mapping, device: str | torch.device, **chosen) -> None:
    """What this run's parameters came to, as resolved.json, which the runner moves into the manifest."""
    network = {"arch": info["arch"], "weights": info["weights"], "weights_sha256": info["sha256"]}
    save_json({**network, **chosen, **numerics(device), "device": str(device)}, Path(out) / "resolved.json")


def cache_file(folder: str | Path, key: Mapping) -> Path:
    """Where `cached` keeps what belongs to `key`."""
    text = json.dumps(key, sort_keys=True, default=os.fspath)
    return Path(folder) / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def cached(folder: str | Path, key: Mapping, make: Callable[[], list[dict]]) -> list[dict]:
    """What make() returns, a list of plain records, computed once: kept in `folder` under the hash of `key`, which must
    hold all that determines it. Written in one step, so a run that is stopped loses only the part it was at.
    """
    text, file = json.dumps(key, sort_keys=True, default=os.fspath), cache_file(folder, key)
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(file.parent)
        fresh = file.with_suffix(f".{os.getpid()}.part")
        try:
            fresh.write_text(json.dumps({"key": json.loads(text), "records": make()}), "utf-8")
            os.replace(fresh, file)
        finally:
            fresh.unlink(missing_ok=True)
    return json.loads(file.read_text("utf-8"))["records"]


def panel(ax, image, cam=None, mask=None, title: str = "", opacity: float = 0.5) -> None:
    """One picture of a grid: the image, with a map laid over it and the contour of a mask (white on black) where they
    are given. A large image without a mask is shown with 800 pixels on its longer side.
    """
    import cv2

    pixels = np.asarray(image)
    if mask is None and max(pixels.shape[:2]) > 800:
        pixels = cv2.resize(
            pixels, None, fx=800 / max(pixels.shape[:2]), fy=800 / max(pixels.shape[:2]), interpolation=cv2.INTER_AREA
        )
    ax.imshow(pixels if cam is None else overlay(pixels, cam, opacity), cmap="gray" if pixels.ndim == 2 else None)
    if mask is not None:
        shape = np.asarray(mask).astype(np.uint8)
        for contour in cv2.findContours(shape, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)[0]:
            closed = np.vstack([contour[:, 0], contour[:1, 0]])
            ax.plot(*closed.T, color="black", linewidth=2.2)
            ax.plot(*closed.T, color="white", linewidth=1.0)
    ax.set_title(title)
    ax.set_axis_off()
