"""Paired differences between methods, with their intervals, tests, and what these allow to say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

LOWER_IS_BETTER = {
    "deletion",
    "deletion_blocks",
    "deletion_fine",
    "drop",
    "class_spearman",
    "class_ssim",
}
RESAMPLED_AT_ONCE = 500_000  # numbers; SciPy holds up to 64 bytes for each
ROUNDING = (
    1e-6  # what float32 arithmetic in another order may change; a difference below it is none
)


def compare(metrics, reference: str = "grad_cam", seed: int = 0, resamples: int = 10_000):
    """Every method against the reference, paired by image: one row per metric, baseline and method.

    metrics: a table with columns image, method, metric, baseline, value. Returns n, mean,
    reference_mean, difference (mean of value minus the reference's), low and high (95 % BCa
    bootstrap interval of it), p (sign-flip permutation test of the mean; exact McNemar for values
    that are all 0 or 1), effect (mean over standard deviation of the differences), won (share of
    images strictly better; deletion: lower is better) and identical (every difference is zero:
    nothing to test, p and interval are empty). Efron 1987 for BCa; SciPy computes it. Interval, p,
    effect and won are those of the differences cut to whole multiples of ROUNDING, so that rounding
    errors break no ties. Raises ValueError when the reference is missing or an image lacks a
    method.
    """
    rows = []
    keys = ["metric", "baseline"]
    for (metric, baseline), part in metrics.groupby(keys, sort=False, dropna=False):
        wide = part.pivot(index="image", columns="method", values="value")
        if reference not in wide:
            raise ValueError(
                f"method {reference!r} has no values of {metric}: nothing to compare with."
            )
        if wide.isna().any(axis=None):
            raise ValueError(
                f"{metric}: not every image has a value for every method, so they cannot be paired."
            )
        base = wide[reference].to_numpy(float)
        for method in part.method.unique():
            value = wide[method].to_numpy(float)
            row = {"metric": metric, "baseline": baseline, "method": method, "n": len(wide)}
            row |= {"mean": value.mean(), "reference_mean": base.mean()}
            row |= {"difference": (value - base).mean()}
            row |= _paired_statistics(value, base, seed, resamples)
            row["reference"] = reference
            units = np.trunc((value - base) / ROUNDING)
            row["won"] = float(((units < 0) if metric in LOWER_IS_BETTER else (units > 0)).mean())
            rows.append(row)
    return pd.DataFrame(rows)


def _paired_statistics(value: np.ndarray, base: np.ndarray, seed: int, resamples: int) -> dict:
    """low, high, p, effect and identical of `compare`, from the values of a method and of its
    reference, (n,) each.
    """
    from scipy.stats import binomtest, bootstrap, permutation_test

    found = {"low": np.nan, "high": np.nan, "p": np.nan, "effect": np.nan}
    d = np.trunc((value - base) / ROUNDING)  # whole numbers: their sums tie alike on any machine
    found["identical"] = not d.any()
    if found["identical"] or len(d) < 2:
        return found
    settings = {"n_resamples": resamples, "rng": np.random.default_rng(seed)}
    settings["batch"] = max(1, RESAMPLED_AT_ONCE // len(d))  # the same draws, in less memory
    if np.ptp(d) > 1:  # a difference that is the same on all images has no spread
        found["effect"] = d.mean() / d.std(ddof=1)
        interval = bootstrap((d,), np.mean, method="BCa", **settings).confidence_interval
        found["low"] = interval.low * ROUNDING
        found["high"] = interval.high * ROUNDING
    if set(np.unique([value, base])) <= {0.0, 1.0}:
        found["p"] = binomtest(int((d > 0).sum()), int((d != 0).sum())).pvalue
    else:
        settings["rng"] = np.random.default_rng(seed)
        test = permutation_test((d,), np.mean, permutation_type="samples", **settings)
        found["p"] = test.pvalue
    return found


def holm(p: Sequence[float]) -> np.ndarray:
    """Holm's step-down adjusted p-values (Scand. J. Statist., 1979); NaN stays NaN and is not
    counted.
    """
    p = np.asarray(p, dtype=float)
    order = [i for i in np.argsort(p) if not np.isnan(p[i])]
    adjusted = np.full(len(p), np.nan)
    running = 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(order) - rank) * p[i]))
        adjusted[i] = running
    return adjusted


def judgement(row: Mapping, p_column: str = "p") -> str:
    """ "better", "worse", "no difference" or "identical": what a row of `compare` allows to say of
    its method against its reference. "better" and "worse" need an interval without zero and p <
    0.05.
    """
    if _is_identical(row):
        return "identical"
    if not (row["low"] > 0 or row["high"] < 0) or not row[p_column] < 0.05:
        return "no difference"
    higher = row["difference"] > 0
    return "better" if higher != (row["metric"] in LOWER_IS_BETTER) else "worse"


def _is_identical(row: Mapping) -> bool:
    """Whether every difference is zero; tables that lack the column, read from a file, show it by
    an empty p.
    """
    if "identical" in row:
        return bool(row["identical"])
    return bool(np.isnan(row["p"]) and abs(row["difference"]) < ROUNDING)
