"""Paired comparison by hand, planted effects, null data, sentences that follow the numbers,
and the shipped results computed again from their values.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

import cam_core as cc


def table(metric: str = "insertion", baseline: str = "rise", **methods) -> pd.DataFrame:
    """Long form: one row per image and method."""
    rows = []
    for name, values in methods.items():
        for k, value in enumerate(values):
            about = {"image": f"i{k:03d}", "method": name, "metric": metric, "baseline": baseline}
            rows.append(about | {"value": float(value)})
    return pd.DataFrame(rows)


def row(metrics: pd.DataFrame, method: str = "hybrid", **kwargs) -> pd.Series:
    found = cc.statistics.compare(metrics, **kwargs)
    return found[found.method == method].iloc[0]


def planted(effect: float, n: int = 40, seed: int = 0, spread: float = 0.1) -> dict:
    draw = np.random.default_rng(seed)
    base = draw.normal(0.5, 0.2, n)
    return {"grad_cam": base, "hybrid": base + draw.normal(effect, spread, n)}


# ---- by hand


def test_every_column_by_hand():
    found = row(table(grad_cam=[1, 2, 3, 4], hybrid=[2, 4, 6, 8]))
    assert (found.n, found["mean"], found.reference_mean, found.difference) == (4, 5.0, 2.5, 2.5)
    assert found.won == 1.0 and not found.identical
    assert found.effect == pytest.approx(2.5 / np.std([1, 2, 3, 4], ddof=1))
    assert found.p == pytest.approx(2 / 16)  # of 16 sign patterns only ++++ and ---- are as extreme
    assert found.low < 2.5 < found.high


def test_sign_flip_test_by_hand():
    # sums of +-3 +-1 +-2: 6, 4, 2, 0, 0, -2, -4, -6; observed 3 - 1 + 2 = 4: 4 of 8 are as large
    assert row(table(grad_cam=[0, 0, 0], hybrid=[3, -1, 2])).p == pytest.approx(4 / 8)
    # 0, 1 and 0.5 are no hits and misses: this test sees their size, McNemar's would not
    assert row(table(grad_cam=[0, 0, 0], hybrid=[1, 0.5, -0.25])).p == pytest.approx(4 / 8)


@pytest.mark.parametrize(("wins", "losses", "both"), [(5, 1, 4), (6, 0, 0), (0, 3, 20), (2, 2, 1)])
def test_mcnemar_by_hand(wins, losses, both):
    """Exact: two-sided binomial test of the images on which the methods differ."""
    base = [0] * wins + [1] * losses + [1] * both
    value = [1] * wins + [0] * losses + [1] * both
    found = row(table("pointing", "", grad_cam=base, hybrid=value))
    n = wins + losses
    tail = sum(math.comb(n, j) for j in range(min(wins, losses) + 1))
    assert found.p == pytest.approx(min(1.0, 2 * tail / 2**n))  # 5 to 1: 2 (1 + 6) / 64
    assert found.difference == pytest.approx((wins - losses) / (n + both))
    assert found.won == wins / (n + both)


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # .04 * 1 is raised to .06
        ([0.5, 0.6], [1.0, 1.0]),
        ([], []),
        ([0.01, math.nan, 0.04], [0.02, math.nan, 0.04]),  # NaN is not counted: two tests
        ([0.02, 0.02, 0.02], [0.06, 0.06, 0.06]),
    ],
)
def test_holm_by_hand(p, expected):
    assert cc.statistics.holm(p).tolist() == pytest.approx(expected, nan_ok=True)


def test_holm_keeps_its_argument_and_never_lowers_a_p():
    p = np.random.default_rng(0).uniform(size=50)
    before = p.copy()
    adjusted = cc.statistics.holm(p)
    assert (p == before).all() and (adjusted >= p).all() and (adjusted <= 1).all()
    assert (np.diff(adjusted[np.argsort(p)]) >= 0).all()


def test_a_draw_is_not_won_and_deletion_is_won_when_lower():
    assert row(table(grad_cam=[1, 1, 1, 1], hybrid=[1, 2, 0, 1])).won == 0.25
    assert row(table("deletion", grad_cam=[1, 1, 1, 1], hybrid=[1, 2, 0, 0])).won == 0.5


# ---- planted and null effects


def test_intervals_and_tests_keep_their_promise_over_many_studies():
    """95 % intervals cover the planted difference about as often as they say; without any, p is
    uniform and "better" or "worse" is said in about 5 % of the studies.
    """
    effects = [table(f"effect {k}", **planted(0.05, n=30, seed=k)) for k in range(100)]
    nothing = [table(f"null {k}", **planted(0.0, n=24, seed=1000 + k)) for k in range(100)]
    found = cc.statistics.compare(pd.concat(effects + nothing), resamples=399).query(
        "method == 'hybrid'"
    )
    planted_rows = found[found.metric.str.startswith("effect")]
    covered = (planted_rows.low <= 0.05) & (planted_rows.high >= 0.05)
    assert 0.88 <= covered.mean() <= 0.985
    null = found[found.metric.str.startswith("null")]
    assert 0.4 < null.p.mean() < 0.6 and 0.14 < (null.p < 0.25).mean() < 0.36
    words = [cc.statistics.judgement(r) for r in null.to_dict("records")]
    assert 1 <= 100 - words.count("no difference") <= 9
    assert words.count("better") <= 5


def test_interval_is_bca():
    """Efron's formulas on skewed data, where the plain percentile interval ends far lower."""
    d = np.exp(np.random.default_rng(3).normal(size=20))
    means = np.sort(np.random.default_rng(0).choice(d, (40_000, 20)).mean(1))
    z0 = norm.ppf((means < d.mean()).mean())  # bias
    left_out = (d.sum() - d) / 19  # jackknife
    u = left_out.mean() - left_out
    a = (u**3).sum() / (6 * (u**2).sum() ** 1.5)  # acceleration
    ends = []
    for z in norm.ppf([0.025, 0.975]):
        ends.append(np.quantile(means, norm.cdf(z0 + (z0 + z) / (1 - a * (z0 + z)))))
    found = row(table(grad_cam=0 * d, hybrid=d))
    width = ends[1] - ends[0]
    assert found.low == pytest.approx(ends[0], abs=0.02 * width)
    assert found.high == pytest.approx(ends[1], abs=0.05 * width)
    assert ends[1] - np.quantile(means, 0.975) > 0.3 * width


