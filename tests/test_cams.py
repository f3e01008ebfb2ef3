"""CAMs and their fusion, worked out by hand on 2 x 2 maps, and the identities that theory promises."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from nets import images, network, tiny
from torch import nn

import cam_core as cc

quick = settings(max_examples=40, derandomize=True, deadline=None)

# Two channels of a 2 x 2 map and the gradients of a score with respect to them.
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
    # S = 6 and 8; a = G^2 / (2 G^2 + S G^3) = 1 / (2 + S G) where G > 0 (the rest is cut off by ReLU(G)):
    # channel 1: 1/8 * 1 + 1/14 * 2 + 1/14 * 2 = 1/8 + 2/7 = 23/56; channel 2: 1/10 * 1
    # 23/56 [1, 2; 3, 0] + 1/10 [4, 0; 2, 2]
    "grad_cam_pp": [[23 / 56 + 0.4, 46 / 56], [69 / 56 + 0.2, 0.2]],
    # w = sum(G A) / sum(A) = (1 - 2 + 6 + 0) / 6 = 5/6 and (-8 + 0 - 2 + 0) / 8 = -5/4
    # 5/6 [1, 2; 3, 0] - 5/4 [4, 0; 2, 2] = [5/6 - 5, 5/3; 5/2 - 5/2, -5/2], rectified
    "xgrad_cam": [[0.0, 5 / 3], [0.0, 0.0]],
}


@pytest.mark.parametrize("name", list(BY_HAND))
def test_by_hand(name):
    found = cc.CAMS[name](A, G)
    assert found.shape == (1, 2, 2) and found.dtype == torch.float32
    assert torch.allclose(found[0], torch.tensor(BY_HAND[name]), atol=1e-6)


def test_the_registry_holds_just_these():
    assert list(cc.CAMS) == ["grad_cam", "layer_cam", "grad_cam_pp", "hires_cam", "xgrad_cam"]
    assert all(cc.CAMS[name] is getattr(cc, name) for name in cc.CAMS)


@pytest.mark.parametrize("name", list(BY_HAND))
def test_images_of_a_batch_do_not_mix(name):
    other = (A.flip(3) * 0.5, G.roll(1, 1) + 0.25)
    together = cc.CAMS[name](torch.cat([A, other[0]]), torch.cat([G, other[1]]))
    assert torch.allclose(together[0], cc.CAMS[name](A, G)[0], atol=1e-6)
    assert torch.allclose(together[1], cc.CAMS[name](*other)[0], atol=1e-6)


@pytest.mark.parametrize("name", list(BY_HAND))
def test_every_map_is_rectified(name):
    assert not cc.CAMS[name](A, -G.abs() - 1).any()  # everything speaks against the class
    assert not cc.CAMS[name](-A, G.abs()).lt(0).any()  # pre-ReLU layers have negative activations


def test_layer_cam_is_rectified_after_the_sum_not_before():
    """A pre-ReLU layer: -1 in one channel has to cancel 1 in the other (eq. 7 and 8 of the paper)."""
    a, g = torch.tensor([[[[1.0, 1.0]], [[-1.0, -3.0]]]]), torch.ones(1, 2, 1, 2)
    assert cc.layer_cam(a, g).tolist() == [[[0.0, 0.0]]]
    assert cc.layer_cam(a, g * torch.tensor([2.0, 0.5]).view(1, 2, 1, 1)).tolist() == [[[1.5, 0.5]]]


@pytest.mark.parametrize("name", list(BY_HAND))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_arithmetic_is_done_in_float32(name, dtype):
    """In half precision 2048 + 1 = 2048: a mean or sum taken there would be off by percents."""
    a = torch.full((1, 1, 32, 65), 1.0)
    g = torch.linspace(0, 1, 32 * 65).view(1, 1, 32, 65).to(dtype)
    assert torch.equal(cc.CAMS[name](a.to(dtype), g), cc.CAMS[name](a, g.float()))
    many = torch.ones(1, 2101, 1, 2)  # and neither half precision has a number between 2100 and 2102
    assert torch.equal(cc.CAMS[name](many.to(dtype), many.to(dtype)), cc.CAMS[name](many, many))


@pytest.mark.parametrize("name", list(BY_HAND))
def test_dead_channels_and_zero_gradients_give_no_nan(name):
    dead = torch.zeros(1, 3, 2, 2)
    for a, g in ((dead, dead), (dead, torch.ones_like(dead)), (torch.ones_like(dead), dead)):
        found = cc.CAMS[name](a, g)
        assert torch.isfinite(found).all() and not found.any()
    half = torch.cat([dead[:, :1], A], 1), torch.cat([torch.ones(1, 1, 2, 2), G], 1)
    assert torch.allclose(cc.CAMS[name](*half), cc.CAMS[name](A, G), atol=1e-6)  # a dead channel adds nothing


def test_grad_cam_pp_with_gradients_whose_square_vanishes():
    """Gradients of 1e-25 have squares below float32's range; written as G^2 / (2 G^2 + ...) the map would be NaN."""
    found = cc.grad_cam_pp(A, 1e-25 * G.abs())
    assert torch.isfinite(found).all() and found.any()
    expected = 0.5e-25 * torch.einsum("bk,bkhw->bhw", G.abs().sum((2, 3)), A)  # a -> 1/2
    assert torch.allclose(found / expected, torch.ones_like(found), rtol=1e-5)


