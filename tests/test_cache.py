"""Finished work is kept and found again, and only as long as it is what today's code would make."""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest

import cam_core as cc
import cam_inputs

# ------------------------------------------------------------------------------------------------------------- cached

RECORDS = [
    {"image": "ä_01", "value": 0.1 + 0.2, "n": 3, "hit": True, "baseline": "", "missing": None},
    {"image": "b", "value": math.nan, "curve": [1 / 3, math.pi * 1e-300, 5e-324, -0.0, math.inf, -math.inf]},
    {"image": "c", "value": float(np.float32(0.1)), "drawn": np.random.default_rng(0).random(3).tolist()},
]


def exactly(records) -> list:
    """Records in a form that `==` compares to the last bit and by type; NaN equals NaN."""
    if isinstance(records, dict):
        return [(k, exactly(v)) for k, v in records.items()]
    if isinstance(records, list):
        return [exactly(v) for v in records]
    return [type(records).__name__, records.hex() if isinstance(records, float) else records]


def maker(records):
    def make():
        make.calls += 1
        return records

    make.calls = 0
    return make


def test_made_once_and_read_back_exactly(tmp_path):
    make, key = maker(RECORDS), {"method": "hybrid", "ids": ["a", "b"], "alpha": 0.5, "file": tmp_path}
    first = cc.cached(tmp_path / "new" / "folder", key, make)
    again = cc.cached(str(tmp_path / "new" / "folder"), dict(reversed(key.items())), make)  # the order does not matter
    assert make.calls == 1 and exactly(first) == exactly(again) == exactly(RECORDS)
    (file,) = (tmp_path / "new" / "folder").iterdir()
    assert json.loads(file.read_text(encoding="utf-8"))["key"]["method"] == "hybrid"  # a person can tell what it is


def test_what_comes_back_the_first_time_is_what_comes_back_later(tmp_path):
    """Tuples become lists and keys strings in the file: not only from the second call on."""
    make = maker([{"pair": (1, 2), 3: "three"}, {"value": np.float64(0.1)}])
    first, again = (cc.cached(tmp_path, {"k": 1}, make) for _ in range(2))
    assert exactly(first) == exactly(again) and first[0] == {"pair": [1, 2], "3": "three"}


def test_another_key_is_another_file(tmp_path):
    keys = [{"a": 1}, {"a": 2}, {"b": 1}, {"a": 1, "b": None}, {"a": 1.5}, {"a": "1"}, {"a": [1]}, {"a": {"b": 1}}, {}]
    for k, key in enumerate(keys):
        assert cc.cached(tmp_path, key, maker([{"k": k}])) == [{"k": k}]
    assert len(list(tmp_path.iterdir())) == len(keys)
    for k, key in enumerate(keys):
        assert cc.cached(tmp_path, key, maker([])) == [{"k": k}]
    assert cc.cached(tmp_path / "other", keys[0], maker([])) == []  # of this folder alone


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
def test_nothing_is_left_of_what_failed(tmp_path, error):
    def broken():
        raise error("halfway")

    for _ in range(2):
        with pytest.raises(error, match="halfway"):
            cc.cached(tmp_path, {"k": 1}, broken)
        assert not list(tmp_path.iterdir())
    assert cc.cached(tmp_path, {"k": 1}, maker(RECORDS[:1])) == RECORDS[:1]


def test_records_that_are_not_plain_leave_nothing(tmp_path):
    with pytest.raises(TypeError, match="float32"):
        cc.cached(tmp_path, {"k": 1}, maker([{"value": np.float32(0.1)}]))
    assert not list(tmp_path.iterdir())