@pytest.mark.parametrize("metric", ["insertion", "deletion", "energy"])
def test_verdict_flips_with_the_columns(metric):
    values = planted(0.1)
    swapped = {"grad_cam": values["hybrid"], "hybrid": values["grad_cam"]}
    one = row(table(metric, **values), resamples=999)
    other = row(table(metric, **swapped), resamples=999)
    assert one.difference == -other.difference and one.p == other.p
    assert one.won + other.won == pytest.approx(1)
    words = ["worse", "better"] if metric == "deletion" else ["better", "worse"]
    assert f"is {words[0]} than Grad-CAM" in cc.sentences.verdict(one)
    assert f"is {words[1]} than Grad-CAM" in cc.sentences.verdict(other)


# ---- the sentence

SURE = {"method": "hybrid", "metric": "insertion", "n": 24, "difference": 0.02, "low": 0.01}
SURE |= {"high": 0.03, "p": 0.001, "identical": False, "reference": "grad_cam"}
NOTHING = "Hybrid shows no difference to Grad-CAM in insertion ("


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {},
            "Hybrid is better than Grad-CAM in insertion (+0.0200 [+0.0100, +0.0300], p = 0.001, ",
        ),
        ({"difference": -0.02, "low": -0.03, "high": -0.01}, "worse than Grad-CAM in insertion"),
        ({"metric": "deletion"}, "worse than Grad-CAM in deletion"),
        ({"metric": "average_precision"}, "better than Grad-CAM in average precision"),
        ({"metric": "deletion_blocks"}, "worse than Grad-CAM in deletion by blocks"),
        ({"p": 0.05}, NOTHING),  # 0.05 itself is not below 0.05
        ({"p": math.nan}, NOTHING),
        ({"low": -0.001}, NOTHING),
        ({"low": 0.0}, NOTHING),
        ({"low": math.nan, "high": math.nan}, NOTHING + "+0.0200, no interval, n = 24)"),
        ({"identical": True}, "is identical to Grad-CAM in insertion on all 24 images"),
        ({"method": "mine"}, "mine is better"),
        ({"reference": "layer_cam"}, "better than LayerCAM"),
    ],
)
def test_verdict(change, says):
    assert says in cc.sentences.verdict({**SURE, **change})


