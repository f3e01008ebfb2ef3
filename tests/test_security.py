"""What SECURITY.md promises: nothing in data is executed, nothing is written elsewhere, nothing listens outside."""

import ast
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import time
import zlib
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import nets
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_pipeline import PARAMETERS, contents, make_notebook, make_repository, manifest, run

import cam_core as cc
import check
import parameters
import pipeline

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[a](javascript:alert(1))",
    "<b onclick=x>b</b>",
]

# ---- sources: what is not there cannot be abused


def python_sources(repo):
    """{name: source} of the modules, scripts and notebooks; tests aside, which set traps on purpose."""
    files = [*repo.glob("*.py"), *(repo / "benchmarks").glob("*.py")]
    found = {path.name: path.read_text("utf-8") for path in files}
    for path in (repo / "notebooks").glob("*.ipynb"):
        cells = [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
        found[path.name] = "\n\n".join(cells)
    return found


FORBIDDEN = {"eval", "exec", "compile", "os.system", "os.popen", "pickle.load", "pickle.loads", "pickle.Unpickler",
             "joblib.load", "dill.load", "dill.loads", "marshal.loads", "shelve.open", "pd.read_pickle", "yaml.load",
             "yaml.unsafe_load", "yaml.full_load", "torch.hub.load", "tarfile.extractall", "torch.jit.load",
             "ElementTree.fromstring", "tempfile.mktemp"}  # fmt: skip


def dangers(source):
    """Calls of a source that could execute what a file or a parameter says."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", "") or "", *(alias.name for alias in node.names)]
            if any(re.match(r"(pickle|dill|joblib|marshal|shelve|xml)(\.|$)", name) for name in names):
                yield f"line {node.lineno}: import of {', '.join(names)}"
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if name in FORBIDDEN or name.endswith((".extractall", ".extract")):
            yield f"line {node.lineno}: {name}"
        if name == "torch.load" and given.get("weights_only") != "True":
            yield f"line {node.lineno}: torch.load without weights_only=True"
        if {given.get("allow_pickle", "False"), given.get("shell", "False")} != {"False"}:
            yield f"line {node.lineno}: {name} with allow_pickle or shell"


def test_no_source_executes_what_a_file_or_a_parameter_says(repo):
    sources = python_sources(repo)
    assert {"cam_core.py", "cam_inputs.py", "pipeline.py", "01_dataset_synthesis.ipynb"} <= set(sources)
    found = {name: {re.sub(r"line \d+: ", "", d) for d in dangers(source)} for name, source in sources.items()}
    # A Dask client sends its own code and network to its own workers; nothing in a file or a parameter goes that way.
    between_machines = {"import of , pickle", "pickle.loads", "exec", "compile"}
    assert {name: d for name, d in found.items() if d} == {"cam_cluster.py": between_machines}
    assert any("torch.load(" in source for source in sources.values()), "the rule has something to look at"


@pytest.mark.parametrize(
    "source",
    ["torch.load(f)", "torch.load(f, weights_only=False)", "torch.load(f, weights_only=safe)",
     "np.load(f, allow_pickle=True)",
     "import pickle", "from pickle import loads", "import xml.etree.ElementTree as E", "eval(text)", "exec(text)",
     "os.system(a)", "subprocess.run(a, shell=True)", "yaml.load(f)", "archive.extractall()", "pd.read_pickle(f)"],
)  # fmt: skip
def test_that_rule_finds_each_of_them(source):
    assert list(dangers(source))


def test_scripts_quote_every_value(repo):
    """In bash an unquoted expansion would be split and globbed; none of the arguments is."""
    for name in ("run_all.sh", "run_tests.sh"):
        text = (repo / name).read_text("utf-8")
        assert "eval" not in text and '"$@"' in text and not re.search(r'(?<!")\$[@*]', text)


# ---- checkpoints


class Trap:
    def __init__(self, flag):
        self.flag = str(flag)

    def __reduce__(self):
        return (open, (self.flag, "w"))


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_a_malicious_checkpoint_does_not_run(tmp_path, suffix):
    flag = tmp_path / "sprung"
    torch.save({"model_state_dict": {"w": torch.ones(1)}, "arch": Trap(flag)}, tmp_path / f"zip{suffix}")
    (tmp_path / f"plain{suffix}").write_bytes(pickle.dumps(Trap(flag), protocol=2))
    for name in ("zip", "plain"):
        with pytest.raises(ValueError, match=rf"{name}{suffix} is not a PyTorch file of plain tensors"):
            cc.load_model("resnet18", tmp_path / f"{name}{suffix}")
    assert not flag.exists()
    pickle.loads((tmp_path / f"plain{suffix}").read_bytes())
    assert flag.exists(), "an ordinary load springs the trap"


def tensors(model):
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("arch", ["resnet18", "googlenet", "squeezenet1_1"])
def test_safetensors_hold_a_checkpoint(tmp_path, monkeypatch, arch):
    monkeypatch.chdir(tmp_path)
    model = nets.network(arch, classes=4)
    about = {"arch": arch, "class_names": json.dumps(["a", "b", "c", "d"]), "size": "96"}
    save_file(tensors(model), "net.safetensors", about)
    loaded, info = cc.load_model("auto", "net.safetensors")
    assert info["class_names"] == ["a", "b", "c", "d"] and info["size"] == 96 and info["arch"] == arch
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    save_file(tensors(model), "bare.safetensors")
    assert cc.load_model(arch, "bare.safetensors")[1]["class_names"] == [f"class {k}" for k in range(4)]
    assert parameters.parse("weights", ["str"], "net.safetensors", "-p") == str(tmp_path / "net.safetensors")


@pytest.mark.parametrize(
    ("about", "said"),
    [({"arch": "../../x"}, "arch=.?../../x"), ({"class_names": "[" * 100_000}, "plain tensors"),
     ({"class_names": "__import__('os')"}, "plain tensors"), ({"arch": "resnet18", "size": "x"}, "invalid literal")],
)  # fmt: skip
def test_what_safetensors_say_of_themselves_is_data(tmp_path, about, said):
    save_file(tensors(nets.network("resnet18", classes=2)), tmp_path / "net.safetensors", about)
    with pytest.raises(ValueError, match=said):
        cc.load_model("auto", tmp_path / "net.safetensors")


# ---- images and boxes


def bomb(path, width, height):
    """A small PNG file that says it has width x height pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header, rows = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), zlib.compress(bytes(10**7), 9)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


