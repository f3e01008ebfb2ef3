"""Insertion, deletion, change of confidence and RISE against an oracle that imports only numpy."""

from __future__ import annotations

import functools
import math

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets import images, plateaued, state, strong
from PIL import Image
from torch import nn

import cam_core as cc

SIZE = (9, 7)  # not square, 63 pixels
IDS = ["one", "two", "three"]
CLASSES = torch.tensor([0, 1, 2])


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


def asked_once(counting, x):
    """The network after the few passes with which its head and its batches are looked at, once."""
    cc.probabilities(counting, x[:1].repeat(2, 1, 1, 1))
    assert counting.seen == 1 + 1 + 2 + 2
    counting.seen = 0
    return counting


@pytest.fixture
def net():
    return strong()


@pytest.fixture
def x():
    return 2 * images(3, SIZE, seed=1)


maps = functools.partial(plateaued, SIZE)


def tie_break(ids, count, seed):
    """The permutation in which equal pixels, or blocks, are visited: what a flat map shows."""
    return cc.pixel_rank(torch.zeros(len(ids), 1, count), ids, seed)[:, 0].argsort(1).tolist()


# ---- curves against the oracle


def agree(net, x, start, end, named, target, seed, steps, block=0, **options):
    """faithfulness() and the oracle, image by image, map by map; returns how far curves reach."""
    found = cc.faithfulness(
        net, x, named, target, IDS, start, end, seed=seed, steps=steps, block=block, **options
    )
    height, width = x.shape[2:]
    count = -(-height // block) * -(-width // block) if block else height * width
    ties, reach = tie_break(IDS, count, seed), 0.0
    for name, m in named.items():
        for b in range(len(x)):
            arguments = (m[b].numpy(), ties[b])
            places = oracle.block_places(*arguments, block) if block else oracle.places(*arguments)
            for metric, first, last in (("insertion", start, x), ("deletion", x, end)):
                ends = first[b].numpy(), last[b].numpy()
                expected = oracle.curve(plain(net), *ends, places, int(target[b]), steps)
                curve = found[metric][name][b].numpy()
                assert np.abs(curve - expected).max() < 1e-5, (metric, name, b)
                assert cc.auc(curve) == pytest.approx(oracle.auc(expected), abs=1e-5)
                reach = max(reach, np.ptp(expected))
    return reach


@pytest.mark.parametrize(("name", "steps"), [("rise", 1), ("rise", 4), ("black", 28), ("twin", 63)])
def test_curves_equal_the_oracle(net, x, name, steps):
    """4 and 28 do not divide 63."""
    start, end = cc.baselines(x, name, images(3, SIZE, seed=8))
    target = torch.tensor([0, 3, 1])
    reach = agree(net, x, start, end, {"m": maps()}, target, 4, steps, batch_size=5)
    assert reach > 0.02, "a flat curve would agree with anything"


@pytest.mark.parametrize(("block", "steps", "batch_size"), [(0, 10, 7), (2, 6, 1), (4, 6, 1000)])
def test_several_maps_equal_the_oracle(net, x, block, steps, batch_size):
    """Two of one order, one that agrees with them on one image, and two constant ones."""
    m = maps()
    other = m.flip(1)
    other[1] = m[1]
    named = {"m": m, "scaled": m / 4, "other": other, "flat": torch.ones_like(m), "zero": 0 * m}
    start, end = cc.baselines(x, "rise")
    assert agree(net, x, start, end, named, CLASSES, 1, steps, block, batch_size=batch_size) > 0.02


@given(
    st.integers(0, 10**6),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 20),
    st.integers(1, 9),
)
def test_curves_equal_the_oracle_whatever_coincides(seed, n, m, steps, batch_size):
    """Images in which many pixels of start and end agree; maps of few values."""
    draw = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 2, (n, 3, 4, 5), generator=draw).float()
    end = torch.where(torch.rand(n, 1, 4, 5, generator=draw) < 0.3, 1 - start, start)
    weight = torch.randn(4, 60, generator=draw)

    class Linear(nn.Module):
        def forward(self, x):
            return x.flatten(1) @ weight.T

    values = torch.randint(0, 2, (n, m, 4, 5), generator=draw).float()
    ids = [str(i) for i in range(n)]
    ranks = torch.stack([cc.pixel_rank(values[:, k], ids, seed) for k in range(m)], 1)
    target = torch.randint(0, 4, (n,), generator=draw)
    counting = asked_once(Counting(Linear()), start)
    found = cc.perturbation_curves(counting, start, end, ranks, target, steps, batch_size)
    assert found.shape == (n, m, steps + 1) and found.dtype == torch.float32
    for i in range(n):
        for k in range(m):
            arrays = start[i].numpy(), end[i].numpy(), ranks[i, k].numpy()
            expected = oracle.curve(plain(Linear()), *arrays, int(target[i]), steps)
            assert np.abs(found[i, k].numpy() - expected).max() < 1e-5
    assert counting.seen <= n * (m * (steps - 1) + 2)


