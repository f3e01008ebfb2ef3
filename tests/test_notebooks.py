"""The five notebooks, run for real: the smoke run held against its reference, own photographs, and what goes wrong."""

import json
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import yaml
from nbcode import definitions
from nbrun import papermill, pixels
from PIL import Image
from test_own_data import batch, own_folder
from test_techniques import NETWORK

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
    table = matplotlib.colormaps["viridis"](np.arange(256), bytes=True)[:, :3]
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
    (tmp_path / "fusion.json").write_text(json.dumps({**fusion, "layer": "layer3", "dataset_sha256": "other images"}))
    parameters = {"root": repo, "data_dir": smoke[1], "results_dir": tmp_path}
    done = papermill(next((repo / "notebooks").glob("05_*.ipynb")), tmp_path / "05.ipynb", parameters, tmp_path)
    assert done.returncode != 0 and "layer: 'layer3' there, 'layer4' here" in done.stderr
    assert f"dataset_sha256: 'other images' there, '{fusion['dataset_sha256']}' here" in done.stderr
    assert "arch: " not in done.stderr


def test_two_runs_give_the_same_bytes(repo, smoke, tmp_path):
    """Every CSV, PNG and PDF of a notebook that keeps nothing in the cache, made twice."""
    found = []
    for name in ("one", "two"):
        parameters = {"root": repo, "data_dir": smoke[1], "results_dir": tmp_path / name, "n_images": 2, "threads": 1}
        done = papermill(next((repo / "notebooks").glob("03_*.ipynb")), tmp_path / "copy.ipynb", parameters, repo)
        assert done.returncode == 0, done.stderr[-3000:]
        files = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
        found.append({str(path.relative_to(tmp_path / name)): path.read_bytes() for path in files})
    assert {Path(name).suffix for name in found[0]} >= {".csv", ".png", ".pdf"}
    assert [name for name in found[0] | found[1] if found[0].get(name) != found[1].get(name)] == []


def test_the_manifest_tells_what_the_parameters_came_to(smoke):
    record = json.loads((smoke[0] / "manifest.json").read_text())
    fusion, seen = json.loads((smoke[0] / "fusion.json").read_text()), record["notebooks"]["05_evaluation"]["resolved"]
    for name in ("alpha", "layer", "shallow_layer", "rule", "weights_sha256", "dataset_sha256"):
        assert seen[name] == fusion[name] != "auto", name
    assert seen["device"] in ("cpu", "cuda:0", "mps:0") and seen["threads"] >= 1
    assert isinstance(seen["deterministic"], bool) and len(seen["tf32"]) == 2
    assert set(record["notebooks"]["05_evaluation"]["parameters"]["data_dir"]) == {"name", "sha256"}
    assert str(smoke[1].parent) not in json.dumps(record) and not (smoke[0] / "resolved.json").exists()


def test_a_folder_of_photographs(repo, smoke, tmp_path):
    """Own images without labels, masks or twins, explained with a checkpoint file, at their own resolution."""
    photos = tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for i, (w, h) in enumerate([(320, 200), (150, 260)]):
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
    assert [Image.open(f).size for f in overlays] == [(320, 200), (150, 260)]
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
    given |= {"alpha": 0.5, "shallow_layer": "layer2", "rule": "product", "baseline": "rise", "precision": "bf16"}
    notebook = next((repo / "notebooks").glob("05_*.ipynb"))
    done = papermill(notebook, tmp_path / "05.ipynb", given, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = pd.read_csv(tmp_path / "metrics.csv", keep_default_na=False)
    said = (tmp_path / "05.ipynb").read_text(encoding="utf-8")
    told = re.search(r"bf16 against float32, 8 areas: mean error ([\d.]+), largest", said)
    assert 0 < float(told[1]) < 0.01
    assert set(metrics[metrics.metric == "energy"].image) == {"photo1", "photo2"}
    for kind in ("original", "grayscale", "heatmap", "overlay", "edges"):
        assert Image.open(tmp_path / "images" / f"05_photo1_{kind}.png").size == (150, 260), kind


def test_cifar10_beside_the_published_numbers(repo, tmp_path):
    """params/cifar10.yaml, with a small network in the place of the one that has to be downloaded."""
    (tmp_path / "net.py").write_text(NETWORK)
    definitions("01_dataset_synthesis")["write_cifar"](
        tmp_path / "cifar10", batch([k % 10 for k in range(16)])[0], "here", 0
    )
    given = yaml.safe_load((repo / "params" / "cifar10.yaml").read_text("utf-8"))
    del given["n_test"]  # of 01
    given |= {"arch": f"{tmp_path / 'net.py'}:Net", "weights": "auto", "layer": "body", "shallow_layer": "body"}
    given |= {"root": repo, "data_dir": tmp_path, "results_dir": tmp_path, "n_images": 12, "threads": 1}
    notebook = next((repo / "notebooks").glob("05_*.ipynb"))
    done = papermill(notebook, tmp_path / "05.ipynb", given, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    table = pd.read_csv(tmp_path / "tables" / "05_published.csv")
    published = table.set_index("method").published.to_dict()
    assert published == {"Grad-CAM": 0.1140, "LayerCAM": 0.1066, "Same-layer hybrid": 0.1145}
    metrics = pd.read_csv(tmp_path / "metrics.csv", keep_default_na=False)
    curves = metrics[(metrics.metric == "insertion") & (metrics.baseline == "zero")]
    curves = curves.pivot(index="image", columns="method", values="value")
    assert len(curves) == 12
    for n, part in table.groupby("n"):
        means = part.set_index("method")["mean"]
        first = curves.loc[[f"test_{k:05d}" for k in np.random.default_rng([0, 7]).permutation(16)[:n]]].mean()
        assert means["Grad-CAM"] == pytest.approx(first["grad_cam"], abs=1e-6)
        assert means["Same-layer hybrid"] == pytest.approx(first["hybrid_same"], abs=1e-6)
    spread = table[table.method == "Same-layer hybrid"]
    assert sorted(table.n.unique()) == [10, 12] and (spread.low < spread.difference).all()
    assert (spread.difference < spread.high).all()


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
