"""Grad-CAM, LayerCAM and their fusion for PyTorch image classifiers, and how such maps are judged.

One idea carries this module: a class activation map (CAM) is a pure function of activations and
gradients. `capture` is the only place that touches a network. Everything behind it is small batched
tensor code. Read it from top to bottom:

    1  capture        one forward and a partial backward pass -> logits, activations, gradients
    2  CAMs           grad_cam, layer_cam and relatives: (A, G) -> (B, h, w)
    3  pixel methods  gradients down to the image, for comparison
    4  fusion         normalise, enlarge, hybrid, fuse_layers
    5  layers         where a network can be asked: layer_shapes, stages, default_layers
    6  explain        one image in one call
    7  method_maps    every method of the study, and its controls, from one capture
    8  faithfulness   insertion and deletion, change of confidence, ROAD; RISE for comparison
    9  localisation   pointing game, energy, average precision, IoU of masks and boxes
    10 sanity         how alike maps are; a network randomised layer by layer
    11 choosing       what notebook 04 does: the search over layers, rules and weights
    12 study          what notebook 05 does: from a run to tables, in groups that are cached

What a study stands on lies in the rooms of `lab`: networks, datasets, drawing, training, figures,
settings, runs, statistics, and sentences about results. Notebooks reach them from here, as in
`cc.datasets.read`.

Notation: B images, C channels, h x w the size of a captured map, H x W the size of the input, K
classes. Maps are (B, height, width) float32 tensors, non-negative. "Normalised" means divided by
their maximum, so in [0, 1].
"""

from __future__ import annotations

import copy
import dataclasses
import dis
import functools
import json
import math
import operator
import re
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from numbers import Real
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from tqdm.auto import tqdm

from lab import HOME, RUN_ID, nearest, sha256, words
from lab import (
    datasets as datasets,  # the rooms below, which notebooks reach as cc.datasets and so on
)
from lab import drawing as drawing
from lab import figures as figures
from lab import heads as heads
from lab import ledger as ledger
from lab import networks as networks
from lab import runs as runs
from lab import sentences as sentences
from lab import settings as settings
from lab import statistics as statistics
from lab import training as training

# ---------------------------------------------------------------------------------------- 1 capture


# What is explained: a class, one for each image, a function of the network's output that gives one
# score per image, or the predicted class of each.
Target = int | Sequence[int] | Tensor | Callable[..., Tensor] | None


@dataclass(frozen=True)
class Capture:
    """What one forward and one partial backward pass leave behind. All tensors are detached; B is
    the batch size.

    logits: (B, K), what the network hands out, or None where a target function was given and the
    output holds no such thing. target: (B,) class indices, None for a target function.
    activations[layer], gradients[layer]: (B, C, h, w), in order of execution; gradients[layer][b] =
    d scores[b] / d activations[layer][b]. scores: (B,), what is explained. probabilities: (B,
    classes) as the network's head has them, or None where it has none.
    """

    logits: Tensor | None
    target: Tensor | None
    activations: dict[str, Tensor]
    gradients: dict[str, Tensor]
    scores: Tensor | None = None
    probabilities: Tensor | None = None


def capture(
    model: nn.Module,
    x: Tensor,
    layers: str | Sequence[str],
    target: Target = None,
    head: str | None = None,
) -> Capture:
    """Activations A_l and gradients G_l = d s / d A_l of a score s per image, for any number of
    layers, in one pass.

    model: a network whose output holds (B, K) logits, see `heads.logits_of`. x: (B, C, H, W), as
    the model expects it. layers: dotted module names (`"layer4"`, `"features.29"`), or one of them.
    target: a class index for all images, one per image, None for the predicted class of each, or a
    function of the network's output that returns one score per image, (B,). The score of a class is
    what the head makes of the output: its logit y_t; of one logit y for two classes y and -y; of
    probabilities (a softmax or sigmoid inside the network) their logarithm or log-odds. head: one
    of `heads.HEADS`, or None for the model's `output_head`, else what its output shows
    (`heads.found_head`).

    The model runs in eval mode with its parameters frozen; the output of the first captured layer
    becomes the leaf of the graph, so nothing in front of it is recorded, and every captured layer
    hands on a clone, so in-place operations behind it cannot alter what was captured. Afterwards,
    exceptions included, the model is as it was: hooks, modes, buffers, `requires_grad`, `.grad`.
    `DataParallel` and `torch.compile` wrappers are unwrapped with a warning. Works under
    `torch.no_grad` and `torch.inference_mode`. Outputs with channels last, (B, h, w, C) as in Swin,
    and tokens, (B, n, C) as in ViT, are handed back as (B, C, h, w) too; tokens in front of the
    patches (class, registers) are left out. Where the answer to an image depends on the others of
    its batch, as with batch norm without running statistics, each image goes alone, with a warning.

    Raises ValueError for an unknown layer (names the nearest and all there are), one that runs
    twice or never, one without a spatial output with h*w > 1, one that the score does not depend
    on, a target out of range, an output without logits or a score, an x that does not fit the
    model, and NaN or infinity in the logits, scores, activations or gradients.
    """
    model = _unwrap(model)
    names = _check_request(model, x, layers)
    if len(x) > 1 and not _independent(model, x):
        return _one_by_one(model, x, names, target, head)
    outputs: dict[str, Tensor] = {}
    passed: list[bool] = []
    with _borrowed(model, {name: _keep(name, x, outputs, passed) for name in names}):
        output = _forward(model, x.detach().clone())  # a copy: a first layer may work in place
        passed.append(True)
        logits, target, scores, head = _scored(model, output, x, target, head)
        # images do not mix, so one backward pass of the sum serves the whole batch
        gradients = _gradients(model, scores.sum(), names, outputs)
    _check_captured(model, x, logits, scores, outputs, gradients)
    last = _channels_last(model, x, outputs)
    probabilities = None
    if logits is not None:
        head = head or _head_of(model, logits, head)
        make = heads.HEADS[head].probabilities
        probabilities = make(logits.detach().float()) if make else None
        logits = logits.detach()
    return Capture(
        logits,
        target,
        {name: _maps(output.detach(), x, last.get(name)) for name, output in outputs.items()},
        {name: _maps(gradients[name].detach(), x, last.get(name)) for name in outputs},
        scores.detach(),
        probabilities,
    )


def _scored(
    model: nn.Module, output, x: Tensor, target: Target, head: str | None
) -> tuple[Tensor | None, Tensor | None, Tensor, str | None]:
    """(logits, class indices, scores, head) of a network's output; see `Capture`. The head as it
    was given where a target function makes the scores.
    """
    if callable(target):
        return _logits_if_any(output, x), None, _called(target, output, x), head
    logits = heads.logits_of(output, len(x))
    head = _head_of(model, logits, head)
    scores = heads.HEADS[head].scores(logits)
    chosen = _targets(target, scores, head)
    scores = scores.gather(1, chosen[:, None])[:, 0]
    least = torch.finfo(scores.dtype).tiny
    if head == "softmax_inside" and bool((scores.detach() > -least).any()):
        raise ValueError(
            "The target's probability is 1 and all others are 0 in this precision, so no gradient "
            "is left. Let the network return the logits in front of its softmax."
        )
    return logits, chosen, scores, head


def _head_of(model: nn.Module, logits: Tensor, head: str | None) -> str:
    head = head or heads.found_head(model, logits)[0]
    heads.check_head(head, logits.shape[1])
    return head


def _logits_if_any(output, x: Tensor) -> Tensor | None:
    """The (B, K) in an output, or None: a target function may read what has none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return heads.logits_of(output, len(x))
        except ValueError:
            return None


def _called(target: Callable, output, x: Tensor) -> Tensor:
    """What a target function makes of a network's output, to be differentiated: (B,) scores."""
    scores = _called_any(target, output, x)
    given = [t for _, t in heads.tensors_in(output) if t.requires_grad]
    if given and not scores.requires_grad:
        raise ValueError(
            "target: the function's scores have no gradient, as behind .detach(), torch.no_grad "
            "or a comparison. Use differentiable operations only."
        )
    _check_rows(scores, given)
    return scores


def _called_any(target: Callable, output, x: Tensor) -> Tensor:
    """What a target function makes of a network's output: (B,) scores."""
    try:
        scores = target(output)
    except Exception as error:  # the user's own code
        got = ", ".join(f"{name} {tuple(t.shape)}" for name, t in heads.tensors_in(output))
        raise ValueError(
            f"target: the function fails on this network's output ({type(error).__name__}: "
            f"{networks.shortened(error)}). The output is a {type(output).__name__}"
            f"{f': {got}' if got else ''}."
        ) from error
    right = isinstance(scores, Tensor) and scores.is_floating_point()
    if right and scores.shape == (len(x), 1):
        scores = scores[:, 0]
    if not right or scores.shape != (len(x),):
        got = type(scores).__name__
        if isinstance(scores, Tensor):
            got = f"{scores.dtype} {tuple(scores.shape)}"
        raise ValueError(
            f"target: the function must return one score per image, floats of shape ({len(x)},); "
            f"it returned {got}. Such as `lambda output: output[:, 3]`."
        )
    return scores


def _check_rows(scores: Tensor, given: Sequence[Tensor]) -> None:
    """Refuse a target function's scores that mix the images of a batch; given: the tensors that it
    was given.
    """
    rows = [t for t in given if t.ndim and len(t) == len(scores)]
    if len(scores) < 2 or not rows:
        return
    found = torch.autograd.grad(scores[0], rows, retain_graph=True, allow_unused=True)
    if any(g is not None and bool(g[1:].any()) for g in found):
        raise ValueError(
            "target: the function mixes the images of a batch: the score of the first depends on "
            "the output for others. Compute each image's score from its own row."
        )


def _one_by_one(
    model: nn.Module, x: Tensor, names: Sequence[str], target: Target, head: str | None
) -> Capture:
    """`capture` of each image alone, put together."""
    targets = _for_each(target, len(x))
    parts = [capture(model, x[k : k + 1], names, t, head) for k, t in enumerate(targets)]

    def joined(field: str) -> Tensor | None:
        values = [getattr(part, field) for part in parts]
        return None if values[0] is None else torch.cat(values)

    maps = {}
    for kind in ("activations", "gradients"):
        both = [getattr(part, kind) for part in parts]
        maps[kind] = {name: torch.cat([each[name] for each in both]) for name in both[0]}
    fields_left = ("logits", "target", "scores", "probabilities")
    return Capture(**maps, **{field: joined(field) for field in fields_left})


def _for_each(target: Target, count: int) -> list:
    """A target for each of `count` images that go through a network alone."""
    try:
        given = None if target is None or callable(target) else torch.as_tensor(target)
    except (TypeError, ValueError, RuntimeError):
        given = None  # `_targets` refuses it
    if given is None or given.ndim != 1:
        return [target] * count
    if len(given) != count:
        raise ValueError(
            f"target has {len(given)} entries for {count} images: give one class index for all, "
            "or one per image."
        )
    return list(given)


def finer_target(
    target: int | None = None,
    rival: int | None = None,
    gamma: float = 0.6,
    head: str | None = None,
) -> Callable:
    """s = s_c - gamma * s_r as a target function for `capture`: what speaks for class c and not
    also for its rival r. Zhang et al., Finer-CAM, CVPR 2025 (arXiv 2501.11309).

    target: c, or None for the predicted class; rival: r, or None for the likeliest other class.
    gamma: 0 explains c alone. head: as in `capture`.
    """
    if not isinstance(gamma, Real) or isinstance(gamma, bool) or not 0 <= gamma < math.inf:
        raise ValueError(f"gamma={gamma!r} must be a number, 0 or more.")

    def score(output) -> Tensor:
        logits = heads.logits_of(output)
        kind = head or heads.found_head(nn.Identity(), logits)[0]
        scores = heads.HEADS[kind].scores(logits)
        chosen = _targets(target, scores, kind)
        others = scores.detach().scatter(1, chosen[:, None], -math.inf)
        against = _targets(rival, others, kind)
        if bool((chosen == against).any()):
            raise ValueError(f"rival={rival!r} is the target itself: name another class.")
        both = scores.gather(1, torch.stack([chosen, against], 1))
        return both[:, 0] - gamma * both[:, 1]

    return score


def _check_request(model: nn.Module, x: Tensor, layers: str | Sequence[str]) -> list[str]:
    """What can be refused before the pass: x, and layers that are no names of modules. Returns the
    names, once each.
    """
    names = list(layers) if isinstance(layers, list | tuple) else [layers]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"layers={layers!r} must be dotted module names, such as 'layer4', not modules or "
            "other "
            "objects."
        )
    _check_input(model, x)
    if not names:
        raise ValueError("layers is empty: give at least one dotted module name, such as 'layer4'.")
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules or not name:
            shapes = layer_shapes(model, x)
            known = {n: " × ".join(map(str, shape)) for n, shape in shapes.items()}
            raise ValueError(
                f"layer={name!r} is not in this {type(model).__name__}. {nearest(name, known)}"
            )
        if isinstance(modules[name], torch.jit.ScriptModule):
            raise ValueError(
                f"layer={name!r} is a scripted module, which takes no hooks. Give the unscripted "
                "model."
            )
    return list(dict.fromkeys(names))


def _keep(
    name: str, x: Tensor, outputs: dict[str, Tensor], passed: Sequence[bool] = ()
) -> Callable:
    """A forward hook that puts the layer's output into `outputs`, as the leaf of the graph if it is
    the first one, and hands on a clone, which later in-place operations may change. passed: not
    empty once the pass is over.
    """

    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        if passed:  # a checkpointed network computes it again, for its backward pass
            return output.detach().requires_grad_().clone()
        if name in outputs:
            raise ValueError(
                f"layer={name!r} runs more than once in a pass, so its map is ambiguous. Choose "
                "one "
                "that runs once."
            )
        if _maps(output, x) is None:
            seen = type(output).__name__
            if isinstance(output, Tensor):
                seen = f"{tuple(output.shape)} {output.dtype}"
            raise ValueError(
                f"layer={name!r} has no spatial output: got {seen}, need floats (B, C, h, w), h*w "
                "> 1. "
                "Try an earlier one."
            )
        outputs[name] = output if output.requires_grad else output.detach().requires_grad_()
        return outputs[name].clone()

    return hook


def _why_not(model: nn.Module) -> str:
    """What to do where a score depends on none of a layer."""
    if any("quantized" in type(m).__module__ for m in model.modules()):
        return networks.QUANTISED
    return (
        "Choose a layer on the way to the logits. If it is on it: is there torch.no_grad, "
        "torch.inference_mode or .detach() in the network's forward?"
    )


def _gradients(
    model: nn.Module, score: Tensor, names: Sequence[str], outputs: Mapping[str, Tensor]
) -> dict[str, Tensor | None]:
    """d score / d output of each layer; None where the score does not depend on it."""
    for name in names:
        if name not in outputs:
            raise ValueError(
                f"layer={name!r} did not run in this forward pass. Choose a layer that the model "
                "uses."
            )
    if not score.requires_grad:
        raise ValueError(f"The score does not depend on layer={list(names)}. {_why_not(model)}")
    ledger.backward(max(len(output) for output in outputs.values()))
    found = torch.autograd.grad(score, list(outputs.values()), allow_unused=True)
    return dict(zip(outputs, found, strict=True))


def _check_captured(
    model: nn.Module,
    x: Tensor,
    logits: Tensor | None,
    scores: Tensor,
    outputs: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor | None],
) -> None:
    """What can be refused only after the pass: numbers that are not finite, and layers that do not
    count.
    """
    tensors = {} if logits is None else {"logits": logits}
    tensors["scores"] = scores
    tensors |= {f"activations of layer={name!r}": output for name, output in outputs.items()}
    tensors |= {f"gradients of layer={n!r}": g for n, g in gradients.items() if g is not None}
    _check_finite(x, tensors)
    for name, output in outputs.items():
        if gradients[name] is None:
            raise ValueError(f"The score does not depend on layer={name!r}. {_why_not(model)}")
        if output.ndim == 3 and not _maps(gradients[name], x).any():
            raise ValueError(
                f"layer={name!r}: the logits depend on none of its patches, as behind the last "
                "attention "
                "of a network that reads its class token alone. Choose an earlier one, such as "
                f"{default_layers(model, x)[0]!r}."
            )


