"""The five notebooks, run for real: the smoke run held against its reference, own photographs, and what goes wrong."""

import json
import subprocess
import sys

import matplotlib
import numpy as np
import pandas as pd
import pytest
import yaml
from nbrun import papermill, pixels
from PIL import Image
from test_own_data import own_folder

import cam_core as cc


@pytest.fixture(scope="session")
def smoke(repo, tmp_path_factory):
    """The whole pipeline with params/smoke.yaml; (results folder, data folder, what it printed)."""
    base = tmp_path_factory.mktemp("smoke")
    command = [sys.executable, str(repo / "pipeline.py"), "-f", str(repo / "params" / "smoke.yaml"), "--check"]
    command += ["--results-dir", str(base / "run"), "-p", "data_dir", str(base / "data")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=base)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return base / "run", base / "data", done.stdout


def test_smoke_writes_everything(smoke, repo):
    run, data, said = smoke
    for name in ("metrics.csv", "summary.csv", "cost.csv", "fusion.json", "manifest.json"):
        assert (run / name).stat().st_size > 50, name
    for number in ("01", "02", "03", "04", "05"):
        assert list((run / "figures").glob(f"{number}_*.png")), number
        assert list((run / "notebooks").glob(f"{number}_*.ipynb")), number
    metrics = pd.read_csv(run / "metrics.csv", keep_default_na=False)
    n = yaml.safe_load((repo / "params" / "smoke.yaml").read_text())["n_images"]
    assert metrics.image.nunique() == n
    assert np.isfinite(metrics.value.astype(float)).all()
    assert "05_evaluation" in said


def test_every_output_carries_the_runs_id(smoke):
    run = smoke[0]
    run_id = json.loads((run / "manifest.json").read_text())["run"]
    assert set(pd.read_csv(run / "summary.csv").run) == {run_id}
    assert json.loads((run / "fusion.json").read_text())["run"] == run_id
    for figure in (run / "figures").glob("*.png"):
        assert Image.open(figure).text["Run"] == run_id, figure.name


def test_fusion_chosen_on_validation_reaches_05(smoke):
    run = smoke[0]
    fusion = json.loads((run / "fusion.json").read_text())
    sweep = pd.read_csv(run / "tables" / "04_sweep.csv")
    assert all(i.startswith("val") for i in sweep.image)
    means = sweep[sweep.kind == "fusion"].groupby(["layer", "rule", "alpha"]).criterion.mean()
    cell = (f"{fusion['coarse']} × {fusion['shallow_layer']}", fusion["rule"], fusion["alpha"])
    assert means[cell] == pytest.approx(means.max(), abs=1e-9)
    assert all(i.startswith("test") for i in pd.read_csv(run / "metrics.csv").image)


def test_figures_are_pictures(smoke):
    for figure in sorted((smoke[0] / "figures").glob("*.png")):
        picture = pixels(figure)
        assert min(picture.shape[:2]) > 150 and picture.std() > 5, figure.name


