"""Insertion, deletion and localisation against an oracle that imports only numpy (oracle.py), and their invariants."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from nets import images, state, tiny
from PIL import Image
from torch import nn

import cam_core as cc

SIZE = (9, 7)  # not square, 63 pixels
IDS = ["one", "two", "three"]
quick = settings(max_examples=30, derandomize=True, deadline=None)


def plain(net):
    """The model as the oracle wants it."""

    def call(image):
        with torch.no_grad():
            return net(torch.from_numpy(image)[None])[0].numpy()

    return call


class Counting(nn.Module):
    """Counts the images that pass."""

    def __init__(self, net):
        super().__init__()
        self.net, self.seen = net, 0

    def forward(self, x):
        self.seen += len(x)
        return self.net(x)


@pytest.fixture
def net():
    """With a classifier strong enough for curves that rise and fall."""
    net = tiny(2)
    net[9].weight.data *= 4
    net[11].weight.data *= 4
    return net


@pytest.fixture
def x():
    return 2 * images(3, SIZE, seed=1)


def maps(seed=0, zeros=0.4):
    """Random maps with a plateau of zeros, as products of rectified maps have."""
    m = torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(seed))
    return torch.where(m < zeros, 0.0, m)


def tie_break(ids, count, seed):
    """The permutation in which equal pixels, or blocks, are visited: what a flat map shows."""
    return cc.pixel_rank(torch.zeros(len(ids), 1, count), ids, seed)[:, 0].argsort(1).tolist()


# -------------------------------------------------------------------------------------------- curves against the oracle


def agree(net, x, start, end, named, target, ids, seed, steps, block=0, **settings):
    """faithfulness() and the oracle, image by image, map by map and step by step; the oracle knows no shortcut."""
    found = cc.faithfulness(net, x, named, target, ids, start, end, seed=seed, steps=steps, block=block, **settings)
    assert list(found) == ["insertion", "deletion"] and all(list(curves) == list(named) for curves in found.values())
    height, width = x.shape[2:]
    count = -(-height // block) * -(-width // block) if block else height * width
    ties, reach = tie_break(ids, count, seed), 0.0
    for name, m in named.items():
        for b in range(len(x)):
            arguments = (m[b].numpy(), ties[b])
            place = oracle.block_places(*arguments, block) if block else oracle.places(*arguments)
            for metric, first, last in (("insertion", start, x), ("deletion", x, end)):
                expected = oracle.curve(plain(net), first[b].numpy(), last[b].numpy(), place, int(target[b]), steps)
                curve = found[metric][name][b].numpy()
                assert curve.shape == (steps + 1,) and curve.dtype == np.float32
                assert np.abs(curve - expected).max() < 1e-5, (metric, name, b)
                assert cc.auc(curve) == pytest.approx(oracle.auc(expected), abs=1e-5)
                reach = max(reach, np.ptp(expected))
    return reach


@pytest.mark.parametrize("name", ["rise", "black", "twin"])
@pytest.mark.parametrize("steps", [1, 4, 28, 63])  # 4 and 28 do not divide 63
def test_curves_equal_the_oracle(net, x, name, steps):
    start, end = cc.baselines(x, name, images(3, SIZE, seed=8))
    reach = agree(net, x, start, end, {"m": maps()}, torch.tensor([0, 3, 1]), IDS, 4, steps, batch_size=5)
    assert reach > 0.02  # a flat curve would agree with anything


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
@pytest.mark.parametrize(("block", "steps"), [(0, 10), (2, 6), (4, 6), (5, 4)])
def test_several_maps_equal_the_oracle(net, x, block, steps, batch_size):
    """Five maps: two of one order, one that agrees with them on one image, two constant ones. 9 x 7 pixels are no
    multiple of 2 x 2, 4 x 4 or 5 x 5 blocks, nor are 63 pixels or 20 blocks of the steps."""
    m = maps()
    other = m.flip(1)
    other[1] = m[1]
    named = {"m": m, "scaled": m * 0.25, "other": other, "flat": torch.full_like(m, 0.5), "zero": 0 * m}
    start, end = cc.baselines(x, "rise")
    target = torch.tensor([2, 0, 1])
    assert agree(net, x, start, end, named, target, IDS, 1, steps, block, batch_size=batch_size) > 0.02


def patch(x, top=2, left=1, height=3, width=2):
    """The image without its lesion: another one inside of a small region."""
    twin = x.clone()
    twin[:, :, top : top + height, left : left + width] = 3 * images(len(x), (height, width), seed=8)
    return twin


@pytest.mark.parametrize("block", [0, 2])
def test_a_twin_costs_only_the_pictures_that_differ(net, x, block):
    """Six pixels differ, so of the 31 points of a curve (11 with blocks) few are different pictures."""
    twin, steps = patch(x), 10 if block else 30
    draw = torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(5))
    named = {"m": maps(), "draw": draw, "m again": 0.5 * maps()}
    counting, target = Counting(net), torch.tensor([0, 1, 2])
    assert agree(net, x, twin, twin, named, target, IDS, 3, steps, block, batch_size=8) > 0.02
    cc.faithfulness(counting, x, named, target, IDS, twin, twin, seed=3, steps=steps, block=block, batch_size=8)
    expected = 0
    for b in range(3):
        expected += 2  # the image and its twin: ends of both curves
        for first, last in ((twin, x), (x, twin)):
            pictures = set()  # every other picture that the two orders make of one image
            for name in ("m", "draw"):
                rank = cc.block_rank(named[name], IDS, 3, block) if block else cc.pixel_rank(named[name], IDS, 3)
                for stop in oracle.group_ends(int(rank.max()) + 1, steps):
                    picture = torch.where(rank[b] < stop, last[b], first[b])
                    if not torch.equal(picture, first[b]) and not torch.equal(picture, last[b]):
                        pictures.add((name, picture.numpy().tobytes()))
            expected += len(pictures)
    naive = 2 * 3 * 3 * (steps + 1)
    assert counting.seen == expected < naive / 3  # 2 metrics, 3 images, 3 maps


def test_where_start_and_end_agree_everywhere_one_picture_is_enough(net, x):
    counting, named = Counting(net), {"m": maps(), "other": maps(1)}
    found = cc.faithfulness(counting, x, named, torch.tensor([0, 1, 2]), IDS, x.clone(), x.clone(), steps=9)
    assert counting.seen == 3
    p = cc.probabilities(net, x).gather(1, torch.tensor([[0], [1], [2]]))
    for curves in found.values():
        for c in curves.values():
            assert torch.allclose(c, p.expand(-1, 10), atol=1e-6)


def test_one_channel_that_differs_is_a_difference(net, x):
    """The twin may differ in the last channel only."""
    twin = x.clone()
    twin[:, 2, 3:6, 2:5] += 4
    assert agree(net, x, twin, twin, {"m": maps()}, torch.tensor([0, 1, 2]), IDS, 0, 21) > 0.01


def test_curves_of_ranks_directly(net, x):
    """(N, M, steps + 1), image by image and order by order, for orders given as (N, M, H, W)."""
    ranks = torch.stack([cc.pixel_rank(maps(k), IDS) for k in range(2)], 1)
    end, target = torch.zeros_like(x), torch.tensor([3, 0, 2])
    found = cc.perturbation_curves(net, x, end, ranks, target, steps=7, batch_size=3)
    assert found.shape == (3, 2, 8) and found.dtype == torch.float32
    for b in range(3):
        for k in range(2):
            arrays = (x[b].numpy(), end[b].numpy(), ranks[b, k].numpy())
            assert np.abs(found[b, k].numpy() - oracle.curve(plain(net), *arrays, int(target[b]), 7)).max() < 1e-5


@quick
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 3), st.integers(1, 20), st.integers(1, 9))
def test_curves_equal_the_oracle_whatever_coincides(seed, n, m, steps, batch_size):
    """Random images in which many pixels of start and end agree, and maps of a few values of which some coincide."""
    draw = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 2, (n, 3, 4, 5), generator=draw).float()
    end = torch.where(torch.rand(n, 1, 4, 5, generator=draw) < 0.3, 1 - start, start)
    weight = torch.randn(4, 60, generator=draw)

    class Linear(nn.Module):
        def forward(self, x):
            return x.flatten(1) @ weight.T

    values = torch.randint(0, 2, (n, m, 4, 5), generator=draw).float()
    ranks = torch.stack([cc.pixel_rank(values[:, k], [str(i) for i in range(n)], seed) for k in range(m)], 1)
    target = torch.randint(0, 4, (n,), generator=draw)
    counting = Counting(Linear())
    found = cc.perturbation_curves(counting, start, end, ranks, target, steps, batch_size)
    for i in range(n):
        for k in range(m):
            arrays = (start[i].numpy(), end[i].numpy(), ranks[i, k].numpy())
            expected = oracle.curve(plain(Linear()), *arrays, int(target[i]), steps)
            assert np.abs(found[i, k].numpy() - expected).max() < 1e-5
    assert counting.seen <= n * (m * (steps - 1) + 2)


def test_curves_begin_and_end_where_they_should(net, x):
    start, end = cc.baselines(x, "rise")
    target = torch.tensor([1, 1, 2])
    found = cc.faithfulness(net, x, {"m": maps()}, target, IDS, start, end, steps=5)
    whole, blurred, grey = (cc.probabilities(net, t).gather(1, target[:, None])[:, 0] for t in (x, start, end))
    assert torch.allclose(found["insertion"]["m"][:, 0], blurred) and torch.allclose(
        found["insertion"]["m"][:, -1], whole
    )
    assert torch.allclose(found["deletion"]["m"][:, 0], whole) and torch.allclose(found["deletion"]["m"][:, -1], grey)


def test_the_largest_attribution_goes_first():
    """A model that looks at one pixel: pointing at it first must drop the score in the first step, last in the last."""

    class Looks(nn.Module):
        def forward(self, x):
            return torch.stack([x[:, 0, 4, 5] * 10, torch.zeros(len(x))], 1)

    x, grey = torch.ones(1, 3, 6, 8), torch.zeros(1, 3, 6, 8)
    at = torch.zeros(1, 6, 8)
    at[0, 4, 5] = 1
    found = cc.faithfulness(Looks(), x, {"at": at, "not": 1 - at}, torch.tensor([0]), ["i"], grey, grey, steps=48)
    high, low = 1 / (1 + math.exp(-10)), 0.5
    assert found["deletion"]["at"][0].tolist() == pytest.approx([high] + [low] * 48)
    assert found["insertion"]["at"][0].tolist() == pytest.approx([low] + [high] * 48)
    assert found["deletion"]["not"][0].tolist() == pytest.approx([high] * 48 + [low])


@pytest.mark.parametrize("batch_size", [1, 2, 7, 1000])
def test_batch_size_changes_nothing(net, x, batch_size):
    settings = dict(seed=0, steps=6)
    end = torch.zeros_like(x)
    arguments = (net, x, {"m": maps()}, torch.tensor([0, 1, 2]), IDS, end, end)
    one, other = (cc.faithfulness(*arguments, batch_size=b, **settings) for b in (3, batch_size))
    for metric in one:
        assert torch.allclose(one[metric]["m"], other[metric]["m"], atol=1e-6)


def test_grouping_of_images_changes_nothing(net, x):
    start, end = cc.baselines(x, "rise")
    m, target = {"m": maps(), "flat": torch.ones(3, *SIZE)}, torch.tensor([0, 1, 2])
    together = cc.faithfulness(net, x, m, target, IDS, start, end, seed=3, steps=9)
    for pick in ([2], [1, 0], [2, 0, 1]):
        part = {name: v[pick] for name, v in m.items()}
        ids = [IDS[k] for k in pick]
        alone = cc.faithfulness(net, x[pick], part, target[pick], ids, start[pick], end[pick], seed=3, steps=9)
        for metric in together:
            for name in m:
                assert torch.allclose(alone[metric][name], together[metric][name][pick], atol=1e-6)


@pytest.mark.parametrize(("steps", "block"), [(0, 0), (-1, 0), (64, 0), (0, 4), (7, 4)])
def test_steps_outside_are_refused(net, x, steps, block):
    """63 pixels; 3 x 2 blocks of 4 x 4."""
    with pytest.raises(ValueError, match=f"steps={steps} .* {6 if block else 63}"):
        cc.faithfulness(net, x, {"m": maps()}, torch.tensor([0, 1, 2]), IDS, x, x, steps=steps, block=block)


@pytest.mark.parametrize("block", [0, 4])
def test_nan_in_a_map_is_refused(net, x, block):
    m = maps()
    m[1, 8, 6] = math.nan
    with pytest.raises(ValueError, match="maps contain NaN"):
        cc.faithfulness(net, x, {"fine": maps(), "m": m}, torch.tensor([0, 1, 2]), IDS, x, x, steps=4, block=block)


def test_equal_orders_are_evaluated_once_and_exactly(net, x):
    """Three maps, two of one order for every image, the third equal to them for image 0 only."""
    m = maps()
    other = m.flip(1)
    other[0] = m[0]
    counting = Counting(net)
    named = {"a": m, "scaled": m * 0.25, "other": other}
    arguments = (x, named, torch.tensor([0, 1, 2]), IDS, torch.zeros_like(x), torch.zeros_like(x))
    found = cc.faithfulness(counting, *arguments, steps=6)
    # for each of three images itself and its grey; for two metrics five points between, of three orders and two more
    assert counting.seen == 3 * 2 + 2 * 5 * (3 + 2)
    for metric in ("insertion", "deletion"):
        assert torch.equal(found[metric]["a"], found[metric]["scaled"])
        assert torch.equal(found[metric]["other"][0], found[metric]["a"][0])
        assert not torch.allclose(found[metric]["other"][1:], found[metric]["a"][1:])
        alone = cc.faithfulness(net, x, {"other": other}, *arguments[2:], steps=6)
        assert torch.allclose(found[metric]["other"], alone[metric]["other"], atol=1e-6)


def test_equal_orders_of_different_images_are_not_one(net, x):
    """Without ties a map orders the pixels of every image alike; the images are not alike."""
    m = torch.rand(1, *SIZE).expand(3, -1, -1)
    end = torch.zeros_like(x)
    found = cc.faithfulness(net, x, {"m": m}, torch.tensor([0, 1, 2]), IDS, end, end, steps=6)
    for b, place in enumerate(cc.pixel_rank(m, IDS).numpy()):
        expected = oracle.curve(plain(net), x[b].numpy(), end[b].numpy(), place, b, 6)
        assert np.abs(found["deletion"]["m"][b].numpy() - expected).max() < 1e-5


def test_an_order_that_another_image_has_too(net, x):
    """Two orders, one for all maps of the first image, the other for those of the second, both for the third."""
    one, other = (cc.pixel_rank(maps(seed, zeros=0), IDS)[0] for seed in (0, 1))
    ranks = torch.stack([torch.stack(pair) for pair in ((one, one), (other, other), (one, other))])
    end, target = torch.zeros_like(x), torch.tensor([0, 1, 2])
    found = cc.perturbation_curves(net, x, end, ranks, target, steps=7)
    for b in range(3):
        for k in range(2):
            expected = oracle.curve(plain(net), x[b].numpy(), end[b].numpy(), ranks[b, k].numpy(), b, 7)
            assert np.abs(found[b, k].numpy() - expected).max() < 1e-5


def test_progress_counts_every_point(net, x):
    """Also those that need no evaluation, so that a bar which expects metrics x images x maps x points ends full."""
    for end in (torch.zeros_like(x), patch(x), x):
        told, named = [], {"m": maps(), "again": 0.5 * maps(), "other": maps(1)}
        settings = dict(steps=6, batch_size=4, progress=told.append)
        cc.faithfulness(net, x, named, torch.tensor([0, 1, 2]), IDS, end, end, **settings)
        assert sum(told) == 2 * 3 * 3 * 7 and all(isinstance(k, int) and k >= 0 for k in told)


def test_measuring_alters_neither_images_nor_maps_nor_model(net, x):
    start, end = cc.baselines(x, "rise")
    m = maps()
    before = [t.clone() for t in (x, start, end, m)], state(net)
    cc.faithfulness(net, x, {"m": m}, torch.tensor([0, 1, 2]), IDS, start, end, steps=6)
    assert (
        all(torch.equal(a, b) for a, b in zip(before[0], (x, start, end, m), strict=True)) and state(net) == before[1]
    )


def test_measuring_does_not_train_a_model_in_train_mode(net, x):
    """Batch norm in train mode would mix the images of a batch into each other's score, and update its statistics."""
    expected = cc.probabilities(net, x)
    before = state(net.train())
    assert torch.allclose(cc.probabilities(net, x), expected, atol=1e-6)
    assert state(net) == before