# ---- no picture twice


@pytest.mark.parametrize("block", [0, 2])
def test_a_twin_costs_only_the_pictures_that_differ(net, x, block):
    """Six pixels differ, so few of a curve's points are different pictures."""
    twin, steps = x.clone(), 10 if block else 30
    twin[:, :, 2:5, 1:3] = 3 * images(3, (3, 2), seed=8)
    one, other = maps(), torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(5))
    named = {"m": one, "other": other, "m again": 0.5 * one}
    assert agree(net, x, twin, twin, named, CLASSES, 3, steps, block) > 0.02
    counting = asked_once(Counting(net), x)
    cc.faithfulness(counting, x, named, CLASSES, IDS, twin, twin, seed=3, steps=steps, block=block)
    pictures = set()
    for name in ("m", "other"):
        m = named[name]
        rank = cc.block_rank(m, IDS, 3, block) if block else cc.pixel_rank(m, IDS, 3)
        for first, last in ((twin, x), (x, twin)):
            for stop in oracle.group_ends(int(rank.max()) + 1, steps):
                for b, picture in enumerate(torch.where((rank < stop)[:, None], last, first)):
                    pictures.add((b, picture.numpy().tobytes()))
    assert counting.seen == len(pictures) < 2 * 3 * 3 * (steps + 1) / 3


def test_more_steps_score_only_the_points_between(net, x):
    """4 steps, then 8, then 24, which are all points of the same curve; and the clean image."""
    start, end = cc.baselines(x, "rise")
    alone = cc.faithfulness(net, x, {"m": maps()}, CLASSES, IDS, start, end, steps=24)
    counting = asked_once(Counting(net), x)
    known = cc.known_values(x, CLASSES, cc.probabilities(net, x).gather(1, CLASSES[:, None]))
    for steps, seen in ((4, 3 * 2 * 4), (8, 3 * 2 * 8), (24, 3 * 2 * 24)):
        found = cc.faithfulness(
            counting, x, {"m": maps()}, CLASSES, IDS, start, end, steps=steps, known=known
        )
        assert counting.seen == seen
    for metric, curves in found.items():
        assert (curves["m"] - alone[metric]["m"]).abs().max() < 1e-6


def test_insertion_and_deletion_of_opposite_orders_are_the_same_pictures(net, x):
    m = maps() + torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(5)) / 100
    both = {"m": m, "reversed": 1 - m}
    counting = asked_once(Counting(net), x)
    found = cc.faithfulness(counting, x, both, CLASSES, IDS, 0 * x, 0 * x, steps=9)
    assert counting.seen == 3 * 2 * 8 + 3 + 3  # grey is asked for three classes
    backwards = found["deletion"]["reversed"].flip(1)
    assert (found["insertion"]["m"] - backwards).abs().max() < 1e-6


