"""What settings there are, what each may be, and who reads it: params/default.yaml, read and
applied.

A wrong name or value is a ValueError that says what is allowed. `runner.parameters` turns words of
the command line into values and calls the same functions.
"""

from __future__ import annotations

import functools
import json
import os
import re
from numbers import Integral, Real
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


def read_by(name: str) -> str:
    """Who reads a setting, in words: "02, 04, explain"."""
    readers = [f"{k:02d}" if type(k) is int else k for k in declared()[name]["notebooks"]]
    return ", ".join(readers) or "the runner"


def defaults(notebook: int | str) -> dict:
    """{name: default} of the settings that a notebook, 1 to 5, or "explain" reads."""
    return {
        name: entry["default"]
        for name, entry in declared().items()
        if notebook in entry["notebooks"]
    }


def check(name: str, value):
    """The value of a setting, as `meant` reads it. ValueError for an unknown name or a value not
    allowed.
    """
    if name not in declared():
        raise ValueError(f"there is no setting {name!r}. {nearest(name, list(declared()))}")
    entry = declared()[name]
    read = meant(name, value)
    if type(read) not in TYPES[entry["type"]] or not _allowed(entry, read):
        items = value if isinstance(value, list) else [value]
        hint = ""
        if entry["type"] == "text" and any(isinstance(item, bool) for item in items):
            hint = " YAML takes yes and no for true and false: put them into quotes."
        raise ValueError(f"{name} cannot be {value!r}. Allowed: {allowed(name)}.{hint}")
    return read


def meant(name: str, value):
    """The one meaning of a value, however it is written, as the setting's type: 5 for "5" and 5.0,
    "a,b" for [a, b] and "a, b", "cpu" for "CPU". What has no such meaning comes back as it is, for
    `check` to refuse.
    """
    entry = declared()[name]
    text = _text(value)
    if entry["type"] == "true or false":
        return {"true": True, "false": False}.get(text.lower(), value) if text else value
    number = float(text) if re.fullmatch(NUMBER, text or "", re.IGNORECASE) else None
    if entry["type"] == "whole number":
        if re.fullmatch(r"[+-]?\d+", text or ""):
            return int(text)
        return int(number) if number is not None and number % 1 == 0 else value
    if entry["type"] == "number or text" and number is not None:
        return number
    if "several" in entry or "list" in entry:
        text = _joined(value, blanks="several" in entry)
    if text is None:
        return value
    return _as_known(entry, text)


NUMBER = r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?"


def _text(value) -> str | None:
    """A text, path or number as text; None for anything else. True and false have none where YAML
    made them of `yes` and `no`, which a class may be called.
    """
    if isinstance(value, str | os.PathLike):
        return os.fspath(value).strip()
    if isinstance(value, Integral) and not isinstance(value, bool):
        return str(int(value))
    if isinstance(value, Real) and not isinstance(value, bool):
        return str(int(value)) if value % 1 == 0 else repr(float(value))
    return None


def _joined(value, blanks: bool) -> str | None:
    """A list, or a text of several words, as "a,b"; None where an item is no text. blanks: blanks
    separate words as well.
    """
    if isinstance(value, list | tuple):
        items = [_text(item) for item in value]
        return ",".join(items) if all(item and "," not in item for item in items) else None
    text = _text(value)
    if text is None:
        return None
    bracketed = text.startswith("[") and text.endswith("]")
    text = text[1:-1] if bracketed else text
    parts = re.split(r"[,;\s]+", text) if blanks else words(text)
    return ",".join(part.strip("'\" ") if bracketed else part for part in parts if part)


def _as_known(entry: dict, text: str) -> str:
    """A text in the capitals of the words that are allowed, where it is one of these and cannot be
    a folder or a map of colours, whose capitals count.
    """
    choices = [] if "path" in entry or entry.get("words") == "colormaps" else entry.get("words", [])
    known = {word.lower(): word for word in [*choices, *entry.get("several", [])]}
    text = ",".join(known.get(word.lower(), word) for word in text.split(","))
    pattern = entry.get("pattern", "(?!)")
    if not re.fullmatch(pattern, text) and re.fullmatch(pattern, text.lower()):
        return text.lower()
    return text


def allowed(name: str) -> str:
    """What a setting may be, in words."""
    entry = declared()[name]
    if "allowed" in entry:
        return entry["allowed"]
    if "several" in entry:
        return f"one or more of {', '.join(entry['several'])}, joined by commas or as a list"
    if "list" in entry:
        return 'names or numbers, "a,b,c" or a list [a, b, c]'
    choices = list(entry.get("words", []))
    if entry.get("path") == "folder":
        return f"{', '.join(choices)}, or an existing folder"
    if "most" in entry:
        return " or ".join([*choices, f"a number from {entry['least']} to {entry['most']}"])
    if "least" in entry:
        return f"a {entry['type']}, {entry['least']} or more"
    if not choices and entry["type"] == "text":
        return "one text"
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
