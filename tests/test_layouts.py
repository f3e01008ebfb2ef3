"""What cannot be told from shapes is probed: where the channels are, and whether images mix."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients
from nets import images, tiny
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

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


@pytest.mark.parametrize("target", [torch.tensor(1), np.array([1, 0, 2]), range(3), (1, 0, 2)])
def test_every_kind_of_class_goes_one_at_a_time(target):
    x, net = images(3, (12, 12)), Mixing("norm")
    with pytest.warns(UserWarning, match="depends on the other images"):
        found = cc.capture(net, x, "deep", target)
    classes = torch.as_tensor(target).expand(3)
    assert found.target.tolist() == classes.tolist()
    pixels = cc.input_gradient(net, x, target)
    for k in range(3):
        alone = x[k : k + 1].clone().requires_grad_()
        expected = torch.autograd.grad(net(alone)[0, classes[k]], alone)[0]
        assert torch.allclose(pixels[k], expected[0], atol=1e-6)
    with pytest.raises(ValueError, match="2 entries for 3 images"):
        cc.input_gradient(net, x, [1, 0])


def test_the_points_of_integrated_gradients_do_not_mix_either():
    """The sum over the pixels is s(x) - s(grey), each of them alone in its pass."""
    x, net = images(2, (12, 12)), Mixing("norm")
    with pytest.warns(UserWarning, match="depends on the other images"):
        found = cc.integrated_gradients(net, x, 1, steps=3)
    for k in range(2):
        alone = IntegratedGradients(net).attribute(
            x[k : k + 1], target=1, n_steps=3, internal_batch_size=1
        )
        assert torch.allclose(found[k], alone[0].float(), atol=1e-5)


def test_a_network_that_draws_lots_says_so():
    class Draws(Mixing):
        def forward(self, x):
            return self.fc(F.dropout(self.conv(x).relu().mean((2, 3)), 0.5))

    with pytest.warns(UserWarning, match="does not say the same of an image twice"):
        cc.capture(Draws("norm"), images(3, (12, 12)), "conv", 1)


class Together(nn.Module):
    """Takes no image alone; batch norm over the batch behind the pooling, or none."""

    def __init__(self, mixes):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)
        self.norm = nn.BatchNorm1d(6, track_running_stats=False) if mixes else None

    def forward(self, x):
        h = self.conv(x).relu().mean((2, 3))
        if self.norm:
            return self.fc(self.norm(h))
        assert len(x) > 1, "no image alone"
        return self.fc(h)


def test_a_network_that_takes_no_image_alone():
    """Independent ones are explained; of those that mix there is no answer to one image."""
    x, net = images(3, (12, 12)), Together(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = cc.capture(net, x, "conv", 1)
    expected = (found.activations["conv"] > 0) * net.fc.weight[1].view(1, 6, 1, 1) / 100
    assert torch.allclose(found.gradients["conv"], expected, atol=1e-7)
    assert torch.allclose(cc.probabilities(net, x), net(x).softmax(1), atol=1e-6)
    with (
        pytest.warns(UserWarning, match="depends on the other images"),
        pytest.raises(ValueError, match="nothing to average over in one image"),
    ):
        cc.capture(Together(True), x, "conv", 1)


def test_a_batch_that_does_not_fit_leaves_no_verdict():
    net = Mixing("norm")
    with pytest.raises(ValueError, match="does not fit"):
        cc.capture(net, images(3, (12, 12))[:, :2], "conv", 1)
    with pytest.warns(UserWarning, match="depends on the other images"):
        cc.capture(net, images(3, (12, 12)), "conv", 1)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_a_checkpointed_network(reentrant):
    """It computes its layers a second time, for the backward pass."""

    class Checkpointed(Together):
        def forward(self, x):
            h = checkpoint(lambda x: self.conv(x).relu(), x, use_reentrant=reentrant)
            return self.fc(h.mean((2, 3)))

    x, net = images(3, (12, 12)), Checkpointed(False)
    if reentrant:  # torch runs it without a graph
        with pytest.raises(ValueError, match="torch.no_grad"):
            cc.capture(net, x, "conv", 1)
        return
    found = cc.capture(net, x, "conv", 1)
    expected = (net.conv(x) > 0) * net.fc.weight[1].view(1, 6, 1, 1) / 100
    assert torch.allclose(found.gradients["conv"], expected, atol=1e-7)


# ---- tokens


class Tokens(nn.Module):
    """Patches of 16 x 16 as (B, n, C) behind `extra` other tokens, or as (B, C, n)."""

    def __init__(self, extra, channels=16, first=False):
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.maps = nn.Conv2d(3, channels, 16, 16), nn.Identity()
        self.tokens = nn.Parameter(torch.randn(1, extra, channels))
        self.fc, self.first = nn.Linear(channels, 4), first

    def forward(self, x):
        h = self.patches(x).flatten(2)
        if self.first:
            return self.fc(self.maps(h).square().mean(2))
        return self.fc(self.maps(torch.cat([self.tokens, h.mT], 1)).square().mean(1))


@pytest.mark.parametrize("size", [(64, 64), (48, 64), (32, 64), (80, 48)])
def test_tokens_in_front_of_the_patches_are_left_out(size):
    """17 tokens of an input of 48 x 64 are 5 and 3 x 4, not 2 and 3 x 5."""
    x = images(1, size)
    for extra in (0, 1, 2, 3, 5):
        net = Tokens(extra)
        found = cc.capture(net, x, "maps", 1).activations["maps"]
        assert found.shape == net.patches(x).shape
        assert torch.equal(found, net.patches(x))


@pytest.mark.parametrize("channels", [4, 9, 12, 16, 32])
def test_positions_behind_the_channels(channels):
    """(B, C, n), as `flatten(2)` makes it, where C could be a number of patches."""
    for size in ((48, 64), (64, 64)):
        net, x = Tokens(0, channels, first=True), images(1, size)
        found = cc.capture(net, x, "maps", 1).activations["maps"]
        assert torch.equal(found, net.patches(x))


class Patches(nn.Module):
    """A block whose one layer is a convolution, and which hands on (B, h, w, C)."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 2, 2)

    def forward(self, x):
        return self.conv(x).permute(0, 2, 3, 1)


class PatchesLast(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.block, self.fc = Patches(), nn.Linear(16, 4)

    def forward(self, x):
        return self.fc(self.block(x).square().mean((1, 2)))


@pytest.mark.parametrize("size", [(32, 32), (32, 64)])
def test_a_block_of_convolutions_may_hand_on_channels_last(size):
    x, net = images(1, size), PatchesLast()
    assert torch.equal(cc.capture(net, x, "block", 1).activations["block"], net.block.conv(x))


def test_an_ordinary_network_is_asked_once_whether_its_images_mix():
    net, passes = tiny(), []
    net.register_forward_hook(lambda module, args, output: passes.append(len(args[0])))
    for _ in range(2):
        cc.capture(net, images(3), "4")
    assert passes == [1, 2, 3, 3]