@given(st.integers(0, 10**6), st.integers(1, 6))
def test_codes_on_the_way_are_those_of_the_pictures(seed, steps):
    """Also with pixels that agree, negative zeros and values that differ in their last bit."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.tensor([0.0, -0.0, 1.0, np.nextafter(np.float32(1), np.float32(2)), -2.5])
    start, end = (values[torch.randint(0, 5, (2, 3, 3, 4), generator=draw)] for _ in range(2))
    replaced_at = torch.randint(1, steps + 1, (2, 2, 3, 4), generator=draw)
    codes = cc._codes_on_the_way(start, end, replaced_at, steps)
    by_content = {}
    for i, k, point in np.ndindex(2, 2, steps + 1):
        picture = torch.where(replaced_at[i, k] <= point, end[i], start[i])
        assert codes[i, k, point] == cc.picture_codes(picture[None])[0]
        by_content.setdefault((picture + 0.0).numpy().tobytes(), set()).add(int(codes[i, k, point]))
    assert len({code for codes in by_content.values() for code in codes}) == len(by_content)


def test_where_start_and_end_agree_one_picture_is_enough(net, x):
    counting = asked_once(Counting(net), x)
    found = cc.faithfulness(counting, x, {"m": maps()}, CLASSES, IDS, x.clone(), x.clone(), steps=9)
    assert counting.seen == 3
    p = cc.probabilities(net, x).gather(1, CLASSES[:, None])
    for curves in found.values():
        assert torch.allclose(curves["m"], p.expand(-1, 10), atol=1e-6)


def test_one_channel_that_differs_is_a_difference(net, x):
    twin = x.clone()
    twin[:, 2, 3:6, 2:5] += 4
    assert agree(net, x, twin, twin, {"m": maps()}, CLASSES, 0, 21) > 0.01


def test_the_largest_attribution_goes_first():
    """A model that looks at one pixel: its score falls in the first step, or in the last."""

    class Looks(nn.Module):
        def forward(self, x):
            return torch.stack([x[:, 0, 4, 5] * 10, torch.zeros(len(x))], 1)

    x, grey = torch.ones(1, 3, 6, 8), torch.zeros(1, 3, 6, 8)
    at = torch.zeros(1, 6, 8)
    at[0, 4, 5] = 1
    named = {"at": at, "not": 1 - at}
    found = cc.faithfulness(Looks(), x, named, torch.tensor([0]), ["i"], grey, grey, steps=48)
    high, low = 1 / (1 + math.exp(-10)), 0.5
    assert found["deletion"]["at"][0].tolist() == pytest.approx([high] + [low] * 48)
    assert found["insertion"]["at"][0].tolist() == pytest.approx([low] + [high] * 48)
    assert found["deletion"]["not"][0].tolist() == pytest.approx([high] * 48 + [low])


def test_grouping_of_images_changes_nothing_and_nothing_is_altered(net, x):
    start, end = cc.baselines(x, "rise")
    named = {"m": maps(), "flat": torch.ones(3, *SIZE)}
    given_tensors = (x, start, end, named["m"])
    before = [t.clone() for t in given_tensors], state(net.train())
    together = cc.faithfulness(net, x, named, CLASSES, IDS, start, end, seed=3, steps=9)
    pick = [2, 0]
    part = {name: m[pick] for name, m in named.items()}
    arguments = (part, CLASSES[pick], [IDS[k] for k in pick], start[pick], end[pick])
    alone = cc.faithfulness(net, x[pick], *arguments, seed=3, steps=9)
    for metric, curves in together.items():
        for name, curve in curves.items():
            assert torch.allclose(alone[metric][name], curve[pick], atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(before[0], given_tensors, strict=True))
    assert state(net) == before[1]  # in train mode, and its statistics are what they were


@pytest.mark.parametrize(("steps", "block"), [(0, 0), (64, 0), (7, 4)])
def test_steps_outside_are_refused(net, x, steps, block):
    """63 pixels; 3 x 2 blocks of 4 x 4."""
    with pytest.raises(ValueError, match=f"steps={steps} .* {6 if block else 63}"):
        cc.faithfulness(net, x, {"m": maps()}, CLASSES, IDS, x, x, steps=steps, block=block)


# ---- probabilities


def test_probabilities_are_the_softmax_and_bf16_differs_but_little(net, x):
    exact, rough = (cc.probabilities(net, x, 2, p) for p in ("float32", "bf16"))
    expected = np.stack([oracle.softmax(plain(net)(image)) for image in x.numpy()])
    assert exact.dtype == rough.dtype == torch.float32
    assert np.abs(exact.numpy() - expected).max() < 1e-6
    assert not torch.equal(rough, exact) and torch.allclose(rough, exact, atol=0.03)
    assert torch.allclose(rough.sum(1), torch.ones(3), atol=1e-6)  # the softmax is taken in float32
    with pytest.raises(ValueError, match="precision='fp16'"):
        cc.probabilities(net, x, precision="fp16")


# ---- the order of pixels and blocks; more in test_properties.py


def test_places_by_hand():
    m = torch.tensor([[[0.1, 0.9], [0.5, 0.3]]])
    assert cc.pixel_rank(m, ["i"]).tolist() == [[[3, 0], [1, 2]]]


def test_ties_follow_one_permutation_for_every_method():
    """A flat map is visited in the image's own order; one with plateaus keeps it within each."""
    flat = torch.ones(3, *SIZE)
    shuffled = cc.pixel_rank(flat, IDS, seed=2)
    assert torch.equal(shuffled, cc.pixel_rank(0 * flat, IDS, seed=2))
    assert len({tuple(ranks) for ranks in shuffled.flatten(1).tolist()}) == 3
    assert not torch.equal(shuffled, cc.pixel_rank(flat, IDS, seed=3))
    assert not torch.equal(shuffled, cc.pixel_rank(flat, ["other", *IDS[1:]], seed=2))
    steps = (4 * maps(zeros=0.5)).round()
    for b, found in enumerate(cc.pixel_rank(steps, IDS, seed=2)):
        ties = shuffled[b].flatten().argsort().tolist()
        assert (found.numpy() == oracle.places(steps[b].numpy(), ties)).all()