# ------------------------------------------------------------------------------------------------------ probabilities


def test_probabilities_are_the_softmax(net, x):
    found = cc.probabilities(net, x, batch_size=2)
    expected = np.stack([oracle.softmax(plain(net)(image)) for image in x.numpy()])
    assert found.dtype == torch.float32 and np.abs(found.numpy() - expected).max() < 1e-6


def test_bf16_differs_but_little(net, x):
    exact, rough = (cc.probabilities(net, x, precision=p) for p in ("float32", "bf16"))
    assert rough.dtype == torch.float32 and not torch.equal(rough, exact) and torch.allclose(rough, exact, atol=0.03)
    assert torch.allclose(rough.sum(1), torch.ones(3), atol=1e-6)  # the softmax itself is taken in float32
    with pytest.raises(ValueError, match="precision='fp16'"):
        cc.probabilities(net, x, precision="fp16")


def test_bf16_curves_differ_but_little(net, x):
    end = torch.zeros_like(x)
    arguments = (net, x, {"m": maps()}, torch.tensor([0, 1, 2]), IDS, end, end)
    exact, rough = (cc.faithfulness(*arguments, steps=6, precision=p) for p in ("float32", "bf16"))
    for metric in exact:
        difference = (exact[metric]["m"] - rough[metric]["m"]).abs()
        assert 0 < difference.max() < 0.03


