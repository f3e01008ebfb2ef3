"""IoU, boxes, ties of the pointing game, change of confidence and RISE, against the oracle and by hand."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from nets import images, state, tiny
from torch import nn

import cam_core as cc

SIZE = (9, 7)
IDS = ["one", "two", "three", "four", "five"]
quick = settings(max_examples=40, derandomize=True, deadline=None)
coarse = hnp.arrays(np.float32, (2, 6, 8), elements=st.sampled_from([0.0, 0.25, 0.5, 0.75, 3.0]))
EVERY = [
    cc.pointing_game,
    cc.energy_in_mask,
    cc.average_precision,
    lambda maps, masks: cc.iou(maps, masks, 0.5),
    cc.best_threshold,
]


def plain(net):
    """The model as the oracle wants it."""

    def call(image):
        with torch.no_grad():
            return net(torch.from_numpy(image)[None])[0].numpy()

    return call


def strong(seed=2):
    """With a classifier that a changed image changes."""
    net = tiny(seed)
    net[9].weight.data *= 4
    net[11].weight.data *= 4
    return net


def random_maps(count=5, size=SIZE, seed=0):
    """With a plateau of zeros and a maximum that is not 1."""
    m = torch.rand(count, *size, generator=torch.Generator().manual_seed(seed))
    return torch.where(m < 0.3, 0.0, 0.9 * m)


def box_mask(x0, y0, x1, y1, size=(12, 16)):
    mask = torch.zeros(1, *size, dtype=torch.bool)
    mask[0, y0:y1, x0:x1] = True
    return mask


# ------------------------------------------------------------------------------------------------- edge cases of masks


@pytest.mark.parametrize("metric", EVERY)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.1])
def test_maps_that_are_not_finite_and_non_negative_are_refused(metric, bad):
    maps, masks = random_maps(2, (12, 16)), box_mask(1, 2, 5, 6).expand(2, -1, -1)
    maps[1, 11, 15] = bad
    with pytest.raises(ValueError, match="finite and non-negative"):
        metric(maps, masks)


@pytest.mark.parametrize("metric", EVERY)
def test_empty_masks_and_other_sizes_are_refused(metric):
    maps, masks = random_maps(2, (12, 16)), box_mask(1, 2, 5, 6).repeat(2, 1, 1)
    with pytest.raises(ValueError, match="shape"):
        metric(maps, masks[:, :-1])
    with pytest.raises(ValueError, match="shape"):
        metric(maps, masks[:1])
    masks[1] = False
    with pytest.raises(ValueError, match="at least one mask is empty"):
        metric(maps, masks)


def test_zero_and_constant_maps():
    """A zero map finds nothing; a constant one gets what chance gives, wherever the mask lies."""
    for mask in (box_mask(0, 0, 4, 6), box_mask(12, 6, 16, 12)):
        zero, flat, share = torch.zeros(1, 12, 16), torch.full((1, 12, 16), 0.3), pytest.approx([24 / 192])
        assert cc.pointing_game(zero, mask).tolist() == cc.iou(zero, mask, 0.05).tolist() == [0.0]
        assert cc.energy_in_mask(zero, mask).tolist() == [0.0]
        assert cc.average_precision(zero, mask).tolist() == cc.average_precision(flat, mask).tolist() == share
        assert cc.pointing_game(flat, mask).tolist() == share
        assert cc.energy_in_mask(flat, mask).tolist() == share and cc.iou(flat, mask, 0.5).tolist() == share


def test_a_shared_maximum_hits_in_part():
    maps = torch.full((1, 12, 16), 0.2)
    maps[0, 0, :4] = 0.9
    assert cc.pointing_game(maps, box_mask(0, 0, 1, 3)).tolist() == [0.25]  # the first of four
    assert cc.pointing_game(maps, box_mask(1, 0, 4, 1)).tolist() == [0.75]  # all but the first
    assert cc.pointing_game(maps, box_mask(6, 0, 7, 1), tolerance=4).tolist() == [0.5]  # 6, 5, 4, 3 pixels away
    maps[0, 11, 15] = 0.9001
    assert cc.pointing_game(maps, box_mask(0, 0, 4, 1)).tolist() == [0.0]


# -------------------------------------------------------------------------------------------------- IoU and thresholds


def test_iou_by_hand():
    maps = torch.tensor([[[0.8, 0.4], [0.39, 0.2]]])
    masks = torch.tensor([[[True, False], [True, False]]])
    assert cc.iou(maps, masks, 0.5).tolist() == pytest.approx([1 / 3])  # 0.4 is half of 0.8, 0.39 is not
    assert cc.iou(maps, masks, 1).tolist() == [0.5]
    assert cc.iou(maps, masks, 0.25).tolist() == [0.5]  # min-max would leave out 0.2
    for threshold in (0, -0.1, 1.01, float("nan")):
        with pytest.raises(ValueError, match="threshold="):
            cc.iou(maps, masks, threshold)


@quick
@given(coarse, st.integers(0, 2**48 - 1), st.sampled_from(cc.THRESHOLDS))
def test_iou_equals_the_oracle(values, bits, threshold):
    masks = np.array([bits >> k & 1 for k in range(48)], bool).reshape(1, 6, 8).repeat(2, 0)
    masks[1] = ~masks[0]
    masks[:, 2, 3] = True
    found = cc.iou(torch.from_numpy(values), torch.from_numpy(masks), threshold)
    expected = [oracle.iou(m, t, threshold) for m, t in zip(values, masks, strict=True)]
    assert found.tolist() == pytest.approx(expected)


def test_best_threshold_has_the_highest_mean_iou_and_is_the_lowest_of_equals():
    maps = torch.zeros(2, 12, 16)
    maps[:, 2:6, 1:5], maps[:, 0, 0], maps[:, 8, 8] = 0.7, 1.0, 0.32
    masks = box_mask(1, 2, 5, 6).repeat(2, 1, 1)
    assert cc.THRESHOLDS == pytest.approx(np.arange(0.05, 0.951, 0.05))
    assert cc.best_threshold(maps, masks) == pytest.approx(0.35)  # 0.35 to 0.70 give the same
    assert cc.best_threshold(maps, masks, [0.9, 0.7, 0.5]) == 0.7  # the first of equals
    assert cc.best_threshold(3 * maps, masks) == pytest.approx(0.35)
    one = box_mask(0, 0, 1, 1)
    assert cc.best_threshold(maps[:1], one) == pytest.approx(0.75)
    part = torch.cat([one, box_mask(1, 2, 5, 5)])  # 0.35: (1/17 + 12/16) / 2, and 0.75: (1 + 0) / 2
    assert cc.best_threshold(maps, part) == pytest.approx(0.75)


# --------------------------------------------------------------------------------------------------------------- boxes


def test_box_iou_by_hand():
    maps = torch.zeros(1, 12, 16)
    maps[0, 2:6, 1:5], maps[0, 9, 15], maps[0, 6, 5] = 0.6, 1.0, 0.6  # 16 pixels, one hanging on by its corner, a peak
    assert cc.box_iou(maps, [[[1, 2, 6, 7]]], 0.5).tolist() == [1.0]
    assert cc.box_iou(maps, [[[1, 2, 5, 6]]], 0.5).tolist() == pytest.approx([16 / 25])
    assert cc.box_iou(maps, [[[2, 3, 7, 8]]], 0.5).tolist() == pytest.approx([16 / (25 + 25 - 16)])
    assert cc.box_iou(maps, [[[8, 8, 10, 12], [1, 2, 6, 7]]], 0.5).tolist() == [1.0]  # the better box
    assert cc.box_iou(maps, [[[6, 2, 10, 7]]], 0.5).tolist() == [0.0]  # side by side
    assert cc.box_iou(maps, [[[9, 9, 16, 12]]], 0.5).tolist() == [0.0]  # apart in both directions
    assert cc.box_iou(maps, [[[15, 9, 16, 10]]], 0.7).tolist() == [1.0]  # only the peak reaches 0.7
    assert cc.box_iou(0 * maps, [[[0, 0, 16, 12]]], 0.05).tolist() == [0.0]
    assert cc.box_iou(0 * maps + 0.2, [[[0, 0, 16, 12]]], 0.95).tolist() == [1.0]


def test_of_equally_large_regions_the_first_counts():
    for width in (16, 17):
        maps = torch.zeros(1, 13, width)
        maps[0, 1:3, 9:11] = maps[0, 2:4, 2:4] = maps[0, 8:10, 0:2] = 1
        assert cc.box_iou(maps, [[[9, 1, 11, 3]]], 0.5).tolist() == [1.0]


@quick
@given(coarse, st.sampled_from(cc.THRESHOLDS), st.data())
def test_box_iou_equals_the_oracle(values, threshold, data):
    def box():
        x0, y0 = data.draw(st.integers(0, 7)), data.draw(st.integers(0, 5))
        return [x0, y0, data.draw(st.integers(x0 + 1, 8)), data.draw(st.integers(y0 + 1, 6))]

    boxes = [[box()], [box(), box()]]
    found = cc.box_iou(torch.from_numpy(values), boxes, threshold)
    assert found.tolist() == pytest.approx(
        [oracle.box_iou(m, b, threshold) for m, b in zip(values, boxes, strict=True)]
    )


@pytest.mark.parametrize("box", [[], [[3, 3, 3, 5]], [[0, 0, 17, 5]], [[0, 0, 5, 13]], [[-1, 0, 5, 5]], [[5, 5, 2, 2]]])
def test_boxes_without_area_or_beyond_the_map_are_refused(box):
    with pytest.raises(ValueError, match="boxes="):
        cc.box_iou(torch.ones(1, 12, 16), [box], 0.5)


def test_box_errors():
    with pytest.raises(ValueError, match="1 entries for 2 maps"):
        cc.box_iou(torch.ones(2, 12, 16), [[[0, 0, 1, 1]]], 0.5)
    with pytest.raises(ValueError, match="finite"):
        cc.box_iou(torch.full((1, 12, 16), torch.nan), [[[0, 0, 1, 1]]], 0.5)
    with pytest.raises(ValueError, match="threshold="):
        cc.box_iou(torch.ones(1, 12, 16), [[[0, 0, 1, 1]]], 0)


# ----------------------------------------------------------------------------------------------- change of confidence


def clean_of(net, x, target):
    return cc.probabilities(net, x).gather(1, target[:, None])[:, 0]


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_change_of_confidence_equals_the_oracle(batch_size):
    net, x, maps = strong(), 2 * images(5, SIZE, seed=1), random_maps()
    seen = []
    for target in (torch.tensor([0, 3, 1, 2, 0]), torch.tensor([1, 1, 2, 3, 3])):
        before = state(net), x.clone(), maps.clone()
        found = cc.confidence_change(net, x, maps, target, clean_of(net, x, target), batch_size)
        assert before[0] == state(net) and torch.equal(before[1], x) and torch.equal(before[2], maps)
        for b in range(5):
            expected = oracle.confidence(plain(net), x[b].numpy(), maps[b].numpy(), int(target[b]))
            assert [found[k][b] for k in ("drop", "increase", "gain")] == pytest.approx(expected, abs=1e-5)
            seen.append(expected)
    assert {e[1] for e in seen} == {0.0, 1.0}  # both happened, and neither drop nor gain is its plain difference
    assert max(e[0] for e in seen) > 0.1 and max(e[2] for e in seen) > 0.1


def test_change_of_confidence_by_hand():
    """A network whose probability is a known function of the mean: Y = 0.8, O = 0.5 and the reverse."""

    class Mean(nn.Module):
        def forward(self, x):
            return torch.stack([x.mean((1, 2, 3)), torch.zeros(len(x))], 1)

    level = float(np.log(4))
    x, zero = torch.full((2, 3, 4, 4), level), torch.zeros(2, 4, 4)
    found = cc.confidence_change(Mean(), x, zero, [0, 1], torch.tensor([0.8, 0.2]))
    assert found["drop"].tolist() == pytest.approx([0.3 / 0.8, 0]) and found["increase"].tolist() == [0, 1]
    assert found["gain"].tolist() == pytest.approx([0, 0.3 / 0.8])


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_map_of_ones_changes_nothing(precision):
    """Not even where the clean probabilities come from other batches, or from another precision."""
    net, x = strong(), 2 * images(5, SIZE, seed=1)
    for wobble in (0, 5e-7, -5e-7) if precision == "float32" else (0, 0.01, -0.01):
        clean = clean_of(net, x, torch.zeros(5, dtype=torch.long)) + wobble
        found = cc.confidence_change(net, x, torch.ones(5, *SIZE), 0, clean, 2, precision)
        assert not any(v.any() for v in found.values())
    barely = torch.full((5, *SIZE), 1 - 1e-7)  # not the same image, but no difference either
    assert not any(
        v.any() for v in cc.confidence_change(net, x, barely, 0, clean_of(net, x, torch.zeros(5).long())).values()
    )


def test_certain_and_impossible_classes_have_no_division_by_zero():
    x = images(2, SIZE)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 63, 2))
    net[1].weight.data.zero_()
    for bias, clean in (([200.0, 0.0], [1.0, 1.0]), ([0.0, 200.0], [0.0, 0.0])):
        net[1].bias.data = torch.tensor(bias)
        found = cc.confidence_change(net, x, torch.zeros(2, *SIZE), 0, np.array(clean))
        assert not any(v.any() for v in found.values())
    found = cc.confidence_change(net, x, torch.zeros(2, *SIZE), 1, np.array([0.25, 1.0]))
    assert found["gain"].tolist() == [1.0, 0.0] and found["increase"].tolist() == [1.0, 0.0]


def test_change_of_confidence_errors():
    net, x, clean = tiny(), images(2, SIZE), np.array([0.5, 0.5])
    for maps in (
        torch.ones(2, 9, 8),
        torch.ones(1, *SIZE),
        torch.full((2, *SIZE), 1.1),
        torch.full((2, *SIZE), torch.nan),
    ):
        with pytest.raises(ValueError, match="maps must have shape"):
            cc.confidence_change(net, x, maps, 0, clean)
    for bad in (np.array([0.5]), np.array([0.5, 1.5]), np.array([[0.5], [0.5]]), np.array([0.5, np.nan])):
        with pytest.raises(ValueError, match="clean must be 2 probabilities"):
            cc.confidence_change(net, x, torch.ones(2, *SIZE), 0, bad)


# ---------------------------------------------------------------------------------------------------------------- RISE


def drawn(image_id, masks, cells, keep, seed, size):
    """The grids and shifts of an image, in the order in which they are drawn."""
    draw = cc._generator(seed, image_id, 3)
    grids = (draw.random((masks, cells, cells)) < keep).astype(float)
    return grids, draw.integers(0, [-(-side // cells) + 1 for side in size], (masks, 2))


@pytest.mark.parametrize("cells", [1, 3, 4])  # 3 divides 9, 4 divides nothing
def test_rise_equals_the_oracle(cells):
    net, x, target = strong(), 2 * images(2, SIZE, seed=1), [1, 3]
    found = cc.rise(net, x, target, IDS[:2], masks=10, cells=cells, keep=0.3, seed=5, batch_size=4)
    for b in range(2):
        grids, shifts = drawn(IDS[b], 10, cells, 0.3, 5, SIZE)
        masks = [oracle.rise_mask(g, s, *SIZE) for g, s in zip(grids, shifts, strict=True)]
        made = cc._rise_masks(torch.from_numpy(grids).float(), shifts.tolist(), SIZE).numpy()
        assert np.abs(made - masks).max() < 1e-6
        expected = oracle.rise(plain(net), x[b].numpy(), target[b], masks, 0.3)
        assert np.abs(found[b].numpy() - expected).max() < 1e-5
        assert found[b].max() == 1 and (cells == 1 or np.ptp(expected) > 0.1)


def test_every_shift_of_a_mask_fits_and_all_are_drawn():
    for size, cells in (((224, 224), 7), ((9, 7), 4), ((5, 30), 7)):
        grids, shifts = drawn("i", 4000, cells, 0.5, 0, size)
        assert shifts.min(0).tolist() == [0, 0] and shifts.max(0).tolist() == [-(-s // cells) for s in size]
        corners = torch.from_numpy(grids[:2]).float(), [shifts.min(0).tolist(), shifts.max(0).tolist()]
        masks = cc._rise_masks(*corners, size)
        assert masks.shape == (2, *size) and 0 <= masks.min() and masks.max() <= 1


class Quadrant(nn.Module):
    """Its probability of class 0 grows with the brightness of the lower left quadrant and of nothing else."""

    def forward(self, x):
        return torch.stack([10 * x[:, :, 8:, :8].mean((1, 2, 3)), 5 * torch.ones(len(x))], 1)


def test_rise_finds_what_the_network_looks_at():
    x = torch.ones(1, 3, 16, 16)
    maps = cc.rise(Quadrant(), x, 0, ["i"], masks=1500, cells=4)[0]
    there, others = maps[8:, :8].mean(), [maps[:8, :8].mean(), maps[:8, 8:].mean(), maps[8:, 8:].mean()]
    assert there > max(others) + 0.1 and max(others) - min(others) < 0.04
    opposite = cc.rise(Quadrant(), x, 1, ["i"], masks=1500, cells=4)[0]  # what the other class needs is elsewhere
    assert opposite[8:, :8].mean() < opposite[:8, 8:].mean() - 0.1


def test_rise_depends_on_seed_and_id_alone():
    net, x = strong(), 2 * images(3, SIZE, seed=1)
    before, told = state(net), []
    together = cc.rise(net, x, [0, 1, 2], IDS[:3], masks=13, cells=3, batch_size=4, progress=told.append)
    assert state(net) == before and told == [4, 4, 4, 1] * 3
    alone = cc.rise(net, x[[2]], 2, IDS[2:3], masks=13, cells=3, batch_size=100)
    assert torch.allclose(alone[0], together[2], atol=1e-6)
    for other in (dict(ids=["other"]), dict(ids=IDS[2:3], seed=1)):
        assert not torch.allclose(cc.rise(net, x[[2]], 2, masks=13, cells=3, **other)[0], together[2], atol=1e-2)


def test_rise_errors():
    net, x = tiny(), images(2, SIZE)
    for bad in (dict(masks=0), dict(cells=0), dict(keep=0), dict(keep=1.5), dict(ids=["one"])):
        with pytest.raises(ValueError, match="masks=.*cells=.*keep=.*ids"):
            cc.rise(net, x, 0, **{"ids": IDS[:2], "masks": 3, **bad})
    with pytest.raises(ValueError, match="target=.*out of range"):
        cc.rise(net, x, 4, IDS[:2], masks=3)
