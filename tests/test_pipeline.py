"""The runner's contract, sentence by sentence, on a small repository; then set-up, with a stand-in
for pip.

Most tests run the notebooks' cells in this process; what only real kernels show is shown by them.
"""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from fake import NOISE, contents, make_notebook, make_repository, manifest, run, start

from runner import check, estimate, parameters, pipeline, report


def run_cells(path, output, values):
    """What `pipeline.execute` does, without a kernel."""
    book = nbformat.read(path, 4)
    names = {}
    for number, cell in enumerate(book.cells):
        if cell.cell_type == "code":
            exec(cell.source, names)
            cell.execution_count = number
            names |= values if number == 1 else {}
    nbformat.write(book, output)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A small repository, as if this process's runner lay in it; its notebooks need no kernels."""

    def prepare(folder, run_id):
        folder.mkdir()
        monkeypatch.setenv("HYBRID_CAM_RUN", run_id)

    root = make_repository(tmp_path / "home")
    for name in ("01_data", "04_choice"):
        path = root / f"notebooks/{name}.ipynb"
        path.write_text(path.read_text().replace("atexit.register", "print"))
    for module in (pipeline, parameters):
        monkeypatch.setattr(module, "HOME", root)
    monkeypatch.setattr(estimate, "ask", lambda parameters: None)
    monkeypatch.setattr(estimate, "answer", lambda asking: MACHINE)
    monkeypatch.setattr(pipeline, "prepare_kernels", prepare)
    monkeypatch.setattr(pipeline, "execute", run_cells)
    monkeypatch.setattr(report.cc.sentences, "read_tables", lambda folder: {})
    monkeypatch.setattr(report, "notebook_page", lambda path, run: f"<p>{run}</p>")
    monkeypatch.chdir(root)
    pipeline.portable.cache_clear()
    return root


MACHINE = {
    "cores": 1,
    "device": "cpu",
    "precision": "float32",
    "note": "precision: a note",
    "plain": 0.1,
    "seconds_per_picture": {"float32": 0.1, "scoring": 0.1},
    "images": {"train": 800, "val": 150, "test": 300, "to_draw": 0, "twins": True},
}


@pytest.fixture
def call(home, monkeypatch, capfd):
    """call(*words) runs the pipeline; returns (exit code, what it printed, what it complained)."""

    def one(*words):
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["run_all.sh", *map(str, words)])
        code = 0
        message = ""
        try:
            pipeline.run_all(pipeline.parse_arguments())
        except SystemExit as ended:
            code = 1 if isinstance(ended.code, str) else ended.code
            message = ended.code if isinstance(ended.code, str) else ""
        out, err = capfd.readouterr()
        return SimpleNamespace(code=code, out=out, err=err + message)

    return one


# ---- refused before the first notebook


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("-p n_image 3", "there is no setting 'n_image'. Nearest: n_images"),
        ("-p alpha 2", "Allowed: auto or a number from 0 to 1."),
        ("-f nowhere.yaml", "No such file"),
        ("--only 01 -p alpha 0.5", "no effect"),
        ("--only 07", "no notebook 07, only 01_data, 04_choice, 05_measure"),
        ("--only 04,", "no notebook 04,"),
        ("--from 7", "no notebook 7"),
        ("--only 04 --from 05", "not allowed with"),
        ("--only 04 --check", "not allowed with"),
        ("--check", "there is no folder"),
        ("--check -f few.yaml --results-dir results/reference/few", "is the one to be written"),
        ("--wrong", "usage:"),
        ("-p alpha", "usage:"),
        ("--results-dir .", "is not the folder of one run"),
        ("--results-dir results", "is not the folder of one run"),
        ("--results-dir ..", "is not the folder of one run"),
        ("--results-dir notebooks", "was not made by a run"),
        ("--results-dir cam_core.py", "was not made by a run"),
        ("--results-dir cam_core.py/x", "results_dir: "),
    ],
)
def test_refused_before_the_first_notebook_with_exit_code_2(home, call, words, message):
    (home / "few.yaml").write_text("alpha: 1\n")
    (home / "results/reference/few").mkdir(parents=True)
    before = contents(home)
    done = call(*words.split())
    assert done.code == 2 and message in done.err and not done.out
    after = {name: data for name, data in contents(home).items() if not name.endswith(".lock")}
    assert after == before


