"""Every method and control of the study against a computation of its own, by NumPy and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nets import images, tiny
from scipy import ndimage

import cam_core as cc

SIZE = (24, 20)
IDS = ["a", "b", "c"]
# of nets.tiny: 4 to 6 at half the input's size, 0 to 2 at the input's
LAYERS = {"deep": "6", "coarse": "4+6", "shallow": "2", "finer": "0"}
NAMES = ["0", "2", "4", "6"]
ALPHA = 0.3


@pytest.fixture(scope="module")
def x():
    return images(3, SIZE, seed=7)


@pytest.fixture(scope="module")
def captured(x):
    return cc.capture(tiny(3), x, NAMES, 1)


@pytest.fixture(scope="module")
def donor():
    return torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def make(captured, x, donor):
    """`method_maps` with the fixtures above, but for what is given."""

    def made(**change):
        given = {"captured": captured, "x": x, "layers": LAYERS, "alpha": ALPHA, "donor": donor}
        given |= {"rule": "product", "ids": IDS, "seed": 0}
        return cc.method_maps(**(given | change))

    return made


@pytest.fixture(scope="module")
def maps(make):
    return make()


def norm(m) -> np.ndarray:
    m = np.asarray(m, dtype=np.float64)
    return m / np.maximum(m.max((1, 2), keepdims=True), 1e-300)


def big(m, size=SIZE) -> np.ndarray:
    """Normalised, enlarged, normalised: `enlarge` by SciPy."""
    m = norm(m)
    rows, columns = (
        (np.arange(n) + 0.5) * k / n - 0.5 for n, k in zip(size, m.shape[1:], strict=True)
    )
    grid = np.meshgrid(rows, columns, indexing="ij")
    return norm([ndimage.map_coordinates(one, grid, order=1, mode="nearest") for one in m])


def cam(captured, name, layer) -> np.ndarray:
    return cc.CAMS[name](captured.activations[layer], captured.gradients[layer]).numpy()


def coarse_of(captured) -> np.ndarray:
    """The hybrid's Grad-CAM: the geometric mean of two."""
    return norm(np.sqrt(big(cam(captured, "grad_cam", "4")) * big(cam(captured, "grad_cam", "6"))))


def fused(a, b, alpha=ALPHA) -> np.ndarray:
    return norm(a**alpha * b ** (1 - alpha))


def close(found, expected, atol=2e-5) -> bool:
    return np.allclose(found.numpy(), expected, atol=atol)


def test_every_map_is_one_and_there_are_just_these(maps):
    assert list(maps) == [name for name in cc.figures.STYLE if name != "rise"]
    for name, m in maps.items():
        assert m.shape == (3, *SIZE) and m.dtype == torch.float32, name
        assert (m >= 0).all() and (m.amax((1, 2)) == 1).all(), name
    assert set(cc.MATCHED) | set(cc.FURTHER) | set(cc.CURVES) <= set(maps)


def test_cams_and_hybrids(captured, maps):
    for name in cc.CAMS:
        assert close(maps[name], big(cam(captured, name, "6")))
    deep = big(cam(captured, "grad_cam", "6"))
    coarse = coarse_of(captured)
    fine = big(cam(captured, "layer_cam", "2"))
    assert not np.allclose(deep, coarse, atol=0.05)
    assert close(maps["layer_cam_shallow"], fine)
    assert close(maps["grad_cam_coarse"], coarse)
    assert close(maps["grad_cam_finer"], big(cam(captured, "grad_cam", "0")))
    assert close(maps["hybrid"], fused(coarse, fine))
    assert not close(maps["hybrid"], fused(coarse, fine, 1 - ALPHA), 0.05)
    assert close(maps["hybrid_deep"], fused(deep, fine))
    assert close(maps["hybrid_same"], fused(deep, big(cam(captured, "layer_cam", "6")), 0.7))
    assert close(maps["fused_mean"], norm(ALPHA * coarse + (1 - ALPHA) * fine))
    assert close(maps["fused_maximum"], norm(np.maximum(ALPHA * coarse, (1 - ALPHA) * fine)))


def test_a_single_coarse_layer_that_is_the_deep_one(make, maps):
    found = make(layers=LAYERS | {"coarse": "6"})
    assert torch.equal(found["hybrid"], maps["hybrid_deep"])
    assert torch.equal(found["grad_cam_coarse"], found["grad_cam"])


@pytest.mark.parametrize("rule", ["floored", "mean", "maximum"])
def test_the_rule_is_that_of_the_hybrid_and_of_its_controls(make, maps, donor, rule):
    """The controls differ from the hybrid in what they are fused with, and in nothing else."""
    other = make(rule=rule, alpha=0.6)
    coarse = other["grad_cam_coarse"]
    partners = {
        "hybrid": other["layer_cam_shallow"],
        "times_sobel": other["sobel"],
        "times_activation": other["activation"],
        "times_other": donor,
    }
    for name, partner in partners.items():
        assert torch.allclose(other[name], cc.hybrid(coarse, partner, 0.6, rule=rule), atol=1e-6)
        assert not torch.allclose(other[name], maps[name], atol=0.05)
    for name in (*cc.CAMS, "hybrid_same", "sobel", "activation", "layer_cam_shallow", "noise"):
        assert torch.equal(other[name], maps[name])  # neither alpha nor the rule has a say in these


