"""The data sets that notebook 01 makes beside the synthetic one: photographs and CIFAR-10."""

import hashlib
import io
import json
import pickle
import socket
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from lab import datasets, networks
from lab.networks import torchvision

CIFAR10 = torchvision.datasets.CIFAR10
NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()


def no_network(*given):
    raise OSError("the network was asked for")


def test_photographs_come_from_packages_with_boxes_and_their_authors_named(
    tmp_path, repo, monkeypatch
):
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    for _ in range(2):
        datasets.make_samples(tmp_path / "samples")
    frame = datasets.read(tmp_path / "samples").set_index("id")
    assert list(frame.index) == sorted(datasets.SAMPLES)
    readme = (repo / "data/README.md").read_text("utf-8")
    for name, row in frame.iterrows():
        assert f"| `{name}.png` |" in readme
        assert (row["class"] >= 0) == (row["boxes"] != "") == (row["truth"] == "boxes")
        for x0, y0, x1, y1 in json.loads(row["boxes"] or "[]"):
            width, height = Image.open(row["file"]).size
            assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
    names = networks.imagenet_classes()
    known = {name: names[k] for name, k in frame["class"].items() if k >= 0}
    expected = {"camera": "tripod", "chelsea": "tabby", "coffee": "espresso", "rocket": "missile"}
    assert known == expected


def test_the_photographs_of_foolbox_have_the_classes_of_their_names(tmp_path):
    datasets.make_foolbox(tmp_path / "foolbox")
    frame = datasets.read(tmp_path / "foolbox")
    assert len(frame) == 20 and (frame["split"] == "all").all()
    names = networks.imagenet_classes()
    for row in frame.itertuples():
        number = int(row.file.removesuffix(".jpg").rpartition("_")[2])
        assert row.label == names[number] and frame["class"][row.Index] == number
        assert datasets.read_image(row.file).size[0] >= 512
    assert datasets.class_indices(frame, names) == frame["class"].tolist()
    assert set(datasets.class_indices(frame, ["a", "jeep"])) == {-1, 1}


def test_foolbox_is_not_imported_and_its_absence_is_told_with_the_way_out(tmp_path, monkeypatch):
    datasets.make_foolbox(tmp_path / "foolbox")
    assert "foolbox" not in sys.modules
    monkeypatch.setattr(datasets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps foolbox==3.3.4"):
        datasets.make_foolbox(tmp_path / "none")
    assert not (tmp_path / "none/manifest.csv").exists()


def test_what_is_installed_is_what_the_requirements_say(repo):
    assert f"\n{datasets.FOOLBOX} " in (repo / "requirements.txt").read_text("utf-8")


def test_no_photograph_of_others_is_committed(repo):
    if not (repo / ".git").exists():
        pytest.skip("not a clone")
    files = ["data/samples/chelsea.png", "data/foolbox/a.jpg", "results/explain/a_original.png"]
    done = subprocess.run(["git", "check-ignore", *files], cwd=repo, capture_output=True, text=True)
    assert done.stdout.split() == files


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
