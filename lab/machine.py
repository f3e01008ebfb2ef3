"""What this machine can do, asked once in a process: how many cores it lends, whether it multiplies
in bfloat16, and how long it takes for a picture. What a run leaves open (`precision: auto`, 0 for
batch_size and threads) follows from that.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from torch import nn

from lab import networks

EMULATED = (
    "precision: {device} does not multiply in bfloat16 itself. Emulated, it would be about ten "
    "times slower, so this goes on in float32. precision bf16! insists."
)


@functools.cache
def cores() -> int:
    """CPU threads that pay: torch's own choice (the cores of this process, without hyperthreads,
    and OMP_NUM_THREADS), but no more than a container may use, which torch does not see.
    """
    import joblib  # knows the limits of cgroups

    return min(torch.get_num_threads(), joblib.cpu_count())


def threads(asked: int) -> int:
    """The setting `threads` as a number: 0 is `cores`."""
    return asked or cores()


def batch_size(asked: int, device: torch.device) -> int:
    """The setting `batch_size` as a number: 0 is 8 on a CPU, whose caches hold no more, and 64 on
    a GPU, which is idle with fewer.
    """
    return asked or (8 if device.type == "cpu" else 64)


def precision(asked: str, device: torch.device) -> tuple[str, str]:
    """(the setting `precision` as float32 or bf16, what has to be said of it, "" for nothing).

    auto is bf16 where the device multiplies in it itself (`networks.native_bf16`), bf16 is so too
    and says where it is not followed, bf16! is followed anywhere.
    """
    if asked == "bf16!":
        return "bf16", ""
    if asked == "float32" or networks.native_bf16(device):
        return ("float32" if asked == "float32" else "bf16"), ""
    return "float32", EMULATED.format(device=device) if asked == "bf16" else ""


def seconds_per_picture(
    model: nn.Module, how: networks.Preprocessing, batch_size: int, precision: str = "float32"
) -> float:
    """How long a bare forward pass takes, per picture, in batches: the median of half a second of
    them, after one to warm up. Where that one takes more than a second it has to do.
    """
    device = next(model.parameters()).device
    x = torch.rand(batch_size, len(how.mean), *how.size, device=device)
    x = x.contiguous(memory_format=torch.channels_last)

    def forward() -> None:
        bf16 = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
        with torch.inference_mode(), bf16:
            model(x)
        if device.type != "cpu":
            torch.accelerator.synchronize()

    first = seconds_of(forward)
    times = [] if first < 1 else [first]
    while sum(times) < 0.5:
        times.append(seconds_of(forward))
    return median(times) / batch_size


def seconds_of_plain_work() -> float:
    """How long this machine takes for a fixed piece of ordinary work in Python and NumPy, such as a
    notebook does between its networks: the median of five.
    """

    def work() -> None:
        counts: dict[int, int] = {}
        for k in range(60_000):
            counts[k % 997] = counts.get(k % 997, 0) + k
        np.sort(np.random.default_rng(0).standard_normal(200_000))

    return median(seconds_of(work) for _ in range(5))


def seconds_of(act: Callable[[], None]) -> float:
    """How long a call takes, by the clock on the wall."""
    begin = time.perf_counter()
    act()
    return time.perf_counter() - begin