# ---------------------------------------------------------------------------------------------------------- the order


def test_places_by_hand():
    m = torch.tensor([[[0.1, 0.9], [0.5, 0.3]]])
    found = cc.pixel_rank(m, ["i"])
    assert found.tolist() == [[[3, 0], [1, 2]]] and found.dtype == torch.int32


def test_ties_follow_one_permutation_for_every_method():
    """A flat map is visited in the image's own random order; a map with plateaus keeps that order within each."""
    flat = torch.ones(3, *SIZE)
    shuffled = cc.pixel_rank(flat, IDS, seed=2)
    assert shuffled.tolist() == cc.pixel_rank(0 * flat, IDS, seed=2).tolist()
    assert len({tuple(o) for o in shuffled.flatten(1).tolist()}) == 3  # another order for every image
    assert shuffled.tolist() != cc.pixel_rank(flat, IDS, seed=3).tolist()
    steps = (4 * maps(zeros=0.5)).round()
    for b, found in enumerate(cc.pixel_rank(steps, IDS, seed=2)):
        assert (found.numpy() == oracle.places(steps[b].numpy(), shuffled[b].flatten().argsort().tolist())).all()


def test_a_random_order_is_spread_over_the_image():
    """The first half of a flat map's order must not be its upper half, as it would be without shuffling."""
    rows = (cc.pixel_rank(torch.zeros(1, 40, 40), ["i"])[0] < 800).nonzero()[:, 0]
    assert 17 < rows.float().mean() < 22 and len(rows.unique()) == 40


