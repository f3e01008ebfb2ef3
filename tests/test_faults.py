"""A full disk, files that may not grow or be written, and what killed runs leave in the cache: the quick part of
tests/faults.py, which breaks real runs and is started by hand. Kills, Ctrl-C and kernels that die: test_pipeline.py.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from test_pipeline import contents, make_repository, manifest, run

import cam_core as cc


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A small repository with results that must survive: made by a run in all but the notebooks' outputs."""
    root = make_repository(tmp_path_factory.mktemp("faults") / "repo")
    target = root / "results/default"
    (target / "tables").mkdir(parents=True)
    (target / "tables/01_data.csv").write_text("a\n1\n" * 500)
    files = {"tables/01_data.csv": {"notebook": "01_data"}}
    content = {"run": "old", "files": files, "notebooks": {"01_data": {"run": "old"}}}
    (target / "manifest.json").write_text(json.dumps(content))
    return root


def broken(root, *words, wrap=(), out=subprocess.DEVNULL):
    """(exit code, what was said) of a run that meets a fault; the results in place must be as before."""
    before = contents(root / "results/default")
    command = [*wrap, sys.executable, str(root / "pipeline.py"), *words]
    done = subprocess.run(command, cwd=root, stdout=out, stderr=subprocess.PIPE, text=True)
    assert contents(root / "results/default") == before, "neither the old results nor the new ones"
    return done.returncode, done.stderr


def limited(kib):
    return ["bash", "-c", f'ulimit -f {kib}; exec "$@"', "bash"]


@pytest.mark.parametrize("kib", [1, 4], ids=["while old results are copied", "while a page is written"])
def test_a_file_that_cannot_be_written_stops_the_run_and_the_next_one_completes(root, tmp_path, kib):
    code, said = broken(root, "--only", "04", wrap=limited(kib))
    assert code == 1 and "File too large" in said and "Make room" in said and "Traceback" not in said, said
    assert list((root / "results").glob("*.unfinished-*")), "what was done so far is left for a look"
    if kib == 4:
        kept = shutil.copytree(root / "results/default", tmp_path / "kept")
        done = run(root, "--only", "04")
        assert done.returncode == 0 and set(manifest(root / "results/default")["notebooks"]) == {"01_data", "04_choice"}
        assert sorted(path.name for path in (root / "results").iterdir()) == [".default.lock", "default"]
        shutil.rmtree(root / "results/default")
        shutil.copytree(kept, root / "results/default")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_a_full_disk_behind_the_terminal(root):
    with open("/dev/full", "w") as full:
        code, said = broken(root, "--only", "04", out=full)
    assert code != 0 and "stopped by [Errno 28] No space left" in said and "Traceback" not in said, said


def test_a_folder_without_permission_is_refused_before_anything_runs(root):
    """Root may write everywhere, so where the tests run as root it gives this power away first."""
    wrap = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    if wrap and not shutil.which("setpriv"):
        pytest.skip("there is no setpriv here")
    locked = root / "results/locked"
    locked.mkdir(mode=0o555)
    try:
        code, said = broken(root, "--only", "04", "--results-dir", str(locked / "mine"), wrap=wrap)
    finally:
        locked.rmdir()
    assert code == 2 and said.splitlines() == [said.strip()]
    assert "results_dir: [Errno 13] Permission denied" in said and "locked" in said


# ---- the cache


def fresh_part(folder, key):
    text = json.dumps(key, sort_keys=True)
    return folder / f"{cc.hashlib.sha256(text.encode()).hexdigest()[:32]}.{os.getpid()}.part"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_a_full_disk_leaves_no_shard_and_no_part_of_one(tmp_path):
    fresh_part(tmp_path, {"k": 1}).symlink_to("/dev/full")
    with pytest.raises(OSError) as raised:
        cc.cached(tmp_path, {"k": 1}, lambda: [{"a": 1}])
    assert raised.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())
    assert cc.cached(tmp_path, {"k": 1}, lambda: [{"a": 2}]) == [{"a": 2}]


def test_parts_left_by_killed_runs_are_never_read_and_go_away(tmp_path):
    """Those an hour old: a younger one may be another run's that is writing it this moment."""
    old, young, result = tmp_path / "a.1.part", tmp_path / "b.2.part", tmp_path / "c.json"
    for path in (old, young, result):
        path.write_text('{"key": {"k": 1}, "records": [{"a"')
    for path in (old, result):
        os.utime(path, (time.time() - 3700,) * 2)
    assert cc.cached(tmp_path, {"k": 1}, lambda: [{"a": 1}]) == [{"a": 1}]
    assert not old.exists() and young.exists() and result.exists() and len(list(tmp_path.iterdir())) == 3
