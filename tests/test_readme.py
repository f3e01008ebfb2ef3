"""What README says is true: its table is that of the reference run, its code runs."""

import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import cam_core as cc

NAMES = {
    ("insertion", "twin"): "insertion AUC, twin ↑",
    ("deletion", "twin"): "deletion AUC, twin ↓",
    ("energy", ""): "energy in the mask ↑",
    ("average_precision", ""): "average precision ↑",
}


@pytest.fixture(scope="module")
def readme(repo):
    return (repo / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def summary(repo):
    return pd.read_csv(repo / "results" / "reference" / "default" / "summary.csv", keep_default_na=False)


def table_row(row):
    """A primary endpoint as README prints it."""
    numbers = [float(row[k]) for k in ("reference_mean", "mean", "difference", "low", "high", "p_holm", "won")]
    base, mean, difference, low, high, p, won = numbers
    name = NAMES[row["metric"], row["baseline"]]
    interval = f"{difference:+.4f} [{low:+.4f}, {high:+.4f}]"
    return f"| {name} | {base:.4f} | {mean:.4f} | {interval} | {p:.2g} | {won:.0%} |"


def test_the_table_is_that_of_the_reference_run(readme, summary):
    primary = summary[summary.primary.astype(str) == "True"]
    assert len(primary) == 4
    for row in primary.to_dict("records"):
        assert table_row(row) in readme, table_row(row)


def test_the_answer_agrees_with_the_reference_run(readme, repo):
    """The sentences that the run generated stand in README as they are."""
    text = (repo / "results" / "reference" / "default" / "tables" / "05_conclusions.md").read_text(encoding="utf-8")
    primary = text.split("**Exploratory**")[0]
    for line in [line for line in primary.splitlines() if line.startswith("- ")]:
        assert line in readme, line


def test_the_prose_agrees_with_the_reference_run(readme, summary):
    """What the short answer says of shallow LayerCAM and the same-layer hybrid, as numbers and as an order."""
    part = summary[summary.metric.isin(["energy", "average_precision"])].astype({"mean": float})
    mean = part.set_index(["method", "metric"])["mean"]
    shallow, hybrid, same, grad = (mean[m] for m in ("layer_cam_shallow", "hybrid", "hybrid_same", "grad_cam"))
    prose = " ".join(readme.split())
    assert f"({shallow.energy:.3f} against {hybrid.energy:.3f})" in prose and shallow.energy > hybrid.energy
    assert f"({shallow.average_precision:.3f} and {hybrid.average_precision:.3f})" in prose
    assert abs(shallow.average_precision - hybrid.average_precision) < 0.02
    assert f"(energy {same.energy:.3f}, Grad-CAM {grad.energy:.3f})" in prose and abs(same.energy - grad.energy) < 0.01


def test_what_it_says_of_the_baselines(summary):
    """The CAMs are close together with the twin, and pixel noise deletes best with RISE's baseline."""
    numbers = summary.astype({"mean": float})
    cams = numbers[(numbers.baseline == "twin") & ~numbers.method.isin(["noise", "smooth_noise", "centre"])]
    assert cams.groupby("metric")["mean"].agg(np.ptp).max() < 0.004
    rise = numbers[(numbers.baseline == "rise") & (numbers.metric == "deletion")].set_index("method")["mean"]
    assert rise.idxmin() == "noise"


def test_its_python_runs(readme, tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", readme, re.S)
    assert len(blocks) == 2
    pixels = np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cc, "CAMS", dict(cc.CAMS))
    names = {}
    for block in blocks:
        exec(block, names)
    assert Image.open(tmp_path / "overlay.png").size == (90, 60)
    assert names["info"]["class_names"][names["found"].target] in capsys.readouterr().out
    assert "my_cam" in cc.CAMS


def test_a_cam_of_ones_own_is_in_every_map_table(monkeypatch):
    import torch

    monkeypatch.setattr(cc, "CAMS", {**cc.CAMS, "my_cam": lambda A, G: (A.float() * G.float()).relu().sum(1)})
    model, _ = cc.load_model("squeezenet1_1")
    x = torch.randn(2, 3, 64, 64)
    deep, shallow = cc.default_layers(model, x)
    layers = {"deep": deep, "coarse": deep, "shallow": shallow, "finer": list(cc.stages(model, x))[-2]}
    shot = cc.capture(model, x, list(layers.values()))
    maps = cc.method_maps(shot, x, layers, alpha=0.5, rule="product", ids=["a"], seed=0)
    assert maps["my_cam"].shape == (1, 64, 64) and cc.label("my_cam") == "my_cam"
