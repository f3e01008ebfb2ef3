"""The functions that a notebook defines, for tests: every cell tagged `define` is executed, nothing else."""

import linecache
from pathlib import Path

import nbformat

import cam_core as cc

NOTEBOOKS = Path(cc.__file__).resolve().parent / "notebooks"


def definitions(name, **given):
    """What the `define` cells of notebooks/<name>.ipynb define, with `cc` and whatever else is given as globals."""
    names = {"__name__": name, "cc": cc, **given}
    for number, cell in enumerate(nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4).cells):
        if cell.cell_type == "code" and "define" in cell.metadata.get("tags", []):
            file = f"<{name}, cell {number}>"
            linecache.cache[file] = (len(cell.source), None, cell.source.splitlines(True), file)  # for tracebacks
            exec(compile(cell.source, file, "exec"), names)
    return names
