"""Measuring on a Dask cluster: a real scheduler and two workers, on the loopback and without a dashboard."""

import hashlib
import os
import signal
import socket
import subprocess
import sys
import time

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from nets import tiny
from PIL import Image

import cam_cluster
import cam_core as cc

try:
    import distributed
except ImportError:
    distributed = None
needs_dask = pytest.mark.skipif(distributed is None, reason="pip install -r requirements-cluster.txt")


@pytest.fixture(scope="module", autouse=True)
def by_value():
    """What is defined in this file reaches the workers as what a notebook defines does."""
    if distributed:
        import cloudpickle

        cloudpickle.register_pickle_by_value(sys.modules[__name__])


def measure(net, rows, count, extra):
    """A little of what notebook 05 measures; sleeps where it is told to, so that there is time to kill a worker."""
    time.sleep(net["pause"])
    x = cc.load_batch(rows, size=32)
    target = net["model"](x).argmax(1)
    shot = cc.capture(net["model"], x, "6", target)
    maps = {name: cc.cam_at(shot, cam, "6", (32, 32)) for name, cam in list(cc.CAMS.items())}
    maps = {name: m[:count] for name, m in maps.items()}
    found = cc.faithfulness(net["model"], x[:count], maps, target[:count], list(rows["id"][:count]),
                            *cc.baselines(x[:count], "rise"), steps=6)  # fmt: skip
    return [
        dict(image=i, method=m, metric=metric, value=float(v), extra=k < extra, process=os.getpid())
        for metric, curves in found.items()
        for m, curve in curves.items()
        for k, (i, v) in enumerate(zip(rows["id"], cc.auc(curve), strict=False))
    ]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for k in range(22):
        Image.fromarray(rng.integers(0, 255, (40, 36, 3), np.uint8)).save(folder / f"i{k:02}.png")
    return cc.read_dataset(folder)


@pytest.fixture
def study(table):
    net = dict(arch="tiny", weights="of seed 0", pause=0.0, model=tiny(0))

    def run(folder, scheduler="", size=2, pause=0.0):
        shards, keys = [], []
        for begin in range(0, len(table), size):
            take = table.iloc[[(begin + k) % len(table) for k in range(size + 1)]]
            shards.append((take, min(size, len(table) - begin), 1))
            keys.append({"images": list(take["id"]), "size": size})
        records = cam_cluster.measured(measure, net | {"pause": pause}, shards, keys, folder, scheduler)
        return pd.DataFrame(records)

    return run


def same(found, expected):
    pd.testing.assert_frame_equal(found.drop(columns="process"), expected.drop(columns="process"), check_exact=True)


@pytest.fixture(scope="module")
def scheduler():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen([*command, "--no-dashboard"], stderr=subprocess.DEVNULL)
    yield f"tcp://127.0.0.1:{port}"
    process.kill()
    process.wait()


@pytest.fixture
def workers(scheduler, tmp_path):
    """Two workers, which start where there is no cam_core to import: it has to come from the client."""
    command = [sys.executable, "-m", "distributed.cli.dask_worker", scheduler, "--host", "127.0.0.1", "--nthreads", "1"]
    command += ["--no-dashboard", "--no-nanny", "--local-directory", str(tmp_path)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    found = [subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL) for _ in range(2)]
    with distributed.Client(scheduler, timeout=30, set_as_default=False) as client:
        client.wait_for_workers(2, timeout=60)
    yield found
    for process in found:
        process.kill()
        process.wait()
    with distributed.Client(scheduler, timeout=30, set_as_default=False) as client:
        end = time.monotonic() + 20
        while client.nthreads() and time.monotonic() < end:
            time.sleep(0.05)


@needs_dask
def test_two_workers_give_the_bytes_of_a_local_run_also_when_one_is_killed(study, scheduler, workers, tmp_path):
    here = study(tmp_path / "here")
    there = study(tmp_path / "there", scheduler)
    same(there, here)
    assert set(there.process) == {w.pid for w in workers} and set(here.process) == {os.getpid()}
    stop = cam_cluster.cc.cached
    written = []

    def kill_one(folder, key, make):
        written.append(tuple(key["images"]))
        if len(written) == 3:
            os.kill(workers[0].pid, signal.SIGKILL)
        return stop(folder, key, make)

    cam_cluster.cc.cached = kill_one
    try:
        survived = study(tmp_path / "killed", scheduler, pause=0.2)
    finally:
        cam_cluster.cc.cached = stop
    workers[0].wait(10)
    same(survived, here)
    assert survived.groupby(["method", "metric"]).image.apply(lambda images: images.is_unique).all()
    assert sorted(written) == sorted(set(written)) and len(written) == 11, "each shard is written once"
    assert workers[0].pid in set(survived.process), "it was in the middle of its work"


