"""The heavy step of notebook 05, in this process or on many machines: shards of images, all measured by one function.

`measured` is what the notebook calls. It goes through the shards that the cache lacks, here or, given the address of a
Dask scheduler, on its workers, and writes what comes back into the cache; nobody else writes. Workers get all they need
from the client: this code and the network when they start, and with each shard the bytes of its images.
"""

from __future__ import annotations

import copy
import hashlib
import io
import itertools
import json
import pickle
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm

import cam_core as cc

FILES = ("file", "twin", "mask", "hull")  # columns of a table that name files
MODULES = ("cam_inputs", "cam_core", "cam_cluster")  # what a worker runs, in the order in which they import each other
networks: dict[str, torch.nn.Module] = {}  # by hash; a process loads each once, however many shards it measures
code = ""  # on a worker: the hash of the modules that it was given
one_at_a_time = threading.Lock()  # a network carries hooks while it is captured, so threads cannot share it


def measure_shard(measure: Callable, net: Mapping, rows, count: int, extra: int, registered: tuple, asked: Mapping):
    """measure(net, rows, count, extra), with the client's number of threads whatever Dask set, so that the result is
    the client's own to the last bit; RuntimeError on a worker that cannot promise this.
    """
    with one_at_a_time:
        torch.set_num_threads(asked["threads"])
        refuse_others({"This worker": {**cc.numerics(net["device"]), "code": code}}, asked)
        cc.CAMS, cc.FUSIONS = registered  # one registered in the notebook is in the client's tables only
        rows = rows.assign(**{c: [io.BytesIO(b) if b else "" for b in rows[c]] for c in FILES if c in rows})
        return measure({**net, "model": networks[net["key"]]}, rows, count, extra)


def refuse_others(workers: Mapping[str, Mapping], asked: Mapping) -> None:
    """RuntimeError if a worker {name: what it has} differs from what the client has and asks for."""
    for name, has in workers.items():
        differing = [f"{k} {has.get(k)} there, {v} here" for k, v in asked.items() if has.get(k) != v]
        if differing:
            raise RuntimeError(f"{name} differs from this client ({'; '.join(differing)}): make them equal.")


def measured(
    measure: Callable, net: Mapping, shards: Sequence[tuple], keys: Sequence[Mapping], folder: Path, scheduler: str = ""
) -> list[dict]:
    """The records of all shards, in their order; those that are in the cache are not measured again.

    measure: (net, rows, count, extra) -> records. net: "model", and "arch" and "weights", which tell it from others.
    shards: (rows, count, extra). keys: what determines each shard's records, for `cc.cached`. scheduler: "" for this
    process, or an address. Raises ConnectionError if nothing answers there or it has no workers, RuntimeError if
    they differ from this client.
    """
    files, device = [cc.cache_file(folder, key) for key in keys], next(net["model"].parameters()).device
    light = {**net, "model": None, "device": str(device), "key": f"{net['arch']} {net['weights']}"}
    common = (cc.CAMS, cc.FUSIONS), cc.numerics(device)
    missing = [k for k, file in enumerate(files) if not file.is_file()]
    tasks = ((k, (measure, light, with_bytes(shards[k][0]), *shards[k][1:], *common)) for k in missing)
    results = remote(tasks, light["key"], net["model"], scheduler) if scheduler and missing else None
    bar = tqdm(total=len(files), initial=len(files) - len(missing), desc=net["arch"], unit=" groups of images")
    with bar:
        for k, records in results or local(tasks, light["key"], net["model"]):
            cc.cached(folder, keys[k], lambda records=records: records)
            bar.update()
    return [record for file in files for record in json.loads(file.read_text("utf-8"))["records"]]


def with_bytes(rows):
    """The table with its files' contents in the place of their names: workers then need no common file system, and
    what a shard costs (seconds to minutes) is far more than sending the megabyte or so of its images.
    """
    return rows.assign(**{c: [Path(f).read_bytes() if f else b"" for f in rows[c]] for c in FILES if c in rows})


def local(tasks: Iterator[tuple], key: str, model: torch.nn.Module) -> Iterator[tuple[int, list]]:
    networks[key] = model
    for k, task in tasks:
        yield k, measure_shard(*task)


def remote(tasks: Iterator[tuple], key: str, model: torch.nn.Module, scheduler: str) -> Iterator[tuple[int, list]]:
    """(number, records) of each task as the workers finish it; a shard whose worker dies is given to another."""
    try:
        import cloudpickle
        from distributed import Client, WorkerPlugin, as_completed
    except ImportError:
        raise ImportError(f"scheduler={scheduler!r} needs Dask: pip install -r requirements-cluster.txt") from None

    class Equipment(WorkerPlugin):  # a local class travels by value: a worker need not have this file
        def setup(self, worker):
            if getattr(sys.modules.get(names[-1]), "code", "") != version:
                for name in names:
                    module = sys.modules[name] = types.ModuleType(name)
                    module.__file__ = f"{name}.py"
                    exec(compile(texts[name], module.__file__, "exec"), vars(module))
                sys.modules[names[-1]].code = version
            sys.modules[names[-1]].networks[key] = pickle.loads(network).to(device)

    def unpack(call):  # the scheduler looks into what it passes on, and has no torch: it sees bytes
        function, arguments = pickle.loads(call)
        return function(*arguments)

    names, texts = MODULES, {m: Path(cc.__file__).with_name(f"{m}.py").read_text("utf-8") for m in MODULES}
    version = hashlib.sha256("".join(texts.values()).encode()).hexdigest()[:12]
    device, network = next(model.parameters()).device, cloudpickle.dumps(copy.deepcopy(model).cpu())
    try:
        client = Client(scheduler, timeout=5, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"scheduler={scheduler!r}: nothing answers there ({error}). Start one with `dask scheduler` and workers "
            f"with `dask worker {scheduler} --nthreads 1`, or leave scheduler empty to compute in this process."
        ) from None
    with client:
        try:
            client.wait_for_workers(1, timeout=5)
        except TimeoutError:
            hint = f"Start some with `dask worker {scheduler} --nthreads 1`."
            raise ConnectionError(f"The scheduler at {scheduler} has no workers. {hint}") from None
        found = client.get_versions(packages=["torch", "numpy"])
        asked = {name: found["client"]["packages"][name] for name in ("python", "torch", "numpy")}
        refuse_others({f"The worker at {w}": about["packages"] for w, about in found["workers"].items()}, asked)
        client.register_plugin(Equipment(), name=f"equipment {version} {key}")
        ready, numbers = as_completed(loop=client.loop, with_results=True), {}

        def send(most):
            for k, task in itertools.islice(tasks, most):
                call = cloudpickle.dumps((measure_shard, (*task[:-1], {**task[-1], "code": version})))
                future = client.submit(unpack, call, pure=False)
                numbers[future.key] = k
                ready.add(future)

        send(2 * sum(client.nthreads().values()))  # so that none waits; all at once might not fit into memory
        for future, records in ready:
            yield numbers.pop(future.key), records
            send(1)
