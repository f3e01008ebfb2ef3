"""How many pictures the network was asked about: the cost of a run that no machine changes.

Seconds are the machine's, pictures are ours. A picture is one image in one pass, whatever the size
of the batch. Finished groups of images that come from the cache count as they did when they were
scored, so that a run which was stopped and went on has the counts of one that was not. Pictures
that are known from a run with other settings do not count.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

NAMES = ("forward", "backward", "asked")
_counts: Counter[str] = Counter()


def forward(pictures: int) -> None:
    """Count pictures that went forward through a network."""
    _counts["forward"] += pictures
    _tell()


def backward(pictures: int) -> None:
    """Count pictures whose gradient was asked for, down to the input or to a layer only."""
    _counts["backward"] += pictures
    _tell()


def asked(pictures: int) -> None:
    """Count points of curves whose value was asked for. Points that show the same picture are
    scored once, so that `forward` is lower.
    """
    _counts["asked"] += pictures
    _tell()


def counts() -> dict[str, int]:
    """{"forward", "backward", "asked"}: the pictures of this process so far."""
    return {name: _counts[name] for name in NAMES}


def add(more: Mapping[str, int]) -> None:
    """Count what was counted before: by another process, or when what is cached was made."""
    _counts.update({name: int(more[name]) for name in NAMES})
    _tell()


def since(before: Mapping[str, int]) -> dict[str, int]:
    """What was counted after `counts` returned `before`."""
    return {name: number - before[name] for name, number in counts().items()}


def _tell() -> None:
    """Write the counts into the file that the runner names, for its progress bar and manifest."""
    file = os.environ.get("HYBRID_CAM_PROGRESS")
    if file:
        Path(file).write_text(json.dumps(counts()), "utf-8")
