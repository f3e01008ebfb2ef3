"""Pointing game, energy, average precision, IoU of masks and boxes: by hand and by the oracle.

What holds for any maps, and which arguments are refused, is in test_properties.py.
"""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import cam_core as cc

coarse = hnp.arrays(np.float32, (2, 6, 8), elements=st.sampled_from([0.0, 0.25, 0.5, 0.75, 3.0]))
thresholds = st.sampled_from(cc.THRESHOLDS)


def box_mask(x0, y0, x1, y1, size=(12, 16)):
    mask = torch.zeros(1, *size, dtype=torch.bool)
    mask[0, y0:y1, x0:x1] = True
    return mask


def peak(row, column, size=(12, 16)):
    m = torch.full((1, *size), 0.1)
    m[0, row, column] = 1
    return m


@given(coarse, st.integers(0, 2**48 - 1), thresholds, st.sampled_from([0, 1, 2]))
def test_measures_equal_the_oracle(values, bits, threshold, tolerance):
    masks = np.array([bits >> k & 1 for k in range(48)], bool).reshape(1, 6, 8).repeat(2, 0)
    masks[1] = ~masks[0]
    masks[:, 2, 3] = True
    maps, truth = torch.from_numpy(values), torch.from_numpy(masks)
    pairs = list(zip(values, masks, strict=True))
    expected = [oracle.pointing(m, t, tolerance) for m, t in pairs]
    assert cc.pointing_game(maps, truth, tolerance).tolist() == pytest.approx(expected)
    expected = [oracle.energy(m, t) for m, t in pairs]
    assert cc.energy_in_mask(maps, truth).tolist() == pytest.approx(expected)
    expected = [oracle.average_precision(m, t) for m, t in pairs]
    assert cc.average_precision(maps, truth).tolist() == pytest.approx(expected)
    expected = [oracle.iou(m, t, threshold) for m, t in pairs]
    assert cc.iou(maps, truth, threshold).tolist() == pytest.approx(expected)


def test_zero_and_constant_maps_and_the_mask_itself():
    """A zero map finds nothing; a constant one gets what chance gives, wherever the mask lies."""
    for mask in (box_mask(0, 0, 4, 6), box_mask(12, 6, 16, 12)):
        zero, flat = torch.zeros(1, 12, 16), torch.full((1, 12, 16), 0.3)
        share = pytest.approx([24 / 192])
        assert cc.pointing_game(zero, mask, 100).tolist() == [0]
        assert cc.iou(zero, mask, 0.05).tolist() == [0]
        assert cc.energy_in_mask(zero, mask).tolist() == [0]
        assert cc.average_precision(zero, mask).tolist() == share
        for measure in (cc.pointing_game, cc.energy_in_mask, cc.average_precision):
            assert measure(flat, mask).tolist() == share
            assert measure(mask.float(), mask).tolist() == [1]
        assert cc.iou(flat, mask, 0.5).tolist() == share
        assert cc.iou(mask.float(), mask, 1).tolist() == [1]


# ---- pointing game


@pytest.mark.parametrize(("tolerance", "hit"), [(0, 0.0), (4, 0.0), (5, 1.0), (15, 1.0)])
def test_the_tolerance_is_the_straight_distance(tolerance, hit):
    """The mask's nearest pixel is 3 rows above and 4 columns left of the peak, which makes 5."""
    assert cc.pointing_game(peak(4, 5), box_mask(0, 0, 2, 2), tolerance).tolist() == [hit]


def test_the_mask_ends_where_it_ends():
    mask = box_mask(3, 2, 6, 5)
    hits = [float(cc.pointing_game(peak(*p), mask)[0]) for p in ((4, 5), (5, 5), (2, 3), (3, 2))]
    assert hits == [1, 0, 1, 0]


def test_a_shared_maximum_hits_in_part():
    maps = torch.full((1, 12, 16), 0.2)
    maps[0, 0, :4] = 0.9
    assert cc.pointing_game(maps, box_mask(0, 0, 1, 3)).tolist() == [0.25]
    assert cc.pointing_game(maps, box_mask(1, 0, 4, 1)).tolist() == [0.75]
    assert cc.pointing_game(maps, box_mask(6, 0, 7, 1), tolerance=4).tolist() == [0.5]
    maps[0, 11, 15] = 0.9001
    assert cc.pointing_game(maps, box_mask(0, 0, 4, 1)).tolist() == [0.0]


# ---- energy, average precision


def test_energy_by_hand():
    maps = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 5.0]]])
    masks = torch.tensor([[[True, False], [False, True]], [[True, True], [True, False]]])
    assert cc.energy_in_mask(maps, masks).tolist() == [0.5, 0.0]
    for scale in (1e-44, 1e30):  # as small and as large as float32 goes
        flat = scale * torch.ones(1, 2, 2)
        assert cc.energy_in_mask(flat, box_mask(0, 0, 2, 1, (2, 2))).tolist() == [0.5]