def test_a_broken_parameters_cell_is_refused_too(home, call):
    make_notebook(home / "notebooks/05_measure.ipynb", "n = 3")
    done = call()
    assert done.code == 2 and "05_measure" in done.err and "name: type = literal" in done.err


def test_no_torch_and_no_papermill_before_the_parameters_are_checked(repo):
    code = (
        "import sys, runner.pipeline; print({'torch', 'papermill', 'nbconvert'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repo, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", "a wrong word would be answered late"


@pytest.mark.parametrize(
    ("only", "first", "chosen"),
    [
        (None, None, "01 04 05"),
        ("04", None, "04"),
        ("5,1", None, "01 05"),
        (" 04 , 05", None, "04 05"),
        (None, "04", "04 05"),
    ],
)
def test_which_notebooks_are_run(only, first, chosen):
    stems = ["01_a", "04_b", "05_c"]
    assert [stem[:2] for stem in pipeline.select(stems, only, first)] == chosen.split()


# ---- a run with kernels, from elsewhere, on a machine with stray settings


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(repository, finished process, results)."""
    root = make_repository(tmp_path_factory.mktemp("a {strange} place") / "repo")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    stray = elsewhere / "kernels/python3"
    stray.mkdir(parents=True)
    kernel = {"argv": ["/bin/false"], "display_name": "stray", "language": "python"}
    (stray / "kernel.json").write_text(json.dumps(kernel))
    (elsewhere / "lab").mkdir()  # not ours
    (elsewhere / "few.yaml").write_text("n_test: 7\nseed: 3\n")
    words = ("-f", "few.yaml", "-p", "n_test", 9, "--results-dir", elsewhere / "out")
    stray = {"JUPYTER_PATH": str(elsewhere), "MPLBACKEND": "Agg", "PYTHONHASHSEED": "random"}
    process = run(root, *words, cwd=elsewhere, **stray)
    assert process.returncode == 0, process.err
    return root, process, elsewhere / "out"


def test_the_notebooks_run_in_order_and_it_tells_where_to_look_first(finished):
    _, process, target = finished
    lines = process.out.splitlines()
    assert [line[:5] for line in lines if line.startswith("[")] == ["[1/3]", "[2/3]", "[3/3]"]
    first = lines[lines.index(next(line for line in lines if "Look first at" in line)) :]
    assert first[1:3] == [
        f"  {target / name}" for name in ("report.html", "notebooks/05_measure.html")
    ]
    assert process.err == "", "the terminal stays clean"


def test_what_kernels_say_beside_their_notebooks_stays_off_the_terminal(finished):
    _, process, target = finished
    assert NOISE.splitlines()[0] in (target / "notebooks/01_data.ipynb").read_text()
    assert "words" not in process.out + process.err and not (target / ".kernel").exists()


def test_kernels_run_in_the_repository_whatever_the_machine_has_lying_about(finished):
    root, _, target = finished
    executed = (target / "notebooks/01_data.ipynb").read_text()
    assert f"{sys.executable} {root} 0 {target}" in executed and "Agg" not in executed


def test_every_output_carries_the_run_and_the_manifest_lists_them_all(finished):
    _, _, target = finished
    record = manifest(target)
    files = contents(target)
    del files["manifest.json"]
    assert set(files) == set(record["files"])
    assert {f"notebooks/{stem}.html" for stem in record["notebooks"]} <= set(files)
    for name, data in files.items():
        assert record["run"].encode() in data, name
        assert record["files"][name]["bytes"] == len(data)
    assert record["files"]["fusion.json"]["notebook"] == "04_choice"
    assert len(record["run"]) == 12 and record["packages"]["papermill"] == "2.7.0"
    assert record["commit"] is None and record["cpus"] == os.cpu_count()
    assert b"unfinished" not in b"".join(files.values()), "paths point to where the results are now"


def test_the_manifest_has_each_notebooks_parameters_and_what_they_came_to(finished):
    entries = manifest(finished[2])["notebooks"]
    given = entries["01_data"]["parameters"]
    assert given["n_test"] == 9 and given["seed"] == 3 and given["dataset"] == "synthetic"
    assert not {"settings", "results_dir", "scheduler", "alpha"} & set(given)
    assert entries["04_choice"]["resolved"] == {"alpha": "as found"}
    assert not (finished[2] / "resolved.json").exists() and "resolved" not in entries["01_data"]


# ---- a notebook that fails


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """(a small repository, a folder for kernels) with the environment that kernels get."""
    before = dict(os.environ)
    root = make_repository(tmp_path_factory.mktemp("failing"))
    pipeline.prepare_kernels(root / ".kernel", "run")
    yield root
    os.environ.clear()
    os.environ.update(before)
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize(
    ("mode", "messages"),
    [
        (
            "fail",
            ["failed in cell [5]", "value = value / 0  # here", "ZeroDivisionError: division"],
        ),
        ("die", ["failed in cell [5]", 'if mode == "sleep":', "Kernel died", "no room left"]),
        ("exit", ["failed in cell [?]", "ended itself before its last cell"]),
    ],
)
def test_a_failing_notebook_names_the_cell_and_the_error(kernels, tmp_path, mode, messages):
    output = tmp_path / "04_choice.ipynb"
    values = {"layer": mode, "settings": {"results_dir": str(tmp_path)}}
    with pytest.raises(SystemExit) as ended:
        pipeline.execute(kernels / "notebooks/04_choice.ipynb", output, values)
    text = ended.value.code
    assert all(words in text for words in ["04_choice", f"Executed so far: {output}", *messages])
    assert "\x1b" not in text and "Traceback" not in text and len(text.splitlines()) < 25
    assert "value = 1" in output.read_text(), "what was done is left for a look"


def test_a_kernel_that_does_not_start_is_quoted(kernels, tmp_path, monkeypatch):
    (tmp_path / "ipykernel_launcher.py").write_text("raise SystemExit('no kernel today')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(SystemExit, match="Kernel died before(.|\n)*no kernel today"):
        pipeline.execute(kernels / "notebooks/05_measure.ipynb", tmp_path / "05.ipynb", {})


def test_a_failure_leaves_the_old_results_and_the_next_run_clears_up(home, call):
    target = home / "results/default"
    assert call().code == 0
    before = contents(target)
    with pytest.raises(ZeroDivisionError):
        call("--from", "04", "-p", "layer", "fail")
    assert contents(target) == before and list(target.parent.glob("*.unfinished-*"))
    assert call("--only", "05").code == 0
    assert sorted(path.name for path in target.parent.iterdir()) == [".default.lock", "default"]


# ---- the old results or the new ones


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    assert met
    return met


def alive(pid):
    """Whether the process is there, and not a zombie that nobody has looked at yet."""
    command = ["ps", "-o", "stat=", "-p", str(pid)]
    state = subprocess.run(command, capture_output=True, text=True).stdout
    return bool(state.strip()) and not state.startswith("Z")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_kill_leaves_the_old_results_and_nobody_computing(finished, tmp_path, capsys, number):
    root = finished[0]
    target = tmp_path / "results"
    shutil.copytree(finished[2], target)
    before = contents(target)
    process = start(root, "--only", "04", "-p", "layer", "sleep", "--results-dir", target)
    pid_file = target.with_name(f"results.unfinished-{process.pid}") / "pid"
    wait_for(pid_file.exists)
    kernel = int(wait_for(pid_file.read_text))
    with pytest.raises(SystemExit):
        pipeline.claim(target)
    assert "another run is writing" in capsys.readouterr().err and pid_file.exists()
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == (-9 if number == signal.SIGKILL else 130)
    assert len(err.splitlines()) == (number != signal.SIGKILL), err
    wait_for(lambda: not alive(kernel))
    assert contents(target) == before and list(tmp_path.glob("*.unfinished-*"))
    with pipeline.claim(target):  # what a dead process left does not block the next
        assert sorted(path.name for path in tmp_path.iterdir()) == [".results.lock", "results"]


@pytest.mark.parametrize("fault", ["no file may grow", "the terminal's disk is full"])
def test_a_full_disk_leaves_the_old_results_and_is_told_in_a_line(finished, tmp_path, fault):
    target = tmp_path / "results"
    shutil.copytree(finished[2], target)
    before = contents(target)
    command = [sys.executable, "-m", "runner.pipeline", "--only", "04", "--results-dir", target]
    if fault == "no file may grow":
        command = ["bash", "-c", 'ulimit -f 1; exec "$@"', "bash", *command]
        message = "stopped by [Errno 27] File too large"
    else:
        message = "stopped by [Errno 28] No space left"
    with open("/dev/full", "w") as full:
        options = {"cwd": finished[0], "stderr": subprocess.PIPE, "text": True}
        done = subprocess.run(command, stdout=full if "terminal" in fault else None, **options)
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr
    assert contents(target) == before


def test_a_folder_without_permission_is_refused_before_anything_runs(home, tmp_path):
    """Root may write everywhere, so where the tests run as root it gives this power away first."""
    wrap = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if not os.geteuid() else []
    if wrap and not shutil.which("setpriv"):
        pytest.skip("there is no setpriv here")
    (tmp_path / "locked").mkdir(mode=0o555)
    command = [sys.executable, "-m", "runner.pipeline", "--results-dir", tmp_path / "locked/mine"]
    done = subprocess.run([*wrap, *command], cwd=home, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "results_dir: [Errno 13] Permission denied" in done.stderr


def test_only_keeps_the_other_results_but_not_those_that_read_what_is_new(home, call):
    target = home / "results/default"
    call()
    first = manifest(target)
    (target / "mine.txt").write_text("put here by hand")
    assert call("--only", "04", "-p", "alpha", "0.25").code == 0
    record = manifest(target)
    assert set(record["notebooks"]) == {"01_data", "04_choice"}
    assert not (target / "summary.csv").exists()
    assert record["notebooks"]["01_data"] == first["notebooks"]["01_data"]
    assert record["notebooks"]["04_choice"]["run"] == record["run"] != first["run"]
    assert record["notebooks"]["04_choice"]["parameters"]["alpha"] == 0.25
    assert record["files"]["tables/01_data.csv"] == first["files"]["tables/01_data.csv"]
    assert "0.25" in (target / "fusion.json").read_text()
    shutil.rmtree(target)
    assert call("--only", "05").code == 0, "whether it can do without 04 is for 05 to say"
    assert set(manifest(target)["notebooks"]) == {"05_measure"}


def test_results_of_others_are_neither_replaced_nor_followed(home, call, tmp_path):
    """A folder that no run made, and a manifest that names files beside its folder."""
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/thesis.tex").write_text("years of work")
    assert "was not made by a run" in call("--results-dir", tmp_path / "thesis").err
    target = home / "results/default"
    target.mkdir()
    (home / "results/secret.txt").write_text("secret")
    (target / "kept.txt").write_text("kept")
    files = {"../secret.txt": {"notebook": "01_data"}, "kept.txt": {"notebook": "01_data"}}
    content = {"run": "a", "files": files, "notebooks": {"01_data": {"parameters": {}}}}
    (target / "manifest.json").write_text(json.dumps(content))
    call("--only", "05")
    assert (target / "kept.txt").read_text() == "kept"
    names = sorted(path.name for path in target.parent.iterdir())
    assert names == [".default.lock", "default", "secret.txt"]


def test_claim_clears_what_dead_runs_left_and_nothing_else(tmp_path):
    for name in ("run.unfinished-123", "run.unfinished-business", "runner.unfinished-1", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "run.unfinished-123/manifest.json").write_text('{"run": "a", "fil')
    with pipeline.claim(tmp_path / "run"):
        found = {path.name for path in tmp_path.iterdir()}
    assert found == {"run", "run.unfinished-business", "runner.unfinished-1", ".run.lock"}


def finished_folder(path, text):
    path.mkdir()
    (path / "manifest.json").write_text(json.dumps({"run": text, "files": {}}))
    return path


@pytest.mark.parametrize("old", [False, True])
def test_a_finished_folder_is_put_in_place(tmp_path, old):
    fresh = finished_folder(tmp_path / "run.unfinished-1", "new")
    if old:
        finished_folder(tmp_path / "run", "old")
    pipeline.put_in_place(fresh, tmp_path / "run")
    assert manifest(tmp_path / "run")["run"] == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_kill_between_the_two_steps_of_that_is_mended(tmp_path, monkeypatch):
    fresh = finished_folder(tmp_path / "run.unfinished-9", "new")
    target = finished_folder(tmp_path / "run", "old")
    rename = Path.rename

    def killed(self, other):
        if self == fresh:
            raise KeyboardInterrupt
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        pipeline.put_in_place(fresh, target)
    monkeypatch.undo()
    assert not target.exists()
    with pipeline.claim(target):
        assert manifest(target)["run"] in ("old", "new")
        assert sorted(path.name for path in tmp_path.iterdir()) == [".run.lock", "run"]


# ---- what a run is made from


def test_the_run_id_is_that_of_what_determines_the_results(home):
    def identity(*pairs):
        args = SimpleNamespace(f=None, p=pairs, only=None, start=None, check=False)
        return pipeline.run_id(pipeline.make_plan(args))

    first = identity()
    assert first == identity() == identity(("results_dir", "elsewhere"))
    assert first == identity(("scheduler", "tcp://a:1")), "where it is computed is no part of it"
    path = home / "notebooks/01_data.ipynb"
    book = nbformat.read(path, 4)
    book.cells[1].outputs = [nbformat.v4.new_output("stream", text="hello")]
    nbformat.write(book, path)
    assert identity() == first, "outputs are none either"
    seen = [first, identity(("seed", "1"))]
    book.cells[2].source += "\n1"
    nbformat.write(book, path)
    seen.append(identity())
    files = ["cam_core.py", "lab/datasets.py", "requirements.txt", "data/checkpoints/net.pth"]
    for name in files:
        (home / name).write_text("# changed")
        seen.append(identity())
    for name, value in (("weights", "x.pth"), ("arch", "x.py:Net")):
        for text in ("a", "b"):
            (home / value.removesuffix(":Net")).write_text(text)
            seen.append(identity((name, value)))
    assert len(set(seen)) == len(seen) == 11


def test_the_manifest_tells_paths_as_seen_from_the_repository(home, tmp_path):
    for word in ("auto", "synthetic", "data", "resnet50", "cam_core.py:Net"):
        assert pipeline.portable(word) == word
    shipped = home / "data/checkpoints/net.pth"
    assert pipeline.portable(str(shipped)) == "data/checkpoints/net.pth"
    photos = tmp_path / "photos"
    seen = []
    (photos / "cache").mkdir(parents=True)
    for name, text in (("a.png", "a"), ("a.png", "b"), ("cache/x", "finished work")):
        (photos / name).write_text(text)
        pipeline.portable.cache_clear()
        seen.append(pipeline.portable(str(photos)))
    assert seen[0]["name"] == "photos" and str(tmp_path) not in json.dumps(seen)
    assert seen[0]["sha256"] != seen[1]["sha256"] == seen[2]["sha256"], "the cache does not count"
    (tmp_path / "net.py").write_text("class Net: pass")
    assert pipeline.portable(f"{tmp_path}/net.py:Net")["name"] == "net.py:Net"


def test_commit_and_dirty_flag(home, tmp_path):
    def git(*words):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(command, cwd=home, check=True, capture_output=True, text=True).stdout

    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    assert pipeline.circumstances()["commit"] is None, (
        "a repository around this one is not this one"
    )
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "HEAD").strip()
    assert [pipeline.circumstances()[name] for name in ("commit", "dirty")] == [commit, False]
    (home / "cam_core.py").write_text("changed")
    assert [pipeline.circumstances()[name] for name in ("commit", "dirty")] == [commit, True]


# ---- how long it takes


def test_a_run_says_first_how_long_it_takes_and_the_manifest_tells_what_it_was(home, call):
    done = call("--from", "04")
    lines = done.out.splitlines()
    assert lines[1].startswith("About ") and " on this machine (1 core, 10.0 pictures/s" in lines[1]
    assert [part[:3] for part in lines[1].partition("): ")[2].split(", ")] == ["04 ", "05 "]
    assert lines[2] == MACHINE["note"]
    assert lines[3].startswith("[1/2] 04_choice, about ")
    record = manifest(home / "results/default")
    assert record["machine"] == MACHINE
    for stem, entry in record["notebooks"].items():
        expected = estimate.expected_of(stem, entry["parameters"], MACHINE)
        assert entry["estimate"] == pytest.approx(expected.seconds, abs=0.1)
    (home / "data/cache").mkdir()
    (home / "data/cache/finished.json").write_text("{}")
    assert "\nAt most about " in call().out


def test_what_a_kernel_counted_goes_into_the_manifest_and_the_last_line(finished):
    _, process, target = finished
    entries = manifest(target)["notebooks"]
    assert entries["01_data"]["pictures"] == {"forward": 1234, "backward": 5}
    assert "pictures" not in entries["04_choice"], "each notebook has its own"
    assert "scored 1,234 pictures" in process.out


def test_a_machine_that_cannot_be_asked_stops_no_run(finished):
    """That of this repository cannot."""
    _, process, target = finished
    assert "on this machine" not in process.out and "machine" not in manifest(target)
    assert "[1/3] 01_data\n" in process.out


# ---- the end of a run


def test_a_report_that_fails_costs_no_results(home, call, monkeypatch):
    monkeypatch.setattr(report, "build", lambda *_: 1 / 0)
    done = call()
    target = home / "results/default"
    assert done.code == 0 and "ZeroDivisionError" in done.err
    assert f"python -m runner.report {target}" in done.err
    assert not (target / "report.html").exists() and (target / "summary.csv").exists()


def test_skipped_files_are_repeated_at_the_end(tmp_path, capsys):
    (tmp_path / "tables").mkdir()
    rows = "".join(f"{k},x,file {k % 7} is broken\n" for k in range(9))
    (tmp_path / "tables/02_skipped.csv").write_text(f"id,file,reason\n{rows}")
    pipeline.print_skipped(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("7 file(s) could not be read and were skipped")
    assert lines[1:] == [f"  file {k} is broken" for k in range(5)] + ["  ..."]


@pytest.fixture
def with_reference(home, call):
    """A run's results as the reference of few.yaml: (reference, run it)."""
    (home / "few.yaml").write_text("results_dir: results/few\nn_images: 9\n")
    assert call("-f", "few.yaml").code == 0
    reference = home / "results/reference/few"
    shutil.copytree(home / "results/few", reference)
    return reference, lambda *words: call("-f", "few.yaml", "--check", *words)


def test_check_passes_where_the_numbers_agree_wherever_the_results_go(with_reference, tmp_path):
    reference, checked = with_reference
    (reference / "tables/01_data.csv").unlink()
    done = checked("--results-dir", tmp_path / "other")
    assert done.code == 0, done.err
    assert f"other agrees with {reference} in fusion.json, summary.csv." in done.out
    assert "tables/01_data.csv" in done.out.split("Not compared")[1]


def test_check_fails_on_a_planted_number_and_the_results_are_in_place(with_reference, home):
    reference, checked = with_reference
    path = reference / "summary.csv"
    path.write_text(path.read_text().replace("0.25", "0.251"))
    done = checked()
    assert done.code == 1 and "mean is 0.25 here, 0.251 there (" in done.err
    assert len(done.err.splitlines()) == 2 and "Done in" in done.out
    assert check.manifest_of(home / "results/few")["run"] in done.out


# ---- on a cluster


def test_a_scheduler_measures_after_04_and_before_05_with_the_parameters_of_05(
    home, call, monkeypatch
):
    asked = []

    def measure(scheduler, values):
        there = (Path(values["results_dir"]) / "fusion.json").exists()
        asked.append((scheduler, {k: v for k, v in values.items() if k != "results_dir"}, there))

    monkeypatch.setattr(pipeline, "measure_on_cluster", measure)
    done = call("-p", "scheduler", "tcp://a:1", "-p", "n_images", "3", "-p", "n_train", "9")
    assert done.code == 0, done.err
    assert asked == [("tcp://a:1", {"n_images": 3}, True)]
    call("--from", "04")
    assert len(asked) == 1


def test_a_cluster_that_fails_stops_the_run(home, call, monkeypatch):
    code = "import sys; print(sys.stdin.read(), file=sys.stderr); sys.exit(1)"
    monkeypatch.setattr(pipeline, "MEASURE", code)
    done = call("--only", "05", "-p", "scheduler", "tcp://127.0.0.1:9")
    assert done.code == 1 and '"scheduler": "tcp://127.0.0.1:9", "values": {' in done.err
    assert "The present results are as they were." in done.err


# ---- set-up


@pytest.fixture
def setting(repo, tmp_path):
    """run_all.sh beside a pipeline that tells how it was called, and a `pip` that only writes down
    its words.
    """
    home = tmp_path / "re po"
    (home / "runner").mkdir(parents=True)
    for name in ("run_all.sh", "runner/setup.sh"):
        shutil.copy(repo / name, home / name)
    (home / "requirements.txt").write_text("one")
    told = "import os, sys; print(sys.prefix, os.getcwd(), sys.argv[1:])"
    (home / "runner/pipeline.py").write_text(told)
    (tmp_path / "modules/pip").mkdir(parents=True)
    (tmp_path / "modules/pip/__init__.py").write_text("")
    log = tmp_path / "pip.log"
    noted = f"import sys; print(sys.argv[1:], file=open({str(log)!r}, 'a'))"
    (tmp_path / "modules/pip/__main__.py").write_text(noted)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    own = ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHON")
    clean = {name: value for name, value in os.environ.items() if name not in own}
    clean["PYTHONPATH"] = str(tmp_path / "modules")

    def call(*words, **environment):
        return subprocess.run(
            ["bash", str(home / "run_all.sh"), *words],
            cwd=tmp_path,
            env=clean | environment,
            capture_output=True,
            text=True,
        )

    def installs():
        return log.read_text().count("install") if log.exists() else 0

    return home, tmp_path / "env", call, installs


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "PYTHON"])
def test_an_active_environment_is_used_and_set_up_once(setting, tmp_path, variable):
    home, env, call, installs = setting
    given = {variable: str(env / "bin/python" if variable == "PYTHON" else env)}
    for _ in range(2):
        done = call("-p", "a b", "c", **given)
        assert done.stdout.strip() == f"{env} {tmp_path} ['-p', 'a b', 'c']", done.stderr
    assert installs() == 1 and not (home / ".venv").exists()
    (home / "requirements.txt").write_text("another")
    call(**given)
    assert installs() == 2