def test_the_corrected_p_counts_where_it_is_named():
    assert "no difference" in cc.sentences.verdict({**SURE, "p_holm": 0.06}, "p_holm")
    assert "p = 0.04" in cc.sentences.verdict({**SURE, "p_holm": 0.04}, "p_holm")


def test_primary_endpoints_are_corrected_together_and_nothing_else_is():
    kinds = [("insertion", "twin"), ("energy", "")]
    parts = []
    for k, (metric, baseline) in enumerate([*kinds, ("insertion", "rise")]):
        parts.append(table(metric, baseline, **planted(0.03, n=12, seed=k)))
    same = planted(0, n=12)["grad_cam"]
    parts.append(table("deletion", "twin", grad_cam=same, hybrid=same))
    parts.append(table("ties", "", grad_cam=[0.1] * 12, hybrid=[0.9] * 12))
    found = cc.judge(pd.concat(parts), [*kinds, ("deletion", "twin")])
    assert "ties" not in set(found.metric)
    assert found.primary.sum() == 3 and set(found[found.primary].method) == {"hybrid"}
    tested = found[found.primary & ~found.identical]
    assert (
        tested.p_holm.tolist() == cc.statistics.holm(tested.p).tolist()
    )  # the identical one is not counted
    assert found[~found.primary | found.identical].p_holm.isna().all()


# ---- pairs and rows


def test_pairs_are_made_by_image_not_by_position():
    metrics = pd.concat(
        [table(**planted(0.05)), table("deletion", "twin", **planted(0.02, seed=1))]
    )
    keys = ["metric", "baseline", "method"]
    found = cc.statistics.compare(metrics, resamples=200).sort_values(keys, ignore_index=True)
    shuffled = cc.statistics.compare(metrics.sample(frac=1, random_state=3), resamples=200)
    pd.testing.assert_frame_equal(found, shuffled.sort_values(keys, ignore_index=True))


def test_seeded_and_reproducible():
    metrics = table(**planted(0.05))
    first, again, other = (row(metrics, seed=s, resamples=999) for s in (0, 0, 1))
    assert first.equals(again) and (first.low, first.p) != (other.low, other.p)


def test_other_methods_and_baselines_have_no_say():
    parts = []
    for k, kind in enumerate([("insertion", "rise"), ("insertion", "twin"), ("deletion", "rise")]):
        parts.append(table(*kind, **planted(0.1, seed=k), layer_cam=np.arange(40) / 40))
    metrics = pd.concat(parts)
    found = cc.statistics.compare(metrics, resamples=200)
    assert len(found) == 9 and not found.duplicated(["metric", "baseline", "method"]).any()
    alone = metrics[(metrics.baseline == "twin") & (metrics.method != "layer_cam")]
    alone = row(alone, resamples=200)
    same = found[(found.baseline == "twin") & (found.method == "hybrid")].iloc[0]
    pd.testing.assert_series_equal(same, alone, check_names=False)


@pytest.mark.parametrize("empty", [None, math.nan])
def test_metrics_without_a_baseline_are_not_lost(empty):
    """An empty field of a CSV file is read back as NaN, and groupby drops NaN."""
    assert len(cc.statistics.compare(table("energy", empty, **planted(0.1)), resamples=99)) == 2


