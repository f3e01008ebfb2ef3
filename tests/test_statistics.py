"""Paired comparison: numbers worked out by hand, planted effects, null data, and sentences that follow the numbers."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from nets import images, network
from scipy.stats import norm

import cam_core as cc


def table(metric: str = "insertion", baseline: str = "rise", **methods) -> pd.DataFrame:
    """Long form: one row per image and method."""
    rows = [
        dict(image=f"i{k:03d}", method=name, metric=metric, baseline=baseline, value=float(v))
        for name, values in methods.items()
        for k, v in enumerate(values)
    ]
    return pd.DataFrame(rows)


def row(metrics: pd.DataFrame, method: str = "hybrid", **kwargs) -> pd.Series:
    found = cc.compare(metrics, **kwargs)
    return found[found.method == method].iloc[0]


def planted(effect: float, n: int = 40, seed: int = 0, spread: float = 0.1) -> dict:
    draw = np.random.default_rng(seed)
    base = draw.normal(0.5, 0.2, n)
    return {"grad_cam": base, "hybrid": base + draw.normal(effect, spread, n)}


# ------------------------------------------------------------------------------------------------------------- by hand


def test_every_column_by_hand():
    found = row(table(grad_cam=[1, 2, 3, 4], hybrid=[2, 4, 6, 8]))
    assert (found.n, found["mean"], found.reference_mean, found.difference, found.won) == (4, 5.0, 2.5, 2.5, 1.0)
    assert found.effect == pytest.approx(2.5 / np.std([1, 2, 3, 4], ddof=1))
    assert found.p == pytest.approx(2 / 16)  # of 16 sign patterns only + + + + and - - - - are as extreme
    assert found.low < 2.5 < found.high and not found.identical


def test_sign_flip_test_by_hand():
    # sums of +-3 +-1 +-2: 6, 4, 2, 0, 0, -2, -4, -6; observed 3 - 1 + 2 = 4: 2 of 8 at least as large, 4 in size
    assert row(table(grad_cam=[0, 0, 0], hybrid=[3, -1, 2])).p == pytest.approx(4 / 8)


@pytest.mark.parametrize(("wins", "losses", "both"), [(5, 1, 4), (6, 0, 0), (0, 3, 20), (2, 2, 1)])
def test_mcnemar_by_hand(wins, losses, both):
    """Exact: two-sided binomial test of the images on which the methods differ."""
    base = [0] * wins + [1] * losses + [1] * both
    value = [1] * wins + [0] * losses + [1] * both
    found = row(table("pointing_game", "", grad_cam=base, hybrid=value))
    n, k = wins + losses, min(wins, losses)
    expected = min(1.0, 2 * sum(math.comb(n, j) for j in range(k + 1)) / 2**n)
    assert found.p == pytest.approx(expected)  # 5 to 1: 2 (1 + 6) / 64 = 0.21875
    assert found.difference == pytest.approx((wins - losses) / (n + both)) and found.won == wins / (n + both)


def test_hits_and_misses_only_are_mcnemars():
    """0, 1 and 0.5 are no hits and misses: the sign-flip test sees their size, McNemar would not."""
    assert row(table(grad_cam=[0, 0, 0], hybrid=[1, 0.5, -0.25])).p == pytest.approx(4 / 8)  # sums as big as 1.25: 4


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # .005*4, .01*3, .03*2, then .04*1 raised to .06
        ([0.5, 0.6], [1.0, 1.0]),
        ([0.02], [0.02]),
        ([], []),
        ([0.01, math.nan, 0.04], [0.02, math.nan, 0.04]),  # NaN is not counted: two tests, not three
        ([math.nan], [math.nan]),
        ([0.02, 0.02, 0.02], [0.06, 0.06, 0.06]),
    ],
)
def test_holm_by_hand(p, expected):
    assert cc.holm(p).tolist() == pytest.approx(expected, nan_ok=True)


def test_holm_keeps_its_argument_and_never_lowers_a_p():
    p = np.random.default_rng(0).uniform(size=50)
    before = p.copy()
    adjusted = cc.holm(p)
    assert (p == before).all() and (adjusted >= p).all() and (adjusted <= 1).all()
    assert (np.diff(adjusted[np.argsort(p)]) >= 0).all()


# ----------------------------------------------------------------------------------------------------- lower is better


def test_deletion_is_better_when_lower():
    values = planted(-0.1)
    deletion, insertion = (row(table(m, **values)) for m in ("deletion", "insertion"))
    assert deletion.won + insertion.won == pytest.approx(1.0) and deletion.won > 0.6
    assert deletion.difference == insertion.difference < 0
    assert cc.verdict(deletion).startswith("Hybrid: deletion better than Grad-CAM (-0.")
    assert cc.verdict(insertion).startswith("Hybrid: insertion worse than Grad-CAM (-0.")


def test_a_draw_is_not_won():
    assert row(table(grad_cam=[1, 1, 1, 1], hybrid=[1, 2, 0, 1])).won == 0.25
    assert row(table("deletion", grad_cam=[1, 1, 1, 1], hybrid=[1, 2, 0, 0])).won == 0.5


# -------------------------------------------------------------------------------------------- planted and null effects


def test_interval_covers_a_planted_difference_as_often_as_it_says():
    parts = [table(f"m{k}", **planted(0.05, n=30, seed=k)) for k in range(200)]
    found = cc.compare(pd.concat(parts), resamples=999)
    found = found[found.method == "hybrid"]
    covered = ((found.low <= 0.05) & (found.high >= 0.05)).mean()
    assert 0.90 <= covered <= 0.985
    assert (found.low < found.difference).all() and (found.difference < found.high).all()


def test_interval_is_about_as_wide_as_theory_says():
    values = planted(0.1, n=400)
    d = values["hybrid"] - values["grad_cam"]
    half = 1.96 * d.std(ddof=1) / 20
    found = row(table(**values))
    assert found.low == pytest.approx(d.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(d.mean() + half, abs=0.1 * half)


def test_interval_is_bca():
    """Efron's formulas on skewed data, where the plain percentile interval ends a third of the width lower."""
    d = np.exp(np.random.default_rng(3).normal(size=20))
    means = np.sort(np.random.default_rng(0).choice(d, (40_000, 20)).mean(1))
    z0 = norm.ppf((means < d.mean()).mean())  # bias
    left_out = (d.sum() - d) / 19  # jackknife
    u = left_out.mean() - left_out
    a = (u**3).sum() / (6 * (u**2).sum() ** 1.5)  # acceleration
    low, high = (np.quantile(means, norm.cdf(z0 + (z0 + z) / (1 - a * (z0 + z)))) for z in norm.ppf([0.025, 0.975]))
    found, width = row(table(grad_cam=0 * d, hybrid=d)), high - low
    assert found.low == pytest.approx(low, abs=0.02 * width) and found.high == pytest.approx(high, abs=0.05 * width)
    assert high - np.quantile(means, 0.975) > 0.3 * width


