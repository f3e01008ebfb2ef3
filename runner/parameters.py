"""What the user asked for: words of the command line and lines of a YAML file as checked values,
for each notebook.

params/default.yaml says which settings there are, what each may be and which notebooks read it;
`lab.settings` holds values to that. What is wrong ends the run before its first notebook, with exit
code 2 and a line that says what is allowed. `python -m runner.parameters` writes docs/parameters.md
from the same file.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import yaml

from lab import HOME, settings

PAGE = HOME / "docs" / "parameters.md"
WHERE_IT_RUNS = {"results_dir", "scheduler"}  # the runner's own: no part of what is computed


@dataclass(frozen=True)
class Given:
    """A value that the user gave, and where: "-p" or "-f FILE"."""

    value: object
    source: str


def refuse(message: str) -> NoReturn:
    """End the run before its first notebook."""
    print(f"run_all.sh: {message}", file=sys.stderr)
    raise SystemExit(2)


# ---- notebooks


def read_cells(path: Path) -> list[dict]:
    """The cells of a notebook, each with its source as one text."""
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in cells]


def declared_in(path: Path) -> dict[str, object]:
    """{name: default} of the parameters that a notebook's first code cell declares, `settings` left
    out.

    ValueError if there is not exactly one cell tagged "parameters", or a line of it is not `name:
    type = literal`.
    """
    tagged = [cell for cell in read_cells(path) if "parameters" in cell["metadata"].get("tags", [])]
    if len(tagged) != 1:
        raise ValueError(
            f"{path.name}: {len(tagged)} cells are tagged 'parameters', there must be exactly one."
        )
    found = {}
    for line in ast.parse(tagged[0]["source"]).body:
        if not isinstance(line, ast.AnnAssign) or line.value is None:
            raise ValueError(
                f"{path.name}: not of the form `name: type = literal`: {ast.unparse(line)}"
            )
        found[line.target.id] = ast.literal_eval(line.value)
    if found.pop("settings", None) != {}:
        raise ValueError(f"{path.name}: the parameters cell must end in `settings: dict = {{}}`.")
    return found


def number_of(stem: str) -> int | str:
    """The number of a notebook: 5 of "05_evaluation"; "explain", which is none, is its own."""
    return int(stem[:2]) if stem[:2].isdigit() else stem


# ---- words into values


def located(path: str) -> str:
    """An existing path made absolute: seen from where the user stands, then from the repository."""
    for base in (Path.cwd(), HOME):
        place = base / Path(path).expanduser()
        if place.exists():
            return str(place.resolve())
    return path


def _with_place(entry: Mapping, text: str) -> str:
    """The text of a setting, made an absolute path where it names a file or a folder."""
    named = text in entry.get("words", []) or re.fullmatch(entry.get("pattern", "(?!)"), text)
    if "path" not in entry or named:
        return text
    if entry["path"] == "FILE.py:name":
        file, colon, name = text.rpartition(":")
        return located(file) + colon + name
    return located(text)


def value_of(name: str, given: Given):
    """What the user gave for a setting, of the type that params/default.yaml names; ends the run if
    not allowed.
    """
    try:
        value = given.value
        if name in settings.declared():
            value = settings.meant(name, value)
            if isinstance(value, str):
                value = _with_place(settings.declared()[name], value)
        return settings.check(name, value)
    except ValueError as error:
        refuse(f"{given.source}: {error}")


def command_line(command: str, about: str, folder: str) -> argparse.ArgumentParser:
    """The options that both commands have: -p, -f and --results-dir, which is a -p too. about: the
    help text; folder: where the results go without it.
    """
    parser = argparse.ArgumentParser(
        command,
        description=about,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    pairs = {"dest": "p", "action": "append", "default": []}
    name_value = ("NAME", "VALUE")
    parser.add_argument(
        "-p", **pairs, nargs=2, metavar=name_value, help="a setting (docs/parameters.md)"
    )
    parser.add_argument("-f", metavar="FILE", help="a YAML file of settings; -p wins over it")
    parser.add_argument(
        "--results-dir",
        **pairs,
        type=lambda word: ("results_dir", word),
        metavar="DIR",
        help=f"where the results go ({folder}), as -p results_dir DIR",
    )
    return parser


def read_given(file: str | None, pairs: Sequence[tuple[str, str]]) -> dict[str, Given]:
    """{name: what was given}: the lines of a YAML file, and over them the pairs of the command
    line.
    """
    content = {}
    if file is not None:
        try:
            content = yaml.safe_load(Path(located(file)).read_text("utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            refuse(f"-f {file}: {error}")
    if not isinstance(content, dict):
        refuse(f"-f {file}: a parameter file holds lines of the form `name: value`.")
    found = {str(name): Given(value, f"-f {file}") for name, value in content.items()}
    return found | {name: Given(word, "-p") for name, word in pairs}


# ---- what each notebook gets


def readers(name: str) -> list[int | str]:
    """The numbers of the notebooks that a setting has an effect on, and "explain". A cluster
    measures for 05.
    """
    return [5] if name == "scheduler" else settings.declared()[name]["notebooks"]


def check_given(given: Mapping[str, Given], chosen: Sequence[str]) -> dict[str, object]:
    """{name: value} of all that was given; ends the run for an unknown name, a value that is not
    allowed, and a name of the command line that none of the chosen notebooks reads.
    """
    numbers = {number_of(stem) for stem in chosen}
    for name, about in given.items():
        known = name in settings.declared()
        if known and about.source == "-p" and not numbers & set(readers(name)):
            refuse(
                f"-p: {name} would have no effect, none of these reads it: {', '.join(chosen)}. "
                "docs/parameters.md says who reads what."
            )
    return {name: value_of(name, about) for name, about in given.items()}


def parameters_of(stem: str, values: Mapping[str, object]) -> dict[str, object]:
    """{name: value} of every setting that a notebook reads, as given or by default; where it writes
    is left out.
    """
    defaults = settings.defaults(number_of(stem))
    return {
        name: values.get(name, default)
        for name, default in defaults.items()
        if name not in WHERE_IT_RUNS
    }


def given_to(stem: str, values: Mapping[str, object], results_dir: Path) -> dict[str, object]:
    """{name: value} of what was given and a notebook reads, and the folder that it writes into."""
    read = settings.defaults(number_of(stem))
    return {name: value for name, value in values.items() if name in read} | {
        "results_dir": str(results_dir)
    }


def for_papermill(path: Path, values: Mapping[str, object], results_dir: Path) -> dict[str, object]:
    """What a notebook is started with: of what was given, all that it reads. Names that its
    parameters cell does not declare go into its `settings`.
    """
    own = given_to(path.stem, values, results_dir)
    declared = declared_in(path)
    rest = {name: value for name, value in own.items() if name not in declared}
    return {name: value for name, value in own.items() if name in declared} | {"settings": rest}


# ---- docs/parameters.md


HEAD = """# Parameters

