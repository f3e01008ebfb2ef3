"""Run the notebooks in order through papermill, and put the results in place once all of them have
succeeded.

Parameters are checked against params/default.yaml before the first notebook starts, and the run
says about how long it will take on this machine (runner/estimate.py). It writes into a fresh
folder beside its target (results/default.unfinished-PID), which takes the target's place at the
end. With --only and --from the results of the other notebooks are kept, except of those that read
what is made anew: 01 feeds all the others, 04 feeds 05. manifest.json tells the run and the
parameters behind each notebook's results. Files that you name are looked for where you
stand, then in the repository; a relative results folder lies in the repository. With --check the
results are compared (runner/check.py) with results/reference/NAME, NAME being that of the parameter
file of -f, or else "default". Exit codes: 0 done, 1 a notebook failed, a file could not be written
or --check found a difference, 2 refused before the first notebook started, 130 or 143 stopped by a
signal.

./run_all.sh explain PHOTO... explains photographs, without the notebooks (runner/explain.py);
./run_all.sh explain --help tells how.
"""

from __future__ import annotations

import argparse
import csv
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from filelock import FileLock, Timeout

from lab import HOME, settings, sha256
from runner import check, estimate, parameters, progress
from runner.parameters import refuse

# Which notebooks read what a notebook writes.
READERS = {"01": ("02", "03", "04", "05"), "04": ("05",)}
MEASURE = "from runner import cluster; cluster.main()"  # in a process of its own, as kernels are
PROGRESS = "progress.json"  # in the kernels' folder: the pictures that one has scored so far
PATHS = ("arch", "data_dir", "dataset", "weights")  # settings that may name a file or a folder


# ---- what is to be run


@dataclass(frozen=True)
class Plan:
    """A run that is checked: nothing of it can be refused any more."""

    notebooks: Mapping[str, Path]  # all of them by stem, in order
    chosen: Sequence[str]  # the stems of those to run
    values: Mapping[str, object]  # the settings that the user gave
    parameters: Mapping[str, Mapping]  # every setting of every notebook, by stem
    target: Path  # where the results go
    reference: Path  # what --check compares them with
    check: bool


