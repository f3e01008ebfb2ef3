"""docs/, CONTRIBUTING.md and CITATION.cff: what they say is true, and what they tell a reader to run runs."""

import ast
import datetime
import difflib
import re
import shlex
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image, ImageDraw

import cam_core as cc
import parameters
import pipeline

SMALL = {"n_images": 2, "n_extra": 1, "steps": 2}  # what the test adds to the page's command, to take seconds


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text("utf-8"), re.S)


# ---------------------------------------------------------------------------------------------------- docs/own_model.md


@pytest.fixture(scope="module")
def own(repo, tmp_path_factory):
    """A folder as the page describes it, with a few small pictures; and the page's blocks of Python and of commands."""
    folder, rng = tmp_path_factory.mktemp("own"), np.random.default_rng(0)
    for label, colour in {"crack": "black", "dent": "red", "scratch": "white"}.items():
        (folder / "photos" / label).mkdir(parents=True)
        picture = Image.fromarray(rng.integers(90, 140, (70, 90, 3), dtype=np.uint8))
        ImageDraw.Draw(picture).ellipse([20, 20, 45, 40], fill=colour)
        picture.save(folder / "photos" / label / "0.png")
    page = repo / "docs" / "own_model.md"
    python, commands = blocks(page, "python"), [c for b in blocks(page, "bash") for c in b.splitlines()]
    (folder / "my_net.py").write_text(python[0], "utf-8")
    return folder, python[1:], commands


@pytest.fixture
def there(own, monkeypatch):
    """Inside that folder, and what the page registers is gone afterwards."""
    monkeypatch.chdir(own[0])
    monkeypatch.syspath_prepend(str(own[0]))
    monkeypatch.setattr(cc, "CAMS", dict(cc.CAMS))
    yield own[0]
    sys.modules.pop("my_net", None)


def words_of(command):
    program, *words = shlex.split(command)
    assert program == "./run_all.sh"
    return words