def test_grad_cam_pp_at_the_pole_of_its_weight():
    """2 + S G = 0 can happen in front of a ReLU (S < 0): that weight is left out, not infinite."""
    a, g = torch.tensor([[[[1.0, -3.0]]]]), torch.tensor([[[[1.0, 0.5]]]])  # S = -2: 2 - 2 * 1 = 0 and 2 - 2 * 0.5 = 1
    assert cc.grad_cam_pp(a, g).tolist() == [[[0.5, 0.0]]]  # weight 1/1 * 0.5


@pytest.mark.parametrize("name", ["grad_cam", "layer_cam", "hires_cam", "xgrad_cam"])
def test_scaling_the_gradient_scales_the_map(name):
    assert torch.allclose(cc.CAMS[name](A, 3 * G), 3 * cc.CAMS[name](A, G))  # so units of the logits do not matter


@pytest.mark.parametrize("name", list(BY_HAND))
def test_order_of_channels_does_not_matter_but_of_positions_it_does(name):
    cam = cc.CAMS[name]
    assert torch.allclose(cam(A.flip(1), G.flip(1)), cam(A, G), atol=1e-6)
    assert torch.allclose(cam(A.flip(3), G.flip(3)), cam(A, G).flip(2), atol=1e-6)
    assert torch.allclose(cam(A.mT, G.mT), cam(A, G).mT, atol=1e-6)


# ------------------------------------------------------------------------- the identity of a GAP head, without autograd


@pytest.mark.parametrize("target", [0, 1, 2, 3])
@pytest.mark.parametrize("arch", [None, "resnet18"])
def test_gap_identity(arch, target):
    """Global average pooling and one linear layer: dy_c/dA_k(i, j) = w_ck / (h w), so from the weights alone

    Grad-CAM = HiResCAM = XGrad-CAM = ReLU(sum_k w_ck A_k) / (h w) and LayerCAM = sum_k ReLU(w_ck) A_k / (h w).
    """
    if arch:
        net, x, layer = network(arch), images(2, (96, 64)), "layer4"  # a 3 x 2 map
        w = net.fc.weight[target]
    else:
        torch.manual_seed(1)
        net = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
        )
        x, layer, w = images(2), "1", net[4].weight[target]
    shot = cc.capture(net, x, layer, target)
    a, g = shot.activations[layer], shot.gradients[layer]
    area = a.shape[2] * a.shape[3]
    w = w.detach().view(1, -1, 1, 1)
    signed, positive = ((v * a).sum(1) / area for v in (w, w.clamp(min=0)))
    assert signed.clamp(min=0).any() and not torch.allclose(signed, positive, atol=1e-3)
    for name in ("grad_cam", "hires_cam", "xgrad_cam"):
        assert torch.allclose(cc.CAMS[name](a, g), signed.clamp(min=0), atol=1e-5), name
    assert torch.allclose(cc.layer_cam(a, g), positive, atol=1e-5)


