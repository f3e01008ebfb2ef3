"""The runner's contract, sentence by sentence, on a small repository; then set-up, with a stand-in for pip."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

import check
import parameters
import pipeline
import report

PARAMETERS = """root: str = ""  # repository root
results_dir: str = "results/default"  # where this run writes
"""
WORK = """import os, sys, time
from pathlib import Path
out = Path(root) / results_dir
(out / "tables").mkdir(exist_ok=True)
run = os.environ["HYBRID_CAM_RUN"]
def save(name, text): (out / name).write_text(text)
"""
NOISE = """import atexit  # as ipykernel does now and then, when its sockets are closed under it
for place in (1, 2, os.dup(2)):
    atexit.register(os.write, place, b"said after the end")
    os.write(place, b"said beside the notebook")
"""


def make_notebook(path, parameters, *cells):
    cells = [nbformat.v4.new_code_cell(cell) for cell in (parameters, *cells)]
    cells[0].metadata["tags"] = ["parameters"]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Question"), *cells])
    for number, cell in enumerate(book.cells):
        cell["id"] = f"cell-{number}"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(book, path)


def make_repository(root):
    """A repository with three small notebooks; 04 fails in the way its parameter `mode` says."""
    for folder in ("data/checkpoints", "results"):
        (root / folder).mkdir(parents=True)
    for module in (pipeline, parameters, check, report):
        shutil.copy(module.__file__, root)
    shutil.copy(Path(report.__file__).with_name("report_template.html"), root)
    (root / "cam_core.py").write_text("")
    (root / "requirements.txt").write_text("papermill==0  # only the name is read\n")
    (root / "data/checkpoints/net.pth").write_bytes(b"weights")
    number = "n_images: int = 24  # how many\n"
    make_notebook(
        root / "notebooks/01_data.ipynb", PARAMETERS + number + "scale: float | None = None  # a union\n",
        WORK + 'save("tables/01_data.csv", f"n_images,scale,run\\n{n_images},{scale},{run}\\n")', NOISE,
        "print(sys.executable, os.getcwd(), sys.flags.hash_randomization, results_dir)\n"
        'print(sorted(name for name in os.environ if name.startswith("MPL")))',
    )  # fmt: skip
    make_notebook(
        root / "notebooks/04_choice.ipynb",
        PARAMETERS + 'alpha: float | str = "auto"  # weight\nmode: str = "ok"  # how to end\n',
        WORK + """import json
save("resolved.json", json.dumps({"alpha": "as found"}))
save("fusion.json", json.dumps({"alpha": alpha, "mode": mode, "run": run}))""", "value = 1",
        'if mode == "sleep":\n    save("pid", str(os.getpid()))\n    time.sleep(100)\n'
        'if mode == "die":\n    os.write(2, b"no room left\\n")\n    os._exit(9)\n'
        'if mode == "exit":\n    sys.exit()\n'
        'if mode == "fail":\n    value = value / 0  # here\n',
        "value = 2",
    )  # fmt: skip
    make_notebook(
        root / "notebooks/05_measure.ipynb", PARAMETERS + number,
        WORK + """chosen = (out / "fusion.json").exists()
save("summary.csv", f"metric,method,n,mean,chosen,run\\nenergy,grad_cam,{n_images},0.25,{chosen},{run}\\n")""",
    )  # fmt: skip
    return root


def start(root, *words, cwd=None, **environment):
    command = [sys.executable, str(root / "pipeline.py"), *map(str, words)]
    return subprocess.Popen(command, cwd=cwd or root, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            start_new_session=True, env={**os.environ, **environment},
                            # Ctrl-C is ignored by what a script starts in the background, and by all that this starts
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # fmt: skip


def run(root, *words, **more):
    process = start(root, *words, **more)
    process.out, process.err = process.communicate(timeout=300)
    return process


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    return make_repository(tmp_path_factory.mktemp("a {strange} place"))


@pytest.fixture(scope="module")
def finished(fake, tmp_path_factory):
    """A run from elsewhere into a folder outside the tree, on a machine with stray settings: (process, results)."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    stray = elsewhere / "kernels/python3"
    stray.mkdir(parents=True)
    (stray / "kernel.json").write_text('{"argv": ["/bin/false"], "display_name": "stray", "language": "python"}')
    (elsewhere / "few.yaml").write_text("n_images: 7\nscale: 1e-3\n")
    target = elsewhere / "out"
    process = run(fake, "-f", "few.yaml", "-p", "n_images", 8, "-p", "n_images", 9, "--results-dir", target,
                  cwd=elsewhere, JUPYTER_PATH=str(elsewhere), MPLBACKEND="Agg", PYTHONHASHSEED="random")  # fmt: skip
    assert process.returncode == 0, process.err
    return process, target