def test_a_device_that_is_not_there_stops_with_its_name(repo, smoke, tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    parameters = {"root": repo, "data_dir": smoke[1], "results_dir": tmp_path, "device": "cuda"}
    done = papermill(next((repo / "notebooks").glob("05_*.ipynb")), tmp_path / "05.ipynb", parameters, repo)
    assert done.returncode != 0 and "device='cuda' is not available" in done.stderr


MORE = {"02": {"targets": "cluster,0", "also": "squeezenet1_1", "colormap": "viridis"}, "03": {"colormap": "viridis"}}


@pytest.mark.parametrize("number", ["02", "03"])
def test_runs_from_the_notebooks_folder(repo, smoke, tmp_path, number):
    """As JupyterLab starts it: the working directory is notebooks/, and nobody gives `root`."""
    notebook = next((repo / "notebooks").glob(f"{number}_*.ipynb"))
    parameters = {"data_dir": smoke[1], "results_dir": tmp_path, "n_images": 4, "threads": 1, **MORE[number]}
    done = papermill(notebook, tmp_path / "copy.ipynb", parameters, notebook.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    assert list((tmp_path / "figures").glob(f"{number}_*.png"))
    heat = Image.open(next((tmp_path / "images").glob(f"{number}_*_heatmap.png")))
    table = (matplotlib.colormaps["viridis"](np.arange(256))[:, :3] * 255).round().astype(int)
    assert {colour for _, colour in heat.getcolors(maxcolors=60_000)} <= set(map(tuple, table.tolist()))
    assert (tmp_path / "figures" / "02_two_networks.png").exists() == (number == "02")


def test_an_unknown_target_stops_02_with_the_classes_there_are(repo, smoke, tmp_path):
    notebook = next((repo / "notebooks").glob("02_*.ipynb"))
    parameters = {"root": repo, "data_dir": smoke[1], "results_dir": tmp_path, "n_images": 1, "targets": "wring"}
    done = papermill(notebook, tmp_path / "copy.ipynb", parameters, repo)
    assert done.returncode != 0 and "targets: 'wring' is neither a class of this network" in done.stderr
    assert "Nearest: ring" in done.stderr


def test_outside_the_repository_without_root_says_so(repo, tmp_path):
    done = papermill(next((repo / "notebooks").glob("03_*.ipynb")), tmp_path / "copy.ipynb", {}, tmp_path)
    assert done.returncode != 0 and "No cam_core.py in" in done.stderr


def test_05_without_a_choice_names_both_ways_out(repo, smoke, tmp_path):
    parameters = {"root": repo, "data_dir": smoke[1], "results_dir": tmp_path}
    done = papermill(next((repo / "notebooks").glob("05_*.ipynb")), tmp_path / "05.ipynb", parameters, tmp_path)
    assert done.returncode != 0 and "Run notebook 04 first, or give alpha" in done.stderr


def test_05_refuses_a_choice_made_for_something_else(repo, smoke, tmp_path):
    fusion = json.loads((smoke[0] / "fusion.json").read_text())
    (tmp_path / "fusion.json").write_text(json.dumps({**fusion, "layer": "layer3"}))
    parameters = {"root": repo, "data_dir": smoke[1], "results_dir": tmp_path}
    done = papermill(next((repo / "notebooks").glob("05_*.ipynb")), tmp_path / "05.ipynb", parameters, tmp_path)
    assert done.returncode != 0 and "layer: 'layer3' there, 'layer4' here" in done.stderr


def test_a_folder_of_photographs(repo, smoke, tmp_path):
    """Own images without labels, masks or twins, explained with a checkpoint file, at their own resolution."""
    photos = tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for i, (w, h) in enumerate([(320, 200), (150, 260), (224, 224), (400, 300)]):
        smooth = Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).resize((w, h), Image.Resampling.BICUBIC)
        smooth.save(photos / f"photo{i}.jpg")
    (photos / "broken.jpg").write_bytes((photos / "photo0.jpg").read_bytes()[:900])
    command = [sys.executable, str(repo / "pipeline.py"), "--results-dir", str(tmp_path / "run"), "--from", "02"]
    given = {
        "dataset": photos,
        "weights": repo / "data" / "checkpoints" / "resnet18.pth",
        "n_images": 0,
        "steps": 3,
        "n_extra": 2,
    }
    for name, value in {**given, "n_extra": 2, "threads": 1, "data_dir": smoke[1]}.items():
        command += ["-p", name, str(value)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    overlays = sorted((tmp_path / "run" / "images").glob("05_*_overlay.png"))
    assert [Image.open(f).size for f in overlays] == [(320, 200), (150, 260), (224, 224), (400, 300)]
    metrics = pd.read_csv(tmp_path / "run" / "metrics.csv", keep_default_na=False)
    assert not {"energy", "pointing", "iou"} & set(metrics.metric)
    assert {"insertion", "deletion", "insertion_blocks", "drop", "ties"} <= set(metrics.metric)
    executed = (tmp_path / "run" / "notebooks" / "05_evaluation.ipynb").read_text(encoding="utf-8")
    assert "localisation is left out" in executed
    assert "1 file(s) could not be read and were skipped" in done.stdout and "broken.jpg" in done.stdout


def test_photographs_with_boxes(repo, tmp_path):
    """Localisation against a boxes.csv, on the images whose class the network recognises; pictures of each, five."""
    model, info = cc.load_model("resnet18")
    rng, lines = np.random.default_rng(1), ["file,x0,y0,x1,y1,class"]
    (tmp_path / "photos").mkdir()
    for i, (w, h) in enumerate([(320, 200), (150, 260), (240, 240)]):
        file = tmp_path / "photos" / f"photo{i}.png"
        smooth = Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).resize((w, h), Image.Resampling.BICUBIC)
        smooth.save(file)
        seen = int(model(cc.preprocess(cc.read_image(file))).argmax())
        lines.append(f"photo{i}.png,{w // 4},{h // 4},{w},{h},{seen if i else (seen + 1) % 5}")  # the first is mistaken
    (tmp_path / "photos" / "boxes.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    given = {"root": repo, "dataset": tmp_path / "photos", "weights": repo / "data" / "checkpoints" / "resnet18.pth"}
    given |= {"results_dir": tmp_path, "data_dir": tmp_path, "steps": 3, "n_extra": 1, "n_images": 0, "threads": 1}
    given |= {"alpha": 0.5, "shallow_layer": "layer2", "rule": "product", "baseline": "rise", "colormap": "viridis"}
    notebook = next((repo / "notebooks").glob("05_*.ipynb"))
    done = papermill(notebook, tmp_path / "05.ipynb", given, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = pd.read_csv(tmp_path / "metrics.csv", keep_default_na=False)
    assert set(metrics[metrics.metric == "energy"].image) == {"photo1", "photo2"}
    for kind in ("original", "grayscale", "heatmap", "overlay", "edges"):
        assert Image.open(tmp_path / "images" / f"05_photo1_{kind}.png").size == (150, 260), kind


def test_01_trains_on_ones_own_images(repo, tmp_path):
    """What `-p dataset PATH -p classes ...` does in 01; the other notebooks find the file it leaves."""
    images = tmp_path / "pets"
    own_folder(images, 3)
    given = {"root": repo, "dataset": images, "classes": "Rudo,Greg,Baya", "epochs": 1, "batch_size": 9, "threads": 1}
    given |= {"results_dir": tmp_path / "out", "data_dir": tmp_path / "data"}
    done = papermill(next((repo / "notebooks").glob("01_*.ipynb")), tmp_path / "01.ipynb", given, repo)
    assert done.returncode == 0, done.stderr[-3000:]
    names = ["Rudo", "Greg", "Baya"]
    file = cc.resolve_weights("auto", "auto", str(images), tmp_path / "data", classes=names)
    assert cc.load_model("auto", file)[1]["class_names"] == names
    figures = {p.stem for p in (tmp_path / "out" / "figures").glob("01_own_*.png")}
    assert {"01_own_curves", "01_own_confusion"} <= figures
    told = pd.read_csv(tmp_path / "out" / "tables" / "01_own_predictions.csv")
    assert len(told) == 9 and ((told.predicted == told.label.map(names.index)).all() or "01_own_mistakes" in figures)
