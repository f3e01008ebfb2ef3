"""What docs/SECURITY.md promises: nothing in data is executed, nothing is written elsewhere, and
nothing listens outside. Bombs and traps in single files: test_inputs.py and test_networks.py.
"""

import ast
import json
import logging
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import nets
import pytest
import torch
from fake import make_notebook, make_repository
from PIL import Image
from safetensors.torch import save_file
from test_rooms import ROOMS, sources

import cam_core as cc
from runner import parameters, pipeline, report

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[a](javascript:alert(1))",
    "<b onclick=x>b</b>",
]

# ---- sources: what is not there cannot be abused

FORBIDDEN = """eval exec compile os.system os.popen pickle.load pickle.loads pickle.Unpickler
joblib.load dill.load dill.loads marshal.loads shelve.open pd.read_pickle yaml.load yaml.unsafe_load
yaml.full_load torch.hub.load tarfile.extractall torch.jit.load ElementTree.fromstring
tempfile.mktemp""".split()
MODULES = re.compile(r"(pickle|dill|joblib|marshal|shelve|xml)(\.|$)")


def dangers(source):
    """Calls of a source that could execute what a file or a parameter says."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", "") or "", *(alias.name for alias in node.names)]
            yield from (f"import of {name}" for name in names if MODULES.match(name))
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in FORBIDDEN or name.endswith((".extractall", ".extract")):
            yield name
        if name == "torch.load" and given.get("weights_only") != "True":
            yield "torch.load without weights_only=True"
        if {given.get("allow_pickle", "False"), given.get("shell", "False")} != {"False"}:
            yield f"{name} with allow_pickle or shell"


def test_no_source_executes_what_a_file_or_a_parameter_says(repo):
    found = {}
    for room in ROOMS:
        for name, source in sources(repo, room).items():
            if dangerous := set(dangers(source)):
                found[name] = dangerous
    # A Dask client sends its own network to its own workers; nothing in a file goes that way. From
    # joblib comes the number of cores, and no file is loaded with it.
    cores = {"import of joblib"}
    assert found == {"cluster.py": {"import of pickle", "pickle.loads"}, "machine.py": cores}


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(f)",
        "torch.load(f, weights_only=safe)",
        "np.load(f, allow_pickle=True)",
        "from pickle import loads",
        "import xml.etree.ElementTree as E",
        "eval(text)",
        "subprocess.run(a, shell=True)",
        "yaml.load(f)",
        "archive.extractall()",
    ],
)
def test_that_rule_finds_each_of_them(source):
    assert list(dangers(source))


def test_scripts_quote_every_value(repo):
    """In bash an unquoted expansion would be split and globbed; none of the arguments is."""
    for name in ("run_all.sh", "run_tests.sh"):
        text = (repo / name).read_text("utf-8")
        assert "eval" not in text and '"$@"' in text and not re.search(r'(?<!")\$[@*]', text)


# ---- what safetensors say of themselves


def saved(folder, about):
    state = nets.network("resnet18", classes=2).state_dict()
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / "net.safetensors", about)
    return folder / "net.safetensors"


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"arch": "../../x"}, "arch=.?../../x"),
        ({"class_names": "[" * 100_000}, "plain tensors"),
        ({"class_names": "__import__('os')"}, "plain tensors"),
    ],
)
def test_what_safetensors_say_of_themselves_is_data(tmp_path, about, message):
    with pytest.raises(ValueError, match=message):
        cc.networks.load("auto", saved(tmp_path, about))


# ---- names from data sets


@pytest.mark.parametrize("column", ["file", "mask", "twin"])
@pytest.mark.parametrize("name", ["../outside.png", "in/../../outside.png", "{outside}", ".."])
def test_a_manifest_names_no_file_outside_its_folder(tmp_path, column, name):
    folder = tmp_path / "set"
    (folder / "in").mkdir(parents=True)
    for path in (tmp_path / "outside.png", folder / "in/a.png"):
        Image.new("RGB", (8, 8)).save(path)
    named = name.format(outside=tmp_path / "outside.png")
    values = {"file": "in/a.png", "mask": "", "twin": ""} | {column: named}
    text = f"id,{','.join(values)}\n1,{','.join(values.values())}\n"
    (folder / "manifest.csv").write_text(text)
    with pytest.raises(ValueError, match=f"names .* as a {column}, which is outside its folder"):
        cc.datasets.read(folder)


def test_boxes_csv_names_no_file_outside_its_folder(tmp_path):
    (tmp_path / "set").mkdir()
    for path in (tmp_path / "b.png", tmp_path / "set/a.png"):
        Image.new("RGB", (8, 8)).save(path)
    for name in ("../b.png", str(tmp_path / "b.png"), "../set/a.png"):
        (tmp_path / "set/boxes.csv").write_text(f"file,x0,y0,x1,y1\n{name},0,0,5,5\n")
        with pytest.raises(ValueError, match="line 2: .*must name an image of this folder"):
            cc.datasets.read(tmp_path / "set")


def test_pictures_of_hostile_ids_stay_in_their_folder(tmp_path):
    """Ids from a manifest, and from file and folder names: `..` cannot be a name, all else can."""
    folder = tmp_path / "set"
    out = tmp_path / "results/images"
    out.mkdir(parents=True)
    names = ["a..", "a b", "$(touch x)", "-rf", "CON", "a\nb", "`x`", "<script>", "%2e%2e%2fx"]
    for name in names:
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / name / "1.png")
    ids = [*cc.datasets.read(folder)["id"], "../../up", "/absolute", "~/home", "a/../../b"]
    before = {path for path in tmp_path.rglob("*") if out not in path.parents}
    for image_id in ids:
        name = f"02_{cc.datasets.safe_name(image_id)}"
        cc.figures.save_pictures(out, name, Image.new("RGB", (8, 8)), torch.zeros(8, 8))
    assert {path for path in tmp_path.rglob("*") if out not in path.parents} == before
    assert len(list(out.iterdir())) == 5 * len(ids)


# ---- parameters, the HTML copies, sockets: one run of one notebook

VALUES = [
    "$(touch sprung)",
    "`touch sprung`",
    '"; import os; os.system("touch sprung"); "',
    "'; touch sprung; '",
    "{{1+1}} {results_dir} %s",
    "\\",
    '\\"\\n',
    "a\nimport os\nopen('sprung', 'w')",
    '"""\nopen("sprung", "w")\n"""',
    "${HOME}",
    "!touch sprung",
    "../../x",
]
SHOW = f"""import json, os, psutil
from pathlib import Path
import pandas as pd
from IPython.display import HTML, Markdown, display
from ipykernel.connect import get_connection_file
out = Path(settings["results_dir"])
names = {HOSTILE!r}
(out / "seen.json").write_text(json.dumps([layer, settings["classes"]]))
listed = "\\n".join("- " + name for name in names)
display(Markdown(listed + "\\n\\n| a | b |\\n|---|---|\\n| 1 | 2 |"))
display(pd.DataFrame({{"label": names}}, index=names).style.set_caption(names[0]))
display(pd.DataFrame({{"label": names}}))
display(HTML("<table><tr><td>cell</td></tr></table>" + names[1]))
print(*names)
file = get_connection_file()
(out / "connection.json").write_text(json.dumps([file, os.stat(file).st_mode]))
addresses = set()
for process in (psutil.Process(), psutil.Process().parent()):
    for connection in process.net_connections("inet"):
        if connection.status == psutil.CONN_LISTEN:
            addresses.add(connection.laddr.ip)