def test_average_precision_by_hand():
    """Ranked: hit, miss, hit, miss. Precision at the hits is 1 and 2/3, half the recall each."""
    maps = torch.tensor([[[0.9, 0.8], [0.7, 0.1]]])
    masks = torch.tensor([[[True, False], [True, False]]])
    assert cc.average_precision(maps, masks).tolist() == pytest.approx([5 / 6])


# ---- IoU and thresholds


def test_iou_by_hand():
    maps = torch.tensor([[[0.8, 0.4], [0.39, 0.2]]])
    masks = torch.tensor([[[True, False], [True, False]]])
    assert cc.iou(maps, masks, 0.5).tolist() == pytest.approx([1 / 3])  # 0.4 counts, 0.39 does not
    assert cc.iou(maps, masks, 1).tolist() == [0.5]
    assert cc.iou(maps, masks, 0.25).tolist() == [0.5]  # min-max would leave out 0.2
    for threshold in (0, -0.1, 1.01, float("nan"), "0.5", None):
        with pytest.raises(ValueError, match="threshold="):
            cc.iou(maps, masks, threshold)


def test_the_best_threshold_has_the_highest_mean_iou_and_is_the_lowest_of_equals():
    maps = torch.zeros(2, 12, 16)
    maps[:, 2:6, 1:5] = 0.7
    maps[:, 0, 0] = 1.0
    maps[:, 8, 8] = 0.32
    masks = box_mask(1, 2, 5, 6).repeat(2, 1, 1)
    assert pytest.approx(np.arange(0.05, 0.951, 0.05)) == cc.THRESHOLDS
    assert cc.best_threshold(maps, masks) == pytest.approx(0.35)  # 0.35 to 0.70 give the same
    assert cc.best_threshold(3 * maps, masks) == pytest.approx(0.35)
    one_pixel = box_mask(0, 0, 1, 1)
    both = torch.cat([one_pixel, box_mask(1, 2, 5, 5)])
    # at 0.35 it is (1/17 + 12/16) / 2 on average, at 0.75 (1 + 0) / 2
    assert cc.best_threshold(maps, both) == pytest.approx(0.75)


# ---- boxes


def test_box_iou_by_hand():
    maps = torch.zeros(1, 12, 16)
    maps[0, 2:6, 1:5] = maps[0, 6, 5] = 0.6  # 16 pixels and one that hangs on by its corner
    maps[0, 9, 15] = 1.0  # a peak apart
    boxes = {
        (1, 2, 6, 7): 1,
        (1, 2, 5, 6): 16 / 25,
        (2, 3, 7, 8): 16 / (25 + 25 - 16),
        (6, 2, 10, 7): 0,  # side by side
        (9, 9, 16, 12): 0,  # apart in both directions
    }
    for box, expected in boxes.items():
        assert cc.box_iou(maps, [[box]], 0.5).tolist() == pytest.approx([expected])
    assert cc.box_iou(maps, [[(8, 8, 10, 12), (1, 2, 6, 7)]], 0.5).tolist() == [1]  # the better box
    assert cc.box_iou(maps, [[(15, 9, 16, 10)]], 0.7).tolist() == [1]  # only the peak reaches 0.7
    assert cc.box_iou(0 * maps, [[(0, 0, 16, 12)]], 0.05).tolist() == [0]
    assert cc.box_iou(0 * maps + 0.2, [[(0, 0, 16, 12)]], 0.95).tolist() == [1]


def test_of_equally_large_regions_the_first_counts():
    for width in (16, 17):
        maps = torch.zeros(1, 13, width)
        maps[0, 1:3, 9:11] = maps[0, 2:4, 2:4] = maps[0, 8:10, 0:2] = 1
        assert cc.box_iou(maps, [[[9, 1, 11, 3]]], 0.5).tolist() == [1]


@given(coarse, thresholds, st.data())
def test_box_iou_equals_the_oracle(values, threshold, data):
    def box():
        x0, y0 = data.draw(st.integers(0, 7)), data.draw(st.integers(0, 5))
        return [x0, y0, data.draw(st.integers(x0 + 1, 8)), data.draw(st.integers(y0 + 1, 6))]

    boxes = [[box()], [box(), box()]]
    found = cc.box_iou(torch.from_numpy(values), boxes, threshold)
    expected = [oracle.box_iou(m, b, threshold) for m, b in zip(values, boxes, strict=True)]
    assert found.tolist() == pytest.approx(expected)


WRONG_BOXES = [[], [[3, 3, 3, 5]], [[0, 0, 17, 5]], [[0, 0, 5, 13]], [[-1, 0, 5, 5]]]


@pytest.mark.parametrize("boxes", WRONG_BOXES)
def test_boxes_without_area_or_beyond_the_map_are_refused(boxes):
    maps = torch.ones(1, 12, 16)
    with pytest.raises(ValueError, match="boxes="):
        cc.box_iou(maps, [boxes], 0.5)
    with pytest.raises(ValueError, match="1 entries for 2 maps"):
        cc.box_iou(maps.repeat(2, 1, 1), [boxes], 0.5)
    with pytest.raises(ValueError, match="maps must be finite"):
        cc.box_iou(torch.nan * maps, [boxes], 0.5)
