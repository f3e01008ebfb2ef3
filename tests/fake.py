"""A small repository with three quick notebooks, to see what the runner does with any."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nbformat

REPOSITORY = Path(__file__).resolve().parents[1]

WORK = """import json, os, sys, time
from pathlib import Path
out = Path(settings["results_dir"])
(out / "tables").mkdir(exist_ok=True)
run = os.environ["HYBRID_CAM_RUN"]
def save(name, text): (out / name).write_text(text)
"""
NOISE = """import atexit  # as ipykernel does now and then, when its sockets are closed under it
for place in (1, 2, os.dup(2)):
    atexit.register(os.write, place, b"words after the end")
    os.write(place, b"words beside the notebook")
"""
DATA = """if "HYBRID_CAM_PROGRESS" in os.environ:
    Path(os.environ["HYBRID_CAM_PROGRESS"]).write_text('{"forward": 1234, "backward": 5}')
save("tables/01_data.csv", f"n_test,seed,run\\n{settings.get('n_test')},{seed},{run}\\n")
print(sys.executable, os.getcwd(), sys.flags.hash_randomization, out)
print(sorted(name for name in os.environ if name.startswith("MPL")))
"""
CHOICE = """save("resolved.json", json.dumps({"alpha": "as found"}))
save("fusion.json", json.dumps({"alpha": alpha, "mode": layer, "run": run}))
"""
ENDINGS = """mode = layer
if mode == "sleep":
    save("pid", str(os.getpid()))
    time.sleep(100)
if mode == "die":
    os.write(2, b"no room left\\n")
    os._exit(9)
if mode == "exit":
    sys.exit()
if mode == "fail":
    value = value / 0  # here
"""
MEASURE = """chosen = (out / "fusion.json").exists()
head = "metric,baseline,method,network,primary,n,mean,chosen,run"
save("summary.csv", f"{head}\\nenergy,,grad_cam,net,False,{n_images},0.25,{chosen},{run}\\n")
"""


def make_notebook(path, parameters, *cells):
    """A notebook with a parameters cell that ends in `settings`, and other cells of code."""
    first = nbformat.v4.new_code_cell(f"{parameters}\nsettings: dict = {{}}")
    first.metadata["tags"] = ["parameters"]
    code = [nbformat.v4.new_code_cell(cell) for cell in cells]
    book = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell("# Question"), first, *code]
    )
    for number, cell in enumerate(book.cells):
        cell["id"] = f"cell-{number}"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(book, path)


def make_repository(root):
    """A repository with the real runner and parameters, and notebooks 01, 04 and 05 in little; 04
    ends as its parameter `layer` says.
    """
    for name in ("runner", "lab", "params"):
        shutil.copytree(
            REPOSITORY / name, root / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    (root / "lab/machine.py").write_text("")  # it cannot be asked, which is quick
    (root / "results").mkdir()
    (root / "data/checkpoints").mkdir(parents=True)
    (root / "data/checkpoints/net.pth").write_bytes(b"weights")
    (root / "cam_core.py").write_text("class sentences:\n    read_tables = lambda folder: {}\n")
    (root / "requirements.txt").write_text("papermill==0  # only the name is read\n")
    notebooks = root / "notebooks"
    make_notebook(notebooks / "01_data.ipynb", "seed: int = 0  # of all", WORK + DATA, NOISE)
    make_notebook(
        notebooks / "04_choice.ipynb",
        'alpha: float | str = "auto"  # weight\nlayer: str = "auto"  # how to end',
        WORK + CHOICE,
        "value = 1",
        ENDINGS,
        "value = 2",
    )
    make_notebook(notebooks / "05_measure.ipynb", "n_images: int = 24  # how many", WORK + MEASURE)
    return root


def start(root, *words, cwd=None, **environment):
    """Start the pipeline of a repository from outside, as run_all.sh does."""
    command = [sys.executable, "-P", "-m", "runner.pipeline", *map(str, words)]
    return subprocess.Popen(
        command,
        cwd=cwd or root,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(root), **environment},
        # Ctrl-C is ignored by what a script starts in the background, and by all that this starts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def run(root, *words, **more):
    """The finished process, with what it wrote as `out` and `err`."""
    process = start(root, *words, **more)
    process.out, process.err = process.communicate(timeout=300)
    return process


def contents(folder):
    """{name: bytes} of all files."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())