def test_order_depends_on_the_id_not_on_the_group():
    m = (3 * maps()).round()
    together = cc.pixel_rank(m, IDS, seed=1)
    assert torch.equal(cc.pixel_rank(m[[2, 0]], ["three", "one"], seed=1), together[[2, 0]])
    assert not torch.equal(cc.pixel_rank(m[:1], ["other"], seed=1)[0], together[0])
    assert torch.equal(cc.pixel_rank(m[:1], [7]), cc.pixel_rank(m[:1], ["7"]))


@quick
@given(hnp.arrays(np.float32, (2, 4, 5), elements=st.sampled_from([0.0, 0.25, 0.5, 1.0])), st.integers(0, 99))
def test_order_properties(values, seed):
    m = torch.from_numpy(values)
    found = cc.pixel_rank(m, ["a", "b"], seed)
    assert found.shape == m.shape
    assert (found.flatten(1).sort(1).values == torch.arange(20)).all()  # a permutation: every place once
    assert (m.flatten(1).gather(1, found.flatten(1).argsort(1)).diff(dim=1) <= 0).all()  # descending
    assert torch.equal(found, cc.pixel_rank(m / 3, ["a", "b"], seed))  # only ranks matter


@pytest.mark.parametrize("rank", [cc.pixel_rank, lambda m, ids: cc.block_rank(m, ids, 0, 4)], ids=["pixels", "blocks"])
def test_number_of_ids_has_to_fit_and_nan_has_no_place(rank):
    with pytest.raises(ValueError, match="ids has 2 entries for 3 maps"):
        rank(maps(), IDS[:2])
    m = maps()
    m[2, 0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        rank(m, IDS)


def test_blocks_by_hand():
    """5 x 3 pixels in 2 x 2 blocks: the last column of blocks is one pixel wide, the last row one pixel high."""
    m = torch.tensor(
        [[[1.0, 0.0, 0.5], [0.0, 0.0, 0.1], [0.0, 0.0, 0.9], [0.0, 4.0, 0.9], [0.2, 0.2, 0.8]]]
    )  # means: 0.25, 0.3; 1.0, 0.9; 0.2, 0.8 (with zeros counted beyond the border: 0.25, 0.15; 1.0, 0.45; 0.1, 0.2)
    expected = [[4, 4, 3], [4, 4, 3], [0, 0, 1], [0, 0, 1], [5, 5, 2]]
    assert cc.block_rank(m, ["i"], block=2)[0].tolist() == expected
    assert cc.block_rank(m, ["i"])[0].tolist() == [[0] * 3] * 5  # 16 x 16: the whole image is one block
    assert torch.equal(cc.block_rank(m, ["i"], block=1), cc.pixel_rank(m, ["i"]))


@pytest.mark.parametrize("block", [2, 3, 4, 5])
def test_blocks_against_the_oracle(block):
    m = (4 * maps(zeros=0.6)).round() / 4  # coarse, so that whole blocks tie
    count = -(-9 // block) * -(-7 // block)
    for b, found in enumerate(cc.block_rank(m, IDS, 6, block)):
        expected = oracle.block_places(m[b].numpy(), tie_break(IDS, count, 6)[b], block)
        assert (found.numpy() == expected).all() and found.max() == count - 1


@pytest.mark.parametrize("value", [0.0, 0.1, 0.7, 1.0])
def test_a_flat_map_orders_blocks_at_random_even_at_the_border(value):
    """40 x 37 pixels: the mean of a smaller block must not differ from the others' in its last bit."""
    m = torch.full((1, 40, 37), value)
    expected = oracle.block_places(np.zeros((40, 37), np.float32), tie_break(["i"], 9, 0)[0], 16)
    assert (cc.block_rank(m, ["i"])[0].numpy() == expected).all()


def test_tie_fraction():
    m = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[1.0, 1.0], [0.0, 2.0]], [[5.0, 5.0], [5.0, 5.0]]])
    assert cc.tie_fraction(m).tolist() == [0.0, 0.5, 1.0]
    plateaus = maps()
    assert cc.tie_fraction(plateaus).tolist() == pytest.approx([oracle.tied(p) for p in plateaus.numpy()])


