"""Compare the numbers of a run with those of a reference.

`python -m runner.check results/smoke results/reference/smoke` compares two folders.

Every CSV and JSON file of the reference, tables included, is compared value by value, but for
timings (cost*.csv) and the manifest. Texts, whole numbers, flags, and which rows and columns there
are have to be the same; a number with decimals may differ by the tolerance of its kind; intervals,
p-values, effects and shares won count from 10 images on. Rows are found by their texts, so their
order does not matter. Exit codes: 0 they agree, 1 they do not and each place is named, 2 there is
no such run or reference.
"""

import collections
import csv
import json
import math
import re
import sys
from pathlib import Path

# Every reference has these; its further files count where it has them.
NEEDED = {"summary.csv", "fusion.json"}
LEFT_OUT = re.compile(r"cost.*\.csv|manifest\.json")
# Columns that differ from run to run and from machine to machine.
IGNORED = {"run", "device", "dataset_sha256"}
# Numbers that tell which row it is, as texts do.
PLACES = {"alpha", "complexity", "height", "step", "fraction"}
# By how much a number may differ. The first pattern that is found in "metric column" counts; " few"
# follows in a row on fewer than 10 images. The numbers in the comments are the largest changes
# measured: in the smoke run (4 images) between 1 and 2 threads (none at all), batches of 32 and 8,
# AVX-512 and SSE4 instructions (as if on another processor); for 24 images, under noise of 3e-7 per
# value. Where only few images stand behind a row, its statistics are functions with jumps: of four
# differences there are 35 distinct resampled means, and one that moves by 1e-6 past another changed
# an interval's end by 0.14 and a p by 0.5 between two processors, all means being equal to 1e-6.
# There the means are compared, and of the rest that it is there.
TOLERANCES = (
    (r"\S (low|high|p|p_holm|effect|won) few$", math.inf),
    # 5e-5
    (r"\S (low|high)$", 1e-3),
    # 0.0012: a few of the 10,000 sign flips tie; Holm multiplies by up to 4
    (r"\S p(_holm)?$", 0.01),
    # 1e-4
    (r"\S effect$", 1e-3),
    # 0.042, one image of 24 whose difference is close to the 1e-6 that counts
    (r"\S won$|share.*won", 0.05),
    # 0.003: which pixels share a value to the last bit depends on every rounding
    (r"^ties|tied", 0.01),
    # 9e-7, on one image: sums of float32 probabilities or map values
    (r"insertion|deletion|energy|means\.", 3e-5),
    # 2.6e-5, average precision and rank correlation: pixels of nearly equal value change places
    (r"", 2e-4),
)
SHOWN = 20  # of the differences of one file, so many are printed