def make_plan(args: argparse.Namespace) -> Plan:
    """The run that the command line asks for; exit code 2 where it cannot be."""
    paths = sorted((HOME / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    notebooks = {path.stem: path for path in paths}
    chosen = select(list(notebooks), args.only, args.start)
    for stem in chosen:
        try:
            parameters.declared_in(notebooks[stem])
        except (ValueError, SyntaxError) as error:
            refuse(f"{stem}: {error}")
    given = parameters.read_given(args.f, args.p)
    values = parameters.check_given(given, chosen)
    results_dir = values.get("results_dir", settings.declared()["results_dir"]["default"])
    plan = Plan(
        notebooks=notebooks,
        chosen=chosen,
        values=values,
        parameters={stem: parameters.parameters_of(stem, values) for stem in notebooks},
        target=(HOME / Path(results_dir).expanduser()).resolve(),
        reference=HOME / "results/reference" / (Path(args.f).stem if args.f else "default"),
        check=args.check,
    )
    if plan.check and (plan.target == plan.reference or not plan.reference.is_dir()):
        refuse(
            f"--check: there is no folder {plan.reference} to compare this run with, or it is the "
            "one to be written."
        )
    return plan


def select(stems: Sequence[str], only: str | None, start: str | None) -> list[str]:
    """The notebooks to run: all of them, those with the numbers of `only`, or the one of `start`
    and all after it.
    """
    asked = start or only
    if asked is None:
        return list(stems)
    numbers = {word.strip().zfill(2) for word in asked.split(",")}
    found = [stem for stem in stems if stem[:2] in numbers]
    if len(found) != len(numbers):
        refuse(f"there is no notebook {asked}, only {', '.join(stems)}.")
    return list(stems[stems.index(found[0]) :]) if start else found


def run_id(plan: Plan) -> str:
    """12 hex digits of all that determines the results: parameters, cells, code, requirements,
    weights, own networks.
    """
    cells = []
    for path in plan.notebooks.values():
        cells.append([cell["source"] for cell in parameters.read_cells(path)])
    files = {HOME / "cam_core.py", HOME / "requirements.txt"}
    files.update((HOME / "lab").glob("*.py"))
    files.update((HOME / "data/checkpoints").glob("*.pth"))
    for values in plan.parameters.values():
        files.add(Path(values.get("weights", "")))
        files.add(Path(values.get("arch", "").rpartition(":")[0]))
    hashes = sorted(sha256(path) for path in files if path.is_file())
    return hash_of([plan.parameters, cells, hashes])[:12]


def hash_of(content) -> str:
    """The SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# ---- the results folder


def claim(target: Path):
    """Hold `target` for this process and clear away what dead runs left beside it; a context
    manager that lets go.
    """
    if target in (HOME / "results", HOME, *HOME.parents) or os.path.ismount(target):
        refuse(f"results_dir: {target} is not the folder of one run; name one inside it.")
    lock = FileLock(target.with_name(f".{target.name}.lock"))  # ends with the process
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        held = lock.acquire(blocking=False)
    except Timeout:
        refuse(f"another run is writing {target}. Wait for it, or give another --results-dir.")
    except OSError as error:
        refuse(f"results_dir: {error}")
    clear_away(target)
    if target.exists() and not check.manifest_of(target) and not is_empty(target):
        refuse(
            f"results_dir: {target} was not made by a run (no manifest.json), so it is not "
            "replaced."
        )
    return held


def is_empty(target: Path) -> bool:
    """Whether it is a folder with nothing in it."""
    return target.is_dir() and not any(target.iterdir())


def clear_away(target: Path) -> None:
    """Remove the unfinished folders of runs that are dead. A finished one was killed between the
    two steps of `put_in_place`: it becomes the target where there is none.
    """
    name = re.compile(re.escape(target.name) + r"\.unfinished-\d+")
    for path in sorted(target.parent.iterdir()):
        if not name.fullmatch(path.name):
            continue
        if check.manifest_of(path) and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path)


def put_in_place(fresh: Path, target: Path) -> None:
    """Make the finished folder the target. A kill between the two steps is mended by the next
    `claim`.
    """
    old = target.with_name(f"{target.name}.unfinished-0")
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    if old.exists():
        shutil.rmtree(old)


def hashes_of(top: Path) -> dict[str, str]:
    """{name: SHA-256} of all files in a folder."""
    files = [path for path in sorted(top.rglob("*")) if path.is_file()]
    return {str(path.relative_to(top)): sha256(path) for path in files}


def keep_results(plan: Plan, fresh: Path) -> tuple[dict, dict]:
    """Copy what --only and --from leave as it is. Returns the manifest's entries of the notebooks
    that are kept, and {file: notebook that wrote it}.
    """
    stale = set(plan.chosen)
    for stem in plan.notebooks:
        if any(stem[:2] in READERS.get(made[:2], ()) for made in plan.chosen):
            stale.add(stem)
    present = check.manifest_of(plan.target) or {"notebooks": {}, "files": {}}
    entries = {stem: entry for stem, entry in present["notebooks"].items() if stem not in stale}
    there = hashes_of(plan.target)  # the manifest of a stranger could name files elsewhere
    owners = {}
    for name, file in present["files"].items():
        if name in there and file["notebook"] in entries:
            owners[name] = file["notebook"]
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(plan.target / name, fresh / name)
    return entries, owners


# ---- the manifest


@functools.cache
def portable(value: str) -> str | dict:
    """A parameter for the manifest: a path as seen from the repository, one outside by its name and
    content's hash.
    """
    path = HOME / re.sub(r"(\.py):\w+$", r"\1", value)
    if Path(os.path.normpath(path)).is_relative_to(HOME):
        return os.path.relpath(value, HOME) if os.path.isabs(value) else value
    content = {"": sha256(path)} if path.is_file() else hashes_of(path)
    lasting = {name: digest for name, digest in content.items() if not name.startswith("cache/")}
    return {"name": os.path.basename(os.path.normpath(value)), "sha256": hash_of(lasting)}


def portable_parameters(values: Mapping[str, object]) -> dict[str, object]:
    """A notebook's parameters for the manifest."""
    return {name: portable(value) if name in PATHS else value for name, value in values.items()}


def circumstances() -> dict:
    """Commit (None outside git), packages and machine, for the manifest."""
    commit = ""
    if shutil.which("git"):
        command = "git --git-dir=.git describe --always --dirty --abbrev=40 --exclude=*".split()
        commit = subprocess.run(command, cwd=HOME, capture_output=True, text=True).stdout.strip()
    pinned = re.findall(r"^([\w-]+)==", (HOME / "requirements.txt").read_text("utf-8"), re.M)
    return {
        "commit": commit.removesuffix("-dirty") or None,
        "dirty": commit.endswith("-dirty") if commit else None,
        "packages": {name: importlib.metadata.version(name) for name in pinned},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
    }


def write_manifest(fresh: Path, manifest: dict, owners: Mapping[str, str]) -> None:
    """Write manifest.json, with each file's size, hash and the notebook that wrote it; it is the
    last file of a run.
    """
    manifest["files"] = {}
    for name, digest in hashes_of(fresh).items():
        size = (fresh / name).stat().st_size
        manifest["files"][name] = {"notebook": owners[name], "bytes": size, "sha256": digest}
    text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
    (fresh / "manifest.json").write_text(text, "utf-8")


# ---- one notebook


def prepare_kernels(folder: Path, run: str) -> None:
    """Kernels inherit this environment: this interpreter, and nobody's own kernels, start-up files
    or plot settings.

    What a kernel says beside its notebook, as it ends or crashes, goes to kernel.log instead of the
    terminal.
    """
    from ipykernel.kernelspec import make_ipkernel_cmd, write_kernel_spec

    logging.disable()  # papermill's doubts about types, asyncio's about a run that was stopped
    quiet = ["--log-level=CRITICAL", "--IPKernelApp.capture_fd_output=False"]
    command = make_ipkernel_cmd(extra_arguments=quiet)
    # exec: signals reach the kernel and not a shell around it
    shell = ["/bin/sh", "-c", 'exec "$@" >"$JUPYTER_PATH/kernel.log" 2>&1', "sh"]
    write_kernel_spec(folder / "kernels/python3", {"argv": shell + command})
    for name in list(os.environ):
        if name.startswith(("MPLB", "MATPLOTLIBRC")):
            del os.environ[name]
    os.environ["HYBRID_CAM_RUN"] = run
    os.environ["HYBRID_CAM_PROGRESS"] = str(folder / PROGRESS)
    os.environ["PYTHONHASHSEED"] = "0"
    os.environ["JUPYTER_PATH"] = str(folder)
    os.environ["IPYTHONDIR"] = str(folder / "ipython")
    # glibc keeps large freed blocks instead of asking for new pages at every layer: measured, a
    # fifth faster on a CPU
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**30)
    os.environ["MALLOC_TRIM_THRESHOLD_"] = str(2**31 - 1)


def execute(path: Path, output: Path, values: Mapping[str, object]) -> None:
    """Run one notebook; SystemExit with the cell, its source and the error if it does not come to
    its end.
    """
    import papermill

    # The kernel's address and key lie where they go with the run's folder.
    tempfile.tempdir = os.environ["JUPYTER_PATH"]
    try:
        notebook = papermill.execute_notebook(
            braces_doubled(path),
            braces_doubled(output),
            values,
            kernel_name="python3",
            language="python",
            cwd=HOME,
            start_timeout=300,
            progress_bar=False,  # of cells, of which some take a thousand times as long as others
        )
    except papermill.PapermillExecutionError as error:
        fail(path, output, *raised(error))
    except RuntimeError as error:  # such as DeadKernelError: it died, or never came to life
        fail(path, output, *died(error, output))
    finally:
        tempfile.tempdir = None
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    if not all(cell.execution_count for cell in code):
        fail(path, output, "?", "", "It ended itself before its last cell.")


def braces_doubled(path: Path) -> str:
    """A path for papermill, which formats it as a template."""
    return str(path).replace("{", "{{").replace("}", "}}")


def raised(error) -> tuple[int, str, str]:
    """The cell's number, its source with the line marked, and the message of an error that a cell
    raised.
    """
    frames = [re.sub(r"\x1b\[[\d;]*m", "", text) for text in error.traceback]
    source = next((text for text in frames if text.startswith("Cell In")), error.source)
    return error.exec_count, source, f"{error.ename}: {error.evalue}"


def died(error: RuntimeError, output: Path) -> tuple[int, str, str]:
    """The same for a kernel that is gone: the last cell that began, and the last that the kernel
    said.
    """
    begun = []
    for cell in parameters.read_cells(output):
        if "outputs" in cell and cell["metadata"]["papermill"]["start_time"]:
            begun.append(cell["source"])
    log = Path(os.environ["JUPYTER_PATH"], "kernel.log").read_text("utf-8", "replace")
    last = "\n".join(log.splitlines()[-8:]) or "nothing"
    hint = "most likely out of memory (a smaller batch_size or n_images needs less). It said last:"
    return len(begun), "".join(begun[-1:]), f"{error}: {hint}\n{last}"


def fail(path: Path, output: Path, number: int | str, source: str, message: str) -> NoReturn:
    """SystemExit with what a person wants to know about a notebook that failed."""
    lines = [f"{path.stem} failed in cell [{number}]:"]
    lines += source.splitlines()[:12]
    lines += message.splitlines()[:20]
    text = "\n    ".join(lines)
    raise SystemExit(f"{text}\nExecuted so far: {output}. The present results are as they were.")


def finish(path: Path, run: str, fresh: str, target: str) -> None:
    """Stamp an executed notebook with its run, let its paths point to the target, and write it as
    HTML too.
    """
    from runner import report  # brings nbconvert

    content = json.loads(path.read_text("utf-8").replace(fresh, target))
    content["metadata"]["hybrid_cam_run"] = run
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
    path.with_suffix(".html").write_text(report.notebook_page(path, run), "utf-8")


def measure_on_cluster(scheduler: str, values: Mapping[str, object]) -> None:
    """Let the workers of a Dask cluster measure what notebook 05 asks for, into the cache where 05
    finds it.
    """
    print(f"      measuring on {scheduler}", flush=True)
    task = json.dumps({"scheduler": scheduler, "values": values})
    done = subprocess.run([sys.executable, "-c", MEASURE], input=task, cwd=HOME, text=True)
    if done.returncode != 0:
        raise SystemExit(
            "Measuring on the cluster failed, see above. The present results are as they were."
        )


# ---- the whole run


def run_all(args: argparse.Namespace) -> None:
    """Check everything, run the notebooks, put the results in place."""
    plan = make_plan(args)
    begin = time.monotonic()
    with claim(plan.target):
        fresh = plan.target.with_name(f"{plan.target.name}.unfinished-{os.getpid()}")
        run_notebooks(plan, fresh, begin)
        put_in_place(fresh, plan.target)
    seconds = time.monotonic() - begin
    print_done(plan, seconds)
    print_skipped(plan.target)
    if plan.check:
        check.report(plan.target, plan.reference)


def run_notebooks(plan: Plan, fresh: Path, begin: float) -> None:
    """Make a complete results folder: the notebooks' results, the report and the manifest."""
    (fresh / "notebooks").mkdir(parents=True)
    run = run_id(plan)
    entries, owners = keep_results(plan, fresh)
    beside = f", beside the results of {', '.join(entries)}" if entries else ""
    print(f"Run {run} into {plan.target}{beside}", flush=True)
    manifest = {"run": run, **circumstances(), "notebooks": entries}
    prepare_kernels(fresh / ".kernel", run)
    machine, expected = look_ahead(plan)
    if machine is not None:
        manifest["machine"] = machine
    for count, stem in enumerate(plan.chosen, 1):
        here = expected.get(stem)
        about = f", about {estimate.in_words(here.seconds)}" if here else ""
        print(f"[{count}/{len(plan.chosen)}] {stem}{about}", flush=True)
        before = hashes_of(fresh)
        with progress.bar(stem, here, fresh / ".kernel" / PROGRESS):
            entries[stem] = run_one(plan, stem, fresh, run)
        if here:
            entries[stem]["estimate"] = round(here.seconds, 1)
        for name, digest in hashes_of(fresh).items():
            if before.get(name) != digest:
                owners[name] = stem
        print(f"      {entries[stem]['seconds']} s", flush=True)
    shutil.rmtree(fresh / ".kernel")
    for stem in plan.chosen:  # only now, as 01 fills the data's folder, whose hash this may need
        entries[stem]["parameters"] = portable_parameters(plan.parameters[stem])
    manifest["seconds"] = round(time.monotonic() - begin, 1)
    add_report(fresh, manifest, plan.target)
    owners["report.html"] = "runner.report"
    write_manifest(fresh, manifest, owners)


def look_ahead(plan: Plan) -> tuple[dict | None, dict[str, estimate.Expected]]:
    """Say how long the run will take. Returns what this machine is (None where it could not be
    asked) and what is expected of each notebook.
    """
    machine = estimate.answer(estimate.ask(plan.parameters))
    if machine is None:
        return None, {}
    expected = {}
    for stem in plan.chosen:
        expected[stem] = estimate.expected_of(stem, plan.parameters[stem], machine)
    data = HOME / Path(plan.parameters[plan.chosen[0]]["data_dir"])
    less = any((data / "cache").glob("*")) or bool(plan.values.get("scheduler"))
    print(estimate.in_a_line(expected, machine, less), flush=True)
    if machine["note"]:
        print(machine["note"], flush=True)
    return machine, expected


def run_one(plan: Plan, stem: str, fresh: Path, run: str) -> dict:
    """Run one notebook and finish its copy. Returns its entry in the manifest."""
    path = plan.notebooks[stem]
    output = fresh / "notebooks" / f"{stem}.ipynb"
    begin = time.monotonic()
    if stem.startswith("05") and plan.values.get("scheduler"):
        measure_on_cluster(plan.values["scheduler"], parameters.given_to(stem, plan.values, fresh))
    execute(path, output, parameters.for_papermill(path, plan.values, fresh))
    entry = {"run": run, "seconds": round(time.monotonic() - begin, 1), "sha256": sha256(path)}
    pictures = progress.counts(fresh / ".kernel" / PROGRESS)
    if pictures:
        entry["pictures"] = pictures
    resolved = fresh / "resolved.json"
    if resolved.is_file():  # what the parameters came to, written by the notebook
        entry["resolved"] = json.loads(resolved.read_text("utf-8"))
        resolved.unlink()
    finish(output, run, fresh.name, plan.target.name)
    return entry


def add_report(fresh: Path, manifest: Mapping, target: Path) -> None:
    """Write report.html. What took hours to measure is not thrown away for a page that can be made
    again.
    """
    from runner import report

    try:
        report.write(fresh, manifest)
    except Exception as error:
        (fresh / "report.html").unlink(missing_ok=True)  # half of it, where the disk is full
        print(
            f"report.html was not made ({type(error).__name__}: {error}). All other results are "
            f"complete and in place; python -m runner.report {target} makes it from them.",
            file=sys.stderr,
            flush=True,
        )


def print_done(plan: Plan, seconds: float) -> None:
    """Tell where the results are and what to open first."""
    manifest = check.manifest_of(plan.target)
    entries = [manifest["notebooks"][stem] for stem in plan.chosen]
    scored = sum(entry.get("pictures", {"forward": 0})["forward"] for entry in entries)
    pictures = f", scored {scored:,} pictures" if scored else ""
    count = len(manifest["files"])
    print(f"Done in {seconds:.0f} s{pictures}: {count} files in {plan.target}. Look first at")
    for name in ("report.html", f"notebooks/{plan.chosen[-1]}.html", "summary.csv", "figures"):
        if (plan.target / name).exists():
            print(f"  {plan.target / name}", flush=True)


def print_skipped(target: Path) -> None:
    """Repeat what the notebooks noted of a folder (tables/NN_notes.csv), and the files that they
    could not use (tables/NN_skipped.csv).
    """
    heads = {
        "notes": "note(s) on the data set's folder (tables/*_notes.csv)",
        "skipped": "file(s) could not be read and were skipped (tables/*_skipped.csv; strict = "
        "true stops)",
    }
    for kind, head in heads.items():
        reasons = {}
        for path in sorted(target.glob(f"tables/[0-9][0-9]_{kind}.csv")):
            with open(path, encoding="utf-8", newline="") as file:
                for row in csv.DictReader(file):
                    reasons[row["reason"]] = True
        if reasons:
            print(f"{len(reasons)} {head}:")
            for reason in list(reasons)[:5]:
                print(f"  {reason}")
        if len(reasons) > 5:
            print("  ...", flush=True)


# ---- the command line


def parse_arguments() -> argparse.Namespace:
    """The command line's words."""
    parser = parameters.command_line("./run_all.sh", __doc__, "results/default")
    texts = {
        "--only": "run these notebooks only, such as 04,05",
        "--from": "run this notebook and those after it",
        "--check": "compare the results of all notebooks with their reference",
    }
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--only", metavar="NN[,NN]", help=texts["--only"])
    part.add_argument("--from", dest="start", metavar="NN", help=texts["--from"])
    part.add_argument("--check", action="store_true", help=texts["--check"])
    args, unknown = parser.parse_known_args()
    if unknown:
        parser.error(
            f"{' '.join(unknown)} is not understood. Settings are given as -p NAME VALUE; "
            "photographs are explained by ./run_all.sh explain PHOTO."
        )
    return args


def stop(number: int, frame) -> None:
    """End the run by a signal, with the exit code that shells expect."""
    os.write(2, f"Stopped by signal {number}; nothing unfinished was put in place.\n".encode())
    sys.exit(128 + number)


def main() -> None:
    args = parse_arguments()
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        run_all(args)
    except OSError as error:  # a full disk, a folder without permission
        raise SystemExit(
            f"run_all.sh: stopped by {error}. What is in place is complete, the old results or the "
            "new ones. Make room or give permission, and run it again: what was measured is kept."
        ) from None


if __name__ == "__main__":
    main()
