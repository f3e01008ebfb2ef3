"""The gradient down to the pixels, plain and guided, against autograd by hand and captum; what it cannot do."""

from __future__ import annotations

import nets
import pytest
import torch
import torch.nn.functional as F
from captum.attr import GuidedBackprop, Saliency
from torch import nn

import cam_core as cc


class GuidedReLU(torch.autograd.Function):
    """The oracle: ReLU whose backward pass hands on what is positive of the gradient, where the input is positive."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clamp(min=0) * (ctx.saved_tensors[0] > 0)


RECTIFIERS = {
    "module": lambda self, x: self.relu(x),
    "module in place": lambda self, x: self.relu_(x),
    "F.relu": lambda self, x: F.relu(x),
    "F.relu in place": lambda self, x: F.relu(x, inplace=True),
    "torch.relu": lambda self, x: torch.relu(x),
    "method in place": lambda self, x: x.relu_(),
    "clamp": lambda self, x: x.clamp(min=0),
    "relu6 below 6": lambda self, x: F.relu6(x / 100) * 100,
    "oracle": lambda self, x: GuidedReLU.apply(x),
}


class Small(nn.Module):
    def __init__(self, rectify):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3), nn.Linear(5, 4)
        self.relu, self.relu_, self.rectify = nn.ReLU(), nn.ReLU(inplace=True), rectify

    def forward(self, x):
        x = self.rectify(self, self.first(x))
        x = self.rectify(self, self.second(x))
        return self.head(x.mean((2, 3)))


def by_hand(model, x, target):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(model(x).gather(1, torch.tensor(target)[:, None]).sum(), x)[0]


@pytest.mark.parametrize("name", [n for n in RECTIFIERS if n != "oracle"])
def test_the_plain_gradient_is_autograds(name):
    model, x = Small(RECTIFIERS[name]), nets.images(2, (12, 10))
    assert torch.equal(cc.input_gradient(model, x, [1, 3]), by_hand(model, x, [1, 3]))


@pytest.mark.parametrize("name", [n for n in RECTIFIERS if n != "oracle"])
def test_the_guided_gradient_however_a_relu_is_called(name):
    oracle, x = Small(RECTIFIERS["oracle"]), nets.images(2, (12, 10))
    expected = by_hand(oracle, x, [1, 3])
    found = cc.input_gradient(Small(RECTIFIERS[name]), x, [1, 3], guided=True)
    assert torch.allclose(found, expected, atol=1e-7) and expected.any()
    assert not torch.allclose(found, cc.input_gradient(Small(RECTIFIERS[name]), x, [1, 3]), atol=1e-4)


@pytest.mark.parametrize("arch", ["alexnet", "small_vgg", "resnet18", "squeezenet1_1"])
def test_like_captum(arch):
    model, x = nets.network(arch, seed=4), nets.images(2, (64, 64))
    plain = Saliency(model).attribute(x.clone().requires_grad_(), target=[1, 2], abs=False).detach()
    assert torch.allclose(cc.input_gradient(model, x, [1, 2]), plain, atol=1e-6) and plain.any()
    if arch != "resnet18":  # its blocks use one ReLU twice, which captum does not support
        guided = GuidedBackprop(model).attribute(x.clone().requires_grad_(), target=[1, 2]).detach()
        assert torch.allclose(cc.input_gradient(model, x, [1, 2], guided=True), guided, atol=1e-6) and guided.any()


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_model_is_left_as_it_was(guided, mode):
    model = nets.tiny().train()
    before = nets.state(model)
    with mode():
        found = cc.input_gradient(model, nets.images(2), [0, 1], guided=guided)
    assert nets.state(model) == before and not found.requires_grad and found.dtype == torch.float32
    plain, x = cc.input_gradient(model, nets.images(2), [0, 1]), nets.images(2)
    assert torch.equal(plain, by_hand(model.eval(), x, [0, 1])), "the ReLUs of the next pass are as they were"


UNCOVERED = {
    "Gelu": lambda x: F.gelu(x),
    "Silu": lambda x: F.silu(x),
    "HardSwish": lambda x: F.hardswish(x),
    "LeakyRelu": lambda x: F.leaky_relu(x),
    "Elu": lambda x: F.elu(x),
    "Maximum": lambda x: torch.maximum(x, torch.zeros(())),
    "Where": lambda x: torch.where(x > 0, x, torch.zeros(())),
}


@pytest.mark.parametrize("name", UNCOVERED)
def test_what_guided_does_not_cover_is_named(name):
    model, x = Small(lambda self, x: UNCOVERED[name](x)), nets.images(2, (12, 10))
    before = nets.state(model)
    with pytest.raises(ValueError, match=f"(?i){name}"):
        cc.input_gradient(model, x, [0, 1], guided=True)
    assert nets.state(model) == before
    assert torch.equal(cc.input_gradient(model, x, [0, 1]), by_hand(model, x, [0, 1])), "plain works all the same"


def test_two_targets_differ_and_the_predicted_one_is_the_default():
    model, x = nets.tiny(), nets.images(2)
    first, second = (cc.input_gradient(model, x, k) for k in (0, 1))
    assert not torch.allclose(first, second)
    assert torch.equal(cc.input_gradient(model, x), cc.input_gradient(model, x, model(x).argmax(1)))


def test_guided_grad_cam_lies_within_both():
    model, x = nets.tiny(), nets.images(2)
    shot = cc.capture(model, x, "4", [0, 1])
    cam = cc.enlarge(cc.grad_cam(shot.activations["4"], shot.gradients["4"]), (12, 10))
    guided = cc.input_gradient(model, x, [0, 1], guided=True)
    product = guided * cam[:, None]
    assert product.any() and ((product == 0) == ((guided == 0) | (cam[:, None] == 0))).all()


@pytest.mark.parametrize(
    ("x", "target", "said"),
    [
        (torch.zeros(3, 12, 10), 0, "x must be a float tensor"),
        (torch.zeros(1, 3, 12, 10, dtype=torch.uint8), 0, "x must be a float tensor"),
        (torch.zeros(1, 3, 12, 10), 4, "target=4 is out of range: the model has 4 classes"),
        (torch.zeros(1, 3, 12, 10), [0, 1], "target has 2 entries for 1 images"),
        (torch.full((1, 3, 12, 10), torch.nan), 0, "NaN"),
    ],
)
def test_bad_input_is_refused(x, target, said):
    with pytest.raises(ValueError, match=said):
        cc.input_gradient(nets.tiny(), x, target)


def test_a_score_that_does_not_depend_on_the_image():
    class Constant(nn.Module):
        def forward(self, x):
            return torch.ones(len(x), 3)

    with pytest.raises(ValueError, match="does not depend on the input"):
        cc.input_gradient(Constant(), nets.images(1), 0)


# ------------------------------------------------------------------------------------------ fusing layers, enlarging


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
def test_enlarging_is_torchs_interpolation_between_two_divisions(mode):
    maps = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0))
    by = {"nearest": "nearest-exact"}.get(mode, mode)
    settings = {} if mode == "nearest" else {"align_corners": False}
    large = F.interpolate((maps / maps.amax((1, 2), keepdim=True))[:, None], (9, 10), mode=by, **settings)[:, 0]
    large = large.clamp(min=0)
    found = cc.enlarge(maps, (9, 10), mode)
    assert torch.allclose(found, large / large.amax((1, 2), keepdim=True)) and found.min() >= 0


def test_an_unknown_mode_or_fusion_is_refused():
    with pytest.raises(ValueError, match="mode='cubic' must be 'nearest', 'bilinear' or 'bicubic'"):
        cc.enlarge(torch.rand(1, 2, 2), (4, 4), "cubic")
    with pytest.raises(ValueError, match="fuse='meen' is no fusion of layers. Nearest: mean"):
        cc.fuse_layers([torch.rand(1, 2, 2)], (4, 4), "meen")


def test_layers_are_fused_as_the_formulas_say():
    fine, coarse = torch.rand(2, 8, 8), torch.rand(2, 2, 2)
    a, b = cc.enlarge(fine, (16, 16)), cc.enlarge(coarse, (16, 16))
    expected = {
        "product": (a * b).sqrt(), "mean": (a + b) / 2, "maximum": torch.maximum(a, b),
        "layercam": torch.maximum(torch.tanh(2 * a), b),
    }  # fmt: skip
    assert set(expected) == set(cc.LAYER_FUSIONS)
    for name, m in expected.items():
        for order in ([fine, coarse], [coarse, fine]):  # which is the coarsest is told by the sizes
            assert torch.allclose(cc.fuse_layers(order, (16, 16), name), m / m.amax((1, 2), keepdim=True), atol=1e-6)
    assert torch.equal(cc.fuse_layers([coarse], (16, 16), "layercam"), b), "one layer is itself, whatever the rule"


def test_the_zero_baseline_is_mean_grey_at_both_ends():
    x = nets.images(2)
    start, end = cc.baselines(x, "zero")
    assert not start.any() and not end.any() and start.shape == x.shape
    with pytest.raises(ValueError, match="baseline='grey' must be 'rise', 'zero', 'black'"):
        cc.baselines(x, "grey")