def test_sobel_against_scipy():
    """scipy.ndimage.sobel along both axes of the mean of the colours, averaged by hand to 4 x 5."""
    x = images(2, SIZE, seed=2)
    for picture, found in zip(x.numpy().astype(np.float64), cc.sobel_edges(x, (4, 5)), strict=True):
        grey = picture.mean(0)
        edges = np.hypot(*(ndimage.sobel(grey, axis=k, mode="nearest") for k in (0, 1)))
        cells = edges.reshape(4, 6, 5, 4).mean((1, 3))
        assert np.allclose(found.numpy(), cells, atol=1e-5)
    flat = cc.sobel_edges(torch.full((1, 3, 9, 9), 0.7), (9, 9))
    assert not flat.gt(1e-6).any()  # the border is no edge


def test_controls_of_the_image(captured, x, maps):
    coarse = coarse_of(captured)
    edges = cc.sobel_edges(x, captured.activations["2"].shape[2:]).numpy()
    assert close(maps["sobel"], big(edges))
    assert close(maps["times_sobel"], fused(coarse, big(edges)))
    activation = np.maximum(captured.activations["2"].numpy(), 0).mean(1)
    assert close(maps["activation"], big(activation))
    assert close(maps["times_activation"], fused(coarse, big(activation)))


def test_edges_and_activation_are_at_the_shallow_layer_and_rectified(make, captured, x):
    """As fine as its map; a convolution's output, in front of its ReLU, has negative values too."""
    found = make(layers=LAYERS | {"shallow": "4"})
    assert captured.activations["4"].shape[2:] == (12, 10) and (captured.activations["4"] < 0).any()
    assert close(found["sobel"], big(cc.sobel_edges(x, (12, 10)).numpy()))
    assert close(found["activation"], big(np.maximum(captured.activations["4"].numpy(), 0).mean(1)))


def test_times_other_takes_the_donor_and_nothing_else_does(make, captured, maps, donor):
    assert close(maps["times_other"], fused(coarse_of(captured), norm(donor)))
    again = make(donor=donor.flip(0))
    for name, m in maps.items():
        assert torch.equal(again[name], m) == (name != "times_other")


def test_the_coarse_hybrid_has_nothing_finer_than_the_deep_grid(maps):
    cells = maps["hybrid"].double().numpy().reshape(3, 12, 2, 10, 2).mean((2, 4))
    assert close(maps["hybrid_coarse"], big(cells))


def test_a_product_of_shallow_layers(make, captured):
    """ "2+0" as the shallow layer; edges and activation are then those of the first of them."""
    found = make(layers=LAYERS | {"shallow": "2+0"})
    two = norm(np.sqrt(big(cam(captured, "layer_cam", "2")) * big(cam(captured, "layer_cam", "0"))))
    assert close(found["layer_cam_shallow"], two)
    assert close(found["hybrid"], fused(coarse_of(captured), two))
    assert close(found["activation"], big(np.maximum(captured.activations["2"].numpy(), 0).mean(1)))


def test_controls_that_know_nothing_depend_on_seed_and_id_alone(make, maps):
    """Not on the group, its order, the network or the layers."""
    x = images(2, SIZE, seed=7)
    other = cc.capture(tiny(9), x, ["6", "2"])
    layers = {"deep": "2", "coarse": "2", "shallow": "2", "finer": "6"}
    again = make(captured=other, x=x, layers=layers, alpha=1.0, ids=["c", "a"], donor=x[:, 0].abs())
    for name in ("noise", "smooth_noise"):
        assert torch.equal(again[name][0], maps[name][2])
        assert torch.equal(again[name][1], maps[name][0])
        assert not torch.equal(maps[name][0], maps[name][1])
        assert not torch.equal(make(seed=1)[name], maps[name])
    y = np.linspace(-1, 1, 24)[:, None]
    z = np.linspace(-1, 1, 20)[None]
    centre = np.exp(-(y**2 + z**2) / (2 * 0.5**2))  # a side is 2 long, so a quarter of it is 0.5
    assert close(maps["centre"], np.stack([centre / centre.max()] * 3))


def test_noise_is_of_the_pixel_and_smooth_noise_of_a_7_by_7_grid():
    noise, smooth, _ = cc._maps_without_information(IDS, (63, 63), 5).values()
    # 63 = 7 * 9: the middle pixel of every 9 x 9 cell has the value of the grid
    assert close(smooth, big(smooth[:, 4::9, 4::9].numpy(), (63, 63)), 1e-5)
    assert len(np.unique(noise[0])) > 3900 and 0.4 < noise.mean() < 0.6


def test_a_map_that_is_zero_makes_zero_or_the_other_map(x, make):
    """A class that nothing speaks for: all CAMS are zero, and nothing is NaN or mere rounding."""
    net = tiny(3)
    with torch.no_grad():
        net[11].weight[2] = 0
        net[11].bias[2] = 0
    captured = cc.capture(net, x, NAMES, 2)
    for rule in cc.FUSIONS:
        found = make(captured=captured, rule=rule, alpha=0.5, donor=torch.zeros(3, *SIZE))
        for name, m in found.items():
            assert torch.isfinite(m).all(), (rule, name)
            assert set(m.amax((1, 2)).tolist()) <= {0.0, 1.0}, (rule, name)
        zero = {*cc.CAMS, "hybrid", "hybrid_same", "hybrid_deep", "times_other", "hybrid_coarse"}
        assert not any(found[name].any() for name in zero)
        assert all(found[name].any() for name in ("sobel", "activation", "noise", "centre"))
        assert found["times_sobel"].any() == (rule != "product")


def test_a_cam_of_ones_own_is_three_lines(make, captured, monkeypatch):
    monkeypatch.setitem(cc.CAMS, "mine", lambda A, G: A.float().abs().mean(1))
    found = make()
    assert list(found)[-1] == "mine"
    assert close(found["mine"], big(captured.activations["6"].abs().mean(1).numpy()))
    assert cc.methods_of("main")[-1] == "mine"
    assert cc.figures.label("mine") == "mine" and cc.figures.colour("mine").startswith("#")
