"""What a network hands out, and what it means: the logits in its output, and the head that makes
scores and probabilities of them.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lab import nearest


class Head(NamedTuple):
    """What a network's output y, (B, K), means.

    scores(y) -> (B, classes), what is explained: maps are made of their gradients.
    probabilities(y) -> (B, classes), or None where the output has none. about: in words.
    """

    scores: Callable[[Tensor], Tensor]
    probabilities: Callable[[Tensor], Tensor] | None
    about: str


def _both(y: Tensor) -> Tensor:
    """One logit of two classes as a score for each: y for the second, -y for the first."""
    return torch.cat([-y, y], 1) if y.shape[1] == 1 else y


def _complement(p: Tensor) -> Tensor:
    return torch.cat([1 - p, p], 1) if p.shape[1] == 1 else p


HEADS = {
    "softmax": Head(lambda y: y, lambda y: y.softmax(1), "logits of classes of which one is right"),
    "sigmoid": Head(_both, lambda y: _both(y).sigmoid(), "logits of labels, each true or not"),
    "logit": Head(_both, lambda y: _both(y).sigmoid(), "one logit, of the second of two classes"),
    "softmax_inside": Head(
        lambda y: y.log(), lambda y: y, "probabilities; their logarithms are explained"
    ),
    "sigmoid_inside": Head(
        lambda y: _both(y.logit()),
        _complement,
        "probabilities of labels; their log-odds are explained",
    ),
    "none": Head(lambda y: y, None, "values that are no probabilities"),
}


def check_head(head: str, width: int) -> None:
    """Refuse a head that does not exist, or that an output (B, width) cannot have."""
    if head not in HEADS:
        raise ValueError(f"head={head!r} is unknown. {nearest(str(head), list(HEADS))}")
    if not width:  # not known yet
        return
    if head == "logit" and width != 1:
        raise ValueError(
            f"head='logit' is for one output, this network has {width}: softmax if one class is "
            "right, sigmoid if several labels may be."
        )
    if head in ("softmax", "softmax_inside") and width == 1:
        raise ValueError(
            f"head={head!r} says nothing of a network with one output: its probability would be 1 "
            "for every image. It is a logit (head='logit'), or a value (head='none')."
        )


def found_head(model: nn.Module, output: Tensor) -> tuple[str, str]:
    """(a key of HEADS, where it is from): the network's own word (`output_head`, or Hugging Face's
    `config.problem_type`), else what its output, (B, K) with its graph, shows.

    A softmax or sigmoid as the last operation, or rows in [0, 1] that sum to one, are
    probabilities. One output is a logit of two classes. Everything else counts as logits of
    exclusive classes: logits of several labels, and values, look the same and have to be named.
    """
    said = getattr(model, "output_head", None)
    if isinstance(said, str):
        return said, "the network says so"
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    problems = {"multi_label_classification": "sigmoid", "regression": "none"}
    if problem in problems:
        return problems[problem], "its config.problem_type says so"
    last = _last_operation(output)
    if last == "Sigmoid":
        return "sigmoid_inside", "its last operation is a sigmoid"
    if last == "Softmax" and output.shape[1] > 1:
        return "softmax_inside", "its last operation is a softmax"
    if output.shape[1] == 1:
        return "logit", "it has one output"
    y = output.detach().float()
    tolerance = 1e-4 if output.dtype in (torch.float32, torch.float64) else 1e-2
    in_range = (y >= 0).all() & (y <= 1).all()
    if bool(in_range & ((y.sum(1) - 1).abs() <= tolerance).all()):
        return "softmax_inside", "its outputs lie in [0, 1] and sum to one"
    return "softmax", "the usual one, nothing says otherwise"


# What only hands values on, between the last operation of a network and its output.
_HANDED_ON = (
    "View Reshape UnsafeView ReshapeAlias Squeeze Unsqueeze ToCopy Clone Alias Slice".split()
)


def _last_operation(output: Tensor) -> str:
    """The name of the operation of autograd's graph that made a tensor; "" if there is no graph."""
    node = output.grad_fn
    while node is not None:
        name = re.sub(r"Backward\d*$", "", node.name())
        if name not in _HANDED_ON:
            return name
        node = node.next_functions[0][0]
    return ""


def logits_of(output, batch: int | None = None) -> Tensor:
    """The (B, K) floats in what a network hands out for `batch` images (None: as many as its first
    tensor has).

    A tensor (B, K), (B, K, 1, 1), or (B,), which becomes (B, 1). Of an object or mapping its
    "logits", else the one (B, K) in it; of a sequence likewise. Of several, the first, with a
    warning if they differ in K. ValueError, which says what came out, where there is none.
    """
    named = list(tensors_in(output))
    if batch is None:
        batch = next((len(value) for _, value in named if value.ndim), 0)
    for name, value in named:
        if name.rpartition(".")[2] == "logits" and _as_rows(value, batch) is not None:
            return _as_rows(value, batch)
    fitting = [(name, value) for name, value in named if _as_rows(value, batch) is not None]
    matrices = [(name, value) for name, value in fitting if value.ndim > 1] or fitting
    if not matrices:
        raise ValueError(_no_logits(output, named, batch))
    rows = [_as_rows(value, batch) for _, value in matrices]
    if len({r.shape[1] for r in rows}) > 1:
        _warn_of_several(tuple(f"{name} {tuple(value.shape)}" for name, value in matrices))
    return rows[0]


def _warn_of_several(seen: tuple[str, ...]) -> None:
    warnings.warn(
        f"The network hands out several (B, K): {', '.join(seen)}. The first is explained; give a "
        "target function, such as `lambda output: output[1][:, 0]`, for another.",
        stacklevel=4,
    )


def _as_rows(value, batch: int) -> Tensor | None:
    """A tensor as (batch, K) if it is one, up to trailing sides of 1; else None."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or not value.ndim:
        return None
    if len(value) != batch or value.numel() == 0:
        return None
    if value.ndim == 1:
        return value[:, None]
    return value.flatten(1) if all(side == 1 for side in value.shape[2:]) else None


def tensors_in(output, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every tensor in what a network hands out, in order."""
    if isinstance(output, Tensor):
        yield name, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from tensors_in(value, f"{name}.{key}")
    elif hasattr(output, "_asdict"):  # a named tuple
        yield from tensors_in(output._asdict(), name)
    elif isinstance(output, list | tuple):
        for k, value in enumerate(output):
            yield from tensors_in(value, f"{name}[{k}]")
    elif hasattr(output, "__dict__"):  # an object with attributes, such as a dataclass
        yield from tensors_in(dict(vars(output)), name)


def _no_logits(output, named: Sequence[tuple[str, Tensor]], batch: int) -> str:
    """What to say of an output that holds no (B, K)."""
    seen = [f"{name} {tuple(value.shape)} {value.dtype}" for name, value in named[:6]]
    got = ", ".join(seen) or type(output).__name__
    text = (
        f"The model's output must hold logits of shape (B, K), floats, here ({batch}, K); got "
        f"{got}. "
    )
    if any(value.ndim == 4 and value.shape[1] > 0 for _, value in named):
        text += (
            "Maps (B, K, H, W), as of a segmentation, need one score per image: give a target "
            "function, such as `lambda output: output[:, k].mean((1, 2))`, or wrap the model so "
            "that it returns (B, K)."
        )
        return text
    return text + (
        "Give a target function of the output that returns one score per image, (B,), or wrap the "
        "model so that it returns the logits."
    )