@needs_dask
def test_a_cam_of_ones_own_is_measured_there_too_with_the_clients_threads(
    study, scheduler, workers, tmp_path, monkeypatch
):
    monkeypatch.setattr(cc, "CAMS", {"mine": lambda A, G: (A * G.abs()).sum(1).relu()})
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)  # a worker that kept its own number would refuse the work
    try:
        assert set(study(tmp_path, scheduler).method) == {"mine"}
    finally:
        torch.set_num_threads(threads)


@needs_dask
def test_other_versions_and_threads_are_refused_by_name(study, scheduler, workers, tmp_path, monkeypatch):
    from distributed import versions

    true = versions._version_cached
    with monkeypatch.context() as patch:
        patch.setattr(versions, "_version_cached", lambda name: "1.2.3" if name == "torch" else true(name))
        with pytest.raises(RuntimeError, match=r"worker at tcp://.* differs.*torch 2\..* there, 1.2.3 here"):
            study(tmp_path, scheduler)
    ask = cc.numerics
    with monkeypatch.context() as patch:
        patch.setattr(cc, "numerics", lambda device: ask(device) | {"instructions": "abacus"})
        with pytest.raises(RuntimeError, match="This worker differs.*instructions .* there, abacus here"):
            study(tmp_path, scheduler)
    assert not list(tmp_path.glob("*.json"))


def test_a_worker_that_cannot_have_the_clients_threads_is_refused(study, tmp_path, monkeypatch):
    ask, threads = cc.numerics, torch.get_num_threads()
    has = iter([threads, threads + 3, threads + 3])
    monkeypatch.setattr(cc, "numerics", lambda device: ask(device) | {"threads": next(has)})
    with pytest.raises(RuntimeError, match=f"threads {threads + 3} there, {threads} here"):
        study(tmp_path)


@needs_dask
def test_a_scheduler_that_is_not_there_and_one_without_workers(study, scheduler, tmp_path):
    begin = time.monotonic()
    with pytest.raises(ConnectionError, match=r"scheduler='tcp://127.0.0.1:9': nothing answers.*dask scheduler"):
        study(tmp_path, "tcp://127.0.0.1:9")
    assert time.monotonic() - begin < 15 and not list(tmp_path.iterdir()), "no silent fall-back"
    with pytest.raises(ConnectionError, match=f"at {scheduler} has no workers.*dask worker {scheduler}"):
        study(tmp_path, scheduler)


def test_without_dask_it_says_what_to_install(study, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ImportError, match="requirements-cluster.txt"):
        study(tmp_path, "tcp://127.0.0.1:9")


def test_shards_and_the_cache_do_not_matter(study, tmp_path, monkeypatch):
    """The scored batches have 8 pictures whatever the shards are; that the last batch of a call is smaller may cost a
    rounding error, no more (oneDNN's results can depend on a batch's shape)."""
    one = study(tmp_path / "one", size=2)
    again = study(tmp_path / "one", size=2)
    same(again, one)
    other = study(tmp_path / "other", size=11)
    keys = ["image", "method", "metric"]
    pairs = one.set_index(keys).value.sort_index(), other.set_index(keys).value.sort_index()
    assert list(pairs[0].index) == list(pairs[1].index)
    assert np.abs(pairs[0] - pairs[1]).max() < 1e-6
    monkeypatch.setattr(cam_cluster, "measure_shard", None)  # everything is in the cache: nothing is called
    same(study(tmp_path / "one", size=2), one)


def test_what_names_a_shards_result_in_notebook_05(repo):
    """The key holds batch size, steps and seed by way of the code that reads them, and threads, device, versions."""
    cells = nbformat.read(repo / "notebooks" / "05_evaluation.ipynb", 4).cells
    text = "\n".join(c.source for c in cells if c.cell_type == "code")
    assert "code=cc.code_hash(measure)" in text and "fixed |= cc.numerics(on)" in text
    assert {"threads", "torch", "device", "instructions"} <= set(cc.numerics())
    space, hashes = {"cc": cc, "np": np, "__name__": "__main__"}, []
    import linecache

    for cell in cells:
        if cell.cell_type == "code" and ("def perturb(" in cell.source or "def measure(" in cell.source):
            file = f"<{cell.id}>"
            linecache.cache[file] = (len(cell.source), None, cell.source.splitlines(True), file)
            exec(compile(cell.source, file, "exec"), space)
    for batch_size in (8, 4):
        space |= dict(batch_size=batch_size, seed=0, steps=28, precision="float32")
        hashes.append(cc.code_hash(space["measure"]))
    assert hashes[0] != hashes[1]


def test_a_data_sets_hash_is_that_of_its_images(tmp_path):
    for k in range(3):
        Image.new("RGB", (8, 8), (k, 0, 0)).save(tmp_path / f"i{k}.png")
    first = cc.dataset_hash(cc.read_dataset(tmp_path))
    assert first == cc.dataset_hash(cc.read_dataset(tmp_path)[::-1])
    Image.new("RGB", (8, 8), (9, 0, 0)).save(tmp_path / "i1.png")
    assert first != cc.dataset_hash(cc.read_dataset(tmp_path)) and len(first) == len(hashlib.sha256().hexdigest())
