"""What a study stands on: networks, data sets, training, figures, runs. Nothing here knows of
`cam_core`.

Rooms, from the ground up: `pictures` (a file or array as an image), `heads` (what a network's
output means), `networks` (loading, preprocessing), `folders` (a folder as a table), `datasets`
(what is done with such a table), `drawing` (the synthetic tissue), `ledger` (pictures counted),
`machine` (what it can do), `training`, `figures`, `settings` (params/default.yaml) and `runs` (a
run's folder, its files, the cache). Notebooks reach them through the shared module, as in
`cc.datasets.read(...)`.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]  # the repository
RUN_ID = os.environ.get(
    "HYBRID_CAM_RUN", "interactive"
)  # the runner sets it; every file that a run writes carries it


def nearest(name: str, known: Sequence[str] | Mapping[str, str], most: int = 60) -> str:
    """The words nearest to a wrong one, and the known ones (with what a mapping says of them), for
    an error message.
    """
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.4)
    about = known if isinstance(known, Mapping) else {}
    top = [f"{k} ({about[k]})" if k in about else k for k in known if k.count(".") < 2][:most]
    return (
        f"Nearest: {', '.join(close)}. " if close else ""
    ) + f"Known: {', '.join(top)}{', ...' if len(known) > len(top) else ''}"


def sha256(file: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def words(text: str) -> list[str]:
    """The parts of a parameter that holds several: "a, b" -> ["a", "b"]."""
    return [part.strip() for part in text.split(",") if part.strip()]