@pytest.fixture
def here(fake, monkeypatch):
    """The module `pipeline` as if it lay in the small repository, for its functions."""
    for module in (pipeline, parameters):
        monkeypatch.setattr(module, "ROOT", fake)
    return fake


def refusal(capsys, function, *arguments):
    """What a function says when it refuses to start the run."""
    with pytest.raises(SystemExit) as ended:
        function(*arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


# ---- parameters


@pytest.mark.parametrize(
    ("types", "value", "parsed"),
    [
        ("int", "40", 40), ("int", 40, 40), ("int", "-3", -3), ("int | None", "null", None),
        ("float", "1e-3", 1e-3), ("float", 1, 1.0), ("float", ".5", 0.5),
        ("bool", "true", True), ("bool", "False", False), ("bool", True, True),
        ("str", "3", "3"), ("str", "true", "true"),
        ("float | str", "0.5", 0.5), ("float | str", 0.5, 0.5), ("float | str", "auto", "auto"),
        ("str | float", "2", 2.0),
        ("float | None", "none", None), ("float | None", None, None), ("float | None", "2", 2.0),
    ],
)  # fmt: skip
def test_a_value_is_parsed_by_the_declared_type(types, value, parsed):
    result = parameters.parse("anything", types.split(" | "), value, "-p")
    assert (result, type(result)) == (parsed, type(parsed))


@pytest.mark.parametrize(
    ("types", "value"),
    [
        ("int", "1.5"), ("int", 1.5), ("int", 40.0), ("int", True), ("int", "1_000"), ("int", ""), ("int", None),
        ("float", "nan"), ("float", float("inf")), ("float", "x"), ("float", True),
        ("bool", "yes"), ("bool", 1), ("bool", "1"), ("str", 3), ("str", None), ("str", ["a"]),
        ("float | str", True), ("float | None", "auto"),
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_refused(capsys, types, value):
    said = refusal(capsys, parameters.parse, "size", types.split(" | "), value, "-f x.yaml")
    assert "-f x.yaml: size cannot be" in said and "Allowed: " in said


@pytest.mark.parametrize(
    ("name", "types", "good", "bad"),
    [
        ("alpha", "float | str", ["auto", 0, "1", "1e-3", 0.5], ["Auto", 1.01, "-0.1", "nan", "none"]),
        ("device", "str", ["auto", "cpu", "cuda", "cuda:1", "mps"], ["3", 3, "gpu", "cuda:", "cpu "]),
        ("precision", "str", ["float32", "bf16"], ["float16", "32"]),
        ("baseline", "str", ["twin", "rise,twin", "twin,rise,black", "zero"], ["", "grey", "twin,", "twin;rise"]),
        ("n_train", "int", [5, "800"], [4, 0]),
        ("n_images", "int", [0, 24], [-1]),
        ("steps", "int", [1], [0]),
        ("batch_size", "int", [1], [0]),
        ("threads", "int", [0], [-1]),
        ("seed", "int", [0, 123], [-1]),
        ("rule", "str", ["auto", "product", "floored", "mean", "maximum"], ["", "median", "auto product"]),
        ("n_extra", "int", [0, 50], [-1]),
        ("fine_steps", "int", [0, 224], [-1, 1.5]),
        ("rise_masks", "int", [0, 4000], [-1]),
        ("shortcut", "bool", ["true", False], [1, "yes"]),
        ("also", "str", ["", "resnet50"], ["resnet50,resnet18", "a b", 3]),
        ("dataset", "str", ["synthetic", "cifar10", "samples"], ["nowhere", "cam_core.py"]),
        (
            "weights",
            "str",
            ["auto", "imagenet", "IMAGENET1K_V2", "data/checkpoints/net.pth"],
            ["nowhere.pth", "cam_core.py", "data"],
        ),
        ("arch", "str", ["auto", "resnet50", "cam_core.py:Net"], ["", "resnet-50", "nowhere.py:Net", "cam_core.py"]),
        ("colormap", "str", ["inferno", "viridis", "jet"], ["rainbows", ""]),
        ("strict", "bool", ["true", False], [1]),
        ("epochs", "int", [1, 20], [0]),
        ("scheduler", "str", ["", "tcp://host:8786", "tls://10.0.0.1:1"], ["host:8786", "tcp://host", "http://a:1", 3]),
    ],
)
def test_what_is_allowed(here, capsys, name, types, good, bad):
    for value in good:
        parameters.parse(name, types.split(" | "), value, "-p")
    for value in bad:
        said = refusal(capsys, parameters.parse, name, types.split(" | "), value, "-p")
        assert f"{name} cannot be {value!r}" in said and parameters.ALLOWED.get(name, ["true or false"])[0] in said


def test_paths_are_seen_from_the_user_then_from_the_repository(here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parameters.parse("weights", ["str"], "data/checkpoints/net.pth", "") == str(
        here / "data/checkpoints/net.pth"
    )
    assert parameters.parse("dataset", ["str"], "data", "") == str(here / "data")
    (tmp_path / "data").mkdir()
    (tmp_path / "synthetic").mkdir()
    assert parameters.parse("dataset", ["str"], "data", "") == str(tmp_path / "data")
    assert parameters.parse("dataset", ["str"], "synthetic", "") == "synthetic"


def test_declared_reads_unions_that_papermill_drops(here):
    assert parameters.declared(here / "notebooks/01_data.ipynb")["scale"] == (["float", "None"], None)
    assert parameters.declared(here / "notebooks/04_choice.ipynb")["alpha"] == (["float", "str"], "auto")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("n = 3", "name: type = literal"), ("n: int", "name: type = literal"), ("n: list = []", "name: type = literal"),
        ("n: int = len('a')", "malformed"), ("import os", "name: type = literal"), ("n: int = ", "invalid syntax"),
    ],
)  # fmt: skip
def test_a_parameters_cell_of_another_form_is_an_error(tmp_path, capsys, source, said):
    make_notebook(tmp_path / "01_x.ipynb", source)
    message = refusal(capsys, parameters.declared, tmp_path / "01_x.ipynb")
    assert "01_x.ipynb" in message and said in message


@pytest.mark.parametrize("tagged", [0, 2])
def test_exactly_one_parameters_cell(tmp_path, capsys, tagged):
    path = tmp_path / "01_x.ipynb"
    make_notebook(path, "n: int = 1", "m = 1")
    book = nbformat.read(path, 4)
    for cell in book.cells[1:]:
        cell.metadata["tags"] = ["parameters"] if tagged else []
    nbformat.write(book, path)
    assert f"{tagged} cells are tagged 'parameters'" in refusal(capsys, parameters.declared, path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("-p n_image 3", "no parameter 'n_image'. Nearest: n_images. All: alpha, mode, n_images, results_dir, scale."),
        ("-p root /", "no parameter 'root'"),
        ("-p alpha 2", "Allowed: auto, or a number from 0 to 1."),
        ("-f unknown.yaml", "no parameter 'alhpa'. Nearest: alpha"),
        ("-f trap.yaml", "Allowed: auto, cpu"),
        ("-f list.yaml", "lines of the form `name: value`"),
        ("-f broken.yaml", "-f broken.yaml: "),
        ("-f nowhere.yaml", "No such file"),
        ("-f binary.yaml", "-f binary.yaml: "),
        ("--only 05 -p alpha 0.5", "no effect"),
        ("--only 07", "no notebook 07, only 01_data, 04_choice, 05_measure"),
        ("--only 04,", "no notebook 04,"),
        ("--from 7", "no notebook 7"),
        ("--only 04 --from 05", "not allowed with"),
        ("--only 04 --check", "not allowed with"),
        ("--check --from 04", "not allowed with"),
        ("--check", "there is no folder"),
        ("--check -f few.yaml --results-dir results/reference/few", "or it is the one to be written"),
        ("--wrong", "usage:"),
        ("--res x", "usage:"),
        ("-p alpha", "usage:"),
        ("--results-dir .", "is not the folder of one run"),
        ("--results-dir results", "is not the folder of one run"),
        ("--results-dir ..", "is not the folder of one run"),
        ("--results-dir notebooks", "was not made by a run"),
        ("--results-dir cam_core.py", "was not made by a run"),
        ("--results-dir cam_core.py/x", "results_dir: "),
    ],
)
def test_refused_before_the_first_notebook_with_exit_code_2(tmp_path, monkeypatch, capsys, words, said):
    root = make_repository(tmp_path / "repo")
    parameters = 'alpha: float | str = 1.0\nmode: str = ""\n' + 'device: str = "auto"' * ("trap" in words)
    make_notebook(root / "notebooks/04_choice.ipynb", PARAMETERS + parameters)
    (root / "unknown.yaml").write_text("alhpa: 1\n")
    (root / "trap.yaml").write_text("device: 3\n")
    (root / "few.yaml").write_text("alpha: 1\n")
    (root / "results/reference/few").mkdir(parents=True)
    (root / "list.yaml").write_text("- alpha\n")
    (root / "broken.yaml").write_text("alpha: [1\n")
    (root / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    before = contents(root)
    monkeypatch.setattr(pipeline, "ROOT", root)
    monkeypatch.setattr(pipeline.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["pipeline.py", *words.split()])
    monkeypatch.chdir(root)
    assert said in refusal(capsys, pipeline.main)
    assert {name: data for name, data in contents(root).items() if not name.endswith(".lock")} == before


def test_the_command_line_wins_over_the_file_and_the_last_word_over_the_first(finished):
    assert manifest(finished[1])["notebooks"]["01_data"]["parameters"] == {"n_images": 9, "scale": 0.001}


def test_a_notebook_gets_only_the_parameters_it_declares(finished):
    for stem, names in (("04_choice", {"root", "results_dir"}), ("05_measure", {"root", "results_dir", "n_images"})):
        executed = json.loads((finished[1] / f"notebooks/{stem}.ipynb").read_text())
        assert set(executed["metadata"]["papermill"]["parameters"]) == names


# ---- a run


def test_the_notebooks_run_in_order_and_it_says_where_to_look_first(finished):
    process, target = finished
    lines = process.out.splitlines()
    assert [line[:5] for line in lines if line.startswith("[")] == ["[1/3]", "[2/3]", "[3/3]"]
    assert process.out.index("01_data") < process.out.index("04_choice") < process.out.index("05_measure")
    assert "Look first at" in process.out and str(target / "notebooks/05_measure.html") in process.out
    assert process.err == "", "the terminal stays clean"


def test_what_kernels_say_beside_their_notebooks_stays_off_the_terminal(finished):
    process, target = finished
    assert NOISE.splitlines()[0] in (target / "notebooks/01_data.ipynb").read_text(), "the cell was run"
    assert "said" not in process.out + process.err
    assert not (target / ".kernel").exists()


def test_kernels_run_here_whatever_the_machine_has_lying_about(finished, fake):
    executed = (finished[1] / "notebooks/01_data.ipynb").read_text()
    assert f"{sys.executable} {fake} 0 {finished[1]}" in executed
    assert "[]" in executed or "MPLCONFIGDIR" in executed
    assert "Agg" not in executed


def test_every_output_carries_the_run_and_the_manifest_lists_them_all(finished):
    target = finished[1]
    record = manifest(target)
    files = contents(target)
    del files["manifest.json"]
    assert set(files) == set(record["files"])
    assert {f"notebooks/{stem}.html" for stem in record["notebooks"]} <= set(files)
    for name, data in files.items():
        assert record["run"].encode() in data, name
        assert record["files"][name]["bytes"] == len(data)
    assert record["files"]["fusion.json"]["notebook"] == "04_choice"
    assert record["files"]["report.html"]["notebook"] == "report.py"
    assert len(record["run"]) == 12 and record["packages"]["papermill"] == "2.7.0"
    assert record["commit"] is None and record["dirty"] is None and record["cpus"] == os.cpu_count()
    assert all(entry["seconds"] > 0 for entry in record["notebooks"].values()) and record["seconds"] > 0
    assert record["notebooks"]["04_choice"]["resolved"] == {"alpha": "as found"} and "resolved.json" not in files
    assert "resolved" not in record["notebooks"]["01_data"] and len(record["notebooks"]["01_data"]["sha256"]) == 64
    assert b"unfinished" not in b"".join(files.values()), "paths point to where the results are now"
    assert sorted(path.name for path in target.parent.iterdir()) == [".out.lock", "few.yaml", "kernels", "out"]


def test_the_run_id_is_that_of_what_determines_the_results(tmp_path, monkeypatch):
    root = make_repository(tmp_path / "repo")
    monkeypatch.setattr(pipeline, "ROOT", root)

    def identity(**given):
        notebooks = {path.stem: path for path in sorted((root / "notebooks").glob("*.ipynb"))}
        return pipeline.run_id({stem: {"n": 1, "weights": "auto", **given} for stem in notebooks}, notebooks)

    first = identity()
    assert first == identity()
    assert len({first, identity(n=2), identity(weights=str(tmp_path / "x.pth"))}) == 3
    path = root / "notebooks/01_data.ipynb"
    book = nbformat.read(path, 4)
    book.cells[1].execution_count, book.cells[1].outputs = 3, [nbformat.v4.new_output("stream", text="hello")]
    nbformat.write(book, path)
    assert identity() == first, "outputs do not count"
    seen = [first]
    book.cells[2].source += "\n1"
    nbformat.write(book, path)
    seen.append(identity())
    for name in ("cam_core.py", "requirements.txt", "data/checkpoints/net.pth"):
        (root / name).write_text("changed")
        seen.append(identity())
    (tmp_path / "x.pth").write_text("a")
    seen.append(identity(weights=str(tmp_path / "x.pth")))
    (tmp_path / "x.pth").write_text("b")
    seen.append(identity(weights=str(tmp_path / "x.pth")))
    assert len(set(seen)) == len(seen) == 7


def test_where_it_is_computed_is_no_part_of_the_run_id(here):
    notebooks = {"01_data": here / "notebooks/01_data.ipynb"}
    seen = {pipeline.run_id({"01_data": {"n": 1, "scheduler": where}}, notebooks) for where in ("", "tcp://a:1")}
    assert len(seen) == 1


def test_the_manifest_tells_paths_as_seen_from_the_repository(here, tmp_path):
    pipeline.portable.cache_clear()
    for word in ("auto", "synthetic", "data", "resnet50", "cam_core.py:Net"):
        assert pipeline.portable(word) == word
    assert pipeline.portable(str(here / "data/checkpoints/net.pth")) == "data/checkpoints/net.pth"
    assert pipeline.portable(f"{here}/cam_core.py:Net") == "cam_core.py:Net"
    photos, seen = tmp_path / "photos", []
    (photos / "cache").mkdir(parents=True)
    for name, text in (("a.png", "a"), ("a.png", "b"), ("b.png", "b"), ("cache/x", "finished work")):
        (photos / name).write_text(text)
        pipeline.portable.cache_clear()
        seen.append(pipeline.portable(str(photos)))
        assert seen[-1]["name"] == "photos" and len(seen[-1]["sha256"]) == 64
    assert len({each["sha256"] for each in seen}) == 3 and seen[-1] == seen[-2], "the cache does not count"
    (tmp_path / "net.py").write_text("class Net: pass")
    assert pipeline.portable(f"{tmp_path}/net.py:Net")["name"] == "net.py:Net"
    assert pipeline.portable("../elsewhere")["name"] == "elsewhere"
    pipeline.portable.cache_clear()


def test_commit_and_dirty_flag(tmp_path, monkeypatch):
    root = make_repository(tmp_path / "repo")
    monkeypatch.setattr(pipeline, "ROOT", root)

    def git(*words):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.strip()

    for folder in (tmp_path, root):  # a repository around this one is not this one
        subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
        assert pipeline.circumstances()["commit"] is None
    git("add", ".")
    git("commit", "-qm", "first")
    assert pipeline.circumstances()["commit"] == git("rev-parse", "HEAD")
    assert pipeline.circumstances()["dirty"] is False
    (root / "cam_core.py").write_text("changed")
    assert pipeline.circumstances()["dirty"] is True
    assert pipeline.circumstances()["commit"] == git("rev-parse", "HEAD")


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
def test_select(only, first, chosen):
    stems = ["01_a", "04_b", "05_c"]
    assert [stem[:2] for stem in pipeline.select(stems, only, first)] == chosen.split()


def test_no_torch_and_no_papermill_before_the_parameters_are_checked(repo):
    code = "import sys, pipeline; print({'torch', 'papermill', 'nbformat', 'nbconvert'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=repo, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", "the second start would not reach the first notebook in 5 seconds"


def test_a_report_that_fails_costs_no_results(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "build", lambda *_: 1 / 0)
    pipeline.add_report(tmp_path, {}, "results/here")
    said = capsys.readouterr().err
    assert "ZeroDivisionError" in said and "python report.py results/here" in said and not list(tmp_path.iterdir())


# ---- the old results or the new ones


@pytest.fixture
def whole(finished, fake):
    """The small repository with finished results of its own; they must survive whatever the test does."""
    target = fake / "results/default"
    shutil.rmtree(fake / "results")
    shutil.copytree(finished[1], target)
    return fake, target


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("fail", ["04_choice failed in cell [5]", "value = value / 0  # here", "ZeroDivisionError: division"]),
        ("die", ["04_choice failed in cell [5]", 'if mode == "sleep":', "Kernel died", "memory", "no room left"]),
        ("exit", ["04_choice failed", "ended itself before its last cell"]),
    ],
)
def test_a_failing_notebook_stops_the_run_and_names_the_cell(whole, mode, said):
    root, target = whole
    before = contents(target)
    process = run(root, "--from", "04", "-p", "mode", mode)
    assert process.returncode == 1
    assert all(words in process.err for words in said), process.err
    assert "\x1b" not in process.err and "Traceback" not in process.err and len(process.err.splitlines()) < 25
    assert "05_measure" not in process.out
    copy = Path(process.err.split("Executed so far: ")[1].split(". The present")[0])
    assert "value = 1" in copy.read_text() and copy.is_relative_to(root / "results")
    assert contents(target) == before