def test_a_write_that_is_cut_off_does_not_count(tmp_path, monkeypatch):
    """A full disk or a stop while the file is written: what lies there is not taken for a result."""
    write = cc.Path.write_text

    def half(self, text, *args, **kwargs):
        write(self, text[: len(text) // 2], *args, **kwargs)
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cc.Path, "write_text", half)
        with pytest.raises(OSError, match="No space"):
            cc.cached(tmp_path, {"k": 1}, maker(RECORDS))
    assert not list(tmp_path.glob("*.json"))
    make = maker(RECORDS)
    assert exactly(cc.cached(tmp_path, {"k": 1}, make)) == exactly(RECORDS) and make.calls == 1
    assert len(list(tmp_path.glob("*.json"))) == 1


CHILD = """
import sys, time
import core_copy as cc

print(cc.code_hash(cc.capture, cc.method_maps, cc.faithfulness), flush=True)

def shard(k):
    print(k, flush=True)
    if k == 2:
        time.sleep(600)
    return [{"shard": k, "value": k / 3}]

for k in range(4):
    cc.cached("shards", {"shard": k, "code": "one"}, lambda: shard(k))
"""


@pytest.fixture(scope="module")
def source(repo):
    return (repo / "cam_core.py").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def killed(tmp_path_factory, source, repo):
    """What another process said before it was killed in its third shard, and the folder where it worked."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "core_copy.py").write_text(source, encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "7", "PYTHONPATH": str(repo)}
    command = [sys.executable, "-c", CHILD]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder)
    try:
        said = [child.stdout.readline().strip() for _ in range(4)]  # now it sleeps
    finally:
        child.kill()
        child.communicate()
    return said, folder


def test_a_killed_process_loses_only_the_shard_it_was_at(killed):
    said, folder = killed
    assert said[1:] == ["0", "1", "2"] and len(list((folder / "shards").glob("*.json"))) == 2
    made = []

    def shard(k):
        made.append(k)
        return [{"shard": k, "value": k / 3}]

    found = [cc.cached(folder / "shards", {"shard": k, "code": "one"}, lambda k=k: shard(k)) for k in range(4)]
    assert made == [2, 3] and found == [[{"shard": k, "value": k / 3}] for k in range(4)]


# -------------------------------------------------------------------------------------------------------- code_hash


@pytest.fixture
def core(tmp_path, monkeypatch):
    """Load a text as a module: core(source) -> cam_core as it would be."""
    count = iter(range(100))

    def load(text, name="core_copy"):
        file = tmp_path / f"{name}_{next(count)}.py"
        file.write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, file)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


def work(core) -> str:
    """Of what a measurement runs."""
    return core.code_hash(core.capture, core.method_maps, core.faithfulness)


def function(source: str, name: str) -> ast.FunctionDef:
    return next(n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == name)


def with_line(source: str, name: str, line: str) -> str:
    """The source with a line before the first statement of a function, behind its docstring."""
    body = function(source, name).body
    first = body[1] if isinstance(body[0], ast.Expr) and len(body) > 1 else body[0]
    lines = source.splitlines(keepends=True)
    return "".join([*lines[: first.lineno - 1], f"    {line}\n", *lines[first.lineno - 1 :]])


def with_docstring(source: str, name: str, text: str) -> str:
    old = function(source, name).body[0]
    lines = source.splitlines(keepends=True)
    return "".join([*lines[: old.lineno - 1], f'    """{text}"""\n', *lines[old.end_lineno :]])


def replaced(source: str, old: str, new: str) -> str:
    assert source.count(old) == 1, old
    return source.replace(old, new)


def test_fingerprint_of_equal_code_is_equal(core, source):
    found = work(core(source))
    assert found == work(core(source)) == work(core("# moved down\n\n\n" + source)) and len(found) == 64
    module = core(source)
    assert found == module.code_hash(module.faithfulness, module.method_maps, module.capture)
    assert found != module.code_hash(module.method_maps)


def test_words_do_not_change_it(core, source):
    changed = with_docstring(source, "method_maps", "Maps, and not a word more.")
    changed = with_docstring(changed, "grad_cam", "eq. 1")
    changed = with_docstring(changed, "_generator", "draws")
    changed = with_line(with_line(changed, "normalise", "# of interest to nobody"), "blur", "")
    assert changed != source and work(core(changed)) == work(core(source))


@pytest.mark.parametrize(
    "name",
    ["method_maps", "perturbation_curves", "layer_cam", "sobel_edges", "floored"]  # named, or reached through a table
    + [
        "normalise",
        "_generator",
        "probabilities",
        "_eval_mode",
        "_logits",
        "_targets",
        "_borrowed",
    ],  # two or three away
)
def test_code_that_is_reached_changes_it(core, source, name):
    assert work(core(with_line(source, name, "unused = 1"))) != work(core(source))


@pytest.mark.parametrize("name", ["explain", "overlay", "compare", "save_table", "panel", "similarity", "cached"])
def test_code_that_is_not_reached_does_not(core, source, name):
    assert work(core(with_line(source, name, "unused = 1"))) == work(core(source))


@pytest.mark.parametrize(
    ("old", "new"), [("\nFLOOR = 0.1 ", "\nFLOOR = 0.2 "), ("PRIOR_ALPHA = 0.7", "PRIOR_ALPHA = 0.6")]
)
def test_constants_change_it(core, source, old, new):
    assert work(core(replaced(source, old, new))) != work(core(source))


def test_a_tuple_is_a_constant_too(core, source):
    one, other = core(source), core(source + "\n\nMEAN = (0.5, 0.456, 0.406)\n")
    assert one.code_hash(one.baselines) != other.code_hash(other.baselines)
    assert one.code_hash(one.auc) == other.code_hash(other.auc)


def test_code_of_the_module_that_reads_files_counts(monkeypatch):
    before = cc.code_hash(cc.load_masks), cc.code_hash(cc.auc)
    monkeypatch.setattr(cam_inputs, "read_image", cam_inputs.preprocess)
    assert cc.code_hash(cc.load_masks) != before[0] and cc.code_hash(cc.auc) == before[1]


def register(text: str) -> str:
    return f"\n\n{text}\n\nCAMS['mine'] = mine\n"


def test_a_registered_cam_changes_it(core, source):
    """Its being there, its code, and what it reaches."""
    mine = "def shift(A):\n    return A + 1\n\n\ndef mine(A, G):\n    return (shift(A) * G).relu().sum(1)"
    texts = [source, source + register(mine)]
    texts += [source + register(mine.replace(*change)) for change in (("relu", "abs"), ("A + 1", "A + 2"))]
    assert len({work(core(text)) for text in texts}) == 4
    told = mine.replace("    return (shift", '    """Mine."""\n    # really\n    return (shift')
    assert work(core(source + register(told))) == work(core(texts[1]))


def test_a_cam_of_another_module_changes_it(core, source):
    """`import mycams; cc.CAMS["mine"] = mycams.mine`: a change in the user's own file counts, wherever it is in it."""
    mine = "SCALE = 2\n\n\ndef helper(A):\n    return A * SCALE\n\n\n"
    mine += "def mine(A, G):\n    return (helper(A) * G).relu().sum(1)\n"
    found, module = [], core(source)
    found.append(work(module))
    for text in (
        mine,
        mine.replace("relu()", "abs()"),
        mine.replace("A * SCALE", "A / SCALE"),
        mine.replace("= 2", "= 3"),
    ):
        module.CAMS["mine"] = core(text, "mycams").mine
        found.append(work(module))
    assert len(set(found)) == 5
    module.CAMS["mine"] = core("# mine\n" + mine, "mycams").mine
    assert work(module) == found[1]


def test_a_rule_of_ones_own_changes_it(core, source):
    text = source + "\n\nFUSIONS['mine'] = lambda a, b, alpha: alpha * a * b\n"
    assert len({work(core(t)) for t in (source, text, text.replace("alpha * a", "a / alpha"))}) == 3


def test_each_of_several_lambdas_counts(core, source):
    """All are called <lambda>. Also where they stand inside of an expression, which is no statement by itself."""
    text = source + "\n\nCAMS['a'] = lambda A, G: A.mean(1)\nCAMS['b'] = lambda A, G: G.mean(1)\n"
    texts = [source, text, text.replace("A.mean(1)", "A.amax(1)"), text.replace("G.mean(1)", "G.amax(1)")]
    assert len({work(core(t)) for t in texts}) == 4
    text = source + "\n\nCAMS.update({\n    'a': lambda A, G: A.mean(1),\n    'b': lambda A, G: G.mean(1),\n})\n"
    texts = [source, text, text.replace("A.mean(1)", "A.amax(1)"), text.replace("G.mean(1)", "G.amax(1)")]
    assert len({work(core(t)) for t in texts}) == 4


def test_which_name_holds_which_cam_counts(core, source):
    swapped = "\n\nCAMS['hires_cam'], CAMS['xgrad_cam'] = CAMS['xgrad_cam'], CAMS['hires_cam']\n"
    assert work(core(source + swapped)) != work(core(source))


def test_a_function_of_a_cell_that_has_the_name_of_one_here(core, source):
    """A notebook's own `grad_cam` neither hides the one here nor is hidden by it."""
    module = core(source)
    text = "def grad_cam(A, G):\n    return A.sum(1)\n"
    one, other = (core(t, "cells").grad_cam for t in (text, text.replace("A.sum", "G.sum")))
    found = [work(module)]
    for cam in (one, other):
        module.CAMS["mine"] = cam
        found.append(work(module))
    assert len(set(found)) == 3
    changed = core(with_line(source, "grad_cam", "unused = 1"))
    changed.CAMS["mine"] = other
    assert work(changed) not in found


def test_values_bound_in_a_closure_count(core, source):
    made = "\n\ndef make(k):\n    def mine(A, G):\n        return A.sum(1) * k\n\n    return mine\n"
    made += "\n\nCAMS['mine'] = make(2)\n"
    assert work(core(source + made)) != work(core(source + made.replace("make(2)", "make(3)")))


def test_another_process_finds_the_same(killed, core, source):
    """Whatever the order of sets and the addresses of objects."""
    assert killed[0][0] == work(core(source))