def test_the_pages_python_runs_and_the_command_puts_the_own_cam_into_the_tables(own, there, capsys):
    _, (saving, one_image), commands = own
    exec(saving, {})
    exec(one_image, {})
    said = capsys.readouterr().out.split()
    assert said[0] in ("crack", "dent", "scratch") and said[2] == "deep"
    words = words_of(commands[1])
    words[words.index("--results-dir") + 1] = str(there / "out")
    words += [word for item in {**SMALL, "data_dir": there / "data"}.items() for word in ("-p", *map(str, item))]
    done = subprocess.run([sys.executable, str(pipeline.ROOT / "pipeline.py"), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    tables = {"metrics.csv", "summary.csv", "cost.csv"}
    tables |= {f"tables/05_{name}.csv" for name in ("means", "class_sensitivity", "randomisation")}
    missing = [name for name in tables if "my_cam" not in set(pd.read_csv(there / "out" / name)["method"])]
    assert not missing, f"no row of my_cam in {missing}"
    assert (there / "out" / "figures" / "05_methods.png").is_file()


def test_the_pages_commands_are_allowed(own, there):
    exec(own[1][0], {})
    notebooks = {path.stem: path for path in sorted((pipeline.ROOT / "notebooks").glob("*.ipynb"))}
    specs = {stem: parameters.declared(path) for stem, path in notebooks.items()}
    for command in own[2]:
        words = words_of(command)
        pairs = [(words[k + 1], words[k + 2]) for k, word in enumerate(words) if word == "-p"]
        arguments = type("Arguments", (), {"f": None, "p": pairs})
        parameters.settle(parameters.read_given(arguments), specs, list(specs))
        assert {name for name, _ in pairs} >= {"dataset", "arch", "weights"}


def test_another_cam_in_the_file_is_another_run_and_another_cache_key(own, there):
    exec(own[1][0], {})
    values = {"05": {"arch": f"{there / 'my_net.py'}:MyNet"}}

    def told():
        return pipeline.run_id(values, {}), cc.load_model(values["05"]["arch"], "my_net.pth")[1]["sha256"]

    source, before = (there / "my_net.py").read_text("utf-8"), told()
    assert told() == before
    (there / "my_net.py").write_text(source.replace(".abs()", ".relu()"), "utf-8")
    assert all(new != old for new, old in zip(told(), before, strict=True))
    (there / "my_net.py").write_text(source, "utf-8")


# ---------------------------------------------------------------------------------------------- docs/troubleshooting.md


def messages(repo):
    """Every text in the sources, with … for each value that is put into it."""
    sources = [(repo / name).read_text("utf-8") for name in ("pipeline.py", "parameters.py", "check.py")]
    sources += [path.read_text("utf-8") for path in repo.glob("cam_*.py")]
    for path in sorted((repo / "notebooks").glob("*.ipynb")):
        sources += [cell["source"] for cell in parameters.read_cells(path) if cell["cell_type"] == "code"]
    found = [re.sub(r"\$\(.*?\)|\$\{?\w+\}?", "…", (repo / ".ci" / "setup.sh").read_text("utf-8"))]
    for node in (node for source in sources for node in ast.walk(ast.parse(source))):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def headings(repo):
    text = (repo / "docs" / "troubleshooting.md").read_text("utf-8")
    return re.findall(r"^## (.+)$", text, re.M)


def stale(headings, texts):
    """The headings that no text has, each with the nearest text."""
    gone = [heading for heading in headings if not any(heading in text for text in texts)]
    return {heading: difflib.get_close_matches(heading, texts, 1, 0.3) for heading in gone}


def test_every_heading_of_the_troubleshooting_is_a_message_of_the_sources(repo):
    listed = headings(repo)
    assert len(listed) >= 20 and len(set(listed)) == len(listed)
    assert all(len(re.findall(r"[A-Za-z]{2,}", heading)) >= 2 for heading in listed)
    assert stale(listed, messages(repo)) == {}, "headings of docs/troubleshooting.md whose message has changed"


def test_a_changed_message_is_noticed(repo):
    texts = messages(repo)
    assert stale(["arch=… is neither a torchvision classifier, nor FILE.py:name."], texts)
    assert not stale(["arch=… is neither a torchvision classifier nor FILE.py:name."], texts)


# --------------------------------------------------------------------------------------------------- docs/checklist.md


def places(text):
    """Paths of the repository that a page names in backticks: `cam_core.py`, `results/reference/`, `tests/x.py::y`."""
    found = re.findall(r"`([^`\n]+)`", text)
    return [word for word in found if re.fullmatch(r"[\w.-]+(/[\w.-]*)+(::\w+)?|[\w-]+\.(py|sh|md|txt|toml|cff)", word)]


@pytest.mark.parametrize("name", ["docs/checklist.md", "CONTRIBUTING.md"])
def test_paths_and_tests_that_are_named_exist(repo, name):
    named = [word for word in places((repo / name).read_text("utf-8")) if "NAME" not in word]
    assert len(named) >= 5
    for word in named:
        path, _, test = word.partition("::")
        assert (repo / path).exists(), f"{name}: there is no {path}"
        assert f"def {test}(" in (repo / path).read_text("utf-8") if test else True, f"{name}: {path} has no {test}"


def test_the_checklist_has_all_points_and_says_for_each_whether_it_is_met(repo):
    text = (repo / "docs" / "checklist.md").read_text("utf-8")
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if line[:2] == "| "]
    verdicts = {row[0]: row[1] for row in rows if len(row) == 3 and re.match(r"\d|[A-E] ", row[0])}
    assert [key[0] for key in verdicts if key[0].isalpha()] == list("ABCDE")
    assert [int(key.split()[0]) for key in verdicts if key[0].isdigit()] == list(range(1, 11))
    assert set(verdicts.values()) <= {"yes", "in part", "no"}


# --------------------------------------------------------------------------------------------------------- CITATION.cff

# Of the Citation File Format 1.2.0: what has to be there, and the keys and types that occur here.
PERSON, ENTITY = {"family-names", "given-names", "orcid", "affiliation", "email"}, {"name", "website"}
TOP = {"cff-version", "message", "title", "authors", "type", "license", "date-released", "references", "version", "doi"}
TOP |= {"abstract", "keywords", "repository-code", "url", "preferred-citation", "commit", "identifiers"}
REFERENCE = {"type", "title", "authors", "year", "journal", "volume", "issue", "pages", "doi", "url", "notes"}
REFERENCE |= {"collection-title", "conference", "publisher", "repository-code"}
REFERENCE_TYPES = {"article", "book", "conference-paper", "data", "report", "software", "software-code", "thesis"}


def faults_of_citation(content):
    """What is wrong with a citation file, in words."""
    found = [f"no {key}" for key in ("cff-version", "message", "title", "authors") if not content.get(key)]
    found += [f"unknown key {key}" for key in set(content) - TOP]
    found += [] if content.get("cff-version") == "1.2.0" else ["cff-version is not 1.2.0"]
    found += [] if content.get("type", "software") in ("software", "dataset") else ["type"]
    try:
        datetime.date.fromisoformat(str(content.get("date-released", "2000-01-01")))
    except ValueError:
        found.append("date-released is no date")
    for entry in content.get("references", []):
        found += [f"reference without {key}" for key in ("type", "title", "authors") if not entry.get(key)]
        found += [f"unknown key {key} in a reference" for key in set(entry) - REFERENCE]
        found += [] if entry.get("type") in REFERENCE_TYPES else [f"type {entry.get('type')} of a reference"]
        found += [] if isinstance(entry.get("year", 0), int) else ["year is no number"]
    for author in [a for entry in (content, *content.get("references", [])) for a in entry.get("authors") or ()]:
        person = "family-names" in author and set(author) <= PERSON
        found += [] if person or ("name" in author and set(author) <= ENTITY) else [f"author {author}"]
    return found


def test_the_citation_file_is_valid_and_agrees_with_the_licence(repo):
    content = yaml.safe_load((repo / "CITATION.cff").read_text("utf-8"))
    assert faults_of_citation(content) == []
    assert (repo / "LICENSE").read_text("utf-8").startswith(f"{content['license']} License")
    readme = (repo / "README.md").read_text("utf-8")
    assert content["title"].split(":")[0] in readme and "CITATION.cff" in readme


@pytest.mark.parametrize(
    "change",
    [{"title": ""}, {"cff-version": 1.2}, {"date-released": "20. 11. 2026"}, {"licence": "MIT"}, {"type": "code"},
     {"authors": [{"nom": "x"}]}, {"references": [{"type": "paper", "title": "x", "authors": [{"name": "x"}]}]}],
)  # fmt: skip
def test_a_wrong_citation_file_is_noticed(repo, change):
    content = yaml.safe_load((repo / "CITATION.cff").read_text("utf-8"))
    assert faults_of_citation({**content, **change})
