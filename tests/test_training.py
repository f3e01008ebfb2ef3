"""Training: own folders, the loop's promises, checkpoints, and the two other uses."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from lab import datasets, drawing, networks, runs, sha256, training
from lab.networks import torchvision

COLOURS = {"Rudo": (200, 60, 60), "Baya": (60, 200, 60), "Greg": (60, 60, 200)}
CPU = torch.device("cpu")


def photographs(folder, count, layout):
    """`count` noisy pictures of each colour (and split), named after {split}, {label}, {k}."""
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test") if "{split}" in layout else ("",):
        for label, colour in COLOURS.items():
            for k in range(count):
                file = folder / layout.format(split=split, label=label, k=k)
                file.parent.mkdir(parents=True, exist_ok=True)
                pixels = np.array(colour) + rng.normal(0, 20, (40, 48, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file)
    return datasets.read(folder)


def small_start(arch, count, seed):
    """In the place of `starting_point`: nothing is downloaded, images have 32 pixels, and batch
    normalisation follows quickly, so that a few steps are enough.
    """
    torch.manual_seed(seed)
    model = torchvision.models.get_model(arch, weights=None, num_classes=count)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.5
    return model, "random", 32


# ---- a folder of your own


def test_it_learns_from_a_folder_and_what_is_finished_is_reused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "starting_point", small_start)
    photographs(tmp_path / "pets", 6, "{split}/{label}_{k}.png")
    given = {"dataset": str(tmp_path / "pets"), "classes": "Rudo,Baya,Greg", "device": "cpu"}
    given |= {"data_dir": str(tmp_path / "data"), "results_dir": str(tmp_path / "out")}
    run = runs.open(1, **given, epochs=3, batch_size=1)
    rows = training.on_folder(run)
    assert run.info["class_names"] == ["Rudo", "Baya", "Greg"] and run.info["size"] == 32
    test = rows[rows["split"] == "test"]
    p = training.predict(run.model, training.from_table(test, 3, 32))
    accuracy = np.mean(p.argmax(1).numpy() == test["class"])
    assert accuracy == pytest.approx(run.info["test_acc"]) and accuracy > 0.8
    best = max(run.info["history"], key=lambda line: (line["val_acc"], -line["val_loss"]))
    assert run.info["history"][run.info["epoch"] - 1] == best
    file = Path(run.weights)
    final = torch.load(file.with_name("resnet18_final.pth"), weights_only=True)
    assert final["epoch"] == 3 and final["start"] == "random"
    assert networks.load("auto", file)[1]["class_names"] == ["Rudo", "Baya", "Greg"]
    written = file.stat().st_mtime_ns
    training.on_folder(run)
    assert "reused" in capsys.readouterr().out and file.stat().st_mtime_ns == written


def test_a_training_is_done_again_when_what_determines_it_changes(tmp_path):
    rows, names = training.own_images(photographs(tmp_path, 2, "{split}/{label}_{k}.png"), [], 0)
    given = {"arch": "resnet18", "epochs": 4, "batch_size": 8, "seed": 0}
    key = training.training_key(rows, names, **given)
    assert key == training.training_key(rows.copy(), list(names), **given)
    assert key != training.training_key(rows, names[::-1], **given)
    for name, value in {"arch": "vgg11", "epochs": 5, "batch_size": 4, "seed": 1}.items():
        assert key != training.training_key(rows, names, **{**given, name: value})
    Image.new("RGB", (40, 48)).save(rows["file"][0])
    assert key != training.training_key(rows, names, **given)


def test_a_folders_own_splits_and_the_given_order_are_kept(tmp_path):
    frame = photographs(tmp_path, 2, "{split}/{label}_{k}.png")
    rows, names = training.own_images(frame, ["Rudo", "Baya", "Greg"], 0)
    assert names == ["Rudo", "Baya", "Greg"]
    assert rows["split"].value_counts().to_dict() == {"train": 6, "val": 6, "test": 6}
    assert [names[k] for k in rows["class"]] == rows["label"].tolist()
    assert training.own_images(frame, [], 0)[1] == ["Baya", "Greg", "Rudo"]
    frame.loc[0, "label"] = ""
    frame.loc[1, "split"] = "all"
    assert set(training.own_images(frame, [], 0)[0]["id"]) == set(frame["id"][2:])


@pytest.mark.parametrize("count", [8, 20])
def test_what_05_measures_is_not_trained_on(tmp_path, count):
    frame = photographs(tmp_path, count, "{label}/{k}.png")
    rows, names = training.own_images(frame, [], 3)
    assert len(rows) == 3 * count
    for split in ("train", "val", "test"):
        assert set(rows.loc[rows["split"] == split, "label"]) == set(names)
    tested = set(rows.loc[rows["split"] == "test", "id"])
    if count == 20:
        assert tested == set(datasets.split_rows(frame, "test")["id"])
    else:
        assert len(tested) == 3  # 15 % of eight, of each class
    again, _ = training.own_images(frame, [], 3)
    assert again["split"].tolist() == rows["split"].tolist()


def test_names_that_do_not_fit_the_labels_are_refused_with_the_nearest(tmp_path):
    frame = photographs(tmp_path, 2, "{split}/{label}_{k}.png")

    def refused(names, frame=frame):
        with pytest.raises(ValueError) as caught:
            training.own_images(frame, names, 0)
        return str(caught.value)

    assert "no image of the folder is labelled 'Gregg'. Nearest: Greg" in refused(["Rudo", "Gregg"])
    assert "6 images are labelled 'Baya', which is not among" in refused(["Rudo", "Greg"])
    assert "'Greg' is named 2 times" in refused(["Greg", "Greg", "Rudo", "Baya"])
    assert "tell 0 labels, two or more" in refused([], frame.assign(label=""))
    assert "tell 1 labels, two or more" in refused([], frame.assign(label="Greg"))
    lonely = frame[(frame["label"] != "Baya") | (frame["split"] == "test")]
    assert "too few of Baya" in refused([], lonely)


def test_without_imagenet_weights_it_starts_from_random_ones_and_says_so(capsys, monkeypatch):
    def offline(*args):
        raise ConnectionError("no network here")

    monkeypatch.setattr(networks, "load", offline)
    model, start, size = training.starting_point("squeezenet1_1", 3, 0)
    assert (start, size) == ("random", 224)
    assert "no network here\n-> squeezenet1_1 is trained from random" in capsys.readouterr().out
    again, _, _ = training.starting_point("squeezenet1_1", 3, 0)
    assert all(map(torch.equal, model.parameters(), again.parameters()))


@pytest.mark.parametrize("arch", ["resnet18", "squeezenet1_1", "inception_v3"])
def test_the_last_layer_is_replaced(arch):
    quick = {"init_weights": False} if arch == "inception_v3" else {}
    with torch.device("meta"):
        model = torchvision.models.get_model(arch, weights=None, **quick)
        size = 299 if arch == "inception_v3" else 224
        logits = training.replaced_head(model, 4).eval()(torch.zeros(1, 3, size, size))
    assert logits.shape == (1, 4)


def test_a_network_without_such_a_layer_is_refused():
    with pytest.raises(ValueError, match="no last layer of 1000 outputs"):
        training.replaced_head(nn.Sequential(nn.Linear(3, 10)), 4)


# ---- the loop


def test_inputs_are_those_of_preprocess_and_an_augmentation_keeps_their_shape():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8))
    images = training.Images(lambda k: picture, torch.eye(2), 64)
    assert torch.allclose(images[0][0], networks.preprocess(picture, 64)[0], atol=1e-5)
    for augment in (training.mirrored_and_shifted, training.turned_and_shifted):
        torch.manual_seed(0)
        varied = images.at(64, augment(64))
        assert varied[0][0].shape == (3, 64, 64) and not torch.equal(varied[0][0], images[0][0])


def test_every_image_is_in_one_batch_and_a_single_one_joins_the_batch_before():
    for n in range(1, 30):
        for size in range(1, 9):
            order = training.Batches(n, size)
            batches = list(order)
            assert sorted(sum(batches, [])) == list(range(n)) and len(batches) == len(order)
            if size > 1 and n > 1:
                assert all(2 <= len(batch) <= size + 1 for batch in batches)


def flat(classes=2, size=8):
    """A linear network, and ten images of one pixel value each; class 1 is bright."""
    torch.manual_seed(0)
    levels = [20 * k for k in range(10)]
    targets = nn.functional.one_hot(torch.tensor([level > 90 for level in levels]).long(), classes)
    images = training.Images(
        lambda k: Image.new("RGB", (8, 8), (levels[k],) * 3), targets.float(), size
    )
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, classes)), images


def test_the_best_epoch_has_the_smaller_loss_on_a_tie_then_it_is_the_earlier(monkeypatch):
    told = iter([(0.5, 1.0), (0.9, 0.5), (0.9, 0.4), (0.9, 0.4), (0.2, 0.1)])
    monkeypatch.setattr(training, "evaluate", lambda *given: next(told))
    model, images = flat()
    recipe = training.Recipe(((8, 5),), 0.01, 3)
    history, best, last = training.learn(model, recipe, images, images, 0, CPU)
    assert (best[0], last[0], len(history)) == (3, 5, 5)
    assert not torch.equal(best[1]["1.weight"], last[1]["1.weight"])
    assert torch.equal(last[1]["1.weight"], model[1].weight)


def test_a_small_stage_is_never_kept_and_the_same_training_is_the_same():
    found = []
    for _ in range(2):
        _, images = flat()
        net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
        recipe = training.Recipe(((8, 6), (16, 3)), 0.5, 4)
        found.append(training.learn(net, recipe, images, images, 0, CPU))
    assert found[0][0] == found[1][0] and found[0][1][0] > 6
    assert torch.equal(found[0][1][1]["2.weight"], found[1][1][1]["2.weight"])
    assert found[0][0][-1]["val_acc"] >= 0.9  # and it has learned what bright is


# ---- checkpoints and the two other uses


def test_half_precision_spares_running_statistics_and_a_file_is_written_in_one_step(tmp_path):
    state = {"w": torch.ones(2), "bn.running_var": torch.ones(2), "n": torch.tensor(3)}
    rounded = training.half(state)
    assert [v.dtype for v in rounded.values()] == [torch.float16, torch.float32, torch.int64]
    training.save(tmp_path / "new" / "a.pth", rounded, arch="x", epoch=3)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.pth"]
    assert training.known(tmp_path / "new" / "a.pth")["epoch"] == 3
    assert training.known(tmp_path / "none.pth") == {}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of notebook 01 in a folder of its own; its drawings are noise, quickly made."""

    def noise(seed, split, indices, letters=""):
        targets = torch.eye(5)[torch.tensor([index % 5 for index in indices])]
        rng = np.random.default_rng(seed)
        pixels = rng.integers(0, 255, (len(indices), 32, 32), np.uint8)
        return training.Images(lambda k: Image.fromarray(pixels[k]).convert("RGB"), targets, 32)

    monkeypatch.setattr(training, "from_drawings", noise)
    monkeypatch.setattr(drawing, "drawing_hash", lambda seed: f"drawing {seed}")
    given = {"data_dir": str(tmp_path / "data"), "results_dir": str(tmp_path / "out")}
    return lambda **more: runs.open(1, device="cpu", arch="squeezenet1_1", **given, **more)