def manifest_of(folder):
    """The manifest of a folder that a run made; {} for any other."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    except (
        FileNotFoundError,
        NotADirectoryError,
        ValueError,
    ):  # ValueError: the run was killed while it wrote this
        return {}
    return manifest if isinstance(manifest, dict) and {"run", "files"} <= manifest.keys() else {}


def read(path):
    """The rows of a CSV file as {column: word}, and its columns. A JSON file is one row with
    columns such as means.0.4.
    """
    if path.suffix == ".csv":
        with open(path, encoding="utf-8", newline="") as file:
            table = csv.DictReader(file, restval="")
            rows = list(table)
            columns = table.fieldnames or []
    else:
        rows = [flat(json.loads(path.read_text("utf-8")))]
        columns = list(rows[0])
    return rows, [column for column in columns if column not in IGNORED]


def flat(content, prefix=""):
    """Nested dictionaries and lists as one: {"means": {"0.4": 1}} becomes {"means.0.4": "1"}."""
    if not isinstance(content, dict | list) or not content:
        return {prefix: content if isinstance(content, str) else json.dumps(content)}
    found = {}
    parts = content.items() if isinstance(content, dict) else enumerate(content)
    for key, part in parts:
        found |= flat(part, f"{prefix}.{key}".lstrip("."))
    return found


def number(word):
    """The word as a number; None for a text, a flag or an empty cell."""
    try:
        return float(word)
    except ValueError:
        return None


def by_place(rows, keys):
    """{place: row}; a place tells the row's texts, and which one it is among rows with the same
    texts.
    """
    seen = collections.Counter()
    found = {}
    for row in rows:
        place = ", ".join(f"{key} {row[key]}" for key in keys if row[key])
        seen[place] += 1
        again = f" (no. {seen[place]})" if seen[place] > 1 else ""
        found[place + again] = row
    return found


def tolerance(column, row):
    """By how much a number may differ: its column and, where the row has one, its metric tell."""
    few = " few" if (number(row.get("n", "")) or 10) < 10 else ""
    kind = f"{row.get('metric', '')} {column}{few}"
    return next(limit for pattern, limit in TOLERANCES if re.search(pattern, kind))


def kinds_of(columns, rows):
    """The columns that tell which row it is, and those of whole numbers."""
    keys = []
    whole = []
    for column in columns:
        words = {row[column] for row in rows} - {"", "True", "False"}
        if column in PLACES or any(number(word) is None for word in words):
            keys.append(column)
        elif all(re.fullmatch(r"[+-]?\d+", word) for word in words):
            whole.append(column)
    return keys, whole


def differences(path, reference):
    """Yields a sentence for each difference between two files."""
    rows, columns = read(path)
    their_rows, their_columns = read(reference)
    yield from only_in_one("", columns, their_columns)
    shared = [column for column in columns if column in their_columns]
    keys, whole = kinds_of(shared, [*rows, *their_rows])
    places = keys if path.suffix == ".csv" else ()
    here = by_place(rows, places)
    there = by_place(their_rows, places)
    yield from only_in_one("the row ", here, there)
    for place in here:
        if place not in there:
            continue
        for column in shared:
            exact = column in keys or column in whole
            sentence = difference(column, here[place][column], there[place], exact)
            if sentence:
                yield f"{place}: {sentence}" if place else sentence


def only_in_one(what, here, there):
    """A sentence for each name that only one of two files has."""
    for name in here:
        if name not in there:
            yield f"{what}{name} is only in this run"
    for name in there:
        if name not in here:
            yield f"{what}{name} is only in the reference"


def difference(column, word, their_row, exact):
    """What is to be said of one value; nothing where it agrees."""
    theirs = their_row[column]
    both_numbers = number(word) is not None and number(theirs) is not None
    limit = tolerance(column, their_row) if both_numbers and not exact else 0
    if word == theirs or (limit and abs(number(word) - number(theirs)) <= limit):
        return ""
    allowed = f"{limit:g} is allowed" if limit else "it has to be the same"
    return f"{column} is {word or 'empty'} here, {theirs or 'empty'} there ({allowed})"


def names_of(folder):
    """The files of a run that are compared."""
    found = set()
    for pattern in ("*.csv", "*.json", "tables/*.csv", "tables/*.json"):
        for path in folder.glob(pattern):
            if not LEFT_OUT.fullmatch(path.name):
                found.add(path.relative_to(folder).as_posix())
    return found


def compare(run, reference):
    """The differences in words, the names of the files compared, and of those that the reference
    does not have.
    """
    here = names_of(run)
    there = names_of(reference)
    lines = []
    for name in sorted(there | NEEDED):
        if name not in here or name not in there:
            lines.append(f"{name} is missing in {reference if name in here else run}")
            continue
        try:
            found = list(differences(run / name, reference / name))
        except (ValueError, csv.Error) as error:
            found = [f"cannot be read: {error}"]
        lines += [f"{name}: {line}" for line in found[:SHOWN]]
        if len(found) > SHOWN:
            lines.append(f"{name}: and {len(found) - SHOWN} more")
    return lines, sorted(here & there), sorted(here - there - NEEDED)


def report(run, reference):
    """Say how the run compares with the reference; SystemExit with code 1 if they differ."""
    lines, compared, further = compare(run, reference)
    if lines:
        raise SystemExit("\n    ".join([f"{run} differs from {reference}:", *lines]))
    print(f"{run} agrees with {reference} in {', '.join(compared)}.")
    if further:
        print(f"Not compared, as the reference does not have them: {', '.join(further)}.")


def main():
    folders = [Path(word) for word in sys.argv[1:]]
    if len(folders) != 2 or not all(manifest_of(folder) for folder in folders):
        words = " ".join(sys.argv[1:])
        print(f"Two folders that a run made are needed, not: {words}\n\n{__doc__}", file=sys.stderr)
        sys.exit(2)
    report(*folders)


if __name__ == "__main__":
    main()