def test_a_kernel_that_does_not_start_is_quoted(whole, tmp_path):
    root, target = whole
    before = contents(target)
    (tmp_path / "ipykernel_launcher.py").write_text("raise SystemExit('no kernel today')")
    process = run(root, "--only", "05", PYTHONPATH=str(tmp_path))
    assert process.returncode == 1 and "Traceback" not in process.err
    assert "05_measure failed" in process.err and "Kernel died before" in process.err
    assert "no kernel today" in process.err and contents(target) == before


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    assert met
    return met


def alive(pid):
    """Whether the process is there, and not a zombie that nobody has looked at yet."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
    return bool(state.strip()) and not state.startswith("Z")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_kill_leaves_the_old_results_and_the_next_run_completes(whole, number):
    root, target = whole
    before = contents(target)
    process = start(root, "--only", "04", "-p", "mode", "sleep")
    pid_file = target.with_name(f"default.unfinished-{process.pid}") / "pid"
    wait_for(pid_file.exists)
    kernel = int(wait_for(pid_file.read_text))
    if number == signal.SIGTERM:
        second = run(root, "--only", "05")
        assert second.returncode == 2 and "another run is writing" in second.err
        assert pid_file.exists(), "the second start leaves the folder of the live run alone"
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert len(err.splitlines()) == (number != signal.SIGKILL), err
    wait_for(lambda: not alive(kernel))
    assert contents(target) == before
    assert next(target.parent.glob("*.unfinished-*"))
    if number == signal.SIGKILL:
        assert run(root, "--only", "04").returncode == 0
        assert sorted(path.name for path in target.parent.iterdir()) == [".default.lock", "default"]


def test_only_keeps_the_other_results_but_not_those_that_read_what_is_new(whole):
    root, target = whole
    first = manifest(target)
    (target / "mine.txt").write_text("put here by hand")
    assert run(root, "--only", "04", "-p", "alpha", "0.25").returncode == 0
    record = manifest(target)
    assert set(record["notebooks"]) == {"01_data", "04_choice"} and not (target / "summary.csv").exists()
    assert record["notebooks"]["01_data"] == first["notebooks"]["01_data"]
    assert record["notebooks"]["04_choice"]["run"] == record["run"] != first["run"]
    assert record["notebooks"]["04_choice"]["parameters"] == {"alpha": 0.25, "mode": "ok"}
    assert record["files"]["tables/01_data.csv"] == first["files"]["tables/01_data.csv"]
    assert "0.25" in (target / "fusion.json").read_text()
    shutil.rmtree(target)
    process = run(root, "--only", "05")  # without anything to read: that is for the notebook to say
    assert process.returncode == 0 and "False" in (target / "summary.csv").read_text()
    assert set(manifest(target)["notebooks"]) == {"05_measure"}


def test_claim_clears_what_dead_runs_left_and_nothing_else(tmp_path):
    for name in ("run.unfinished-123", "run.unfinished-business", "runner.unfinished-1", "run"):
        (tmp_path / name).mkdir()
    pipeline.claim(tmp_path / "run").close()
    assert {path.name for path in tmp_path.iterdir()} == {
        "run", "run.unfinished-business", "runner.unfinished-1", ".run.lock"}  # fmt: skip


def test_claim_never_takes_a_folder_that_no_run_made(tmp_path, capsys):
    for name, text in (("thesis.tex", "years of work"), ("manifest.json", '{"name": "a web app"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(text)
        assert "was not made by a run" in refusal(capsys, pipeline.claim, tmp_path / name)
        assert (tmp_path / name / name).read_text() == text


def finished_folder(path, text):
    path.mkdir()
    (path / "manifest.json").write_text(json.dumps({"run": text, "files": {}}))
    return path


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("target_is", ["absent", "empty", "full"])
def test_put_in_place(tmp_path, monkeypatch, exchange, target_is):
    if not exchange:  # as on a system without renameat2
        monkeypatch.setattr(pipeline.ctypes, "CDLL", lambda name: object())
    fresh, target = finished_folder(tmp_path / "run.unfinished-1", "new"), tmp_path / "run"
    if target_is != "absent":
        finished_folder(target, "old")
    if target_is == "empty":
        (target / "manifest.json").unlink()
    pipeline.put_in_place(fresh, target)
    assert manifest(target)["run"] == "new" and [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_swap_in_two_steps_that_is_killed_between_them_is_mended(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline.ctypes, "CDLL", lambda name: object())
    fresh, target = finished_folder(tmp_path / "run.unfinished-9", "new"), finished_folder(tmp_path / "run", "old")
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
    pipeline.claim(target).close()
    assert manifest(target)["run"] in ("old", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".run.lock", "run"]


# ---- a run against its reference


@pytest.fixture
def with_reference(whole):
    """The small repository with the results of few.yaml as its reference: (root, reference, run it)."""
    root, target = whole
    (root / "few.yaml").write_text("results_dir: results/few\nn_images: 9\nscale: 1e-3\n")
    reference = root / "results/reference/few"
    shutil.copytree(target, reference)
    yield root, reference, lambda *words: run(root, "-f", "few.yaml", "--check", *words)
    (root / "few.yaml").unlink()


def test_check_passes_where_the_numbers_agree_wherever_the_results_go(with_reference, tmp_path):
    root, reference, call = with_reference
    (reference / "tables/01_data.csv").unlink()
    process = call("--results-dir", tmp_path / "other")
    assert process.returncode == 0 and process.err == "", process.err
    assert f"{tmp_path / 'other'} agrees with {reference} in fusion.json, summary.csv." in process.out
    assert "tables/01_data.csv" in process.out.split("Not compared")[1]


def test_check_fails_loudly_on_a_planted_number_and_the_results_are_in_place(with_reference):
    root, reference, call = with_reference
    path = reference / "summary.csv"
    path.write_text(path.read_text().replace("0.25", "0.251"))
    process = call()
    assert process.returncode == 1
    said = process.err.splitlines()
    assert said[0] == f"{root / 'results/few'} differs from {reference}:" and len(said) == 2
    assert said[1].strip().startswith("summary.csv: metric energy, method grad_cam: mean is 0.25 here, 0.251 there (")
    assert "Done in" in process.out and not list((root / "results").glob("*.unfinished-*"))
    assert set(manifest(root / "results/few")["notebooks"]) == {"01_data", "04_choice", "05_measure"}


def test_without_f_the_reference_is_default_and_a_missing_one_is_refused_at_once(whole, tmp_path):
    root, target = whole
    shutil.copytree(target, root / "results/reference/default")
    process = run(root, "--check", "--results-dir", tmp_path / "out", "-p", "n_images", 9, "-p", "scale", "1e-3")
    assert process.returncode == 0 and "agrees with" in process.out, process.err
    shutil.rmtree(root / "results/reference")
    process = run(root, "--check")
    assert process.returncode == 2 and process.out == "" and "results/reference/default" in process.err


# ---- set-up


@pytest.fixture
def setting(repo, tmp_path):
    """The two scripts beside a pipeline that tells how it was called, and a `pip` that only writes down its words."""
    home = tmp_path / "re po"
    (home / ".ci").mkdir(parents=True)
    for name in ("run_all.sh", "run_tests.sh", ".ci/setup.sh"):
        shutil.copy(repo / name, home / name)
    (home / "requirements.txt").write_text("one")
    (home / "pipeline.py").write_text("import os, sys; print(sys.prefix, os.getcwd(), sys.argv[1:])")
    (tmp_path / "modules/pip").mkdir(parents=True)
    (tmp_path / "modules/pip/__init__.py").write_text("")
    log = tmp_path / "pip.log"
    (tmp_path / "modules/pip/__main__.py").write_text(f"import sys; print(sys.argv[1:], file=open({str(log)!r}, 'a'))")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    clean = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHON")}

    def call(*words, cwd=tmp_path, **environment):
        environment = {**clean, "PYTHONPATH": str(tmp_path / "modules"), **environment}
        return subprocess.run(
            ["bash", str(home / "run_all.sh"), *words], cwd=cwd, env=environment, capture_output=True, text=True
        )

    def installs():
        return [line for line in log.read_text().splitlines() if "install" in line] if log.exists() else []

    return home, tmp_path / "env", call, installs


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX", "PYTHON"])
def test_an_active_environment_is_used_and_set_up_once(setting, tmp_path, variable):
    home, env, call, installs = setting
    given = {variable: str(env / "bin/python" if variable == "PYTHON" else env)}
    for _ in range(2):
        done = call("-p", "a b", "c", **given)
        assert done.stdout.strip() == f"{env} {tmp_path} ['-p', 'a b', 'c']", done.stderr
    assert len(installs()) == 1 and not (home / ".venv").exists()
    (home / "requirements.txt").write_text("another")
    call(**given)
    assert len(installs()) == 2


def test_venv_is_made_once_by_the_interpreter_chosen(setting, tmp_path):
    home, _, call, installs = setting
    base = tmp_path / "python3"  # installing pip takes long, and the stand-in will do
    base.write_text(f"""#!/bin/sh
