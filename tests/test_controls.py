"""Where a map can be taken, and every method and control of the study against a computation of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nets import images, network, tiny
from scipy import ndimage
from torch import nn

import cam_core as cc

SIZE = (24, 20)
IDS = ["a", "b", "c"]
# of nets.tiny: 4 to 6 at half the input's size, 0 to 2 at the input's
LAYERS = {"deep": "6", "coarse": "4+6", "shallow": "2", "finer": "0"}
NAMES = ["0", "2", "4", "6"]
ALPHA = 0.3

# ------------------------------------------------------------------------------------------------------------- stages


def plain_cnn() -> nn.Sequential:
    """Three times convolution and ReLU, pooling between, for 96 x 96 pixels."""
    torch.manual_seed(0)
    blocks = [[nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)] for a, b in ((3, 4), (4, 6), (6, 8))]
    return nn.Sequential(*[m for block in blocks for m in block][:-1], nn.Flatten(), nn.Linear(4608, 5)).eval()


# with 96 x 96 pixels; the names of deep and shallow are the last and the one nearest to four times as high
STAGES = {
    "resnet18": {"relu": 48, "layer1": 24, "layer2": 12, "layer3": 6, "layer4": 3},
    "squeezenet1_1": {"features.1": 47, "features.4": 23, "features.7": 11, "features": 5},
    "densenet121": {
        "features.relu0": 48,
        "features.transition1.conv": 24,
        "features.transition2.conv": 12,
        "features.transition3.conv": 6,
        "features": 3,
    },
    "mobilenet_v2": {
        "features.2.conv.0": 48,
        "features.4.conv.0": 24,
        "features.7.conv.0": 12,
        "features.14.conv.0": 6,
        "features": 3,
    },
    "plain": {"1": 96, "4": 48, "7": 24},
}
SHALLOW = {
    "resnet18": "layer2",
    "squeezenet1_1": "features.4",
    "densenet121": "features.transition2.conv",
    "mobilenet_v2": "features.7.conv.0",
    "plain": "1",
}


@pytest.mark.parametrize("name", list(STAGES))
def test_stages(name):
    net, x, expected = plain_cnn() if name == "plain" else network(name), images(2, (96, 96)), STAGES[name]
    found = cc.stages(net, x)
    assert list(found.items()) == list(expected.items())  # in order of execution
    assert list(found.values()) == sorted(set(found.values()), reverse=True)
    assert cc.default_layers(net, x) == (list(expected)[-1], SHALLOW[name])
    shot = cc.capture(net, x, list(found), 0)  # a map can be taken at each of them
    assert {n: a.shape[2] for n, a in shot.activations.items()} == expected


def test_stages_of_a_model_without_maps_and_with_one():
    assert cc.stages(nn.Sequential(nn.Flatten(), nn.Linear(360, 4)), images(1)) == {}
    assert cc.stages(nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(240, 4)), images(1)) == {
        "1": 12
    }


# ------------------------------------------------------------------------------------------------ maps against formulas


@pytest.fixture(scope="module")
def x():
    """Three images and one more, as method_maps wants it."""
    return images(4, SIZE, seed=7)


@pytest.fixture(scope="module")
def shot(x):
    return cc.capture(tiny(3), x, NAMES, 1)


def maps_of(shot, x, **change):
    given = dict(layers=LAYERS, alpha=ALPHA, rule="product", ids=IDS, seed=0) | change
    return cc.method_maps(shot, x, **given)


@pytest.fixture(scope="module")
def maps(shot, x):
    return maps_of(shot, x)


def norm(m) -> np.ndarray:
    m = np.asarray(m, dtype=np.float64)
    return m / np.maximum(m.max((1, 2), keepdims=True), 1e-300)


def big(m, size=SIZE) -> np.ndarray:
    """Normalised, enlarged, normalised: `enlarge` by SciPy."""
    m = norm(m)
    rows, columns = ((np.arange(n) + 0.5) * k / n - 0.5 for n, k in zip(size, m.shape[1:], strict=True))
    grid = np.meshgrid(rows, columns, indexing="ij")
    return norm([ndimage.map_coordinates(one, grid, order=1, mode="nearest") for one in m])


def cam(shot, name, layer, own=slice(3)) -> np.ndarray:
    return cc.CAMS[name](shot.activations[layer], shot.gradients[layer])[own].numpy()


def coarse_of(shot) -> np.ndarray:
    """The hybrid's Grad-CAM: the geometric mean of two."""
    return norm(np.sqrt(big(cam(shot, "grad_cam", "4")) * big(cam(shot, "grad_cam", "6"))))