def test_null_data_says_nothing():
    """No effect at all, many times over: "better" or "worse" appears in about 5 % of the sentences, not more."""
    parts = [table(f"m{k}", **planted(0.0, n=24, seed=1000 + k)) for k in range(300)]
    found = cc.compare(pd.concat(parts), resamples=999)
    said = [cc.verdict(r) for _, r in found[found.method == "hybrid"].iterrows()]
    silent = sum("no difference to Grad-CAM shown at n = 24" in s for s in said)
    better, worse = (sum(f" {w} than " in s for s in said) for w in ("better", "worse"))
    assert silent + better + worse == 300
    assert 0.01 <= (better + worse) / 300 <= 0.08 and better / 300 <= 0.045


def test_uniform_p_on_null_data():
    parts = [table(f"m{k}", **planted(0.0, n=20, seed=5000 + k)) for k in range(200)]
    p = cc.compare(pd.concat(parts), resamples=499).query("method == 'hybrid'").p
    assert 0.4 < p.mean() < 0.6 and 0.15 < (p < 0.25).mean() < 0.35


@pytest.mark.parametrize("metric", ["insertion", "deletion", "energy"])
def test_verdict_flips_with_the_columns(metric):
    values = planted(0.1)
    swapped = {"grad_cam": values["hybrid"], "hybrid": values["grad_cam"]}
    one, other = (row(table(metric, **v)) for v in (values, swapped))
    assert one.difference == -other.difference and one.p == other.p and one.won + other.won == pytest.approx(1)
    assert one.low == pytest.approx(-other.high, abs=0.01) and one.high == pytest.approx(-other.low, abs=0.01)
    words = [next(w for w in ("better", "worse") if f" {w} than " in cc.verdict(r)) for r in (one, other)]
    assert words == (["worse", "better"] if metric == "deletion" else ["better", "worse"])


