"""Run the notebooks in order through papermill, and put the results in place once all of them have succeeded.

Parameters are checked against what the notebooks declare before the first one starts. A run writes into a fresh folder
beside its target (results/default.unfinished-PID), which takes the target's place at the end in one step. With --only
and --from the results of the other notebooks are kept, except of those that read what is made anew: 01 feeds all the
others, 04 feeds 05. manifest.json tells the run and the parameters behind each notebook's results. Files that you name
are looked for where you stand, then in the repository; a relative results folder lies in the repository. With --check
the results in place are compared (see check.py) with results/reference/NAME, NAME being that of the parameter file of
-f, or else "default". Exit codes: 0 done, 1 a notebook failed, a file could not be written or --check found a
difference, 2 refused before the first notebook started, 130 or 143 stopped by a signal."""
import argparse
import csv
import ctypes
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import check
from parameters import ROOT, declared, parse, read_cells, read_given, refuse, settle

READERS = {"01": ("02", "03", "04", "05"), "04": ("05",)}  # which notebooks read what a notebook writes


def select(stems, only, start):
    """The notebooks to run: all, or those with the numbers given, or that one and all after it."""
    numbers = {word.strip().zfill(2) for word in (start or only).split(",")} if (start, only) != (None, None) else set()
    found = [stem for stem in stems if stem[:2] in numbers]
    if len(found) != len(numbers) or not stems:
        refuse(f"there is no notebook {start or only}, only {', '.join(stems)}.")
    return stems[stems.index(found[0]):] if start else found or stems


def run_id(parameters, notebooks):
    """12 hex digits of all that determines the results: parameters, cells, modules, requirements, weights, network."""
    cells = [[cell["source"] for cell in read_cells(path)] for path in notebooks.values()]
    files = {*ROOT.glob("cam_*"), ROOT / "requirements.txt", *(ROOT / "data/checkpoints").glob("*.pth")}
    files |= {Path(values["weights"]) for values in parameters.values() if "weights" in values}
    files |= {Path(values["arch"].rpartition(":")[0]) for values in parameters.values() if "arch" in values}
    hashes = sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file())
    parameters = {stem: values | {"scheduler": ""} for stem, values in parameters.items()}  # where, not what
    return hashlib.sha256(json.dumps([parameters, cells, hashes], sort_keys=True).encode()).hexdigest()[:12]


