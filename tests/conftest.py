"""Shared by the tests."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def repo():
    """The root of this repository."""
    return Path(__file__).resolve().parents[1]