def test_a_random_order_is_spread_over_the_image():
    """Without shuffling the first half of a flat map's order would be its upper half."""
    rows = (cc.pixel_rank(torch.zeros(1, 40, 40), ["i"])[0] < 800).nonzero()[:, 0]
    assert 17 < rows.float().mean() < 22 and len(rows.unique()) == 40


def test_blocks_by_hand():
    """5 x 3 pixels in 2 x 2 blocks; the last blocks are one pixel wide or high.

    Means 0.25, 0.3; 1.0, 0.9; 0.2, 0.8. With zeros beyond the border they would be others.
    """
    rows = [[1.0, 0.0, 0.5], [0.0, 0.0, 0.1], [0.0, 0.0, 0.9], [0.0, 4.0, 0.9], [0.2, 0.2, 0.8]]
    m = torch.tensor([rows])
    expected = [[4, 4, 3], [4, 4, 3], [0, 0, 1], [0, 0, 1], [5, 5, 2]]
    assert cc.block_rank(m, ["i"], block=2)[0].tolist() == expected
    assert cc.block_rank(m, ["i"])[0].tolist() == [[0] * 3] * 5  # 16 x 16: one block
    assert torch.equal(cc.block_rank(m, ["i"], block=1), cc.pixel_rank(m, ["i"]))


@pytest.mark.parametrize("value", [0.1, 0.7])
def test_a_flat_map_orders_blocks_at_random_even_at_the_border(value):
    """The mean of a smaller block must not differ from the others' in its last bit."""
    m = torch.full((1, 40, 37), value)
    expected = oracle.block_places(np.zeros((40, 37), np.float32), tie_break(["i"], 9, 0)[0], 16)
    assert (cc.block_rank(m, ["i"])[0].numpy() == expected).all()


def test_the_share_of_ties():
    m = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[1.0, 1.0], [0.0, 2.0]]])
    assert cc.tie_fraction(m).tolist() == [0.0, 0.5]
    expected = [oracle.tied(p) for p in maps().numpy()]
    assert cc.tie_fraction(maps()).tolist() == pytest.approx(expected)


# ---- areas and baselines


def test_areas_by_hand():
    assert cc.auc([1.0, 0.5, 0.0, 0.0]) == pytest.approx((0.75 + 0.25 + 0.0) / 3)
    assert cc.auc(torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])).tolist() == [0.5, 0.25]


def test_the_blurred_image_is_that_of_rise(x):
    for image, blurred in zip(x.numpy(), cc.blur(x).numpy(), strict=True):
        assert np.abs(blurred - oracle.blur(image, oracle.rise_kernel())).max() < 1e-6


