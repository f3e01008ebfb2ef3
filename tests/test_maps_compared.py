"""How maps are compared in notebook 03: rank correlation, coherence, min-max, ways of enlarging."""

import nets
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

import cam_core as cc


def test_rank_correlation_is_scipys_for_each_image():
    draw = torch.Generator().manual_seed(0)
    a = torch.rand(3, 5, 7, generator=draw)
    b = (4 * torch.rand(3, 5, 7, generator=draw)).round()  # with ties
    pairs = zip(a.numpy(), b.numpy(), strict=True)
    expected = [spearmanr(p, q, axis=None).statistic for p, q in pairs]
    assert cc.rank_correlation(a, b) == pytest.approx(expected)
    assert cc.rank_correlation(a, a.exp()) == pytest.approx([1, 1, 1])
    assert cc.rank_correlation(a, -a) == pytest.approx([-1, -1, -1])


def test_a_constant_map_correlates_with_nothing():
    a = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0))
    assert cc.rank_correlation(a, torch.full_like(a, 0.3)).tolist() == [0, 0]
    assert cc.rank_correlation(torch.zeros_like(a), a).tolist() == [0, 0]


def test_maps_of_different_shapes_have_no_rank_correlation():
    with pytest.raises(ValueError, match=r"\(1, 4, 4\) and \(1, 2, 2\).*Enlarge"):
        cc.rank_correlation(torch.rand(1, 4, 4), torch.rand(1, 2, 2))


def test_coherence_by_hand():
    one_sign = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    half_cancels = torch.tensor([[3.0, -1.0], [0.0, 0.0]])  # 2 of 4 are left
    cancels = torch.tensor([[1.0, -1.0], [2.0, -2.0]])
    nothing = torch.zeros(2, 2)
    G = torch.stack([one_sign, -one_sign, half_cancels, cancels, nothing])[:, None]
    assert cc.coherence(G).tolist() == [1, 1, 0.5, 0, 0]
    two_channels = torch.stack([one_sign, cancels])[None]
    assert cc.coherence(two_channels).tolist() == [0.5]  # 6 of 6 and 0 of 6


def test_coherence_does_not_depend_on_the_gradients_scale():
    G = torch.randn(2, 6, 5, 5, generator=torch.Generator().manual_seed(1))
    assert cc.coherence(1e-6 * G) == pytest.approx(cc.coherence(G))


def test_min_max_by_hand():
    maps = torch.tensor([[[1.0, 3.0], [2.0, 1.0]], [[5.0, 5.0], [5.0, 5.0]]])
    assert cc.min_max(maps).tolist() == [[[0, 1], [0.5, 0]], [[0, 0], [0, 0]]]


def test_min_max_takes_a_place_out_of_a_product_and_the_maximum_does_not():
    a = torch.tensor([[[0.2, 1.0], [0.6, 0.4]]])
    b = torch.tensor([[[1.0, 0.1], [0.3, 0.5]]])
    assert (cc.hybrid(a, b, 0.5) > 0).all()
    fused = cc.hybrid_min_max(a, b, 0.5, (2, 2))
    assert (fused == 0).tolist() == [[[True, True], [False, False]]]  # each map's smallest value


def test_without_a_floor_both_scalings_agree():
    a = torch.tensor([[[0.0, 1.0], [0.6, 0.4]]])
    b = torch.tensor([[[1.0, 0.0], [0.3, 0.5]]])
    fused = cc.hybrid(a, b, 0.5, (8, 8))
    assert fused.any() and torch.allclose(cc.hybrid_min_max(a, b, 0.5, (8, 8)), fused, atol=1e-6)


def test_a_constant_factor_has_no_min_max_product():
    a = torch.rand(1, 3, 3, generator=torch.Generator().manual_seed(2))
    assert not cc.hybrid_min_max(a, torch.ones(1, 3, 3), 0.5, (6, 6)).any()


def test_areas_by_enlarging_are_those_of_the_enlarged_maps():
    model = nets.tiny()
    x = nets.images(2, (16, 16))
    target = torch.tensor([0, 1])
    ids = ["a", "b"]
    maps = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(3))
    start, end = cc.baselines(x, "zero")
    found = cc.areas_by_enlarging(model, x, maps, target, ids, start, end, steps=7)
    table = found.pivot(index=["metric", "method"], columns="image", values="value")
    assert (table.loc[("ties", "nearest")] == 1).all(), "every pixel of a repeated cell is tied"
    assert (table.loc[("ties", "bilinear")] < 0.5).all()
    bicubic = {"m": cc.enlarge(maps, (16, 16), "bicubic")}
    curves = cc.faithfulness(model, x, bicubic, target, ids, start, end, steps=7)
    for metric in ("insertion", "deletion"):
        assert table.loc[(metric, "bicubic")].tolist() == pytest.approx(cc.auc(curves[metric]["m"]))


def test_rows_of_paired_differences_are_summed_up_in_words():
    rows = [
        ("a", 0.2, 0.1, 0.3, 0.01),
        ("b", -0.2, -0.3, -0.1, 0.01),
        ("c", 0.2, 0.1, 0.3, 0.01),
        ("d", 0.2, 0.1, 0.3, 0.2),
        ("e", 0.0, float("nan"), float("nan"), float("nan")),
    ]
    table = pd.DataFrame(rows, columns=["layer", "difference", "low", "high", "p_holm"])
    table = table.assign(metric="energy", identical=table["layer"] == "e")
    said = "better at a and c; worse at b; no difference at d; identical at e"
    assert cc.sentences.summed_up(table, "layer", "at") == said
    assert cc.sentences.summed_up(table[:1], "layer", "at") == "better at a"