# ---------------------------------------------------------------------------------------------------------------- AUC


def test_auc_by_hand():
    assert cc.auc([0.0, 1.0]) == 0.5 and cc.auc([1.0, 1.0, 1.0]) == 1.0
    assert cc.auc([1.0, 0.5, 0.0, 0.0]) == pytest.approx((0.75 + 0.25 + 0.0) / 3)
    assert cc.auc(torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])).tolist() == [0.5, 0.25]
    assert cc.auc(np.full((2, 3, 29), 0.25)).tolist() == [[0.25] * 3] * 2


@quick
@given(hnp.arrays(np.float64, st.integers(2, 40), elements=st.floats(0, 1)))
def test_auc_properties(values):
    found = cc.auc(values)
    assert found == pytest.approx(oracle.auc(values)) and -1e-12 <= found <= 1 + 1e-12
    assert found == pytest.approx(cc.auc(values[::-1])) and found == pytest.approx(
        np.trapezoid(values, dx=1 / (len(values) - 1))
    )


# ---------------------------------------------------------------------------------------------------------- baselines


def test_rise_kernel_against_scipy_by_hand():
    """Blurring a single bright pixel shows the kernel."""
    impulse = torch.zeros(1, 3, 31, 29)
    impulse[0, 1, 15, 14] = 1
    found = cc.blur(impulse)[0]
    kernel = oracle.rise_kernel()
    assert np.abs(found[1, 10:21, 9:20].numpy() - kernel).max() < 1e-7
    assert not found[[0, 2]].any() and found.sum() == pytest.approx(1, abs=1e-6)
    assert kernel.sum() == pytest.approx(1) and kernel.max() / kernel.min() < 1.5  # nearly a box, not a Gaussian