@pytest.mark.parametrize("size", [(60_000, 60_000), (12_000, 12_000), (2**30, 2**30)])
def test_a_decompression_bomb_is_refused_by_name_before_it_is_decoded(tmp_path, size):
    bomb(tmp_path / "bomb.png", *size)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert (tmp_path / "bomb.png").stat().st_size < 20_000
    begin = time.monotonic()
    with pytest.raises(ValueError, match=r"image: .*bomb.png (is refused: .*exceeds limit|cannot be read)"):
        cc.read_image(tmp_path / "bomb.png")
    assert time.monotonic() - begin < 2
    kept, left_out = cc.readable(cc.read_dataset(tmp_path))
    assert list(kept["id"]) == ["a"] and list(left_out["id"]) == ["bomb"]


def test_boxes_with_entities_are_refused_whatever_they_say(tmp_path):
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    body = "<a><object><name>{}</name>" + box + "</object></a>"
    (tmp_path / "a.xml").write_text(body.format("cat"))
    assert cc.read_dataset(tmp_path)["label"].tolist() == ["cat"]
    for entity in ('"small"', 'SYSTEM "file:///etc/hostname"', 'SYSTEM "http://127.0.0.1:9/x"'):
        (tmp_path / "a.xml").write_text(f"<!DOCTYPE a [<!ENTITY e {entity}>]>{body.format('&e;')}")
        with pytest.raises(ValueError, match="a.xml is no PASCAL VOC file"):
            cc.read_dataset(tmp_path)


# ---- names from data sets


@pytest.mark.parametrize("column", ["file", "mask", "twin"])
@pytest.mark.parametrize("name", ["../outside.png", "in/../../outside.png", "{outside}", "../{folder}-2/a.png", ".."])
def test_a_manifest_names_no_file_outside_its_folder(tmp_path, column, name):
    folder = tmp_path / "set"
    (folder / "in").mkdir(parents=True)
    for path in (tmp_path / "outside.png", folder / "in/a.png"):
        Image.new("RGB", (8, 8)).save(path)
    name = name.format(outside=tmp_path / "outside.png", folder=folder.name)
    values = {"file": "in/a.png", "mask": "", "twin": ""} | {column: name}
    (folder / "manifest.csv").write_text(f"id,{','.join(values)}\n1,{','.join(values.values())}\n")
    with pytest.raises(ValueError, match=rf"manifest.csv names .* as a {column}, which is outside its folder"):
        cc.read_dataset(folder)
    for inside in ("in/a.png", "./in/../in/a.png", str(folder / "in/a.png")):
        (folder / "manifest.csv").write_text(f"id,file\n1,{inside}\n")
        assert cc.read_dataset(folder)["file"].tolist() == [str(folder / "in/a.png")]


