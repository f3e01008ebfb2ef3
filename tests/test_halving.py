"""Successive halving, on full curves that were recorded before: does it find the best candidate?"""

import numpy as np
import pandas as pd
import pytest

import cam_core as cc
from runner import speed


@pytest.mark.parametrize("name", speed.RECORDED)
def test_it_finds_the_winner_of_an_exhaustive_search_or_one_as_good(name):
    loss = speed.losses(speed.recorded(name))
    assert loss.mean() < 0.001
    assert (loss < 1e-6).mean() > 0.9, "the winner itself"


def test_few_points_of_few_candidates_are_asked_for():
    asked = []

    def measure(left, points):
        asked.append((points, len(left)))
        return pd.Series(np.arange(len(left), dtype=float))  # the last is always the best

    assert cc.successive_halving(range(144), measure)[0] != 0
    assert asked == [(2, 144), (6, 36), (0, 6)]


def test_of_equal_candidates_the_first_wins_and_few_are_measured_at_once():
    def flat(left, points):
        assert points == 0
        return pd.Series(np.full(len(left), 0.5) + 1e-9 * np.arange(len(left)))

    assert cc.successive_halving("abcdef", flat) == list("abcdef")
