"""Small seeded networks for the tests: nothing here needs a checkpoint or a download."""

from __future__ import annotations

import functools
from collections import OrderedDict

import torch
from torch import nn

import cam_core as cc

torch.set_num_threads(1)  # networks as small as these only lose time to more threads
models = cc.networks.torchvision.models  # importable beside a CPU-only torch only from there


def settle(model: nn.Module, seed: int) -> nn.Module:
    """Moves batch-norm statistics away from 0 and 1, so that a test notices if they are ignored."""
    draw = torch.Generator().manual_seed(seed + 1000)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.copy_(0.1 * torch.randn(m.num_features, generator=draw))
            m.running_var.copy_(0.5 + torch.rand(m.num_features, generator=draw))
            m.bias.data.copy_(0.2 * torch.randn(m.num_features, generator=draw))
    return model.eval()


def tiny(seed: int = 0, classes: int = 4, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Two convolutions with batch norm and in-place ReLUs, for inputs (B, 3, 12, 10) or larger.

    0 conv, 1 batch norm, 2 ReLU, 3 max pooling, 4 conv, 5 batch norm, 6 ReLU, 7 pooling,
    8 flatten, 9 to 11 a classifier with a hidden layer.
    """
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1),
        nn.BatchNorm2d(5),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(5, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 8),
        nn.Tanh(),
        nn.Linear(8, classes),
    )
    return settle(net, seed).to(dtype)


def strong(seed: int = 2) -> nn.Sequential:
    """`tiny` with a classifier steep enough for probabilities that rise and fall."""
    net = tiny(seed)
    net[9].weight.data *= 4
    net[11].weight.data *= 4
    return net


def images(count: int = 2, size: tuple[int, int] = (12, 10), seed: int = 0, **kwargs):
    """(count, 3, H, W) of seeded noise."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, *size, generator=draw).to(**kwargs)


def small_vgg(classes: int) -> nn.Module:
    convolutions = models.vgg.make_layers(models.vgg.cfgs["A"])
    for m in convolutions:
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
    head = nn.Sequential(nn.Linear(2048, 16), nn.ReLU(inplace=True), nn.Linear(16, classes))
    pool = nn.AdaptiveAvgPool2d(2)
    parts = OrderedDict(features=convolutions, avgpool=pool, flatten=nn.Flatten(), classifier=head)
    return nn.Sequential(parts)


def small_vit(classes: int) -> nn.Module:
    net = models.VisionTransformer(32, 8, 12, 2, 16, 32, num_classes=classes)
    nn.init.normal_(net.heads.head.weight, std=0.2)  # it starts at 0, where every map is 0
    return net


def small_swin(classes: int) -> nn.Module:
    depths, heads = [2, 2, 6, 2], [1, 2, 4, 8]
    return models.SwinTransformer([4, 4], 16, depths, heads, [4, 4], num_classes=classes)


def small_densenet(classes: int) -> nn.Module:
    return models.DenseNet(8, (2, 2, 2, 2), 16, num_classes=classes)


def small_convnext(classes: int) -> nn.Module:
    block = models.convnext.CNBlockConfig
    sizes = [block(8, 16, 1), block(16, 32, 1), block(32, 64, 2), block(64, None, 1)]
    return models.ConvNeXt(sizes, layer_scale=0.5, num_classes=classes)


# Networks of a kind, with the module names of the well-known ones and a fraction of their size.
SMALL = {
    "small_vgg": small_vgg,
    "small_vit": small_vit,
    "small_swin": small_swin,
    "small_densenet": small_densenet,
    "small_convnext": small_convnext,
}


def network(arch: str, seed: int = 0, classes: int = 10) -> nn.Module:
    """A torchvision classifier by name, or one of SMALL, with seeded random weights."""
    torch.manual_seed(seed)
    if arch in SMALL:
        return settle(SMALL[arch](classes), seed)
    slow_start = arch in ("googlenet", "inception_v3", "vgg11")
    options = {"init_weights": False} if slow_start else {}
    return settle(models.get_model(arch, weights=None, num_classes=classes, **options), seed)


@functools.cache
def resnet18() -> nn.Module:
    """One ResNet-18 for all tests that leave it as it was."""
    return network("resnet18", seed=3)


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def state(model: nn.Module) -> dict:
    """Everything about a model that a visitor could change; `==` compares it bit by bit."""
    hooks = {}
    for name, module in model.named_modules():
        for kind in HOOKS:
            hooks[name, kind] = list(getattr(module, kind).values())
    parameters = dict(model.named_parameters())
    grads = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    return {
        "hooks": hooks,
        "modes": {name: module.training for name, module in model.named_modules()},
        "tensors": {name: _bits(t) for name, t in model.state_dict().items()},
        "objects": {name: id(p) for name, p in parameters.items()},
        "requires_grad": {name: p.requires_grad for name, p in parameters.items()},
        "grad": {name: (id(g), _bits(g)) for name, g in grads.items()},
    }


def _bits(t: torch.Tensor) -> tuple[torch.dtype, bytes]:
    numbers = t.float() if t.dtype == torch.bfloat16 else t
    return t.dtype, numbers.detach().cpu().numpy().tobytes()


class Small(nn.Module):
    """Two convolutions and a linear head, for inputs (B, 3, h, w) from 4 x 4 on.

    in_place: ReLUs alter their input. reused: one ReLU serves both places. norm: batch norm with
    statistics off 0 and 1. kind: "maps", or a last layer that puts out "tokens", (B, h*w, C), or
    channels "last", (B, h, w, C). answer: makes what is handed back of the logits. extra: a module
    behind the first ReLU.
    """

    def __init__(
        self,
        seed=0,
        classes=3,
        in_place=False,
        reused=False,
        norm=False,
        kind="maps",
        answer=None,
        extra=None,
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
        self.head = nn.Linear(5 if kind == "maps" else 16, classes)
        self.kind = kind
        self.answer = answer
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
        """The layers that can be captured, with the shapes of their maps for an input."""
        half = (height // 2, width // 2)
        shapes = {
            "stem": (4, height, width),
            "norm": (4, height, width),
            "first": (4, height, width),
            "extra": (4, height, width),
            "pool": (4, *half),
            "body": (5, *half),
            "second": (5, *half),
            "mix": (16, *half),
        }
        if self.second is None:
            del shapes["first"]  # it runs twice
        return {name: shape for name, shape in shapes.items() if getattr(self, name) is not None}


def laid_out(t: torch.Tensor, how: str) -> torch.Tensor:
    """The same numbers in another layout of memory ("expanded": the first image's for all)."""
    if how == "channels last" and t.ndim == 4:
        return t.to(memory_format=torch.channels_last)
    if how == "channels last":
        return t.movedim(1, -1).contiguous().movedim(-1, 1)
    if how == "transposed":
        return t.mT.contiguous().mT
    if how == "strided":
        wide = torch.zeros(*t.shape[:-1], 2 * t.shape[-1] + 1, dtype=t.dtype)
        wide[..., 1::2] = t
        return wide[..., 1::2]
    if how == "expanded":
        return t[:1].expand_as(t)
    if how == "negated" and t.dtype in (torch.float32, torch.float64):
        return torch.complex(t, -t).conj().imag  # a view whose sign is turned when it is read
    return t.contiguous()


LAYOUTS = ("contiguous", "channels last", "transposed", "strided", "expanded", "negated")


def plateaued(size, seed=0, zeros=0.4):
    """Random maps with a plateau of zeros, as products of rectified maps have."""
    m = torch.rand(3, *size, generator=torch.Generator().manual_seed(seed))
    return torch.where(m < zeros, 0.0, m)
