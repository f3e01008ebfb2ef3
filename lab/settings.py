"""What settings there are, what each may be, and who reads it: params/default.yaml, read and
applied.

A wrong name or value is a ValueError that says what is allowed. `runner.parameters` turns words of
the command line into values and calls the same functions.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import yaml  # params/*.yaml

from lab import HOME, nearest, words

TYPES = {  # what a type is called in default.yaml, and what that is in Python
    "text": (str,),
    "true or false": (bool,),
    "whole number": (int,),
    "number or text": (float, str),
}


@functools.cache
def declared() -> dict[str, dict]:
    """{name: {default, type, about, notebooks, and what limits it}} of every setting, in the file's
    order.
    """
    return yaml.safe_load((HOME / "params" / "default.yaml").read_text("utf-8"))


def defaults(notebook: int) -> dict:
    """{name: default} of the settings that a notebook, 1 to 5, reads."""
    return {
        name: entry["default"]
        for name, entry in declared().items()
        if notebook in entry["notebooks"]
    }


def check(name: str, value):
    """The value of a setting, a number as its declared type. ValueError for an unknown name or a
    value not allowed.
    """
    if name not in declared():
        raise ValueError(f"there is no setting {name!r}. {nearest(name, list(declared()))}")
    entry = declared()[name]
    types = TYPES[entry["type"]]
    if type(value) is int and float in types:
        value = float(value)
    if type(value) not in types or not _allowed(entry, value):
        raise ValueError(f"{name} cannot be {value!r}. Allowed: {allowed(name)}.")
    return value


def allowed(name: str) -> str:
    """What a setting may be, in words."""
    entry = declared()[name]
    if "allowed" in entry:
        return entry["allowed"]
    if "several" in entry:
        return f"one or more of {', '.join(entry['several'])}, joined by commas"
    choices = list(entry.get("words", []))
    if entry.get("path") == "folder":
        return f"{', '.join(choices)}, or an existing folder"
    if "most" in entry:
        return " or ".join([*choices, f"a number from {entry['least']} to {entry['most']}"])
    if "least" in entry:
        return f"a {entry['type']}, {entry['least']} or more"
    return " or ".join(choices) if choices else entry["type"]


def _allowed(entry: dict, value) -> bool:
    if isinstance(value, int | float):
        return entry.get("least", value) <= value <= entry.get("most", value)
    limits = {"words", "several", "pattern", "path"} & entry.keys()
    choices = entry.get("words", [])
    if choices == "colormaps":
        import matplotlib

        choices = list(matplotlib.colormaps)
    return (
        not limits
        or value in choices
        or (
            "several" in entry and bool(words(value)) and set(words(value)) <= set(entry["several"])
        )
        or ("pattern" in entry and re.fullmatch(entry["pattern"], value) is not None)
        or ("path" in entry and _exists(entry["path"], value))
    )


def _exists(kind: str | list[str], value: str) -> bool:
    """Whether a path that a setting names is there, seen from the repository or absolute."""
    if kind == "FILE.py:name":
        file, _, name = value.rpartition(":")
        return (
            name.isidentifier()
            and file.endswith(".py")
            and (HOME / Path(file).expanduser()).is_file()
        )
    path = HOME / Path(value).expanduser()
    return path.is_dir() if kind == "folder" else path.suffix in kind and path.is_file()


def as_word(value) -> str:
    """A value as it is written on the command line and in YAML."""
    return value if isinstance(value, str) else json.dumps(value)