def claim(target):
    """Hold `target` for this process, and clear away what dead runs left beside it. Returns the lock, to be kept."""
    if target in (ROOT / "results", ROOT, *ROOT.parents) or os.path.ismount(target):
        refuse(f"results_dir: {target} is not the folder of one run; name one inside it.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = open(target.with_name(f".{target.name}.lock"), "a")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
    except OSError as error:
        busy = f"another run is writing {target}. Wait for it, or give another --results-dir."
        refuse(busy if isinstance(error, BlockingIOError) else f"results_dir: {error}")
    for path in [p for p in target.parent.glob("*.unfinished-*") if p.stem == target.name and p.suffix[12:].isdigit()]:
        half_way = check.manifest_of(path) and not target.exists()  # killed between the two renames of put_in_place
        path.rename(target) if half_way else shutil.rmtree(path)
    if target.exists() and not check.manifest_of(target) and (target.is_file() or any(target.iterdir())):
        refuse(f"results_dir: {target} was not made by a run (no manifest.json), so it is not replaced.")
    return lock


def put_in_place(fresh, target):
    """Make the finished folder the target: in one step where the system can, else in two, which `claim` mends."""
    target.mkdir(exist_ok=True)
    swap = getattr(ctypes.CDLL(None), "renameat2", lambda *_: -1)  # Linux has it
    if swap(-100, os.fsencode(fresh), -100, os.fsencode(target), 2) != 0:  # AT_FDCWD, RENAME_EXCHANGE
        fresh, _ = target.rename(target.with_name(f"{target.name}.unfinished-0")), fresh.rename(target)
    shutil.rmtree(fresh)


def hashes(top):
    return {str(p.relative_to(top)): hashlib.sha256(p.read_bytes()).hexdigest() for p in top.rglob("*") if p.is_file()}


@functools.cache
def portable(value):
    """A parameter for the manifest: a path as seen from the repository, one outside by its name and content's hash."""
    path = ROOT / re.sub(r"(\.py):\w+$", r"\1", value)
    if Path(os.path.normpath(path)).is_relative_to(ROOT):
        return os.path.relpath(value, ROOT) if os.path.isabs(value) else value
    content = {"": hashlib.sha256(path.read_bytes()).hexdigest()} if path.is_file() else hashes(path)
    lasting = {name: digest for name, digest in content.items() if not name.startswith("cache/")}
    return {"name": os.path.basename(os.path.normpath(value)),
            "sha256": hashlib.sha256(json.dumps(lasting, sort_keys=True).encode()).hexdigest()}


def circumstances():
    """Commit (None outside git), packages and machine, for the manifest."""
    words = "git --git-dir=.git describe --always --dirty --abbrev=40 --exclude=*" if shutil.which("git") else "true"
    commit = subprocess.run(words.split(), cwd=ROOT, capture_output=True, text=True).stdout.strip()
    pins = re.findall(r"^([\w-]+)==", (ROOT / "requirements.txt").read_text("utf-8"), re.M)
    return {"commit": commit.removesuffix("-dirty") or None, "dirty": commit.endswith("-dirty") if commit else None,
            "packages": {name: importlib.metadata.version(name) for name in pins},
            "python": platform.python_version(), "platform": platform.platform(), "cpus": os.cpu_count()}


def prepare_kernels(folder, run):
    """Kernels inherit this environment: this interpreter, and nobody's own kernels, start-up files or plot settings.
    What a kernel says beside its notebook, as it ends or crashes, goes to kernel.log instead of the terminal."""
    from ipykernel.kernelspec import make_ipkernel_cmd, write_kernel_spec
    logging.disable()  # papermill's doubts about parameters whose types it cannot read, asyncio's about a stopped run
    command = make_ipkernel_cmd(extra_arguments=["--log-level=CRITICAL", "--IPKernelApp.capture_fd_output=False"])
    shell = ["/bin/sh", "-c", 'exec "$@" >"$JUPYTER_PATH/kernel.log" 2>&1', "sh"]  # exec: signals reach the kernel
    write_kernel_spec(folder / "kernels/python3", {"argv": shell + command})
    for name in [name for name in os.environ if name.startswith(("MPLB", "MATPLOTLIBRC"))]:
        del os.environ[name]
    # glibc keeps large freed blocks instead of asking for new pages at every layer: measured, a fifth faster on a CPU
    os.environ.update(MALLOC_MMAP_THRESHOLD_=str(2**30), MALLOC_TRIM_THRESHOLD_=str(2**31 - 1))
    os.environ.update(HYBRID_CAM_RUN=run, PYTHONHASHSEED="0", JUPYTER_PATH=str(folder), IPYTHONDIR=f"{folder}/ipython")


def execute(path, output, parameters):
    """Run one notebook; SystemExit with the cell, its source and the error if it does not come to its end."""
    import papermill
    names = [str(name).replace("{", "{{").replace("}", "}}") for name in (path, output)]  # papermill formats them
    options = {"kernel_name": "python3", "language": "python", "cwd": ROOT, "start_timeout": 300}
    tempfile.tempdir = os.environ["JUPYTER_PATH"]  # the kernel's address and key go when the run's folder goes
    options["progress_bar"] = sys.stderr.isatty() and {"desc": path.stem, "unit": "cell", "leave": False}
    try:
        notebook = papermill.execute_notebook(*names, parameters, **options)
        if all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()):
            return
        number, source, message = "?", "", "It ended itself before its last cell."
    except papermill.PapermillExecutionError as error:
        frames = [re.sub(r"\x1b\[[\d;]*m", "", text) for text in error.traceback]
        source = next((text for text in frames if text.startswith("Cell In")), error.source)
        number, message = error.exec_count, f"{error.ename}: {error.evalue}"
    except RuntimeError as error:  # DeadKernelError among others: the kernel died, or never came to life
        begun = [c["source"] for c in read_cells(output) if "outputs" in c and c["metadata"]["papermill"]["start_time"]]
        number, source, log = len(begun), "".join(begun[-1:]), Path(os.environ["JUPYTER_PATH"], "kernel.log")
        message = f"{error}: most likely out of memory (a smaller batch_size or n_images needs less). It said last:\n"
        message += "\n".join(log.read_text("utf-8", "replace").splitlines()[-8:] or ["nothing"])
    finally:
        tempfile.tempdir = None
    lines = [f"{path.stem} failed in cell [{number}]:", *source.splitlines()[:12], *message.splitlines()[:20]]
    raise SystemExit("\n    ".join(lines) + f"\nExecuted so far: {output}. The present results are as they were.")


