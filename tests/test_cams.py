"""CAMs and their fusion, by hand on 2 x 2 maps, and the identities that theory promises.

What holds for any maps, drawn at random, is in test_properties.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nets import images, resnet18, tiny
from torch import nn

import cam_core as cc

# Two channels of a 2 x 2 map, and the gradients of a score with respect to them.
A = torch.tensor([[[[1.0, 2.0], [3.0, 0.0]], [[4.0, 0.0], [2.0, 2.0]]]])
G = torch.tensor([[[[1.0, -1.0], [2.0, 2.0]], [[-2.0, 1.0], [-1.0, 0.0]]]])

BY_HAND = {
    # w = (1 - 1 + 2 + 2) / 4 = 1 and (-2 + 1 - 1 + 0) / 4 = -1/2
    # A1 - A2 / 2 = [1 - 2, 2 - 0; 3 - 1, 0 - 1] = [-1, 2; 2, -1], rectified
    "grad_cam": [[0.0, 2.0], [2.0, 0.0]],
    # ReLU(G) A = [1*1, 0*2; 2*3, 2*0] + [0*4, 1*0; 0*2, 0*2]
    "layer_cam": [[1.0, 0.0], [6.0, 0.0]],
    # G A = [1, -2; 6, 0] + [-8, 0; -2, 0] = [-7, -2; 4, 0], rectified
    "hires_cam": [[0.0, 0.0], [4.0, 0.0]],
    # S = 6 and 8; a = G^2 / (2 G^2 + S G^3) = 1 / (2 + S G) where G > 0, and ReLU(G) cuts the rest:
    # channel 1: 1/8 * 1 + 1/14 * 2 + 1/14 * 2 = 1/8 + 2/7 = 23/56; channel 2: 1/10 * 1
    # 23/56 [1, 2; 3, 0] + 1/10 [4, 0; 2, 2]
    "grad_cam_pp": [[23 / 56 + 0.4, 46 / 56], [69 / 56 + 0.2, 0.2]],
    # w = sum(G A) / sum(A) = (1 - 2 + 6 + 0) / 6 = 5/6 and (-8 + 0 - 2 + 0) / 8 = -5/4
    # 5/6 [1, 2; 3, 0] - 5/4 [4, 0; 2, 2] = [5/6 - 5, 5/3; 5/2 - 5/2, -5/2], rectified
    "xgrad_cam": [[0.0, 5 / 3], [0.0, 0.0]],
}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_cam_by_hand(name):
    found = cc.CAMS[name](A, G)
    assert torch.allclose(found, torch.tensor([BY_HAND[name]]), atol=1e-6)
    dead = torch.cat([torch.zeros(1, 1, 2, 2), A], 1), torch.cat([torch.ones(1, 1, 2, 2), G], 1)
    assert torch.allclose(cc.CAMS[name](*dead), found, atol=1e-6)  # a dead channel adds nothing


def test_layer_cam_is_rectified_after_the_sum_not_before():
    """Before a ReLU, -1 in one channel cancels 1 in the other (eq. 7 and 8 of the paper)."""
    a = torch.tensor([[[[1.0, 1.0]], [[-1.0, -3.0]]]])
    g = torch.tensor([2.0, 0.5]).view(1, 2, 1, 1).expand(1, 2, 1, 2)
    assert cc.layer_cam(a, torch.ones_like(g)).tolist() == [[[0.0, 0.0]]]
    assert cc.layer_cam(a, g).tolist() == [[[1.5, 0.5]]]


@pytest.mark.parametrize("name", BY_HAND)
def test_arithmetic_is_done_in_float32(name):
    """In half precision 2048 + 1 = 2048: a sum taken there would be off by percents."""
    many = torch.ones(1, 2101, 2, 65)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(cc.CAMS[name](many.to(dtype), many.to(dtype)), cc.CAMS[name](many, many))


def test_grad_cam_pp_where_its_formula_divides_by_zero():
    """Gradients whose square is 0 in float32, and 2 + S G = 0, which can happen before a ReLU."""
    found = cc.grad_cam_pp(A, 1e-25 * G.abs())
    limit = torch.einsum("bk,bkhw->bhw", 0.5e-25 * G.abs().sum((2, 3)), A)  # its weight a is 1/2
    assert found.any() and torch.allclose(found / limit, torch.ones_like(found), rtol=1e-5)
    a, g = torch.tensor([[[[1.0, -3.0]]]]), torch.tensor([[[[1.0, 0.5]]]])  # S = -2: 2 - 2, 2 - 1
    assert cc.grad_cam_pp(a, g).tolist() == [[[0.5, 0.0]]]


@pytest.mark.parametrize("kind", ["small", "resnet18"])
def test_behind_global_pooling_the_cams_are_known_from_the_weights(kind):
    """With y_c = sum_k w_ck mean(A_k), dy_c/dA_k(i, j) = w_ck / (h w), so without autograd

    Grad-CAM = HiResCAM = XGrad-CAM = ReLU(sum_k w_ck A_k) / (h w) and
    LayerCAM = sum_k ReLU(w_ck) A_k / (h w).
    """
    if kind == "resnet18":
        net, x, layer = resnet18(), images(2, (96, 64)), "layer4"
        w = net.fc.weight[3]
    else:
        torch.manual_seed(1)
        pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)]
        net, x, layer = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), *pooled), images(2), "1"
        w = net[4].weight[3]
    captured = cc.capture(net, x, layer, 3)
    a, g = captured.activations[layer], captured.gradients[layer]
    w = w.detach().view(1, -1, 1, 1)
    area = a.shape[2] * a.shape[3]
    signed = (w * a).sum(1).relu() / area
    assert signed.any()
    for name in ("grad_cam", "hires_cam", "xgrad_cam"):
        assert torch.allclose(cc.CAMS[name](a, g), signed, atol=1e-5), name
    assert torch.allclose(cc.layer_cam(a, g), (w.relu() * a).sum(1) / area, atol=1e-5)


# ---- normalise, enlarge


@pytest.mark.parametrize("scale", [1e-38, 1.0, 3e37])
def test_normalise_by_hand(scale):
    maps = scale * torch.tensor([[[1.0, 2.0], [4.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    before = maps.clone()
    expected = torch.tensor([[[0.25, 0.5], [1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert torch.allclose(cc.normalise(maps), expected, rtol=1e-5) and torch.equal(maps, before)


def test_enlarge_by_hand():
    """align_corners=False: of two pixels 0 and 1 four become 0, 1/4, 3/4, 1, not 0, 1/3, 2/3, 1."""
    assert cc.enlarge(torch.tensor([[[0.0, 7.0]]]), (1, 4)).tolist() == [[[0.0, 0.25, 0.75, 1.0]]]
    # in three pixels a peak falls between two: 0, 1/2, 1/6; the maximum is then 1 again
    third = cc.enlarge(torch.tensor([[[0.0, 0.0, 1.0, 0.0]]]), (1, 3))
    assert third[0, 0].tolist() == pytest.approx([0.0, 1.0, 1 / 3], abs=1e-6)
    corner = torch.zeros(2, 2, 3)
    corner[0, 1, 0] = 5
    large = cc.enlarge(corner, (8, 18))  # height, then width
    assert large.shape == (2, 8, 18) and large[0, 7, 0] == 1 and not large[0, :2].any()
    assert not large[1].any()


# ---- hybrid

P = torch.tensor([[[1.0, 4.0], [2.0, 0.0]]])  # normalised: 1/4, 1; 1/2, 0
Q = torch.tensor([[[9.0, 1.0], [0.0, 9.0]]])  # normalised: 1, 1/9; 0, 1
ZERO = torch.zeros_like(P)

RULES = {  # with alpha = 1/4 for P and 3/4 for Q
    "product": [(1 / 4) ** 0.25, (1 / 9) ** 0.75, 0, 0],
    "floored": [  # 1/10 is added to both and taken away again
        0.35**0.25 * 1.1**0.75 - 0.1,
        1.1**0.25 * (1 / 9 + 0.1) ** 0.75 - 0.1,
        0.6**0.25 * 0.1**0.75 - 0.1,
        0.1**0.25 * 1.1**0.75 - 0.1,
    ],
    "mean": [1 / 16 + 3 / 4, 1 / 4 + 3 / 36, 1 / 8, 3 / 4],
    "maximum": [3 / 4, 1 / 4, 1 / 8, 3 / 4],  # of 1/16, 3/4; 1/4, 1/12; 1/8, 0; 0, 3/4
}


@pytest.mark.parametrize("rule", RULES)
def test_a_fusion_rule_by_hand(rule):
    expected = np.array(RULES[rule])
    found = cc.hybrid(P, Q, 0.25, rule=rule)
    assert found.flatten().tolist() == pytest.approx(list(expected / expected.max()), abs=1e-6)
    scaled = cc.hybrid(1e3 * P, 1e-3 * Q, 0.25, rule=rule)
    assert torch.allclose(scaled, found, atol=1e-6)  # the larger factor does not decide


def test_the_hybrid_is_the_product_unless_another_rule_is_given():
    assert torch.equal(cc.hybrid(P, Q, 0.4), cc.hybrid(P, Q, 0.4, rule="product"))


def test_a_hybrid_of_maps_of_two_sizes():
    """At 1 x 4 the first is 1/4, 7/16, 13/16, 1, enlarged from 1/4, 1; the second 1, 1, 1/4, 0."""
    deep, shallow = torch.tensor([[[2.0, 8.0]]]), torch.tensor([[[4.0, 4.0, 1.0, 0.0]]])
    product = np.sqrt(np.array([1 / 4, 7 / 16, 13 / 16, 1]) * np.array([1, 1, 1 / 4, 0]))
    found = cc.hybrid(deep, shallow, 0.5, (1, 4))
    assert found[0, 0].tolist() == pytest.approx(list(product / product.max()))
    with pytest.raises(ValueError, match="size"):
        cc.hybrid(deep, shallow, 0.5)
    with pytest.raises(ValueError, match="1 and 2"):
        cc.hybrid(deep, torch.ones(2, 4, 4), 0.5, (8, 8))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [None, (7, 5)])
def test_the_ends_are_one_map_exactly(rule, size):
    """Also where the map without weight is zero: 0 ** 0 is 1."""
    alone = cc.normalise(Q) if size is None else cc.enlarge(Q, size)
    for other in (P, ZERO):
        assert torch.equal(cc.hybrid(Q, other, 1, size, rule), alone)
        assert torch.equal(cc.hybrid(other, Q, 0.0, size, rule), alone)


@pytest.mark.parametrize("rule", RULES)
def test_a_map_that_is_zero(rule):
    """Two zero maps fuse to zero for any alpha: rounding in f^alpha f^(1-alpha) - f is no map."""
    for alpha in np.linspace(0, 1, 21):
        assert not cc.hybrid(ZERO, ZERO, alpha, rule=rule).any()
    one_zero = cc.hybrid(P, ZERO, 0.3, rule=rule)
    if rule == "product":
        assert not one_zero.any()
    else:  # the order of the other map is left
        assert one_zero.flatten().argsort().tolist() == P.flatten().argsort().tolist()


def test_floored_keeps_an_order_where_a_factor_is_zero():
    """Where LayerCAM is zero the product is tied, and Grad-CAM does not count."""
    a = torch.tensor([[[0.2, 0.9], [0.4, 1.0]]])
    b = torch.tensor([[[0.0, 0.0], [0.0, 1.0]]])
    assert cc.hybrid(a, b, 0.5).tolist() == [[[0.0, 0.0], [0.0, 1.0]]]
    for alpha in (0.1, 0.5, 0.9):
        (left, right), (below, _) = cc.hybrid(a, b, alpha, rule="floored")[0].tolist()
        assert 0 < left < below < right < 1


def test_an_alpha_that_float32_takes_for_0_is_0():
    """Otherwise 0 ** alpha is 1 in most places of a tensor, and 0 in the last few."""
    a, b = torch.zeros(1, 1, 35), torch.ones(1, 1, 35)
    for alpha in (5e-324, 1e-46, 1e-39):
        assert torch.equal(cc.hybrid(a, b, alpha), b)
    assert not cc.hybrid(a, b, 1e-37).any()


def test_a_rule_of_ones_own(monkeypatch):
    """It gets two normalised maps of one size and alpha; `hybrid` normalises what it returns."""

    def harmonic(a, b, alpha):
        return 1 / (alpha / (a + 1e-3) + (1 - alpha) / (b + 1e-3))

    monkeypatch.setitem(cc.FUSIONS, "harmonic", harmonic)
    expected = harmonic(cc.enlarge(P, (6, 4)), cc.enlarge(Q, (6, 4)), 0.3)
    found = cc.hybrid(5 * P, Q, 0.3, (6, 4), rule="harmonic")
    assert torch.allclose(found, expected / expected.max())


# ---- several layers


def test_one_cam_at_several_layers():
    """1, 0 becomes 1, 3/4, 1/4, 0 at 1 x 4, where the other is 1/9, 1, 0, 0; roots of products."""
    activations = {
        "a": torch.tensor([[[[3.0, 0.0]]]]),
        "b": torch.tensor([[[[1.0, 9.0, 0.0, 0.0]]]]),
    }
    ones = {name: torch.ones_like(v) for name, v in activations.items()}
    captured = cc.Capture(torch.zeros(1, 2), torch.zeros(1).long(), activations, ones)
    assert cc.cam_at(captured, cc.layer_cam, "a", (1, 4))[0, 0].tolist() == [1, 0.75, 0.25, 0]
    expected = [(1 / 9) ** 0.5 / 0.75**0.5, 1, 0, 0]
    for layers in ("a+b", "b+a"):
        found = cc.cam_at(captured, cc.layer_cam, layers, (1, 4))
        assert found[0, 0].tolist() == pytest.approx(expected)
    with pytest.raises(ValueError, match="layer='c' was not captured"):
        cc.cam_at(captured, cc.layer_cam, "a+c", (1, 4))


@pytest.mark.parametrize("name", BY_HAND)
def test_two_layers_of_a_network_are_their_hybrid_with_equal_weights(name):
    net, size = tiny(3), (24, 20)
    captured = cc.capture(net, images(3, size), ["2", "6"], 1)
    one, other = (cc.cam_at(captured, cc.CAMS[name], layer, size) for layer in ("2", "6"))
    both = cc.cam_at(captured, cc.CAMS[name], "2+6", size)
    assert both.any() and torch.allclose(both, cc.hybrid(one, other, 0.5), atol=1e-5)
