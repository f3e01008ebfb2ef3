"""What the notebooks and the repository promise in form: everything here is read, nothing is run."""

import ast
import json
import re
import shutil
import subprocess

import pytest

import parameters
import pipeline

STEMS = ["01_dataset_synthesis", "02_gradcam", "03_layercam", "04_hybrid_fusion", "05_evaluation"]
PARAMETER = re.compile(r"[a-z_]+: (str|int|float|bool|None)( \| (str|int|float|bool|None))* = [^#]+  +# \S.*")


def cells_of(stem):
    return parameters.read_cells(pipeline.ROOT / "notebooks" / f"{stem}.ipynb")


def code_of(stem):
    return [cell["source"] for cell in cells_of(stem) if cell["cell_type"] == "code"]


def prose_of(stem):
    return [cell["source"] for cell in cells_of(stem) if cell["cell_type"] == "markdown"]


def is_tagged(cell):
    return "parameters" in cell["metadata"].get("tags", [])


def test_the_five_notebooks_are_there():
    assert sorted(path.stem for path in (pipeline.ROOT / "notebooks").glob("*.ipynb")) == STEMS


@pytest.mark.parametrize("stem", STEMS)
def test_sources_carry_no_outputs(stem):
    for number, cell in enumerate(cells_of(stem)):
        assert not cell.get("outputs") and cell.get("execution_count") is None, (
            f"cell {number}: strip it with nbstripout"
        )


@pytest.mark.parametrize("stem", STEMS)
def test_the_first_cell_tells_question_reads_writes_and_time(stem):
    first = cells_of(stem)[0]
    assert first["cell_type"] == "markdown" and "?" in first["source"]
    table = " ".join(line.lower() for line in first["source"].splitlines() if line.startswith("|"))
    assert all(word in table for word in ("reads", "writes", "time", "parameters"))


@pytest.mark.parametrize("stem", STEMS)
def test_the_second_cell_is_the_only_parameters_cell_and_holds_annotated_literals_with_comments(stem):
    cells = cells_of(stem)
    assert [number for number, cell in enumerate(cells) if is_tagged(cell)] == [1]
    for line in cells[1]["source"].splitlines():
        assert PARAMETER.fullmatch(line), line
    assert {"root", "results_dir"} <= set(parameters.declared(pipeline.ROOT / "notebooks" / f"{stem}.ipynb"))


def test_one_name_has_one_type_and_one_default_everywhere():
    found = {}
    for stem in STEMS:
        for name, declaration in parameters.declared(pipeline.ROOT / "notebooks" / f"{stem}.ipynb").items():
            first, where = found.setdefault(name, (declaration, stem))
            assert declaration == first, f"{name} differs between {where} and {stem}"


@pytest.mark.parametrize("stem", STEMS)
def test_the_defaults_are_allowed(stem):
    for name, (types, default) in parameters.declared(pipeline.ROOT / "notebooks" / f"{stem}.ipynb").items():
        assert parameters.parse(name, types, default, stem) == default


@pytest.mark.parametrize("path", sorted((pipeline.ROOT / "params").glob("*.yaml")), ids=lambda path: path.name)
def test_the_parameter_files_are_allowed_and_name_their_own_results_folder(path):
    class Arguments:
        f, p = str(path), []

    specs = {stem: parameters.declared(pipeline.ROOT / "notebooks" / f"{stem}.ipynb") for stem in STEMS}
    given = parameters.read_given(Arguments)
    parameters.settle(given, specs, STEMS)
    assert given["results_dir"][0] == f"results/{path.stem}"


def test_the_second_code_cell_is_the_same_in_every_notebook():
    assert len({code_of(stem)[1] for stem in STEMS}) == 1
    assert "cam_core.py" in code_of(STEMS[0])[1]


@pytest.mark.parametrize("stem", STEMS)
def test_cells_are_short_and_every_idea_has_its_words_first(stem):
    cells = cells_of(stem)
    code = [number for number, cell in enumerate(cells) if cell["cell_type"] == "code"]
    long = [
        number for number in code if len(cells[number]["source"].splitlines()) > 25 and not is_tagged(cells[number])
    ]
    assert not long, "cells of over 25 lines (the parameters, a line each, may be more)"
    assert not [number for number in code[2:] if cells[number - 1]["cell_type"] == "code"], "cells without words before"


@pytest.mark.parametrize("stem", STEMS)
def test_at_least_four_words_of_prose_for_a_line_of_code(stem):
    words = sum(len(text.split()) for text in prose_of(stem))
    lines = sum(len(text.splitlines()) for text in code_of(stem))
    assert words >= 4 * lines, f"{words} words for {lines} lines"


@pytest.mark.parametrize("stem", STEMS)
def test_it_ends_with_what_we_saw_and_next(stem):
    headings = re.findall(r"^#+ .*", "\n".join(prose_of(stem)), re.M)
    assert [heading.strip("# ") for heading in headings[-2:]] == ["What we saw", "Next"]


def test_no_function_is_defined_in_two_places():
    found = {}
    for stem in STEMS:
        for source in code_of(stem):
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    assert found.setdefault(node.name, stem) == stem, f"{node.name}: {found[node.name]} and {stem}"
    modules = [ast.parse((pipeline.ROOT / name).read_text("utf-8")) for name in ("cam_core.py", "cam_inputs.py")]
    again = {node.name for core in modules for node in core.body if isinstance(node, ast.FunctionDef)} & set(found)
    assert not again, "cam_core has these already"


def tracked(*endings):
    """The files that are or would be committed; all files where this is no git repository."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=pipeline.ROOT, capture_output=True, text=True) if shutil.which("git") else None
    if listed and listed.returncode == 0:
        paths = [pipeline.ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        paths = [path for path in pipeline.ROOT.rglob("*") if not {".venv", ".git", "results"} & set(path.parts)]
    return [path for path in paths if path.name.endswith(endings) and path.is_file()]


def test_nothing_hides_warnings_figures_or_unsafe_loading():
    never = re.compile(
        r"MPLBACKEND|filterwarnings\(.ignore|weights_only=False|allow_pickle=True|\bif (TEST|SMOKE|QUICK)\b"
    )
    for path in tracked(".py", ".sh", ".ipynb", ".toml", ".yaml", "run"):
        if "tests" not in path.parts:
            assert not never.search(path.read_text("utf-8")), f"{path}: {never.search(path.read_text('utf-8'))[0]}"


def test_every_picture_and_link_of_the_documents_exists():
    assert (pipeline.ROOT / "README.md").is_file()
    for path in tracked(".md"):
        for link in re.findall(r"\]\(([^)#\s]+)|<img[^>]*src=\"([^\"]+)\"", path.read_text("utf-8")):
            link = "".join(link)
            if not re.match(r"\w+:", link):
                assert (path.parent / link).exists(), f"{path.name}: {link}"


@pytest.mark.parametrize("name", ["pipeline.py", "parameters.py", "check.py"])
def test_the_runner_stays_small(name):
    assert len((pipeline.ROOT / name).read_text("utf-8").splitlines()) <= 300


def test_notebooks_are_valid_and_name_the_kernel():
    import nbformat

    for stem in STEMS:
        book = json.loads((pipeline.ROOT / "notebooks" / f"{stem}.ipynb").read_text("utf-8"))
        nbformat.validate(book)
        assert book["metadata"]["kernelspec"]["name"] == "python3"