def test_the_identity_does_not_hold_at_an_earlier_layer():
    net, x = network("resnet18"), images(1, (96, 96))
    shot = cc.capture(net, x, "layer2", 0)
    a, b = (cc.normalise(cc.CAMS[n](shot.activations["layer2"], shot.gradients["layer2"])) for n in list(cc.CAMS)[::3])
    assert a.any() and b.any() and (a - b).abs().max() > 0.05


# ---------------------------------------------------------------------------------------------------------- normalise


def maps_of(*shape: int):
    values = st.floats(0, 1e6, width=32, allow_subnormal=False)
    return hnp.arrays(np.float32, shape, elements=values).map(torch.from_numpy)


def test_normalise_by_hand():
    maps = torch.tensor([[[1.0, 2.0], [4.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]], [[3.0, 3.0], [3.0, 3.0]]])
    assert cc.normalise(maps).tolist() == [
        [[0.25, 0.5], [1.0, 0.0]],
        [[0.0, 0.0], [0.0, 0.0]],
        [[1.0, 1.0], [1.0, 1.0]],
    ]


@quick
@given(maps_of(3, 4, 5))
def test_normalise_properties(maps):
    found = cc.normalise(maps)
    peak = found.amax((1, 2))
    assert ((peak == 1) | ((peak == 0) & (maps.amax((1, 2)) == 0))).all()
    assert (found >= 0).all() and torch.equal(cc.normalise(found), found)
    for m, n in zip(maps, found, strict=True):
        assert (torch.diff(n.flatten()[torch.argsort(m.flatten())]) >= 0).all()  # the order of the pixels is kept


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1.0, 1e20, 3e38])
def test_normalise_at_any_scale(scale):
    assert torch.allclose(cc.normalise(scale * torch.tensor([[[0.25, 1.0]]])), torch.tensor([[[0.25, 1.0]]]), rtol=1e-5)


def test_normalise_leaves_its_argument_alone():
    maps = torch.tensor([[[2.0, 1.0]]])
    cc.normalise(maps)
    assert maps.tolist() == [[[2.0, 1.0]]]


@pytest.mark.parametrize(
    "maps",
    [
        torch.tensor([[[1.0, -0.5]]]),
        torch.tensor([[[1.0, math.nan]]]),
        torch.tensor([[[math.inf, 1.0]]]),
        torch.tensor([[[0.0, 0.0]], [[math.nan, 0.0]]]),
    ],
    ids=["negative", "NaN", "inf", "NaN in the second"],
)
def test_normalise_refuses_what_is_no_map(maps):
    for call in (cc.normalise, lambda m: cc.enlarge(m, (4, 4)), lambda m: cc.hybrid(m, m, 0.5)):
        with pytest.raises(ValueError, match="finite and non-negative"):
            call(maps)


@pytest.mark.parametrize("shape", [(2, 2), (1, 1, 2, 2), (2,)])
def test_normalise_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match=r"shape \(B, h, w\)"):
        cc.normalise(torch.ones(shape))


# ------------------------------------------------------------------------------------------------------------ enlarge


def test_enlarge_by_hand():
    """align_corners=False: pixels 0, 1 become 0, 1/4, 3/4, 1 (with align_corners=True it would be 0, 1/3, 2/3, 1)."""
    assert cc.enlarge(torch.tensor([[[0.0, 7.0]]]), (1, 4)).tolist() == [[[0.0, 0.25, 0.75, 1.0]]]
    both = cc.enlarge(torch.tensor([[[0.0, 7.0], [0.0, 0.0]]]), (2, 4))
    assert both.tolist() == [[[0.0, 0.25, 0.75, 1.0], [0.0] * 4]]