def test_boxes_csv_names_no_file_outside_its_folder(tmp_path):
    (tmp_path / "set").mkdir()
    for path in (tmp_path / "b.png", tmp_path / "set/a.png"):
        Image.new("RGB", (8, 8)).save(path)
    for name in ("../b.png", str(tmp_path / "b.png"), "../set/a.png"):
        (tmp_path / "set/boxes.csv").write_text(f"file,x0,y0,x1,y1\n{name},0,0,5,5\n")
        with pytest.raises(ValueError, match="line 2: .*must name an image of this folder"):
            cc.read_dataset(tmp_path / "set")


def test_pictures_of_hostile_ids_stay_in_their_folder(tmp_path):
    """Ids from a manifest, and from file and folder names: `..` cannot be a name, but nearly all else can."""
    folder, out = tmp_path / "set", tmp_path / "results/images"
    out.mkdir(parents=True)
    names = ["a..", "a b", "$(touch x)", "-rf", "CON", "a\nb", "`x`", "<script>", "%2e%2e%2fx", "x..\\..\\x"]
    for name in names:
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / name / "../../outside.png")
        Image.new("RGB", (8, 8)).save(folder / name / "1.png")
    os.symlink(tmp_path / "outside.png", folder / "link.png")
    ids = [*cc.read_dataset(folder)["id"], "../../up", "/absolute", "~/home", "a/../../b", "x" * 9 + "/../y"]
    assert len(ids) == len(names) + 1 + 5
    before = {path for path in tmp_path.rglob("*") if out not in path.parents}
    for image_id in ids:
        cc.save_pictures(out, f"02_{cc.safe_name(image_id)}", Image.new("RGB", (8, 8)), torch.zeros(8, 8))
    assert {path for path in tmp_path.rglob("*") if out not in path.parents} == before
    assert len(list(out.iterdir())) == 5 * len(ids) and all(path.is_file() for path in out.iterdir())


def test_a_manifest_json_that_names_files_elsewhere_takes_none_of_them_along(tmp_path):
    """Results of others, run over with --only: what their manifest names beside the folder is not copied about."""
    root = make_repository(tmp_path / "repo")
    target = root / "results/default"
    target.mkdir()
    (root / "results/secret.txt").write_text("secret")
    files = {"../secret.txt": {"notebook": "01_data"}, "kept.txt": {"notebook": "01_data"}}
    (target / "kept.txt").write_text("kept")
    (target / "manifest.json").write_text(json.dumps({"run": "a", "files": files, "notebooks": {"01_data": {}}}))
    process = run(root, "--only", "05")
    assert process.returncode == 0, process.err
    assert (target / "kept.txt").read_text() == "kept" and "kept.txt" in manifest(target)["files"]
    assert sorted(p.name for p in (root / "results").iterdir()) == [".default.lock", "default", "secret.txt"]


@pytest.mark.parametrize("text", ["", '{"run": "a", "fil', "[]", "3", "\0", '{"run": 1}'])
def test_half_a_manifest_is_no_manifest(tmp_path, text):
    """A kill or a full disk while it is written: the next run takes the folder for an unfinished one."""
    (tmp_path / "run.unfinished-7").mkdir()
    (tmp_path / "run.unfinished-7/manifest.json").write_text(text)
    assert check.manifest_of(tmp_path / "run.unfinished-7") == {}
    pipeline.claim(tmp_path / "run").close()
    assert [path.name for path in tmp_path.iterdir()] == [".run.lock"]


# ---- parameters, the HTML copies, sockets: one run of one notebook

VALUES = ["$(touch sprung)", "`touch sprung`", '"; import os; os.system("touch sprung"); "', "'; touch sprung; '",
          "__import__('os').system('touch sprung')", "{{1+1}} {results_dir} %s", "\\", "\\\"\\n",
          "a\nimport os\nopen('sprung', 'w')",
          '"""\nopen("sprung", "w")\n"""', "${HOME}", "!touch sprung", "%%bash", "../../x"]  # fmt: skip
SHOW = f"""import json, psutil
import pandas as pd
from IPython.display import HTML, Markdown, display
names = {HOSTILE!r}
save("seen.json", json.dumps([a, b]))
display(Markdown("\\n".join("- " + name for name in names) + "\\n\\n| a | b |\\n|---|---|\\n| 1 | 2 |"))
display(pd.DataFrame({{"label": names}}, index=names).style.set_caption(names[0]))
display(pd.DataFrame({{"label": names}}))
display(HTML("<table><tr><td>cell</td></tr></table>" + names[1]))
print(*names)
from ipykernel.connect import get_connection_file
save("connection.json", json.dumps([get_connection_file(), os.stat(get_connection_file()).st_mode]))
mine = psutil.Process()
kinds = [c for p in (mine, mine.parent()) for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
save("sockets.json", json.dumps(sorted({{c.laddr.ip for c in kinds}})))"""


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """(results, what was said) of a notebook that gets hostile values and shows hostile names."""
    root = make_repository(tmp_path_factory.mktemp("shown") / "re'p$(o)")
    for path in (root / "notebooks").iterdir():
        path.unlink()
    work = "import os\nfrom pathlib import Path\nout = Path(results_dir)\n"
    work += "def save(name, text): (out / name).write_text(text)"
    make_notebook(root / "notebooks/01_show.ipynb", PARAMETERS + 'a: str = ""  # a\nb: str = ""  # b\n', work, SHOW)
    process = run(root, "-p", "a", "\0".join(VALUES).replace("\0", " \x1f "), "-p", "b", VALUES[2])
    assert process.returncode == 0, process.err
    return root, process


