"""A bar for each notebook, on a terminal: the pictures that it has scored, and the time left."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runner import estimate

PAUSE = 1  # second between two looks


def counts(file: Path) -> dict[str, int]:
    """The pictures that a kernel has counted so far, see `lab.ledger`; {} while there is no such
    file, or half of one.
    """
    try:
        return json.loads(file.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


@contextmanager
def bar(stem: str, expected: estimate.Expected | None, file: Path) -> Iterator[None]:
    """Show what the kernel writes into a file while the block runs; nothing without a terminal."""
    file.unlink(missing_ok=True)
    if not sys.stderr.isatty():
        yield
        return
    from tqdm import tqdm

    over = threading.Event()
    total = expected.pictures if expected else None
    form = "{desc}: {bar:20} {n_fmt} of {total_fmt} pictures{postfix}"
    shown = tqdm(desc=stem, total=total, bar_format=form if expected else None, leave=False)

    def watch() -> None:
        begin = time.monotonic()
        while not over.wait(PAUSE):
            shown.n = counts(file).get("forward", shown.n)
            if expected:
                shown.total = max(total, shown.n)
                seconds = estimate.left(expected, shown.n, time.monotonic() - begin)
                shown.set_postfix_str(f"about {estimate.in_words(seconds)} left", refresh=False)
            shown.refresh()

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    finally:
        over.set()
        watching.join()
        shown.close()
