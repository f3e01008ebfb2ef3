"""Measure what notebook 05 asks for on a Dask cluster: `./run_all.sh -p scheduler tcp://host:8786`.

The pipeline calls `main` after notebook 04. It opens the run with the parameters that notebook 05
will get, sends the groups of images that the cache lacks to the workers, and writes what comes back
into the cache, where notebook 05 finds it. Nobody else writes there. Workers need the installed
packages and no files: they get this code and the network when they start, and with each group the
bytes of its images.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import io
import itertools
import json
import pickle
import sys
import threading
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm.auto import tqdm

import cam_core as cc
from lab import HOME

Shard = tuple  # (rows, count, extra, key), as `cam_core.shards` makes them

# ---- on a worker

code = ""  # the hash of the code that the worker was given
networks: dict[str, torch.nn.Module] = {}  # by name; a worker loads each once
one_at_a_time = (
    threading.Lock()
)  # a network has hooks while it is captured: threads cannot share it


@dataclass(frozen=True)
class Order:
    """What a group is measured with, besides its images: sent with each group."""

    study: cc.Study  # without its model
    network: str  # the model's name in `networks`
    device: str
    cams: Mapping  # cam_core.CAMS and FUSIONS of the client, where a network's file may add its own
    fusions: Mapping
    asked: Mapping  # what the worker has to be like, see `lab.runs.numerics`, and its code


def measure_group(order: Order, rows, count: int, extra: int) -> tuple[list[dict], dict]:
    """The records of a group, equal to the last bit to those of a client that knows no scores yet,
    and the pictures that they cost; RuntimeError on a worker that cannot promise this. It computes
    with the client's number of threads.
    """
    with one_at_a_time:
        torch.set_num_threads(order.asked["threads"])
        refuse_others("This worker", {**cc.runs.numerics(order.device), "code": code}, order.asked)
        cc.CAMS = order.cams
        cc.FUSIONS = order.fusions
        for column in files_of(rows):
            rows = rows.assign(**{column: [io.BytesIO(b) if b else "" for b in rows[column]]})
        study = replace(order.study, model=networks[order.network])
        before = cc.ledger.counts()
        return cc.measure(study, rows, count, extra), cc.ledger.since(before)


def refuse_others(name: str, has: Mapping, asked: Mapping) -> None:
    """RuntimeError if a worker is not as the client asks."""
    differing = []
    for key, value in asked.items():
        if has.get(key) != value:
            differing.append(f"{key} {has.get(key)} there, {value} here")
    if differing:
        raise RuntimeError(
            f"{name} differs from this client ({'; '.join(differing)}): make them equal."
        )


def files_of(rows) -> list[str]:
    """The columns of a table that name files."""
    return [column for column in cc.FILES if column in rows]


# ---- on the client


def measure_study(study: cc.Study, rows, folder: Path, scheduler: str) -> None:
    """Measure the groups of a study that the cache in `folder` lacks, on the workers of the
    scheduler at that address.

    Raises ImportError without Dask, ConnectionError if nothing answers there or it has no workers,
    and RuntimeError if a worker differs from this client.
    """
    shards = cc.shards(study, rows)
    missing = [shard for shard in shards if not cc.runs.cache_file(folder, shard[3]).is_file()]
    if not missing:
        return
    found = remote(study, missing, scheduler)
    for key, work in tqdm(found, desc=study.arch, total=len(missing), unit=" groups of images"):
        cc.runs.cached(folder, key, functools.partial(count_in, *work))


def count_in(records: list[dict], pictures: Mapping[str, int]) -> list[dict]:
    """The records, whose pictures a worker scored for this run."""
    cc.ledger.add(pictures)
    return records


def remote(
    study: cc.Study, shards: Sequence[Shard], scheduler: str
) -> Iterator[tuple[Mapping, tuple[list[dict], dict]]]:
    """(key, (records, pictures)) of each group as the workers finish it; the group of a worker that
    is lost is given to another one.
    """
    with connect(scheduler) as client:
        check_versions(client)
        order = equip(client, study)
        yield from as_they_finish(client, order, shards)


def connect(scheduler: str):
    """A Dask client of a scheduler that has workers."""
    try:
        from distributed import Client
    except ImportError:
        hint = "pip install -r requirements-cluster.txt"
        raise ImportError(f"scheduler={scheduler!r} needs Dask: {hint}") from None
    try:
        client = Client(scheduler, timeout=5, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"scheduler={scheduler!r}: nothing answers there ({error}). Start one with `dask "
            f"scheduler` and workers with `dask worker {scheduler} --nthreads 1`, or leave "
            "scheduler empty to compute in this process."
        ) from None
    try:
        client.wait_for_workers(1, timeout=5)
    except TimeoutError:
        client.close()
        raise ConnectionError(
            f"The scheduler at {scheduler} has no workers. Start some with `dask worker "
            f"{scheduler} --nthreads 1`."
        ) from None
    return client


def check_versions(client) -> None:
    """RuntimeError for a worker with another Python, torch or NumPy."""
    found = client.get_versions(packages=["torch", "numpy"])
    here = found["client"]["packages"]
    asked = {name: here[name] for name in ("python", "torch", "numpy")}
    for address, about in found["workers"].items():
        refuse_others(f"The worker at {address}", about["packages"], asked)


def equip(client, study: cc.Study) -> Order:
    """Give all workers, also those that come later, the code and the network. Returns what is sent
    with each group.
    """
    import cloudpickle
    from distributed import WorkerPlugin

    for name, module in list(sys.modules.items()):
        if name.startswith("own_"):  # a network from a FILE.py, which the workers do not have
            cloudpickle.register_pickle_by_value(module)
    archive = packed_code()
    version = hashlib.sha256(archive).hexdigest()[:12]
    name = f"{study.arch} {study.weights}"
    device = str(study.device)
    network = cloudpickle.dumps(copy.deepcopy(study.model).cpu())

    class Equipment(WorkerPlugin):  # a local class travels by value: workers need not have it
        def setup(self, worker):
            import importlib

            if getattr(sys.modules.get("runner.cluster"), "code", "") != version:
                for module in list(sys.modules):
                    if module.split(".")[0] in ("lab", "cam_core", "runner"):
                        del sys.modules[module]  # of an earlier run
                file = Path(worker.local_directory) / f"hybrid_cam_{version}.zip"
                file.write_bytes(archive)
                sys.path.insert(0, str(file))
                importlib.import_module("runner.cluster").code = version
            sys.modules["runner.cluster"].networks[name] = pickle.loads(network).to(device)

    client.register_plugin(Equipment(), name=f"hybrid cam {version} {name}")
    return Order(
        study=replace(study, model=None),
        network=name,
        device=device,
        cams=cc.CAMS,
        fusions=cc.FUSIONS,
        asked={**cc.runs.numerics(device), "code": version},
    )


def packed_code() -> bytes:
    """What a worker imports, as a zip file; the same bytes for the same code."""
    archive = io.BytesIO()
    files = [HOME / "cam_core.py", *sorted((HOME / "lab").glob("*.py"))]
    files += [HOME / "runner" / "__init__.py", HOME / "runner" / "cluster.py"]
    with zipfile.ZipFile(archive, "w") as opened:
        for file in files:
            entry = zipfile.ZipInfo(file.relative_to(HOME).as_posix())  # without the file's date
            opened.writestr(entry, file.read_bytes())
    return archive.getvalue()


def as_they_finish(
    client, order: Order, shards: Sequence[Shard]
) -> Iterator[tuple[Mapping, tuple[list[dict], dict]]]:
    """Send the groups, twice as many at a time as there are workers' threads: none waits, and not
    all have to fit into memory at once.
    """
    import cloudpickle
    from distributed import as_completed

    def unpack(call):  # the scheduler looks into what it passes on and has no torch: it sees bytes
        function, arguments = pickle.loads(call)
        return function(*arguments)

    ready = as_completed(loop=client.loop, with_results=True)
    keys = {}

    def send(shards: Iterator[Shard]) -> None:
        for rows, count, extra, key in shards:
            call = cloudpickle.dumps((measure_group, (order, with_bytes(rows), count, extra)))
            future = client.submit(unpack, call, pure=False)
            keys[future.key] = key
            ready.add(future)

    waiting = iter(shards)
    send(itertools.islice(waiting, 2 * sum(client.nthreads().values())))
    for future, work in ready:
        yield keys.pop(future.key), work
        send(itertools.islice(waiting, 1))


def with_bytes(rows):
    """The table with its files' contents in the place of their names: workers then need no common
    file system. What a group costs to measure is far more than sending a megabyte of images.
    """
    for column in files_of(rows):
        rows = rows.assign(**{column: [Path(f).read_bytes() if f else b"" for f in rows[column]]})
    return rows


# ---- for the pipeline


def fill_cache(values: Mapping, scheduler: str) -> None:
    """Measure all groups of notebook 05, started with these parameters, into its cache."""
    run = cc.runs.open(5, **values)
    study, rows, _ = cc.open_study(run)
    measure_study(study, rows, run.data / "cache", scheduler)
    if run.settings.also:
        study, rows = cc.second_study(run, study)
        measure_study(study, rows, run.data / "cache", scheduler)


def main() -> None:
    """Read {"scheduler": address, "values": parameters} from standard input and do it."""
    task = json.load(sys.stdin)
    try:
        fill_cache(task["values"], task["scheduler"])
    except (ValueError, ImportError, ConnectionError, RuntimeError) as error:
        raise SystemExit(f"run_all.sh: {error}") from None