def test_baselines_by_name(x):
    start, end = cc.baselines(x, "rise")
    assert torch.equal(start, cc.blur(x)) and end.shape == x.shape and not end.any()
    black_picture = cc.networks.preprocess(Image.new("RGB", (4, 4)), 1)
    for black in cc.baselines(x, "black"):
        assert torch.equal(black, black_picture.expand_as(x))
    twin = images(3, SIZE)
    assert all(torch.equal(t, twin) for t in cc.baselines(x, "twin", twin))
    for name in ("twin", "grey"):
        with pytest.raises(ValueError, match=f"baseline='{name}'"):
            cc.baselines(x, name)


# ---- change of confidence


def clean_of(net, x, target):
    return cc.probabilities(net, x).gather(1, target[:, None])[:, 0]


def test_change_of_confidence_equals_the_oracle(net):
    x, seen = 2 * images(5, SIZE, seed=1), []
    m = cc.normalise(torch.cat([maps(), maps(1)[:2]]))
    before = state(net)
    for target in (torch.tensor([0, 3, 1, 2, 0]), torch.tensor([1, 1, 2, 3, 3])):
        found = cc.confidence_change(net, x, m, target, clean_of(net, x, target), 2)
        for b in range(5):
            arguments = x[b].numpy(), m[b].numpy(), int(target[b])
            expected = oracle.confidence(plain(net), *arguments)
            values = [found[kind][b] for kind in ("drop", "increase", "gain")]
            assert values == pytest.approx(expected, abs=1e-5)
            seen.append(expected)
    assert state(net) == before
    assert {e[1] for e in seen} == {0.0, 1.0} and max(e[0] for e in seen) > 0.1


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_map_of_ones_changes_nothing(net, x, precision):
    """Not even where the clean probabilities come from other batches, or from another precision."""
    target = torch.zeros(3, dtype=torch.long)
    for wobble in (0, 5e-7, -5e-7) if precision == "float32" else (0, 0.01, -0.01):
        clean = clean_of(net, x, target) + wobble
        found = cc.confidence_change(net, x, torch.ones(3, *SIZE), 0, clean, 2, precision)
        assert not any(v.any() for v in found.values())


def test_certain_and_impossible_classes_have_no_division_by_zero():
    x, zero = images(2, SIZE), torch.zeros(2, *SIZE)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 63, 2))
    net[1].weight.data.zero_()
    for bias, clean in (([200.0, 0.0], [1.0, 1.0]), ([0.0, 200.0], [0.0, 0.0])):
        net[1].bias.data = torch.tensor(bias)
        found = cc.confidence_change(net, x, zero, 0, np.array(clean))
        assert not any(v.any() for v in found.values())
    found = cc.confidence_change(net, x, zero, 1, np.array([0.25, 1.0]))
    assert found["gain"].tolist() == found["increase"].tolist() == [1.0, 0.0]


def test_wrong_arguments_of_confidence_change(net):
    x, right, clean = images(2, SIZE), torch.ones(2, *SIZE), np.array([0.5, 0.5])
    for wrong in (torch.ones(2, 9, 8), torch.ones(1, *SIZE), 1.1 * right, torch.nan * right):
        with pytest.raises(ValueError, match="maps must"):
            cc.confidence_change(net, x, wrong, 0, clean)
    for wrong in (clean[:1], np.array([0.5, 1.5]), clean[:, None], np.array([0.5, np.nan])):
        with pytest.raises(ValueError, match="clean must"):
            cc.confidence_change(net, x, right, 0, wrong)


# ---- RISE


class Recording(nn.Module):
    """Keeps the pictures that it is shown. For a picture of ones they are the masks."""

    def __init__(self, net):
        super().__init__()
        self.net, self.shown = net, []

    def forward(self, x):
        self.shown += [picture.numpy().copy() for picture in x.detach()]
        return self.net(x)