def test_values_reach_a_notebook_as_they_are_and_run_nowhere(shown):
    root, process = shown
    assert json.loads((root / "results/default/seen.json").read_text()) == [" \x1f ".join(VALUES), VALUES[2]]
    assert not list(root.rglob("sprung")) and not Path("sprung").exists()


@pytest.mark.parametrize("name", ["n_images", "alpha", "device", "arch", "weights", "dataset", "colormap", "unknown"])
def test_values_of_another_kind_are_refused_and_run_nowhere(repo, tmp_path, name):
    """Through run_all.sh itself, with a stand-in for the set-up, which is another test's."""
    home = tmp_path / "home"
    (home / ".ci").mkdir(parents=True)
    (home / ".ci/setup.sh").write_text(f"set_up() {{ python={sys.executable}; }}\n")
    for file in ("run_all.sh", "pipeline.py", "parameters.py", "check.py"):
        (home / file).write_text((repo / file).read_text("utf-8"))
    (home / "notebooks").symlink_to(repo / "notebooks")
    before = contents(home)
    for value in VALUES[:3]:
        words = ["bash", str(home / "run_all.sh"), "-p", name, value]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2 and name in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1 and not list(tmp_path.rglob("sprung"))
    assert {k: v for k, v in contents(home).items() if "__pycache__" not in k} == before
    (home / "evil.yaml").write_text(f"{name}: !!python/object/apply:os.system ['touch sprung']\n")
    words = ["bash", str(home / "run_all.sh"), "-f", str(home / "evil.yaml")]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "could not determine a constructor" in done.stderr
    assert not list(tmp_path.rglob("sprung"))


class Live(HTMLParser):
    """What of a page would run: scripts outside those of the template, handlers, javascript: addresses."""

    def __init__(self):
        super().__init__()
        self.found, self.cells = [], 0

    def handle_starttag(self, tag, attributes):
        self.cells += tag == "td"
        for name, value in attributes:
            if name.startswith("on") or re.match(r"\s*javascript:", value or "", re.I):
                self.found.append((tag, name, value))
        if tag in ("img", "iframe", "object", "embed", "form"):
            self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.lasttag == "script" and data.strip().startswith("alert"):
            self.found.append(("script", data))


def live(html):
    page = Live()
    page.feed(html)
    return page


def test_names_are_no_markup_in_the_html_copies(shown):
    page = (shown[0] / "results/default/notebooks/01_show.html").read_text("utf-8")
    seen = live(page)
    assert seen.found == [] and seen.cells >= 8, "tables are still tables"
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 5, "the names are shown as they read"


def test_that_page_would_be_alive_without_the_care(shown):
    from nbconvert import HTMLExporter

    html, _ = HTMLExporter().from_filename(str(shown[0] / "results/default/notebooks/01_show.ipynb"))
    assert {"script", "img", "a", "b"} <= {found[0] for found in live(html).found}


def test_kernels_listen_on_the_loopback_alone(shown):
    assert json.loads((shown[0] / "results/default/sockets.json").read_text()) == ["127.0.0.1"]


def test_the_kernels_key_lies_in_the_runs_folder_and_is_the_users_alone(shown):
    """A temporary file elsewhere would stay there whenever a run is killed."""
    file, mode = json.loads((shown[0] / "results/default/connection.json").read_text())
    assert Path(file).is_relative_to(shown[0] / "results") and not Path(file).exists() and mode & 0o077 == 0


@pytest.mark.parametrize("stem", ["01_dataset_synthesis", "02_gradcam"])
def test_notebooks_that_show_names_escape_them(repo, stem):
    """In JupyterLab a notebook's own outputs are trusted, so names have to be escaped before they are shown."""
    source = python_sources(repo)[f"{stem}.ipynb"]
    assert "from html import escape" in source
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".style.format"):
            text, given = ast.unparse(node), {k.arg for k in node.keywords}
            assert "escape" in given or not re.search(r"label|predicted|target|'id'", text), text