# -------------------------------------------------------------------------------------------------------- the sentence

SURE = dict(method="hybrid", metric="insertion", n=24, difference=0.02, low=0.01, high=0.03, p=0.001)
SURE |= dict(identical=False, reference="grad_cam")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, "insertion better than Grad-CAM (+0.0200 [+0.0100, +0.0300], p = 0.001, n = 24)"),
        ({"difference": -0.02, "low": -0.03, "high": -0.01}, "insertion worse than Grad-CAM (-0.020"),
        ({"metric": "deletion"}, "deletion worse than"),
        ({"metric": "average_precision"}, "average precision better than"),
        ({"p": 0.05}, "no difference to Grad-CAM shown at n = 24"),  # 0.05 itself is not below 0.05
        ({"p": 0.2}, "no difference to Grad-CAM shown"),
        ({"p": math.nan}, "no difference to Grad-CAM shown"),
        ({"low": -0.001}, "no difference to Grad-CAM shown"),
        ({"low": 0.0}, "no difference to Grad-CAM shown"),
        ({"low": math.nan, "high": math.nan}, "no difference to Grad-CAM shown"),
        ({"identical": True}, "insertion identical to Grad-CAM on all 24 images"),
        ({"method": "mine"}, "mine: insertion better"),
    ],
)
def test_verdict(change, says):
    assert says in cc.verdict({**SURE, **change})


def test_verdict_with_corrected_p():
    assert "no difference" in cc.verdict({**SURE, "p_holm": 0.06}, "p_holm")
    assert "p = 0.04" in cc.verdict({**SURE, "p_holm": 0.04}, "p_holm")


def test_verdict_names_the_method_that_was_compared_with():
    """compare() takes another reference; the sentence must not call it Grad-CAM."""
    values = planted(0.1)
    found = row(table(layer_cam=values["grad_cam"], hybrid=values["hybrid"]), reference="layer_cam")
    assert "than Grad-CAM" not in cc.verdict(found)


# ------------------------------------------------------------------------------------------------------- pairs and rows


def test_pairs_are_made_by_image_not_by_position():
    metrics = pd.concat([table(**planted(0.05)), table("deletion", "twin", **planted(0.02, seed=1))])
    found = cc.compare(metrics)
    shuffled = cc.compare(metrics.sample(frac=1, random_state=3))
    keys = ["metric", "baseline", "method"]
    pd.testing.assert_frame_equal(
        found.sort_values(keys).reset_index(drop=True), shuffled.sort_values(keys).reset_index(drop=True)
    )


def test_seeded_and_reproducible():
    metrics = table(**planted(0.05))
    first, again, other = (row(metrics, seed=s) for s in (0, 0, 1))
    assert first.equals(again)
    assert (first.low, first.p) != (other.low, other.p) and first.low == pytest.approx(other.low, abs=0.01)


