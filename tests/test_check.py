"""runner/check.py: what counts as a difference between a run and its reference, and that each one
is named with its place.
"""

import csv
import json
import math
import subprocess
import sys

import pandas as pd
import pytest

import cam_core as cc
from runner import check

METHODS = ("grad_cam", "layer_cam", "hybrid")
ONE = {"metric": "insertion", "baseline": "twin", "method": "hybrid"}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def make(top, run, n=24):
    """A small results folder of the form that a run leaves."""
    summary = []
    metrics = []
    for metric, base in (("insertion", "twin"), ("deletion", "rise"), ("pointing", "")):
        for k, method in enumerate(METHODS):
            row = {"metric": metric, "baseline": base, "method": method, "n": n}
            row |= {"mean": 0.5 + 0.01 * k, "low": 0.1, "high": 0.2, "p": "" if k else 0.5}
            summary.append(row | {"effect": -1.5, "won": 0.25, "identical": k == 0, "run": run})
            for i in range(4):
                row = {"image": f"test_{i}", "method": method, "metric": metric}
                metrics.append(row | {"baseline": base, "value": 0.25 * i, "run": run})
    sweep = []
    for alpha in (0, 0, 0.5, 0.5, 1, 1):
        sweep.append({"kind": "fusion", "alpha": alpha, "insertion": 0.9 + alpha / 100, "run": run})
    write(top / "summary.csv", summary)
    write(top / "metrics.csv", metrics)
    write(top / "cost.csv", [{"method": "forward", "seconds": 0.01, "device": "cpu", "run": run}])
    write(top / "tables/04_sweep.csv", sweep)
    fusion = {"alpha": 0.4, "layer": "layer4", "n": 12, "means": {"0.0": 0.82, "0.4": 0.83}}
    (top / "fusion.json").write_text(json.dumps(fusion | {"device": "cpu", "run": run}))
    (top / "manifest.json").write_text(json.dumps({"run": run, "files": {}}))
    return top


@pytest.fixture
def two(tmp_path):
    """A run and a reference with the same numbers; they differ in run, device, timings and the
    order of the rows.
    """
    here = make(tmp_path / "run", "a")
    there = make(tmp_path / "reference", "b")
    write(here / "cost.csv", [{"method": "forward", "seconds": 99, "device": "cuda", "run": "a"}])
    write(here / "summary.csv", rows_of(here / "summary.csv")[::-1])
    (here / "fusion.json").write_text((here / "fusion.json").read_text().replace("cpu", "cuda"))
    return here, there


def edit(path, column, value, **where):
    """Change a column of the rows that `where` describes; a value of None takes the rows away."""
    kept = []
    for row in rows_of(path):
        if all(row[name] == word for name, word in where.items()):
            if value is None:
                continue
            row[column] = value if isinstance(value, str) else repr(value)
        kept.append(row)
    write(path, kept)


def lines(two):
    return check.compare(*two)[0]


def test_runs_with_the_same_numbers_agree(two, capsys):
    assert lines(two) == []
    check.report(*two)
    text = "in fusion.json, metrics.csv, summary.csv, tables/04_sweep.csv."
    assert text in capsys.readouterr().out


@pytest.mark.parametrize("value", [0.521, 0.519])
def test_a_planted_number_in_the_third_decimal_is_found_and_its_place_named(two, value):
    edit(two[1] / "summary.csv", "mean", value, **ONE)
    (line,) = lines(two)
    place = "summary.csv: metric insertion, baseline twin, method hybrid: mean is 0.52 here, "
    assert line.startswith(f"{place}{value} there (") and line.endswith("e-05 is allowed)")
    with pytest.raises(SystemExit, match="differs from"):
        check.report(*two)


@pytest.mark.parametrize(
    "metric", ["insertion", "deletion", "drop", "energy", "average_precision", "pointing", "x"]
)
@pytest.mark.parametrize("column", ["mean", "reference_mean", "difference"])
@pytest.mark.parametrize("n", ["4", "400"])
def test_no_tolerance_of_a_mean_reaches_the_third_decimal(metric, column, n):
    assert 0 < check.tolerance(column, {"metric": metric, "n": n}) < 5e-4


def test_a_change_below_the_tolerance_passes(two):
    allowed = check.tolerance("mean", ONE)
    edit(two[1] / "summary.csv", "mean", 0.52 + 0.9 * allowed, **ONE)
    assert lines(two) == []
    edit(two[1] / "summary.csv", "mean", 0.52 + 1.1 * allowed, **ONE)
    assert len(lines(two)) == 1


@pytest.mark.parametrize("column", ["low", "high", "p", "effect", "won"])
def test_statistics_of_few_images_jump_so_only_their_presence_is_compared(two, tmp_path, column):
    few = make(tmp_path / "few", "a", n=9), make(tmp_path / "few_too", "b", n=9)
    where = ONE | {"method": "grad_cam"}
    for pair in (two, few):
        edit(pair[1] / "summary.csv", column, 0.77, **where)
        assert len(lines(pair)) == (pair is two)
        edit(pair[1] / "summary.csv", column, "", **where)
        assert len(lines(pair)) == 1, "a value that is there in one and not in the other"
    edit(few[1] / "summary.csv", "mean", 0.521, **ONE)
    assert len(lines(few)) == 2, "means are held all the same"


def test_a_missing_row_and_a_new_one(two):
    where = {"image": "test_2", "metric": "insertion", "method": "hybrid"}
    edit(two[0] / "metrics.csv", "value", None, **where)
    edit(two[1] / "summary.csv", "mean", None, **ONE)
    assert lines(two) == [
        "metrics.csv: the row image test_2, method hybrid, metric insertion, baseline twin is only "
        "in the reference",
        "summary.csv: the row metric insertion, baseline twin, method hybrid is only in this run",
    ]