(out / "sockets.json").write_text(json.dumps(sorted(addresses)))"""


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """The folder of a notebook that gets hostile values and shows hostile names, with its page."""
    folder = tmp_path_factory.mktemp("re'p$(o)")
    make_notebook(folder / "02_show.ipynb", 'layer: str = "auto"  # a', SHOW)
    pairs = [("layer", " \x1f ".join(VALUES)), ("classes", VALUES[2])]
    values = parameters.check_given(parameters.read_given(None, pairs), ["02_show"])
    before = dict(os.environ)
    try:
        pipeline.prepare_kernels(folder / ".kernel", "run")
        given = parameters.for_papermill(folder / "02_show.ipynb", values, folder)
        pipeline.execute(folder / "02_show.ipynb", folder / "out.ipynb", given)
    finally:
        os.environ.clear()
        os.environ.update(before)
        logging.disable(logging.NOTSET)
    (folder / "out.html").write_text(report.notebook_page(folder / "out.ipynb", "run"), "utf-8")
    return folder


def test_values_reach_a_notebook_as_they_are_and_run_nowhere(shown):
    assert json.loads((shown / "seen.json").read_text()) == [" \x1f ".join(VALUES), VALUES[2]]
    assert not list(shown.rglob("sprung")) and not Path("sprung").exists()
    assert not (pipeline.HOME / "sprung").exists(), "where kernels run"


def test_values_of_another_kind_are_refused_and_run_nowhere(tmp_path):
    """Through run_all.sh itself, with a stand-in for the set-up, which is another test's."""
    home = make_repository(tmp_path / "home")
    repo = Path(__file__).resolve().parents[1]
    (home / "run_all.sh").write_text((repo / "run_all.sh").read_text("utf-8"))
    (home / "runner/setup.sh").write_text(f"set_up() {{ python={sys.executable}; }}\n")
    for name in ("n_images", "device", "arch", "weights", "unknown"):
        words = ["bash", str(home / "run_all.sh"), "-p", name, VALUES[0]]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2 and name in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1 and not list(tmp_path.rglob("sprung"))


class Live(HTMLParser):
    """What of a page would run: scripts, handlers, javascript: addresses, tags that load."""

    def __init__(self, html):
        super().__init__()
        self.found = []
        self.cells = 0
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.cells += tag == "td"
        for name, value in attributes:
            if name.startswith("on") or re.match(r"\s*javascript:", value or "", re.I):
                self.found.append(tag)
        if tag in ("img", "iframe", "object", "embed", "form"):
            self.found.append(tag)

    def handle_data(self, data):
        if self.lasttag == "script" and data.strip().startswith("alert"):
            self.found.append("script")


def test_names_are_no_markup_in_the_html_copies(shown):
    page = (shown / "out.html").read_text("utf-8")
    assert Live(page).found == [] and Live(page).cells >= 8, "tables are still tables"
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 5, "names are shown as they read"


def test_kernels_listen_on_the_loopback_alone(shown):
    assert json.loads((shown / "sockets.json").read_text()) == ["127.0.0.1"]


def test_the_kernels_key_lies_in_the_runs_folder_and_is_the_users_alone(shown):
    """A temporary file elsewhere would stay there whenever a run is killed."""
    file, mode = json.loads((shown / "connection.json").read_text())
    assert Path(file).is_relative_to(shown / ".kernel") and mode & 0o077 == 0


@pytest.mark.parametrize("stem", ["01_dataset_synthesis", "02_gradcam"])
def test_tables_that_show_names_escape_them(repo, stem):
    """In JupyterLab a notebook's outputs are trusted: names have to be escaped to be shown."""
    tree = ast.parse(sources(repo, "notebooks")[f"{stem}.ipynb"])
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".style.format"):
            text = ast.unparse(node)
            escaped = "escape" in {keyword.arg for keyword in node.keywords}
            assert escaped or not re.search(r"label|predicted|target|'id'", text), text
