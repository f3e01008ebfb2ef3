"""ROAD: imputation against a sparse solver, its curves against a loop, and pytorch-grad-cam."""

from __future__ import annotations

import functools

import numpy as np
import oracle
import pytest
import torch
from nets import images, plateaued, strong
from pytorch_grad_cam.metrics.road import NoisyLinearImputer, ROADCombined
from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget
from scipy.sparse import csc_matrix
from scipy.sparse.linalg import spsolve
from torch import nn

import cam_core as cc

SIZE = (40, 37)  # three grids, odd sides among them
IDS = ["one", "two", "three"]
WEIGHTS = {(1, 0): 1 / 6, (0, 1): 1 / 6, (1, 1): 1 / 12, (1, -1): 1 / 12}
WEIGHTS |= {(-down, -right): w for (down, right), w in WEIGHTS.items()}


def solved(image, removed):
    """The paper's equations, written down pixel by pixel and handed to SciPy."""
    number = {tuple(place): k for k, place in enumerate(np.argwhere(removed))}
    entries = []
    right = np.zeros((len(number), len(image)))
    for (row, column), k in number.items():
        for (down, across), weight in WEIGHTS.items():
            near = (row + down, column + across)
            if not (0 <= near[0] < removed.shape[0] and 0 <= near[1] < removed.shape[1]):
                continue
            entries.append((weight, k, k))
            if near in number:
                entries.append((-weight, k, number[near]))
            else:
                right[k] += weight * image[:, near[0], near[1]]
    filled = image.astype(np.float64)
    if number:
        values, rows, columns = zip(*entries, strict=True)
        matrix = csc_matrix((values, (rows, columns)))  # adds up what has one place
        filled[:, removed] = spsolve(matrix, right).reshape(right.shape).T
    return filled


def some_masks(size):
    """Smooth blobs and pixel noise from 10 to 90 %, and what is hard for a coarse grid."""
    draw = np.random.default_rng(3)
    smooth = torch.from_numpy(draw.random((1, 1, 5, 4), np.float32))
    smooth = nn.functional.interpolate(smooth, size=size, mode="bilinear")[0, 0].numpy()
    noise = draw.random(size)
    masks = {}
    for kind, values in {"smooth": smooth, "noise": noise, "both": smooth * noise}.items():
        for percent in (10, 50, 90):
            masks[f"{kind} {percent}"] = values <= np.percentile(values, percent)
    row, column = np.indices(size)
    masks["none"] = row < 0
    masks["half"] = column < size[1] // 2
    masks["frame left"] = (row > 0) & (column > 0) & (row < size[0] - 1) & (column < size[1] - 1)
    masks["line left"] = column != 11
    masks["lattice left"] = (row % 8 > 0) & (column % 8 > 0)
    masks["corner left"] = row + column > 0
    masks["three left"] = ~np.isin(row * size[1] + column, [7, 600, 601])
    return masks


@functools.cache
def cases():
    masks = some_masks(SIZE)
    x = 2 * images(len(masks), SIZE, seed=5)
    x[::2] = nn.functional.avg_pool2d(x[::2], 5, 1, 2) + 3  # smooth, with a mean far from 0
    return x, torch.from_numpy(np.stack(list(masks.values()))), list(masks)


# ---- imputation


def test_imputed_solves_the_papers_equations():
    x, removed, names = cases()
    found = cc.imputed(x, removed, noise=0)
    assert torch.equal(found.movedim(1, -1)[~removed], x.movedim(1, -1)[~removed])
    for image, mask, ours, name in zip(x.numpy(), removed.numpy(), found, names, strict=True):
        assert np.abs(ours.numpy() - solved(image, mask)).max() < 1e-4, name


def test_imputed_like_pytorch_grad_cam():
    """On four grids; its mask says what is left."""
    size = (150, 120)
    masks = some_masks(size)
    x = 2 * images(2, size, seed=6) + 1
    removed = torch.from_numpy(np.stack([masks["smooth 90"], masks["both 50"]]))
    theirs = [NoisyLinearImputer(noise=0)(i, (~m).float()) for i, m in zip(x, removed, strict=True)]
    assert (cc.imputed(x, removed, noise=0) - torch.stack(theirs)).abs().max() < 1e-4


@pytest.mark.parametrize("size", [(5, 9), (12, 12), (13, 30), (64, 7)])
def test_imputed_of_any_size(size):
    """Small pictures are one grid, long ones become lines."""
    x = images(2, size, seed=7)
    removed = torch.rand(2, *size, generator=torch.Generator().manual_seed(8)) < 0.8
    found = cc.imputed(x, removed, noise=0)
    for image, mask, ours in zip(x.numpy(), removed.numpy(), found, strict=True):
        assert np.abs(ours.numpy() - solved(image, mask)).max() < 1e-4