def test_rows_with_the_same_texts_are_counted(two):
    edit(two[1] / "tables/04_sweep.csv", "alpha", "0.25", alpha="0.5")
    found = lines(two)
    assert len(found) == 4 and found[0].endswith("kind fusion, alpha 0.5 is only in this run")
    assert found[1].endswith("kind fusion, alpha 0.5 (no. 2) is only in this run")


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("n", "23", "n is 24 here, 23 there (it has to be the same)"),
        ("identical", "True", "identical is False here, True there (it has to be the same)"),
        ("mean", "", "mean is 0.52 here, empty there (it has to be the same)"),
        ("mean", "nan", "mean is 0.52 here, nan there ("),
        ("mean", "inf", "mean is 0.52 here, inf there ("),
        ("p", "0.5", "p is empty here, 0.5 there (it has to be the same)"),
    ],
)
def test_counts_flags_and_what_is_no_number(two, column, value, message):
    edit(two[1] / "summary.csv", column, value, **ONE)
    (line,) = lines(two)
    assert message in line


def test_a_column_that_only_one_has(two):
    rows = [row | {"network": "resnet18"} for row in rows_of(two[0] / "summary.csv")]
    write(two[0] / "summary.csv", rows)
    assert lines(two) == ["summary.csv: network is only in this run"]
    assert lines(two[::-1]) == ["summary.csv: network is only in the reference"]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("alpha", 0.400001, "alpha is 0.4 here, 0.400001 there (it has to be the same)"),
        ("layer", "layer3", "layer is layer4 here, layer3 there (it has to be the same)"),
        ("n", 13, "n is 12 here, 13 there (it has to be the same)"),
        ("means", {"0.0": 0.82, "0.4": 0.831}, "means.0.4 is 0.83 here, 0.831 there ("),
        ("means", {"0.0": 0.82, "0.4": math.nan}, "means.0.4 is 0.83 here, NaN there ("),
        ("means", {"0.0": 0.82}, "means.0.4 is only in this run"),
    ],
)
def test_the_choice(two, name, value, message):
    content = json.loads((two[1] / "fusion.json").read_text())
    (two[1] / "fusion.json").write_text(json.dumps(content | {name: value}))
    (line,) = lines(two)
    assert line.startswith(f"fusion.json: {message}")


def test_which_files_count(two):
    """summary.csv and fusion.json always, further ones where the reference has them."""
    (two[1] / "metrics.csv").unlink()
    shared = ["fusion.json", "summary.csv", "tables/04_sweep.csv"]
    assert check.compare(*two) == ([], shared, ["metrics.csv"])
    (two[0] / "tables/04_sweep.csv").unlink()
    (two[1] / "fusion.json").unlink()
    assert lines(two) == [
        f"fusion.json is missing in {two[1]}",
        f"tables/04_sweep.csv is missing in {two[0]}",
    ]


def test_a_file_that_cannot_be_read_is_a_difference(two):
    (two[0] / "fusion.json").write_text("{")
    (two[0] / "summary.csv").write_bytes(b"\xff\xfe")
    found = [line.split(" read")[0] for line in lines(two)]
    assert found == ["fusion.json: cannot be", "summary.csv: cannot be"]


def test_many_differences_are_cut_short(two):
    for method in METHODS:
        edit(two[1] / "metrics.csv", "value", 9, method=method)
    assert len(lines(two)) == check.SHOWN + 1 and lines(two)[-1] == "metrics.csv: and 16 more"


def test_alone_it_ends_with_the_exit_code_it_promises(two, repo):
    def call(*folders):
        command = [sys.executable, "-m", "runner.check", *map(str, folders)]
        return subprocess.run(command, capture_output=True, text=True, cwd=repo)

    assert call(*two).returncode == 0
    edit(two[1] / "summary.csv", "mean", 0.6, **ONE)
    done = call(*two)
    assert done.returncode == 1 and "mean is 0.52 here, 0.6 there" in done.stderr
    assert not done.stdout and "Traceback" not in done.stderr
    assert call(two[0], two[0].parent).returncode == 2


def test_the_statistics_of_the_reference_follow_from_its_values(repo):
    """The intervals and p-values that README shows, computed again from the values of each image,
    which ship with them.
    """
    folder = repo / "results/reference/full"
    values = pd.read_csv(folder / "metrics.csv.gz", keep_default_na=False)
    values = values[(values.network == "resnet18") & values.method.isin(["grad_cam", "hybrid"])]
    summary = pd.read_csv(folder / "summary.csv", keep_default_na=False)
    summary = summary[(summary.network == "resnet18") & summary.primary]
    assert len(summary) == 4
    for there in summary.to_dict("records"):
        same = (values.metric == there["metric"]) & (values.baseline == there["baseline"])
        here = cc.statistics.compare(values[same], "grad_cam").set_index("method").loc["hybrid"]
        assert here.n == there["n"] == 160
        for column in ("mean", "reference_mean", "difference", "low", "high", "p", "effect", "won"):
            limit = check.tolerance(column, there)
            assert abs(here[column] - float(there[column])) <= limit < 1, (there["metric"], column)


def test_the_shipped_references_are_complete_and_agree_with_themselves(repo):
    folders = [path for path in (repo / "results/reference").iterdir() if path.name != "benchmarks"]
    assert len(folders) == 4
    for folder in folders:
        assert check.manifest_of(folder) and check.compare(folder, folder)[0] == []