Made from [params/default.yaml](../params/default.yaml) by `python -m runner.parameters`.
Change that file, not this one.

`./run_all.sh -p NAME VALUE` sets one of them. `-f params/FILE.yaml` sets several, as lines of the
form `NAME: VALUE`; `-p` wins over it. In a notebook, change the first cell. The names that it does
not show go into its `settings`, as in `settings = {"batch_size": 4}`. On the command line, files
and folders are looked for where you stand, then in the repository; in a notebook, in the
repository.
"""


def page() -> str:
    """docs/parameters.md: a table for each section of params/default.yaml."""
    lines = [HEAD]
    for line in (HOME / "params" / "default.yaml").read_text("utf-8").splitlines():
        if line.startswith("# ---- "):
            title = line.removeprefix("# ---- ").capitalize()
            lines.append(f"\n## {title}\n\n")
            lines.append(
                "| name | default | allowed | what it is | read by |\n|---|---|---|---|---|\n"
            )
        elif re.match(r"\w+:", line):
            lines.append(_row(line.partition(":")[0]))
    return "".join(lines)


def _row(name: str) -> str:
    """The line of a setting in its table."""
    entry = settings.declared()[name]
    default = settings.as_word(entry["default"])
    cells = [
        f"`{name}`",
        f"`{default}`" if default else "nothing",
        settings.allowed(name),
        entry["about"],
        settings.read_by(name),
    ]
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
    print(PAGE)
