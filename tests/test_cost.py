"""What measuring may not do: wait for the device between batches, or keep what it is done with."""

import tracemalloc
import weakref

import numpy as np
import pandas as pd
import pytest
import torch
from nets import images, strong
from studies import study_of, toy_images
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import cam_core as cc

# Each of these copies from the device, or needs a number from it before Python can go on.
WAITING_CALLS = {"item", "tolist", "numpy", "cpu", "__array__", "__bool__", "__float__", "__int__"}
WAITING_OPERATIONS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2"}


class Calls(TorchFunctionMode):
    """Hands the names of called functions and methods of tensors to `tell`."""

    def __init__(self, tell):
        super().__init__()
        self.tell = tell

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__ in WAITING_CALLS:
            self.tell(function.__name__)
        return function(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    """Hands the names of operations that wait to `tell`, an index of booleans among them."""

    def __init__(self, tell):
        super().__init__()
        self.tell = tell

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation._schema.name.removeprefix("aten::")
        by_mask = name.startswith("index") and any(
            isinstance(place, torch.Tensor) and place.dtype == torch.bool
            for place in (args[1] if isinstance(args[1], (list, tuple)) else ())
        )
        if by_mask or name in WAITING_OPERATIONS:
            self.tell(name)
        return operation(*args, **(kwargs or {}))


def waits_between_passes(model, work):
    """What waits while work() runs, after the first forward pass and before the last."""
    passes, seen = [], []
    hook = model.register_forward_hook(lambda *_: passes.append(len(seen)))
    with Calls(seen.append), Operations(seen.append):
        work()
    hook.remove()
    assert len(passes) > 5
    return seen[passes[0] : passes[-1]]


@pytest.mark.parametrize("target", [torch.tensor([1]), lambda logits: logits[:, 2]])
def test_nothing_waits_for_the_device_between_two_batches(target):
    model, x = strong(), images(1)
    ranks = cc.pixel_rank(torch.rand(2, 12, 10), ["a", "b"])[None]

    def work():
        cc.perturbation_curves(model, x, torch.zeros_like(x), ranks, target, 20, 4)

    work()  # once for each network a few questions are asked, which may wait
    assert waits_between_passes(model, work) == []


def test_a_wait_between_two_batches_would_be_seen():
    model, x = strong(), images(2)
    waits = {
        "item": lambda p: p[0, 0].item(),
        "cpu": lambda p: p.cpu(),
        "tolist": lambda p: p.tolist(),
        "numpy": lambda p: p.detach().numpy(),
        "if": lambda p: bool((p > 0).any()),
        "nonzero": lambda p: p.nonzero(),
        "mask": lambda p: p[p > 0],
    }
    for name, wait in waits.items():

        def work(wait=wait):
            for _ in range(7):
                wait(model(x))

        assert waits_between_passes(model, work), name


def test_thresholds_are_chosen_with_the_maps_of_one_group_at_a_time(tmp_path, monkeypatch):
    study = study_of(strong())
    rows = toy_images(tmp_path, 3 * cc.GROUP)
    explain_rows, alive, largest = cc.explain_rows, weakref.WeakSet(), []

    def watched(*args):
        largest.append(len(alive))
        x, target, maps = explain_rows(*args)
        arrays = {name: m.clone().numpy().view(Watched) for name, m in maps.items()}
        alive.update(arrays.values())
        return x, target, {name: torch.from_numpy(array) for name, array in arrays.items()}

    monkeypatch.setattr(cc, "explain_rows", watched)
    cc.choose_thresholds(study, rows)
    assert largest == [0, len(study.methods), len(study.methods)]  # the last group's, not all


class Watched(np.ndarray):
    """Memory that a WeakSet can hold on to: a tensor made of it keeps it, and so do its views."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def test_many_images_are_compared_in_little_memory():
    """SciPy's resamples of 2,000 images at once would take 256 MiB here, and a GiB in a run."""
    value = np.random.default_rng(0).normal(size=4000)
    table = pd.DataFrame({"image": np.arange(4000) % 2000, "metric": "insertion", "value": value})
    table["method"] = np.repeat(["grad_cam", "hybrid"], 2000)
    table["baseline"] = ""
    tracemalloc.start()
    cc.statistics.compare(table, resamples=2000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100 * 2**20