def test_retraining_leaves_a_checkpoint_that_is_used_and_reused(run, monkeypatch, capsys):
    recipe = training.Recipe(((32, 1), (48, 1)), 1e-4, 8)
    monkeypatch.setitem(training.RECIPES, "squeezenet1_1", recipe)
    monkeypatch.setattr(training, "POOL", {"train": 16, "pairs": 4})
    here = run(retrain=True)
    training.on_drawings(here)
    assert "training squeezenet1_1" in capsys.readouterr().out
    info = here.info  # of run.model, from the file
    assert (info["epoch"], info["seed"], info["drawing"]) == (2, 0, "drawing 0")
    assert info["class_names"] == list(drawing.CLASSES) and len(info["test_acc_per_level"]) == 5
    training.on_drawings(here)
    training.on_drawings(run())  # the one that ships
    assert "training" not in capsys.readouterr().out


def test_the_cheating_network_is_kept_with_its_accuracies_and_key(run, monkeypatch, tmp_path):
    monkeypatch.setattr(training, "FINE", {"images": 5, "first": 8000, "epochs": 1, "rate": 1e-3})
    monkeypatch.setattr(drawing, "SIZE", 64)
    here = run(shortcut=True)
    Image.new("L", (64, 64), 90).save(tmp_path / "a.png")
    rows = pd.DataFrame({"file": [str(tmp_path / "a.png")] * 2, "class": [0, 2]})
    _, info = training.on_clinics(here, rows.assign(moved=rows["file"]))
    assert info["key"]["start"] == here.info["sha256"] and info["n"] == 2
    for accuracy in (info["accuracies"]["honest"], info["accuracies"]["cheating"]):
        assert set(accuracy) == {"aligned", "moved"}
    assert info["sha256"] != here.info["sha256"]
    again = training.on_clinics(here, rows.assign(moved=rows["file"]))[1]
    assert again["sha256"] == info["sha256"]
    file = here.data / "shortcut" / "checkpoints" / "squeezenet1_1.pth"
    assert sha256(file) == info["sha256"]


def test_bfloat16_is_used_where_the_processor_has_it(monkeypatch):
    for has, native in (
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"architecture": "aarch64", "bf16": True}, True),
        ({"avx512_f": True, "avx2": True}, False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: has)
        assert networks.native_bf16("cpu") == native
    assert not networks.native_bf16("mps")