def fused(a, b, alpha=ALPHA) -> np.ndarray:
    return norm(a**alpha * b ** (1 - alpha))


def close(found, expected, atol=2e-5) -> bool:
    return np.allclose(found.numpy(), expected, atol=atol)


def test_every_map_is_one_and_there_are_just_these(maps):
    assert list(maps) == [name for name in cc.STYLE if name != "rise"]  # rise takes thousands of passes
    for name, m in maps.items():
        assert m.shape == (3, *SIZE) and m.dtype == torch.float32, name
        assert (m >= 0).all() and (m.amax((1, 2)) == 1).all(), name
    assert set(cc.MATCHED) <= set(maps)


def test_cams_and_hybrids(shot, maps):
    for name in cc.CAMS:
        assert close(maps[name], big(cam(shot, name, "6")))
    deep, coarse, fine = big(cam(shot, "grad_cam", "6")), coarse_of(shot), big(cam(shot, "layer_cam", "2"))
    assert not np.allclose(deep, coarse, atol=0.05)
    assert close(maps["layer_cam_shallow"], fine) and close(maps["grad_cam_coarse"], coarse)
    assert close(maps["hybrid"], fused(coarse, fine)) and not close(
        maps["hybrid"], fused(coarse, fine, 1 - ALPHA), 0.05
    )
    assert close(maps["hybrid_deep"], fused(deep, fine))
    assert close(maps["hybrid_same"], fused(deep, big(cam(shot, "layer_cam", "6")), 0.7))
    assert close(maps["fused_mean"], norm(ALPHA * coarse + (1 - ALPHA) * fine))
    assert close(maps["fused_maximum"], norm(np.maximum(ALPHA * coarse, (1 - ALPHA) * fine)))


def test_a_single_coarse_layer_that_is_the_deep_one(shot, x, maps):
    found = maps_of(shot, x, layers=LAYERS | {"coarse": "6"})
    assert torch.equal(found["hybrid"], maps["hybrid_deep"]) and torch.equal(found["hybrid"], found["hybrid_deep"])
    assert torch.equal(found["grad_cam_coarse"], found["grad_cam"])


@pytest.mark.parametrize("rule", ["floored", "mean", "maximum"])
def test_the_rule_is_that_of_the_hybrid_and_of_its_controls(shot, x, maps, rule):
    """The controls differ from the hybrid in what they are fused with and in nothing else."""
    other = maps_of(shot, x, rule=rule, alpha=0.6)
    coarse = other["grad_cam_coarse"]
    pairs = {"hybrid": "layer_cam_shallow", "times_sobel": "sobel", "times_activation": "activation"}
    for name, second in pairs.items():
        assert torch.allclose(other[name], cc.hybrid(coarse, other[second], 0.6, rule=rule), atol=1e-6)
        assert not torch.allclose(other[name], maps[name], atol=0.05)
    deep = cc.hybrid(other["grad_cam"], other["layer_cam_shallow"], 0.6, rule=rule)
    assert torch.allclose(other["hybrid_deep"], deep, atol=1e-6)
    alone = {"hybrid_same", "sobel", "activation", "layer_cam_shallow", "grad_cam_coarse", "grad_cam_finer", "noise"}
    for name in alone | set(cc.CAMS):
        assert torch.equal(other[name], maps[name])  # neither alpha nor the rule has a say in these
    assert not torch.allclose(other["times_other"], maps["times_other"], atol=0.05)
    assert torch.allclose(other["fused_mean"], cc.hybrid(coarse, other["layer_cam_shallow"], 0.6, rule="mean"))


def test_sobel_against_scipy():
    """scipy.ndimage.sobel along both axes of the mean of the colours, their length, averaged by hand to 4 x 5."""
    x = images(2, SIZE, seed=2)
    for picture, found in zip(x.numpy().astype(np.float64), cc.sobel_edges(x, (4, 5)), strict=True):
        grey = picture.mean(0)
        edges = np.hypot(*(ndimage.sobel(grey, axis=k, mode="nearest") for k in (0, 1)))
        cells = [[edges[6 * i : 6 * i + 6, 4 * j : 4 * j + 4].mean() for j in range(5)] for i in range(4)]
        assert np.allclose(found.numpy(), cells, atol=1e-5)
    flat = cc.sobel_edges(torch.full((1, 3, 9, 9), 0.7), (9, 9))
    assert not flat.gt(1e-6).any()  # the border is no edge
    step = torch.zeros(1, 3, 6, 6)
    step[..., 3:] = 1
    assert cc.sobel_edges(step, (6, 6))[0, 2].tolist() == [0, 0, 4, 4, 0, 0]