def test_blur_against_the_oracle(x):
    found = cc.blur(x)
    for b in range(3):
        assert np.abs(found[b].numpy() - oracle.blur(x[b].numpy(), oracle.rise_kernel())).max() < 1e-6
    ones = cc.blur(torch.ones(1, 3, 40, 40))[0, 0]
    assert ones[20, 20] == pytest.approx(1) and ones[0, 0] < 0.5  # zeros, which are mean grey, beyond the border


def test_baselines_by_name(x):
    start, end = cc.baselines(x, "rise")
    assert torch.equal(start, cc.blur(x)) and end.shape == x.shape and not end.any()
    for black in cc.baselines(x, "black"):
        assert black.shape == x.shape and torch.equal(black, cc.preprocess(Image.new("RGB", (4, 4)), 1).expand_as(x))
        assert black[0, :, 0, 0].tolist() == pytest.approx([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225])
    twin = images(3, SIZE)
    assert all(torch.equal(t, twin) for t in cc.baselines(x, "twin", twin))
    for name in ("twin", "grey", ""):
        with pytest.raises(ValueError, match="baseline="):
            cc.baselines(x, name)


# ------------------------------------------------------------------------------------------------------- localisation


def square(*corners, size=(12, 16)):
    mask = torch.zeros(len(corners), *size, dtype=torch.bool)
    for k, (top, left, bottom, right) in enumerate(corners):
        mask[k, top:bottom, left:right] = True
    return mask