def grid_of(mask, cells=7):
    """The grid and the shift that a mask was made from, by least squares; None without any."""
    height, width = mask.shape
    tall, wide = -(-height // cells), -(-width // cells)
    down, right = (oracle.weights((cells + 1) * cell, cells) for cell in (tall, wide))
    for y in range(tall + 1):
        for x in range(wide + 1):
            rows, columns = down[y : y + height], right[x : x + width]
            grid = (np.linalg.pinv(rows) @ mask @ np.linalg.pinv(columns).T).round()
            fits = np.abs(rows @ grid @ columns.T - mask).max() < 1e-5
            if fits and set(np.unique(grid)) <= {0, 1}:
                return grid, (y, x)
    return None


def test_rise_equals_the_oracle_and_its_masks_are_those_of_the_paper(net):
    """Section 3.2: grids of 7 x 7 zeros and ones, enlarged bilinearly and cut at a random shift."""
    size, ids, count = (21, 14), ["a", "b"], 40
    recording = Recording(net)
    cc.probabilities(recording, torch.ones(2, 3, *size))  # what is asked once of every network
    recording.shown.clear()
    cc.rise(recording, torch.ones(2, 3, *size), 0, ids, masks=count, seed=5, batch_size=16)
    masks = np.array(recording.shown)[:, 0].reshape(2, count, *size)
    found = [grid_of(mask) for mask in masks.reshape(-1, *size)]
    assert None not in found
    assert 0.4 < np.mean([grid for grid, _ in found]) < 0.6
    assert {shift for _, shift in found} >= {(0, 0), (3, 2)} and len({s for _, s in found}) == 4 * 3
    assert not np.allclose(masks[0], masks[1])  # every image has its own

    x, target = 2 * images(2, size, seed=1), [1, 3]
    maps = cc.rise(net, x, target, ids, masks=count, seed=5, batch_size=7)
    for b in range(2):
        expected = oracle.rise(plain(net), x[b].numpy(), target[b], masks[b], 0.5)
        assert np.abs(maps[b].numpy() - expected).max() < 1e-5 and np.ptp(expected) > 0.1


def test_rise_finds_what_the_network_looks_at():
    class Quadrant(nn.Module):
        def forward(self, x):
            return torch.stack([10 * x[:, :, 8:, :8].mean((1, 2, 3)), 5 * torch.ones(len(x))], 1)

    m = cc.rise(Quadrant(), torch.ones(1, 3, 16, 16), 0, ["i"], masks=600, batch_size=100)[0]
    there, others = m[8:, :8].mean(), [m[:8, :8].mean(), m[:8, 8:].mean(), m[8:, 8:].mean()]
    assert there > max(others) + 0.1 and max(others) - min(others) < 0.1


def test_rise_depends_on_seed_and_id_alone(net, x):
    before = state(net)
    together = cc.rise(net, x, [0, 1, 2], IDS, masks=13, batch_size=4)
    assert state(net) == before
    alone = cc.rise(net, x[[2]], 2, ["three"], masks=13, batch_size=100)
    assert torch.allclose(alone[0], together[2], atol=1e-6)
    for ids, seed in ((["other"], 0), (["three"], 1)):
        other = cc.rise(net, x[[2]], 2, ids, masks=13, seed=seed)
        assert not torch.allclose(other[0], together[2], atol=1e-2)


def test_wrong_arguments_of_rise(net, x):
    with pytest.raises(ValueError, match="masks=0"):
        cc.rise(net, x, 0, IDS, masks=0)
    with pytest.raises(ValueError, match="1 ids for 3 images"):
        cc.rise(net, x, 0, IDS[:1], masks=3)
    with pytest.raises(ValueError, match="target=4 is out of range"):
        cc.rise(net, x, 4, IDS, masks=3)


# ---- few points


def test_few_points_lie_early_and_nest():
    assert cc.few_points(28, 5) == [0, 1, 2, 4, 7, 14, 28]
    for steps in (1, 2, 6, 28, 224):
        few, more = cc.few_points(steps, 5), cc.few_points(steps, 10)
        assert set(few) <= set(more) and few[0] == 0 and few[-1] == steps
        assert few == sorted(set(few))


def test_the_area_under_few_points_by_hand():
    assert cc.auc([1.0, 0.0, 0.0], [0, 1, 4]) == pytest.approx(0.125)
    line = np.linspace(1, 0, 29)
    points = cc.few_points(28, 5)
    assert cc.auc(line[points], points) == pytest.approx(0.5)