def finish(path, run, *renamed):
    """Stamp an executed notebook with its run, let its paths point to the target, and write it as HTML too."""
    import report  # brings nbconvert
    content = json.loads(path.read_text("utf-8").replace(*renamed))
    content["metadata"]["hybrid_cam_run"] = run
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
    path.with_suffix(".html").write_text(report.notebook_page(path, run), "utf-8")


def add_report(fresh, manifest, target):
    import report
    try:
        report.write(fresh, manifest)
    except Exception as error:  # what took hours to measure is not thrown away for a page that can be made again
        (fresh / "report.html").unlink(missing_ok=True)  # half of it, where the disk is full
        print(f"report.html was not made ({type(error).__name__}: {error}). All other results are complete and in "
              f"place; python report.py {target} makes the report from them.", file=sys.stderr, flush=True)


def say_skipped(target):
    """Name the files that the notebooks could not read and went on without (tables/NN_skipped.csv)."""
    tables = [csv.DictReader(open(path, encoding="utf-8")) for path in target.glob("tables/[0-9][0-9]_skipped.csv")]
    reasons = dict.fromkeys(row["reason"] for table in tables for row in table)
    if reasons:
        print(f"{len(reasons)} file(s) could not be read and were skipped (tables/*_skipped.csv; strict = true stops):",
              *list(reasons)[:5], *["..."] * (len(reasons) > 5), sep="\n  ", flush=True)