def test_imputed_does_not_depend_on_the_other_images_of_a_batch():
    x, removed, _ = cases()
    together = cc.imputed(x, removed, noise=0)
    for i in range(len(x)):  # they end after different steps
        alone = cc.imputed(x[i : i + 1], removed[i : i + 1], noise=0)
        assert (alone[0] - together[i]).abs().max() < 3e-6


def test_noise_depends_on_seed_and_image_alone():
    x, removed, names = cases()
    ids = [f"image {name}" for name in names]
    linear = cc.imputed(x, removed, noise=0)
    noise = cc.imputed(x, removed, ids, seed=4) - linear
    assert not noise.movedim(1, -1)[~removed].any()
    assert noise.movedim(1, -1)[removed].std() == pytest.approx(0.01, rel=0.02)
    i, j = names.index("half"), names.index("noise 90")
    other = cc.imputed(x[[i, i]], removed[[i, j]], [ids[i], ids[i]], seed=4)
    other -= cc.imputed(x[[i, i]], removed[[i, j]], noise=0)
    both = removed[i] & removed[j]
    assert torch.allclose(other[0], noise[i], atol=3e-6)  # in another batch
    assert torch.allclose(other[1][:, both], noise[i][:, both], atol=3e-6)  # under another mask
    again = cc.imputed(x, removed, ids, seed=5) - linear
    assert (again - noise).abs()[i].max() > 0.01
    assert (noise[i] - noise[j])[:, both].abs().max() > 0.01


def test_imputed_refuses_what_it_cannot_fill():
    x, removed, _ = cases()
    for bad in (removed[:, 1:], removed[:1], removed.float(), removed[:, None]):
        with pytest.raises(ValueError, match="removed"):
            cc.imputed(x, bad, noise=0)
    with pytest.raises(ValueError, match="ids"):
        cc.imputed(x, removed)
    with pytest.raises(ValueError, match="ids"):
        cc.imputed(x, removed, IDS)
    with pytest.raises(ValueError, match="all of an image"):
        cc.imputed(x[:2], torch.stack([removed[0], torch.ones(SIZE, dtype=torch.bool)]), noise=0)
    with pytest.raises(ValueError, match="NaN"):
        cc.imputed(x[:2] * float("nan"), removed[:2], noise=0)


# ---- curves


@pytest.fixture
def net():
    return strong()


@pytest.fixture
def x():
    return 2 * images(3, SIZE, seed=1)


maps = functools.partial(plateaued, SIZE)


class OnePixel(nn.Module):
    """Its logits are one pixel's value, and 0."""

    def forward(self, x):
        value = x[:, 0, 20, 10]
        return torch.stack([value, torch.zeros_like(value)], 1)


def test_both_orders_of_a_network_that_looks_at_one_pixel():
    x = torch.zeros(1, 3, *SIZE)
    x[:, :, 20, 10] = 4
    relevant = torch.zeros(1, *SIZE)
    relevant[:, 20, 10] = 1
    wrong = 1 - relevant
    found = cc.road(OnePixel(), x, {"right": relevant, "wrong": wrong}, 0, IDS[:1])
    kept = torch.full((1, 9), 4.0).sigmoid()
    for key, name in (("least", "right"), ("most", "wrong")):
        assert torch.allclose(found[key][name], kept)
    for key, name in (("most", "right"), ("least", "wrong")):  # 0 but for the noise
        assert (found[key][name] - 0.5).abs().max() < 0.01
    score = cc.road_score(found)
    assert score["right"] == pytest.approx([float(kept[0, 0]) - 0.5], abs=0.01)
    assert score["wrong"] == pytest.approx(-score["right"])


