"""The notebooks run for real: the smoke run held against its reference, and odd photographs."""

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image


def run(repo, folder, *words, **given):
    """The runner's finished process; given: parameters."""
    command = [sys.executable, "-m", "runner.pipeline", *words, "--results-dir", folder / "run"]
    for name, value in given.items():
        command += ["-p", name, value]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repo)}
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, cwd=folder, env=environment
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="session")
def smoke(repo, tmp_path_factory):
    """The results of params/smoke.yaml, whose numbers agree with the reference."""
    folder = tmp_path_factory.mktemp("smoke")
    run(repo, folder, "-f", repo / "params/smoke.yaml", "--check", data_dir=folder / "data")
    return folder / "run"


def test_the_fusion_chosen_on_validation_images_is_measured_on_others(smoke):
    fusion = json.loads((smoke / "fusion.json").read_text())
    sweep = pd.read_csv(smoke / "tables" / "04_sweep.csv")
    assert all(image.startswith("val") for image in sweep.image)
    cells = sweep[sweep.kind == "fusion"].groupby(["layer", "rule", "alpha"])
    means = cells.criterion.mean()
    layers = f"{fusion['coarse']} × {fusion['shallow_layer']}"
    assert means[layers, fusion["rule"], fusion["alpha"]] == pytest.approx(means.max(), abs=1e-9)
    metrics = pd.read_csv(smoke / "metrics.csv", keep_default_na=False)
    assert all(image.startswith("test") for image in metrics.image)
    manifest = json.loads((smoke / "manifest.json").read_text())
    used = manifest["notebooks"]["05_evaluation"]["resolved"]
    for name in ("alpha", "layer", "shallow_layer", "rule", "weights_sha256", "dataset_sha256"):
        assert used[name] == fusion[name] != "auto", name


def test_figures_are_pictures_with_the_runs_id(smoke):
    run_id = json.loads((smoke / "manifest.json").read_text())["run"]
    figures = sorted((smoke / "figures").glob("*.png"))
    assert {figure.name[:2] for figure in figures} == {"01", "02", "03", "04", "05"}
    for figure in figures:
        with Image.open(figure) as picture:
            assert picture.text["Run"] == run_id and min(picture.size) > 150, figure.name
            assert np.asarray(picture.convert("L")).std() > 5, figure.name


def test_the_report_shows_all_parts_of_a_run(smoke):
    html = (smoke / "report.html").read_text("utf-8")
    for part in ("numbers", "slider", "maps", "curves", "failures", "sanity", "cost", "provenance"):
        assert f'<section id="{part}">' in html, part
    assert "figures/" not in html.partition('<section id="missing">')[2]


def test_the_manifest_names_no_folder_of_this_machine(smoke):
    text = (smoke / "manifest.json").read_text()
    entry = json.loads(text)["notebooks"]["05_evaluation"]
    assert set(entry["parameters"]["data_dir"]) == {"name", "sha256"}
    assert entry["parameters"]["n_images"] == 4 and entry["resolved"]["threads"] >= 1
    assert str(smoke.parent) not in text


NETWORK = """
import torch
from torch import nn

class Net(nn.Sequential):
    image_size = 32
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
        )
"""


def odd_photographs(folder):
    """Turned, transparent, 16 bit, with odd names; one is broken; no labels, masks or twins."""
    folder.mkdir()
    draw = np.random.default_rng(0)

    def smooth(width, height):
        coarse = Image.fromarray(draw.integers(0, 255, (8, 8, 3), np.uint8))
        return coarse.resize((width, height), Image.Resampling.BICUBIC)

    smooth(320, 200).save(folder / "Zwei Bäume.JPG")
    turned = smooth(150, 260)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(folder / "turned.jpg", exif=exif)
    transparent = smooth(90, 90)
    transparent.putalpha(120)
    transparent.save(folder / "transparent.png")
    Image.fromarray(draw.integers(0, 60_000, (70, 80)).astype(np.uint16)).save(folder / "grey.tif")
    whole = (folder / "turned.jpg").read_bytes()
    (folder / "broken.jpg").write_bytes(whole[: len(whole) // 3])


def test_odd_photographs_and_a_network_of_ones_own(repo, tmp_path):
    """Notebooks 02 to 05, each picture explained at its own size."""
    odd_photographs(tmp_path / "photos")
    (tmp_path / "net.py").write_text(NETWORK)
    done = run(
        repo,
        tmp_path,
        "--from",
        "02",
        dataset=tmp_path / "photos",
        arch=f"{tmp_path / 'net.py'}:Net",
        data_dir=tmp_path / "data",
        n_images=0,
        steps=3,
        n_extra=1,
        threads=1,
    )
    assert "broken.jpg" in done.stdout
    overlays = (tmp_path / "run" / "images").glob("05_*_overlay.png")
    sizes = sorted(Image.open(file).size for file in overlays)
    assert sizes == [(80, 70), (90, 90), (260, 150), (320, 200)]
    metrics = pd.read_csv(tmp_path / "run" / "metrics.csv", keep_default_na=False)
    assert metrics.image.nunique() == 4 and np.isfinite(metrics.value.astype(float)).all()
    assert {"insertion", "deletion", "insertion_blocks", "drop", "ties"} <= set(metrics.metric)
    assert not {"energy", "pointing", "iou"} & set(metrics.metric)  # nothing tells where to look
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