def run_all(args):
    """Check everything, run the notebooks, put the results in place."""
    notebooks = {path.stem: path for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))}
    specs = {stem: declared(path) for stem, path in notebooks.items()}
    chosen, given, begin = select(list(notebooks), args.only, args.start), read_given(args), time.monotonic()
    parameters = settle(given, specs, chosen)
    target = (ROOT / Path(parse("results_dir", ["str"], *given["results_dir"])).expanduser()).resolve()
    reference = ROOT / "results/reference" / (Path(args.f).stem if args.f else "default")
    if args.check and (target == reference or not reference.is_dir()):
        refuse(f"--check: there is no folder {reference} to compare this run with, or it is the one to be written.")
    _lock, fresh = claim(target), target.with_name(f"{target.name}.unfinished-{os.getpid()}")
    run = run_id(parameters, notebooks)
    (fresh / "notebooks").mkdir(parents=True)
    stale = {*chosen, *(stem for stem in notebooks for made in chosen if stem[:2] in READERS.get(made[:2], ()))}
    present = check.manifest_of(target) or {"notebooks": {}, "files": {}}
    entries = {stem: entry for stem, entry in present["notebooks"].items() if stem not in stale}
    owners = {name: file["notebook"] for name, file in present["files"].items() if file["notebook"] in entries}
    for name in owners.keys() & hashes(target).keys():  # a name that is only in a manifest could lead elsewhere
        (fresh / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(target / name, fresh / name)
    manifest = {"run": run, **circumstances(), "notebooks": entries}
    print(f"Run {run} into {target}" + (f", beside the results of {', '.join(entries)}" if entries else ""), flush=True)
    prepare_kernels(fresh / ".kernel", run)
    for count, stem in enumerate(chosen, 1):
        print(f"[{count}/{len(chosen)}] {stem}", flush=True)
        before, start, output = hashes(fresh), time.monotonic(), fresh / "notebooks" / f"{stem}.ipynb"
        values = {name: value for name, value in parameters[stem].items() if name in given}
        values |= {name: str(path) for name, path in (("root", ROOT), ("results_dir", fresh)) if name in specs[stem]}
        execute(notebooks[stem], output, values)
        entries[stem] = {"run": run, "parameters": parameters[stem], "seconds": round(time.monotonic() - start, 1),
                         "sha256": hashlib.sha256(notebooks[stem].read_bytes()).hexdigest()}
        if (resolved := fresh / "resolved.json").is_file():  # what the parameters came to, said by the notebook
            entries[stem]["resolved"] = json.loads(resolved.read_text("utf-8"))
            resolved.unlink()
        print(f"      {entries[stem]['seconds']} s", flush=True)
        finish(output, run, fresh.name, target.name)
        owners |= {name: stem for name, digest in hashes(fresh).items() if before.get(name) != digest}
    shutil.rmtree(fresh / ".kernel")
    for stem in chosen:  # only now, as 01 fills the data's folder
        paths = {"arch", "data_dir", "dataset", "weights"} & specs[stem].keys()
        entries[stem]["parameters"] = parameters[stem] | {name: portable(parameters[stem][name]) for name in paths}
    manifest["seconds"] = round(time.monotonic() - begin, 1)
    add_report(fresh, manifest, target)
    owners["report.html"] = "report.py"
    manifest["files"] = {name: {"notebook": owners[name], "bytes": (fresh / name).stat().st_size, "sha256": digest}
                         for name, digest in hashes(fresh).items()}
    (fresh / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", "utf-8")
    put_in_place(fresh, target)
    first = [target / name for name in ("report.html", f"notebooks/{chosen[-1]}.html", "summary.csv", "figures")]
    print(f"Done in {time.monotonic() - begin:.0f} s: {len(manifest['files'])} files in {target}. Look first at",
          *(f"  {path}" for path in first if path.exists()), sep="\n", flush=True)
    say_skipped(target)
    if args.check:
        check.report(target, reference)


def main():
    def stop(number, frame):
        os.write(2, f"Stopped by signal {number}; nothing unfinished was put in place.\n".encode())
        sys.exit(128 + number)
    parser = argparse.ArgumentParser("./run_all.sh", None, __doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="a parameter")
    parser.add_argument("-f", metavar="FILE", help="a YAML file of parameters, as params/smoke.yaml; -p wins over it")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--only", metavar="NN[,NN]", help="run these notebooks only, such as 04,05")
    part.add_argument("--from", dest="start", metavar="NN", help="run this notebook and those after it")
    part.add_argument("--check", action="store_true", help="compare the results of all notebooks with their reference")
    parser.add_argument("--results-dir", dest="p", action="append", type=lambda value: ("results_dir", value),
                        metavar="DIR", help="the same as -p results_dir DIR: where the results go (results/default)")
    args = parser.parse_args()
    for number in filter(lambda n: signal.getsignal(n) != signal.SIG_IGN, (signal.SIGINT, signal.SIGTERM)):
        signal.signal(number, stop)
    try:
        run_all(args)
    except OSError as error:  # a full disk, a folder without permission
        raise SystemExit(f"run_all.sh: stopped by {error}. What is in place is complete, the old results or the new "
                         "ones. Make room or give permission, and run it again: what was measured is kept.") from None


if __name__ == "__main__":
    main()