def peak(*places, size=(12, 16)):
    m = torch.full((len(places), *size), 0.1)
    for k, (row, column) in enumerate(places):
        m[k, row, column] = 1
    return m


def test_pointing_game_by_hand():
    masks = square((2, 3, 5, 6), (2, 3, 5, 6), (2, 3, 5, 6), (2, 3, 5, 6))
    maps = peak((4, 5), (5, 5), (2, 3), (3, 2))  # the lower right corner, one below it, the upper left, one left of it
    assert cc.pointing_game(maps, masks).tolist() == [1.0, 0.0, 1.0, 0.0]
    assert cc.pointing_game(maps, masks, tolerance=1).tolist() == [1.0] * 4


@pytest.mark.parametrize(("tolerance", "hit"), [(4, 0.0), (5, 1.0), (15, 1.0)])
def test_pointing_tolerance_is_the_straight_distance(tolerance, hit):
    masks = square((0, 0, 2, 2))  # nearest pixel (1, 1): 3 down and 4 to the right of it is 5 away
    assert cc.pointing_game(peak((4, 5)), masks, tolerance).tolist() == [hit]


@pytest.mark.parametrize("tolerance", [0, 15, 100])
def test_a_zero_map_is_no_hit(tolerance):
    masks = square((0, 0, 12, 16))  # even where the whole image is the object
    assert cc.pointing_game(torch.zeros(1, 12, 16), masks, tolerance).tolist() == [0.0]
    assert cc.energy_in_mask(torch.zeros(1, 12, 16), masks).tolist() == [0.0]


