"""What the documents tell a reader to run runs, and what they point to is there."""

import re
import shlex
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageDraw

import cam_core as cc
from lab import settings
from runner import parameters, pipeline


def documents(repo):
    return [repo / "README.md", repo / "data/README.md", *sorted((repo / "docs").glob("*.md"))]


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text("utf-8"), re.S)


def test_every_picture_and_link_exists(repo):
    for page in documents(repo):
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text("utf-8")):
            if not re.match(r"\w+:", link):
                assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_every_command_names_parameters_and_files_that_there_are(repo):
    found = []
    for page in documents(repo):
        text = page.read_text("utf-8")
        found += [(page.name, line) for line in re.findall(r"\./run_all\.sh[^`\n]*", text)]
    assert len(found) > 10
    for name, line in found:
        for setting in re.findall(r"-p ([a-z]\w*)", line):
            assert setting in settings.declared(), f"{name}: {line}"
        for file in re.findall(r"-f (params/[a-z]\w*\.yaml)", line):
            assert (repo / file).is_file(), f"{name}: {line}"


# ---- docs/own_model.md


@pytest.fixture
def own(repo, tmp_path, monkeypatch):
    """The page's blocks of Python and its commands, run where its files and a few photographs lie;
    what they register is gone afterwards.
    """
    page = repo / "docs" / "own_model.md"
    python = blocks(page, "python")
    rng = np.random.default_rng(0)
    for label, colour in {"crack": "black", "dent": "red", "scratch": "white"}.items():
        (tmp_path / "photos" / label).mkdir(parents=True)
        picture = Image.fromarray(rng.integers(90, 140, (70, 90, 3), dtype=np.uint8))
        ImageDraw.Draw(picture).ellipse([20, 20, 45, 40], fill=colour)
        picture.save(tmp_path / "photos" / label / "0.png")
    (tmp_path / "my_net.py").write_text(python[0], "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(cc, "CAMS", dict(cc.CAMS))
    exec(python[1], {})
    commands = [line for block in blocks(page, "bash") for line in block.splitlines()]
    yield SimpleNamespace(folder=tmp_path, one_image=python[2], commands=commands)
    sys.modules.pop("my_net", None)


def test_the_python_of_the_page_explains_an_image(own, capsys):
    exec(own.one_image, {})
    label, _, layer = capsys.readouterr().out.split()
    assert label in ("crack", "dent", "scratch") and layer == "deep"


def test_its_command_measures_the_own_network_with_the_own_cam(own):
    given = {}
    for command in own.commands:
        words = shlex.split(command)
        pairs = [(words[k + 1], words[k + 2]) for k, word in enumerate(words) if word == "-p"]
        given = parameters.check_given(parameters.read_given(None, pairs), ["05_evaluation"])
    given |= {"results_dir": str(own.folder / "out"), "data_dir": str(own.folder / "data")}
    study, rows, _ = cc.open_study(cc.runs.open(5, **given, n_images=2, steps=2))
    records = cc.measure(study, rows, 1)
    assert "my_cam" in {record["method"] for record in records} and study.arch == "MyNet"
    assert study.layers["deep"] == "deep"


def test_another_cam_in_the_file_is_another_run_and_another_cache_key(own, monkeypatch):
    file = own.folder / "my_net.py"

    def seen():
        pairs = [("arch", f"{file}:MyNet")]
        args = SimpleNamespace(f=None, p=pairs, only=None, start=None, check=False)
        weights = cc.networks.load(f"{file}:MyNet", "my_net.pth")[1]["sha256"]
        return pipeline.run_id(pipeline.make_plan(args)), weights

    before = seen()
    assert seen() == before
    file.write_text(file.read_text("utf-8").replace(".abs()", ".relu()"), "utf-8")
    assert all(new != old for new, old in zip(seen(), before, strict=True))