def test_enlarge_brings_the_maximum_back_to_one():
    """To 3 pixels the peak of a 4-pixel map falls between two of them: 0, 0, 1, 0 -> at 1/6, 3/2, 17/6 of 4."""
    found = cc.enlarge(torch.tensor([[[0.0, 0.0, 1.0, 0.0]]]), (1, 3))
    assert found[0, 0].tolist() == pytest.approx([0.0, 1.0, 1 / 3], abs=1e-6)  # 0, 1/2, 1/6 before


def test_enlarge_size_is_height_and_width_in_this_order():
    m = torch.zeros(2, 2, 3)
    m[0, 1, 0] = 5
    found = cc.enlarge(m, (8, 18))
    assert found.shape == (2, 8, 18) and found[0, 7, 0] == 1 and not found[0, :2].any() and not found[1].any()
    assert torch.equal(cc.enlarge(m, torch.Size([8, 18])), found)


# ------------------------------------------------------------------------------------------------------------- hybrid

P = torch.tensor([[[1.0, 4.0], [2.0, 0.0]]])
Q = torch.tensor([[[9.0, 1.0], [0.0, 9.0]]])


def test_hybrid_by_hand():
    # p = [1/4, 1; 1/2, 0], q = [1, 1/9; 0, 1]; square roots of the products: [1/2, 1/3; 0, 0]; over 1/2
    assert cc.hybrid(P, Q, 0.5).flatten().tolist() == pytest.approx([1.0, 2 / 3, 0.0, 0.0])
    # alpha weights the first map: (1/4)^(3/4) 1^(1/4) = 0.35355, 1^(3/4) (1/9)^(1/4) = 0.57735; over the latter
    assert cc.hybrid(P, Q, 0.75).flatten().tolist() == pytest.approx([0.35355339 / 0.57735027, 1.0, 0.0, 0.0])


@pytest.mark.parametrize("size", [None, (2, 2), (7, 5)])
@pytest.mark.parametrize("alpha", [0, 1, 0.0, 1.0])
def test_hybrid_at_the_ends_is_one_map_exactly(alpha, size):
    zero = torch.zeros_like(P)
    alone = cc.normalise if size is None else lambda m: cc.enlarge(m, size)
    for other in (P, Q, zero):  # even where the map without weight is zero: 0 ** 0 is 1
        first, second = (Q, other) if alpha else (other, Q)
        assert torch.equal(cc.hybrid(first, second, alpha, size), alone(Q))


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.999])
def test_hybrid_of_a_zero_map_or_without_overlap_is_zero_and_never_nan(alpha):
    apart = torch.tensor([[[0.0, 0.0], [1.0, 0.0]]]), torch.tensor([[[1.0, 1.0], [0.0, 1.0]]])
    for a, b in ((torch.zeros_like(P), P), (P, torch.zeros_like(P)), apart):
        assert cc.hybrid(a, b, alpha).tolist() == [[[0.0, 0.0], [0.0, 0.0]]]
        assert not cc.hybrid(torch.cat([P, a]), torch.cat([P, b]), alpha)[1].any()


def test_hybrid_of_maps_of_two_sizes():
    """A 1 x 2 map and a 1 x 4 map at 1 x 4: [1/4, 7/16, 13/16, 1] (enlarged from [1/4, 1]) and [1, 1, 1/4, 0]."""
    deep, shallow = torch.tensor([[[2.0, 8.0]]]), torch.tensor([[[4.0, 4.0, 1.0, 0.0]]])
    product = np.sqrt(np.array([1 / 4, 7 / 16, 13 / 16, 1]) * np.array([1, 1, 1 / 4, 0]))
    assert cc.hybrid(deep, shallow, 0.5, (1, 4))[0, 0].tolist() == pytest.approx((product / product.max()).tolist())


def test_hybrid_normalises_before_it_enlarges():
    """The larger factor must not decide: scaling either map by any positive number changes nothing."""
    for size in (None, (6, 6)):
        assert torch.allclose(cc.hybrid(1e3 * P, 1e-3 * Q, 0.4, size), cc.hybrid(P, Q, 0.4, size), atol=1e-6)