def test_one_row_per_metric_baseline_and_method():
    metrics = pd.concat(
        table(m, b, **planted(0.1, seed=k), layer_cam=np.arange(40) / 40)
        for k, (m, b) in enumerate([("insertion", "rise"), ("insertion", "twin"), ("deletion", "rise")])
    )
    found = cc.compare(metrics, resamples=200)
    assert len(found) == 9 and not found.duplicated(["metric", "baseline", "method"]).any()
    assert (found.n == 40).all()
    alone = cc.compare(metrics[(metrics.baseline == "twin") & (metrics.method != "layer_cam")], resamples=200)
    a, b = (f[(f.baseline == "twin") & (f.method == "hybrid")].iloc[0] for f in (found, alone))
    pd.testing.assert_series_equal(a, b, check_names=False)  # other methods and baselines have no say


@pytest.mark.parametrize("empty", [None, math.nan])
def test_metrics_without_a_baseline_are_not_lost(empty):
    """Localisation has no baseline; an empty field of a CSV file is read back as NaN, and groupby drops NaN."""
    assert len(cc.compare(table("energy", empty, **planted(0.1)))) == 2


def test_an_unpaired_image_is_refused():
    metrics = table(**planted(0.1))
    with pytest.raises(ValueError, match="insertion: not every image has a value for every method"):
        cc.compare(metrics.iloc[1:])
    metrics.loc[0, "value"] = math.nan
    with pytest.raises(ValueError, match="not every image"):
        cc.compare(metrics)


def test_a_missing_reference_and_a_doubled_row_are_refused():
    with pytest.raises(ValueError, match="'grad_cam' has no values of insertion"):
        cc.compare(table(hybrid=[1, 2], layer_cam=[1, 2]))
    metrics = table(**planted(0.1))
    with pytest.raises(ValueError):
        cc.compare(pd.concat([metrics, metrics.iloc[:1]]))


# ------------------------------------------------------------------------------------------------------- special cases


def test_identical_rows_are_said_so_and_not_tested():
    found = cc.compare(table(grad_cam=[0.1, 0.2, 0.3], hires_cam=[0.1, 0.2, 0.3]))
    assert found.identical.all() and found[["low", "high", "p", "effect"]].isna().all(axis=None)
    assert (found.won == 0).all() and (found.difference == 0).all()
    assert cc.verdict(found.iloc[1]) == "HiResCAM: insertion identical to Grad-CAM on all 3 images."


def test_the_reference_row_is_identical_to_itself():
    found = cc.compare(table(**planted(0.1)))
    assert found[found.method == "grad_cam"].identical.all() and not found[found.method == "hybrid"].identical.any()


def test_identical_methods_are_identical_in_spite_of_rounding():
    """HiResCAM at a GAP layer is Grad-CAM; the last bit of float32 must not make it significantly better or worse."""
    net, x = network("resnet18"), images(16, (64, 64))
    shot = cc.capture(net, x, "layer4", 1)
    A, G = shot.activations["layer4"], shot.gradients["layer4"]
    masks = torch.zeros(16, 64, 64, dtype=torch.bool)
    masks[:, 10:30, 20:50] = True
    names = ("grad_cam", "hires_cam")
    energy = {name: cc.energy_in_mask(cc.enlarge(cc.CAMS[name](A, G), (64, 64)), masks) for name in names}
    assert energy["grad_cam"].any() and np.abs(energy["grad_cam"] - energy["hires_cam"]).max() < 1e-6
    assert row(table("energy", **energy), "hires_cam").identical


@pytest.mark.parametrize(
    "values", [([0.5], [0.7]), ([0.5, 0.6], [0.7, 0.7]), ([1, 0], [0, 1]), ([0.25] * 9, [0.5] * 9)]
)
def test_few_or_constant_differences_claim_nothing_and_warn_nothing(values):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = row(table(grad_cam=values[0], hybrid=values[1]))
    if len(values[0]) < 6:  # two-sided p cannot get below 2 / 2^5
        assert "no difference to Grad-CAM shown" in cc.verdict(found)


def test_a_constant_difference_by_rounding_only():
    """0.1 more on every image: the differences vary in their last bit, which is no spread to divide by."""
    base = np.random.default_rng(0).uniform(size=20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = row(table(grad_cam=base, hybrid=base + 0.1))
    assert not abs(found.effect) > 1e6
