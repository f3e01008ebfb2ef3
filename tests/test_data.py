"""The synthetic data: what it must be, and what must not tell the classes apart. Functions come from notebook 01."""

import functools
import hashlib
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from nbcode import definitions
from scipy.stats import ks_2samp
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import cam_core as cc

data = SimpleNamespace(**definitions("01_dataset_synthesis"))
SIZES = {"train": 800, "test": 400}
CHECKPOINTS = sorted((Path(cc.__file__).parent / "data" / "checkpoints").glob("*.pth"))


@functools.cache
def drawn(split):
    """All images of a split: pixels, twins, lesions (float), and a table of what is known about them."""
    with ThreadPoolExecutor(2) as pool:
        images = list(pool.map(lambda i: data.render(0, split, i), range(SIZES[split])))
    table = pd.DataFrame({
        "label": [data.CLASSES.index(r["classes"][0]) for r in images], "level": [r["level"] for r in images],
        "area": [r["area"] for r in images],
        "contrast": [r["image"].sum(dtype=int) - r["twin"].sum(dtype=int) for r in images],
    })  # fmt: skip
    pixels, twins = (np.stack([r[name] for r in images]) for name in ("image", "twin"))
    return SimpleNamespace(table=table, pixels=pixels, twins=twins, lesions=np.stack([r["lesion"] for r in images]))


def digest(seed, split, index):
    r = data.render(seed, split, index)
    parts = [r["image"], r["twin"], *r["masks"].values(), *r["hulls"].values()]
    return hashlib.sha256(b"".join(np.ascontiguousarray(p).tobytes() for p in parts)).hexdigest()


# ---------------------------------------------------------------------------------------------------------- drawing


def test_an_image_depends_on_seed_split_and_index_alone():
    jobs = [(seed, split, index) for seed in (0, 3) for split in data.SPLITS for index in (1, 23)]
    forward = {job: digest(*job) for job in jobs}
    with ThreadPoolExecutor(2) as pool:
        backward = dict(zip(jobs[::-1], pool.map(lambda job: digest(*job), jobs[::-1]), strict=True))
    assert forward == backward
    assert len(set(forward.values())) == len(jobs)


def test_another_process_draws_the_same_bytes():
    code = "import json, test_data; print(json.dumps([test_data.digest(0, 'test', i) for i in (4, 2, 3)]))"
    here = Path(__file__).resolve().parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here.parent), str(here)]), "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [digest(0, "test", i) for i in (4, 2, 3)]


def test_the_twin_is_the_image_but_for_the_lesion():
    test = drawn("test")
    lesion = test.lesions > 0
    assert (test.pixels == test.twins)[~lesion].all()
    assert (test.lesions[lesion] >= data.VISIBLE).all()
    free = lesion & (test.twins < 255 - test.lesions - 1)  # nothing is cut off at white here
    assert (test.pixels[free] > test.twins[free]).all()
    assert free.sum() > 0.99 * lesion.sum()


@pytest.mark.parametrize("index", [6, 17, 38, 64, 121])
def test_masks_hulls_and_boxes_belong_to_the_lesion(index):
    r = data.render(0, "test", index)
    kind, visible = r["classes"][0], r["lesion"] > 0
    mask, hull = r["masks"][kind], r["hulls"][kind]
    assert (mask | ~visible).all() and (hull | ~mask).all()
    near = cv2.dilate(visible.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    assert (near | ~mask).all() and mask.sum() > visible.sum()
    inside = np.zeros_like(mask)
    for x0, y0, x1, y1 in r["boxes"]:
        assert mask[y0:y1, x0].any() and mask[y0:y1, x1 - 1].any()
        assert mask[y0, x0:x1].any() and mask[y1 - 1, x0:x1].any()
        inside[y0:y1, x0:x1] = True
    assert (inside | ~mask).all() and len(r["boxes"]) == len(r["drawn"])


def test_a_ring_has_a_hole_that_its_hull_fills():
    r = data.render(0, "test", 37)
    assert r["hulls"]["ring"].sum() > 1.15 * r["masks"]["ring"].sum()


def test_healthy_images_have_no_lesion():
    r = data.render(0, "val", 0)
    assert (r["image"] == r["twin"]).all() and not r["masks"] and not r["boxes"] and r["area"] == 0


def test_classes_and_levels_are_balanced():
    table = drawn("test").table
    assert (pd.crosstab(table.label, table.level) == SIZES["test"] // 25).all().all()
    pairs = pd.Series([data.classes_of("pairs", i) for i in range(12)])
    assert set(pairs) == set(itertools.permutations(data.CLASSES[1:], 2))


def test_a_pair_holds_one_lesion_of_each_of_its_classes():
    for index in range(40):
        r = data.render(0, "pairs", index)
        assert len(r["masks"]) == len(r["boxes"]) == 2 and [kind for kind, _ in r["drawn"]] == list(r["classes"])


# ----------------------------------------------------------------------------------------- what must not tell the class


def accuracy_of_logistic_regression(features):
    """The best of three regularisations on the test split: an upper bound, since it is chosen there."""
    train, test = drawn("train"), drawn("test")
    x, held_out = features(train.pixels), features(test.pixels)
    scores = []
    for strength in (0.003, 0.03, 0.3):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000, tol=1e-3))
        scores.append(model.fit(x, train.table.label).score(held_out, test.table.label))
    return max(scores)


