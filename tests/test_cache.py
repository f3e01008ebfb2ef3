"""Finished work is kept and found again, and only as long as today's code would make it."""

from __future__ import annotations

import importlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

import cam_core as cc

# ---- cached

RECORDS = [
    {"image": "ä_01", "value": 0.1 + 0.2, "n": 3, "hit": True, "baseline": "", "missing": None},
    {"image": "b", "value": math.nan, "curve": [1 / 3, math.pi * 1e-300, 5e-324, -0.0, -math.inf]},
]


def exactly(records):
    """Records in a form that `==` compares to the last bit and by type; NaN equals NaN."""
    if isinstance(records, dict):
        return [(k, exactly(v)) for k, v in records.items()]
    if isinstance(records, list):
        return [exactly(v) for v in records]
    return type(records), records.hex() if isinstance(records, float) else records


class Maker:
    """A function without arguments that counts its calls."""

    def __init__(self, records):
        self.records, self.calls = records, 0

    def __call__(self):
        self.calls += 1
        return self.records


def test_made_once_and_read_back_exactly(tmp_path):
    make, folder = Maker(RECORDS), tmp_path / "new" / "folder"
    key = {"method": "hybrid", "ids": ["a", "b"], "alpha": 0.5, "file": tmp_path}
    first = cc.runs.cached(folder, key, make)
    again = cc.runs.cached(str(folder), dict(reversed(key.items())), make)  # in any order
    assert make.calls == 1 and exactly(first) == exactly(again) == exactly(RECORDS)
    (file,) = folder.iterdir()
    content = json.loads(file.read_text("utf-8"))
    assert content["key"]["method"] == "hybrid"  # a person can tell what it is


def test_what_comes_back_the_first_time_is_what_comes_back_later(tmp_path):
    """In the file tuples are lists and keys are strings, so they are from the first call on."""
    make = Maker([{"pair": (1, 2), 3: "three"}])
    for _ in range(2):
        assert cc.runs.cached(tmp_path, {"k": 1}, make) == [{"pair": [1, 2], "3": "three"}]


def test_another_key_is_another_file(tmp_path):
    keys = [{"a": 1}, {"a": 2}, {"b": 1}, {"a": 1, "b": None}, {"a": 1.5}, {"a": "1"}, {}]
    for k, key in enumerate(keys):
        assert cc.runs.cached(tmp_path, key, Maker([{"k": k}])) == [{"k": k}]
    for k, key in enumerate(keys):
        assert cc.runs.cached(tmp_path, key, Maker([])) == [{"k": k}]
    assert cc.runs.cached(tmp_path / "other", keys[0], Maker([])) == []  # of this folder alone


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
def test_what_is_stopped_loses_only_the_part_it_was_at(tmp_path, error):
    made = []

    def part(k):
        if k == 2 and not made.count(2):
            made.append(k)
            raise error("halfway")
        made.append(k)
        return [{"part": k}]

    def all_parts():
        return [cc.runs.cached(tmp_path, {"k": k}, lambda k=k: part(k)) for k in range(4)]

    with pytest.raises(error, match="halfway"):
        all_parts()
    assert len(list(tmp_path.iterdir())) == 2
    assert all_parts() == [[{"part": k}] for k in range(4)]
    assert made == [0, 1, 2, 2, 3]


def test_records_that_are_not_plain_leave_nothing(tmp_path):
    with pytest.raises(TypeError, match="float32"):
        cc.runs.cached(tmp_path, {"k": 1}, Maker([{"value": np.float32(0.1)}]))
    assert not list(tmp_path.iterdir())


def test_a_write_that_is_cut_off_does_not_count(tmp_path, monkeypatch):
    """A full disk, or a stop while the file is written: what lies there is taken for no result."""
    write = Path.write_bytes

    def half(self, content):
        write(self, content[: len(content) // 2])
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        with pytest.raises(OSError, match="No space"):
            cc.runs.cached(tmp_path, {"k": 1}, Maker(RECORDS))
    assert not list(tmp_path.glob("*.json"))
    assert exactly(cc.runs.cached(tmp_path, {"k": 1}, Maker(RECORDS))) == exactly(RECORDS)


# ---- code_hash


@pytest.fixture
def copy(repo, tmp_path, monkeypatch):
    """A copy of the code, which may be changed."""
    shutil.copy(repo / "cam_core.py", tmp_path)
    shutil.copytree(repo / "lab", tmp_path / "lab")
    monkeypatch.setattr(cc.runs, "HOME", tmp_path)
    return tmp_path


def test_the_hash_is_that_of_the_code_that_decides(copy, monkeypatch):
    before = cc.runs.code_hash()
    monkeypatch.undo()
    assert cc.runs.code_hash() == before  # wherever it lies
    monkeypatch.setattr(cc.runs, "HOME", copy)
    for file in ("cam_core.py", "lab/networks.py", "lab/datasets.py"):
        text = (copy / file).read_text("utf-8")
        (copy / file).write_text(text + "\nUNUSED = 1\n", "utf-8")
        assert cc.runs.code_hash() != before, file
        (copy / file).write_text(text, "utf-8")
    assert cc.runs.code_hash() == before
    figures = copy / "lab" / "figures.py"
    figures.write_text(figures.read_text("utf-8") + "\nUNUSED = 1\n", "utf-8")
    assert cc.runs.code_hash() == before  # colours change no number


MINE = """
def helper(A):
    return A + 1

def mine(A, G):
    return (helper(A) * G).relu().sum(1)
"""


def test_a_cam_or_a_rule_of_ones_own_counts_with_all_that_its_file_holds(tmp_path, monkeypatch):
    hashes = [cc.runs.code_hash()]
    for k, text in enumerate([MINE, MINE.replace("relu", "abs"), MINE.replace("A + 1", "A + 2")]):
        (tmp_path / f"mine_{k}.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        hashes.append(cc.runs.code_hash(importlib.import_module(f"mine_{k}").mine))
    assert len(set(hashes)) == 4
    assert cc.runs.code_hash(cc.grad_cam, cc.product) == hashes[0]  # it is in cam_core's file