def _maps(output, x: Tensor, last: bool | None = None) -> Tensor | None:
    """A module's output for the input x as maps (B, C, h, w), h*w > 1; None where it has no
    positions.

    Four dimensions are (B, h, w, C) if `last`, else (B, C, h, w); where nobody knows, None, the
    first if only then h : w is as in the input. Three are tokens (B, n, C), or (B, C, n) if not
    `last`: n = h*w patches, in rows as in the input, and up to eight more in front of them.
    """
    if not isinstance(output, Tensor) or output.ndim not in (3, 4) or len(output) != len(x):
        return None
    if not output.is_floating_point():
        return None
    if output.ndim == 4:
        if last is None:
            last = _as_wide(output.shape[1:3], x) and not _as_wide(output.shape[2:], x)
        maps = output.permute(0, 3, 1, 2) if last else output
        return maps if maps.shape[2] * maps.shape[3] > 1 else None
    tokens = output.mT if last is False else output
    grids = []
    for extra in range(min(9, tokens.shape[1] - 1)):
        patches = tokens.shape[1] - extra
        h = max(1, round(math.sqrt(patches * x.shape[2] / x.shape[3])))
        if patches % h == 0 and _as_wide((h, patches // h), x):
            off = h * x.shape[3] != patches // h * x.shape[2]  # not exactly as wide as the input
            grids.append((off, extra, h))
    if not grids:
        return None
    _, extra, h = min(grids)
    return tokens[:, extra:].unflatten(1, (h, -1)).permute(0, 3, 1, 2)


def _as_wide(size: Sequence[int], x: Tensor) -> bool:
    """Whether h : w is as in the input, up to rounding to whole cells."""
    return abs(size[0] * x.shape[3] - size[1] * x.shape[2]) <= max(x.shape[2:])


# Modules whose output has its channels first, (B, C, h, w).
CHANNELS_FIRST = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
)
# What probing found, kept as long as the model: {layer and shape of the input: channels last?} ...
_LAYOUTS: WeakKeyDictionary[nn.Module, dict[tuple, bool]] = WeakKeyDictionary()
# ... and whether the images of a batch are independent.
_INDEPENDENT: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def _channels_last(
    model: nn.Module, x: Tensor, outputs: Mapping[str, Tensor], noted: bool = False
) -> dict[str, bool]:
    """Of the outputs with four dimensions: whether they are (B, h, w, C), rather than (B, C, h, w);
    of those with three that may be both, whether they are (B, n, C), rather than (B, C, n).

    Shapes alone cannot tell: (64, 64, 16) is 64 channels of 64 x 16, or 16 channels of 64 x 64. A
    module made of convolutions and their norms has channels first, and what follows it in a
    `Sequential` and has no parameters, such as a ReLU. Of all others autograd's graph is asked,
    once (noted: it was already, by `_note_layouts`), and where that does not tell they are probed.
    """
    known = _LAYOUTS.setdefault(model, {})
    shape = tuple(x.shape[1:])
    unclear = [name for name, output in outputs.items() if _is_unclear(output, x)]
    new = [name for name in unclear if (name, shape) not in known]
    unsure = [name for name in new if not _surely_first(model, name)]
    known |= {(name, shape): False for name in new if name not in unsure}
    norms = {name for name in unsure if isinstance(model.get_submodule(name), nn.LayerNorm)}
    norms = {name for name in norms if outputs[name].ndim == 3}  # it norms a token's channels
    known |= {(name, shape): True for name in norms}
    unsure = [name for name in unsure if name not in norms]
    if unsure and not noted:
        _note_layouts(model, x[:1], _probe(model, x)[0])
        unsure = [name for name in unsure if (name, shape) not in known]
    if unsure:
        known |= {(name, shape): last for name, last in _probe_layouts(model, x, unsure).items()}
    return {name: known[name, shape] for name in unclear}


def _is_unclear(output, x: Tensor) -> bool:
    """Whether the shape of an output leaves open where its channels are."""
    if not isinstance(output, Tensor) or output.ndim not in (3, 4):
        return False
    return output.ndim == 4 or _maps(output, x, last=False) is not None


def _surely_first(model: nn.Module, layer: str) -> bool:
    """Whether the modules that a layer is made of leave no doubt that its channels come first; of a
    layer without parameters in a `Sequential`, those in front of it.
    """
    parent, _, name = layer.rpartition(".")
    row = model.get_submodule(parent)
    modules = [model.get_submodule(layer)]
    if type(row).forward is nn.Sequential.forward:
        names = [n for n, _ in row.named_children()]
        modules = [row.get_submodule(n) for n in names[: names.index(name) + 1]]
    for module in reversed(modules):
        inside = list(_with_parameters(module))
        if inside:  # a block with a forward of its own may hand on what it has permuted
            plain = all(_is_plain(m) for m in module.modules())
            return plain and all(isinstance(m, CHANNELS_FIRST) for m in inside)
        if not type(module).__module__.startswith("torch.nn.modules"):
            return False
    return False


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is known to hand on what its convolutions made as they made it."""
    known = type(module).__module__.startswith(("torch.nn.modules", "torchvision.models"))
    return known or type(module).forward is nn.Sequential.forward


def _with_parameters(module: nn.Module) -> Iterator[nn.Module]:
    """The modules in a module, itself among them, that have parameters of their own."""
    return (m for m in module.modules() if any(p is not None for p in m._parameters.values()))


def _probe_layouts(model: nn.Module, x: Tensor, names: Sequence[str]) -> dict[str, bool]:
    """Channels last or first, from what moves: with the upper, lower, left or right quarter of the
    picture replaced by noise, the output changes most where rows and columns say so. Five passes
    with one picture.
    """
    pictures = [x[:1].detach()]
    noise = torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(7)).to(x)
    for dim, begins in ((2, True), (2, False), (3, True), (3, False)):
        quarter = max(1, x.shape[dim] // 4)
        changed = pictures[0].clone()
        where = changed.narrow(dim, 0 if begins else x.shape[dim] - quarter, quarter)
        where.copy_(noise[None].narrow(dim, 0, quarter))
        pictures.append(changed)
    seen: list[dict[str, Tensor]] = []
    for picture in pictures:
        outputs: dict[str, Tensor] = {}
        with _borrowed(model, {name: _record(name, outputs) for name in names}):
            _forward(model, picture.clone())
        seen.append(outputs)
    found = {}
    for name in names:
        moves = [(o[name] - seen[0][name]).abs().float()[0] for o in seen[1:]]
        if moves[0].ndim == 2:
            as_first, as_last = (
                [_maps(move[None], x[:1], last)[0] for move in moves] for last in (False, True)
            )
            found[name] = _along(as_last) >= _along(as_first)
            continue
        down = [_shift(moves[0], moves[1], axis) for axis in range(3)]
        across = [_shift(moves[2], moves[3], axis) for axis in range(3)]
        first, last = down[1] + across[2], down[0] + across[1]
        if first == last:  # nothing moves, or everything does: the shape has to tell
            shape = seen[0][name].shape
            found[name] = _as_wide(shape[1:3], x) and not _as_wide(shape[2:], x)
        else:
            found[name] = last > first
    return found


def _along(moves: Sequence[Tensor]) -> float:
    """How far changes (C, h, w) of the upper, lower, left and right quarter lie apart where they
    should.
    """
    return _shift(moves[0], moves[1], 1) + _shift(moves[2], moves[3], 2)


def _record(name: str, outputs: dict[str, Tensor]) -> Callable:
    """A forward hook that puts a copy of the layer's output into `outputs`."""

    def hook(module: nn.Module, args: tuple, output) -> None:
        outputs[name] = output.detach().clone()

    return hook


def _shift(a: Tensor, b: Tensor, axis: int) -> float:
    """How much further along an axis b's weight lies than a's, as a share of its length."""
    centres = []
    for change in (a, b):
        profile = change.sum([other for other in range(3) if other != axis])
        place = torch.linspace(0, 1, len(profile), device=change.device)
        total = profile.sum()
        centres.append(float((profile * place).sum() / total) if total > 0 else 0.5)
    return centres[1] - centres[0]


def _independent(model: nn.Module, x: Tensor) -> bool:
    """Whether a network's answer to an image is the same whatever else is in its batch. Probed once
    for each model, with one image alone and beside noise; a warning where it is not, where the
    network is random, and where it takes neither one image nor two.
    """
    if model not in _INDEPENDENT:
        name = type(model).__name__
        try:
            _INDEPENDENT[model] = _answers_alike(model, x[:1].detach())
        except Exception as error:  # of a network's own code
            if not _takes(model, x):
                return True  # nor this batch, and the pass itself will say why
            _INDEPENDENT[model] = True
            warnings.warn(
                f"This {name} takes neither one image nor two ({error}), so it is not known "
                "whether the images of a batch are independent.",
                stacklevel=3,
            )
        if not _INDEPENDENT[model] and _is_random(model, x[:1].detach()):
            _INDEPENDENT[model] = True
            warnings.warn(
                f"This {name} does not say the same of an image twice, as with dropout that is "
                "always on: maps and probabilities are those of one draw, and change with the "
                "next.",
                stacklevel=3,
            )
        if not _INDEPENDENT[model]:
            warnings.warn(
                f"This {name}'s answer to an image depends on the other images of its batch, as "
                "with batch norm without running statistics, so images go through it one at a "
                "time.",
                stacklevel=3,
            )
    return _INDEPENDENT[model]


def _answers_alike(model: nn.Module, image: Tensor) -> bool:
    """Whether a network says the same of an image alone and of the image beside noise; beside two
    kinds of noise, where it does not take one image alone.
    """
    noise = 1 + 2 * torch.randn(image.shape, generator=torch.Generator().manual_seed(7)).to(image)
    with _borrowed(model, {}):
        try:
            alone = _forward(model, image.clone())
        except Exception:  # of a network's own code
            alone = _forward(model, torch.cat([image, -2 * noise]))
        beside = _forward(model, torch.cat([image, noise]))
    for (_, a), (_, b) in zip(heads.tensors_in(alone), heads.tensors_in(beside), strict=True):
        if b.ndim and len(b) == 2:
            a = a.reshape(b[:1].shape) if a.numel() == b[0].numel() else a[:1]
            if not _equal_up_to_rounding(a, b[:1]):
                return False
    return True


def _takes(model: nn.Module, x: Tensor) -> bool:
    try:
        with _borrowed(model, {}):
            _forward(model, x.detach().clone())
    except Exception:  # of a network's own code
        return False
    return True


def _is_random(model: nn.Module, image: Tensor) -> bool:
    """Whether a network says something else of the same images a second time."""
    pair = torch.cat([image, image])  # two, as not all take one
    with _borrowed(model, {}):
        outputs = [heads.tensors_in(_forward(model, pair.clone())) for _ in range(2)]
    both = zip(*outputs, strict=True)
    return not all(_equal_up_to_rounding(a, b) for (_, a), (_, b) in both)


def _equal_up_to_rounding(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not a.numel() or not (a.is_floating_point() or a.is_complex()):
        return a.shape == b.shape and bool((a == b).all())
    scale = torch.maximum(a.abs().amax(), b.abs().amax())
    difference = (a - b).abs().amax()
    # what is not finite is not told here: `_check_finite` names it
    return not bool(difference > torch.finfo(a.dtype).eps ** 0.5 * scale)


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
    """The model in eval mode, frozen, with forward hooks by layer name and autograd on; afterwards
    as it was, whatever happened.
    """
    modules = dict(model.named_modules())
    trainable = [
        p
        for m in modules.values()
        for p in m._parameters.values()
        if p is not None and p.requires_grad
    ]
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
        inner = networks.inside(model)
        if inner is None:
            return model
        warnings.warn(
            f"{type(model).__name__} is unwrapped: the plain module inside is explained, on one "
            "device.",
            stacklevel=3,
        )
        model = inner


def _check_model(model) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model={model!r} must be a torch.nn.Module.")


# Libraries whose networks say with an exception of their own that an input does not fit them.
NETWORK_LIBRARIES = ("torch", "torchvision", "timm", "transformers", "efficientnet_lite_pytorch")


def _forward(model: nn.Module, x: Tensor):
    """model(x). What torch, or a library of networks, says there against its shape or type becomes
    a ValueError that names x; what a model of your own raises itself is handed on.
    """
    ledger.forward(len(x))
    try:
        return model(x)
    except Exception as error:
        # exactly these: running out of memory and a device's failure are kinds of RuntimeError too,
        # and not x's fault
        kinds = (RuntimeError, NotImplementedError, AssertionError, TypeError, ValueError)
        about_x = type(error) in kinds and _is_of_a_library(error)
        if not about_x and not networks.wants_more(error):
            raise
        weights = next((f", its weights are {p.dtype}" for p in model.parameters()), "")
        advice = networks.advice(error) or (
            "Give x the type, channels and size that the model expects."
        )
        raise ValueError(
            f"x={x.dtype} {tuple(x.shape)} does not fit this {type(model).__name__}{weights}: "
            f"{networks.shortened(error).rstrip('. ')}. {advice}"
        ) from error


def _is_of_a_library(error: Exception) -> bool:
    """Whether a library of networks raised this, or an operation of torch that a model of your own
    called, and not a `raise` or `assert` of its own.
    """
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    if trace.tb_frame.f_globals.get("__name__", "").split(".")[0] in NETWORK_LIBRARIES:
        return True
    operation = dis.opname[trace.tb_frame.f_code.co_code[trace.tb_lasti]]
    if operation in ("RAISE_VARARGS", "RERAISE"):
        return False
    # Python's own complaints are TypeErrors too
    by_torch = re.search(r"\w\(\)[:,]? (argument|received)", str(error)) is not None
    return type(error) is RuntimeError or (type(error) is TypeError and by_torch)


def _logits(output, x: Tensor) -> Tensor:
    return heads.logits_of(output, len(x))


def _check_finite(x: Tensor, tensors: Mapping[str, Tensor]) -> None:
    """Refuse NaN and infinity in what a network made of x: {what it is: tensor (B, ...)}.

    A sum is finite only if all that it adds up is: one pass, no copy. Only if it is not, and large
    values may have made it so, each value is looked at.
    """
    sums = [
        t.detach().sum(dtype=torch.float32 if t.dtype == torch.float16 else None)
        for t in tensors.values()
    ]
    if bool(torch.stack([s.float().to(x.device) for s in sums]).isfinite().all()):
        return
    for what, t in tensors.items():
        wrong = (~t.detach().isfinite()).reshape(len(t), -1).any(1).nonzero().flatten().tolist()
        if wrong:
            if what == "scores" and "logits" in tensors:  # which are finite: seen before
                raise ValueError(
                    f"The scores contain NaN or infinity in images {wrong[:5]} of x: the network "
                    "hands out probabilities, and one of exactly 0 or 1 has no finite logarithm "
                    "or log-odds. Let it return the logits in front of its softmax or sigmoid."
                )
            source = "x is finite" if bool(x.isfinite().all()) else "x contains them too"
            hidden = "" if what == "logits" else " The logits show nothing of it."
            raise ValueError(
                f"The model's {what} contain NaN or infinity in images {wrong[:5]} of x "
                f"({source}); all must be "
                f"finite. Check the input's scaling and the weights.{hidden}"
            )


def _targets(target, scores: Tensor, head: str = "softmax") -> Tensor:
    """The class index of each image, for scores (B, classes)."""
    batch, classes = scores.shape
    if callable(target):
        raise ValueError(
            "target: a function's value is no probability, which this needs: give a class."
        )
    if target is None:
        if head == "none" and classes > 1:
            raise ValueError(
                f"target=None: the {classes} outputs are values, so none of them is the predicted "
                "class. Give the index of the one to explain, or a function of the output."
            )
        return scores.detach().argmax(1)
    try:
        chosen = target.clone() if isinstance(target, Tensor) else torch.tensor(target)
        chosen = chosen.to(scores.device)
    except (TypeError, ValueError, RuntimeError):
        chosen = torch.empty(0, 0)  # refused below
    whole = not (chosen.is_floating_point() or chosen.is_complex() or chosen.dtype == torch.bool)
    if not whole or chosen.ndim > 1 or chosen.layout != torch.strided:
        raise ValueError(
            f"target={target!r} must be a class index, one index per image, None for the "
            "predicted class, or a function of the network's output that returns one score per "
            "image."
        )
    chosen = chosen.long().expand(batch) if chosen.ndim == 0 else chosen.long()
    if len(chosen) != batch:
        raise ValueError(
            f"target has {len(chosen)} entries for {batch} images: give one class index for all, "
            "or one per image."
        )
    if bool(((chosen < 0) | (chosen >= classes)).any()):
        raise ValueError(
            f"target={target!r} is out of range: the model has {classes} classes, 0 to "
            f"{classes - 1}."
        )
    return chosen


def _check_input(model: nn.Module, x: Tensor) -> None:
    dense = isinstance(x, Tensor) and x.layout == torch.strided
    if not dense or x.ndim != 4 or not x.is_floating_point() or not x.numel():
        got = (
            f"{x.dtype} {tuple(x.shape)}, {x.layout}" if isinstance(x, Tensor) else type(x).__name__
        )
        raise ValueError(
            f"x must be a float tensor (B, C, H, W), none of them 0; got {got}. See `preprocess`."
        )
    tensors = [
        t
        for m in model.modules()
        for t in (*m._parameters.values(), *m._buffers.values())
        if t is not None
    ]
    if tensors and tensors[0].device != x.device:
        raise ValueError(
            f"x is on {x.device} and the model on {tensors[0].device}: move one of them with "
            "`.to(device)`."
        )
    if any(t.is_inference() for t in tensors):
        raise ValueError(
            "The model was created under torch.inference_mode, so no gradient can pass it. Load it "
            "outside."
        )


# ------------------------------------------------------------------------------------------- 2 CAMs

# All take activations A and gradients G, both (B, C, h, w), and return rectified maps (B, h, w) in
# float32, not yet normalised. Indices: k channel, (i, j) position; sums over what is not on the
# left.


def _pair(A: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    for name, t in (("A", A), ("G", G)):
        if not isinstance(t, Tensor) or t.ndim != 4 or t.shape != A.shape or t.is_complex():
            got = f"{t.dtype} {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(
                f"{name} must be a real tensor (B, C, h, w), A and G of one shape; got {got}."
            )
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
    """ReLU(sum_k G_k(i, j) A_k(i, j)). Draelos and Carin, 2020 (arXiv 2011.08891), eq. 5; rectified
    here as the others are.
    """
    A, G = _pair(A, G)
    return (G * A).sum(1).relu()


def grad_cam_pp(A: Tensor, G: Tensor) -> Tensor:
    """ReLU(sum_k w_k A_k), w_k = sum_ij a_k(i, j) ReLU(G_k(i, j)), a = G^2 / (2 G^2 + S_k G^3), S_k
    = sum_ij A_k.

    Chattopadhyay et al., WACV 2018, eq. 10 and 19 (the target score enters as exp(y), whose higher
    derivatives are powers of G). Computed as a = 1 / (2 + S_k G), the same where G != 0, without
    squares of small numbers.
    """
    A, G = _pair(A, G)
    denominator = 2 + A.sum((2, 3), keepdim=True) * G
    a = torch.where(denominator.abs() > 1e-6, 1 / denominator, torch.zeros_like(G))
    return torch.einsum("bk,bkhw->bhw", (a * G.relu()).sum((2, 3)), A).relu()


def xgrad_cam(A: Tensor, G: Tensor) -> Tensor:
    """ReLU(sum_k w_k A_k), w_k = sum_ij G_k A_k / sum_ij A_k. Fu et al., BMVC 2020, eq. 8. A
    channel that sums to zero gets weight zero.
    """
    A, G = _pair(A, G)
    total, spoken = A.sum((2, 3)), (G * A).sum((2, 3))
    w = torch.where(total.abs() > 1e-7, spoken / total, 0 * spoken)  # 0 times a NaN is NaN still
    return torch.einsum("bk,bkhw->bhw", w, A).relu()


# A CAM of your own: write it like one above and add it, `cc.CAMS["my_cam"] = my_cam`; the tables
# have it, and the figures that show all methods.
CAMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "grad_cam": grad_cam,
    "layer_cam": layer_cam,
    "grad_cam_pp": grad_cam_pp,
    "hires_cam": hires_cam,
    "xgrad_cam": xgrad_cam,
}


def input_gradient(
    model: nn.Module,
    x: Tensor,
    target: Target = None,
    guided: bool = False,
    head: str | None = None,
) -> Tensor:
    """d s / d x of the target's score: (B, C, H, W) float32, signed; model, x, target and head as
    in `capture`.

    The vanilla gradient (Simonyan et al., ICLR workshop 2014) or, guided, guided backpropagation
    (Springenberg et al., ICLR workshop 2015), where every ReLU hands back only what is positive of
    its gradient. A saliency map is `g.abs().amax(1)`. Guided Grad-CAM (Selvaraju et al., ICCV 2017,
    section 3.2) is `g * cam[:, None]` with the guided gradient and the enlarged Grad-CAM.

    The rule is applied to the graph of this one pass, wherever a ReLU was called (ReLU6 and
    clamping from 0 on are ReLUs too), as a module or a function, in place or not; modules are not
    touched. Raises what `capture` raises, and ValueError where the pass holds a rectifier without
    such a rule, by name: another activation (GELU, SiLU, ...), a maximum or `where`, a scripted or
    custom function. A ReLU written as a product, `x * (x > 0)`, is not recognised.
    """
    model = _unwrap(model)
    _check_input(model, x)
    if len(x) > 1 and not _independent(model, x):
        targets = _for_each(target, len(x))
        alone = [
            input_gradient(model, x[k : k + 1], t, guided, head) for k, t in enumerate(targets)
        ]
        return torch.cat(alone)
    with _borrowed(model, {}):
        leaf = x.detach().clone().requires_grad_()
        output = _forward(model, leaf.clone())  # a clone, as a first layer may work in place
        logits, _, scores, _ = _scored(model, output, x, target, head)
        score = scores.sum()
        if guided:
            _guide(score)
        gradient = None
        if score.requires_grad:
            ledger.backward(len(x))
            gradient = torch.autograd.grad(score, leaf, allow_unused=True)[0]
    tensors = {"scores": scores} if logits is None else {"logits": logits, "scores": scores}
    if gradient is not None:
        tensors["gradients of the input"] = gradient
    _check_finite(x, tensors)
    if gradient is None:
        raise ValueError(
            "The target's score does not depend on the input. Is there torch.no_grad, "
            "torch.inference_mode or .detach() in the network's forward?"
        )
    return gradient.detach().float()


# What autograd calls rectifiers: those that are a ReLU if their lower end, saved under this name,
# is 0 ...
RELUS = {"Relu": "", "Hardtanh": "_saved_min_val", "Threshold": "_saved_threshold"}
RELUS |= {"ClampMin": "_saved_min", "Clamp": "_saved_min"}
# ... and those for which guided backpropagation has no rule.
OTHER_RECTIFIERS = set(
    "Gelu Silu Hardswish LeakyRelu Elu Mish Softplus PreluKernel RreluWithNoise Glu".split()
)
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
            node.register_hook(
                lambda gradients, _: tuple(g if g is None else g.relu() for g in gradients)
            )
        elif kind in OTHER_RECTIFIERS or isinstance(
            node, torch.autograd.function.BackwardCFunction
        ):
            other.add(kind)
    if other:
        raise ValueError(
            "guided: guided backpropagation has a rule for ReLU alone; this network uses "
            f"{', '.join(sorted(other))} "
            "too. Use the vanilla gradient, guided=False."
        )


# ---------------------------------------------------------------------------------- 3 pixel methods

# What goes down to the pixels, where Grad-CAM stops at a layer. Notebook 02 compares them.


def integrated_gradients(
    model: nn.Module,
    x: Tensor,
    target: Target = None,
    steps: int = 16,
    batch_size: int = 8,
    head: str | None = None,
) -> Tensor:
    """x_i * (integral over a from 0 to 1 of d s(a x) / d x_i): (B, C, H, W) float32, signed.

    Sundararajan et al., ICML 2017, eq. 1, along the line from mean grey (zero after normalisation)
    to the image, as captum computes it with `steps` points. Summed over all pixels it gives s(x) -
    s(grey), up to the integral's error. model, x, target and head as in `capture`; batch_size:
    points of one forward pass, at least B.
    """
    from captum.attr import IntegratedGradients

    model = _unwrap(model)
    _check_input(model, x)
    if not _independent(model, x):  # nor may the points of one pass mix
        if len(x) > 1:
            targets = enumerate(_for_each(target, len(x)))
            parts = [
                integrated_gradients(model, x[k : k + 1], t, steps, 1, head) for k, t in targets
            ]
            return torch.cat(parts)
        batch_size = 1
    with _borrowed(model, {}):
        image = x.detach().clone().requires_grad_()
        output = _forward(model, image.clone())
        logits, chosen, _, head = _scored(model, output, x, target, head)

        def scores_of(points: Tensor) -> Tensor:
            ledger.backward(len(points))  # captum asks for the gradient of each
            output = _forward(model, points)
            if callable(target):
                return _called(target, output, points)
            return heads.HEADS[head].scores(heads.logits_of(output, len(points)))

        path = IntegratedGradients(scores_of)
        found = path.attribute(
            x.detach().clone(),
            target=chosen,
            n_steps=steps,
            internal_batch_size=max(batch_size, len(x)),
        )
    return found.detach().float()


def pixel_maps(
    model: nn.Module,
    x: Tensor,
    target: Target,
    layer: str,
    batch_size: int = 8,
) -> dict[str, Tensor]:
    """Grad-CAM at a layer and the methods that go down to the pixels: {name: (B, H, W) in [0, 1]}.

    A gradient (`input_gradient`, vanilla and guided) counts with its largest absolute value over
    the colours; guided Grad-CAM is the guided gradient times the enlarged Grad-CAM; Integrated
    Gradients are summed over the colours. The two guided methods are left out where the network has
    other rectifiers than ReLU.
    """
    captured = capture(model, x, layer, target)
    cam = cam_at(captured, grad_cam, layer, tuple(x.shape[2:]))
    maps = {"Grad-CAM": cam}
    same = target if captured.target is None else captured.target
    maps["vanilla gradient"] = input_gradient(model, x, same).abs().amax(1)
    try:
        guided = input_gradient(model, x, same, guided=True)
    except ValueError:  # the one thing that can still be wrong here: a rectifier without a rule
        pass
    else:
        maps["guided backpropagation"] = guided.abs().amax(1)
        maps["guided Grad-CAM"] = (guided * cam[:, None]).abs().amax(1)
    attributed = integrated_gradients(model, x, same, batch_size=batch_size)
    maps["Integrated Gradients"] = attributed.sum(1).abs()
    return {name: normalise(found) for name, found in maps.items()}


def fgsm(model: nn.Module, x: Tensor, target: Target, epsilon: float) -> Tensor:
    """clip(pixels - epsilon * sign(d s / d x)), pixels in [0, 1]: preprocessed images (B, C, H, W),
    like x.

    The fast gradient sign method (Goodfellow et al., ICLR 2015, section 4) on the target's score in
    place of the loss: every value of every pixel moves by epsilon in the direction that lowers it.
    """
    mean, deviation = networks.channel_values(model, x)
    pixels = x * deviation + mean
    moved = pixels - epsilon * input_gradient(model, x, target).sign()
    return (moved.clamp(0, 1) - mean) / deviation


# ----------------------------------------------------------------------------------------- 4 fusion


def normalise(maps: Tensor) -> Tensor:
    """m / max(m), per image; (B, h, w) -> (B, h, w) in [0, 1]. A map that is zero everywhere stays
    zero.

    Division by the maximum, not min-max: min-max forces a zero into every map, and a zero in one
    factor kills a product. Raises ValueError for maps that are not (B, h, w), not finite, or
    negative somewhere.
    """
    return _scaled(_checked(maps))


def enlarge(maps: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """Normalised, enlarged to size = (H, W), normalised again; (B, h, w) -> (B, H, W) in [0, 1].

    mode: "bilinear" or "bicubic" (both with `align_corners=False`; what bicubic overshoots below 0
    is cut), or "nearest", which shows the layer's cells. Raises ValueError for another mode, and as
    `normalise` does.
    """
    if mode not in ("nearest", "bilinear", "bicubic"):
        raise ValueError(f"mode={mode!r} must be 'nearest', 'bilinear' or 'bicubic'.")
    return _enlarged(_checked(maps), _checked_size(size), mode)


def _checked(maps: Tensor) -> Tensor:
    """Maps as they enter from outside, in float32: the one place that looks at their values."""
    if not isinstance(maps, Tensor) or maps.is_complex() or maps.layout != torch.strided:
        got = type(maps).__name__
        if isinstance(maps, Tensor):
            got = f"{maps.dtype}, {maps.layout}"
        raise ValueError(
            f"maps must be a dense tensor of real numbers, of shape (B, h, w); got {got}."
        )
    if maps.ndim != 3 or not maps.shape[1] * maps.shape[2]:
        raise ValueError(f"maps must have shape (B, h, w), h*w > 0; got {tuple(maps.shape)}.")
    maps = maps.float()
    if maps.numel():
        low, high = torch.stack(maps.aminmax()).tolist()  # NaN is handed on, and NaN >= 0 is false
        if not (low >= 0 and math.isfinite(high)):
            raise ValueError(
                f"maps must be finite and non-negative; got {low} to {high}. CAMs are rectified "
                "first."
            )
    return maps


def _checked_size(size: tuple[int, int]) -> tuple[int, int]:
    try:
        height, width = map(operator.index, size)
    except (TypeError, ValueError):
        height = width = 0  # refused below
    if height < 1 or width < 1:
        raise ValueError(f"size={size!r} must be (H, W), two whole numbers from 1 on.")
    return height, width


def _scaled(maps: Tensor) -> Tensor:
    peak = maps.amax((1, 2), keepdim=True)
    return torch.where(peak > 0, maps / peak, torch.zeros_like(maps)).clamp(max=1)


def _enlarged(maps: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    settings = {"mode": mode, "align_corners": False}
    if mode == "nearest":
        settings = {"mode": "nearest-exact"}
    large = F.interpolate(_scaled(maps)[:, None], size=size, **settings)[:, 0]
    return _scaled(large.clamp(min=0))


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


def hybrid(
    a: Tensor, b: Tensor, alpha: float, size: tuple[int, int] | None = None, rule: str = "product"
) -> Tensor:
    """The weighted geometric mean a^alpha * b^(1-alpha) of two maps, each normalised before and
    their product normalised after.

    a: usually Grad-CAM at a deep layer, (B, h, w); b: usually LayerCAM, at the same or a shallower
    layer, (B, h', w'). size = (H, W) enlarges both first (see `enlarge`) and is required where
    their sizes differ. alpha in [0, 1]; alpha=1 gives a / max(a) and alpha=0 gives b / max(b),
    exactly, whatever the rule. rule: "product" (above), "floored" = (a + f)^alpha * (b +
    f)^(1-alpha) - f with f = 0.1, which keeps an order where one factor is zero, "mean" = alpha * a
    + (1-alpha) * b, "maximum" = max(alpha * a, (1-alpha) * b), or a name of your own in FUSIONS.
    Returns (B, H, W) in [0, 1]; the product is zero everywhere where one factor or their overlap
    is. Raises ValueError for alpha outside [0, 1], an unknown rule, and maps whose shapes do not
    fit.

    The formula with alpha = 0.7 at one common layer is from hirthickraj2015,
    Grad-Cam_Analysis_of_Cnn_Decisions; see Sources in the README.
    """
    alpha = _alpha(alpha)
    if not isinstance(rule, str) or rule not in FUSIONS:
        raise ValueError(f"rule={rule!r} is no fusion rule. {nearest(str(rule), list(FUSIONS))}")
    for m in (a, b):
        if not isinstance(m, Tensor):
            raise ValueError(f"The maps must be tensors (B, h, w); got {type(m).__name__}.")
    if size is None and a.shape != b.shape:
        raise ValueError(
            f"The maps have shapes {tuple(a.shape)} and {tuple(b.shape)}: give size=(H, W) to "
            "enlarge both to one size."
        )
    a, b = _checked(a), _checked(b)
    if len(a) != len(b):
        raise ValueError(f"The maps belong to different batches: {len(a)} and {len(b)} images.")
    if size is None:
        a, b = _scaled(a), _scaled(b)
    else:
        size = _checked_size(size)
        a, b = _enlarged(a, size), _enlarged(b, size)
    if alpha in (0, 1):
        return a if alpha == 1 else b
    fused = FUSIONS[rule](a, b, alpha)
    ours = FUSIONS[rule].__module__ == __name__  # of a rule of your own the values are looked at
    return _scaled(fused if ours else _checked(fused))


def _alpha(alpha: float) -> float:
    if not isinstance(alpha, Real) or isinstance(alpha, bool) or not 0 <= alpha <= 1:
        raise ValueError(
            f"alpha={alpha!r} must be a number in [0, 1]: 1 is the first map alone, 0 the second."
        )
    return (
        float(alpha) if alpha >= torch.finfo(torch.float32).tiny else 0.0
    )  # float32's pow may take less for 0


def fuse_layers(maps: Sequence[Tensor], size: tuple[int, int], fuse: str = "product") -> Tensor:
    """Maps of several layers, each (B, h, w) at its own resolution, as one: (B, H, W) in [0, 1],
    size = (H, W).

    Each is enlarged first. fuse: "product" (geometric mean), "mean", "maximum", or "layercam": the
    maximum of the maps, all but the coarsest scaled by tanh(2 m / max m), as Jiang et al., IEEE TIP
    2021, section III-C, fuse the stages of a VGG16 (they scale the first three of five). Raises
    ValueError for another name.
    """
    if not isinstance(fuse, str) or fuse not in LAYER_FUSIONS:
        raise ValueError(
            f"fuse={fuse!r} is no fusion of layers. {nearest(str(fuse), list(LAYER_FUSIONS))}"
        )
    counts = [len(m) if isinstance(m, Tensor) and m.ndim == 3 else type(m).__name__ for m in maps]
    if not counts or counts != counts[:1] * len(counts) or not isinstance(counts[0], int):
        raise ValueError(
            f"maps={counts} must be tensors (B, h, w), at least one, all of the same B images."
        )
    size = _checked_size(size)
    coarsest_last = sorted(maps, key=lambda m: -m.shape[1])
    large = [_enlarged(_checked(m), size) for m in coarsest_last]
    return large[0] if len(large) == 1 else _scaled(LAYER_FUSIONS[fuse](torch.stack(large)))


LAYER_FUSIONS: dict[
    str, Callable[[Tensor], Tensor]
] = {  # (layers, B, H, W), the coarsest last -> (B, H, W)
    "product": lambda m: m.prod(0) ** (1 / len(m)),
    "mean": lambda m: m.mean(0),
    "maximum": lambda m: m.amax(0),
    "layercam": lambda m: torch.cat([torch.tanh(2 * m[:-1]), m[-1:]]).amax(0),
}


def cam_at(
    captured: Capture,
    cam: Callable[[Tensor, Tensor], Tensor],
    layers: str,
    size: tuple[int, int],
    fuse: str = "product",
) -> Tensor:
    """A CAM at a layer, enlarged to size = (H, W): (B, H, W) in [0, 1]. Of several layers, joined
    by "+" as in "layer2+layer3", the maps become one as `fuse_layers` says. Raises ValueError for a
    layer that was not captured.
    """
    names = layers.split("+")
    for name in names:
        if name not in captured.activations:
            raise ValueError(
                f"layer={name!r} was not captured. {nearest(name, list(captured.activations))}"
            )
    maps = [cam(captured.activations[name], captured.gradients[name]) for name in names]
    return fuse_layers(maps, size, fuse)


# ----------------------------------------------------------------------------------------- 5 layers


class _End(NamedTuple):
    """The end of a module in a probe pass. edge: where autograd's graph has what it handed on (the
    first tensor of several); given: what it was given. None for what does not depend on the input.
    """

    name: str
    module: nn.Module
    output: object
    edge: GradientEdge | None
    given: GradientEdge | None


def _probe(model: nn.Module, x: Tensor) -> tuple[list[_End], object]:
    """(the end of every module, in order; the network's output), in one pass with one image, all of
    which autograd records.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            f"model={type(model).__name__}: a scripted or traced network takes no hooks, so no "
            "layer of it can be seen. Give the network as it was before."
        )
    _check_input(model, x)
    ends: list[_End] = []

    def record(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output):
            if isinstance(output, Tensor) and output._is_view():
                output = output.clone()  # an operation in place would rewrite a view's history
            ends.append(_End(name, module, output, _edge(output), _edge(args)))
            return output

        return hook

    hooked = [
        n for n, m in model.named_modules() if n and not isinstance(m, torch.jit.ScriptModule)
    ]
    with _borrowed(model, {name: record(name) for name in hooked}):
        leaf = x[:1].detach().clone().requires_grad_()
        output = _forward(model, leaf.clone())
    return ends, output


def _edge(value) -> GradientEdge | None:
    """Where autograd's graph has the first tensor of a module's input or output."""
    tensor = next((t for _, t in heads.tensors_in(value)), None)
    if tensor is None or not tensor.requires_grad:
        return None
    return get_gradient_edge(tensor)


def layer_shapes(model: nn.Module, x: Tensor) -> dict[str, tuple[int, int, int]]:
    """Every layer that `capture` can take, in order of execution: {dotted name: (C, h, w)}."""
    model = _unwrap(model)
    ends = _once(_probe(model, x)[0])
    return {name: tuple(m.shape[1:]) for name, m in _maps_of(model, x[:1], ends).items()}


def _once(ends: Sequence[_End]) -> list[_End]:
    """The ends of modules that end once: the others are ambiguous."""
    often = Counter(end.name for end in ends)
    return [end for end in ends if often[end.name] == 1]


def _maps_of(model: nn.Module, x: Tensor, ends: Sequence[_End]) -> dict[str, Tensor]:
    """{name: maps (1, C, h, w)} of the ends that have any."""
    outputs = {end.name: end.output for end in ends if _maps(end.output, x) is not None}
    _note_layouts(model, x, ends)
    last = _channels_last(model, x, outputs, noted=True)
    maps = {name: _maps(output, x, last.get(name)) for name, output in outputs.items()}
    return {name: m for name, m in maps.items() if m is not None}


def _note_layouts(model: nn.Module, x: Tensor, ends: Sequence[_End]) -> None:
    """Where the graph of a pass says whether an output has its channels last, `_channels_last` need
    not probe it.
    """
    known = _LAYOUTS.setdefault(model, {})
    for end in ends:
        if end.edge and _is_unclear(end.output, x):
            last = _has_channels_last(end.edge.node, tokens=end.output.ndim == 3)
            if last is not None:
                known[end.name, tuple(x.shape[1:])] = last


# ---- the graph of a pass. A node is one operation, such as a convolution or a sum, as autograd
# names it; names of modules do not count.

WEIGHTED = "Convolution|mm|^Linear"
ACTIVATION = "relu|hardtanh|silu|gelu|swish|sigmoid|tanh|elu|mish|softplus|threshold|clamp|erf"
MOVES = "View|Reshape|Permute|Transpose|^TB|Clone|Alias|squeeze|Expand|Slice|Split|ToCopy|Hook"
SCALES = "^(Add|Sub|Mul|Div|Neg)B"


def _is(node: Node, kind: str) -> bool:
    return re.search(kind, node.name(), re.IGNORECASE) is not None


def _sources(node: Node) -> list[Node]:
    return [source for source, _ in node.next_functions if source is not None]


def _is_activation(node: Node) -> bool:
    """An elementwise function that bends, such as a ReLU; a function of one's own with one input
    (torch.autograd.Function) is taken for one.
    """
    own = isinstance(node, torch.autograd.function.BackwardCFunction) and not _is(node, "Hook")
    return _is(node, ACTIVATION) or (own and len(_sources(node)) == 1)


def _hands_on(node: Node) -> bool:
    """Whether an operation only moves numbers, or scales them and adds constants."""
    return len(_sources(node)) == 1 and (_is(node, MOVES) or _is(node, SCALES))


def _maker(node: Node) -> Node:
    """The operation that made a node's numbers, behind those that only hand them on."""
    while _hands_on(node):
        node = _sources(node)[0]
    return node


def _has_channels_last(node: Node, tokens: bool = False) -> bool | None:
    """Whether what an operation made is (B, h, w, C), from the nearest operation in front of it
    that tells: convolutions have channels first, linear maps last. None where none tells. tokens:
    whether it is (B, n, C); there a linear map may mix positions, as in an MLP-Mixer, so what is
    in front of it tells.
    """
    if tokens:
        return _has_tokens_last(node)
    ahead = [node]
    seen = set()
    for node in ahead:
        if _is(node, "Convolution|BatchNorm|GroupNorm|Pool|Upsample"):
            return False
        by_weights = _is(node, "^(Addmm|Mm|Bmm|Linear)B") and len(_sources(node)) == 1
        if by_weights or _is(node, "LayerNorm"):
            return True
        if _is(node, "Permute"):
            return {(0, 3, 1, 2): False, (0, 2, 3, 1): True}.get(tuple(node._saved_dims))
        if node not in seen and not _is(node, "Transpose|^TB|Bmm|Attention"):
            seen.add(node)
            ahead.extend(_sources(node))
    return None


def _has_tokens_last(node: Node) -> bool | None:
    """Whether what an operation made is (B, n, C), rather than (B, C, n); None where none tells."""
    ahead = [(node, False)]  # and whether positions and channels changed places behind it
    seen = set()
    for node, swapped in ahead:
        if _is(node, "Convolution|BatchNorm|GroupNorm|Pool|Upsample"):
            return swapped
        if _is(node, "LayerNorm"):
            return not swapped
        mixes = _is(node, "Attention") or (_is(node, "Bmm") and len(_sources(node)) > 1)
        if node in seen or mixes or _is(node, "^TB"):
            continue
        seen.add(node)
        if _is(node, "Permute"):
            order = tuple(node._saved_dims)
            if order in ((0, 3, 1, 2), (0, 2, 3, 1)):
                return (order == (0, 2, 3, 1)) != swapped
            moved = order == (0, 2, 1)
        else:
            moved = _is(node, "Transpose")
            if moved and {_signed(node._saved_dim0), _signed(node._saved_dim1)} not in SWAPS:
                continue
        if _is(node, "Permute") and not moved:
            continue
        ahead.extend((source, swapped != moved) for source in _sources(node))
    return None


SWAPS = ({1, 2}, {-1, -2}, {1, -1}, {2, -2})  # of positions and channels in three dimensions


def _signed(dim: int) -> int:
    """A dimension as autograd keeps it, unsigned, with its sign."""
    return dim - 2**64 if dim >= 2**63 else dim


class _Graph:
    """The operations between the input and a score.

    users: {operation: those that use what it made}. passed: {operation that everything passes
    through: how many operations with weights are between it and the score}, from the score to the
    input. weighted: how many there are in all.
    """

    def __init__(self, score: Tensor):
        root = score.grad_fn
        self.users: dict[Node, list[Node]] = {root: []}
        found = [root]
        for node in found:
            for source in _sources(node):
                if source not in self.users:
                    self.users[source] = []
                    found.append(source)
                self.users[source].append(node)
        self.passed: dict[Node, int] = {}
        self.weighted = 0
        unseen = {node: len(users) for node, users in self.users.items()}
        ready = [root]
        paths = 0  # that lead on from the operations seen to others
        while ready:
            node = ready.pop()
            paths -= len(self.users[node])
            if paths == 0:
                self.passed[node] = self.weighted
            self.weighted += _is(node, WEIGHTED)
            for source in _sources(node):
                paths += 1
                unseen[source] -= 1
                if unseen[source] == 0:  # all its users were seen
                    ready.append(source)

    def uses(self, node: Node) -> list[Node]:
        """The operations that use a node's numbers, behind padding and what only hands them on."""
        found: list[Node] = []
        ahead = list(self.users[node])
        for user in ahead:
            if _hands_on(user) or _is(user, "Pad"):
                ahead.extend(self.users[user])
            else:
                found.append(user)
        return found


# ---- places in the graph


class _Place(NamedTuple):
    """A layer where a map can be taken. name: of the outermost module that ends there; end: the end
    of the innermost; shape: (C, h, w) of its maps.
    """

    name: str
    end: _End
    shape: tuple[int, int, int]

    @property
    def node(self) -> Node:
        return self.end.edge.node

    @property
    def positions(self) -> int:
        return self.shape[1] * self.shape[2]

    @property
    def is_tokens(self) -> bool:
        return self.end.output.ndim == 3


def _places(model: nn.Module, x: Tensor, ends: Sequence[_End]) -> dict[Node, _Place]:
    """Every layer that has maps, by the operation that it ends in. A module that hands on what
    another one made, as dropout does, is no place of its own.
    """
    maps = _maps_of(model, x, ends)
    at: dict[Node, list[_End]] = {}
    for end in ends:
        if end.name in maps:
            at.setdefault(end.edge.node, []).append(end)
    places = {}
    for node, here in at.items():
        inner = here[0]
        around = [end.name for end in here if f"{inner.name}.".startswith(f"{end.name}.")]
        places[node] = _Place(around[-1], inner, tuple(maps[inner.name].shape[1:]))
    return places


def _passed_places(
    graph: _Graph, places: Mapping[Node, _Place], classes: set[int]
) -> dict[Node, _Place]:
    """The places that everything passes through, from the input to the score. Weights lie in front
    of them; without any behind them, and as many channels as classes, they are the answer itself.
    """
    found = {}
    for node, behind in reversed(graph.passed.items()):
        if node in places and behind < graph.weighted:
            if behind or places[node].shape[0] not in classes:
                found[node] = places[node]
    return {n: place for n, place in found.items() if not _is_no_place(place, found)}


def _is_no_place(place: _Place, places: Mapping[Node, _Place]) -> bool:
    """Padding, and pooling: by a module without weights, or of what is a place itself."""
    maker = _maker(place.node)
    if _is(maker, "Pad"):
        return True
    without_weights = not any(True for _ in place.end.module.parameters())
    return _is(maker, "Pool") and (without_weights or _sources(maker)[0] in places)


def _rescaled(place: _Place) -> Node | None:
    """What a normalisation, or another layer with a weight per channel at most, was given; None if
    the place is no such thing.
    """
    maker, module = _maker(place.node), place.end.module
    if _is(maker, "Norm"):
        return _sources(maker)[0]
    own = [t for t in [*module._parameters.values(), *module._buffers.values()] if t is not None]
    small = own and all(t.numel() <= place.shape[0] for t in own)
    if small and place.end.given and not any(module.children()):
        given = place.end.given.node
        return given if _maker(given) is not maker else None  # a mere scale is no normalisation
    return None


def _is_step(graph: _Graph, place: _Place, places: Mapping[Node, _Place]) -> bool:
    """Whether a place is a step on the way and no end of a block: a normalisation or a bare
    convolution that feeds an activation; a bare convolution that feeds a normalisation; a
    normalisation, not that of a convolution, that only feeds convolutions with strides.
    """
    given = _rescaled(place)
    if given is None and not _is(_maker(place.node), WEIGHTED):
        return False
    uses = graph.uses(place.node)
    if any(_is_activation(use) for use in uses):
        return all(_is_activation(use) or _is(use, "^MulB") for use in uses)  # as in x * sigmoid(x)
    if given is None:
        normed = any(_rescaled(other) == place.node for other in places.values())
        return normed or all(_is(use, "Norm") for use in uses)
    strides = [max(getattr(use, "_saved_stride", [1])) for use in uses]
    return min(strides, default=1) > 1 and not _is(_maker(given), WEIGHTED)


# ---- tokens: whether patches count, and what they pass through


def _patches_count(
    score: Tensor, x: Tensor, edges: Sequence[GradientEdge], cut: GradientEdge | None = None
) -> list[bool]:
    """Whether a score depends on the positions of maps, or of tokens the patches and not only the
    class token, at these edges of its graph; with another edge cut or not.
    """
    if not edges:
        return []
    handle = None
    if cut is not None:
        handle = cut.node.register_prehook(
            lambda grads: tuple(None if g is None else torch.zeros_like(g) for g in grads)
        )
    try:
        found = torch.autograd.grad(score, list(edges), allow_unused=True, retain_graph=True)
    finally:
        if handle:
            handle.remove()
    maps = [None if g is None else _maps(g, x) for g in found]
    return [m is not None and bool(m.any()) for m in maps]


def _that_count(
    score: Tensor, x: Tensor, places: Mapping[Node, _Place]
) -> tuple[dict[Node, _Place], bool]:
    """(the places without tokens whose patches the score does not depend on; whether it depends on
    nothing at all).
    """
    tokens = [place for place in places.values() if place.is_tokens]
    counts = _patches_count(score, x, [place.end.edge for place in tokens])
    idle = {place.node for place, count in zip(tokens, counts, strict=True) if not count}
    kept = {node: place for node, place in places.items() if node not in idle}
    return kept, bool(tokens) and len(idle) == len(tokens)


def _in_front_of_the_last_attention(
    graph: _Graph, score: Tensor, x: Tensor, ends: Sequence[_End], places: Mapping[Node, _Place]
) -> _Place | None:
    """Where a class token takes up what the patches have: behind the last place that everything
    passes through, the last layer that all passes through which its patches have to say. In a ViT
    the normalisation in front of the last attention; queries, keys and values pass each other by.
    """
    outputs = {end.edge.node: end.edge for end in ends if end.edge}
    known = {end.given.node: end.given for end in ends if end.given} | outputs
    way = [known[n] for n, behind in graph.passed.items() if n in known and behind < graph.weighted]
    way = [edge for edge, counts in zip(way, _patches_count(score, x, way), strict=True) if counts]
    for node, place in reversed(places.items()):
        given = place.end.given
        if node in graph.passed or given is None or given.node not in graph.passed:
            continue
        # what was put together for this layer alone, class token and patches, came from elsewhere
        before = [edge for edge in way if edge.node in outputs or edge.node is not given.node]
        before = before or [given]
        if not _patches_count(score, x, before[:1], cut=place.end.edge)[0]:
            return place
    return None


# ---- stages


def stages(model: nn.Module, x: Tensor, until: str = "", target: Target = None) -> dict[str, int]:
    """Where a map can be taken, {layer: height of its map}, in order of execution: at each
    resolution the last place that everything passes through. Found in the graph that autograd
    records of one pass with one image; where an output may have its channels first or last,
    `capture` probes it with five more.

    A place lies behind the first weights and in front of the classifier. The end of a block counts
    before a step on the way to it: a normalisation or bare convolution in front of an activation, a
    bare convolution in front of its normalisation, a normalisation in front of a convolution with
    strides. Padding is no place; pooling none where a place is what it pools, or a module of its
    own. Where several names share one output, the outermost counts. For ResNet: relu, layer1,
    layer2, layer3, layer4.

    A network that reads a class token is asked at the last layer that all passes through which its
    patches have to say: for ViT-B encoder.layers.encoder_layer_11.ln_1. A network of one resolution
    has four stages, evenly spaced: that layer and its like in earlier blocks (2, 5, 8).

    until: only what is finer than this layer, or in a network of one resolution ends before it; and
    the layer itself. target: where the network's output holds no logits, the function of it that is
    explained.
    """
    found = _stages(model, x, target)
    heights = {place.name: place.shape[1] for place in found}
    if not until:
        return heights
    until_size = tuple(capture(_unwrap(model), x[:1], until, target).activations[until].shape[2:])
    areas = {place.name: place.positions for place in found}
    finer = [name for name, area in areas.items() if area > math.prod(until_size)]
    if len(set(areas.values())) == 1 and not finer:
        order = [end.name for end in _probe(_unwrap(model), x)[0]]
        finer = [name for name in areas if order.index(name) < order.index(until)]
    return {name: heights[name] for name in finer} | {until: until_size[0]}


def _stages(model: nn.Module, x: Tensor, target: Target) -> list[_Place]:
    """The places of `stages`."""
    model = _unwrap(model)
    ends, output = _probe(model, x)
    x = x[:1].detach()
    score = (_called(target, output, x) if callable(target) else _logits(output, x)).amax()
    if not score.requires_grad:
        raise ValueError(
            f"The logits of this {type(model).__name__} do not depend on its input, as far as "
            "autograd sees. Is there torch.no_grad or .detach() in its forward? Name a layer "
            "behind it with layer=."
        )
    graph = _Graph(score)
    places = _places(model, x, _near(graph, ends))
    places, nothing_counts = _that_count(score, x, places)
    if nothing_counts:
        raise ValueError(_no_gradient(model, ends))
    classes = {t.shape[1] for _, t in heads.tensors_in(output) if t.ndim > 1}
    passed = _passed_places(graph, places, classes)
    block_ends = [place for place in passed.values() if not _is_step(graph, place, passed)]
    best = {place.positions: place for place in [*passed.values(), *block_ends]}
    ladder = [place for place in passed.values() if place is best[place.positions]]
    tokens = {node: place for node, place in places.items() if place.is_tokens}
    attended = tokens and _in_front_of_the_last_attention(graph, score, x, ends, tokens)
    if attended:
        ladder = [*(place for place in ladder if place.positions != attended.positions), attended]
        alike = [place for place in tokens.values() if _role(place) == _role(attended)]
        if len(alike) >= 4:
            return _spread(ladder, alike)
    return _spread(ladder, block_ends) if ladder else []


def _near(graph: _Graph, ends: Sequence[_End]) -> list[_End]:
    """Modules that end once, in tokens that the score depends on or in maps that everything passes
    through.
    """
    often = Counter(end.name for end in ends)
    found = []
    for end in ends:
        if often[end.name] == 1 and isinstance(end.output, Tensor) and end.edge:
            if end.edge.node in graph.passed or (
                end.output.ndim == 3 and end.edge.node in graph.users
            ):
                found.append(end)
    return found


def _role(place: _Place) -> str:
    """A layer's name without the number of its block."""
    return re.sub(r"\d+", "#", place.name)


def _spread(ladder: Sequence[_Place], alike: Sequence[_Place]) -> list[_Place]:
    """The ladder; in a network of one resolution, or whose tokens have one in at least four blocks,
    four places, evenly spaced, the last of them the ladder's: of those alike, the commonest kind.
    """
    deep = ladder[-1]
    alike = [place for place in alike if place.is_tokens == deep.is_tokens]
    if any(place.positions != deep.positions for place in alike):
        return list(ladder)
    kinds = Counter(type(place.end.module) for place in alike)
    kind = max(kinds, key=lambda kind: (kinds[kind], kind is type(deep.end.module)), default=None)
    blocks = [place for place in alike if type(place.end.module) is kind]
    if len(ladder) > 1 and not (deep.is_tokens and len(blocks) >= 4):
        return list(ladder)
    ends = [len(blocks) * quarter // 4 for quarter in range(1, 4)]
    earlier = dict.fromkeys(blocks[end - 1] for end in ends if end)
    return [*(place for place in earlier if place is not deep), deep]


def _no_gradient(model: nn.Module, ends: Sequence[_End]) -> str:
    """What to say of a network whose score depends on nothing."""
    cause = "every gradient is zero"
    for end in ends:
        weights = [p for p in end.module._parameters.values() if p is not None and p.ndim > 1]
        if any(not weight.any() for weight in weights):
            cause = f"the weights of {end.name!r} are all zero"
    return (
        f"The logits of this {type(model).__name__} do not depend on its input: {cause}, as before "
        "training. There is nothing to explain: load trained weights."
    )


def default_layers(model: nn.Module, x: Tensor, target: Target = None) -> tuple[str, str]:
    """(deep, shallow): where Grad-CAM and where LayerCAM look by default: the last of `stages`, and
    the one whose resolution is nearest to four times deep's. For ResNet: layer4, layer2. A model of
    one resolution has no finer one: then the middle stage is shallow (ViT-B: the sixth of twelve
    blocks), or deep itself if it is the only one. target: see `stages`.

    Raises ValueError when a model has no such layer.
    """
    found = _stages(model, x, target)
    if not found:
        raise ValueError(_no_layer(_unwrap(model), x))
    areas = [place.positions for place in found]
    wanted = 16 * areas[-1]
    finer = [place for place, area in zip(found, areas, strict=True) if area > areas[-1]]
    middle = found[(len(found) - 1) // 2]
    shallow = min(
        reversed(finer), key=lambda p: abs(math.log(p.positions / wanted)), default=middle
    )
    return found[-1].name, shallow.name


def _no_layer(model: nn.Module, x: Tensor) -> str:
    """What to say of a network without stages."""
    name = type(model).__name__
    if layer_shapes(model, x):
        return (
            f"{name} has no layer that runs once and that everything passes through, as where "
            "branches meet only in the classifier: name one with layer=, or several joined by "
            "'+'. layer_shapes(model, x) lists them."
        )
    return (
        f"{name} has no layer with a spatial output before its classifier that runs once. Put a "
        "module of its own there, such as self.maps = nn.Identity() and x = self.maps(x), and "
        "name it with layer=."
    )


def matching_layers(layers: str, stages_here: Sequence[str], stages_there: Sequence[str]) -> str:
    """The layers of another network that lie as many stages before its last as `layers` ("layer2",
    "layer2+layer3") do here. Raises ValueError for a layer that is no stage.
    """
    here, there = list(stages_here), list(stages_there)
    for name in layers.split("+"):
        if name not in here:
            raise ValueError(
                f"layer={name!r} is no stage of the first network ({', '.join(here)}): name one of "
                "these."
            )
    places = [here.index(name) - len(here) for name in layers.split("+")]
    return "+".join(dict.fromkeys(there[max(place, -len(there))] for place in places))


def resolve_layers(
    model: nn.Module, x: Tensor, layer: str = "auto", shallow_layer: str = "auto"
) -> tuple[str, str]:
    """(deep, shallow) as a notebook's parameters mean them: a name is kept, "auto" is what
    `default_layers` finds.
    """
    if "auto" not in (layer, shallow_layer):
        return layer, shallow_layer
    deep, shallow = default_layers(model, x)
    return deep if layer == "auto" else layer, shallow if shallow_layer == "auto" else shallow_layer


# ---------------------------------------------------------------------------------------- 6 explain


@dataclass(frozen=True)
class Explanation:
    """cam: (H, W) float32 array in [0, 1]. target: the class explained, None for a target function;
    probability: its probability, None without one; score: the value that was explained;
    probabilities: (classes,) of all, or None. method, layers, alpha and head as used; rival: the
    class against which the target was explained, or None.
    """

    cam: np.ndarray
    target: int | None
    probability: float | None
    method: str
    layer: str
    shallow_layer: str
    alpha: float
    score: float = math.nan
    probabilities: np.ndarray | None = None
    head: str = "softmax"
    rival: int | None = None


def explain(
    model: nn.Module,
    image: str | Path | Image.Image | np.ndarray | Tensor,
    target: int | Callable | None = None,
    method: str = "hybrid",
    layer: str | None = None,
    shallow_layer: str | None = None,
    alpha: float = 0.5,
    size: int | tuple[int, int] | None = None,
    rule: str = "product",
    fuse: str = "product",
    head: str | None = None,
    rival: int | str | None = None,
    gamma: float = 0.6,
) -> Explanation:
    """One image, one map, one call.

    image: a path, PIL image or array (made the model's input as `networks.preprocessing_of` says),
    or a preprocessed tensor (C, H, W) or (1, C, H, W). target: class index, a function of the
    output that returns one score per image, or None for the predicted class; head: what the output
    means, see `capture`. rival: a class index, or "auto" for the likeliest other class, to explain
    what speaks for the target and not for the rival, by gamma; see `finer_target`. method: "hybrid"
    (Grad-CAM at `layer` with LayerCAM at `shallow_layer`, by `rule` and alpha; see `hybrid`) or a
    name in CAMS (at `layer`). Layers default to `default_layers`; both may be several,
    "layer2+layer3", joined by `fuse` (see `fuse_layers`). size: the side of the model's input or
    (H, W), else what the model says, else 224; the map has this size, and `overlay` fits it to the
    photograph. Raises ValueError for an unknown method, and what `capture` and `hybrid` raise.
    """
    model = _unwrap(model)
    alpha = _alpha(alpha)
    if not isinstance(method, str) or method not in ("hybrid", *CAMS):
        raise ValueError(f"method={method!r} is unknown. {nearest(str(method), ['hybrid', *CAMS])}")
    for name, value in (("layer", layer), ("shallow_layer", shallow_layer)):
        if value is not None and not isinstance(value, str):
            raise ValueError(
                f"{name}={value!r} must be a dotted module name, such as 'layer4', or None."
            )
    x = _one_input(model, image, size)
    deep, shallow = layer, shallow_layer
    if not layer or (method == "hybrid" and not shallow_layer):
        found_deep, found_shallow = default_layers(model, x, target if callable(target) else None)
        deep = layer or found_deep
        shallow = shallow_layer or found_shallow
    names = deep.split("+")
    if method == "hybrid":
        names = [*shallow.split("+"), *names]
    asked = target
    if rival is not None:
        asked = _against(model, target, rival, gamma, head)
    captured = capture(model, x, names, asked, head)
    if not any(bool(gradient.any()) for gradient in captured.gradients.values()):
        warnings.warn(
            "Every gradient is zero, as with a classifier of zeros before training: the map is "
            "empty.",
            stacklevel=2,
        )
    side = tuple(x.shape[2:])
    if method == "hybrid":
        coarse = cam_at(captured, grad_cam, deep, side, fuse)
        fine = cam_at(captured, layer_cam, shallow, side, fuse)
        maps = hybrid(coarse, fine, alpha, rule=rule)
    else:
        shallow = ""
        maps = cam_at(captured, CAMS[method], deep, side, fuse)
    head = None if captured.logits is None else _head_of(model, captured.logits, head)
    index, other = _classes_of(captured, target, rival, head)
    p = captured.probabilities
    return Explanation(
        cam=maps[0].cpu().numpy(),
        target=index,
        probability=None if p is None or index is None else float(p[0, index]),
        method=method,
        layer=deep,
        shallow_layer=shallow,
        alpha=alpha,
        score=float(captured.scores[0]),
        probabilities=None if p is None else p[0].cpu().numpy(),
        head=head or "none",
        rival=other,
    )


def _against(model: nn.Module, target, rival: int | str, gamma: float, head: str | None):
    """The target function of Finer-CAM that `explain`'s target, rival and gamma mean."""
    if callable(target):
        raise ValueError(
            "rival: a target function has none. Write the difference into the function itself."
        )
    if rival != "auto" and (not isinstance(rival, int) or isinstance(rival, bool)):
        raise ValueError(
            f"rival={rival!r} must be a class index, or 'auto' for the likeliest other class."
        )
    said = getattr(model, "output_head", None)
    head = head or (said if isinstance(said, str) else None)
    score = finer_target(target, None if rival == "auto" else rival, gamma, head)
    return lambda output: score(heads.logits_of(output, 1))


def _classes_of(
    captured: Capture, target, rival: int | str | None, head: str | None
) -> tuple[int | None, int | None]:
    """(the class that was explained, its rival) as indices, None where there is none."""
    if callable(target) or captured.logits is None:
        return None, None
    if rival is None:
        return int(captured.target[0]), None
    scores = heads.HEADS[head].scores(captured.logits.float())
    chosen = _targets(target, scores, head)
    others = scores.scatter(1, chosen[:, None], -math.inf)
    return int(chosen[0]), int(_targets(None if rival == "auto" else rival, others)[0])


def _one_input(
    model: nn.Module,
    image: str | Path | Image.Image | np.ndarray | Tensor,
    size: int | tuple | None,
) -> Tensor:
    """A path, picture or preprocessed tensor as the model's input (1, C, H, W), on its device and
    in its type.
    """
    if isinstance(image, Tensor):
        if not image.is_floating_point():
            raise ValueError(
                f"image: a tensor must be preprocessed, so hold floats; got {image.dtype}. See "
                "`networks.preprocess`."
            )
        x = image[None] if image.ndim == 3 else image
    elif isinstance(image, str | Path | Image.Image | np.ndarray):
        how = networks.preprocessing_of(model)
        if size is not None:
            how = networks.resized(how, size)
        x = networks.preprocess(datasets.as_rgb(image), how)
    else:
        raise ValueError(
            f"image must be a path, a picture or a tensor; got {type(image).__name__}."
        )
    if x.ndim != 4 or len(x) != 1:
        raise ValueError(
            f"image: one at a time; got a tensor {tuple(x.shape)}. For batches use `capture` and "
            "the CAMs."
        )
    first = next((p for p in model.parameters() if p.is_floating_point()), x)
    return x.to(device=first.device, dtype=first.dtype)


def top_classes(p: Tensor, class_names: Sequence[str], ids: Sequence[str], k: int = 5):
    """The k most likely classes of each image as a table with image, rank (from 1), class, name and
    probability; p: (B, K), as `probabilities` gives it.
    """
    values, indices = p.topk(min(k, p.shape[1]), dim=1)
    return pd.DataFrame(
        [
            dict(image=image, rank=rank, name=class_names[c], probability=value) | {"class": c}
            for image, row, chosen in zip(ids, values.tolist(), indices.tolist(), strict=True)
            for rank, (value, c) in enumerate(zip(row, chosen, strict=True), 1)
        ]
    )


def asked_classes(text: str, class_names: Sequence[str]) -> list[int]:
    """The classes that a text such as "ring,nodule" or "0,3" names, in its order, as indices among
    class_names.

    Capitals do not matter, and a name goes before a number. Raises ValueError with the nearest
    names for another word.
    """
    index: dict[str, int] = {}
    for k, name in enumerate(class_names):
        index.setdefault(name.lower(), k)
    found = []
    for word in words(text):
        k = index.get(word.lower(), int(word) if word.isdecimal() else -1)
        if not 0 <= k < len(class_names):
            raise ValueError(
                f"targets: {word!r} is neither a class of this network nor a number from 0 to "
                f"{len(class_names) - 1}. {nearest(word, class_names, 20)}"
            )
        found.append(k)
    return found


# ------------------------------------------------------------------------------------ 7 method_maps

# What shares the hybrid's resolution: its factors, and fusions without the evidence. Its own gain
# is what they lack. The last goes the other way: the hybrid at Grad-CAM's resolution.
MATCHED = (
    "layer_cam_shallow",
    "grad_cam_coarse",
    "grad_cam_finer",
    "times_sobel",
    "times_activation",
)
MATCHED += ("times_other", "hybrid_coarse")
PRIOR_ALPHA = 0.7  # of the same-layer hybrid, as the prior project published it


def sobel_edges(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """The length of the Sobel gradient of the mean over colours, averaged to a grid (h, w): (B, 3,
    H, W) -> (B, h, w). It knows the image, at a layer's resolution, and nothing of the network.
    """
    grey = F.pad(x.float().mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    kernel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], device=x.device)
    both = F.conv2d(grey, torch.stack([kernel, kernel.T])[:, None])
    return F.adaptive_avg_pool2d(both.norm(dim=1, keepdim=True), grid)[:, 0]


def method_maps(
    captured: Capture,
    x: Tensor,
    layers: Mapping[str, str],
    alpha: float,
    rule: str,
    ids: Sequence[str],
    seed: int,
    donor: Tensor,
) -> dict[str, Tensor]:
    """Every single-pass method of the study and its controls, from one capture: name -> (B, H, W)
    in [0, 1].

    captured: of the images x, (B, 3, H, W), at all `layers`: deep (where CAMs look), coarse and
    shallow (the hybrid's Grad-CAM and LayerCAM; each may be several, see `cam_at`), finer (the
    stage before deep). ids: of the images; random controls depend on (seed, id) alone. donor: (B,
    H, W), for each image the shallow LayerCAM of another one.

    All CAMS at deep. hybrid = Grad-CAM at coarse with LayerCAM at shallow by `rule` and `alpha`;
    hybrid_same = the product of both at deep with the prior's alpha, 0.7; hybrid_deep = as hybrid,
    but with Grad-CAM at deep; fused_mean, fused_maximum: the other rules with the same alpha.
    Controls: MATCHED, that is the hybrid's two factors alone (layer_cam_shallow, grad_cam_coarse),
    grad_cam_finer, the hybrid's Grad-CAM fused in the same way with Sobel edges, the mean rectified
    activation or another image's LayerCAM, and the hybrid averaged to deep's grid; the same edges
    and activation alone; noise (uniform, every pixel), smooth_noise (7 x 7 uniform noise enlarged
    like a deep map), centre (Gaussian, standard deviation a quarter of the side).
    """
    size = tuple(x.shape[2:])
    deep = layers["deep"]
    activations = captured.activations[deep]
    gradients = captured.gradients[deep]
    maps = {name: enlarge(cam(activations, gradients), size) for name, cam in CAMS.items()}

    coarse = cam_at(captured, grad_cam, layers["coarse"], size)
    fine = cam_at(captured, layer_cam, layers["shallow"], size)
    maps["grad_cam_coarse"] = coarse
    maps["layer_cam_shallow"] = fine
    maps["grad_cam_finer"] = cam_at(captured, grad_cam, layers["finer"], size)
    shallow = captured.activations[layers["shallow"].split("+")[0]]
    maps["sobel"] = enlarge(sobel_edges(x, tuple(shallow.shape[2:])), size)
    maps["activation"] = enlarge(shallow.float().relu().mean(1), size)

    maps["hybrid"] = hybrid(coarse, fine, alpha, rule=rule)
    maps["hybrid_same"] = hybrid(maps["grad_cam"], maps["layer_cam"], PRIOR_ALPHA)
    maps["hybrid_deep"] = hybrid(maps["grad_cam"], fine, alpha, rule=rule)
    maps["fused_mean"] = hybrid(coarse, fine, alpha, rule="mean")
    maps["fused_maximum"] = hybrid(coarse, fine, alpha, rule="maximum")
    maps["times_sobel"] = hybrid(coarse, maps["sobel"], alpha, rule=rule)
    maps["times_activation"] = hybrid(coarse, maps["activation"], alpha, rule=rule)
    maps["times_other"] = hybrid(coarse, donor, alpha, rule=rule)
    averaged = F.adaptive_avg_pool2d(maps["hybrid"], activations.shape[2:])
    maps["hybrid_coarse"] = enlarge(averaged, size)

    maps |= _maps_without_information(ids, size, seed)
    order = [n for n in figures.STYLE if n in maps] + [n for n in maps if n not in figures.STYLE]
    return {name: maps[name].to(x.device) for name in order}


def _maps_without_information(ids: Sequence[str], size: tuple[int, int], seed: int) -> dict:
    """Controls that know neither image nor network: noise, smooth_noise and centre, (B, H, W) each,
    on the CPU.
    """
    draws = [_generator(seed, i, 1) for i in ids]
    smooth = torch.from_numpy(np.stack([d.random((7, 7), np.float32) for d in draws]))
    noise = torch.from_numpy(np.stack([d.random(size, np.float32) for d in draws]))
    down = torch.linspace(-1, 1, size[0])[:, None]
    right = torch.linspace(-1, 1, size[1])[None, :]
    blob = torch.exp(-(down**2 + right**2) / (2 * 0.5**2)).expand(len(ids), -1, -1)
    return {
        "noise": normalise(noise),
        "smooth_noise": enlarge(smooth, size),
        "centre": normalise(blob),
    }


def _generator(seed: int, image_id: str, stream: int) -> np.random.Generator:
    """Random numbers that depend on seed, image and purpose, not on which images are grouped
    together.
    """
    return np.random.default_rng([seed, stream, zlib.crc32(str(image_id).encode())])


# ----------------------------------------------------------------------------------- 8 faithfulness


def probabilities(
    model: nn.Module,
    x: Tensor,
    batch_size: int = 8,
    precision: str = "float32",
    head: str | None = None,
) -> Tensor:
    """The probabilities of all classes, in batches and in eval mode: (B, classes) float32.

    softmax of the logits, or what the network's head makes of its output (`heads.HEADS`; head as
    in `capture`). precision: "float32" or "bf16" (autocast). ValueError where the output has none.
    """
    _check_model(model)
    if not isinstance(x, Tensor) or x.ndim != 4 or not len(x):
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be a float tensor (B, C, H, W), none of them 0; got {got}.")
    head = head or _known_head(model, x)
    make = heads.HEADS[head].probabilities
    if make is None:
        raise ValueError(
            f"head={head!r}: this network's output holds values and no probabilities, so what is "
            "measured in probabilities (insertion, deletion, drop, RISE) does not exist for it. "
            "Maps of a value do: `cc.explain`, or ./run_all.sh explain. To measure them, give "
            "`perturbation_curves` a target function of the output."
        )
    return _in_batches(
        model,
        x,
        batch_size,
        precision,
        lambda output, part: make(heads.logits_of(output, len(part)).float()),
    )


@torch.inference_mode()
def _in_batches(
    model: nn.Module, x: Tensor, batch_size: int, precision: str, read: Callable
) -> Tensor:
    """read(output, x) of every batch, joined: (B, ...) float32."""
    if precision not in ("float32", "bf16"):
        raise ValueError(f"precision={precision!r} must be 'float32' or 'bf16'.")
    device = next(model.parameters(), x).device
    if len(x) > 1 and batch_size > 1 and not _independent(model, x.to(device)):
        batch_size = 1
    rows = []
    with (
        _eval_mode(model),
        torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"),
    ):
        for part in x.split(batch_size):
            part = part.to(device).contiguous(memory_format=torch.channels_last)
            rows.append(read(_forward(model, part), part).float())
    return torch.cat(rows)


# What `found_head` found in a model that does not say it, kept as long as the model.
_FOUND_HEADS: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def _known_head(model: nn.Module, x: Tensor) -> str:
    """The model's `output_head`, else what one pass with one image shows."""
    while networks.inside(model) is not None:
        model = networks.inside(model)
    said = getattr(model, "output_head", None)
    if isinstance(said, str):
        heads.check_head(said, 0)
        return said
    if model not in _FOUND_HEADS:
        device = next(model.parameters(), x).device
        image = x[:1].detach().to(device).clone()
        with _borrowed(model, {}):
            try:  # with gradients, so that autograd's graph shows the last operation
                output = _forward(model, image.clone().requires_grad_().clone())
            except Exception:  # a network that cannot be differentiated is scored all the same
                image = image if _takes(model, image) else x[:8].detach().to(device).clone()
                output = _forward(model, image)
        _FOUND_HEADS[model] = _head_of(model, heads.logits_of(output, len(image)), None)
    return _FOUND_HEADS[model]


def _values(
    model: nn.Module, x: Tensor, target: Tensor | Callable, batch_size: int, precision: str
) -> Tensor:
    """What is measured of each image: its target's probability, or a target function's value."""
    if callable(target):
        return _in_batches(
            model, x, batch_size, precision, lambda output, part: _called_any(target, output, part)
        )
    p = probabilities(model, x, batch_size, precision)
    try:
        return p.gather(1, target[:, None])[:, 0]
    except (IndexError, RuntimeError):
        _targets(target, p)  # says what is wrong with it
        raise


def _check_own_rows(model: nn.Module, x: Tensor, target: Callable) -> None:
    """Refuse a target function that mixes the images of a batch, here x."""
    with _borrowed(model, {}):
        output = _forward(model, x.detach().clone().requires_grad_().clone())
        scores = _called_any(target, output, x)
        if scores.requires_grad:
            _check_rows(scores, [t for _, t in heads.tensors_in(output) if t.requires_grad])


def _one_each(target: int | Sequence[int] | Tensor, count: int) -> Tensor:
    """A class index for each of `count` images; ValueError for what is none."""
    if target is None:
        raise ValueError(
            "target=None: give the class whose probability is measured, one for all images or one "
            "per image, or a target function."
        )
    any_class = torch.zeros(count, 1).expand(count, 2**31)  # their number is not known here
    return _targets(target, any_class)


def _check_probabilities(p: Tensor) -> None:
    """Refuse NaN, which comparisons would hide: NaN > 0.5 is false. Not in `probabilities`, where
    it would make every batch wait for the GPU.
    """
    if bool(p.isnan().any()):
        raise ValueError(
            f"{int(p.isnan().sum())} of the model's {p.numel()} probabilities are NaN: its logits "
            "contain NaN or "
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
    size: networks.Size = 224,
):
    """The images on which explanations are judged: (rows, left out).

    Walks through a seeded permutation of the table until n images are found (0 = all). Each gets
    the columns target (the predicted class) and p_image (its probability); where the data has twins
    (the same image without its lesion) also p_twin, and only images whose lesion the network really
    uses count: p_image - p_twin > 0.5. Images without a twin in such a data set, which show nothing
    to find, are passed over uncounted. Where the table has a column known (`class_indices`) and
    boxes, images whose known class is another than the predicted one do not count either: a map of
    another class need not lie in the box. left out: a table of id, file and reason, those of the
    files that cannot be read among them (with strict they raise); see `report_left_out`.
    """
    has_twins = bool((frame["twin"] != "").any())
    frame = datasets.subset(frame[frame["twin"] != ""] if has_twins else frame, 0, seed)
    has_boxes = "known" in frame and bool((frame["truth"] == "boxes").any())
    added = ["target", "p_image", "p_twin"] if has_twins else ["target", "p_image"]
    # plain numbers: small tables kept from every batch would lie between the images of one batch
    # and of the next in memory, which then cannot be used again
    places = []
    values = []
    left_out = []
    count = 0
    for begin in range(0, len(frame), batch_size):
        part, unreadable = datasets.split_readable(
            frame.iloc[begin : begin + batch_size], strict, size
        )
        left_out += unreadable
        if part.empty:
            continue
        part = _with_prediction(model, part, batch_size, precision, size)
        if has_twins:
            part, counts = _uses_its_lesion(model, part, batch_size, precision, size)
        elif has_boxes:
            counts = _is_recognised(part)
        else:
            counts = np.ones(len(part), bool)
        counted_before = count + counts.cumsum() - counts
        reached = counted_before < (n or math.inf)
        chosen = part.loc[reached & counts, added]
        places += chosen.index.tolist()
        values += chosen.to_numpy(float).tolist()
        refused = part[reached & ~counts][["id", "file"]]
        reason = runs.UNUSED if has_twins else runs.MISTAKEN
        left_out += refused.assign(reason=reason).to_dict("records")
        count += len(chosen)
        if n and count >= n:
            break
    found = pd.DataFrame(values, index=places, columns=added)
    found = found.astype({name: int if name == "target" else np.float32 for name in added})
    rows = frame.loc[places].drop(columns=added, errors="ignore").join(found)
    return rows.reset_index(drop=True), pd.DataFrame(left_out, columns=["id", "file", "reason"])


def _with_prediction(model: nn.Module, part, batch_size: int, precision: str, size: networks.Size):
    """The rows with target, the class predicted, and p_image, its probability."""
    x = datasets.load_batch(part, size=size)
    p, target = probabilities(model, x, batch_size, precision).max(1)
    _check_probabilities(p)
    return part.assign(target=target.cpu().numpy(), p_image=p.cpu().numpy())


def _uses_its_lesion(model: nn.Module, part, batch_size: int, precision: str, size: networks.Size):
    """(the rows with p_twin, the target's probability without the lesion; whether it is lower by
    more than 0.5)
    """
    twins = datasets.load_batch(part, "twin", size)
    p = probabilities(model, twins, batch_size, precision).cpu().numpy()
    _check_probabilities(torch.from_numpy(p))
    part = part.assign(p_twin=p[np.arange(len(part)), part["target"]])
    return part, (part["p_image"] - part["p_twin"] > 0.5).to_numpy()


def _is_recognised(part) -> np.ndarray:
    """Whether the network sees an image's known class in it; an image without a known class counts
    too.
    """
    return ((part["known"] == part["target"]) | (part["known"] < 0)).to_numpy()


def pixel_rank(maps: Tensor, ids: Sequence[str], seed: int = 0) -> Tensor:
    """The place of every pixel by descending attribution, 0 = highest: (B, H, W) -> (B, H, W)
    int32. Ties are broken by one seeded permutation per image, the same for every method, so a flat
    region is visited in random order and not from its upper left corner. Raises ValueError for NaN.
    """
    flat = maps.flatten(1)
    if len(ids) != len(flat):
        raise ValueError(
            f"ids has {len(ids)} entries for {len(flat)} maps: give one id for each image."
        )
    if bool(flat.isnan().any()):
        raise ValueError("maps contain NaN, which has no place in an order.")
    shuffle = np.stack([_generator(seed, i, 2).permutation(flat.shape[1]) for i in ids])
    shuffle = torch.from_numpy(shuffle).to(maps.device)
    shuffled = flat.gather(1, shuffle)
    order = shuffle.gather(1, shuffled.argsort(dim=1, descending=True, stable=True))
    places = torch.arange(flat.shape[1], dtype=torch.int32, device=maps.device)
    places = places.expand(len(flat), -1)
    return torch.empty_like(places).scatter_(1, order, places).view(maps.shape)


def block_rank(maps: Tensor, ids: Sequence[str], seed: int = 0, block: int = 16) -> Tensor:
    """The place of every pixel's block by descending mean attribution, 0 = highest: (B, H, W) ->
    (B, H, W) int32. The blocks are block x block pixels; those at the right and lower border may be
    smaller. A gain that pixels show and blocks do not is fragmentation of the image. Ties as in
    `pixel_rank`.
    """
    exact = maps[:, None].cpu().double()  # on the CPU, as Apple's GPUs have no float64
    means = F.avg_pool2d(exact, block, ceil_mode=True, count_include_pad=False)[:, 0].float()
    ranks = pixel_rank(means, ids, seed).to(maps.device)
    ranks = ranks.repeat_interleave(block, 1).repeat_interleave(block, 2)
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
    target: Tensor | Callable,
    steps: int = 28,
    batch_size: int = 8,
    precision: str = "float32",
    points: Sequence[int] | None = None,
    known: dict[tuple[int, int], float] | None = None,
) -> Tensor:
    """The target's probability while pixels of `start` are replaced by those of `end`, lowest rank
    first: (N, M, steps + 1), or (N, M, len(points)) where only these points are asked for.

    start, end: (N, C, H, W); ranks: (N, M, H, W), M orders for each image as `pixel_rank` or
    `block_rank` give them, G different places; target: (N,), or a target function as in
    `capture`, whose value takes the place of the probability. Point s of a curve has the first
    floor(s*G/steps) places replaced, all channels together, so the first point is `start`, the last
    is `end`, groups differ by at most one place and none is dropped. Deletion: start = image, end =
    baseline. Insertion: start = baseline, end = image (Petsiuk et al., BMVC 2018, Algorithm 1).

    Every distinct picture is scored once, whichever curve, order or image it belongs to. `known`
    carries this over several calls with one network, target function and precision: values by
    (`picture_codes`, class) that need no scoring, to which this call adds its own. So 14 steps
    after 7 score only the points between. Pictures are made on the device, batch_size at a time.
    Raises ValueError for steps outside 1 to G.
    """
    n, m = ranks.shape[:2]
    places = int(ranks.max()) + 1
    if not 1 <= steps <= places:
        raise ValueError(
            f"steps={steps} must lie between 1 and the number of places in the order, {places}."
        )
    device = next(model.parameters(), start).device
    start, end, ranks = (t.to(device) for t in (start, end, ranks))
    if callable(target) and n > 1 and batch_size > 1 and _independent(model, start):
        _check_own_rows(model, start[:2], target)
    # with a function nobody asks for a class: any one will do
    classes = torch.zeros(n, dtype=torch.long) if callable(target) else _one_each(target, n)
    asked = target if callable(target) else classes.to(device)
    cuts = torch.arange(steps + 1, device=device) * places // steps
    # the point from which on a pixel is replaced
    replaced_at = torch.bucketize(ranks, cuts.int(), right=True, out_int32=True)
    points = np.arange(steps + 1) if points is None else np.array(points)
    codes = _codes_on_the_way(start, end, replaced_at, steps).cpu().numpy()[..., points]
    image, order, place = np.indices(codes.shape).reshape(3, -1)
    pictures = list(zip(codes.flatten().tolist(), classes[image].tolist(), strict=True))
    ledger.asked(len(pictures))
    known = {} if known is None else known
    new = _first_of_each(pictures, known)
    if new:
        jobs = np.stack([image, order, points[place]])[:, list(new.values())]
        jobs = torch.from_numpy(jobs).to(device)  # all at once, so that no batch waits for its own
        settings = (asked, batch_size, precision)
        scored = _score_mixed(model, start, end, replaced_at, jobs, *settings)
        known.update(zip(new, scored.tolist(), strict=True))
    return torch.tensor([known[picture] for picture in pictures]).view(codes.shape)


def _first_of_each(pictures: Sequence[tuple[int, int]], known: Mapping) -> dict:
    """{picture: where it appears first} of those that are not known yet."""
    first = {}
    for position, picture in enumerate(pictures):
        if picture not in known:
            first.setdefault(picture, position)
    return first


def _score_mixed(
    model: nn.Module,
    start: Tensor,
    end: Tensor,
    replaced_at: Tensor,
    jobs: Tensor,
    target: Tensor | Callable,
    batch_size: int,
    precision: str,
) -> Tensor:
    """The target's probability for points of curves, jobs = (images, orders, points), (3, J) on the
    device: (J,) on the CPU. Nothing in the loop waits for the device.
    """
    values = []
    for image, order, point in (part.unbind() for part in jobs.split(batch_size, dim=1)):
        replaced = replaced_at[image, order] <= point.view(-1, 1, 1)
        mixed = torch.where(replaced[:, None], end[image], start[image])
        asked = target if callable(target) else target[image]
        values.append(_values(model, mixed, asked, batch_size, precision))
    found = torch.cat(values).cpu()
    _check_probabilities(found)
    return found


def picture_codes(x: Tensor) -> Tensor:
    """A number that tells a picture by its content: (B, C, H, W) -> (B,) int64. Pictures with equal
    pixels have equal numbers; different ones have different numbers, but for a chance of about
    2**-64 a pair.
    """
    return _pixel_codes(x).sum(1)


def known_values(x: Tensor, target: Tensor, values: Tensor) -> dict[tuple[int, int], float]:
    """What is known of pictures (B, C, H, W) already, as `perturbation_curves` takes it: values,
    (B,), the probabilities of target, (B,).
    """
    points = zip(picture_codes(x).tolist(), target.tolist(), strict=True)
    return dict(zip(points, values.flatten().tolist(), strict=True))


def values_of(
    rows: pd.DataFrame, x: Tensor, target: Tensor, twins: Tensor | None = None
) -> dict[tuple[int, int], float]:
    """What `measurable` found out about the rows' images and their twins, so that no curve scores
    its ends again: p_image and p_twin, as `known_values`.
    """
    known = {}
    for column, pictures in (("p_image", x), ("p_twin", twins)):
        if column in rows and pictures is not None:
            known |= known_values(pictures, target, torch.tensor(rows[column].tolist()))
    return known


def _pixel_codes(x: Tensor) -> Tensor:
    """A number for every pixel, made of its place and its values: (B, C, H, W) -> (B, H * W) int64.
    Their sum over the pixels, modulo 2**64, tells the picture (Zobrist hashing, 1970), so that the
    sum for a picture in which some pixels were replaced follows without looking at the others.
    """
    bits = (x.float() + 0.0).contiguous().view(torch.int32).long() & 0xFFFFFFFF  # -0 becomes 0
    place = torch.arange(x[0].numel(), device=x.device).view(x.shape[1:])
    code = bits | (place << 32)
    for shift, factor in _SPLITMIX:
        code = (code ^ ((code >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return (code ^ ((code >> 31) & ((1 << 33) - 1))).sum(1).flatten(1)


# SplitMix64 (Steele et al., OOPSLA 2014): shifts and factors, the latter as signed numbers.
_SPLITMIX = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))


def _codes_on_the_way(start: Tensor, end: Tensor, replaced_at: Tensor, steps: int) -> Tensor:
    """`picture_codes` of every point of every curve: (N, M, steps + 1). replaced_at: (N, M, H, W),
    the point from which on a pixel is replaced, 1 to steps.
    """
    n, m = replaced_at.shape[:2]
    before = _pixel_codes(start)
    change = (_pixel_codes(end) - before)[:, None].expand(n, m, -1)
    at_point = torch.zeros(n, m, steps + 1, dtype=torch.long, device=start.device)
    for image in range(n):  # one at a time: 64 bits for each pixel of all orders are much memory
        at_point[image].scatter_add_(1, replaced_at[image].flatten(1).long(), change[image])
    return before.sum(1)[:, None, None] + at_point.cumsum(2)


def auc(curves: Tensor | np.ndarray, points: Sequence[int] | None = None) -> np.ndarray:
    """Normalised trapezoid along the last axis: (sum - first/2 - last/2) / (n - 1), or, for curves
    known at some `points` only, sum_i (p_i+1 - p_i) (c_i + c_i+1) / 2 / (p_n - p_1). For
    probabilities, in [0, 1]. Raises ValueError for fewer than two points.
    """
    c = np.asarray(curves, dtype=np.float64)
    if c.ndim < 1 or c.shape[-1] < 2:
        raise ValueError(
            f"curves must have at least two points along their last axis; got shape {c.shape}."
        )
    at = np.arange(c.shape[-1]) if points is None else np.asarray(points)
    return np.trapezoid(c, at, axis=-1) / (at[-1] - at[0])


def few_points(steps: int, count: int) -> list[int]:
    """Where to look at a curve of `steps` steps if few points must do: 0, at most `count` between
    the ends, in geometric progression, and `steps`. Most of a curve's rise or fall lies in its
    first steps, so evenly spaced points would miss it. Doubling count keeps the points and adds
    more between them.
    """
    between = np.geomspace(1, steps, count + 1).round().astype(int).tolist()
    return list(dict.fromkeys([0, *between, steps]))


def blur(x: Tensor) -> Tensor:
    """RISE's blurred image: each channel convolved, zero-padded, with an 11 x 11 kernel made by
    Gaussian-filtering a unit impulse with sigma = 5 and SciPy's reflecting border (Petsiuk et al.,
    their evaluation code); on normalised pixels, so the padding is mean grey.
    """
    from scipy.ndimage import gaussian_filter

    impulse = np.zeros((11, 11))
    impulse[5, 5] = 1
    kernel = torch.from_numpy(gaussian_filter(impulse, 5)).to(x.dtype).to(x.device)
    return F.conv2d(x, kernel.expand(x.shape[1], 1, 11, 11), padding=5, groups=x.shape[1])


def baselines(
    x: Tensor,
    name: str,
    twin: Tensor | None = None,
    how: networks.Preprocessing = networks.IMAGENET,
) -> tuple[Tensor, Tensor]:
    """(where insertion starts, where deletion ends) for preprocessed images x: (B, C, H, W) each.

    "rise": the blurred image, mean grey (zero after normalisation). "zero": mean grey, mean grey.
    "black": black, black. "twin": the same image without its lesion, both. how: the preprocessing
    of x, which tells what black is.
    """
    if name == "rise":
        return blur(x), torch.zeros_like(x)
    if name == "zero":
        return torch.zeros_like(x), torch.zeros_like(x)
    if name == "black":
        if len(how.mean) != x.shape[1]:
            raise ValueError(
                f"baseline='black': x has {x.shape[1]} channels and the preprocessing "
                f"{len(how.mean)}. Give how=, a `networks.Preprocessing` with the mean and std of "
                "x's channels."
            )
        black = (-torch.tensor(how.mean) / torch.tensor(how.std)).to(x)
        black = black.view(1, -1, 1, 1).expand_as(x)
        return black, black
    if name == "twin" and twin is not None:
        return twin, twin
    raise ValueError(
        f"baseline={name!r} must be 'rise', 'zero', 'black', or, where the data has twins, 'twin'."
    )


def faithfulness(
    model: nn.Module,
    x: Tensor,
    maps: Mapping[str, Tensor],
    target: Tensor | Callable,
    ids: Sequence[str],
    start: Tensor,
    end: Tensor,
    seed: int = 0,
    steps: int = 28,
    batch_size: int = 8,
    precision: str = "float32",
    block: int = 0,
    points: Sequence[int] | None = None,
    known: dict[tuple[int, int], float] | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Insertion and deletion curves of every method: {"insertion": {method: (B, steps + 1)},
    "deletion": {...}}.

    maps: name -> (B, H, W). start is where insertion starts and end where deletion ends, as
    `baselines` returns them. What is measured is the probability of target, (B,), or the value of a
    target function. block: pixel by pixel (0), or in blocks of block x block. points, known: as in
    `perturbation_curves`.
    """
    if block:
        ranks = [block_rank(m, ids, seed, block) for m in maps.values()]
    else:
        ranks = [pixel_rank(m, ids, seed) for m in maps.values()]
    ranks = torch.stack(ranks, 1)
    # both in one call, so that what they share, the image itself, is evaluated once
    curves = perturbation_curves(
        model,
        torch.cat([start, x]),
        torch.cat([x, end]),
        ranks.repeat(2, 1, 1, 1),
        target if callable(target) else _one_each(target, len(x)).repeat(2),
        steps,
        batch_size,
        precision,
        points,
        known,
    )
    insertion, deletion = curves.split(len(x))
    return {
        "insertion": dict(zip(maps, insertion.unbind(1), strict=True)),
        "deletion": dict(zip(maps, deletion.unbind(1), strict=True)),
    }


def steps_of(steps: int, x: Tensor, block: int) -> int:
    """As many steps as were asked for, or in blocks of block x block pixels as there are blocks."""
    if not block:
        return steps
    return min(steps, math.ceil(x.shape[2] / block) * math.ceil(x.shape[3] / block))


def confidence_change(
    model: nn.Module,
    x: Tensor,
    maps: Tensor,
    target: int | Sequence[int] | Tensor,
    clean: Tensor | np.ndarray,
    batch_size: int = 8,
    precision: str = "float32",
) -> dict[str, np.ndarray]:
    """What becomes of the target's probability when only what a map shows is left of the image:
    each (B,), in [0, 1].

    x: (B, C, H, W), preprocessed. maps: (B, H, W) in [0, 1], of one method. target: as in
    `capture`. clean: (B,), the target's probability Y on x itself. With O its probability on x *
    map (where the map is 0, the image is mean grey):

        drop = max(0, Y - O) / Y
        increase = 1 if O > Y else 0
        gain = max(0, O - Y) / (1 - Y)

    Drop and increase: Chattopadhyay et al., WACV 2018 (average drop, increase in confidence). Gain:
    Zhang et al., Opti-CAM, CVIU 2024 (average gain). A difference within ROUNDING, or one on an
    image that its map leaves as it is, counts as none, so a map of ones has no increase in any
    precision; 0 / 0 (Y = 0 or Y = 1) is 0. Raises ValueError for maps outside [0, 1] or of another
    size than x, and for a clean that is not one probability per image.
    """
    _check_unit(maps, (len(x), *x.shape[2:]))
    before = torch.as_tensor(clean).cpu().double().numpy()
    if before.shape != (len(x),) or not (before.min() >= 0 and before.max() <= 1):
        raise ValueError(
            f"clean must be {len(x)} probabilities in [0, 1], one per image; got shape "
            f"{before.shape}."
        )
    shown = x * maps[:, None].to(x)
    p = probabilities(model, shown, batch_size, precision)
    _check_probabilities(p)
    after = p.gather(1, _targets(target, p)[:, None])[:, 0].cpu().double().numpy()
    untouched = (shown == x).flatten(1).all(1).cpu().numpy()
    change = after - before
    change[(np.abs(change) <= statistics.ROUNDING) | untouched] = 0
    drop = np.zeros_like(change)
    gain = np.zeros_like(change)
    np.divide(-change, before, out=drop, where=change < 0)
    np.divide(change, 1 - before, out=gain, where=(change > 0) & (before < 1))
    return {"drop": drop, "increase": (change > 0).astype(float), "gain": gain}


def _check_unit(maps: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(maps.shape) != tuple(shape) or not (
        maps.min() >= 0 and maps.max() <= 1
    ):  # NaN >= 0 is false
        raise ValueError(
            f"maps must have shape {tuple(shape)} and lie in [0, 1]; got {tuple(maps.shape)}, "
            f"{float(maps.min())} to {float(maps.max())}."
        )


RISE_CELLS = 7  # of a mask's grid, a side
RISE_KEEP = 0.5  # the share of its cells that stay


def rise(
    model: nn.Module,
    x: Tensor,
    target: int | Sequence[int] | Tensor,
    ids: Sequence[str],
    masks: int = 2000,
    seed: int = 0,
    batch_size: int = 8,
    precision: str = "float32",
) -> Tensor:
    """sum_n p(x * M_n) M_n / (masks * keep), then normalised: (B, H, W) in [0, 1]; p is the
    target's probability.

    Petsiuk et al., BMVC 2018, sections 3.1 and 3.2: each M_n is a grid of 7 x 7 ones (with
    probability keep = 0.5) and zeros, enlarged bilinearly to 8 times a cell's size and cut to H x W
    at a random shift of up to one cell. A cell's size is rounded up where 7 does not divide H or W,
    so that every shift fits. Every image has masks of its own, which depend on (seed, id) alone:
    drawing them costs little beside the passes (`masks` for each image), and images then err
    independently, as paired statistics assume. target: as in `capture`. The map is a mean over
    masks: its minimum lies far above 0, so its order says more than its values. Raises ValueError
    for masks below 1 and ids that do not fit.
    """
    if masks < 1 or len(ids) != len(x):
        raise ValueError(
            f"masks={masks} must be at least 1, and ids name every image; got {len(ids)} ids for "
            f"{len(x)} images."
        )
    device = next(model.parameters(), x).device
    size = tuple(x.shape[2:])
    shifts_below = [math.ceil(side / RISE_CELLS) + 1 for side in size]
    maps = torch.zeros(len(x), *size, device=device)
    classes = torch.as_tensor(target).expand(len(x)).tolist()
    for i, image in enumerate(x.to(device)):
        draw = _generator(seed, ids[i], 3)
        grids = draw.random((masks, RISE_CELLS, RISE_CELLS)) < RISE_KEEP
        grids = torch.from_numpy(grids.astype(np.float32)).to(device)
        shifts = draw.integers(0, shifts_below, (masks, 2)).tolist()
        for begin in range(0, masks, batch_size):
            some = slice(begin, begin + batch_size)
            drawn = _rise_masks(grids[some], shifts[some], size)
            p = probabilities(model, image * drawn[:, None], batch_size, precision)
            p = p.gather(1, _targets(classes[i], p)[:, None])
            maps[i] += (p[..., None] * drawn).sum(0)
    return normalise(maps / (masks * RISE_KEEP))


def _rise_masks(grids: Tensor, shifts: Sequence[Sequence[int]], size: tuple[int, int]) -> Tensor:
    """Grids (N, cells, cells), enlarged and cut at their shifts: (N, H, W)."""
    (height, width), cells = size, grids.shape[1]
    wide = [(cells + 1) * math.ceil(side / cells) for side in size]
    large = F.interpolate(grids[:, None], size=wide, mode="bilinear", align_corners=False)[:, 0]
    cut = [m[y : y + height, x : x + width] for m, (y, x) in zip(large, shifts, strict=True)]
    return torch.stack(cut)


ROAD_FRACTIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
ROAD_NOISE = 0.01  # standard deviation, in preprocessed units


def imputed(
    x: Tensor,
    removed: Tensor,
    ids: Sequence[str] | None = None,
    seed: int = 0,
    noise: float = ROAD_NOISE,
) -> Tensor:
    """Noisy linear imputation: the removed pixels are filled in from those that are left, (B, C, H,
    W) -> (B, C, H, W). Rong et al., ICML 2022, with their code's weights and borders.

    A removed pixel i becomes the weighted mean of its neighbours j, removed or not,

        sum_j w_ij (u_j - u_i) = 0,    w = 1/6 to the sides, 1/12 across the corners

    (beyond the image there is none), in all channels alike, plus noise * N(0, 1) at removed pixels.
    The noise depends on (seed, id) alone, whatever was removed. x: preprocessed; removed: (B, H, W)
    bool. Solved to 1e-4 in x's units for all images at once, each as if it were alone; see
    `_solved`. Raises ValueError for shapes that do not fit, for an image of which nothing is left,
    and where there is noise but no id for each image.
    """
    if x.ndim != 4 or removed.dtype != torch.bool or removed.shape != (len(x), *x.shape[2:]):
        raise ValueError(
            f"x must be (B, C, H, W) and removed (B, H, W) bool; got {tuple(x.shape)} and "
            f"{removed.dtype} {tuple(removed.shape)}."
        )
    if noise and (ids is None or len(ids) != len(x)):
        raise ValueError(f"noise={noise} is drawn for each image by its id: give {len(x)} ids.")
    if bool(removed.flatten(1).all(1).any()):
        raise ValueError("removed covers all of an image, which leaves nothing to impute from.")
    filled = _solved(x, removed.to(x.device))
    if noise:
        filled += _noise_of(ids, seed, noise, x.shape[1:]).to(x) * removed[:, None].to(x)
    return filled.to(x.dtype)


def _noise_of(ids: Sequence[str], seed: int, scale: float, shape: Sequence[int]) -> Tensor:
    drawn = [_generator(seed, i, 4).standard_normal(tuple(shape), np.float32) for i in ids]
    return scale * torch.from_numpy(np.stack(drawn))


# ---- the solver: conjugate gradients, preconditioned with one multigrid cycle.
#
# Planes are (C, B, H, W), channels-last, so that the images of a batch lie side by side in memory:
# one instruction then works on 8 or 16 of them, and a mask serves all C colours.


@torch.no_grad()
def _solved(x: Tensor, removed: Tensor, tolerance: float = 2e-4) -> Tensor:
    """The linear imputation of (B, C, H, W), float32.

    Six to ten steps do, whatever the mask. `tolerance` bounds the error before the last step, in
    the energy norm, which in two dimensions is about the largest error of a pixel. An image whose
    error is below it stands still while others go on, so its result does not depend on them.
    """
    mask = removed[None].float().contiguous(memory_format=torch.channels_last)
    left = 1 - mask
    known = x.float().transpose(0, 1).contiguous(memory_format=torch.channels_last) * left
    # without their average, as colours near 0 are rounded less
    average = known.sum((2, 3), keepdim=True) / left.sum((2, 3), keepdim=True)
    u = (known - average).mul_(left)
    with torch.backends.cudnn.flags(enabled=False):  # it would round to TF32
        grids = _Grids(mask)
        residual = _around(u).mul_(mask)
        moving = torch.ones_like(average)
        direction = before = None
        for step in range(100):
            if step == 4:  # anew, as its rounding adds up
                residual = _around(u).addcmul_(u, grids.weights[0], value=-1).mul_(mask)
            z = grids.cycle(residual)
            energy = _dot(residual, z)
            near = (energy.amax(0, keepdim=True) < tolerance**2).float()
            if step >= 2 and bool((near >= moving).all()):  # waits for a GPU once a step
                u.addcmul_(z, _wide(moving, z)).add_(average)
                return u.mul_(mask).add_(known).transpose(0, 1)
            if direction is not None:
                z.addcmul_(direction, _wide(energy / before.clamp_min(1e-30) * (1 - near), z))
            direction = z
            change = _around(direction).addcmul_(direction, grids.weights[0], value=-1).mul_(mask)
            length = energy / _dot(direction, change).clamp_max(-1e-30)
            length = torch.where(near > 0, -1.0, length) * moving
            u.addcmul_(direction, _wide(-length, u))
            residual.addcmul_(change, _wide(-length, u))
            moving = moving * (1 - near)
            before = energy
    raise ValueError("x cannot be imputed in 100 steps: does it contain NaN or infinity?")


class _Grids:
    """The equations of removed pixels on grids of 1, 2, 4, ... pixels, for one approximate solution
    by a multigrid cycle.

    Of each grid: masks, which cells are unknown, (1, B, h, w); weights, what an unknown cell's own
    value counts; `_around` gives what its neighbours count. A coarse cell is unknown if three
    quarters of its pixels are. Where it borders on what is known, its weight is that of Galerkin's
    product (the row sum of the finer grid, gathered), so that a correction never overshoots there.
    """

    def __init__(self, mask: Tensor):
        self.masks = [mask]
        self.weights = [_around(torch.ones_like(mask))]
        self.scaled = []  # the masks, over `_refined_sum`
        share = mask
        while max(mask.shape[2:]) > 12:
            self.scaled.append(mask / _refined_sum(mask))
            ground = self.weights[-1] - _around(mask)
            ground = _gathered(ground.mul_(self.scaled[-1]))
            share = F.avg_pool2d(share, 2, ceil_mode=True, count_include_pad=False)
            mask = (share >= 0.75).float()
            self.masks.append(mask)
            self.weights.append(_around(mask) + ground)
        pairs = zip(self.masks, self.weights, strict=True)
        self.inverse = [m / torch.where(m > 0, w, 1.0).clamp_min(1e-6) for m, w in pairs]
        # the coarsest grid, solved exactly
        m, w = mask[0].flatten(1), self.weights[-1][0].flatten(1)
        cells = torch.eye(m.shape[1], device=m.device).view(1, -1, *mask.shape[2:])
        between = _around(cells).view(m.shape[1], m.shape[1])
        own = torch.where(m > 0, w, 1.0) * (1 + 1e-6)
        self.last = torch.linalg.inv(torch.diag_embed(own) - between * m[:, :, None] * m[:, None])

    def cycle(self, residual: Tensor, grid: int = 0) -> Tensor:
        """About the solution for a residual that is 0 at known cells: one Jacobi step, the
        correction of the coarser grid, one Jacobi step.
        """
        mask = self.masks[grid]
        if grid == len(self.masks) - 1:
            flat = torch.einsum("bij,cbj->cbi", self.last, residual.flatten(2))
            return flat.view_as(residual) * mask
        u = residual * self.inverse[grid]
        # at the Jacobi step's result, only the neighbours are left of the residual
        left = _gathered(_around(u).mul_(self.scaled[grid])).mul_(self.masks[grid + 1])
        u.addcmul_(self.scaled[grid], _refined(self.cycle(left, grid + 1), mask))
        return _around(u).add_(residual).mul_(self.inverse[grid])


# The weights of neighbours, and those by which a coarse value is shared out; exact in floats.
_NEIGHBOURS = torch.tensor([[1.0, 2, 1], [2, 0, 2], [1, 2, 1]]) / 16
_BILINEAR = torch.tensor([1.0, 3, 3, 1])[:, None] * torch.tensor([1.0, 3, 3, 1]) / 16


@functools.cache
def _kernels(planes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Both, for each plane; kept, as many calls on small grids would make them again."""
    both = [k.to(device).repeat(planes, 1, 1, 1) for k in (_NEIGHBOURS, _BILINEAR)]
    return both[0], both[1]


def _around(u: Tensor) -> Tensor:
    """3/4 of the weighted sum of the eight neighbours."""
    planes = u.shape[1]
    return F.conv2d(u, _kernels(planes, u.device)[0], padding=1, groups=planes)


def _refined(coarse: Tensor, like: Tensor) -> Tensor:
    """Bilinear interpolation, to the finer grid of `like`; at borders times `_refined_sum`."""
    planes = coarse.shape[1]
    kernel = _kernels(planes, coarse.device)[1]
    fine = F.conv_transpose2d(coarse, kernel, stride=2, padding=1, groups=planes)
    return fine[:, :, : like.shape[2], : like.shape[3]]


def _gathered(fine: Tensor) -> Tensor:
    """The transpose of `_refined`."""
    planes, height, width = fine.shape[1:]
    if height % 2 or width % 2:
        fine = F.pad(fine, (0, width % 2, 0, height % 2))
    kernel = _kernels(planes, fine.device)[1]
    return F.conv2d(fine, kernel, stride=2, padding=1, groups=planes)


def _refined_sum(like: Tensor) -> Tensor:
    """What `_refined` makes of ones, as it lacks a next cell at borders: (1, 1, h, w)."""
    ones = torch.ones(1, 1, *(-(-side // 2) for side in like.shape[2:]), device=like.device)
    return _refined(ones, like)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((2, 3), keepdim=True)


def _wide(numbers: Tensor, like: Tensor) -> Tensor:
    """A number for each plane, as a row of pixels: several times faster to multiply by."""
    row = numbers.expand(*like.shape[:2], 1, like.shape[3])
    return row.contiguous(memory_format=torch.channels_last)


def road(
    model: nn.Module,
    x: Tensor,
    maps: Mapping[str, Tensor],
    target: int | Sequence[int] | Tensor | Callable,
    ids: Sequence[str],
    fractions: Sequence[float] = ROAD_FRACTIONS,
    seed: int = 0,
    batch_size: int = 8,
    precision: str = "float32",
) -> dict[str, dict[str, Tensor]]:
    """ROAD, remove and debias (Rong et al., ICML 2022): what becomes of the target when a share of
    the pixels is removed and imputed. {"most": {method: (B, F)}, "least": {...}}: most and least
    relevant pixels first.

    x: (B, C, H, W), preprocessed; maps: name -> (B, H, W); target: (B,), whose probability is
    measured, or a target function. round(fraction * H * W) pixels are removed, in the order of
    `pixel_rank`, and filled in by `imputed`, with one draw of noise for each image. Equal pictures
    (methods that agree on what to remove) are imputed and scored once. Raises ValueError for
    fractions outside (0, 1), maps of another size than x, and maps that contain NaN.
    """
    if not len(fractions) or not all(0 < f < 1 for f in fractions):
        raise ValueError(f"fractions={tuple(fractions)} must lie between 0 and 1, ends excluded.")
    shape = (len(x), *x.shape[2:])
    for name, m in maps.items():
        if tuple(m.shape) != shape:
            raise ValueError(f"maps[{name!r}] must have shape {shape}; got {tuple(m.shape)}.")
    device = next(model.parameters(), x).device
    x = x.to(device)
    if callable(target) and len(x) > 1 and batch_size > 1 and _independent(model, x):
        _check_own_rows(model, x[:2], target)
    classes = None if callable(target) else _one_each(target, len(x)).to(device)

    ranks = torch.stack([pixel_rank(m, ids, seed) for m in maps.values()], 1)
    pixels = shape[1] * shape[2]
    counts = [min(max(round(f * pixels), 1), pixels - 1) for f in fractions]
    ends = [(0, k) for k in counts] + [(pixels - k, pixels) for k in counts]
    first = {}  # the pictures, and where each is asked for first
    places = []
    for i, orders in enumerate(ranks.cpu().numpy()):
        for m, order in enumerate(orders):
            for begin, end in ends:
                removed = np.packbits((order >= begin) & (order < end))
                picture = (end - begin, i, removed.tobytes())
                places.append(picture)
                first.setdefault(picture, (i, m, begin, end))
    ledger.asked(len(places))

    # alike shares side by side: they need equally many steps of the solver
    first = dict(sorted(first.items(), key=lambda item: item[0][:2]))
    jobs = torch.tensor(list(first.values())).T.to(device)
    ranks = ranks.to(device)
    noise = _noise_of(ids, seed, ROAD_NOISE, x.shape[1:]).to(device)
    values = []
    for image, order, begin, end in (part.unbind() for part in jobs.split(batch_size, dim=1)):
        rank = ranks[image, order]
        removed = (rank >= begin.view(-1, 1, 1)) & (rank < end.view(-1, 1, 1))
        pictures = imputed(x[image], removed, noise=0) + noise[image] * removed[:, None]
        asked = target if callable(target) else classes[image]
        values.append(_values(model, pictures, asked, batch_size, precision))
    found = torch.cat(values).cpu()
    _check_probabilities(found)
    found = dict(zip(first, found.tolist(), strict=True))
    curves = torch.tensor([found[picture] for picture in places])
    most, least = curves.view(len(x), len(maps), 2, -1).unbind(2)
    return {
        "most": dict(zip(maps, most.unbind(1), strict=True)),
        "least": dict(zip(maps, least.unbind(1), strict=True)),
    }


def road_score(curves: Mapping[str, Mapping[str, Tensor]]) -> dict[str, np.ndarray]:
    """mean over fractions of (least - most), of what `road` returns: {method: (B,)} in [-1, 1], 0
    for a map that knows nothing, larger is better. pytorch-grad-cam's ROADCombined is half of it.
    """
    most, least = curves["most"], curves["least"]
    return {name: (least[name] - most[name]).double().mean(1).numpy() for name in most}


def gini(maps: Tensor) -> np.ndarray:
    """Sparseness: 1 - 2 sum_k m_(k) / sum(m) * (N - k + 1/2) / N, over the absolute values in
    ascending order, k = 1 to N: (B, H, W) -> (B,) in [0, 1).

    0 if all pixels are equal (also if all are 0), near 1 if one pixel holds everything. Hurley and
    Rickard, IEEE Trans. Inf. Theory 2009, table II; for attributions Chalasani et al., ICML 2020.
    Raises ValueError for NaN.
    """
    if bool(maps.isnan().any()):
        raise ValueError("maps contain NaN, which has no place in an order.")
    ordered = maps.flatten(1).abs().cpu().double().sort(1).values.numpy()
    count = ordered.shape[1]
    weights = (count - np.arange(1, count + 1) + 0.5) / count
    total = ordered.sum(1)
    found = 1 - 2 * (ordered @ weights) / np.where(total > 0, total, 1)
    return np.where(total > 0, found.clip(0), 0.0)


def max_sensitivity(
    explain: Callable[[Tensor], Tensor],
    x: Tensor,
    ids: Sequence[str],
    radius: float = 0.02,
    samples: int = 10,
    seed: int = 0,
) -> np.ndarray:
    """max over d of |explain(x + d) - explain(x)| / |explain(x)|, Euclidean norms: (B,), smaller is
    steadier. Yeh et al., NeurIPS 2019, definition 2, over the map's norm as captum's
    `sensitivity_max` has it (a map of norm 0 is left undivided).

    explain: images (B, C, H, W) -> maps (B, h, w), called samples + 1 times. Each d is uniform in
    [-radius, radius] at every value of x and depends on (seed, id) alone. Raises ValueError for a
    radius or samples that are not positive, ids that do not fit, and maps that contain NaN.
    """
    if radius <= 0 or samples < 1 or len(ids) != len(x):
        raise ValueError(
            f"radius={radius} and samples={samples} must be positive, and ids name every image; "
            f"got {len(ids)} ids for {len(x)} images."
        )
    draws = [_generator(seed, i, 5) for i in ids]
    clean = explain(x).detach().flatten(1).double().cpu()
    size = clean.norm(dim=1)
    size = torch.where(size > 0, size, 1.0)
    worst = torch.zeros(len(x), dtype=torch.float64)
    for _ in range(samples):
        d = np.stack([draw.random(tuple(x.shape[1:]), np.float32) for draw in draws])
        d = radius * (2 * torch.from_numpy(d).to(x) - 1)
        change = explain(x + d).detach().flatten(1).double().cpu() - clean
        worst = torch.maximum(worst, change.norm(dim=1) / size)
    if bool(worst.isnan().any()):
        raise ValueError("explain returns maps that contain NaN.")
    return worst.numpy()


def agreement(table: pd.DataFrame) -> pd.DataFrame:
    """Kendall's tau-b between the rankings of methods that metrics give: (methods x metrics) ->
    (metrics x metrics) in [-1, 1].

    table: a method's mean in each metric; turn the sign of those where less is better. 1: one
    order; 0: unrelated; NaN for a metric in which all methods are equal. A pair of metrics is
    compared over the methods that have both. From SciPy. Raises ValueError below two methods.
    """
    from scipy.stats import kendalltau

    if len(table) < 2:
        raise ValueError(f"table has {len(table)} methods: a ranking needs two.")
    columns = table.astype(float)
    found = pd.DataFrame(index=columns.columns, columns=columns.columns, dtype=float)
    for a in columns:
        for b in columns:
            both = columns[a].notna() & columns[b].notna()
            found.loc[a, b] = kendalltau(columns.loc[both, a], columns.loc[both, b]).statistic
    return found


# ----------------------------------------------------------------------------------- 9 localisation


def _check_masks(maps: Tensor, masks: Tensor) -> None:
    normalise(maps)  # refuses NaN, infinity and negative values, whose sums and ranks mean nothing
    if not isinstance(masks, Tensor) or maps.shape != masks.shape or masks.dtype != torch.bool:
        got = (
            f"{masks.dtype} {tuple(masks.shape)}"
            if isinstance(masks, Tensor)
            else type(masks).__name__
        )
        raise ValueError(
            f"masks must be boolean and of the maps' shape {tuple(maps.shape)}; got {got}."
        )
    if not bool(masks.flatten(1).any(1).all()):
        raise ValueError(
            "masks: at least one mask is empty; an image without an object cannot be localised. "
            "Leave it out."
        )


def pointing_game(maps: Tensor, masks: Tensor, tolerance: int = 0) -> np.ndarray:
    """1 where the map's maximum lies in the mask, or at most `tolerance` pixels from it, else 0:
    (B, H, W) twice -> (B,).

    Zhang et al., ECCV 2016 (their tolerance: 15 px), who say nothing of a maximum that several
    pixels share (a coarse map whose peak is at the border has one: enlarged, it is flat there).
    Here it counts as the share of these pixels that hit, which is the expected hit when one of them
    is drawn. Taking the first prefers the upper left; a hit if any is in the mask lets a constant
    map always hit; only if all are punishes coarse maps. So a constant map gets the mask's share of
    the image, which is chance, and a map that is zero everywhere points nowhere: 0. Raises
    ValueError for an empty mask, and for maps that are not finite, negative somewhere, or of
    another size than the masks.
    """
    from scipy.ndimage import distance_transform_edt

    _check_masks(maps, masks)
    hits = []
    for m, mask in zip(maps.cpu().numpy(), masks.cpu().numpy(), strict=True):
        near = distance_transform_edt(~mask) <= tolerance
        hits.append(float(near[m == m.max()].mean()) if m.max() > 0 else 0.0)
    return np.array(hits)


def energy_in_mask(maps: Tensor, masks: Tensor) -> np.ndarray:
    """sum(map * mask) / sum(map), in [0, 1]; zero for a map that is zero everywhere. Wang et al.,
    CVPR-W 2020, section 4.4. Raises ValueError as `pointing_game` does.
    """
    _check_masks(maps, masks)
    maps = maps.cpu().double()  # on the CPU, as Apple's GPUs have no float64
    total = maps.sum((1, 2))
    inside = (maps * masks.cpu()).sum((1, 2))
    return torch.where(total > 0, inside / total.clamp_min(1e-300), 0.0).numpy()


def average_precision(maps: Tensor, masks: Tensor) -> np.ndarray:
    """Area under precision and recall of the pixels, ranked by attribution, without a threshold:
    (B,) in (0, 1]. From scikit-learn. Of equal values all count at once, so a constant map, zero
    included, gets the mask's share of the image. Raises ValueError as `pointing_game` does.
    """
    from sklearn.metrics import average_precision_score

    _check_masks(maps, masks)
    pairs = zip(masks.flatten(1).cpu().numpy(), maps.flatten(1).cpu().numpy(), strict=True)
    return np.array([average_precision_score(mask, m) for mask, m in pairs])


def iou(maps: Tensor, masks: Tensor, threshold: float) -> np.ndarray:
    """|R and mask| / |R or mask|, R = the pixels where map / max(map) >= threshold: (B, H, W) twice
    -> (B,) in [0, 1].

    A map that is zero everywhere has an empty R: 0. Raises ValueError for a threshold outside (0,
    1], and as `pointing_game` does.
    """
    _check_masks(maps, masks)
    region = _above(maps, threshold)
    masks = masks.to(maps.device)
    both = (region & masks).sum((1, 2)).cpu().numpy()
    either = (region | masks).sum((1, 2)).cpu().numpy()
    return both / either


def _above(maps: Tensor, threshold: float) -> Tensor:
    if not isinstance(threshold, Real) or not 0 < threshold <= 1:
        raise ValueError(
            f"threshold={threshold!r} must lie in (0, 1]: it is compared with map / max(map)."
        )
    return normalise(maps) >= threshold


THRESHOLDS = tuple(k / 20 for k in range(1, 20))  # 0.05, 0.10, ..., 0.95


def best_threshold(maps: Tensor, masks: Tensor) -> float:
    """Of THRESHOLDS the one with the highest mean `iou`, to be chosen on validation images; of
    equal ones the first.
    """
    return _best_of(_overlaps(maps, masks))


def _overlaps(maps: Tensor, masks: Tensor) -> np.ndarray:
    """`iou` at each of THRESHOLDS: (B, 19)."""
    return np.stack([iou(maps, masks, threshold) for threshold in THRESHOLDS], 1)


def _best_of(overlaps: np.ndarray) -> float:
    return THRESHOLDS[int(overlaps.mean(0).argmax())]


def box_iou(
    maps: Tensor, boxes: Sequence[Sequence[Sequence[float]]], threshold: float
) -> np.ndarray:
    """IoU of the box around the largest region where map / max(map) >= threshold with the best of
    the image's boxes: (B,).

    boxes: for each image a list of [x0, y0, x1, y1] in pixels, x1 and y1 exclusive, as in the
    manifest of notebook 01. Regions are connected over edges and corners; of equally large ones the
    first in reading order counts. A map that is zero everywhere has none: 0. BoxAcc is the share of
    images with box_iou >= 0.5 (Choe et al., CVPR 2020, section 4; their MaxBoxAcc takes the best
    threshold, here the threshold is given). Raises ValueError for an image without a box, boxes
    that are empty or reach beyond the map, a threshold outside (0, 1], and maps as in
    `pointing_game`.
    """
    regions = _above(maps, threshold).cpu().numpy().astype(np.uint8)
    height, width = regions.shape[1:]
    if len(boxes) != len(maps):
        raise ValueError(
            f"boxes has {len(boxes)} entries for {len(maps)} maps: give a list of boxes for each "
            "image."
        )
    found = []
    for region, own in zip(regions, boxes, strict=True):
        b = np.asarray(own, dtype=float).reshape(-1, 4)
        ordered = (b[:, :2] >= 0).all() and (b[:, :2] < b[:, 2:]).all()
        if not b.size or not ordered or not (b[:, 2:] <= [width, height]).all():
            raise ValueError(
                f"boxes={own} must be [x0, y0, x1, y1] with x0 < x1 <= {width} and "
                f"y0 < y1 <= {height}."
            )
        box = _box_of_largest(region)
        found.append(0.0 if box is None else _best_overlap(box, b))
    return np.array(found)


def _box_of_largest(region: np.ndarray) -> np.ndarray | None:
    """[x0, y0, x1, y1] around the largest connected part of a region (H, W); None if empty."""
    from skimage.measure import label, regionprops  # connected parts, numbered in reading order

    parts = regionprops(label(region, connectivity=2))
    if not parts:
        return None
    y0, x0, y1, x1 = max(parts, key=lambda part: part.area).bbox  # of equal ones the first
    return np.array([x0, y0, x1, y1])


def _best_overlap(box: np.ndarray, boxes: np.ndarray) -> float:
    """The highest IoU of a box, (4,), with others, (N, 4)."""
    overlap = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    both = overlap.clip(0).prod(1)
    area = (box[2:] - box[:2]).prod()
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return float((both / (area + areas - both)).max())


# ---------------------------------------------------------------------------------------- 10 sanity


def rows_to_compare(run: runs.Run) -> pd.DataFrame:
    """The images on which notebook 03 compares maps: n_images `measurable` ones of
    `datasets.to_look_at`.

    Prints what was left out. Raises ValueError when no image is left.
    """
    s = run.settings
    rows, left_out = measurable(
        run.model,
        datasets.to_look_at(run.frame),
        n=s.n_images,
        seed=s.seed,
        batch_size=s.batch_size,
        strict=s.strict,
        size=run.how,
    )
    run.report_left_out(left_out)
    if rows.empty:
        raise ValueError(
            f"dataset={s.dataset!r}: no image is left to compare maps on, see above. "
            "Check dataset and weights."
        )
    return rows


def rank_correlation(a: Tensor, b: Tensor) -> np.ndarray:
    """Spearman's rank correlation of two maps over their positions: (B, h, w) twice -> (B,).

    In [-1, 1], and 0 where either map is constant, which has no ranks. From SciPy. Raises
    ValueError for maps of different shapes.
    """
    from scipy.stats import spearmanr

    if a.shape != b.shape:
        raise ValueError(
            f"a and b must have one shape; got {tuple(a.shape)} and {tuple(b.shape)}. "
            "Enlarge both to one size first."
        )
    found = []
    for p, q in zip(a.cpu().double().numpy(), b.cpu().double().numpy(), strict=True):
        constant = np.ptp(p) == 0 or np.ptp(q) == 0
        found.append(0.0 if constant else spearmanr(p, q, axis=None).statistic)
    return np.array(found)


def coherence(G: Tensor) -> np.ndarray:
    """sum_k |sum_ij G_k(i, j)| / sum_k sum_ij |G_k(i, j)|: (B, C, h, w) -> (B,) in [0, 1].

    How much of a gradient is left when each channel is averaged, as Grad-CAM does: 1 if every
    channel has one sign everywhere, near 0 if positive and negative values cancel. 0 for a gradient
    that is zero everywhere.
    """
    kept = G.float().sum((2, 3)).abs().sum(1)
    all_of_it = G.float().abs().sum((1, 2, 3))
    return (kept / all_of_it.clamp_min(1e-30)).cpu().numpy()


def min_max(maps: Tensor) -> Tensor:
    """(m - min m) / (max m - min m), per image; (B, h, w) -> (B, h, w) in [0, 1].

    A map that is constant, for which this is 0 / 0, becomes zero. Many tools scale maps so.
    `normalise` divides by the maximum instead, and a smallest value above 0 stays above 0.
    """
    low = maps.amin((1, 2), keepdim=True)
    high = maps.amax((1, 2), keepdim=True)
    scaled = (maps - low) / (high - low).clamp_min(1e-12)
    return torch.where(high > low, scaled, torch.zeros_like(maps))


def hybrid_min_max(a: Tensor, b: Tensor, alpha: float, size: tuple[int, int]) -> Tensor:
    """The product of `hybrid`, both maps scaled by `min_max` before and after they are enlarged to
    size = (H, W): (B, h, w) and (B, h', w') -> (B, H, W) in [0, 1].

    The product is 0 where either map has its smallest value, however high that value was.
    """
    a = min_max(enlarge(min_max(a), size))
    b = min_max(enlarge(min_max(b), size))
    return hybrid(a, b, alpha)


def areas_by_enlarging(
    model: nn.Module,
    x: Tensor,
    maps: Tensor,
    target: Tensor,
    ids: Sequence[str],
    start: Tensor,
    end: Tensor,
    seed: int = 0,
    steps: int = 14,
    batch_size: int = 8,
) -> pd.DataFrame:
    """Insertion AUC, deletion AUC and `tie_fraction` of one map enlarged in three ways.

    A table for `compare`: its methods are "nearest", "bilinear" and "bicubic", its metrics
    "insertion", "deletion" and "ties".

    maps: (B, h, w), enlarged to the size of x: (B, C, H, W). The rest is as in `faithfulness`.
    """
    size = (x.shape[2], x.shape[3])
    large = {mode: enlarge(maps, size, mode) for mode in ("nearest", "bilinear", "bicubic")}
    curves = faithfulness(model, x, large, target, ids, start, end, seed, steps, batch_size)
    tables = []
    for mode, enlarged in large.items():
        values = {metric: auc(curves[metric][mode]) for metric in ("insertion", "deletion")}
        values["ties"] = tie_fraction(enlarged)
        for metric, value in values.items():
            table = pd.DataFrame({"image": ids, "method": mode, "metric": metric, "value": value})
            tables.append(table.assign(baseline=""))
    return pd.concat(tables, ignore_index=True)


def similarity(a: Tensor, b: Tensor) -> dict[str, np.ndarray]:
    """How alike two maps of the same image are, (B, H, W) in [0, 1] twice: three arrays (B,).

    "spearman": their `rank_correlation`. "constant": whether either map is constant, to be counted.
    "ssim": Wang et al., IEEE TIP 2004, data_range = 1 and 7 x 7 windows, from scikit-image; two
    constant maps of one value have 1. Both measures as Adebayo et al., NeurIPS 2018, use them.
    Raises ValueError for maps of different shapes, outside [0, 1] or smaller than 7 x 7.
    """
    from skimage.metrics import structural_similarity

    _check_unit(a, tuple(a.shape))
    _check_unit(b, tuple(a.shape))
    pairs = list(zip(a.cpu().double().numpy(), b.cpu().double().numpy(), strict=True))
    constant = np.array([np.ptp(p) == 0 or np.ptp(q) == 0 for p, q in pairs])
    ssim = [structural_similarity(p, q, data_range=1) for p, q in pairs]
    return {"spearman": rank_correlation(a, b), "ssim": np.array(ssim), "constant": constant}


def randomise_cascade(model: nn.Module, seed: int = 0) -> Iterator[tuple[str, nn.Module]]:
    """The network, more and more of it re-initialised from the classifier downward: (stage, copy of
    the model), in turn.

    Each copy has the named stage and all behind it re-initialised, the last one everything (Adebayo
    et al., NeurIPS 2018, cascading randomisation). A stage is a submodule with weights; plain
    `nn.Sequential` and lists are opened, and one with vectors only (batch norm) belongs to the
    stage in front of it. For ResNet-18: fc, layer4.1, layer4.0, ..., layer1.0, conv1, which are
    ten. Order is that of definition, which in torchvision's classifiers is that of execution. Every
    layer gets PyTorch's own default initialisation (its `reset_parameters`; batch norm also forgets
    its running statistics), not the scheme its architecture was trained from, with a seed made of
    `seed` and its name; a bare parameter without such a method (a class token) is drawn with
    standard deviation 0.02. The caller's model, its random state, frozen parameters, modes and
    memory format stay as they are.
    """
    device = next(model.parameters()).device
    work = copy.deepcopy(
        _unwrap(model)
    ).cpu()  # drawn on the CPU, so every device gets the same values
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


# -------------------------------------------------------------------------------------- 11 choosing

# Which fusion is the best one? Every candidate is measured on validation images; the table of all
# of them decides.


class Cell(NamedTuple):
    """One fusion of the sweep: a pair of layers, a rule of FUSIONS, and the weight alpha of
    Grad-CAM.

    pair: "layer3 × layer1", where Grad-CAM looks and where LayerCAM looks; either may be several
    layers, joined by "+". alpha 0 and 1 are the ends: LayerCAM alone and Grad-CAM alone.
    """

    pair: str
    rule: str
    alpha: float

    @property
    def coarse(self) -> str:
        """Where Grad-CAM looks."""
        return self.pair.split(" × ")[0]

    @property
    def fine(self) -> str:
        """Where LayerCAM looks."""
        return self.pair.split(" × ")[1]

    def __str__(self) -> str:
        return f"{self.pair}, {self.rule}, α = {self.alpha:g}"


def layer_candidates(ladder: Sequence[str]) -> tuple[list[str], list[str]]:
    """(where Grad-CAM may look, where LayerCAM may look), from the stages up to the deep layer, the
    finest first.

    Grad-CAM: the deep layer, the stage before it, or both. LayerCAM: any stage before the deep
    layer but the first (the stem, whose few channels see edges and little else), or the last two of
    them together.
    """
    *finer, deep = ladder
    coarse = [deep]
    if finer:
        coarse += [finer[-1], f"{finer[-1]}+{deep}"]
    fine = finer[1:] or list(ladder[:1])
    if len(fine) > 1:
        fine.append("+".join(fine[-2:]))
    return coarse, fine


def given_choice(run: runs.Run) -> dict:
    """What a run's settings fix of the choice: {name: value} of shallow_layer, rule and alpha where
    they are not "auto".

    Raises ValueError for a shallow_layer that the network does not have.
    """
    named = {
        "shallow_layer": run.settings.shallow_layer,
        "rule": run.settings.rule,
        "alpha": run.settings.alpha,
    }
    given = {name: value for name, value in named.items() if value != "auto"}
    if "shallow_layer" in given:
        known = layer_shapes(run.model, run.blank)
        for name in given["shallow_layer"].split("+"):
            if name not in known:
                raise ValueError(
                    f"shallow_layer={name!r} is no layer of {run.info['arch']} that has a map. "
                    f"{nearest(name, list(known))}"
                )
    if "alpha" in given:
        given["alpha"] = round(float(given["alpha"]), 6)
    return given


SHIPPED = HOME / "results" / "reference" / "full" / "fusion.json"


def shipped_choice(ladder: Sequence[str]) -> Cell:
    """What the reference run that ships with the repository chose, for a network with these stages,
    the finest first: its layers lie as many stages before the last one as they do there.
    """
    shipped = json.loads(SHIPPED.read_text("utf-8"))
    layers = {}
    for side, stages_back in shipped["stages_back"].items():
        names = [ladder[max(0, len(ladder) - 1 - back)] for back in stages_back]
        layers[side] = "+".join(dict.fromkeys(names))
    pair = f"{layers['coarse']} × {layers['shallow']}"
    return Cell(pair, shipped["rule"], float(shipped["alpha"]))


def rows_to_choose_on(run: runs.Run) -> tuple[pd.DataFrame, bool]:
    """(the images on which a fusion is chosen, whether they are good for that), half as many as
    n_images.

    They are `measurable` ones of the validation split. Without such a split, and with fewer than 40
    images, nothing is chosen on them: False. Then four images of the whole set at most are enough
    to look at. Prints what was left out. Raises ValueError when no image is left.
    """
    s = run.settings
    validation = datasets.split_rows(run.frame, "val")
    chosen_here = not validation.empty
    half = (s.n_images + 1) // 2
    rows, left_out = measurable(
        run.model,
        validation if chosen_here else datasets.to_look_at(run.frame),
        n=half if chosen_here else min(half or 4, 4),
        seed=s.seed,
        batch_size=s.batch_size,
        precision=s.precision,
        strict=s.strict,
        size=run.how,
    )
    run.report_left_out(left_out)
    if rows.empty:
        raise ValueError(
            f"dataset={s.dataset!r}: no image is left to choose a fusion on, see above. "
            "Check dataset and weights."
        )
    return rows, chosen_here


def deciding_baseline(baseline: str, rows: pd.DataFrame) -> str:
    """The first of the baselines in "twin,rise" that these images allow: twin needs a twin of every
    image.
    """
    twins = bool((rows["twin"] != "").all())
    return next((name for name in words(baseline) if name != "twin" or twins), "rise")


def factors(
    model: nn.Module, rows: pd.DataFrame, pairs: Sequence[str], size: networks.Size
) -> dict[str, tuple[Tensor, Tensor]]:
    """Both factors of each pair of layers, from one capture: {pair: (Grad-CAM, LayerCAM)}, (B,
    H, W) in [0, 1].

    rows: as `measurable` returns them, with the class to explain as target.
    """
    device = next(model.parameters()).device
    layers = []
    for pair in pairs:
        layers += pair.replace(" × ", "+").split("+")
    x = datasets.load_batch(rows, size=size).to(device)
    captured = capture(model, x, list(dict.fromkeys(layers)), rows["target"].tolist())

    @functools.cache  # pairs share their factors
    def enlarged(cam: Callable, names: str) -> Tensor:
        return cam_at(captured, cam, names, tuple(x.shape[2:]))

    found = {}
    for pair in pairs:
        coarse, fine = pair.split(" × ")
        found[pair] = (enlarged(grad_cam, coarse), enlarged(layer_cam, fine))
    return found


def measure_cells(
    model: nn.Module,
    rows: pd.DataFrame,
    cells: Sequence[Cell],
    size: networks.Size,
    baseline: str,
    steps: int = 28,
    seed: int = 0,
    batch_size: int = 8,
    precision: str = "float32",
    block: int = 0,
    count: int = 0,
    known: dict[tuple[int, int], float] | None = None,
) -> list[dict]:
    """Areas under the insertion and the deletion curve of every cell's map: one record for each
    cell and image.

    An end is the same map whatever the rule, and is measured once. baseline: as in `baselines`.
    block: see `faithfulness`. count: of the points between a curve's ends, see `few_points`; 0 is
    all. known: see `perturbation_curves`.
    """
    device = next(model.parameters()).device
    both = factors(model, rows, list(dict.fromkeys(cell.pair for cell in cells)), size)
    maps = {_map_key(cell): hybrid(*both[cell.pair], cell.alpha, rule=cell.rule) for cell in cells}
    x = datasets.load_batch(rows, size=size).to(device)
    twin = datasets.load_batch(rows, "twin", size).to(device) if baseline == "twin" else None
    start, end = baselines(x, baseline, twin, networks.as_preprocessing(size))
    target = torch.tensor(rows["target"].tolist(), device=device)
    ids = list(rows["id"])
    steps = steps_of(steps, x, block)
    points = few_points(steps, count) if count else None
    known = {} if known is None else known
    known |= values_of(rows, x, target, twin)
    settings = (seed, steps, batch_size, precision, block, points, known)
    curves = faithfulness(model, x, maps, target, ids, start, end, *settings)
    records = []
    for cell in cells:
        insertion = auc(curves["insertion"][_map_key(cell)], points).tolist()
        deletion = auc(curves["deletion"][_map_key(cell)], points).tolist()
        for k, image in enumerate(ids):
            place = {"image": image, "layer": cell.pair, "rule": cell.rule, "alpha": cell.alpha}
            place["points"] = len(points) if points else steps + 1
            records.append({**place, "insertion": insertion[k], "deletion": deletion[k]})
    return records


def _map_key(cell: Cell) -> tuple:
    """What tells a cell's map: at an end one layer alone, else all of it."""
    if cell.alpha == 0:
        return cell.fine, cell.alpha
    if cell.alpha == 1:
        return cell.coarse, cell.alpha
    return tuple(cell)


def sweep(
    run: runs.Run,
    rows: pd.DataFrame,
    cells: Sequence[Cell],
    block: int = 0,
    count: int = 0,
    beside: Mapping[Cell, str] | None = None,
) -> pd.DataFrame:
    """Every cell on every image, two images at a time; what is finished is kept in the cache, under
    all that determines it: code, network, image files, cells and settings.

    Returns a table with image, layer (the pair), rule, alpha, kind, baseline, points (of a curve,
    its ends among them; count as in `measure_cells`), insertion, deletion, and the criterion,
    insertion - deletion. kind: "fusion", or "end" for one map alone. beside: further cells, {cell:
    its kind}, which are measured and cannot be chosen.
    """
    s = run.settings
    beside = beside or {}
    cells = list(dict.fromkeys([*cells, *beside]))
    how = {
        "baseline": deciding_baseline(s.baseline, rows),
        "steps": s.steps,
        "seed": s.seed,
        "batch_size": s.batch_size,
        "precision": s.precision,
        "block": block,
        "count": count,
    }
    code = runs.code_hash(*CAMS.values(), *FUSIONS.values())
    label = f"{len(cells)} maps, {f'blocks of {block}' if block else f'{count or s.steps} points'}"
    records = []
    for begin in tqdm(range(0, len(rows), 2), desc=label):
        part = rows[begin : begin + 2]
        scored = {
            "arch": run.info["arch"],
            "weights": run.info["sha256"] or run.info["weights"],
            "how": run.how,
            "head": run.info["head"],
            "precision": s.precision,
            "batch_size": s.batch_size,
        }
        scored = score_key(scored, part, run.device)
        measure = functools.partial(measure_cells, run.model, part, cells, run.how, **how)
        key = {"kind": "sweep", "code": code, "cells": cells, "ids": list(part["id"])}
        records += runs.cached(run.data / "cache", {**key, **scored, **how}, measure, scored)
    table = pd.DataFrame(records)
    kinds = {cell: "end" if cell.alpha in (0, 1) else "fusion" for cell in cells} | beside
    each = zip(table["layer"], table["rule"], table["alpha"], strict=True)
    table["kind"] = [kinds[cell] for cell in each]
    table["baseline"] = how["baseline"]
    table["criterion"] = table["insertion"] - table["deletion"]
    about = ["image", *PLACE, "kind", "baseline", "points"]
    return table[[*about, "insertion", "deletion", "criterion"]]


def score_key(network: Mapping, rows: pd.DataFrame, device: torch.device) -> dict:
    """What decides the value of a picture that is made of these rows' images: what is said of the
    network (arch, weights, how, head, precision, batch_size), the image files, what is asked of
    them and what `measurable` found, code, versions and device.
    """
    files = [sha256(file) if file else "" for file in [*rows["file"], *rows["twin"]]]
    key = {name: network[name] for name in SCORED_BY} | {"code": runs.code_hash()}
    key["how"] = dataclasses.asdict(network["how"])
    for column in ("target", "p_image", "p_twin"):
        if column in rows:
            key[column] = rows[column].tolist()
    return {**key, "files": files, **runs.numerics(device)}


SCORED_BY = ("arch", "weights", "head", "precision", "batch_size")


# How many points between the ends of a curve (0: all of them) a candidate is measured on, and which
# share of the candidates gets there.
RUNGS = ((2, 1.0), (6, 1 / 4), (0, 1 / 24))
FINALISTS = 6  # at least, who are measured on all points


def successive_halving(
    candidates: Sequence, measure: Callable[[list, int], pd.Series], rungs=RUNGS
) -> list:
    """The best of many candidates for the price of a few: the finalists, best first.

    measure(candidates, points) gives their mean criterion, a series in the order of its argument.
    All are measured on few points, the best of them on more, and the last few on all (0), as RUNGS
    has it; FINALISTS or fewer are measured on all points at once. Of equal ones, to six decimals,
    the first comes first. Jamieson and Talwalkar, AISTATS 2016, with points of a curve in the place
    of training time.
    """
    left = list(candidates)
    for points, share in rungs if len(left) > FINALISTS else rungs[-1:]:
        left = left[: max(FINALISTS, math.ceil(share * len(candidates)))]
        means = measure(left, points)
        order = np.argsort(-means.to_numpy().round(6), kind="stable")
        left = [left[k] for k in order]
    return left


def search(
    run: runs.Run, rows: pd.DataFrame, cells: Sequence[Cell], beside: Mapping[Cell, str], **given
) -> pd.DataFrame:
    """The table of a choice among cells by `successive_halving`: `sweep`'s rows of every rung.

    Where there are more than FINALISTS, all cells are measured on the first rung's points, which
    shows the whole surface, and the better fusions on more. The finalists, the ends and what stands
    beside are measured on all points. given: what may be chosen, see `allowed`.
    """
    ends = [cell for cell in cells if cell.alpha in (0, 1)]
    tables = []

    def measure(left: list[Cell], points: int) -> pd.Series:
        further = beside if not (tables and points) else {}
        also = ends if not points else [] if tables else cells
        tables.append(sweep(run, rows, [*left, *also], count=points, beside=further))
        return tables[-1].groupby(PLACE)["criterion"].mean()[[tuple(cell) for cell in left]]

    successive_halving(allowed(cells, **given), measure)
    table = pd.concat(tables)  # few steps can make two rungs alike
    return table.drop_duplicates(["image", *PLACE, "points"], keep="last", ignore_index=True)


PLACE = ["layer", "rule", "alpha"]  # the columns that tell a cell


def rows_of(table: pd.DataFrame, cell: Cell) -> pd.DataFrame:
    """The rows of a table that belong to one cell, one for each image: those measured on most
    points.
    """
    right = (table["layer"] == cell.pair) & (table["rule"] == cell.rule)
    own = table[right & (table["alpha"] == cell.alpha)]
    return own[own["points"] == own["points"].max()]


def allowed(
    cells: Sequence[Cell],
    shallow_layer: str = "auto",
    rule: str = "auto",
    alpha: float | str = "auto",
) -> list[Cell]:
    """The cells that may be chosen, in a fixed order: by rule, as in FUSIONS, then by layers, then
    by weight.

    These are the fusions, narrowed to what is given: where LayerCAM looks, the rule, the weight. An
    end is among them only if its weight is given. Raises ValueError where there is no such cell.
    """
    left = []
    for cell in dict.fromkeys(cells):
        fits = shallow_layer in ("auto", cell.fine) and rule in ("auto", cell.rule)
        if fits and (alpha == cell.alpha or (alpha == "auto" and cell.alpha not in (0, 1))):
            left.append(cell)
    if not left:
        asked = f"shallow_layer={shallow_layer!r}, rule={rule!r}, alpha={alpha!r}"
        raise ValueError(f"no cell has {asked}: it is not among those that are measured.")
    rules = [*FUSIONS, *sorted({cell.rule for cell in left} - set(FUSIONS))]
    return sorted(left, key=lambda cell: (rules.index(cell.rule), cell.pair, cell.alpha))


def candidates(table: pd.DataFrame, **given) -> pd.DataFrame:
    """The criterion of what may be chosen, images x (layer, rule, alpha): the `allowed` cells that
    were measured on all points of their curves. Raises ValueError where an image lacks a value.
    """
    full = table[(table["points"] == table["points"].max()) & table["kind"].isin(["fusion", "end"])]
    wide = full.pivot(index="image", columns=PLACE, values="criterion")
    wide = wide[[tuple(cell) for cell in allowed([Cell(*cell) for cell in wide.columns], **given)]]
    if wide.isna().any(axis=None):
        raise ValueError("an image lacks a value for a cell, so the cells cannot be compared.")
    return wide


def ranking(table: pd.DataFrame, **given) -> pd.Series:
    """The mean criterion of the `candidates`, highest first; of equal ones, to six decimals, the
    first in their order.
    """
    means = candidates(table, **given).mean()
    return means[means.round(6).sort_values(ascending=False, kind="stable").index]


def choose(table: pd.DataFrame, **given) -> Cell:
    """The candidate with the highest mean criterion over the images; of equal ones the first.
    given: see `candidates`.
    """
    pair, rule, alpha = ranking(table, **given).index[0]
    return Cell(pair, rule, float(alpha))


def stability(table: pd.DataFrame, draws: int = 2000, seed: int = 0, **given) -> pd.Series:
    """How far a choice can be trusted: the share of bootstrap resamples of the images that each
    candidate wins, in [0, 1] and together 1, by cell.
    """
    wide = candidates(table, **given)
    n = len(wide)
    # how often each image is drawn, in each resample
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)
    winners = (counts @ wide.to_numpy() / n).round(6).argmax(1)
    return pd.Series(np.bincount(winners, minlength=wide.shape[1]) / draws, index=wide.columns)


def single_maps(table: pd.DataFrame) -> dict[str, float]:
    """The mean criterion of every map alone: {"Grad-CAM at layer4": 0.91, ..., "LayerCAM at
    layer1": 0.92, ...}.
    """
    found = {}
    for alpha, method, side in ((1.0, "Grad-CAM", 0), (0.0, "LayerCAM", 1)):
        ends = table[(table["alpha"] == alpha) & (table["points"] == table["points"].max())]
        layers = ends["layer"].str.split(" × ").str[side]
        for layer, values in ends.groupby(layers, sort=False)["criterion"]:
            found[f"{method} at {layer}"] = float(values.mean())
    return found


def reason(n: int, given: Sequence[str], left: int, chosen_here: bool) -> str:
    """Where a choice comes from, in words. given: the settings that a user fixed; left: the
    candidates they left.
    """
    named = [f"{name} given as a parameter" for name in given]
    if not chosen_here:
        source = "taken from the shipped reference run, not chosen on your data"
        return "; ".join([source, *named])
    if given and left == 1:
        return "given as a parameter"
    counted = f"{n} validation image{'s' if n > 1 else ''}"
    fixed = f" with {', '.join(given)} given as a parameter" if given else ""
    return f"chosen on {counted}{fixed}"


def fusion_record(
    run: runs.Run,
    ladder: Sequence[str],
    table: pd.DataFrame,
    chosen: Cell,
    share: pd.Series,
    other: Cell | None,
    why: str,
) -> dict:
    """What is written to fusion.json: the choice, the network and images it was made for, and how
    clear it is.

    ladder: the stages up to the deep layer. share: as `stability` returns it. other: the next best
    of those measured on all points. why: see `reason`.
    """
    deep = ladder[-1]
    mean = float(rows_of(table, chosen)["criterion"].mean())
    singles = single_maps(table)
    higher = [
        f"{name} alone" for name, value in singles.items() if value > mean + statistics.ROUNDING
    ]
    runner_up = None
    if other is not None:
        runner_up = {"layer": other.pair, "rule": other.rule, "alpha": other.alpha}
        runner_up["mean"] = float(rows_of(table, other)["criterion"].mean())
    stages_back = {
        "coarse": _stages_back(chosen.coarse, ladder),
        "shallow": _stages_back(chosen.fine, ladder),
    }
    return {
        "alpha": chosen.alpha,
        "rule": chosen.rule,
        "layer": deep,
        "coarse": chosen.coarse,
        "shallow_layer": chosen.fine,
        "stages_back": stages_back if all(stages_back.values()) else {},
        "reason": why,
        "arch": run.info["arch"],
        "weights_sha256": run.info["sha256"] or run.info["weights"],
        "device": str(next(run.model.parameters()).device),
        "dataset": Path(run.settings.dataset).name,
        "dataset_sha256": datasets.content_hash(run.frame),
        "criterion": "mean(insertion - deletion)",
        "baseline": str(table["baseline"].iloc[0]),
        "steps": run.settings.steps,
        "n": table["image"].nunique(),
        "seed": run.settings.seed,
        "mean": mean,
        "mean_grad_cam": singles[f"Grad-CAM at {deep}"],
        "mean_layer_cam": singles[f"LayerCAM at {chosen.fine}"],
        "higher_without_fusion": higher,
        "share_of_resamples_won": float(share.get(tuple(chosen), 0)),
        "runner_up": runner_up,
    }


def _stages_back(layers: str, ladder: Sequence[str]) -> list[int]:
    """How many stages before the last one each layer lies; empty if one of them is no stage."""
    names = layers.split("+")
    if not set(names) <= set(ladder):
        return []
    return [len(ladder) - 1 - list(ladder).index(name) for name in names]


# ----------------------------------------------------------------------------------------- 12 study

GROUP = 8  # images that are measured at once, and kept in the cache together
BLOCK = 16  # pixels, the side of a block where insertion and deletion go by blocks
FURTHER = ("grad_cam_pp", "hires_cam", "xgrad_cam", "fused_mean", "fused_maximum", "hybrid_deep")
FURTHER += ("sobel", "activation")  # measured with method = "all" alone
CURVES = (
    "grad_cam",
    "layer_cam",
    "layer_cam_shallow",
    "hybrid_same",
    "hybrid",
    "smooth_noise",
)  # drawn
FILES = ("file", "twin", "mask", "hull", "moved", "marker")  # columns of a table that name files


@dataclass(frozen=True)
class Study:
    """What is measured, and how: together with the images all that a value depends on.

    model, arch, weights (a hash, or a name), how (its preprocessing) and head: the network. layers:
    {"deep", "coarse", "shallow", "finer"}, see `method_maps`. alpha, rule: the fusion. methods: the
    maps that are measured. baselines: what replaces pixels; the first is measured on all images and
    methods, the others on n_extra images and the methods in further (none: all). thresholds:
    {method: that of IoU and box accuracy}. n_extra: on how many images the costly extras are
    measured. steps, check_steps, fine_steps (0: no), rise_masks (0: no), seed, batch_size,
    precision: as in params/default.yaml.

    `dataclasses.replace` makes the study of another network out of one.
    """

    model: nn.Module
    arch: str
    weights: str
    how: networks.Preprocessing
    layers: Mapping[str, str]
    alpha: float
    rule: str
    methods: Sequence[str]
    baselines: Sequence[str]
    thresholds: Mapping[str, float]
    n_extra: int = 0
    further: Sequence[str] = ()
    steps: int = 28
    check_steps: int = 14
    fine_steps: int = 0
    rise_masks: int = 0
    seed: int = 0
    batch_size: int = 8
    precision: str = "float32"
    head: str = "softmax"

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def captured_layers(self) -> list[str]:
        """Every layer that the maps are taken from."""
        return list(dict.fromkeys("+".join(self.layers.values()).split("+")))


# ---- from a run to what is measured


def open_study(run) -> tuple[Study, pd.DataFrame, pd.DataFrame]:
    """(study, rows, left out): what notebook 05 measures, made of a run's settings and the choice
    of notebook 04.

    rows: the test images that count, see `measurable`. The thresholds are chosen on validation
    images, where these have masks or boxes, and are 0.5 else. Raises ValueError if no image is
    left, and what `chosen_fusion` raises.
    """
    settings = run.settings
    fusion = chosen_fusion(run)
    rows, left_out = _measurable_rows(run, run.model, "test", settings.n_images, run.how)
    if rows.empty:
        why = "; ".join(
            f"{n} times: {reason}" for reason, n in left_out["reason"].value_counts().items()
        )
        raise ValueError(
            f"No image of {run.folder} is left to measure on ({why}). Check weights and dataset."
        )
    before_deep = list(stages(run.model, run.blank, until=fusion["layer"]))[:-1]
    layers = {
        "deep": fusion["layer"],
        "coarse": fusion["coarse"],
        "shallow": fusion["shallow_layer"],
        "finer": before_deep[-1] if before_deep else fusion["layer"],
    }
    methods = methods_of(settings.method)
    study = Study(
        model=run.model,
        arch=run.info["arch"],
        weights=run.info["sha256"] or run.info["weights"],
        how=run.how,
        layers=layers,
        alpha=fusion["alpha"],
        rule=fusion["rule"],
        methods=methods,
        baselines=_baselines_of(settings.baseline, rows),
        thresholds=dict.fromkeys(methods, 0.5),
        n_extra=settings.n_extra,
        further=CURVES if settings.method == "main" else (),
        steps=settings.steps,
        check_steps=min(settings.check_steps, settings.steps),
        fine_steps=settings.fine_steps,
        rise_masks=settings.rise_masks,
        seed=settings.seed,
        batch_size=settings.batch_size,
        precision=settings.precision,
        head=run.info["head"],
    )
    if (rows["truth"] != "").any():
        few = min((settings.n_images + 1) // 2 or 64, 64)
        validation, _ = _measurable_rows(run, run.model, "val", few, run.how)
        if len(validation):
            study = replace(study, thresholds=choose_thresholds(study, validation))
    return study, rows, left_out


def chosen_fusion(run) -> dict:
    """The fusion that is measured: layer, coarse, shallow_layer, alpha, rule, reason, given (the
    settings that decide) and dataset_sha256.

    What is given as a setting counts; the rest is what notebook 04 chose and left in fusion.json.
    Raises ValueError where that file is missing and alpha is not given, and where it was made for
    another network or other data.
    """
    settings = run.settings
    deep, shallow = resolve_layers(run.model, run.blank, settings.layer, settings.shallow_layer)
    given = given_choice(run)
    file = run.out / "fusion.json"
    if not file.is_file() and "alpha" not in given:
        raise ValueError(
            f"There is no {file}: run notebook 04 first, or give alpha (a number) and "
            "shallow_layer as settings."
        )
    fusion = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    here = {
        "arch": run.info["arch"],
        "weights_sha256": run.info["sha256"] or run.info["weights"],
        "layer": deep,
        "dataset": Path(settings.dataset).name,
        "dataset_sha256": datasets.content_hash(run.frame),
    }
    differing = []
    for name, value in here.items() if fusion else ():
        if fusion.get(name) != value:
            differing.append(f"{name}: {fusion.get(name)!r} there, {value!r} here")
    if differing and len(given) < 3:
        raise ValueError(
            f"{file} was made for something else ({'; '.join(differing)}): run notebook 04 again."
        )
    usual = {
        "coarse": deep,
        "shallow_layer": shallow,
        "rule": "product",
        "reason": "the rest as by default",
    }
    chosen = usual | ({} if differing else fusion) | given
    chosen["layer"] = deep
    chosen["dataset_sha256"] = here["dataset_sha256"]
    chosen["alpha"] = round(float(chosen["alpha"]), 6)
    chosen["given"] = list(given)
    new = [name for name, value in given.items() if differing or fusion.get(name) != value]
    chosen["reason"] = ", ".join([*(f"{n} given as a setting" for n in new), chosen["reason"]])
    return chosen


def methods_of(which: str) -> tuple[str, ...]:
    """The methods that the setting `method`, "main" or "all", means; those that you registered in
    CAMS come last.
    """
    known = [
        name for name in figures.STYLE if name != "rise" and (which == "all" or name not in FURTHER)
    ]
    return (*known, *(name for name in CAMS if name not in figures.STYLE))


def second_study(run, study: Study) -> tuple[Study, pd.DataFrame]:
    """(study, rows) of the network `also`: the first one's rule and weight, layers that lie as many
    stages before its last, and half as many images. Nothing is chosen on it.
    """
    model, info = run.other(run.settings.also)
    how = info["preprocessing"]
    blank = torch.zeros(1, len(how.mean), *how.size, device=run.device)
    here = list(stages(study.model, run.blank))
    there = list(stages(model, blank))
    second = replace(
        study,
        model=model,
        arch=info["arch"],
        weights=info["sha256"] or info["weights"],
        how=how,
        head=info["head"],
        layers={place: matching_layers(name, here, there) for place, name in study.layers.items()},
        n_extra=0,
    )
    rows, _ = _measurable_rows(run, model, "test", (run.settings.n_images + 1) // 2, how)
    return second, rows


def _measurable_rows(run, model: nn.Module, split: str, n: int, how) -> tuple:
    """`measurable` on the split "val" (those with masks or boxes) or "test" of a run's images."""
    s = run.settings
    frame = datasets.split_rows(run.frame, split)
    if split == "val":
        frame = frame[frame["truth"] != ""]
    return measurable(model, frame, n, s.seed, s.batch_size, s.precision, s.strict, how)


def _baselines_of(setting: str, rows) -> tuple[str, ...]:
    """The baselines that a setting names, each once; without twins that one cannot be used."""
    has_twins = bool((rows["twin"] != "").all())
    return tuple(n for n in dict.fromkeys(words(setting)) if n != "twin" or has_twins) or ("rise",)


def choose_thresholds(study: Study, rows) -> dict[str, float]:
    """{method: the threshold with the highest mean IoU}, on validation images with masks."""
    overlaps = {name: [] for name in study.methods}
    for begin in range(0, len(rows), GROUP):
        part = rows.iloc[begin : begin + GROUP]
        masks = datasets.load_masks(part, size=study.how)
        _, _, maps = explain_rows(study, rows, begin, len(part))
        for name, m in maps.items():
            overlaps[name].append(_overlaps(m.cpu(), masks))
    return {name: _best_of(np.concatenate(parts)) for name, parts in overlaps.items()}


# ---- measuring a group of images


def explain_rows(
    study: Study, rows, begin: int = 0, count: int = 0
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(x, target, {method: maps}) of `count` rows from `begin` on (0: all that follow): (B, 3, H,
    W), (B,) and (B, H, W).

    The control with another image's LayerCAM takes the next row's, the last row's that of the one
    behind them; after the table's last row comes its first.
    """
    count = count or len(rows) - begin
    part = rows.iloc[begin : begin + count]
    following = rows.iloc[[(begin + count) % len(rows)]]
    shallow = study.layers["shallow"]
    size = study.how.size

    x = datasets.load_batch(part, size=study.how).to(study.device)
    captured = capture(study.model, x, study.captured_layers, part["target"].tolist())
    next_x = datasets.load_batch(following, size=study.how).to(study.device)
    next_captured = capture(study.model, next_x, shallow.split("+"), following["target"].tolist())
    own = cam_at(captured, layer_cam, shallow, size)
    donor = torch.cat([own[1:], cam_at(next_captured, layer_cam, shallow, size)])

    ids = list(part["id"])
    maps = method_maps(captured, x, study.layers, study.alpha, study.rule, ids, study.seed, donor)
    return x, captured.target, {name: maps[name] for name in study.methods}


def measure(
    study: Study,
    rows,
    count: int,
    extra: int = 0,
    known: dict[tuple[int, int], float] | None = None,
) -> list[dict]:
    """All records (image, method, metric, baseline, value) of the first `count` rows; the costly
    extras of the first `extra`. The row behind them lends its LayerCAM to a control, see
    `explain_rows`. rows: as `measurable` returns them, p_image and p_twin being those of target.
    known: see `perturbation_curves`; all curves share it, so that no picture of a curve is scored
    twice.
    """
    part = rows.iloc[:count]
    x, target, maps = explain_rows(study, rows, 0, count)
    main = {name: m for name, m in maps.items() if name not in FURTHER}
    first = study.baselines[0]
    known = {} if known is None else known
    records = mask_out(study, part, x, target, maps)
    records += localise(study, part, maps)
    records += perturb(study, part, x, target, maps, first, known=known)
    records += perturb(study, part, x, target, main, first, block=BLOCK, known=known)
    if extra:
        main = {name: m[:extra] for name, m in main.items()}
        few = (part.iloc[:extra], x[:extra], target[:extra], main)
        records += _measure_extras(study, *few, known)
    return records


def _measure_extras(
    study: Study, part, x: Tensor, target: Tensor, maps: Mapping[str, Tensor], known: dict
) -> list[dict]:
    """Further baselines; more steps, for the methods whose curves are drawn; and RISE, of whose map
    only the order counts: it stands on a pedestal, since every mask leaves some probability
    everywhere.
    """
    first = study.baselines[0]
    records = []
    further = {name: m for name, m in maps.items() if name in (study.further or maps)}
    for baseline in study.baselines[1:]:
        records += perturb(study, part, x, target, further, baseline, known=known)
    if study.fine_steps:
        drawn = {name: maps[name] for name in CURVES}
        records += perturb(study, part, x, target, drawn, first, fine=True, known=known)
    if study.rise_masks:
        settings = (study.seed, study.batch_size, study.precision)
        found = {
            "rise": rise(study.model, x, target, list(part["id"]), study.rise_masks, *settings)
        }
        records += perturb(study, part, x, target, found, first, known=known)
        records += perturb(study, part, x, target, found, first, block=BLOCK, known=known)
        by_order = ("pointing", "pointing_15", "average_precision")
        records += [r for r in localise(study, part, found) if r["metric"] in by_order]
    return records


def mask_out(
    study: Study, part, x: Tensor, target: Tensor, maps: Mapping[str, Tensor]
) -> list[dict]:
    """Records of drop, increase and gain (see `confidence_change`), of the share of tied pixels and
    of empty maps.
    """
    settings = (study.batch_size, study.precision)
    clean = torch.tensor(part["p_image"].tolist())
    records = []
    for name, m in maps.items():
        found = confidence_change(study.model, x, m, target, clean, *settings)
        found["ties"] = tie_fraction(m)
        found["empty"] = (m.amax((1, 2)) == 0).cpu().numpy()
        records += _records(part, name, found)
    return records


def localise(study: Study, part, maps: Mapping[str, Tensor]) -> list[dict]:
    """Records of how well maps point at the object, for the images where its place is known: by a
    mask, or by boxes.
    """
    known = np.flatnonzero(part["truth"] != "")
    if not len(known):
        return []
    part = part.iloc[known]
    masks = datasets.load_masks(part, size=study.how)
    hulls = datasets.load_masks(part, "hull", study.how) if "hull" in part else masks
    boxed = np.flatnonzero(~part["boxes"].isin(["", "[]"]))
    boxes = datasets.load_boxes(part.iloc[boxed], study.how)
    records = []
    for name, m in maps.items():
        m = m[known].cpu()
        threshold = study.thresholds.get(name, 0.5)
        found = {
            "pointing": pointing_game(m, masks),
            "pointing_15": pointing_game(m, masks, 15),
            "energy": energy_in_mask(m, masks),
            "energy_hull": energy_in_mask(m, hulls),
            "average_precision": average_precision(m, masks),
            "iou": iou(m, masks, threshold),
        }
        records += _records(part, name, found)
        if len(boxed):
            found = {"box": box_iou(m[boxed], boxes, threshold) >= 0.5}
            records += _records(part.iloc[boxed], name, found)
    return records


def perturb(
    study: Study,
    part,
    x: Tensor,
    target: Tensor,
    maps: Mapping[str, Tensor],
    baseline: str,
    fine: bool = False,
    block: int = 0,
    known: dict[tuple[int, int], float] | None = None,
) -> list[dict]:
    """Records of the areas of insertion and deletion with one baseline, and of the curves' points.

    By pixels: "insertion", "deletion". With the study's fine_steps: "insertion_fine",
    "deletion_fine". By blocks of block x block pixels: "insertion_blocks", "deletion_blocks". These
    have no points. Curves by blocks, or with another baseline than the first, have check_steps.
    """
    ending = "_blocks" if block else "_fine" if fine else ""
    checks = block or baseline != study.baselines[0]
    steps = study.check_steps if checks else study.steps
    steps = steps_of(study.fine_steps if fine else steps, x, block)
    twins = None
    if baseline == "twin":
        twins = datasets.load_batch(part, "twin", study.how).to(study.device)
    start, end = baselines(x, baseline, twins, study.how)
    known = {} if known is None else known
    known |= values_of(part, x, target, twins)
    settings = (study.seed, steps, study.batch_size, study.precision, block, None, known)
    curves = faithfulness(study.model, x, maps, target, list(part["id"]), start, end, *settings)
    records = []
    for metric, by_method in curves.items():
        for name, curve in by_method.items():
            found = _records(part, name, {metric + ending: auc(curve)}, baseline)
            if not ending:
                for record, points in zip(found, curve.tolist(), strict=True):
                    record["points"] = [round(p, 6) for p in points]
            records += found
    return records


def _records(part, method: str, found: Mapping[str, Sequence], baseline: str = "") -> list[dict]:
    """One record for each image and metric; found: {metric: a value for each row of part}."""
    records = []
    for metric, values in found.items():
        for image, value in zip(part["id"], values, strict=True):
            about = {"image": image, "method": method, "metric": metric, "baseline": baseline}
            records.append(about | {"value": float(value)})
    return records


# ---- measuring a study


def pictures_of(rows, size: networks.Size) -> tuple[list[np.ndarray], list[Tensor | None]]:
    """(pictures, masks) of a table's rows, to be shown: arrays (H, W, 3), and for each the
    object's mask, or None where its place is not known.
    """
    how = networks.as_preprocessing(size)
    pictures = []
    masks = []
    for k, row in enumerate(rows.to_dict("records")):
        picture = networks.as_input(datasets.read_image(row["file"]), how)
        pictures.append(np.asarray(picture))
        known = row["truth"] != ""
        masks.append(datasets.load_masks(rows.iloc[[k]], size=size)[0] if known else None)
    return pictures, masks


def slider_factors(study: Study, rows, class_names: Sequence[str]) -> dict[str, np.ndarray]:
    """What the report's slider fuses, for slider.npz: the hybrid's two factors and those of the
    same-layer hybrid, (B, 4, H, W) in 256 steps.

    The steps are even in the square root of a map, because a small power lifts small values: with
    even steps of the map itself, what falls below half a step would be zero, and 0.001 to the power
    of 0.2 is a quarter. Where the object's place is not known its mask is empty.
    """
    _, target, maps = explain_rows(study, rows)
    _, masks = pictures_of(rows, study.how)
    factors = ("grad_cam_coarse", "layer_cam_shallow", "grad_cam", "layer_cam")
    stacked = torch.stack([maps[name] for name in factors], 1).cpu()
    empty = np.zeros(study.how.size, bool)
    deep = study.layers["deep"]
    return {
        "ids": np.array(list(rows["id"])),
        "predicted": np.array([class_names[k] for k in target.tolist()]),
        "probability": rows["p_image"].to_numpy(float),
        "maps": (255 * stacked.sqrt()).round().byte().numpy(),
        "masks": np.stack([empty if mask is None else mask.numpy() for mask in masks]),
        "layers": np.array([study.layers["coarse"], study.layers["shallow"], deep, deep]),
        "alpha": np.array(study.alpha),
        "rule": np.array(study.rule),
        "run": np.bytes_(RUN_ID),
    }


def shards(study: Study, rows) -> list[tuple[pd.DataFrame, int, int, dict]]:
    """The groups of eight images that `measure` takes: (rows, count, extra, key), key for
    `runs.cached`.

    rows of a group holds one image more than count, see `explain_rows`; key holds all that decides
    what comes out. Groups know nothing of each other, so they can be measured in any order and on
    any machine.
    """
    names = [field.name for field in fields(study) if field.name not in ("model", "n_extra")]
    found = []
    for begin in range(0, len(rows), GROUP):
        count = min(GROUP, len(rows) - begin)
        part = rows.iloc[[(begin + k) % len(rows) for k in range(count + 1)]]
        extra = max(0, min(count, study.n_extra - begin))
        key = _key(study, part, names) | {"count": count, "extra": extra}
        found.append((part, count, extra, key))
    return found


def _key(study: Study, rows, names: Sequence[str]) -> dict:
    """What decides about something that is computed from these rows: the study's fields of these
    names, the images' bytes, code, threads and versions.
    """
    key = {name: getattr(study, name) for name in names}
    key["how"] = dataclasses.asdict(study.how)
    key |= runs.numerics(study.device)
    key["code"] = runs.code_hash(*CAMS.values(), *FUSIONS.values())
    key["files"] = []
    for column in FILES:
        if column in rows:
            key["files"] += [sha256(file) if file else "" for file in rows[column]]
    for column in ("id", "target", "truth", "boxes", "p_image", "p_twin"):
        if column in rows:
            key[column] = rows[column].tolist()
    return key


def measure_all(study: Study, rows, folder: str | Path) -> pd.DataFrame:
    """The records of all rows as a table. Groups that were measured before come from the cache in
    `folder`.
    """
    records = []
    for part, count, extra, key in tqdm(
        shards(study, rows), desc=study.arch, unit=" groups of images"
    ):
        scored = score_key(vars(study), part.iloc[:count], study.device)
        work = functools.partial(measure, study, part, count, extra)
        records += runs.cached(folder, key, work, scored)
    return pd.DataFrame(records)


def bf16_error(study: Study, rows) -> np.ndarray:
    """How far areas scored in bfloat16 lie from those in float32: Grad-CAM and hybrid, insertion
    and deletion.
    """
    x, target, maps = explain_rows(study, rows)
    two = {name: maps[name] for name in ("grad_cam", "hybrid")}
    rows = rows.drop(columns=["p_image", "p_twin"], errors="ignore")  # of one of the two precisions
    values = {}
    for precision in ("float32", "bf16"):
        records = perturb(
            replace(study, precision=precision), rows, x, target, two, study.baselines[0]
        )
        values[precision] = np.array([record["value"] for record in records])
    return np.abs(values["bf16"] - values["float32"])


def costs(study: Study, rows, rounds: int = 3) -> pd.DataFrame:
    """Seconds per image of a map at the input's size, forward pass included, and the ratio to a
    bare forward pass.

    Medians of interleaved rounds, so that a slow moment of the machine falls on all methods; the
    ratio is taken within a round. A first round warms up and does not count.
    """
    x = datasets.load_batch(rows, size=study.how).to(study.device)
    one_pass = [
        m for m in study.methods if m in CAMS or m in ("layer_cam_shallow", "hybrid_same", "hybrid")
    ]
    times = []
    for _ in range(rounds + 1):
        times.append({name: _seconds(study, name, x) for name in ["forward", *one_pass]})
    times = pd.DataFrame(times).iloc[1:] / len(x)
    ratio = times.div(times["forward"], axis=0).median()
    found = pd.DataFrame({"seconds": times.median(), "ratio": ratio})
    return found.rename_axis("method").reset_index()


def _seconds(study: Study, method: str, x: Tensor) -> float:
    """How long one method takes for the images x; "forward" is a bare forward pass in the same
    memory layout.
    """
    deep = study.layers["deep"]
    size = tuple(x.shape[2:])
    begin = time.perf_counter()
    if method == "forward":
        probabilities(study.model, x, len(x))
    elif method in ("hybrid", "hybrid_same"):
        coarse = study.layers["coarse"] if method == "hybrid" else deep
        shallow = study.layers["shallow"] if method == "hybrid" else deep
        captured = capture(study.model, x, [*shallow.split("+"), *coarse.split("+")])
        hybrid(
            cam_at(captured, grad_cam, coarse, size),
            cam_at(captured, layer_cam, shallow, size),
            study.alpha,
        )
    elif method == "layer_cam_shallow":
        shallow = study.layers["shallow"]
        cam_at(capture(study.model, x, shallow.split("+")), layer_cam, shallow, size)
    else:
        cam_at(capture(study.model, x, deep), CAMS[method], deep, size)
    if x.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - begin


# ---- judging


def endpoints(baseline: str) -> list[tuple[str, str]]:
    """The primary endpoints as (metric, baseline), in the order in which
    docs/primary_endpoints.json fixed them; baseline: that of insertion and deletion.
    """
    file = HOME / "docs" / "primary_endpoints.json"
    fixed = json.loads(file.read_text("utf-8"))["endpoints"]
    return [(e["metric"], baseline if e["baseline"] else "") for e in fixed]


def is_confirmatory(run) -> bool:
    """Whether data, baseline and fusion are those for which the primary endpoints were fixed
    beforehand.
    """
    s = run.settings
    fusion_chosen = s.layer == s.alpha == s.shallow_layer == s.rule == "auto"
    return s.dataset == "synthetic" and s.baseline.startswith("twin") and fusion_chosen


def judge(metrics, primary: Sequence[tuple[str, str]], seed: int = 0) -> pd.DataFrame:
    """Every method against Grad-CAM, paired by image: the rows of `compare`, with `primary` and
    `p_holm`.

    metrics: records of `measure`. primary: (metric, baseline) of the endpoints whose p for the
    hybrid are corrected together. RISE is compared on the images that it was measured on. Ties and
    empty maps are no contest.
    """
    metrics = metrics[~metrics["metric"].isin(["ties", "empty"])]
    is_rise = metrics["method"] == "rise"
    found = statistics.compare(metrics[~is_rise], "grad_cam", seed)
    if is_rise.any():
        keys = ["image", "metric", "baseline"]
        same = metrics[metrics["method"] == "grad_cam"].merge(metrics.loc[is_rise, keys], on=keys)
        pair = statistics.compare(pd.concat([metrics[is_rise], same]), "grad_cam", seed)
        found = pd.concat([found, pair[pair["method"] == "rise"]], ignore_index=True)
    found["primary"] = (found["method"] == "hybrid") & _of_kinds(found, primary)
    found["p_holm"] = np.nan
    tested = found["primary"] & ~found["identical"]
    found.loc[tested, "p_holm"] = statistics.holm(found.loc[tested, "p"])
    return found


def table_of_means(summary, metrics) -> pd.DataFrame:
    """The means of all methods on all metrics, a row for each method: rows of `judge`, and the
    records that they come from, for tied pixels and empty maps.
    """
    methods = summary["method"].unique()
    known = [name for name in figures.STYLE if name in methods]
    known += [name for name in methods if name not in known]
    found = {}
    for (metric, baseline), part in summary.groupby(["metric", "baseline"], sort=False):
        title = f"{metric} ({baseline})" if baseline else metric
        found[title] = part.set_index("method")["mean"]
    values = metrics.groupby(["metric", "method"])["value"]
    found["tied pixels"] = values.mean()["ties"]
    found["empty maps"] = values.sum()["empty"]
    return pd.DataFrame(found).reindex(known).rename(figures.label).rename_axis("method")


def against_controls(metrics, kinds: Sequence[tuple[str, str]], seed: int = 0) -> pd.DataFrame:
    """The hybrid against every resolution-matched control: rows of `compare`, with the control as
    their reference.
    """
    measured = set(metrics["method"])
    found = []
    for control in MATCHED:
        if control in measured and control != "hybrid_coarse":
            pair = metrics[metrics["method"].isin([control, "hybrid"]) & _of_kinds(metrics, kinds)]
            found.append(statistics.compare(pair, control, seed))
    found = pd.concat(found)
    return found[found["method"] == "hybrid"].reset_index(drop=True)


def by_group(
    metrics, groups: Mapping, kinds: Sequence[tuple[str, str]], seed: int = 0
) -> pd.DataFrame:
    """The hybrid against Grad-CAM within groups of images: rows of `compare`, with `group`. groups:
    {image: name}, as a dict or a Series. A group of one image is left out; without any the table is
    empty.
    """
    pair = metrics[metrics["method"].isin(["grad_cam", "hybrid"]) & _of_kinds(metrics, kinds)]
    pair = pair.assign(group=pair["image"].map(groups))
    found = []
    for name, part in pair.groupby("group", observed=True):
        if part["image"].nunique() > 1:
            table = statistics.compare(part, "grad_cam", seed).assign(group=name)
            found.append(table[table["method"] == "hybrid"])
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def area_groups(areas: pd.Series, cell: float) -> pd.Series:
    """{image: class of its object's area}, areas and cell as shares of the image: up to one cell of
    the deep layer, up to 5 %, up to 10 %, and above.
    """
    bounds = [cell, *(bound for bound in (0.05, 0.1) if bound > cell)]
    names = ["≤ 1 cell", *(f"≤ {bound:.0%}" for bound in bounds[1:]), f"> {bounds[-1]:.0%}"]
    return pd.cut(areas, [0, *bounds, 1], labels=names)


def by_number(metrics, order: Sequence[str], seed: int = 0) -> pd.DataFrame:
    """The methods against Grad-CAM on the first 10, 30, 100, ... images of `order`, and on all:
    rows of `compare`, with `deviation`, the standard deviation over images.
    """
    tables = []
    for n in [*(n for n in (10, 30, 100, 300, 1000, 3000) if n < len(order)), len(order)]:
        part = metrics[metrics["image"].isin(order[:n])]
        spread = part.groupby(["metric", "method"])["value"].std().rename("deviation")
        tables.append(
            statistics.compare(part, "grad_cam", seed).join(spread, on=["metric", "method"])
        )
    return pd.concat(tables, ignore_index=True)


def _of_kinds(table, kinds: Sequence[tuple[str, str]]) -> np.ndarray:
    """Which rows have one of these pairs of metric and baseline."""
    return pd.MultiIndex.from_frame(table[["metric", "baseline"]]).isin(list(kinds))


# ---- sanity: does a map follow the question, and does it depend on what the network learned?


def pairs_of(frame, class_names: Sequence[str]) -> pd.DataFrame:
    """The images with two lesions whose classes the network knows, with class and class_b as its
    indices; few data sets have any.
    """
    pairs = frame[(frame["split"] == "pairs") & frame["label"].isin(class_names)].reset_index(
        drop=True
    )
    if pairs.empty:
        return pairs
    index = {name: k for k, name in enumerate(class_names)}
    return pairs.assign(
        **{"class": pairs["label"].map(index), "class_b": pairs["label_b"].map(index)}
    )


def discrimination(study: Study, pairs) -> pd.DataFrame:
    """Records of how well maps follow the question, on images with a lesion of each of two classes.

    Asked about one class: energy on its lesion / energy on both, 0.5 for a map that does not care.
    "discrimination" is the mean of that over the two questions; "both_right" whether it is above
    0.5 for both.
    """
    records = []
    for begin in range(0, len(pairs), GROUP):
        part = pairs.iloc[begin : begin + GROUP]
        lesion = datasets.load_masks(part, size=study.how)
        other = datasets.load_masks(part, "mask_b", study.how)
        first = _share_on_the_right(
            study, pairs.assign(target=pairs["class"]), begin, lesion, other
        )
        second = _share_on_the_right(
            study, pairs.assign(target=pairs["class_b"]), begin, other, lesion
        )
        for name in study.methods:
            both = np.stack([first[name], second[name]])
            found = {"discrimination": both.mean(0), "both_right": both.min(0) > 0.5}
            records += _records(part, name, found)
    return pd.DataFrame(records)


def _share_on_the_right(
    study: Study, pairs, begin: int, right: Tensor, wrong: Tensor
) -> dict[str, np.ndarray]:
    """{method: energy on the right lesion / energy on both}, for the rows that have the masks."""
    _, _, maps = explain_rows(study, pairs, begin, len(right))
    found = {}
    for name, m in maps.items():
        on_right = energy_in_mask(m.cpu(), right)
        on_wrong = energy_in_mask(m.cpu(), wrong)
        found[name] = on_right / np.maximum(on_right + on_wrong, 1e-12)
    return found


def randomisation(study: Study, rows, folder: str | Path) -> pd.DataFrame:
    """Similarity of maps with the original ones while the network is randomised from the classifier
    downward: records with stage (1, 2, ...) and layer. Kept in the cache in `folder`.
    """
    decide = ("arch", "weights", "how", "head", "layers", "alpha", "rule", "methods", "seed")
    key = _key(study, rows, decide) | {"what": "randomisation"}
    return pd.DataFrame(runs.cached(folder, key, functools.partial(_randomisation, study, rows)))


def _randomisation(study: Study, rows) -> list[dict]:
    _, target, before = explain_rows(study, rows)
    rows = rows.assign(target=target.tolist())
    records = []
    for stage, (layer, forgetful) in enumerate(randomise_cascade(study.model, study.seed), 1):
        _, _, after = explain_rows(replace(study, model=forgetful), rows)
        for name in before:
            found = similarity(before[name], after[name])
            for record in _records(rows, name, found):
                records.append({"stage": stage, "layer": layer, **record})
    return records


def class_sensitivity(study: Study, rows) -> pd.DataFrame:
    """Records of how alike the maps for the most and for the least likely class are:
    "class_spearman", "class_ssim", "class_constant".
    """
    x, _, likely = explain_rows(study, rows)
    least = probabilities(study.model, x, study.batch_size).argmin(1)
    _, _, unlikely = explain_rows(study, rows.assign(target=least.tolist()))
    records = []
    for name in likely:
        found = similarity(likely[name], unlikely[name])
        records += _records(
            rows, name, {f"class_{metric}": values for metric, values in found.items()}
        )
    return pd.DataFrame(records)


# ---- the shortcut: could a person have found the cheat?


def cheating_study(run, study: Study) -> tuple[Study, dict]:
    """(the same study of the network that notebook 01 taught to cheat, what is known of that
    network).
    """
    file = run.data / "shortcut" / "checkpoints" / f"{study.arch}.pth"
    if not file.is_file():
        raise ValueError(
            f"shortcut: there is no {file}. Run notebook 01 with shortcut = true first."
        )
    model, info = networks.load(study.arch, file, study.device)
    if info["key"]["start"] != study.weights:
        raise ValueError(
            f"shortcut: {file} was made from another network. Run notebook 01 with shortcut = true "
            "again."
        )
    return replace(study, model=model, weights=info["sha256"]), info


def cheated_rows(honest: Study, cheating: Study, folder: str | Path) -> tuple[pd.DataFrame, int]:
    """(the images on which the cheat decides, of how many): those with an R that both networks call
    a ring, p > 0.5, the cheating one because of the letter: with L in the place of R its p falls by
    more than 0.5. Their target is the ring.
    """
    rings = datasets.read(folder)
    rings = rings[rings["letter"] == "R"]
    rings = rings.assign(target=rings["class"])
    for column in ("moved", "marker"):
        rings[column] = [str(Path(folder) / name) for name in rings[column]]
    ring = int(rings["target"].iloc[0])
    fall = _probability(cheating, rings, "file", ring) - _probability(
        cheating, rings, "moved", ring
    )
    fooled = (fall > 0.5) & (_probability(honest, rings, "file", ring) > 0.5)
    return rings[fooled].reset_index(drop=True), len(rings)


def _probability(study: Study, rows, column: str, k: int) -> np.ndarray:
    """The probability of class k for the images in a column of a table: (n,)."""
    found = []
    for begin in range(0, len(rows), study.batch_size):
        x = datasets.load_batch(rows.iloc[begin : begin + study.batch_size], column, study.how)
        found.append(probabilities(study.model, x, study.batch_size)[:, k].cpu())
    return torch.cat(found).numpy()


def on_marker(study: Study, rows) -> pd.DataFrame:
    """Records of what maps show of the marker: "energy", the share of a map's sum on it; "found",
    whether that is more than five times the marker's share of the image; "hottest", whether the
    maximum lies on it, or within 15 pixels.
    """
    records = []
    for begin in range(0, len(rows), GROUP):
        part = rows.iloc[begin : begin + GROUP]
        _, _, maps = explain_rows(study, rows, begin, len(part))
        marker = datasets.load_masks(part, "marker", study.how)
        area = marker.double().mean((1, 2)).numpy()
        for name, m in maps.items():
            energy = energy_in_mask(m.cpu(), marker)
            hottest = pointing_game(m.cpu(), marker, 15)
            found = {"energy": energy, "found": energy > 5 * area, "hottest": hottest}
            records += _records(part, name, found)
    return pd.DataFrame(records)


def exposure(honest, cheating, seed: int = 0) -> pd.DataFrame:
    """The cheating network against the honest one, for every map and metric of `on_marker`, paired
    by image.
    """
    records = pd.concat([honest.assign(network="honest"), cheating.assign(network="cheating")])
    found = []
    for metric, part in records.groupby("metric", sort=False):
        # each map takes the place of a metric, and the two networks that of the methods
        part = part.assign(metric=part["method"], method=part["network"])
        table = statistics.compare(part, "honest", seed)
        table = table[table["method"] == "cheating"]
        found.append(table.assign(method=table["metric"], metric=metric))
    found = pd.concat(found, ignore_index=True)
    found = found.rename(columns={"reference_mean": "honest", "mean": "cheating"})
    kept = [
        "metric",
        "method",
        "n",
        "honest",
        "cheating",
        "difference",
        "low",
        "high",
        "p",
        "effect",
        "won",
    ]
    return found[kept]
