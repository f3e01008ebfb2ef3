"""Shared by the tests."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# How many cases test_properties.py generates: the same few each time, or, with
# HYPOTHESIS_PROFILE=long, other ones each time and many, of which hypothesis keeps a failing one
# (in .hypothesis/) and prints it.
settings.register_profile("short", max_examples=20, derandomize=True, deadline=None, database=None)
settings.register_profile("long", max_examples=1000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))


@pytest.fixture(scope="session")
def repo():
    """The root of this repository."""
    return Path(__file__).resolve().parents[1]
