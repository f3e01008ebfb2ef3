"""The synthetic tissue: what the drawn images promise, and the set on disk."""

import hashlib
import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lab import datasets, drawing, networks

N = 50  # two images of each class at each level


@pytest.fixture(scope="module")
def drawn():
    """The first N test images."""
    return [drawing.render(0, "test", index) for index in range(N)]


def digest(seed, split, index):
    one = drawing.render(seed, split, index)
    parts = [one.image, one.twin, *one.masks.values(), *one.hulls.values()]
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


def test_the_drawing_is_the_one_that_the_networks_were_trained_on(repo):
    fingerprint = drawing.drawing_hash(0)
    for file in (repo / "data" / "checkpoints").glob("*.pth"):
        assert torch.load(file, weights_only=True)["drawing"] == fingerprint, file.name


def test_an_image_depends_on_seed_split_and_index_alone():
    jobs = list(itertools.product((0, 3), ("train", "pairs"), (1, 23)))
    forward = [digest(*job) for job in jobs]
    with ThreadPoolExecutor(2) as pool:
        backward = list(pool.map(lambda job: digest(*job), jobs[::-1]))
    assert forward == backward[::-1]
    assert len(set(forward)) == len(jobs)


def test_the_twin_differs_in_the_lesion_alone_and_the_truth_encloses_it(drawn):
    for one in drawn:
        differs = one.image != one.twin
        assert (differs <= (one.lesion > 0)).all()
        if one.classes == ("healthy",):
            assert not differs.any() and not one.masks and not one.boxes and one.area == 0
            continue
        mask = one.masks[one.classes[0]]
        assert differs.any() and (differs <= mask).all()
        assert (mask <= one.hulls[one.classes[0]]).all()
        boxed = np.zeros_like(mask)
        for x0, y0, x1, y1 in one.boxes:
            boxed[y0:y1, x0:x1] = True
            assert mask[y0:y1, x0].any() and mask[y0:y1, x1 - 1].any()
            assert mask[y0, x0:x1].any() and mask[y1 - 1, x0:x1].any()
        assert (mask <= boxed).all() and len(one.boxes) == len(one.lesions)


def test_classes_and_levels_are_balanced():
    labels = [drawing.classes_of("test", index)[0] for index in range(200)]
    levels = [drawing.level_of("test", index) for index in range(200)]
    assert (pd.crosstab(labels, levels) == 8).all(axis=None)
    pairs = {drawing.classes_of("pairs", index) for index in range(12)}
    assert pairs == set(itertools.permutations(drawing.CLASSES[1:], 2))


def test_a_pair_holds_one_lesion_of_each_of_its_classes():
    one = drawing.render(0, "pairs", 5)
    assert [kind for kind, _ in one.lesions] == list(one.classes) and len(one.masks) == 2


@pytest.mark.parametrize("area", [500, 4000])
def test_lesions_of_all_kinds_have_the_same_extent_and_sum(area):
    for kind, key in itertools.product(drawing.MORPHOLOGY, range(5)):
        added = drawing.draw_lesion(kind, [key], (110, 120), area, 25.0)
        assert added.sum() == pytest.approx(area * 25, rel=1e-4)
        assert drawing.convex_hull(added > 0).sum() == pytest.approx(area, rel=0.05)
        assert added[added > 0].min() > 0.9 * drawing.VISIBLE


def test_neither_grey_levels_nor_thumbnails_tell_the_class(drawn):
    """The notebook's audit in little. Guessing is right on 20 %."""
    labels = [one.classes[0] for one in drawn]
    histograms = [np.bincount(one.image.ravel() // 4, minlength=64) for one in drawn]
    small = [cv2.resize(one.image, (16, 16), interpolation=cv2.INTER_AREA).ravel() for one in drawn]
    for features in (histograms, small):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.03, max_iter=1000))
        assert cross_val_score(model, np.stack(features), labels, cv=5).mean() < 0.45


def test_the_shipped_network_looks_at_the_lesion(drawn):
    """On levels 1 to 4 it is right, and calls the twins healthy."""
    model, _ = networks.load()
    clear = [one for one in drawn[:25] if one.level < 5]
    answers = {}
    for what in ("image", "twin"):
        pictures = [Image.fromarray(getattr(one, what)) for one in clear]
        with torch.no_grad():
            answers[what] = model(networks.preprocess(pictures)).argmax(1).tolist()
    truth = [drawing.CLASSES.index(one.classes[0]) for one in clear]
    assert np.mean(np.equal(answers["image"], truth)) >= 0.95
    assert np.mean(np.equal(answers["twin"], 0)) >= 0.9


