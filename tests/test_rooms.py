"""The house: imports run downward only, and a notebook is a source without outputs."""

import ast
import json
import re

import nbformat
import pytest

ROOMS = ("lab", "cam_core", "notebooks", "runner")  # from the ground up
# What a room may import of ours.
BELOW = {
    "lab": {"lab"},
    "cam_core": {"lab"},
    "notebooks": {"cam_core"},
    "runner": {"lab", "cam_core", "runner"},
}


def sources(repo, room):
    """{file name: source} of a room."""
    if room == "cam_core":
        return {"cam_core.py": (repo / "cam_core.py").read_text("utf-8")}
    if room == "notebooks":
        found = {}
        for path in (repo / "notebooks").glob("*.ipynb"):
            cells = json.loads(path.read_text("utf-8"))["cells"]
            code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
            found[path.name] = "\n\n".join(code)
        return found
    return {path.name: path.read_text("utf-8") for path in (repo / room).glob("*.py")}


def imported(source):
    """The first parts of the names of all imports, those inside of functions included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_downward_only(repo, room):
    for name, source in sources(repo, room).items():
        ours = set(imported(source)) & {*ROOMS, "tests"}
        assert ours <= BELOW[room], f"{name} imports {ours - BELOW[room]}"


def test_no_list_of_re_exported_names(repo):
    for room in ROOMS:
        for name, source in sources(repo, room).items():
            assert "noqa" not in source and "__all__" not in source, name


def test_notebooks_are_sources(repo):
    """Valid, for the kernel python3, with one cell of parameters, no outputs and no counts."""
    paths = sorted((repo / "notebooks").glob("*.ipynb"))
    assert [path.name[:2] for path in paths] == ["01", "02", "03", "04", "05"]
    for path in paths:
        book = json.loads(path.read_text("utf-8"))
        nbformat.validate(book)
        assert book["metadata"]["kernelspec"]["name"] == "python3", path.name
        code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
        tagged = [
            k for k, cell in enumerate(code) if "parameters" in cell["metadata"].get("tags", [])
        ]
        assert tagged == [0], f"{path.name}: the first code cell is the parameters cell"
        found = re.search(r'sys.path\[:0\] = \["(.+)", "(.+)"\]', "".join(code[1]["source"]))
        assert set(found.groups()) == {".", ".."}, f"{path.name}: it starts from both places"
        run = [cell for cell in code if cell["outputs"] or cell["execution_count"] is not None]
        assert not run, f"{path.name}: strip it with nbstripout"


def test_no_function_of_a_room_hides_another_of_the_same_name(repo):
    for room in ("lab", "cam_core", "runner"):
        for file, source in sources(repo, room).items():
            names = [node.name for node in ast.parse(source).body if hasattr(node, "name")]
            assert len(names) == len(set(names)), file
