"""What cannot be told from shapes is probed: where the channels are, and whether images mix."""

from __future__ import annotations

import itertools

import pytest
import torch
from nets import images, tiny
from torch import nn
from torch.nn import functional as F

import cam_core as cc


class Pooled(nn.Module):
    """A layer `maps` whose output has its channels first or last, pooled by `cell` = (rows,
    columns), as networks for sound and text pool along one side.
    """

    def __init__(self, channels, last, cell):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, channels, 3, padding=1)
        self.last, self.cell = last, cell
        self.maps = nn.Identity()
        self.fc = nn.Linear(channels, 5)

    def forward(self, x):
        h = F.avg_pool2d(self.conv(x).relu(), self.cell)
        if self.last:
            return self.fc(self.maps(h.permute(0, 2, 3, 1)).square().mean((1, 2)))
        return self.fc(self.maps(h).square().mean((2, 3)))


SIZES = [(32, 32), (16, 32), (24, 16)]
CELLS = [(1, 1), (2, 2), (1, 2), (2, 8), (4, 1), (8, 2)]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_channels_first_and_last_are_told_apart_whatever_the_shape(size, last):
    """As many channels as rows, as columns, as both; pooled along one side, and along both."""
    x = images(1, size, seed=4)[:, :1]
    for cell, channels in itertools.product(CELLS, [2, 4, 8, 16, 32]):
        net = Pooled(channels, last, cell)
        expected = F.avg_pool2d(net.conv(x).relu(), cell)
        found = cc.capture(net, x, "maps", 1).activations["maps"]
        assert found.shape == expected.shape, (cell, channels)
        assert torch.equal(found, expected)


def test_the_map_of_an_ambiguous_layer_is_the_right_one():
    """The issue's own: 128 x 128 in, 64 channels of 64 x 16."""
    x = images(1, (128, 128), seed=4)[:, :1]
    net = Pooled(64, False, (2, 8))
    found = cc.capture(net, x, "maps", 2)
    A = F.avg_pool2d(net.conv(x).relu(), (2, 8)).detach().requires_grad_()
    G = torch.autograd.grad(net.fc(A.square().mean((2, 3)))[0, 2], A)[0]
    expected = (A * G.mean((2, 3), keepdim=True)).sum(1).relu()
    cam = cc.grad_cam(found.activations["maps"], found.gradients["maps"])
    assert torch.allclose(cam, expected.detach(), atol=1e-6) and cam.shape == (1, 64, 16)


def test_probing_is_done_once_and_not_for_plain_convolutions():
    net, passes = Pooled(8, True, (2, 2)), []
    net.register_forward_hook(lambda module, args, output: passes.append(len(args[0])))
    x = images(1, (16, 16))[:, :1]
    cc.capture(net, x, "maps", 0)
    assert passes == [1] + [1]  # the pass itself, and one whose graph tells
    passes.clear()
    cc.capture(net, x, "maps", 0)
    assert passes == [1]
    plain, passes = tiny(), []
    plain.register_forward_hook(lambda module, args, output: passes.append(len(args[0])))
    cc.capture(plain, images(1), ["4", "5", "6"], 0)
    assert passes == [1]


# ---- images that mix


class Mixing(nn.Module):
    """Two convolutions with a norm over the batch, or a mean over the batch, between them."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6, track_running_stats=False)
        self.deep = nn.Conv2d(6, 6, 3)
        self.fc = nn.Linear(6, 4)
        self.how = how

    def forward(self, x):
        h = self.conv(x)
        h = self.norm(h) if self.how == "norm" else h - h.mean(0, keepdim=True) / 2
        return self.fc(self.deep(h.relu()).relu().mean((2, 3)))


@pytest.mark.parametrize("how", ["norm", "mean"])
def test_images_that_would_mix_go_one_at_a_time(how):
    """Gradients, probabilities and pixel gradients of a batch equal those of each image alone."""
    x, target = images(3, (12, 12)), [1, 0, 2]
    net = Mixing(how)
    with pytest.warns(UserWarning, match="depends on the other images"):
        found = cc.capture(net, x, ["conv", "deep"], target)
    p = cc.probabilities(net, x)
    pixels = cc.input_gradient(net, x, target)
    for k in range(3):
        alone = x[k : k + 1].clone().requires_grad_()
        seen = {}
        hook = net.deep.register_forward_hook(
            lambda m, args, output, seen=seen: seen.update(A=output)
        )
        logits = net(alone)
        hook.remove()
        score = logits[0, target[k]]
        G, pixel = torch.autograd.grad(score, [seen["A"], alone])
        assert torch.allclose(found.gradients["deep"][k], G[0], atol=1e-6)
        assert torch.allclose(found.activations["deep"][k], seen["A"][0], atol=1e-6)
        assert torch.allclose(found.logits[k], logits[0], atol=1e-6)
        assert torch.allclose(p[k], logits[0].softmax(0), atol=1e-6)
        assert torch.allclose(pixels[k], pixel[0], atol=1e-6)


def test_an_ordinary_network_is_asked_once_whether_its_images_mix():
    net, passes = tiny(), []
    net.register_forward_hook(lambda module, args, output: passes.append(len(args[0])))
    for _ in range(2):
        cc.capture(net, images(3), "4")
    assert passes == [1, 2, 3, 3]
