"""The sentences of notebook 05 are made from the numbers: other numbers, other sentences."""

import numpy as np
import pandas as pd
import pytest
from nbcode import definitions

import cam_core as cc

KINDS = [("insertion", "twin"), ("deletion", "twin"), ("energy", ""), ("average_precision", "")]


@pytest.fixture(scope="module")
def conclude():
    return definitions("05_evaluation")["conclude"]


def table(gains, n=40, spread=0.02):
    """metrics with a value per image, method and metric; gains: {method: its gain over Grad-CAM, on all metrics}."""
    rng, rows = np.random.default_rng(0), []
    for metric, baseline in KINDS:
        base = rng.uniform(0.3, 0.6, n)
        for method, gain in {"grad_cam": 0.0, **gains}.items():
            sign = -1 if metric in cc.LOWER_IS_BETTER else 1
            noise = 0 if method == "grad_cam" else rng.normal(0, spread, n)
            for i, value in enumerate(base + sign * gain + noise):
                rows.append(dict(image=f"i{i}", method=method, metric=metric, baseline=baseline, value=value))
    return pd.DataFrame(rows)


def conclusion(conclude, metrics):
    """The text for a table of metrics, by the steps of the notebook."""
    summary = cc.compare(metrics, "grad_cam", resamples=999).assign(primary=lambda t: t.method == "hybrid")
    summary["p_holm"] = np.nan
    summary.loc[summary.primary, "p_holm"] = cc.holm(summary.loc[summary.primary, "p"])
    pairs = [metrics[metrics.method.isin([c, "hybrid"])] for c in cc.MATCHED if c in set(metrics.method)]
    controls = [cc.compare(p, p.method[p.method != "hybrid"].iloc[0], resamples=999) for p in pairs]
    return "\n".join(conclude(summary, pd.concat(controls).query("method == 'hybrid'")))


def test_a_gain_is_called_better_and_the_controls_that_share_it_are_named(conclude):
    text = conclusion(conclude, table({"hybrid": 0.05, "layer_cam_shallow": 0.05, "times_other": 0.0}))
    assert "better than Grad-CAM on 4 of 4 endpoints" in text
    line = next(line for line in text.splitlines() if line.startswith("- energy, hybrid against its factors"))
    better, rest = line.split("better (")[1].split(")", 1)
    assert cc.label("times_other") in better and cc.label("layer_cam_shallow") not in better
    assert cc.label("layer_cam_shallow") in rest.split("no difference (")[1]


def test_with_the_columns_swapped_the_sentences_flip(conclude):
    metrics = table({"hybrid": 0.05, "layer_cam_shallow": 0.02})
    swapped = metrics.assign(method=metrics.method.replace({"hybrid": "grad_cam", "grad_cam": "hybrid"}))
    text = conclusion(conclude, swapped)
    assert "better than Grad-CAM on 0 of 4 endpoints" in text
    for metric, _ in KINDS:
        assert f"{metric.replace('_', ' ')} worse than Grad-CAM" in text


def test_null_data_says_no_difference(conclude):
    text = conclusion(conclude, table({"hybrid": 0.0, "layer_cam_shallow": 0.0}, n=30, spread=0.05))
    assert "better than Grad-CAM on 0 of 4 endpoints" in text
    assert text.count("no difference to Grad-CAM shown at n = 30") == 4 and "worse" not in text


def test_equal_maps_are_called_identical(conclude):
    text = conclusion(conclude, table({"hybrid": 0.0, "layer_cam_shallow": -0.1}, spread=0.0))
    assert text.count("identical to Grad-CAM on all 40 images") == 4 and "no difference to Grad-CAM" not in text


def test_the_verdict_needs_both_the_interval_and_the_corrected_p(conclude):
    """An interval without zero is not enough when the corrected p is above 0.05."""
    row = dict(metric="energy", identical=False, low=0.01, high=0.2, p=0.03, p_holm=0.06, difference=0.1)
    assert cc.judgement(row) == "better" and cc.judgement(row, "p_holm") == "no difference"
    assert cc.judgement({**row, "low": -0.01}) == "no difference"
    assert cc.judgement({**row, "metric": "deletion"}) == "worse"