@quick
@given(maps_of(2, 3, 4), maps_of(2, 3, 4), st.floats(0.01, 0.99) | st.sampled_from([0, 1]))
def test_hybrid_properties(a, b, alpha):
    found = cc.hybrid(a, b, alpha)
    assert torch.isfinite(found).all() and (found >= 0).all() and (found <= 1).all()
    assert torch.allclose(found, cc.hybrid(b, a, 1 - alpha), atol=1e-5)  # the roles can be swapped
    peak = found.amax((1, 2))
    assert ((peak == 1) | (peak == 0)).all()
    assert torch.allclose(cc.hybrid(a, a, alpha), cc.normalise(a), atol=1e-5)  # nothing to fuse
    if 0 < alpha < 1:
        assert not found[(a == 0) | (b == 0)].any()


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan, math.inf, "0.5", None, "auto", torch.tensor([0.5, 0.5])])
def test_hybrid_refuses_an_alpha_outside(alpha):
    with pytest.raises(ValueError, match="alpha="):
        cc.hybrid(P, Q, alpha)


@pytest.mark.parametrize("kind", [np.float64, np.float32])
def test_hybrid_takes_numpy_numbers(kind):
    """An alpha from np.linspace, or from a float32 table, is a number."""
    assert torch.allclose(cc.hybrid(P, Q, kind(0.5)), cc.hybrid(P, Q, 0.5))


def test_hybrid_refuses_maps_that_do_not_belong_together():
    with pytest.raises(ValueError, match=r"give size=\(H, W\)"):
        cc.hybrid(P, torch.ones(1, 4, 4), 0.5)
    with pytest.raises(ValueError, match="different batches: 1 and 2"):
        cc.hybrid(P, torch.ones(2, 4, 4), 0.5, (8, 8))


# ------------------------------------------------------------------------------------------------------- fusion rules

RULES = ["product", "floored", "mean", "maximum"]


def test_the_rules_are_just_these():
    assert list(cc.FUSIONS) == RULES and list(inspect.signature(cc.hybrid).parameters)[-1] == "rule"
    assert torch.equal(cc.hybrid(P, Q, 0.4), cc.hybrid(P, Q, 0.4, rule="product"))


# p = [1/4, 1; 1/2, 0] and q = [1, 1/9; 0, 1], with alpha = 1/4 for p and 3/4 for q
RULES_BY_HAND = {
    "product": [(1 / 4) ** 0.25, (1 / 9) ** 0.75, 0, 0],
    # f = 1/10 is added to both and taken away again
    "floored": [
        0.35**0.25 * 1.1**0.75 - 0.1,
        1.1**0.25 * (1 / 9 + 0.1) ** 0.75 - 0.1,
        0.6**0.25 * 0.1**0.75 - 0.1,
        0.1**0.25 * 1.1**0.75 - 0.1,
    ],
    "mean": [1 / 16 + 3 / 4, 1 / 4 + 3 / 36, 1 / 8, 3 / 4],
    "maximum": [3 / 4, 1 / 4, 1 / 8, 3 / 4],  # of 1/16 and 3/4, 1/4 and 1/12, 1/8 and 0, 0 and 3/4
}


@pytest.mark.parametrize("rule", RULES)
def test_rules_by_hand(rule):
    expected = np.array(RULES_BY_HAND[rule])
    found = cc.hybrid(P, Q, 0.25, rule=rule)
    assert found.flatten().tolist() == pytest.approx((expected / expected.max()).tolist(), abs=1e-6)
    p, q = cc.normalise(P), cc.normalise(Q)
    assert cc.FUSIONS[rule](p, q, 0.25).flatten().tolist() == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [None, (7, 5)])
def test_the_ends_are_one_map_exactly_whatever_the_rule(rule, size):
    alone = cc.normalise if size is None else lambda m: cc.enlarge(m, size)
    for other in (P, torch.zeros_like(P)):
        assert torch.equal(cc.hybrid(Q, other, 1, size, rule), alone(Q))
        assert torch.equal(cc.hybrid(other, Q, 0.0, size, rule), alone(Q))


