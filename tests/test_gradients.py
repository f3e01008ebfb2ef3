"""The gradient down to the pixels, plain and guided, and what enlarging and fusing layers do."""

from __future__ import annotations

import nets
import pytest
import torch
import torch.nn.functional as F
from captum.attr import GuidedBackprop
from torch import nn

import cam_core as cc

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:captum")  # captum announces its hooks


class GuidedReLU(torch.autograd.Function):
    """The oracle: a ReLU that hands back what is positive of the gradient, where x > 0."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clamp(min=0) * (ctx.saved_tensors[0] > 0)


class Net(nn.Module):
    """Two convolutions and a linear head, with `rectify` as both rectifiers."""

    def __init__(self, rectify):
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Conv2d(3, 6, 3)
        self.second = nn.Conv2d(6, 5, 3)
        self.head = nn.Linear(5, 4)
        self.rectify = rectify

    def forward(self, x):
        x = self.rectify(self.first(x))
        x = self.rectify(self.second(x))
        return self.head(x.mean((2, 3)))


X = nets.images(2, (12, 10))
TARGET = [1, 3]


def by_autograd(model):
    x = X.clone().requires_grad_()
    scores = model(x).gather(1, torch.tensor(TARGET)[:, None])
    return torch.autograd.grad(scores.sum(), x)[0]


FUNCTIONS = {
    "F.relu": F.relu,
    "F.relu in place": lambda x: F.relu(x, inplace=True),
    "torch.relu": torch.relu,
    "a method in place": lambda x: x.relu_(),
    "clamp": lambda x: x.clamp(min=0),
    "relu6 below 6": lambda x: F.relu6(x / 100) * 100,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_guided_where_a_relu_is_a_function(name):
    """There hooks on modules, as captum sets them, find nothing and give the plain gradient."""
    expected = by_autograd(Net(GuidedReLU.apply))
    plain = by_autograd(Net(FUNCTIONS[name]))
    assert not torch.allclose(expected, plain, atol=1e-4)
    found = cc.input_gradient(Net(FUNCTIONS[name]), X, TARGET, guided=True)
    assert torch.allclose(found, expected, atol=1e-7)
    assert torch.equal(cc.input_gradient(Net(FUNCTIONS[name]), X, TARGET), plain)
    by_hooks = GuidedBackprop(Net(FUNCTIONS[name])).attribute(X.clone(), target=TARGET)
    assert torch.allclose(by_hooks, plain, atol=1e-7)


@pytest.mark.parametrize("model", [nets.tiny(), nets.network("squeezenet1_1", seed=4)])
def test_guided_is_captums_where_relus_are_modules(model):
    x = nets.images(2, (64, 64))
    expected = GuidedBackprop(model).attribute(x.clone().requires_grad_(), target=TARGET)
    found = cc.input_gradient(model, x, TARGET, guided=True)
    assert torch.allclose(found, expected.detach(), atol=1e-6) and found.any()


@pytest.mark.parametrize("guided", [False, True])
def test_the_model_is_left_as_it_was(guided):
    model = nets.tiny().train()
    before = nets.state(model)
    with torch.inference_mode():
        found = cc.input_gradient(model, X, TARGET, guided=guided)
    assert nets.state(model) == before and not found.requires_grad
    assert torch.equal(cc.input_gradient(model, X, TARGET), by_autograd(model.eval()))


UNCOVERED = {
    "Gelu": F.gelu,
    "Silu": F.silu,
    "LeakyRelu": F.leaky_relu,
    "Where": lambda x: torch.where(x > 0, x, torch.zeros(())),
}


@pytest.mark.parametrize("name", UNCOVERED)
def test_a_rectifier_without_a_rule_is_named(name):
    model = Net(UNCOVERED[name])
    with pytest.raises(ValueError, match=name):
        cc.input_gradient(model, X, TARGET, guided=True)
    assert torch.equal(cc.input_gradient(model, X, TARGET), by_autograd(model))


def test_the_predicted_class_is_the_default():
    model = nets.tiny()
    predicted = model(X).argmax(1)
    assert torch.equal(cc.input_gradient(model, X), cc.input_gradient(model, X, predicted))
    other = (predicted + 1) % 4
    assert not torch.allclose(cc.input_gradient(model, X), cc.input_gradient(model, X, other))


def test_a_score_that_does_not_depend_on_the_image():
    class Constant(nn.Module):
        def forward(self, x):
            return torch.ones(len(x), 3)

    with pytest.raises(ValueError, match="does not depend on the input"):
        cc.input_gradient(Constant(), X, 0)


# ---- enlarging, fusing layers


@pytest.mark.parametrize(
    ("mode", "in_torch"),
    [("nearest", "nearest-exact"), ("bilinear", "bilinear"), ("bicubic", "bicubic")],
)
def test_enlarging_is_torchs_interpolation_between_two_divisions(mode, in_torch):
    maps = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0))
    scaled = maps / maps.amax((1, 2), keepdim=True)
    large = F.interpolate(scaled[:, None], (9, 10), mode=in_torch)[:, 0].clamp(min=0)
    expected = large / large.amax((1, 2), keepdim=True)
    assert torch.allclose(cc.enlarge(maps, (9, 10), mode), expected)


def test_layers_are_fused_as_the_formulas_say():
    fine = torch.rand(2, 8, 8)
    coarse = torch.rand(2, 2, 2)
    a = cc.enlarge(fine, (16, 16))
    b = cc.enlarge(coarse, (16, 16))
    expected = {
        "product": (a * b).sqrt(),
        "mean": (a + b) / 2,
        "maximum": torch.maximum(a, b),
        "layercam": torch.maximum(torch.tanh(2 * a), b),
    }
    assert set(expected) == set(cc.LAYER_FUSIONS)
    for name, fused in expected.items():
        fused = fused / fused.amax((1, 2), keepdim=True)
        for order in ([fine, coarse], [coarse, fine]):  # the sizes tell which one is coarsest
            assert torch.allclose(cc.fuse_layers(order, (16, 16), name), fused, atol=1e-6)
    assert torch.equal(cc.fuse_layers([coarse], (16, 16), "layercam"), b)