if [ "$2" = venv ]; then shift 2; set -- -m venv --without-pip "$@"; fi
exec {sys.base_prefix}/bin/python3 "$@"
""")
    base.chmod(0o755)
    done = [call("x", PYTHON=str(base)) for _ in range(2)]
    assert [each.stdout.strip() for each in done] == [f"{home / '.venv'} {tmp_path} ['x']"] * 2, done[0].stderr
    assert "Making .venv" in done[0].stderr and done[1].stderr == "" and len(installs()) == 1
    other = tmp_path / "python9"
    other.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 9.9 || exit 1\n')
    other.chmod(0o755)
    refused = call(PYTHON=str(other))
    assert refused.returncode == 2 and "Remove .venv" in refused.stderr


def test_an_interpreter_that_is_too_old_or_missing_is_named(setting, tmp_path):
    home, _, call, _ = setting
    old = tmp_path / "python2"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 2.7 || exit 1\n')
    old.chmod(0o755)
    done = call(PYTHON=str(old))
    assert done.returncode == 2 and "Python 3.11 or newer is needed" in done.stderr and "Python 2.7" in done.stderr
    done = call(PYTHON="no-such-python")
    assert done.returncode == 2 and "there is no 'no-such-python'" in done.stderr
    assert not (home / ".venv").exists()