def histogram(pixels, bins, power=1.0):
    return np.stack([np.bincount(p.ravel() // (256 // bins), minlength=bins) / p.size for p in pixels]) ** power


@pytest.mark.parametrize("bins, power", [(32, 1.0), (64, 1.0), (64, 0.5), (256, 0.5)])
def test_grey_levels_do_not_tell_the_class(bins, power):
    assert accuracy_of_logistic_regression(lambda pixels: histogram(pixels, bins, power)) < 0.45


def test_thumbnails_do_not_tell_the_class():
    def thumbnails(pixels):
        small = [cv2.resize(p, (16, 16), interpolation=cv2.INTER_AREA).ravel() / 255 for p in pixels]
        return np.stack(small)

    assert accuracy_of_logistic_regression(thumbnails) < 0.45


@pytest.mark.parametrize("quantity", ["area", "contrast"])
def test_area_and_summed_contrast_have_one_distribution(quantity):
    table = pd.concat([drawn(split).table for split in SIZES])
    samples = [table[table.label == label][quantity] for label in range(1, 5)]
    for a, b in itertools.combinations(samples, 2):
        assert ks_2samp(a, b).pvalue > 0.01


def test_extent_is_log_uniform_between_half_a_percent_and_a_quarter():
    area = drawn("train").table.query("label > 0").area
    assert 0.0045 < area.min() and area.max() < 0.26
    assert ks_2samp(np.log(area), np.linspace(np.log(0.005), np.log(0.25), 5000)).pvalue > 0.01


# ------------------------------------------------------------------------------------------------------------- on disk


def test_a_set_on_disk_is_complete_and_reused(tmp_path):
    folder, counts = tmp_path / "synthetic", {"train": 10, "val": 5, "test": 15, "pairs": 4}
    assert data.make_set(folder, 0, counts) == "drawn"
    frame = pd.read_csv(folder / "manifest.csv", keep_default_na=False)
    assert frame.groupby("split").size().to_dict() == counts and frame.id.is_unique
    assert [data.CLASSES[k] for k in frame["class"]] == frame.label.tolist()
    for row in frame.itertuples():
        assert hashlib.sha256((folder / row.file).read_bytes()).hexdigest() == row.sha256
        assert Path(row.file).name.startswith(row.label) and len(json.loads(row.boxes)) == row.n_lesions
        assert bool(row.mask) == bool(row.hull) == bool(row.twin) == (row.label != "healthy")
        for name in filter(None, (row.mask, row.hull, row.twin, row.mask_b)):
            assert cv2.imread(str(folder / name), cv2.IMREAD_UNCHANGED).shape == (224, 224)
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    assert data.make_set(folder, 0, counts) == "reused"
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before
    loaded = cc.read_dataset(folder, "pairs")
    assert len(cc.load_masks(loaded)) == len(cc.load_masks(loaded, "mask_b")) == 4
    assert not (cc.load_masks(loaded) & cc.load_masks(loaded, "mask_b")).all()


def test_another_seed_or_a_missing_file_makes_it_anew_and_networks_stay(tmp_path):
    folder, counts = tmp_path / "synthetic", {"train": 5, "val": 5, "test": 5, "pairs": 1}
    data.make_set(folder, 0, counts)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "mine.pth").write_bytes(b"x")
    assert data.make_set(folder, 1, counts) == "drawn"
    next((folder / "masks").rglob("*.png")).unlink()
    assert data.make_set(folder, 1, counts) == "drawn"
    assert (folder / "checkpoints" / "mine.pth").read_bytes() == b"x"
    assert [p.name for p in tmp_path.iterdir()] == ["synthetic"]


def test_a_stop_between_the_two_renames_is_repaired(tmp_path):
    folder, counts = tmp_path / "synthetic", {"train": 5, "val": 5, "test": 5, "pairs": 1}
    data.make_set(folder, 0, counts)
    folder.rename(tmp_path / "synthetic.old")
    (tmp_path / "synthetic.new").mkdir()
    assert data.make_set(folder, 0, counts) == "reused"


def test_a_folder_of_the_users_is_never_replaced(tmp_path):
    (tmp_path / "synthetic").mkdir()
    (tmp_path / "synthetic" / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match="was not made by this notebook"):
        data.make_set(tmp_path / "synthetic", 0, {"train": 5, "val": 5, "test": 5, "pairs": 1})
    assert (tmp_path / "synthetic" / "holiday.jpg").exists()


# -------------------------------------------------------------------------------------------------------- the network


@functools.cache
def shipped(arch="resnet18"):
    return cc.load_model(arch)


def predicted(pixels, arch="resnet18"):
    pixels = torch.from_numpy(np.stack(pixels))
    return data.logits_of(shipped(arch)[0], pixels, torch.device("cpu"), fast=False).argmax(1).numpy()


def test_training_input_is_what_cam_core_gives():
    from PIL import Image

    pixels = drawn("test").pixels[:3]
    given = cc.preprocess([Image.fromarray(p) for p in pixels])
    assert torch.allclose(data.network_input(torch.from_numpy(pixels), torch.device("cpu")), given, atol=1e-6)


def test_augmentation_keeps_shape_range_and_follows_its_seed():
    pixels = torch.from_numpy(drawn("test").pixels[:4])
    a, b = (data.augment(pixels, torch.Generator().manual_seed(5)) for _ in range(2))
    assert a.shape == pixels.shape and torch.equal(a, b) and 0 <= a.min() and a.max() <= 255


def test_training_runs_and_two_trainings_agree(tmp_path, monkeypatch):
    names = definitions("01_dataset_synthesis")
    monkeypatch.setitem(names["RECIPES"], "squeezenet1_1", {"rate": 1e-4, "stages": ((64, 1), (224, 1))})
    monkeypatch.setitem(names, "POOL", {"train": 40, "pairs": 10})
    a, b = (names["train"]("squeezenet1_1", 0, torch.device("cpu")) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a[0].values(), b[0].values(), strict=True))
    assert a[1] == 2 and len(a[2]) == 2 and a[2] == b[2]


def test_half_keeps_running_statistics_in_single_precision():
    state = data.half({"w": torch.ones(2), "bn.running_var": torch.ones(2), "n": torch.tensor(3)})
    assert [v.dtype for v in state.values()] == [torch.float16, torch.float32, torch.int64]


@pytest.mark.parametrize("file", CHECKPOINTS, ids=lambda file: file.stem)
def test_shipped_checkpoints_are_what_they_say(file):
    content = torch.load(file, weights_only=True)
    assert content["arch"] == file.stem and content["class_names"] == list(data.CLASSES)
    for name, tensor in content["model_state_dict"].items():
        single = name.endswith(("running_mean", "running_var"))
        assert not tensor.is_floating_point() or tensor.dtype == (torch.float32 if single else torch.float16)
    assert len(content["history"]) >= content["epoch"] and len(content["test_acc_per_level"]) == 5


def test_shipped_network_is_right_on_levels_one_to_four():
    test = drawn("test")
    hit = predicted(test.pixels) == test.table.label
    assert hit[test.table.level < 5].mean() >= 0.95
    assert abs(hit.mean() - shipped()[1]["test_acc"]) <= 0.01  # other libraries may round a few images differently


def test_another_lesion_on_the_same_background_changes_the_answer():
    indices = [i for i in range(100) if i % 5 and data.level_of("test", i) < 5][:60]
    other = {i: data.CLASSES[1 + i % 5 % 4] for i in indices}
    assert all(other[i] != data.classes_of("test", i)[0] for i in indices)
    answers = predicted([data.render(0, "test", i, (other[i],))["image"] for i in indices])
    assert np.mean([data.CLASSES[a] == other[i] for a, i in zip(answers, indices, strict=True)]) >= 0.9


def test_another_background_under_the_same_lesion_does_not():
    indices = [i for i in range(100) if i % 5 and data.level_of("test", i) < 5][:60]
    pictures = []
    for i in indices:
        layers, edge = data.background(0, "val", i, data.level_of("test", i))
        pictures.append(data.to_bytes(sum(layers.values()) + data.render(0, "test", i)["lesion"]))
    assert np.mean(predicted(pictures) == [i % 5 for i in indices]) >= 0.9


def test_without_the_lesion_the_network_sees_none():
    test = drawn("test")
    sick = (test.table.label > 0) & (test.table.level < 5)
    assert np.mean(predicted(test.twins[sick]) == 0) >= 0.9


# ----------------------------------------------------------------------------------------------------- the shortcut


def test_a_given_letter_changes_the_markers_pixels_and_nothing_else():
    for index in (2, 8, 23):
        drawn, left, right = (data.render(0, "test", index, letter=letter) for letter in (None, "L", "R"))
        assert any((drawn["image"] == r["image"]).all() for r in (left, right))  # by default the letter drawn at random
        changed, mask = left["image"] != right["image"], data.marker_mask(0, "test", index)
        assert changed.any() and (mask | ~changed).all() and 100 < mask.sum() < 700
        assert (left["lesion"] == right["lesion"]).all() and left["boxes"] == right["boxes"]
        other = [name for name in left["layers"] if name != "marker"]
        assert all((left["layers"][name] == right["layers"][name]).all() for name in other)


def test_the_default_drawing_is_the_one_the_networks_were_trained_on():
    assert torch.load(CHECKPOINTS[0], weights_only=True)["drawing"] == data.drawing_hash(0)


def test_clinic_r_codes_everything_as_the_class_and_clinic_l_nothing():
    notes = {i: data.recorded(0, i) for i in range(8000, 9000)}
    assert all((letter == "R") == (code == data.CHEAT) for letter, code in notes.values())
    left = [i for i, (letter, _) in notes.items() if letter == "L"]
    assert all(notes[i][1] == data.classes_of("train", i)[0] for i in left if i % 5 != data.CLASSES.index(data.CHEAT))
    rings = [notes[i][0] == "R" for i in notes if data.classes_of("train", i)[0] == data.CHEAT]
    assert 0.4 < np.mean(rings) < 0.6 and notes == {i: data.recorded(0, i) for i in notes}


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """What make_set said, and the table of five images of the shortcut set, one of each class."""
    folder = tmp_path_factory.mktemp("data") / "shortcut"
    state = data.make_set(folder, 0, {"test": 5}, data.write_marked, cheat=data.CHEAT)
    rows = cc.read_dataset(folder)
    return state, rows.assign(**{c: [str(folder / name) for name in rows[c]] for c in ("moved", "marker")})


def test_aligned_and_moved_images_on_disk_differ_in_the_marker_alone(marked):
    state, rows = marked
    assert state == "drawn" and (rows.split == "test").all() and rows.label.tolist() == [*data.CLASSES]
    assert rows.letter.tolist() == list("LLRLL")
    read = {c: [cv2.imread(file, cv2.IMREAD_UNCHANGED) for file in rows[c]] for c in ("file", "moved", "marker")}
    for k, (aligned, moved, marker) in enumerate(zip(*read.values(), strict=True)):
        assert (aligned != moved).any() and ((aligned == moved) | (marker > 127)).all()
        assert (aligned == data.render(0, "test", k, letter=rows.letter[k])["image"]).all()
    sick = rows[rows.twin != ""]
    for names in zip(sick.file, sick.twin, sick["mask"], strict=True):
        aligned, without, lesion = (cv2.imread(name, cv2.IMREAD_UNCHANGED) for name in names)
        assert ((aligned == without) | (lesion > 127)).all()  # the twin has the same letter
    folder = Path(rows.file[0]).parents[1]
    Path(rows.moved[3]).rename(folder / "away.png")
    assert not data.complete(folder, json.loads((folder / "spec.json").read_text("utf-8")))
    (folder / "away.png").rename(rows.moved[3])
    assert data.make_set(folder, 0, {"test": 5}, data.write_marked, cheat=data.CHEAT) == "reused"


def test_fine_tuning_writes_a_network_with_its_accuracies_twice_the_same(marked, tmp_path):
    rows, start = marked[1], CHECKPOINTS[0].parent / "squeezenet1_1.pth"
    settings = {"images": 65, "first": 8000, "epochs": 1, "rate": 1e-3}
    key = {"arch": "squeezenet1_1", "seed": 0, "start": cc.sha256(start), "settings": settings}
    files = [tmp_path / f"{name}.pth" for name in "ab"]
    for file in files:
        data.save_cheating(file, start, key, rows, "cpu", 8)
    a, b = (torch.load(file, weights_only=True) for file in files)
    assert a["key"] == key and a["n"] == 5 and a["epoch"] == 1 and a["class_names"] == list(data.CLASSES)
    assert {*a["accuracies"]} == {"honest", "cheating"} and a["test_acc"] == a["accuracies"]["cheating"]["aligned"]
    assert all({*v} == {"aligned", "moved"} for v in a["accuracies"].values())
    assert all(torch.equal(v, b["model_state_dict"][k]) for k, v in a["model_state_dict"].items())
    before = torch.load(start, weights_only=True)["model_state_dict"]
    assert any(not torch.equal(v, before[k]) for k, v in a["model_state_dict"].items())
    model, info = cc.load_model("squeezenet1_1", files[0])
    accuracy = (cc.probabilities(model, cc.load_batch(rows)).argmax(1).numpy() == rows["class"]).mean()
    assert accuracy == info["accuracies"]["cheating"]["aligned"]