def test_road_like_a_loop(net, x):
    """Image by image, with the oracle's order of pixels, SciPy's solution and one noise."""
    target = [0, 1, 2]
    fractions = (0.1, 0.8)
    named = {"a": maps(1), "b": maps(2)}
    found = cc.road(net, x, named, target, IDS, fractions, seed=3)
    half = torch.zeros(3, *SIZE, dtype=torch.bool)
    noise = torch.zeros_like(x)
    for side in (slice(0, 20), slice(20, None)):  # all of it, from two masks
        mask = half.clone()
        mask[:, side] = True
        noise += cc.imputed(x, mask, IDS, seed=3) - cc.imputed(x, mask, noise=0)
    ties = cc.pixel_rank(torch.zeros(3, 1, SIZE[0] * SIZE[1]), IDS, seed=3)[:, 0].argsort(1)
    for name, m in named.items():
        for i in range(3):
            place = oracle.places(m[i].numpy(), ties[i].tolist())
            for k, fraction in enumerate(fractions):
                count = round(fraction * place.size)
                for key, removed in (
                    ("most", place < count),
                    ("least", place >= place.size - count),
                ):
                    picture = torch.from_numpy(solved(x[i].numpy(), removed)).float()
                    picture += noise[i] * torch.from_numpy(removed)
                    with torch.no_grad():
                        p = net(picture[None]).softmax(1)[0, target[i]]
                    assert float(found[key][name][i, k]) == pytest.approx(float(p), abs=2e-4)


def test_half_the_score_is_pytorch_grad_cams(net, x, monkeypatch):
    monkeypatch.setattr(cc, "ROAD_NOISE", 0)
    monkeypatch.setattr(NoisyLinearImputer.__init__, "__defaults__", (0, None))
    draw = np.random.default_rng(0)
    pixels = SIZE[0] * SIZE[1]
    m = np.stack([draw.permutation(pixels).reshape(SIZE) / pixels for _ in IDS])
    ours = cc.road_score(cc.road(net, x, {"m": torch.from_numpy(m)}, [0, 1, 2], IDS))["m"]
    asked = [ClassifierOutputSoftmaxTarget(k) for k in range(3)]
    theirs = ROADCombined()(x, m, asked, net)
    assert np.abs(ours).max() > 0.01
    assert ours / 2 == pytest.approx(theirs, abs=1e-4)


def test_equal_pictures_are_scored_once(net, x):
    """A map, the same scaled, and its negative: what one removes first, another removes last."""
    m = torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(5))
    cc.road(net, x, {"m": m}, 1, IDS, (0.5,))  # looks at the network itself, once
    before = cc.ledger.counts()
    found = cc.road(net, x, {"m": m, "scaled": m / 2, "negative": -m}, 1, IDS, (0.25, 0.5))
    pictures = cc.ledger.since(before)
    assert (pictures["forward"], pictures["asked"]) == (3 * 4, 3 * 3 * 4)
    assert torch.equal(found["most"]["m"], found["most"]["scaled"])
    assert torch.equal(found["most"]["m"], found["least"]["negative"])


def test_curves_depend_on_seed_and_image_alone(net, x):
    flat = {"flat": torch.zeros(3, *SIZE)}
    found = cc.road(net, x, flat, [0, 1, 2], IDS, seed=1)["most"]["flat"]
    alone = cc.road(net, x[1:2], {"flat": flat["flat"][1:2]}, 1, IDS[1:2], seed=1, batch_size=3)
    assert torch.allclose(alone["most"]["flat"][0], found[1], atol=1e-5)
    other = cc.road(net, x, flat, [0, 1, 2], IDS, seed=2)["most"]["flat"]
    assert (other - found).abs().amax() > 1e-3


def test_a_target_function_takes_the_place_of_the_probability(net, x):
    logit = cc.road(net, x, {"m": maps()}, lambda output: output[:, 2], IDS, (0.3,))
    p = cc.road(net, x, {"m": maps()}, 2, IDS, (0.3,))["most"]["m"]
    assert not torch.allclose(logit["most"]["m"], p)
    with torch.no_grad():
        rank = cc.pixel_rank(maps(), IDS)
        pictures = cc.imputed(x, rank < round(0.3 * rank[0].numel()), IDS)
        assert torch.allclose(logit["most"]["m"][:, 0], net(pictures)[:, 2], atol=1e-4)


def test_road_refuses_what_has_no_meaning(net, x):
    for fractions in ((), (0.0, 0.5), (0.5, 1.0), (-0.1,), (float("nan"),)):
        with pytest.raises(ValueError, match="fractions"):
            cc.road(net, x, {"m": maps()}, 0, IDS, fractions)
    with pytest.raises(ValueError, match="shape"):
        cc.road(net, x, {"m": maps()[:, 1:]}, 0, IDS)
    with pytest.raises(ValueError, match="NaN"):
        cc.road(net, x, {"m": maps().log().nan_to_num(float("nan"), 0, float("nan"))}, 0, IDS)
    with pytest.raises(ValueError, match="ids"):
        cc.road(net, x, {"m": maps()}, 0, IDS[:2])
    with pytest.raises(ValueError, match="target"):
        cc.road(net, x, {"m": maps()}, None, IDS)