def test_energy_by_hand():
    maps = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 5.0]]])
    masks = torch.tensor([[[True, False], [False, True]], [[True, True], [True, False]]])
    assert cc.energy_in_mask(maps, masks).tolist() == [0.5, 0.0]
    assert cc.energy_in_mask(torch.full((1, 12, 16), 0.3), square((0, 0, 6, 8))).tolist() == pytest.approx([0.25])


def test_energy_of_a_tiny_or_huge_map():
    for scale in (1e-44, 1e-30, 1e30):
        assert cc.energy_in_mask(scale * torch.ones(1, 2, 2), square((0, 0, 1, 2), size=(2, 2))).tolist() == [0.5]


def test_average_precision_by_hand():
    """Ranked: hit, miss, hit, miss. Precision at the hits 1/1 and 2/3, each brings half of the recall: 5/6."""
    maps = torch.tensor([[[0.9, 0.8], [0.7, 0.1]]])
    masks = torch.tensor([[[True, False], [True, False]]])
    assert cc.average_precision(maps, masks).tolist() == pytest.approx([5 / 6])
    flat = torch.ones(1, 2, 2)  # no ranking: the share of the mask, whichever pixels it has
    assert cc.average_precision(flat, masks).tolist() == cc.average_precision(flat, ~masks).tolist() == [0.5]


@pytest.mark.parametrize("seed", range(4))
def test_localisation_against_the_oracle(seed):
    draw = torch.Generator().manual_seed(seed)
    maps = (8 * torch.rand(5, 9, 7, generator=draw)).round() / 8  # coarse, so that there are ties
    masks = torch.rand(5, 9, 7, generator=draw) < 0.15
    masks[:, 0, 0] |= ~masks.flatten(1).any(1)
    m, t = maps.numpy(), masks.numpy()
    for tolerance in (0, 1, 2):
        expected = [oracle.pointing(a, b, tolerance) for a, b in zip(m, t, strict=True)]
        assert cc.pointing_game(maps, masks, tolerance).tolist() == expected
    pairs = list(zip(m, t, strict=True))
    assert cc.energy_in_mask(maps, masks).tolist() == pytest.approx([oracle.energy(a, b) for a, b in pairs])
    assert cc.average_precision(maps, masks).tolist() == pytest.approx(
        [oracle.average_precision(a, b) for a, b in pairs]
    )


METRICS = [cc.pointing_game, cc.energy_in_mask, cc.average_precision]


@pytest.mark.parametrize("metric", METRICS)
def test_localisation_errors(metric):
    good = square((0, 0, 3, 3), (1, 1, 2, 2))
    empty = square((0, 0, 3, 3), (1, 1, 1, 1))
    with pytest.raises(ValueError, match="at least one mask is empty"):
        metric(peak((0, 0), (0, 0)), empty)
    with pytest.raises(ValueError, match=r"shape \(2, 12, 16\).*\(1, 12, 16\)"):
        metric(peak((0, 0), (0, 0)), good[:1])
    with pytest.raises(ValueError, match="masks must be boolean"):
        metric(peak((0, 0), (0, 0)), good.float())


@pytest.mark.parametrize("metric", METRICS)
def test_localisation_is_image_by_image_and_scale_free(metric):
    maps, masks = torch.rand(4, 9, 7, generator=torch.Generator().manual_seed(1)), torch.ones(4, 9, 7).bool()
    masks[:, 3:] = False
    whole = metric(maps, masks)
    assert whole.shape == (4,)
    assert [float(metric(maps[k : k + 1], masks[k : k + 1])[0]) for k in range(4)] == pytest.approx(whole.tolist())
    assert metric(maps * 0.125, masks).tolist() == pytest.approx(whole.tolist())


def test_the_perfect_map_is_perfect():
    masks = square((2, 3, 5, 6), (0, 0, 1, 1))
    assert all(metric(masks.float(), masks).tolist() == [1.0, 1.0] for metric in METRICS)
