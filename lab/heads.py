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


def _log(p: Tensor) -> Tensor:
    """log p of rows p that sum to one. The largest as -log(1 + others / p): the same, but where p
    rounds to 1 its gradient is still that of the others.
    """
    p = p if p.dtype == torch.float64 else p.float()
    top = p.argmax(1, keepdim=True)
    others = p.scatter(1, top, 0).sum(1, keepdim=True)
    # a zero apart, whose gradient would be NaN for every other class too
    logs = torch.where(p > 0, torch.where(p > 0, p, 1).log(), -torch.inf)
    logs = logs - p.sum(1, keepdim=True).log()
    return logs.scatter(1, top, -(others / p.gather(1, top)).log1p())


HEADS = {
    "softmax": Head(lambda y: y, lambda y: y.softmax(1), "logits of classes of which one is right"),
    "sigmoid": Head(_both, lambda y: _both(y).sigmoid(), "logits of labels, each true or not"),
    "logit": Head(_both, lambda y: _both(y).sigmoid(), "one logit, of the second of two classes"),
    "softmax_inside": Head(_log, lambda y: y, "probabilities; their logarithms are explained"),
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
    last = _last_operation(output.grad_fn)
    if last == "Sigmoid":
        return "sigmoid_inside", "its last operation is a sigmoid"
    if last == "LogSigmoid":
        raise ValueError(
            "The model's last operation is a log-sigmoid: let it return the logits in front of it "
            "(head='sigmoid'), or take its outputs as values (head='none')."
        )
    y = output.detach().float()
    one = output.shape[1] == 1
    tolerance = 1e-4 if output.dtype in (torch.float32, torch.float64) else 1e-2
    in_range = bool((y >= 0).all() & (y <= 1).all())
    sums = in_range and bool(((y.sum(1) - 1).abs() <= tolerance).all())
    if last == "Softmax":
        if one and sums:
            raise ValueError(
                "The model's last operation is a softmax over one output, which is 1 for every "
                "image: let it return the logit in front of it (head='logit')."
            )
        if not sums:  # over groups of its outputs, or one class of several
            return "sigmoid_inside", "its last operation is a softmax, its rows do not sum to one"
        return "softmax_inside", "its last operation is a softmax"
    if one:
        return "logit", "it has one output"
    if sums:
        return "softmax_inside", "its outputs lie in [0, 1] and sum to one"
    if in_range and y.numel() >= 8 and bool(y.any()):
        warnings.warn(
            f"All {y.numel()} outputs lie in [0, 1]. They are taken for logits; if they are "
            "probabilities of labels, name the head: head='sigmoid_inside'.",
            stacklevel=3,
        )
    return "softmax", "the usual one, nothing says otherwise"


# What only hands values on, between the last operation of a network and its output.
_HANDED_ON = (
    "View Reshape UnsafeView ReshapeAlias Squeeze Unsqueeze ToCopy Clone Alias Slice Select "
    "Permute Transpose T Expand Clamp ClampMin ClampMax"
).split()


def _last_operation(node) -> str:
    """The name of the operation behind a tensor's grad_fn, past what only hands values on; "" if
    there is no graph, or several that differ are put side by side.
    """
    while node is not None:
        name = _name(node)
        if name in ("Cat", "Stack"):
            found = {_last_operation(source) for source, _ in node.next_functions}
            return found.pop() if len(found) == 1 else ""
        if name not in _HANDED_ON:
            by_hand = re.match("(Mul )?Reciprocal Add Exp", " ".join(_names(node, 4)))
            return "Sigmoid" if by_hand else name  # 1 / (1 + exp(-y))
        node = node.next_functions[0][0]
    return ""


def _name(node) -> str:
    return re.sub(r"Backward\d*$", "", node.name())


def _names(node, most: int) -> list[str]:
    """The names of an operation and of those in front of it, by their first inputs."""
    found = []
    while node is not None and len(found) < most:
        found.append(_name(node))
        node = node.next_functions[0][0] if node.next_functions else None
    return found


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
        called_so = "logits" in re.split(r"[.\[\]]+", name)
        if batch == 1 and (called_so or value is output) and _is_squeezed(value):
            return value.reshape(1, -1)
        if value is output and value.shape[:2] == (batch, 1) and value.ndim == 3:  # (B, 1, K)
            value = value[:, 0]
            if _as_rows(value, batch) is not None:
                return value
        if called_so and _as_rows(value, batch) is not None:
            return _as_rows(value, batch)
    fitting = [(name, value) for name, value in named if _as_rows(value, batch) is not None]
    matrices = [(name, value) for name, value in fitting if value.ndim > 1] or fitting
    squeezed = [value for _, value in named if value.ndim == 1 and _is_squeezed(value)]
    if not matrices and batch == 1 and len(squeezed) == 1:
        return squeezed[0][None]
    if not matrices:
        raise ValueError(_no_logits(output, named, batch))
    rows = [_as_rows(value, batch) for _, value in matrices]
    # of one width they say the same in two ways, as two heads do; of width 1 they may be classes
    if len(rows) > 1 and (len({r.shape[1] for r in rows}) > 1 or rows[0].shape[1] == 1):
        _warn_of_several(tuple(f"{name} {tuple(value.shape)}" for name, value in matrices))
    return rows[0]


def _warn_of_several(seen: tuple[str, ...]) -> None:
    warnings.warn(
        f"The network hands out several (B, K) or (B,): {', '.join(seen)}. The first is explained; "
        "give a target function, such as `lambda output: output[1][:, 0]`, for another.",
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


def _is_squeezed(value: Tensor) -> bool:
    """Whether this may be the output of one image without its batch side, as `.squeeze()` makes."""
    return value.is_floating_point() and value.ndim < 2 and value.numel() > 0


def tensors_in(
    output, name: str = "output", around: tuple[int, ...] = ()
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every tensor in what a network hands out, in order. around: the ids of what
    it lies in, since an object may hold itself.
    """
    if isinstance(output, Tensor):
        yield name, output
        return
    if id(output) in around or isinstance(output, nn.Module | str | bytes):
        return
    if isinstance(output, Mapping):
        parts = [(f"{name}.{key}", value) for key, value in output.items()]
    elif hasattr(output, "_asdict"):  # a named tuple
        parts = [(f"{name}.{key}", value) for key, value in output._asdict().items()]
    elif isinstance(output, Sequence):
        parts = [(f"{name}[{k}]", value) for k, value in enumerate(output)]
    else:  # an object with attributes, such as a dataclass
        slots = getattr(type(output), "__slots__", ())
        keys = [*getattr(output, "__dict__", {}), *([slots] if isinstance(slots, str) else slots)]
        parts = [(f"{name}.{key}", getattr(output, key, None)) for key in keys]
    for part, value in parts:
        yield from tensors_in(value, part, (*around, id(output)))


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
