"""About how long a run will take on this machine, and how much of it is left."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence

# Seconds on two cores with the parameters of params/default.yaml, and what `speed` gave there.
SECONDS = {"01": 45, "02": 45, "03": 30, "04": 110, "05": 165}
SPEED_THEN = 60.0


def speed() -> float:
    """How fast this machine multiplies matrices, in 10^9 multiplications and additions a second: on
    one core, times their number. What else runs on it now does not count.
    """
    import numpy as np

    side = 768
    matrix = np.ones((side, side), np.float32)
    matrix @ matrix  # the first time is slower
    begin = time.process_time()
    for _ in range(4):
        matrix @ matrix
    return 4 * 2e-9 * side**3 / (time.process_time() - begin) * os.cpu_count()


class Clock:
    """The seconds that each notebook is expected to take, corrected by those that are done.

    here: {notebook: its entry in the manifest} of an earlier run into the same folder on this
    machine. elsewhere: the same of the reference run with the same parameter file, if there is one.
    n_images: how many are asked for.
    """

    def __init__(self, chosen: Sequence[str], here: Mapping, elsewhere: Mapping, n_images: int):
        slower = 1.0 if set(chosen) <= set(here) else SPEED_THEN / speed()
        self.expected = {}
        for stem in chosen:
            if stem in here:
                seconds = here[stem]["seconds"] * _more_images(here[stem], n_images)
            elif stem in elsewhere:
                seconds = (
                    elsewhere[stem]["seconds"] * _more_images(elsewhere[stem], n_images) * slower
                )
            else:
                seconds = SECONDS.get(stem[:2], 60) * slower
            self.expected[stem] = seconds
        self.left = dict(self.expected)
        self.spent = 0.0

    def done(self, stem: str, seconds: float) -> None:
        """Note how long a notebook took."""
        self.spent += seconds
        del self.left[stem]

    def seconds_left(self) -> float:
        """The seconds expected for what is not done, at the pace of what is."""
        finished = sum(self.expected.values()) - sum(self.left.values())
        pace = self.spent / finished if finished else 1.0
        return pace * sum(self.left.values())


def _more_images(entry: Mapping, n_images: int) -> float:
    """How many times as many images are asked for now as in a run before; 1 where either asked for
    all of them.
    """
    before = entry["parameters"].get("n_images", 0)
    return n_images / before if n_images and before else 1.0


def in_words(seconds: float) -> str:
    """A duration as one says it: "20 s", "6 min", "1.5 h"."""
    if seconds < 90:
        return f"{10 * max(1, round(seconds / 10))} s"
    if seconds < 90 * 60:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"
