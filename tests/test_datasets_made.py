"""The data sets that notebook 01 makes beside the synthetic one: photographs and CIFAR-10."""

import hashlib
import io
import json
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from lab import datasets, networks
from lab.networks import torchvision

CIFAR10 = torchvision.datasets.CIFAR10
NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()


def test_the_photographs_have_boxes_and_their_authors_are_named(tmp_path, repo):
    datasets.make_samples(tmp_path / "samples")
    frame = datasets.read(tmp_path / "samples")
    assert frame["id"].tolist() == ["chelsea", "coffee", "rocket"]
    for file, boxes in zip(frame["file"], frame["boxes"], strict=True):
        [[x0, y0, x1, y1]] = json.loads(boxes)
        width, height = Image.open(file).size
        assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
    names = networks.imagenet_classes()
    assert [names[k] for k in frame["class"]] == ["tabby", "espresso", "missile"]
    readme = (repo / "data" / "README.md").read_text("utf-8")
    for author in ("Stefan van der Walt, CC0", "Rachel Michetti, CC0", "public domain"):
        assert author in readme


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A folder with an archive of four images, which is on no server, and the images' pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    batch = {"data": pixels.transpose(0, 3, 1, 2).reshape(4, -1), "labels": [5, 5, 8, 0]}
    files = {
        "test_batch": pickle.dumps(batch),
        "batches.meta": pickle.dumps({"label_names": NAMES}),
    }
    folder = tmp_path / "cifar10"
    folder.mkdir()
    with tarfile.open(folder / CIFAR10.filename, "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    whole = hashlib.md5((folder / CIFAR10.filename).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:9/{CIFAR10.filename}")  # nobody listens
    monkeypatch.setattr(CIFAR10, "tgz_md5", whole)
    monkeypatch.setattr(CIFAR10, "train_list", [])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5["batches.meta"]})
    return folder, pixels


def test_an_archive_in_place_is_taken_and_the_set_is_that_of_the_batch(cifar):
    folder, pixels = cifar
    datasets.make_cifar10(folder, 3)
    frame = datasets.read(folder)
    assert frame["label"].tolist() == ["dog", "dog", "ship"] and frame["class"].tolist() == [
        5,
        5,
        8,
    ]
    assert frame["file"][2].endswith("test/ship_00002.png") and (frame["split"] == "test").all()
    for file, expected in zip(frame["file"], pixels, strict=False):
        assert np.array_equal(datasets.read_image(file), expected)
    datasets.make_cifar10(folder)
    assert len(datasets.read(folder)) == 4


def test_a_damaged_batch_is_taken_from_the_archive_again(cifar):
    folder, pixels = cifar
    datasets.make_cifar10(folder)
    (folder / "cifar-10-batches-py" / "test_batch").write_bytes(b"half of it")
    datasets.make_cifar10(folder)
    assert np.array_equal(datasets.read_image(datasets.read(folder)["file"][1]), pixels[1])


@pytest.mark.parametrize("state", ["cut off", "gone"])
def test_without_a_network_it_says_what_to_fetch_and_where_to_put_it(cifar, state):
    folder, _ = cifar
    archive = folder / CIFAR10.filename
    if state == "gone":
        archive.unlink()
    else:
        archive.write_bytes(archive.read_bytes()[:-20])
    with pytest.raises(ConnectionError) as caught:
        datasets.make_cifar10(folder)
    said = str(caught.value)
    assert f"fetch {CIFAR10.url} elsewhere and put it into {folder}" in said
    assert CIFAR10.tgz_md5 in said and "cut off" in said
    assert not (folder / "manifest.csv").exists()
