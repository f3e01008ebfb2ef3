"""What a run leaves behind when it is killed, interrupted, or cannot write: `python tests/faults.py`, as root on Linux.

It copies the project to a folder of its own and makes small results there with notebooks 01 and 04. Then, fault after
fault, one of the two is run again over them and broken, and what is left is looked at: is every file in the results
folder the one that its manifest.json lists, and are these the old results or the new ones? Is every file of the cache
whole? Then the same run starts once more, undisturbed: it has to succeed, to give the bytes that a run without a fault
gives, and to leave nothing unfinished. All that was tried and seen goes to docs/faults.md. Exit code 0: all of it held.
It takes a minute or so a fault: `--parts` does some of it, and `--rows FILE` keeps what was seen, so that the rest can
follow later and docs/faults.md tells all of it.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

REPO = Path(__file__).resolve().parents[1]
TINY = {"n_train": 10, "n_val": 10, "n_test": 10, "n_images": 2, "steps": 2, "arch": "squeezenet1_1"}
MAY = "-all,+dac_read_search"  # read everything: the interpreter may lie in a home that is closed to others
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", f"--inh-caps={MAY}", f"--ambient-caps={MAY}"]
# Writing a shard takes less than a millisecond. With this as sitecustomize.py it stops half-way for two seconds.
SLOW = """import pathlib, time
write = pathlib.Path.write_text
def halting(self, text, *more, **options):
    if self.suffix != ".part":
        return write(self, text, *more, **options)
    with open(self, "w", encoding="utf-8") as file:
        file.write(text[: len(text) // 2])
        file.flush()
        time.sleep(2)
        file.write(text[len(text) // 2 :])
pathlib.Path.write_text = halting
"""


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def size_of(paths):
    return sum(path.stat().st_size for path in paths if path.is_file())


class Bench:
    """A copy of the project with small results, and what was tried on it."""

    def __init__(self, home, command, file):
        self.home, self.cache, self.results = home, home / "data/cache", home / "results/tiny"
        self.seconds, self.expected, self.command, self.file, self.part = {}, {}, command, file, ""
        self.rows = json.loads(file.read_text()) if file and file.is_file() else []
        skip = shutil.ignore_patterns(".*", "__pycache__", "tests", "smoke", "cache", "synthetic", "trained", "default")
        shutil.copytree(REPO, home, ignore=skip)
        self.temporary = home.parent / "tmp"
        self.temporary.mkdir()
        self.temporary.chmod(0o777)
        self.notebooks = {path.name[:2]: path for path in (home / "notebooks").glob("*.ipynb")}

    def start(self, number, wrap=(), out=subprocess.DEVNULL, **environment):
        """The pipeline with one notebook, in a process group of its own."""
        cells = json.loads(self.notebooks[number].read_text())["cells"]
        declared = next("".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", []))
        given = {name: value for name, value in TINY.items() if f"\n{name}:" in declared}
        words = [str(word) for pair in given.items() for word in ("-p", *pair)]
        words += ["--only", number, "--results-dir", str(self.results)]
        command = [*wrap, sys.executable, str(self.home / "pipeline.py"), *words]
        return subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE, text=True, start_new_session=True,
                                env={**os.environ, "TMPDIR": str(self.temporary), **environment})  # fmt: skip

    def complete(self):
        """The manifest of the results in place, if every file is the one that it lists; else AssertionError."""
        manifest = json.loads((self.results / "manifest.json").read_text())
        there = {str(p.relative_to(self.results)): digest(p) for p in self.results.rglob("*") if p.is_file()}
        there.pop("manifest.json")
        listed = {name: entry["sha256"] for name, entry in manifest["files"].items()}
        assert there == listed, "files are not those of manifest.json"
        return manifest

    def undisturbed(self, number):
        """Run a notebook without a fault: the bytes that its runs have in common, tables without timings, pictures."""
        begin, process = time.monotonic(), self.start(number)
        said = process.communicate(timeout=900)[1]
        assert process.returncode == 0, f"exit code {process.returncode}: {said}"
        self.seconds[number] = time.monotonic() - begin  # the last one: how long it takes depends on what else runs
        files, stem = self.complete()["files"], self.notebooks[number].stem
        steady = r"(?!.*cost).*\.(csv|json|png|pdf|md|tex)"
        return {n: f["sha256"] for n, f in files.items() if f["notebook"] == stem and re.fullmatch(steady, n)}

    def clear(self, number):
        """Let the next run of a notebook do its work, instead of taking what is finished; remember what is in place."""
        shutil.rmtree(self.home / "data/synthetic" if number == "01" else self.cache, ignore_errors=True)
        self.old = digest(self.results / "manifest.json")

    def half_written(self):
        """The parts of shards that lie in the cache; AssertionError if anything else there is not whole."""
        parts = []
        for path in self.cache.glob("*"):
            if path.suffix == ".json":
                text = path.read_text()
                key = json.dumps(json.loads(text)["key"], sort_keys=True) if text.endswith("}") else ""
                assert hashlib.sha256(key.encode()).hexdigest().startswith(path.stem), f"{path.name} is not whole"
            else:
                parts.append(path)
        return parts

    def seen(self, part):
        """How many rows of a part there are, from an earlier start with the same file."""
        return sum(row["part"] == part for row in self.rows)

    def judge(self, number, fault, detail, process, said, codes):
        """Look at what a fault left, run the notebook again, and note both; `codes`: the exit codes that are right."""
        row = {"part": self.part, "fault": fault, "run": number, "detail": detail, "code": process.returncode}
        said = said.replace(f"{self.home}/", "").replace(f"{self.home.parent}/", "").replace(f"{REPO}/", "")
        row |= {"said": said.strip(), "seconds": round(self.seconds[number])}
        row["held"] = process.returncode in codes
        try:
            self.complete()
            row["results"] = "old" if digest(self.results / "manifest.json") == self.old else "new"
            parts = self.half_written()
            for path in parts:
                os.utime(path, (0, 0))  # as if the fault were long ago: a part of the last hour may be another run's
            row["parts"] = len(parts)
        except (AssertionError, OSError, ValueError) as error:
            row |= {"results": f"broken: {error}", "parts": "", "held": False}
        try:
            same = self.undisturbed(number) == self.expected[number]
            left = [path for path in self.results.parent.iterdir() if ".unfinished-" in path.name]
            left += [*self.temporary.iterdir(), *(self.half_written() if number == "04" else [])]
            row["again"] = "same bytes" if same and not left else f"other bytes: {not same}; left over: {left}"
            row["held"] &= same and not left
        except (AssertionError, OSError, ValueError) as error:
            row |= {"again": f"failed: {error}", "held": False}
        self.rows.append(row)
        self.rows.sort(key=lambda row: list(PARTS).index(row["part"]))
        if self.file:
            self.file.write_text(json.dumps(self.rows, indent=1))
        report(self)
        shown = [row[name] for name in ("run", "fault", "detail", "code", "results", "parts", "again", "said")]
        print("held  " if row["held"] else "BROKEN", *shown, sep=" | ", flush=True)

    def ended(self, number, fault, detail, codes, **start):
        """A run that meets its fault by itself."""
        self.old = digest(self.results / "manifest.json")
        process = self.start(number, **start)
        said = process.communicate(timeout=900)[1]
        return functools.partial(self.judge, number, fault, detail, process, said, codes)


def kill(process, kernel_too):
    """SIGKILL the process group; and, as the kernel has a group of its own, that as well, or not."""
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for child in family if kernel_too else ():
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    said = process.communicate()[1]
    alive = psutil.wait_procs(family, timeout=30)[1]  # a kernel that is left alone notices, and ends
    assert not alive, f"still there 30 s later: {alive}"
    return said


def killed_anywhere(bench, folder, args):
    draw = random.Random(args.seed)
    moments = [draw.random() for _ in range(args.kills)]
    for k, moment in list(enumerate(moments))[bench.seen("kills") :]:
        number = "01" if k % 4 == 3 else "04"
        bench.clear(number)
        when, process = moment * bench.seconds[number], bench.start(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(when)
        whom = "had ended by itself" if process.poll() is not None else "runner and kernel" if k % 2 else "runner alone"
        said = kill(process, kernel_too=k % 2)
        detail = f"after {when:.1f} s of about {bench.seconds[number]:.0f}; {whom}"
        bench.judge(number, "SIGKILL", detail, process, said, (-9, 0))


def killed_in_a_shard(bench, folder, args):
    (folder / "slow").mkdir()
    (folder / "slow/sitecustomize.py").write_text(SLOW)
    for k in range(bench.seen("shards"), args.shards):
        bench.clear("04")
        process, end = bench.start("04", PYTHONPATH=str(folder / "slow")), time.monotonic() + 300
        while not any(part.stat().st_size for part in bench.cache.glob("*.part")):
            assert time.monotonic() < end and process.poll() is None, "no shard was written"
            time.sleep(0.02)
        said = kill(process, kernel_too=k % 2)
        written, whom = size_of(bench.cache.glob("*.part")), "runner and kernel" if k % 2 else "runner alone"
        detail = f"{written} bytes of it written; {whom}"
        bench.judge("04", "SIGKILL while a shard is written", detail, process, said, (-9,))


def interrupted(bench, folder, args):
    for fault, code in (("Ctrl-C", 130), ("kernel killed from outside", 1)):
        bench.clear("04")
        process, kernel = bench.start("04"), None
        while not kernel:  # one that has loaded its libraries
            assert process.poll() is None, "the run ended before it had a kernel"
            family = psutil.Process(process.pid).children(recursive=True)
            kernel = next((p for p in family if p.cpu_times().user > 3), None)
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT) if code == 130 else kernel.kill()
        said = process.communicate(timeout=120)[1]
        how = "SIGINT to the process group" if code == 130 else "SIGKILL"
        bench.judge("04", fault, f"{how} while a cell computes", process, said, (code,))


def planted(bench, folder, args):
    """A cell that raises, and one that ends its process."""
    whole, died = bench.notebooks["04"].read_text(), "import os\nos.write(2, b'planted: no memory left')\nos._exit(9)"
    for fault, source in (("a cell raises", "raise ValueError('planted')"), ("a kernel dies", died)):
        book = json.loads(whole)
        cell = next(c for c in book["cells"] if c["cell_type"] == "code")
        book["cells"].append(cell | {"id": "planted", "source": source, "metadata": {}})
        bench.notebooks["04"].write_text(json.dumps(book))
        judge = bench.ended("04", fault, source.splitlines()[-1] + " as the last cell", (1,))
        bench.notebooks["04"].write_text(whole)
        judge()


@contextlib.contextmanager
def small_disk(folder, room):
    """A disk of `room` bytes mounted on a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(folder)], check=True)
    try:
        yield lambda more: subprocess.run(["mount", "-o", f"remount,size={more}", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def no_room(bench, folder, args):
    own, files = bench.results, bench.complete()["files"].values()
    all_of_it, kept = (sum(f["bytes"] for f in files if f["notebook"][:2] in few) for few in (("01", "04"), ("01",)))
    fresh = all_of_it - kept
    for room, detail in (
        (all_of_it + kept // 2, "when the results of 01 are copied"),
        (all_of_it + kept + fresh // 2, "when half of the new results are written"),
    ):
        with small_disk(bench.home / "disk", room + 2**18) as enlarge:
            bench.results = bench.home / "disk/tiny"
            shutil.copytree(own, bench.results)
            judge = bench.ended("04", "full disk (tmpfs)", f"{detail}; then enlarged", (1,))
            enlarge(4 * room)
            judge()
            bench.results = own
    bench.clear("04")
    with small_disk(bench.cache, 4096):
        (bench.cache / "filler").write_bytes(bytes(4096))
        judge = bench.ended("04", "full disk (tmpfs)", "under data/cache; then unmounted", (1,))
    judge()
    limit = ["bash", "-c", 'ulimit -f 200; exec "$@"', "bash"]
    bench.clear("04")
    bench.ended("04", "ulimit -f 200", "no file may exceed 200 KiB", (1,), wrap=limit)()
    with open("/dev/full", "w") as full:
        bench.ended("04", "/dev/full", "as standard output", (1, 120), out=full)()


def not_allowed(bench, folder, args):
    """An ordinary user, nobody, who may read everything but not write."""
    own, home = bench.results, folder / "home"
    home.mkdir()
    bench.ended("04", "no permission", "as nobody; the results folder is root's", (2,), wrap=NOBODY, HOME=str(home))()
    bench.clear("04")
    bench.results = home / "tiny"
    shutil.copytree(own, bench.results)
    for path in (home, *home.rglob("*")):
        os.chown(path, 65534, 65534)
    (bench.home / "data").chmod(0o755)
    bench.ended("04", "no permission", "as nobody; data/cache cannot be made", (1,), wrap=NOBODY, HOME=str(home))()
    bench.results = own


PARTS = {"interrupted": interrupted, "planted": planted, "room": no_room, "permission": not_allowed,
         "shards": killed_in_a_shard, "kills": killed_anywhere}  # fmt: skip


def report(bench):
    """docs/faults.md: all that was tried, what it left, and what was said."""
    rows = bench.rows
    times = {number: sorted({row["seconds"] for row in rows if row["run"] == number}) for number in ("01", "04")}
    length = ", ".join(f"{number} takes {s[0]} to {s[-1]} s" for number, s in times.items() if s)
    kills = [row["fault"] for row in rows if row["fault"].startswith("SIGKILL")]
    shards = sum("shard" in fault for fault in kills)
    old, new = (sum(row["results"] == which for row in rows) for which in ("old", "new"))
    lines = [
        "# What was tried to break a run, and what it left", "",
        f"Made by `{bench.command}` on {platform.system()} with {os.cpu_count()} CPU cores; the docstring of that file "
        "tells what is looked at. Each line is a run of notebook 01 (draws the images) or 04 (measures, and fills "
        f"data/cache) of a copy of this project, with {', '.join(f'{k} {v}' for k, v in TINY.items())}: without a "
        f"fault, {length}. Every run began with complete results in place.", "",
        f"**{sum(row['held'] for row in rows)} of {len(rows)} held**: {len(kills)} times SIGKILL, {shards} of these "
        f"while a shard was half written (the write was slowed to two seconds, so that a kill could meet it), and "
        f"{len(rows) - len(kills)} other faults. {old} times the old results were in place afterwards, and "
        f"{new} times the new ones, complete. *Parts* are half-written shards left in data/cache: no run reads them, "
        "and the first run an hour later removes them (their date was set back to see it). *Same bytes*: the run after "
        "the fault ended with code 0, its tables and pictures are those of a run without a fault, its manifest lists "
        "all files by their sha256, and nothing unfinished is left.", "",
        "| | fault | notebook | when, where | exit code | results left | parts | run again | held |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for k, row in enumerate(rows, 1):
        cells = [k, *(row[name] for name in ("fault", "run", "detail", "code", "results", "parts", "again"))]
        cells = [str(cell).replace("|", "/") for cell in [*cells, "yes" if row["held"] else "**no**"]]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## What it said", "", "On the terminal (paths shortened); SIGKILL leaves no time to say anything."]
    for k, row in enumerate(rows, 1):
        if row["said"]:
            said = row["said"].splitlines()
            lines += ["", f"{k}. {row['fault']}, {row['detail']}:", "", *(f"       {line}" for line in said)]
    (REPO / "docs/faults.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs at times uniform over a run (20)")
    parser.add_argument("--shards", type=int, default=5, help="SIGKILLs while a shard is being written (5)")
    parser.add_argument("--seed", type=int, default=0, help="of the times (0)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to try (everything)")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="keep what was seen here, and go on after it")
    args = parser.parse_args()
    if os.geteuid() != 0 or not sys.platform.startswith("linux"):
        parser.error("small disks are mounted and another user is acted, so this needs Linux and root")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore Ctrl-C
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        folder.chmod(0o755)
        command = f"python tests/faults.py --kills {args.kills} --shards {args.shards} --seed {args.seed}"
        bench = Bench(folder / "project", command, args.rows)
        first = {number: bench.undisturbed(number) for number in ("01", "04")}
        for number in ("01", "04"):  # a second time from the start: these bytes have to come again, after any fault too
            bench.clear(number)
            bench.expected[number] = bench.undisturbed(number)
        assert first == bench.expected and all(first.values()), "two runs without a fault differ"
        print(f"without a fault: {bench.seconds}", flush=True)
        for bench.part in [part for part in args.parts if part in ("shards", "kills") or not bench.seen(part)]:
            PARTS[bench.part](bench, folder, args)
    sys.exit(0 if all(row["held"] for row in bench.rows) else 1)


if __name__ == "__main__":
    main()