@pytest.mark.parametrize("rule", ["produkt", "", None, 3])
def test_an_unknown_rule_is_refused(rule):
    with pytest.raises(ValueError, match=f"rule={rule!r} is no fusion rule.*product.*floored.*mean.*maximum"):
        cc.hybrid(P, Q, 0.5, rule=rule)
    with pytest.raises(ValueError, match="Nearest: product"):
        cc.hybrid(P, Q, 0.0, rule="produkt")  # also where the rule would not be asked


def test_a_rule_of_ones_own(monkeypatch):
    """(a, b, alpha), normalised maps of one size -> their fusion, which `hybrid` normalises and checks."""
    seen = []

    def harmonic(a, b, alpha):
        seen.append((a, b, alpha))
        return 1 / (alpha / (a + 1e-3) + (1 - alpha) / (b + 1e-3))

    monkeypatch.setitem(cc.FUSIONS, "harmonic", harmonic)
    found = cc.hybrid(5 * P, Q, 0.3, (6, 4), rule="harmonic")
    (a, b, alpha), big = seen[0], (6, 4)
    assert torch.equal(a, cc.enlarge(P, big)) and torch.equal(b, cc.enlarge(Q, big)) and alpha == 0.3
    assert torch.equal(found, cc.normalise(harmonic(a, b, alpha)))
    monkeypatch.setitem(cc.FUSIONS, "difference", lambda a, b, alpha: a - b)
    with pytest.raises(ValueError, match="finite and non-negative"):
        cc.hybrid(P, Q, 0.5, rule="difference")


def test_floored_keeps_an_order_where_a_factor_is_zero():
    """LayerCAM is zero on half of the map: there the product ties and Grad-CAM no longer counts."""
    a, b = torch.tensor([[[0.2, 0.9], [0.4, 1.0]]]), torch.tensor([[[0.0, 0.0], [0.0, 1.0]]])
    assert cc.hybrid(a, b, 0.5).tolist() == [[[0.0, 0.0], [0.0, 1.0]]]
    for alpha in (0.1, 0.5, 0.9):
        left, below, right = (float(cc.hybrid(a, b, alpha, rule="floored")[0][k]) for k in ((0, 0), (1, 0), (0, 1)))
        assert 0 < left < below < right < 1
    assert cc.tie_fraction(cc.hybrid(a, b, 0.5))[0] == 0.75
    assert cc.tie_fraction(cc.hybrid(a, b, 0.5, rule="floored"))[0] == 0


@pytest.mark.parametrize("rule", RULES)
def test_rules_and_maps_that_are_zero(rule):
    """Two zero maps fuse to a zero map whatever alpha is: rounding in (0 + f)^alpha (0 + f)^(1-alpha) - f is no map."""
    zero = torch.zeros_like(P)
    for alpha in np.linspace(0, 1, 41):
        assert not cc.hybrid(zero, zero, alpha, rule=rule).any(), alpha
    for a, b in ((P, zero), (zero, P)):
        found = cc.hybrid(a, b, 0.3, rule=rule)
        if rule == "product":
            assert not found.any()
        elif rule != "floored":
            assert torch.allclose(found, cc.normalise(P))
        assert torch.equal(cc.hybrid(torch.cat([Q, a]), torch.cat([P, b]), 0.3, rule=rule)[1:], found)
    if rule == "floored":
        assert cc.hybrid(P, zero, 0.3, rule=rule).flatten().argsort().tolist() == P.flatten().argsort().tolist()


@quick
@given(maps_of(3, 3, 4), maps_of(3, 3, 4), st.floats(0.01, 0.99) | st.sampled_from([0, 1]), st.sampled_from(RULES))
def test_rule_properties(a, b, alpha, rule):
    found = cc.hybrid(a, b, alpha, rule=rule)
    assert torch.isfinite(found).all() and (found >= 0).all() and (found <= 1).all()
    assert all(p in (0, 1) for p in found.amax((1, 2)).tolist())
    assert torch.allclose(found, cc.hybrid(b, a, 1 - alpha, rule=rule), atol=1e-4)  # the roles can be swapped
    order = [2, 0, 1]
    mixed = cc.hybrid(a[order], b[order], alpha, rule=rule)
    assert torch.allclose(mixed, found[order], atol=1e-6)  # images do not mix
    assert torch.allclose(cc.hybrid(a / 4, b * 2, alpha, rule=rule), found, atol=1e-6)
    p, q, f = (cc.normalise(a).flatten(1), cc.normalise(b).flatten(1), found.flatten(1))
    above = (p[:, :, None] >= p[:, None]) & (q[:, :, None] >= q[:, None])
    assert (f[:, :, None] >= f[:, None] - 1e-5)[above].all()  # larger in both maps is no smaller in their fusion