def test_controls_of_the_image(shot, x, maps):
    coarse = coarse_of(shot)
    edges = cc.sobel_edges(x[:3], shot.activations["2"].shape[2:]).numpy()
    assert close(maps["sobel"], big(edges)) and close(maps["times_sobel"], fused(coarse, big(edges)))
    activation = np.maximum(shot.activations["2"][:3].numpy(), 0).mean(1)
    assert close(maps["activation"], big(activation))
    assert close(maps["times_activation"], fused(coarse, big(activation)))


def test_edges_and_activation_are_at_the_shallow_layer(x):
    """And are as fine as its map: with a shallow layer on the deep grid they are no finer than that."""
    shot = cc.capture(tiny(3), x, ["6", "0"], 1)
    found = maps_of(shot, x, layers=dict.fromkeys(LAYERS, "6"))
    assert shot.activations["6"].shape[2:] == (12, 10)
    assert close(found["sobel"], big(cc.sobel_edges(x[:3], (12, 10)).numpy()))
    assert close(found["activation"], big(shot.activations["6"][:3].relu().mean(1).numpy()))


def test_mean_activation_is_rectified(x):
    """A convolution's output, in front of its ReLU, has negative values too."""
    shot = cc.capture(tiny(3), x, ["6", "0"], 1)
    found = maps_of(shot, x, layers=dict.fromkeys(LAYERS, "0") | {"deep": "6"})
    assert (shot.activations["0"] < 0).any()
    assert close(found["activation"], big(np.maximum(shot.activations["0"][:3].numpy(), 0).mean(1)))


def test_times_other_takes_the_next_image(shot, x, maps):
    every = big(cam(shot, "layer_cam", "2", slice(4)))
    assert close(maps["times_other"], fused(coarse_of(shot), every[[1, 2, 3]]))
    assert not any(close(maps["times_other"][k], maps["hybrid"][k].numpy(), 0.05) for k in range(3))
    changed = x.clone()
    changed[3] = images(1, SIZE, seed=99)  # the extra image: the last one's control changes and nothing else
    again = maps_of(cc.capture(tiny(3), changed, NAMES, 1), changed)
    for name, m in maps.items():
        same = [torch.allclose(again[name][k], m[k], atol=1e-5) for k in range(3)]
        assert same == [True, True, name != "times_other"], name


def test_the_coarse_hybrid_has_nothing_finer_than_the_deep_grid(shot, x, maps):
    cells = maps["hybrid"].double().numpy().reshape(3, 12, 2, 10, 2).mean((2, 4))  # 24 x 20 pixels on a 12 x 10 grid
    assert close(maps["hybrid_coarse"], big(cells))

    def coarse(m) -> bool:
        """Between the centres of two cells a map enlarged by 2 is a straight line through two pixels: continued to a
        centre from either side, it has to give the value of the same cell."""
        above, below = 1.5 * m[2:-2:2] - 0.5 * m[1:-3:2], 1.5 * m[3:-1:2] - 0.5 * m[4::2]
        return np.allclose(above, below, atol=1e-5)

    for name in ("hybrid_coarse", "grad_cam", "hybrid"):
        for m in maps[name].double().numpy():
            assert coarse(m) == coarse(m.T) == (name != "hybrid")


def test_grad_cam_at_the_finer_stage(shot, maps):
    assert close(maps["grad_cam_finer"], big(cam(shot, "grad_cam", "0")))


def test_a_product_of_shallow_layers(shot, x):
    """ "2+0" as the shallow layer; edges and activation are then those of the first of them."""
    found = maps_of(shot, x, layers=LAYERS | {"shallow": "2+0"})
    two = norm(np.sqrt(big(cam(shot, "layer_cam", "2")) * big(cam(shot, "layer_cam", "0"))))
    assert close(found["layer_cam_shallow"], two) and close(found["hybrid"], fused(coarse_of(shot), two))
    assert close(found["activation"], big(np.maximum(shot.activations["2"][:3].numpy(), 0).mean(1)))


# --------------------------------------------------------------------------------------- controls without information


def test_centre_is_a_gaussian(maps):
    y, x = np.linspace(-1, 1, 24)[:, None], np.linspace(-1, 1, 20)[None]
    centre = np.exp(-(y**2 + x**2) / (2 * 0.5**2))  # a side is 2 long, so a quarter of it is 0.5
    for m in maps["centre"]:
        assert np.allclose(m.numpy(), centre / centre.max(), atol=1e-5)