def test_what_cannot_be_paired_is_refused():
    metrics = table(**planted(0.1))
    with pytest.raises(ValueError, match="insertion: not every image has a value for every method"):
        cc.statistics.compare(metrics.iloc[1:])
    with pytest.raises(ValueError, match="not every image"):
        cc.statistics.compare(metrics.assign(value=[math.nan, *metrics.value[1:]]))
    with pytest.raises(ValueError, match="'grad_cam' has no values of insertion"):
        cc.statistics.compare(table(hybrid=[1, 2], layer_cam=[1, 2]))
    with pytest.raises(ValueError, match="duplicate"):
        cc.statistics.compare(pd.concat([metrics, metrics.iloc[:1]]))


# ---- special cases


def test_rounding_is_no_difference():
    """HiResCAM at the last layer is Grad-CAM; the last bit of float32 makes it no worse."""
    base = np.linspace(0.1, 0.9, 16)
    found = row(table(grad_cam=base, hires_cam=base + 4e-7), "hires_cam")
    assert found.identical and np.isnan([found.low, found.high, found.p, found.effect]).all()
    assert found.won == 0
    assert (
        cc.statistics.judgement(found.drop("identical")) == "identical"
    )  # as a table without the column says


@pytest.mark.parametrize(
    "values", [([0.5], [0.7]), ([0.5, 0.6], [0.7, 0.7]), ([1, 0], [0, 1]), ([0.25] * 9, [0.5] * 9)]
)
def test_few_or_constant_differences_claim_nothing_and_warn_of_nothing(values):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = row(table(grad_cam=values[0], hybrid=values[1]))
    assert "shows no difference to Grad-CAM" in cc.sentences.verdict(found)


# ---- the shipped results


@pytest.fixture(scope="module")
def values(repo):
    return pd.read_csv(repo / "results/reference/full/metrics.csv.gz", keep_default_na=False)


@pytest.fixture(scope="module")
def shipped(repo):
    found = pd.read_csv(repo / "results/reference/full/summary.csv")
    return found.assign(baseline=found["baseline"].fillna(""))


def test_every_mean_and_difference_of_the_reference_follows_from_its_values(values, shipped):
    keys = ["network", "metric", "baseline", "method"]
    means = values.groupby(keys)["value"].agg(["mean", "count"])
    both = shipped[shipped.method != "rise"].set_index(keys)
    means = means.reindex(both.index)
    assert (means["count"] == both["n"]).all()
    assert np.allclose(means["mean"], both["mean"], atol=1e-8)
    assert np.allclose(both["mean"] - both["reference_mean"], both["difference"], atol=1e-8)


@pytest.mark.parametrize("network", ["resnet18", "squeezenet1_1"])
def test_the_primary_endpoints_of_the_reference_follow_from_its_values(values, shipped, network):
    """Intervals, p-values and Holm's correction that README shows, with the study's settings."""
    there = shipped[(shipped.network == network) & shipped.primary]
    pair = values[(values.network == network) & values.method.isin(["grad_cam", "hybrid"])]
    kinds = list(zip(there.metric, there.baseline, strict=True))
    pair = pair[[kind in kinds for kind in zip(pair.metric, pair.baseline, strict=True)]]
    here = cc.judge(pair, kinds).query("primary").set_index("metric")
    for row in there.to_dict("records"):
        own = here.loc[row["metric"]]
        assert own["n"] == row["n"] == (160 if network == "resnet18" else 80)
        for column, limit in {"low": 1e-3, "high": 1e-3, "p": 0.01, "effect": 1e-3}.items():
            assert own[column] == pytest.approx(row[column], abs=limit), (row["metric"], column)
        assert own["p_holm"] == pytest.approx(row["p_holm"], abs=0.01)
        assert own["won"] == pytest.approx(row["won"], abs=0.01)