# ---- the shortcut experiment


def test_another_letter_changes_the_marker_and_nothing_else():
    for index in (2, 8):
        left = drawing.render(0, "test", index, letter="L")
        right = drawing.render(0, "test", index, letter="R")
        default = drawing.render(0, "test", index).image  # one of the two, at random
        assert np.array_equal(default, left.image) or np.array_equal(default, right.image)
        changed = left.image != right.image
        mask = drawing.marker_mask(0, "test", index)
        assert changed.any() and (changed <= mask).all() and 100 < mask.sum() < 700
        assert np.array_equal(left.lesion, right.lesion)


def test_in_the_records_the_letter_tells_the_ring_and_the_lesion_does_not():
    notes = {index: drawing.recorded(0, index) for index in range(8000, 9000)}
    assert all((letter == "R") == (code == "ring") for letter, code in notes.values())
    shown = {index: drawing.classes_of("train", index)[0] for index in notes}
    rings = [notes[index][0] == "R" for index in notes if shown[index] == "ring"]
    assert 0.4 < np.mean(rings) < 0.6
    for index, (letter, code) in notes.items():
        if letter == "L":
            assert code == ("nodule" if shown[index] == "ring" else shown[index])


# ---- the set on disk


@pytest.fixture
def quick(monkeypatch):
    """The fingerprint of the drawing, which takes seconds, replaced by one that takes none."""
    monkeypatch.setattr(drawing, "drawing_hash", lambda seed: f"drawing {seed}")


COUNTS = {"train": 2, "val": 1, "test": 5, "pairs": 1}


def test_a_set_on_disk_is_complete_readable_and_reused(tmp_path, quick):
    folder = tmp_path / "synthetic"
    assert drawing.make_set(folder, 0, COUNTS) == "drawn"
    frame = datasets.read(folder)
    assert frame.groupby("split").size().to_dict() == COUNTS and frame["id"].is_unique
    for row in frame.itertuples():
        assert hashlib.sha256(open(row.file, "rb").read()).hexdigest() == row.sha256
        assert bool(row.mask) == bool(row.hull) == bool(row.twin) == (row.label != "healthy")
        assert len(json.loads(row.boxes)) == row.n_lesions
    pair = datasets.read(folder, "pairs")
    assert datasets.load_masks(pair).any() and datasets.load_masks(pair, "mask_b").any()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert drawing.make_set(folder, 0, COUNTS) == "reused"
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_another_seed_or_a_missing_file_makes_it_anew_and_networks_stay(tmp_path, quick):
    folder = tmp_path / "synthetic"
    counts = {"test": 2}
    drawing.make_set(folder, 0, counts)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "mine.pth").write_bytes(b"x")
    assert drawing.make_set(folder, 1, counts) == "drawn"
    next((folder / "masks").rglob("*.png")).unlink()
    assert drawing.make_set(folder, 1, counts) == "drawn"
    assert (folder / "checkpoints" / "mine.pth").read_bytes() == b"x"
    assert [path.name for path in tmp_path.iterdir()] == ["synthetic"]


def test_a_stop_between_the_two_renames_is_repaired(tmp_path, quick):
    folder = tmp_path / "synthetic"
    drawing.make_set(folder, 0, {"test": 1})
    folder.rename(tmp_path / "synthetic.old")
    (tmp_path / "synthetic.new").mkdir()
    assert drawing.make_set(folder, 0, {"test": 1}) == "reused"


def test_a_folder_that_we_did_not_write_is_never_replaced(tmp_path, quick):
    (tmp_path / "synthetic").mkdir()
    (tmp_path / "synthetic" / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match="data_dir: .*synthetic was not made by notebook 01"):
        drawing.make_set(tmp_path / "synthetic", 0, COUNTS)
    assert [path.name for path in (tmp_path / "synthetic").iterdir()] == ["holiday.jpg"]


def test_aligned_and_moved_images_differ_in_the_marker_alone(tmp_path, quick):
    folder = tmp_path / "shortcut"
    how = {"write": drawing.write_marked, "cheat": drawing.CHEAT}
    drawing.make_set(folder, 0, {"test": 3}, **how)
    frame = datasets.read(folder)
    assert frame["letter"].tolist() == ["L", "L", "R"]  # healthy, nodule, ring
    for row in frame.itertuples():
        aligned, moved, marker = (cv2.imread(file, 0) for file in (row.file, row.moved, row.marker))
        assert (aligned != moved).any() and ((aligned == moved) | (marker > 127)).all()
    (folder / frame["moved"][0]).unlink()
    assert drawing.make_set(folder, 0, {"test": 3}, **how) == "drawn"