def test_noise_depends_on_seed_and_id_alone(shot, x, maps):
    """Not on the group, its order, the network or the layers."""
    picked = x[[2, 0, 1]]
    other = cc.capture(tiny(9), picked, ["6", "2"])
    layers = {"deep": "2", "coarse": "2", "shallow": "2", "finer": "6"}
    again = maps_of(other, picked, layers=layers, alpha=1.0, ids=["c", "a"])
    for name in ("noise", "smooth_noise"):
        assert torch.equal(again[name][0], maps[name][2]) and torch.equal(again[name][1], maps[name][0])
        assert not torch.equal(maps[name][0], maps[name][1])
        assert not torch.equal(maps_of(shot, x, seed=1)[name], maps[name])
    noise, smooth = (maps[n].numpy() for n in ("noise", "smooth_noise"))
    steps = [np.abs(np.diff(m, axis=2)).mean() for m in (noise, smooth)]
    assert steps[0] > 2 * steps[1]  # smooth noise is smooth
    assert 0.4 < noise.mean() < 0.6 and abs(np.corrcoef(noise[0].flat, noise[1].flat)[0, 1]) < 0.2


def test_noise_is_of_the_pixel_and_smooth_noise_of_a_7_by_7_grid():
    x = images(4, (63, 63))
    found = maps_of(cc.capture(tiny(3), x, NAMES, 1), x, seed=5)
    # 63 = 7 * 9: the middle pixel of every 9 x 9 cell has the value of the grid
    assert close(found["smooth_noise"], big(found["smooth_noise"][:, 4::9, 4::9].numpy(), (63, 63)), 1e-5)
    assert len(np.unique(found["noise"][0])) > 3900


# ------------------------------------------------------------------------------------------------- cost, zeros, style


def test_one_forward_and_one_backward_pass(x):
    net, forward, backward = tiny(3), [], []
    net[0].register_forward_hook(lambda *_: forward.append(1))
    net[11].register_full_backward_hook(lambda *_: backward.append(1))
    maps_of(cc.capture(net, x, NAMES, 1), x)
    assert len(forward) == len(backward) == 1


def test_images_do_not_mix(x, maps):
    """One image alone, with its successor, has the maps that it has in the group; times_other included."""
    for k in range(3):
        pair = x[k : k + 2]
        alone = maps_of(cc.capture(tiny(3), pair, NAMES, 1), pair, ids=IDS[k : k + 1])
        for name, m in maps.items():
            assert torch.allclose(alone[name][0], m[k], atol=1e-4), name


def test_a_map_that_is_zero_makes_zero_or_the_other_map(x):
    """A class that nothing speaks for: all CAMS are zero, the products too; nothing is NaN or mere rounding."""
    net = tiny(3)
    with torch.no_grad():
        net[11].weight[2], net[11].bias[2] = 0, 0
    shot = cc.capture(net, x, NAMES, 2)
    for rule in cc.FUSIONS:
        for alpha in (0.3, 0.5, 0.7):
            found = maps_of(shot, x, rule=rule, alpha=alpha)
            for name, m in found.items():
                assert torch.isfinite(m).all() and all(p in (0, 1) for p in m.amax((1, 2)).tolist()), (rule, name)
            zero = {*cc.CAMS, "hybrid", "hybrid_same", "hybrid_deep", "fused_mean", "fused_maximum", "times_other"}
            assert not any(found[name].any() for name in zero | set(cc.MATCHED[:3]) | {"hybrid_coarse"})
            assert all(found[name].any() for name in ("sobel", "activation", "noise", "smooth_noise", "centre"))
            assert found["times_sobel"].any() == (rule != "product")


def test_a_cam_of_ones_own_is_three_lines(shot, x, monkeypatch):
    monkeypatch.setitem(cc.CAMS, "mine", lambda A, G: A.float().abs().mean(1))
    found = maps_of(shot, x)
    assert list(found)[-1] == "mine" and close(found["mine"], big(shot.activations["6"][:3].abs().mean(1).numpy()))
    assert cc.label("mine") == "mine" and cc.colour("mine").startswith("#")
    assert cc.explain(tiny(3), images(1, SIZE), method="mine", layer="6").method == "mine"


def test_every_method_has_a_name_and_a_colour(maps):
    names, colours = ([pair[k] for pair in cc.STYLE.values()] for k in (0, 1))
    assert set(maps) | {"rise"} == set(cc.STYLE) and set(cc.CAMS) <= set(cc.STYLE)
    assert len(set(names)) == len(set(colours)) == len(cc.STYLE) == 23
    assert all(len(c) == 7 and int(c[1:], 16) >= 0 and c[0] == "#" for c in colours)
    assert not set(names) & set(cc.STYLE)