@quick
@given(maps_of(2, 3, 4), maps_of(2, 3, 4), maps_of(2, 3, 4), st.floats(0.01, 0.99), st.sampled_from(RULES))
def test_rules_are_monotone_in_each_argument(a, b, more, alpha, rule):
    a, b, larger = cc.normalise(a), cc.normalise(b), cc.normalise(more)
    fuse = cc.FUSIONS[rule]
    assert (fuse(torch.maximum(a, larger), b, alpha) >= fuse(a, b, alpha) - 1e-6).all()
    assert (fuse(b, torch.maximum(a, larger), alpha) >= fuse(b, a, alpha) - 1e-6).all()


# ------------------------------------------------------------------------------------------- cam_at, several layers


def test_layer_cam_at_several_layers_by_hand():
    """Maps [1, 0] and [1/9, 1, 0, 0] at 1 x 4: [1, 3/4, 1/4, 0] and the second as it is; roots of the products."""
    activations = {"a": torch.tensor([[[[3.0, 0.0]]]]), "b": torch.tensor([[[[1.0, 9.0, 0.0, 0.0]]]])}
    ones = {name: torch.ones_like(v) for name, v in activations.items()}
    shot = cc.Capture(torch.zeros(1, 2), torch.zeros(1).long(), activations, ones)
    assert cc.cam_at(shot, cc.layer_cam, "a", (1, 4))[0, 0].tolist() == [1, 0.75, 0.25, 0]
    expected = [(1 / 9) ** 0.5 / 0.75**0.5, 1, 0, 0]
    for layers in ("a+b", "b+a"):
        assert cc.cam_at(shot, cc.layer_cam, layers, (1, 4))[0, 0].tolist() == pytest.approx(expected)


def test_layer_cam_at_several_layers_of_a_network():
    net, size = tiny(3), (24, 20)
    shot = cc.capture(net, images(3, size), ["0", "2", "6"], 1)
    alone = {n: cc.enlarge(cc.layer_cam(shot.activations[n], shot.gradients[n]), size) for n in ("0", "2", "6")}
    for name, m in alone.items():
        assert torch.equal(cc.cam_at(shot, cc.layer_cam, name, size), m)
    for names in (["2", "6"], ["0", "2", "6"]):
        product = np.prod([alone[n].double().numpy() for n in names], axis=0) ** (1 / len(names))
        product /= product.max((1, 2), keepdims=True)
        assert np.allclose(cc.cam_at(shot, cc.layer_cam, "+".join(names), size).numpy(), product, atol=1e-5)
    for name, cam in cc.CAMS.items():  # and so with any CAM
        each = [cc.enlarge(cam(shot.activations[n], shot.gradients[n]), size).double().numpy() for n in ("2", "6")]
        product = np.sqrt(each[0] * each[1])
        product /= product.max((1, 2), keepdims=True)
        assert np.allclose(cc.cam_at(shot, cam, "2+6", size).numpy(), product, atol=1e-5), name
        assert np.allclose(cc.cam_at(shot, cam, "2", size).numpy(), each[0])
    two = cc.cam_at(shot, cc.layer_cam, "2+6", size)
    assert torch.allclose(two, cc.hybrid(alone["2"], alone["6"], 0.5), atol=1e-5)  # the hybrid with alpha = 1/2
    with pytest.raises(ValueError, match="layer=.3. was not captured"):
        cc.cam_at(shot, cc.layer_cam, "2+3", size)
