"""Sparseness, max-sensitivity, and how far the rankings of metrics agree."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from captum.metrics import sensitivity_max
from nets import images, tiny

import cam_core as cc

# ---- sparseness


def test_gini_by_hand():
    maps = torch.tensor([[[0.0, 0, 0, 1]], [[1, 2, 3, 4]], [[5, 5, 5, 5]], [[0, 0, 0, 0]]])
    # Hurley and Rickard: 1 - 2 (1 * 3.5 + 2 * 2.5 + 3 * 1.5 + 4 * 0.5) / (10 * 4)
    assert cc.gini(maps) == pytest.approx([0.75, 0.25, 0, 0])


def test_gini_is_the_mean_difference_of_two_pixels_over_twice_the_mean():
    maps = torch.rand(3, 6, 7, generator=torch.Generator().manual_seed(0)) ** 3
    flat = maps.flatten(1).double()
    differences = (flat[:, :, None] - flat[:, None]).abs().mean((1, 2))
    assert cc.gini(maps) == pytest.approx((differences / (2 * flat.mean(1))).numpy())
    assert cc.gini(-7 * maps) == pytest.approx(cc.gini(maps))


def test_gini_refuses_nan():
    with pytest.raises(ValueError, match="NaN"):
        cc.gini(torch.tensor([[[1.0, float("nan")]]]))


# ---- max-sensitivity


def explained(x):
    """Grad-CAM of a small network, as a function of images."""
    captured = cc.capture(tiny(), x, "4", 1)
    return cc.grad_cam(captured.activations["4"], captured.gradients["4"])


def test_max_sensitivity_is_captums_of_the_same_perturbations():
    x = images(3, seed=2)
    seen = []

    def recorded(x):
        seen.append(x)
        return explained(x)

    ours = cc.max_sensitivity(recorded, x, ["a", "b", "c"], radius=0.3, samples=4, seed=1)
    assert len(seen) == 5
    assert all((s - x).abs().max() <= 0.3 for s in seen)
    assert (seen[1] - x).abs().max() > 0.29 and not torch.equal(seen[1], seen[2])
    perturbed = torch.stack(seen[1:], 1).flatten(0, 1)  # as captum repeats: image by image
    theirs = sensitivity_max(
        lambda x: (explained(x[0] if isinstance(x, tuple) else x),),
        x,
        perturb_func=lambda inputs: perturbed,
        n_perturb_samples=4,
    )
    assert ours.min() > 0
    assert ours == pytest.approx(theirs.numpy(), rel=1e-5)


def test_max_sensitivity_depends_on_seed_and_image_alone():
    x = images(3, seed=2)
    together = cc.max_sensitivity(explained, x, ["a", "b", "c"], samples=2)
    alone = cc.max_sensitivity(explained, x[1:2], ["b"], samples=2)
    assert alone == pytest.approx(together[1:2], rel=1e-5)
    assert cc.max_sensitivity(explained, x[1:2], ["b"], samples=2, seed=1) != pytest.approx(alone)


def test_a_map_of_zeros_is_not_divided_by():
    change = cc.max_sensitivity(
        lambda x: x.mean(1) * (x.mean() != 0), torch.zeros(1, 3, 4, 4), ["a"]
    )
    assert 0 < change[0] < 0.02 * 4


def test_max_sensitivity_refuses_what_has_no_meaning():
    x = images(2)
    with pytest.raises(ValueError, match="radius"):
        cc.max_sensitivity(explained, x, ["a", "b"], radius=0)
    with pytest.raises(ValueError, match="samples"):
        cc.max_sensitivity(explained, x, ["a", "b"], samples=0)
    with pytest.raises(ValueError, match="ids"):
        cc.max_sensitivity(explained, x, ["a"])
    with pytest.raises(ValueError, match="NaN"):
        cc.max_sensitivity(lambda x: x.mean(1) * float("nan"), x, ["a", "b"])


# ---- agreement


def test_agreement_by_hand():
    table = pd.DataFrame(
        {"one": [1.0, 2, 3, 4], "swapped": [2.0, 1, 3, 9], "turned": [4.0, 3, 2, 1], "flat": 5.0},
        index=["a", "b", "c", "d"],
    )
    found = cc.agreement(table)
    assert list(found.index) == list(found.columns) == list(table)
    assert found.loc["one"].tolist()[:3] == pytest.approx([1, 4 / 6, -1])  # 5 pairs of 6 agree
    assert found["one"].tolist()[:3] == pytest.approx([1, 4 / 6, -1])
    assert np.isnan(found["flat"]).all()


def test_agreement_leaves_out_methods_that_one_of_both_lacks():
    table = pd.DataFrame({"one": [1.0, 2, 3], "two": [3.0, np.nan, 1]})
    assert cc.agreement(table).loc["one", "two"] == -1


def test_one_method_is_no_ranking():
    with pytest.raises(ValueError, match="two"):
        cc.agreement(pd.DataFrame({"one": [1.0]}))
