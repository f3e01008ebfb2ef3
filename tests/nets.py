"""Small seeded networks for the tests: nothing here needs a checkpoint or the network."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

import cam_core as cc

torch.set_num_threads(1)  # networks as small as these only lose time to more, very much so on a busy machine
models = cc.torchvision.models  # from there, because cam_core makes it importable beside a CPU-only torch


def settle(model: nn.Module, seed: int) -> nn.Module:
    """Batch-norm statistics and offsets away from 0 and 1, so that a test notices when they are ignored."""
    draw = torch.Generator().manual_seed(seed + 1000)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.copy_(0.1 * torch.randn(m.num_features, generator=draw))
            m.running_var.copy_(0.5 + torch.rand(m.num_features, generator=draw))
            m.bias.data.copy_(0.2 * torch.randn(m.num_features, generator=draw))
    return model.eval()


def tiny(seed: int = 0, classes: int = 4, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Two convolutions with batch norm and in-place ReLUs, pooling, a hidden layer: input (B, 3, 12, 10) or larger.

    0 conv, 1 batch norm, 2 ReLU, 3 max pooling, 4 conv, 5 batch norm, 6 ReLU, 7 pooling, 8 flatten, 9 to 11 classifier.
    """
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(5, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 8), nn.Tanh(), nn.Linear(8, classes),
    )  # fmt: skip
    return settle(net, seed).to(dtype)


def images(count: int = 2, size: tuple[int, int] = (12, 10), seed: int = 0, **kwargs) -> torch.Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed)).to(**kwargs)


def network(arch: str, seed: int = 0, classes: int = 10) -> nn.Module:
    """A torchvision classifier with seeded random weights; "small_vgg" is VGG11 with a small head."""
    torch.manual_seed(seed)
    if arch == "small_vgg":
        convolutions = models.vgg.make_layers(models.vgg.cfgs["A"])
        for m in convolutions:
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's VGG does
        head = {"avgpool": nn.AdaptiveAvgPool2d(2), "flatten": nn.Flatten(), "classifier": nn.Linear(2048, classes)}
        return nn.Sequential(OrderedDict(features=convolutions, **head)).eval()
    quick = {"init_weights": False} if arch in ("googlenet", "inception_v3", "vgg11") else {}  # theirs is slow
    return settle(models.get_model(arch, weights=None, num_classes=classes, **quick), seed)


def state(model: nn.Module, tensors: bool = True) -> dict:
    """Everything about a model that a visitor could change, in a form that `==` compares bit by bit. tensors: weights
    and buffers too."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "hooks": {(n, h): list(getattr(m, h).values()) for n, m in model.named_modules() for h in hooks},
        "modes": {n: m.training for n, m in model.named_modules()},
        "tensors": {k: (v.dtype, v.detach().cpu().numpy().tobytes()) for k, v in _floats(model).items() if tensors},
        "objects": {k: id(p) for k, p in model.named_parameters()},
        "requires_grad": {k: p.requires_grad for k, p in model.named_parameters()},
        "grad": {
            k: (id(p.grad), p.grad.float().numpy().tobytes()) for k, p in model.named_parameters() if p.grad is not None
        },
    }


def _floats(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.float() if v.dtype == torch.bfloat16 else v for k, v in model.state_dict().items()}


class Small(nn.Module):
    """Two convolutions and a linear head, for inputs (B, 3, h, w) from 4 x 4 on; what else it does is an option.

    in_place: ReLUs alter their input. reused: one ReLU serves both places. norm: batch norm, always with statistics off
    0 and 1. kind: "maps", or a last layer that puts out "tokens", (B, h*w, C), or channels "last", (B, h, w, C).
    answer: makes what is handed back of the logits. extra: a module behind the first ReLU.
    """

    def __init__(
        self, seed=0, classes=3, in_place=False, reused=False, norm=False, kind="maps", answer=None, extra=None
    ):
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4) if norm else None
        self.first = nn.ReLU(inplace=in_place)
        self.extra = extra
        self.pool = nn.MaxPool2d(2)
        self.body = nn.Conv2d(4, 5, 3, padding=1)
        self.second = None if reused else nn.ReLU(inplace=in_place)
        self.mix = None if kind == "maps" else nn.Linear(5, 16)
        self.kind, self.answer, self.head = kind, answer, nn.Linear(5 if kind == "maps" else 16, classes)
        settle(self, seed)

    def forward(self, x):
        y = self.stem(x)
        y = self.first(y if self.norm is None else self.norm(y))
        y = self.body(self.pool(y if self.extra is None else self.extra(y)))
        y = (self.second or self.first)(y)
        if self.kind == "tokens":
            y = self.mix(y.flatten(2).mT).mT
        elif self.kind == "last":
            y = self.mix(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        logits = self.head(y.flatten(2).mean(2))
        return self.answer(logits) if self.answer else logits

    def layers(self, height: int, width: int) -> dict[str, tuple[int, int, int]]:
        """The layers that can be captured with the shapes of their maps, for an input of this size."""
        half = (height // 2, width // 2)
        found = {"stem": (4, height, width), "norm": (4, height, width), "first": (4, height, width)}
        found |= {"extra": (4, height, width), "pool": (4, *half), "body": (5, *half), "second": (5, *half)}
        found |= {"mix": (16, *half)}
        runs = [n for n in found if getattr(self, n) is not None and not (n == "first" and self.second is None)]
        return {n: found[n] for n in runs}


def laid_out(t: torch.Tensor, how: str) -> torch.Tensor:
    """The same numbers in another layout of memory (expanded: those of the first image for all)."""
    if how == "channels last":
        return t.to(memory_format=torch.channels_last) if t.ndim == 4 else t.movedim(1, -1).contiguous().movedim(-1, 1)
    if how == "transposed":
        return t.mT.contiguous().mT
    if how == "strided":
        wide = torch.zeros(*t.shape[:-1], 2 * t.shape[-1] + 1, dtype=t.dtype)
        wide[..., 1::2] = t
        return wide[..., 1::2]
    if how == "expanded":
        return t[:1].expand_as(t)
    if how == "negated":  # a view whose sign is turned when it is read, as the imaginary part of a conjugate is
        return torch.complex(t, -t).conj().imag if t.dtype in (torch.float32, torch.float64) else t
    return t.contiguous()


LAYOUTS = ("contiguous", "channels last", "transposed", "strided", "expanded", "negated")
