"""Every parameter does something: notebooks 03 and 05 with one parameter changed at a time, on a small data set."""

import json

import numpy as np
import pandas as pd
import pytest
from nbrun import papermill, pixels

SMALL = {"n_images": 3, "threads": 1}
SMALL_05 = {**SMALL, "steps": 4, "baseline": "twin", "n_extra": 1, "alpha": 0.5}
CHANGES = {
    "04": {},
    "03": {"layer": {"layer": "layer3"}, "n_images": {"n_images": 4}},
    "05": {
        "alpha": {"alpha": 0.9},
        "shallow_layer": {"shallow_layer": "layer3"},
        "seed": {"seed": 1},
        "steps": {"steps": 5},
    },
}
NUMBER = {"alpha": "energy", "shallow_layer": "energy", "seed": "energy", "steps": "insertion"}


@pytest.fixture(scope="module")
def data(repo, tmp_path_factory):
    """A small synthetic data set, as notebook 01 draws it."""
    base = tmp_path_factory.mktemp("data")
    given = {"root": repo, "data_dir": base / "data", "results_dir": base / "out", "threads": 1}
    given |= {"n_train": 40, "n_val": 40, "n_test": 40}
    done = papermill(next((repo / "notebooks").glob("01_*.ipynb")), base / "01.ipynb", given, repo)
    assert done.returncode == 0, done.stderr[-3000:]
    return base / "data"


@pytest.fixture(scope="module")
def run(repo, data, tmp_path_factory):
    """run(number, name, **changed) -> the results folder of one notebook with small parameters; each is run once."""
    base, finished = tmp_path_factory.mktemp("variants"), {}

    def one(number, name, **changed):
        out = base / f"{number}_{name}"
        if out not in finished:
            out.mkdir()
            small = SMALL_05 if number == "05" else SMALL
            given = {"root": repo, "data_dir": data, "results_dir": out, **small, **changed}
            notebook = next((repo / "notebooks").glob(f"{number}_*.ipynb"))
            finished[out] = papermill(notebook, out / "copy.ipynb", given, repo)
        assert finished[out].returncode == 0, finished[out].stderr[-3000:]
        return out

    return lambda number, name, **more: one(number, name, **{**CHANGES[number].get(name, {}), **more})


def summary(out):
    """What 05 found: the hybrid's means by metric."""
    table = pd.read_csv(out / "summary.csv", keep_default_na=False)
    return table[table.method == "hybrid"].set_index("metric")["mean"].astype(float)


@pytest.mark.parametrize("name", NUMBER)
def test_a_parameter_of_05_changes_a_number_and_a_picture(run, name):
    assert summary(run("05", name))[NUMBER[name]] != summary(run("05", "base"))[NUMBER[name]]
    figure = "05_curves.png" if name == "steps" else "05_methods.png"
    one, other = (pixels(run("05", k) / "figures" / figure) for k in (name, "base"))
    assert one.shape != other.shape or (one != other).any()


@pytest.mark.parametrize("name", ["layer", "n_images"])
def test_a_parameter_of_03_changes_a_number_and_a_picture(run, name):
    tables = [{f.name: f.read_text() for f in (run("03", k) / "tables").glob("*.csv")} for k in (name, "base")]
    assert tables[0] != tables[1]
    one, other = (pixels(run("03", k) / "figures" / "03_energy.png") for k in (name, "base"))
    assert one.shape != other.shape or (one != other).any()


def test_what_is_given_to_04_is_what_it_hands_on(run):
    """-p alpha 0.3 -p shallow_layer layer3: nothing is left to choose but where Grad-CAM looks."""
    given = dict(n_images=2, steps=3, baseline="twin", alpha=0.3, shallow_layer="layer3", rule="product")
    fusion = json.loads((run("04", "given", **given) / "fusion.json").read_text(encoding="utf-8"))
    assert (fusion["alpha"], fusion["shallow_layer"], fusion["rule"]) == (0.3, "layer3", "product")
    assert "given as a parameter" in fusion["reason"]


def test_a_smaller_run_measures_a_subset_of_what_a_larger_one_does(repo, data):
    import cam_core as cc

    model, _ = cc.load_model("resnet18")
    test = cc.split_rows(cc.read_dataset(data / "synthetic"), "test")
    few, more = (set(cc.measurable(model, test, n, 0)[0]["id"]) for n in (3, 6))
    assert len(few) == 3 and len(more) == 6 and few < more


def test_the_same_parameters_give_the_same_bytes_with_and_without_the_cache(run, data, tmp_path):
    """device=cpu is what auto means on a machine without a GPU. One run starts with an empty cache, one with a full."""
    base = run("05", "base")
    if set(pd.read_csv(base / "cost.csv").device) != {"cpu"}:
        pytest.skip("device=auto is a GPU here")
    (tmp_path / "synthetic").symlink_to(data / "synthetic")
    again = run("05", "empty_cache", device="cpu", data_dir=tmp_path)
    assert len(list((tmp_path / "cache").glob("*.json"))) > 0
    for name in (
        "metrics.csv",
        "summary.csv",
        "tables/05_primary.tex",
        "figures/05_methods.png",
        "figures/05_curves.pdf",
    ):
        assert (again / name).read_bytes() == (base / name).read_bytes(), name


def test_publication_output(run):
    """Every table with a caption is there as booktabs LaTeX, every figure as PDF, from the same numbers."""
    base = run("05", "base")
    assert {f.stem for f in (base / "figures").glob("*.png")} == {f.stem for f in (base / "figures").glob("*.pdf")}
    for stem in ("05_primary", "05_means", "05_controls", "05_pairs"):
        text = (base / "tables" / f"{stem}.tex").read_text(encoding="utf-8")
        assert r"\toprule" in text and r"\bottomrule" in text and r"\caption{" in text, stem
    primary = pd.read_csv(base / "tables" / "05_primary.csv")
    text = (base / "tables" / "05_primary.tex").read_text(encoding="utf-8")
    assert all(f"{value:.4f}" in text for value in np.array(primary["difference"]))
