"""Compare the numbers of a run with those of a reference: `python check.py results/smoke results/reference/smoke`.

Every CSV and JSON file of the reference, tables included, is compared value by value, but for timings (cost*.csv) and
the manifest. Texts, whole numbers, flags, and which rows and columns there are have to be the same; a number with
decimals may differ by the tolerance of its kind; intervals, p-values, effects and shares won count from 10 images on.
Rows are found by their texts, so their order does not matter.
Exit codes: 0 they agree, 1 they do not and each place is named, 2 there is no such run or reference.
"""

import collections
import csv
import json
import math
import re
import sys
from pathlib import Path

NEEDED = {"summary.csv", "fusion.json"}  # every reference has these; its further files count where it has them
LEFT_OUT = re.compile(r"cost.*\.csv|manifest\.json")
IGNORED = {"run", "device", "dataset_sha256"}  # columns that differ from run to run and from machine to machine
PLACES = {"alpha", "complexity", "height", "step", "fraction"}  # numbers that tell which row it is, as texts do
# The first pattern found in "metric column" counts; " few" follows in a row on fewer than 10 images. The numbers in the
# comments are the largest changes measured: in the smoke run (4 images) between 1 and 2 threads (none at all), batches
# of 32 and 8, AVX-512 and SSE4 instructions (as if on another processor); for 24 images, under noise of 3e-7 per value.
# Where only few images stand behind a row, its statistics are functions with jumps: of four differences there are 35
# distinct resampled means, and one that moves by 1e-6 past another changed an interval's end by 0.14 and a p by 0.5
# between two processors, all means being equal to 1e-6. There the means are compared, and of the rest that it is there.
TOLERANCES = (
    (r"\S (low|high|p|p_holm|effect|won) few$", math.inf),
    (r"\S (low|high)$", 1e-3),  # 5e-5
    (r"\S p(_holm)?$", 0.01),  # 0.0012: a few of the 10,000 sign flips tie; Holm multiplies by up to 4
    (r"\S effect$", 1e-3),  # 1e-4
    (r"\S won$|share.*won", 0.05),  # 0.042, one image of 24 whose difference is close to the 1e-6 that counts
    (r"^ties|tied", 0.01),  # 0.003: which pixels share a value to the last bit depends on every rounding
    (r"insertion|deletion|energy|means\.", 3e-5),  # 9e-7, on one image: sums of float32 probabilities or map values
    (r"", 2e-4),  # 2.6e-5, average precision and rank correlation: pixels of nearly equal value change places
)
SHOWN = 20  # differences of one file that are printed


def manifest_of(folder):
    """The manifest of a folder that a run made; {} for any other."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: the run was killed while it wrote this
        return {}
    return manifest if isinstance(manifest, dict) and {"run", "files"} <= manifest.keys() else {}


def read(path):
    """The rows of a CSV file as {column: word}; a JSON file is one row with columns such as means.0.4."""
    if path.suffix == ".csv":
        with open(path, encoding="utf-8", newline="") as file:
            table = csv.DictReader(file, restval="")
            rows, columns = list(table), table.fieldnames or []
    else:
        row, left = {}, [("", json.loads(path.read_text("utf-8")))]
        while left:
            name, value = left.pop(0)
            if isinstance(value, dict | list) and value:
                parts = value.items() if isinstance(value, dict) else enumerate(value)
                left += [(f"{name}.{key}".lstrip("."), part) for key, part in parts]
            else:
                row[name] = value if isinstance(value, str) else json.dumps(value)
        rows, columns = [row], list(row)
    return rows, [column for column in columns if column not in IGNORED]


def number(word):
    """The word as a number; None for a text, a flag or an empty cell."""
    try:
        return float(word)
    except ValueError:
        return None


def by_place(rows, keys):
    """{place: row}; a place tells the row's texts, and which one it is among rows with the same texts."""
    seen, found = collections.Counter(), {}
    for row in rows:
        place = ", ".join(f"{key} {row[key]}" for key in keys if row[key])
        seen[place] += 1
        found[place + (f" (no. {seen[place]})" if seen[place] > 1 else "")] = row
    return found


def tolerance(column, row):
    few = " few" if (number(row.get("n", "")) or 10) < 10 else ""
    return next(limit for pattern, limit in TOLERANCES if re.search(pattern, f"{row.get('metric', '')} {column}{few}"))


def differences(path, reference):
    """Yields a sentence for each difference between two files, and at the end the number of values compared."""
    (rows, columns), (their_rows, their_columns) = read(path), read(reference)
    for names, where in ((columns, "this run"), (their_columns, "the reference")):
        yield from (f"{c} is only in {where}" for c in names if c not in columns or c not in their_columns)
    shared, keys, whole = [c for c in columns if c in their_columns], [], set()
    for column in shared:
        words = {row[column] for row in (*rows, *their_rows)} - {"", "True", "False"}
        if column in PLACES or any(number(word) is None for word in words):
            keys.append(column)
        elif all(re.fullmatch(r"[+-]?\d+", word) for word in words):
            whole.add(column)
    here, there = (by_place(each, keys if path.suffix == ".csv" else ()) for each in (rows, their_rows))
    for places, others, where in ((here, there, "this run"), (there, here, "the reference")):
        yield from (f"the row {place} is only in {where}" for place in places if place not in others)
    for place in [place for place in here if place in there]:
        for column in shared:
            a, b = here[place][column], there[place][column]
            x, y = number(a), number(b)
            limit = 0 if column in (*keys, *whole) or None in (x, y) else tolerance(column, there[place])
            if a != b and not (limit and abs(x - y) <= limit):
                allowed = f"{limit:g} is allowed" if limit else "it has to be the same"
                yield f"{place}{': ' * bool(place)}{column} is {a or 'empty'} here, {b or 'empty'} there ({allowed})"


def compare(run, reference):
    """The differences in words, the names of the files compared, and of those that the reference does not have."""

    def names(top):
        found = [path for pattern in ("*.csv", "*.json", "tables/*.csv", "tables/*.json") for path in top.glob(pattern)]
        return {path.relative_to(top).as_posix() for path in found if not LEFT_OUT.fullmatch(path.name)}

    lines, here, there = [], names(run), names(reference)
    for name in sorted(there | NEEDED):
        if name not in here or name not in there:
            lines.append(f"{name} is missing in {run if name not in here else reference}")
            continue
        try:
            found = list(differences(run / name, reference / name))
        except (ValueError, csv.Error) as error:
            found = [f"cannot be read: {error}"]
        lines += [f"{name}: {line}" for line in found[:SHOWN]]
        lines += [f"{name}: and {len(found) - SHOWN} more"] * (len(found) > SHOWN)
    return lines, sorted(here & there), sorted(here - there - NEEDED)


def report(run, reference):
    """Say how the run compares with the reference; SystemExit with code 1 if they differ."""
    lines, compared, further = compare(run, reference)
    if lines:
        raise SystemExit("\n    ".join([f"{run} differs from {reference}:", *lines]))
    print(f"{run} agrees with {reference} in {', '.join(compared)}.")
    if further:
        print(f"Not compared, as the reference does not have them: {', '.join(further)}.")


if __name__ == "__main__":
    folders = [Path(word) for word in sys.argv[1:]]
    if len(folders) != 2 or not all(manifest_of(folder) for folder in folders):
        print(f"check.py needs two folders that a run made: {' '.join(sys.argv[1:])}\n\n{__doc__}", file=sys.stderr)
        sys.exit(2)
    report(*folders)
