"""Measuring on a Dask cluster: a real scheduler and two workers, on the loopback."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import cam_core as cc
from runner import cluster

try:
    import distributed
except ImportError:
    distributed = None
needs_dask = pytest.mark.skipif(
    distributed is None, reason="pip install -r requirements-cluster.txt"
)

# A network and a CAM of one's own, which the workers have to be sent; the CAM takes its time, so
# that a worker can be killed in the middle of its work.
NETWORK = """import time
import torch
from torch import nn
import cam_core as cc

def slow(A, G):
    time.sleep(0.1)
    return (A * G.abs()).sum(1).relu()

cc.CAMS["slow"] = slow

class Net(nn.Module):
    image_size = 32

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.body = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))
"""


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    """The parameters of notebook 05 for small images and a network of one's own."""
    folder = tmp_path_factory.mktemp("study")
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for k in range(72):
        pixels = rng.integers(0, 255, (40, 36, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"images/i{k:02}.png")
    (folder / "net.py").write_text(NETWORK)
    return {
        "dataset": str(folder / "images"),
        "arch": f"{folder}/net.py:Net",
        "alpha": 0.5,
        "shallow_layer": "stem",
        "n_images": 0,
        "steps": 2,
        "baseline": "rise",
        "device": "cpu",
        "threads": 1,
        "results_dir": str(folder / "results"),
    }


@pytest.fixture
def cams(monkeypatch):
    """What the network's file registers is gone afterwards, and so are the threads asked for."""
    monkeypatch.setattr(cc, "CAMS", dict(cc.CAMS))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def measured(folder):
    """{file: key and records} of a cache, to the last digit. Not its pictures: what a process asks
    a network once counts with its first group.
    """
    found = {path.name: json.loads(path.read_text("utf-8")) for path in folder.glob("*.json")}
    return {name: json.dumps([kept["key"], kept["records"]]) for name, kept in found.items()}


@pytest.fixture
def here(values, cams, tmp_path):
    """The cache of a run that measures in this process."""
    run = cc.runs.open(5, **values, data_dir=str(tmp_path / "here"))
    study, rows, _ = cc.open_study(run)
    cc.measure_all(study, rows, tmp_path / "here/cache")
    return measured(tmp_path / "here/cache")


@pytest.fixture(scope="module")
def scheduler():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--no-dashboard"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    yield f"tcp://127.0.0.1:{port}"
    process.kill()
    process.wait()


@pytest.fixture
def workers(scheduler, tmp_path):
    """Two workers, which start where there is no cam_core to import: it has to be sent."""
    command = [sys.executable, "-m", "distributed.cli.dask_worker", scheduler, "--nthreads", "1"]
    command += ["--host", "127.0.0.1", "--no-dashboard", "--no-nanny"]
    command += ["--local-directory", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = []
    for _ in range(2):
        options = {"cwd": tmp_path, "env": environment, "stderr": subprocess.DEVNULL}
        found.append(subprocess.Popen(command, **options))
    with distributed.Client(scheduler, timeout=60, set_as_default=False) as client:
        client.wait_for_workers(2, timeout=120)
    yield found
    for process in found:
        process.kill()
        process.wait()


@needs_dask
def test_two_workers_write_the_numbers_of_a_local_run_also_when_one_is_killed(
    values, here, scheduler, workers, tmp_path, monkeypatch
):
    there = tmp_path / "there"
    cluster.fill_cache({**values, "data_dir": str(there)}, scheduler)
    assert measured(there / "cache") == here and len(here) >= 4

    later = tmp_path / "later"  # another version of the code, and a worker that is lost
    written = []
    keep = cc.runs.cached

    def kill_one(folder, key, make):
        written.append(tuple(key["id"]))
        if len(written) == 1:
            os.kill(workers[0].pid, signal.SIGKILL)
        return keep(folder, key, make)

    archive = io.BytesIO(cluster.packed_code())
    with zipfile.ZipFile(archive, "a") as opened:
        opened.writestr("lab/more.py", "")
    monkeypatch.setattr(cluster, "packed_code", archive.getvalue)
    monkeypatch.setattr(cc.runs, "cached", kill_one)
    cluster.fill_cache({**values, "data_dir": str(later)}, scheduler)
    workers[0].wait(10)
    assert measured(later / "cache") == here
    assert len(written) == len(set(written)) == len(here), "each group is written once"

    cluster.fill_cache({**values, "data_dir": str(later)}, "tcp://127.0.0.1:9")  # all is there


@needs_dask
def test_a_scheduler_that_is_not_there_and_one_without_workers(scheduler):
    begin = time.monotonic()
    with pytest.raises(ConnectionError, match="tcp://127.0.0.1:9': nothing answers.*dask sched"):
        cluster.connect("tcp://127.0.0.1:9")
    assert time.monotonic() - begin < 30
    with pytest.raises(ConnectionError, match="has no workers.*dask worker"):
        cluster.connect(scheduler)


def test_without_dask_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ImportError, match="requirements-cluster.txt"):
        cluster.connect("tcp://127.0.0.1:9")


def test_a_worker_that_differs_is_refused_by_name():
    class Client:
        def get_versions(self, packages):
            here = {"python": "3.11", "torch": "2", "numpy": "2"}
            workers = {"tcp://w": {"packages": {**here, "torch": "1"}}}
            return {"client": {"packages": here}, "workers": workers}

    with pytest.raises(RuntimeError, match="worker at tcp://w differs.*torch 1 there, 2 here"):
        cluster.check_versions(Client())
    asked = {**cc.runs.numerics("cpu"), "code": "", "instructions": "abacus"}
    order = cluster.Order(None, "", "cpu", {}, {}, asked)
    with pytest.raises(RuntimeError, match="instructions .* there, abacus here"):
        cluster.measure_group(order, None, 0, 0)


def test_what_is_wrong_with_the_run_is_said_in_a_line(values, cams, tmp_path, monkeypatch):
    task = {"scheduler": "tcp://a:1", "values": {**values, "n_images": -1}}
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(task)))
    with pytest.raises(SystemExit, match="run_all.sh: n_images cannot be -1"):
        cluster.main()
