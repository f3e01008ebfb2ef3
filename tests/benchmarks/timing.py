"""What both benchmarks share: interleaved timing, ratios pair by pair, memory, and the machine in
words.
"""

import ctypes
import gc
import multiprocessing
import os
import platform
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

import cam_core as cc
from lab import HOME


def machine(device):
    """The machine in a line: processor, cores, instructions, memory, versions."""
    name, memory = platform.processor() or platform.machine(), 0.0
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(
            line.partition(":")[2].strip() for line in lines if line.startswith("model name")
        )
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (OSError, StopIteration, ValueError):
        pass  # not Linux: the name alone
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}; {name}"
    bf16 = "with" if cc.networks.native_bf16("cpu") else "without"
    instructions = torch.backends.cpu.get_cpu_capability()
    return (
        f"{name}, {torch.get_num_threads()} threads, {instructions}, {bf16} bfloat16 instructions, "
        f"{memory:.0f} GiB; Python {platform.python_version()}, torch {torch.__version__}"
    )


def repeat(contenders, repetitions, device, seed=0, warm=False):
    """Seconds of each contender, {name: function}, in each repetition: a table (repetition, name,
    seconds).

    Each runs once before, unmeasured, unless it is warm already. Then in every repetition all of
    them run, in an order drawn anew, so what slows the machine down for a while meets all alike.
    """
    draw, rows = np.random.default_rng(seed), []
    for repetition in range(0 if warm else -1, repetitions):
        for name in draw.permutation(list(contenders)):
            settle(device)
            begin = time.perf_counter()
            contenders[name]()
            settle(device)
            rows.append(
                {
                    "repetition": repetition,
                    "name": str(name),
                    "seconds": time.perf_counter() - begin,
                }
            )
    table = pd.DataFrame(rows).query("repetition >= 0")
    return table.sort_values(
        ["name", "repetition"],
        key=lambda c: (
            c.map({n: i for i, n in enumerate(contenders)}.get) if c.name == "name" else c
        ),
        ignore_index=True,
    )


def settle(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratios(times, to, seed=0):
    """Median seconds of each name, and the median of its ratio to `to` in the same repetition, with
    a 95 % bootstrap interval of that median.
    """
    from scipy.stats import bootstrap

    wide, rows = times.pivot(index="repetition", columns="name", values="seconds"), []
    for name in times["name"].unique():
        ratio = (wide[name] / wide[to]).to_numpy()
        low = high = np.nan
        if np.ptp(ratio) > 0:
            draws = np.random.default_rng(seed)
            low, high = bootstrap(
                (ratio,), np.median, method="percentile", rng=draws
            ).confidence_interval
        rows.append(
            {
                "name": name,
                "ms": 1e3 * wide[name].median(),
                "to": to,
                "ratio": np.median(ratio),
                "low": low,
                "high": high,
                "n": len(ratio),
            }
        )
    return pd.DataFrame(rows)


def bytes_for_backward(work):
    """Bytes of the tensors that autograd keeps for a backward pass while work() runs, each storage
    once; parameters, which are there anyway, are not counted.
    """
    seen = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter) and not (
            tensor.is_leaf and tensor.requires_grad
        ):
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(seen.values())


def resident(peak):
    """MiB of this process in memory now, or at most since `forget_peak` (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return (
        int(
            next(line for line in lines if line.startswith("VmHWM" if peak else "VmRSS")).split()[1]
        )
        / 1024
    )


def forget_peak():
    """Hand freed memory back to the system and let the peak count from here (Linux with glibc)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def _alone(make, arguments, threads, results):
    torch.set_num_threads(threads)
    keep_freed_memory()
    work = make(*arguments)
    forget_peak()
    before = resident(peak=False)
    begin = time.perf_counter()
    work()
    seconds = time.perf_counter() - begin
    results.put((resident(peak=True) - before, seconds))


def alone(make, *arguments):
    """What make(*arguments)() takes in a fresh process: by how many MiB its peak memory grows, and
    seconds. Making is not counted.
    """
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(
        target=_alone, args=(make, arguments, torch.get_num_threads(), results)
    )
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"measuring {arguments} alone failed with exit code {process.exitcode}.")
    return results.get()


def keep_freed_memory():
    """Let the C library keep large freed blocks for the next ones, as the runner does for its
    notebooks. Otherwise it hands them back, or not, as a process happens to have allocated before,
    and new pages cost a fifth of the time, of one code or of another.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: 0)  # glibc has it
    mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def start(argparser, repetitions):
    """The options that both scripts have, read; threads set; (arguments, device, folder for the
    results).
    """
    argparser.add_argument("--device", default="cpu", help="auto, cpu, cuda, ... (default: cpu)")
    argparser.add_argument(
        "--threads", type=int, default=0, help="CPU threads (default: torch's choice)"
    )
    argparser.add_argument(
        "--repetitions", type=int, default=repetitions, help=f"default: {repetitions}"
    )
    argparser.add_argument(
        "--out", type=Path, default=Path("results/benchmarks"), help="where the tables go"
    )
    args = argparser.parse_args()
    if args.repetitions < 1 or args.threads < 0:
        argparser.error("--repetitions must be 1 or more, --threads 0 or more.")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = cc.networks.pick_device(args.device)
    plt.switch_backend("agg")  # figures go to files; there is no window
    plt.style.use(["default", HOME / "lab" / "style.mplstyle"])
    args.out.mkdir(parents=True, exist_ok=True)
    print(machine(device), flush=True)
    return args, device


def save(frame, file, device):
    """The table as CSV, with the machine in its last column."""
    frame.assign(machine=machine(device)).to_csv(
        file, index=False, float_format="%.6g", lineterminator="\n"
    )
    print(f"-> {file}")