def test_venv_is_made_once_by_the_interpreter_chosen(setting, tmp_path):
    home, _, call, installs = setting
    base = tmp_path / "python3"  # installing pip takes long, and the stand-in will do
    base.write_text(f"""#!/bin/sh
if [ "$2" = venv ]; then shift 2; set -- -m venv --without-pip "$@"; fi
exec {sys.base_prefix}/bin/python3 "$@"
""")
    base.chmod(0o755)
    done = [call("x", PYTHON=str(base)) for _ in range(2)]
    expected = f"{home / '.venv'} {tmp_path} ['x']"
    assert [each.stdout.strip() for each in done] == [expected] * 2, done[0].stderr
    assert "Making .venv" in done[0].stderr and done[1].stderr == "" and installs() == 1


def test_an_interpreter_that_is_too_old_or_missing_is_named(setting, tmp_path):
    home, _, call, _ = setting
    old = tmp_path / "python2"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 2.7 || exit 1\n')
    old.chmod(0o755)
    done = call(PYTHON=str(old))
    assert done.returncode == 2 and "Python 3.11 or newer is needed" in done.stderr
    done = call(PYTHON="no-such-python")
    assert done.returncode == 2 and "there is no 'no-such-python'" in done.stderr
    assert not (home / ".venv").exists()
