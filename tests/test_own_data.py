"""What notebook 01 makes besides the synthetic set: photographs, CIFAR-10, and networks trained on one's own images."""

import functools
import hashlib
import http.server
import io
import json
import tarfile
import threading

import numpy as np
import pytest
import torch
from nbcode import definitions
from PIL import Image

import cam_core as cc

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def book():
    return definitions("01_dataset_synthesis")


# ------------------------------------------------------------------------------------------------------------- samples


def test_the_photographs_have_boxes_inside_and_licences_named(book, tmp_path, repo):
    book["write_samples"](tmp_path / "samples")
    frame = cc.read_dataset(tmp_path / "samples")
    assert frame["id"].tolist() == ["chelsea", "coffee", "rocket"] and (frame["truth"] == "boxes").all()
    for name, file, boxes, number in zip(frame["id"], frame["file"], frame["boxes"], frame["class"], strict=True):
        (x0, y0, x1, y1), expected = book["SAMPLES"][name]
        width, height = Image.open(file).size
        assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
        assert json.loads(boxes) == [[x0, y0, x1, y1]] and number == expected
    names = cc.imagenet_classes()
    assert [names[number] for _, number in book["SAMPLES"].values()] == ["tabby", "espresso", "missile"]
    readme = (repo / "data" / "README.md").read_text("utf-8")
    assert all(author in readme for author in ("Stefan van der Walt, CC0", "Rachel Michetti, CC0", "public domain"))


# ------------------------------------------------------------------------------------------------------------ CIFAR-10


def batch(labels, seed=0):
    """A file in the binary version's format, and its images (n, 32, 32, 3)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (len(labels), 32, 32, 3), np.uint8)
    records = [bytes([label]) + p.transpose(2, 0, 1).tobytes() for label, p in zip(labels, pixels, strict=True)]
    return b"".join(records), pixels


def archive(folder, members):
    with tarfile.open(folder / "cifar-10-binary.tar.gz", "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return hashlib.md5((folder / "cifar-10-binary.tar.gz").read_bytes()).hexdigest()


def test_records_are_read_pixel_by_pixel(book):
    content, pixels = batch([3, 9, 0])
    found, labels = book["cifar_records"](content, "here")
    assert len(content) == 3 * 3073 and labels.tolist() == [3, 9, 0] and np.array_equal(found, pixels)


def test_a_damaged_batch_is_refused_with_the_place(book):
    content, _ = batch([1, 2])
    for cut in (content[:-1], content + b"x", b""):
        with pytest.raises(ValueError, match=f"here: {len(cut)} bytes.* record {len(cut) // 3073} is cut off"):
            book["cifar_records"](cut, "here")
    wrong = content[:3073] + bytes([11]) + content[3074:]
    with pytest.raises(ValueError, match="here: record 1 has label 11; labels go from 0 to 9"):
        book["cifar_records"](wrong, "here")


def test_the_set_on_disk_is_that_of_the_batch(book, tmp_path):
    content, pixels = batch([5, 5, 8, 0])
    book["write_cifar"](tmp_path, content, "here", 3)
    frame = cc.read_dataset(tmp_path)
    assert frame["label"].tolist() == ["dog", "dog", "ship"] and frame["class"].tolist() == [5, 5, 8]
    assert all(np.array_equal(cc.read_image(f), p) for f, p in zip(frame["file"], pixels, strict=False))
    assert (frame["split"] == "test").all() and cc.class_indices(frame, book["CIFAR_NAMES"]) == [5, 5, 8]
    book["write_cifar"](tmp_path, content, "here", 0)
    assert len(cc.read_dataset(tmp_path)) == 4


@pytest.mark.parametrize("place", ["test_batch.bin", "cifar-10-batches-bin/test_batch.bin"])
def test_a_plain_file_is_taken(book, tmp_path, place):
    content, _ = batch([1])
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_bytes(content)
    assert book["cifar_test_batch"](tmp_path, "https://nowhere.invalid/x.tar.gz", "0")[0] == content


def test_an_archive_in_place_is_read_and_nothing_unpacked(book, tmp_path):
    content, _ = batch([1, 7])
    there = tmp_path / "cifar10"
    there.mkdir()
    members = {"../escaped.txt": b"out", "cifar-10-batches-bin/test_batch.bin": content}
    md5 = archive(there, members)
    found, source = book["cifar_test_batch"](there, "https://nowhere.invalid/cifar-10-binary.tar.gz", md5)
    assert found == content and source.endswith("cifar-10-binary.tar.gz")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["cifar-10-binary.tar.gz", "cifar10"]
    (there / "cifar-10-binary.tar.gz").unlink()
    md5 = archive(there, {"other.bin": content})
    with pytest.raises(ValueError, match="holds no file cifar-10-batches-bin/test_batch.bin"):
        book["cifar_test_batch"](there, "https://nowhere.invalid/cifar-10-binary.tar.gz", md5)


def test_without_a_network_it_says_where_to_put_the_file(book, tmp_path):
    with pytest.raises(
        ConnectionError, match=rf"put it, or the test_batch.bin inside it, into {tmp_path}. Its MD5 must"
    ):
        book["cifar_test_batch"](tmp_path, "https://nowhere.invalid/cifar-10-binary.tar.gz", "0")


@pytest.fixture
def web(tmp_path):
    """A web server on the loopback: (its folder, its address)."""
    (tmp_path / "web").mkdir()
    handler = functools.partial(QuietHandler, directory=tmp_path / "web")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield tmp_path / "web", f"http://127.0.0.1:{server.server_port}/cifar-10-binary.tar.gz"
    server.shutdown()
    server.server_close()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_the_archive_is_fetched_once_and_its_checksum_compared(book, tmp_path, web):
    content, _ = batch([4])
    md5 = archive(web[0], {"cifar-10-batches-bin/test_batch.bin": content})
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "cifar-10-binary.tar.gz.part").write_bytes(b"of a run that was stopped")
    assert book["cifar_test_batch"](tmp_path / "here", web[1], md5)[0] == content
    assert [p.name for p in (tmp_path / "here").iterdir()] == ["cifar-10-binary.tar.gz"]
    (web[0] / "cifar-10-binary.tar.gz").unlink()
    assert book["cifar_test_batch"](tmp_path / "here", web[1], md5)[0] == content
    archive(web[0], {"cifar-10-batches-bin/test_batch.bin": content})
    with pytest.raises(ConnectionError, match=f"what came has the MD5 {md5}.* Its MD5 must be 0123"):
        book["cifar_test_batch"](tmp_path / "elsewhere", web[1], "0123")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_wrong_archive_in_place_is_refused_and_left(book, tmp_path):
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(b"half of it")
    with pytest.raises(ValueError, match="cifar-10-binary.tar.gz has the MD5 .* instead of 0123: cut off, or another"):
        book["cifar_test_batch"](tmp_path, "https://nowhere.invalid/cifar-10-binary.tar.gz", "0123")
    assert (tmp_path / "cifar-10-binary.tar.gz").read_bytes() == b"half of it"


def test_checksum_and_address_are_the_published_ones(book):
    assert book["CIFAR_MD5"] == "c32a1d4ab5d03f1284b67883e8d87530"
    assert book["CIFAR_URL"] == "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"


# ----------------------------------------------------------------------------------------------------------- own images

COLOURS = {"Rudo": (200, 60, 60), "Baya": (60, 200, 60), "Greg": (60, 60, 200)}


def own_folder(folder, count, splits=("train", "val", "test"), by_folder=False):
    rng = np.random.default_rng(0)
    for split in splits:
        for label, colour in COLOURS.items():
            for k in range(count):
                name = f"{label}/{split or 'x'}{k}.png" if by_folder else f"{label}_{k:03d}.jpg"
                file = folder / split / name
                file.parent.mkdir(parents=True, exist_ok=True)
                pixels = np.clip(np.array(colour) + rng.normal(0, 20, (40, 48, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(file)
    return cc.read_dataset(folder)


def test_a_folders_own_splits_are_kept_and_the_order_of_classes_is_the_given_one(book, tmp_path):
    frame = own_folder(tmp_path, 4)
    rows, names = book["own_images"](frame, ["Rudo", "Baya", "Greg"], 0)
    assert names == ["Rudo", "Baya", "Greg"] and rows.groupby("split").size().to_dict() == dict(
        train=12, val=12, test=12
    )
    assert (rows["label"] == [names[k] for k in rows["class"]]).all()
    assert book["own_images"](frame, [], 0)[1] == ["Baya", "Greg", "Rudo"]
    assert book["own_images"](frame, ["Greg", "Baya", "Rudo"], 0)[1] == ["Greg", "Baya", "Rudo"]


@pytest.mark.parametrize("count", [8, 20])
def test_a_loose_folder_is_divided_and_what_05_measures_is_not_trained_on(book, tmp_path, count):
    frame = own_folder(tmp_path, count, splits=("",), by_folder=True)
    rows, names = book["own_images"](frame, [], 3)
    assert set(rows["split"]) == {"train", "val", "test"} and len(rows) == 3 * count
    for split in ("train", "val", "test"):
        assert set(rows.loc[rows["split"] == split, "label"]) == set(names)
    if count == 20:
        assert set(rows.loc[rows["split"] == "test", "id"]) == set(cc.split_rows(frame, "test")["id"])
    again = book["own_images"](frame.sample(frac=1, random_state=1).sort_values("id"), [], 3)[0]
    assert rows.set_index("id")["split"].to_dict() == again.set_index("id")["split"].to_dict()


def test_classes_that_are_not_there_are_refused_with_the_nearest(book, tmp_path):
    frame = own_folder(tmp_path, 3)
    with pytest.raises(ValueError, match="no image of the folder is labelled 'Gregg'. Nearest: Greg"):
        book["own_images"](frame, ["Rudo", "Gregg"], 0)
    with pytest.raises(ValueError, match="9 images are labelled 'Baya', which is not among them"):
        book["own_images"](frame, ["Rudo", "Greg"], 0)
    with pytest.raises(ValueError, match="'Greg' is named 2 times"):
        book["own_images"](frame, ["Greg", "Greg", "Rudo", "Baya"], 0)
    for labels in ("", "Greg"):
        with pytest.raises(
            ValueError, match=f"tell {len(labels) // 4} labels, two or more are needed. Name all images"
        ):
            book["own_images"](frame.assign(label=labels), ["Greg"], 0)
    lonely = frame[(frame["label"] != "Baya") | (frame["split"] == "test")]
    with pytest.raises(ValueError, match="too few of Baya"):
        book["own_images"](lonely, [], 0)


def test_images_without_a_label_or_beside_the_splits_are_left_out(book, tmp_path):
    frame = own_folder(tmp_path, 3)
    frame.loc[frame["id"] == "train/Greg_000", "label"] = ""
    frame.loc[frame["id"] == "test/Greg_001", "split"] = "all"
    rows, _ = book["own_images"](frame, [], 0)
    assert set(frame["id"]) - set(rows["id"]) == {"train/Greg_000", "test/Greg_001"} and len(rows) == 25


@pytest.mark.parametrize("arch", ["resnet18", "squeezenet1_1", "mobilenet_v2", "densenet121", "vit_b_16"])
def test_the_last_layer_is_replaced(book, arch):
    model = cc.torchvision.models.get_model(arch, weights=None)
    side = 224 if arch == "vit_b_16" else 64
    with torch.no_grad():
        assert book["replaced_head"](model, 4).eval()(torch.zeros(1, 3, side, side)).shape == (1, 4)


@pytest.mark.parametrize("arch", ["inception_v3", "maxvit_t"])
def test_what_was_trained_with_a_new_last_layer_loads_again(book, tmp_path, arch):
    """Inception has a second head of 1000 outputs, and MaxViT's last layer no bias: the file fits what is read."""
    quick = {"init_weights": False} if arch == "inception_v3" else {}
    model = book["replaced_head"](cc.torchvision.models.get_model(arch, weights=None, **quick), 4)
    torch.save({"model_state_dict": model.state_dict(), "arch": arch}, tmp_path / "file.pth")
    loaded, info = cc.load_model("auto", tmp_path / "file.pth")
    assert len(info["class_names"]) == 4 and loaded.state_dict().keys() == model.state_dict().keys()


def test_a_network_without_such_a_layer_is_refused(book):
    with pytest.raises(ValueError, match="no last layer of 1000 outputs"):
        book["replaced_head"](torch.nn.Sequential(torch.nn.Linear(3, 10)), 4)


@pytest.fixture(scope="module")
def trained(book, tmp_path_factory):
    """A network of two layers trained on three colours: the folder of its files, the rows, the history, the states."""
    base = tmp_path_factory.mktemp("trained")
    rows, names = book["own_images"](own_folder(base / "images", 6), ["Rudo", "Baya", "Greg"], 0)

    def train():
        torch.manual_seed(0)
        net = cc.torchvision.models.get_model("resnet18", weights=None, num_classes=3)
        return net, book["learn"](net, rows, 32, 4, 9, 0, torch.device("cpu"))

    net, (history, *states) = train()
    about = {"class_names": names, "arch": "resnet18", "seed": 0, "start": "random", "key": "k"}
    book["save_own"](base / "out" / "resnet18.pth", net, rows, 32, states, history, about, 9, torch.device("cpu"))
    return base / "out", rows, history, states, train


def test_it_learns_and_keeps_the_best_epoch_and_the_last(trained):
    folder, _, history, ((best, best_state), (last, last_state)), _ = trained
    ranked = max(range(4), key=lambda k: (history[k]["val_acc"], -history[k]["val_loss"]))
    assert best == ranked + 1 and last == 4 and history[-1]["train_acc"] > 0.8
    for name, epoch, state in (("resnet18.pth", best, best_state), ("resnet18_final.pth", last, last_state)):
        content = torch.load(folder / name, weights_only=True)
        keys = {"model_state_dict", "class_names", "train_acc", "val_acc", "test_acc", "epoch", "arch", "size"}
        assert keys <= set(content) and content["epoch"] == epoch and content["class_names"] == ["Rudo", "Baya", "Greg"]
        assert content["val_acc"] == history[epoch - 1]["val_acc"] and 0 <= content["test_acc"] <= 1
        assert all(torch.equal(content["model_state_dict"][k], v) for k, v in state.items())
    assert sorted(p.name for p in folder.iterdir()) == ["resnet18.pth", "resnet18_final.pth"]


def test_the_same_training_twice_is_the_same(trained):
    _, _, history, states, train = trained
    _, (again, *more) = train()
    assert again == history
    assert all(torch.equal(a, b) for a, b in zip(states[1][1].values(), more[1][1].values(), strict=True))


def test_its_file_alone_says_all_that_is_needed(trained, book):
    folder, rows, *_ = trained
    model, info = cc.load_model("auto", folder / "resnet18.pth")
    assert info["arch"] == "resnet18" and info["class_names"] == ["Rudo", "Baya", "Greg"] and info["size"] == 32
    test = rows[rows["split"] == "test"]
    accuracy, loss = book["scores"](book["answers"](model, test, 32, 4), test)
    assert accuracy == pytest.approx(info["test_acc"]) and loss > 0


def test_the_key_of_a_training_depends_on_what_determines_it(book, tmp_path):
    rows, names = book["own_images"](own_folder(tmp_path, 3), [], 0)
    key = book["training_key"](rows, names, "resnet18", 4, 8, 0)
    assert key == book["training_key"](rows.copy(), list(names), "resnet18", 4, 8, 0)
    others = [(names[::-1], "resnet18", 4, 8, 0), (names, "vgg11", 4, 8, 0), (names, "resnet18", 5, 8, 0)]
    assert key not in [book["training_key"](rows, *other) for other in others]
    Image.new("RGB", (40, 48)).save(rows["file"][0])
    assert key != book["training_key"](rows, names, "resnet18", 4, 8, 0)


@pytest.mark.parametrize(("per_pass", "steps"), [(1, [4, 4, 4, 5]), (2, [8, 9]), (3, [12, 5]), (4, [17])])
def test_a_step_takes_four_times_batch_size_and_never_one_image(book, tmp_path, per_pass, steps):
    rows, _ = book["own_images"](own_folder(tmp_path, 6), [], 0)
    rows = rows.drop(index=rows.index[rows["split"] == "train"][0])  # 17 are left
    net, seen, measured = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 3)), [], []
    net.register_forward_pre_hook(lambda module, given: (seen if module.training else measured).append(len(given[0])))
    before = net[1].weight.clone()
    book["learn"](net, rows, 32, 1, per_pass, 0, torch.device("cpu"))
    assert seen == steps and not torch.equal(before, net[1].weight)
    assert max(measured) == per_pass and sum(measured) == 18


def test_best_is_the_smaller_loss_on_a_tie_then_the_earlier_epoch_and_each_file_holds_its_own(
    book, tmp_path, monkeypatch
):
    rows, names = book["own_images"](own_folder(tmp_path / "images", 3), [], 0)
    torch.manual_seed(0)
    net, cpu = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 3)), torch.device("cpu")
    told = iter([(0.5, 1.0), (0.9, 0.5), (0.9, 0.4), (0.9, 0.4), (0.2, 0.1)])
    with monkeypatch.context() as patch:
        patch.setitem(book, "scores", lambda p, rows: next(told))
        history, *states = book["learn"](net, rows, 32, 5, 4, 0, cpu)
    assert [epoch for epoch, _ in states] == [3, 5] and len(history) == 5
    monkeypatch.setitem(book, "scores", lambda p, rows: (p[:, 0].sum().item(), 0.0))
    book["save_own"](tmp_path / "net.pth", net, rows, 32, states, history, {"class_names": names}, 4, cpu)
    best, last = (torch.load(tmp_path / f"net{end}.pth", weights_only=True) for end in ("", "_final"))
    assert (best["epoch"], best["val_acc"]) == (3, 0.9) and (last["epoch"], last["val_acc"]) == (5, 0.2)
    for content, (_, state) in zip((best, last), states, strict=True):
        net.load_state_dict(state)
        assert content["test_acc"] == book["answers"](net, rows[rows["split"] == "test"], 32, 4)[:, 0].sum().item()
    assert torch.equal(best["model_state_dict"]["1.weight"], states[0][1]["1.weight"])
    assert torch.equal(last["model_state_dict"]["1.weight"], states[1][1]["1.weight"])
    assert not torch.equal(best["model_state_dict"]["1.weight"], last["model_state_dict"]["1.weight"])


def small_start(arch, count, seed):
    torch.manual_seed(seed)
    return cc.torchvision.models.get_model(arch, weights=None, num_classes=count), "random", 32


def test_a_finished_training_is_reused_until_something_changes(book, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(book, "starting_point", small_start)
    rows, names = book["own_images"](own_folder(tmp_path / "images", 3), [], 0)
    file, cpu = tmp_path / "out" / "resnet18.pth", torch.device("cpu")
    _, first = book["own_network"](file, rows, names, "resnet18", 1, 8, 0, cpu)
    written, final = file.stat().st_mtime_ns, file.with_name("resnet18_final.pth").read_bytes()
    assert "reused" not in capsys.readouterr().out and first["class_names"] == names
    _, again = book["own_network"](file, rows, names, "resnet18", 1, 8, 0, cpu)
    assert "reused" in capsys.readouterr().out and file.stat().st_mtime_ns == written
    assert again["sha256"] == first["sha256"]
    _, other = book["own_network"](file, rows, names, "resnet18", 1, 8, 1, cpu)
    assert "reused" not in capsys.readouterr().out and other["sha256"] != first["sha256"] and other["seed"] == 1
    assert file.with_name("resnet18_final.pth").read_bytes() != final


def test_without_imagenet_weights_it_starts_from_random_ones_and_says_so(book, capsys, monkeypatch):
    def offline(*args):
        raise ConnectionError("no network here")

    monkeypatch.setattr(cc, "load_model", offline)
    model, start, side = book["starting_point"]("squeezenet1_1", 3, 0)
    assert (start, side) == ("random", 224) and all(p.requires_grad for p in model.parameters())
    assert "no network here\n-> squeezenet1_1 is trained from random weights" in capsys.readouterr().out
    twin = book["starting_point"]("squeezenet1_1", 3, 0)[0]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))


def test_with_imagenet_weights_all_but_the_last_layer_is_kept(book, monkeypatch):
    ready = cc.torchvision.models.get_model("resnet18", weights=None).requires_grad_(False)
    kept = ready.layer4[1].conv2.weight.clone()
    monkeypatch.setattr(cc, "load_model", lambda *args: (ready, {"weights": "IMAGENET1K_V1", "size": 224}))
    model, start, side = book["starting_point"]("resnet18", 4, 0)
    assert (start, side) == ("IMAGENET1K_V1", 224) and model.fc.out_features == 4
    assert torch.equal(model.layer4[1].conv2.weight, kept) and all(p.requires_grad for p in model.parameters())


def test_sizes_are_read_from_headers(book, tmp_path):
    Image.new("RGB", (7, 5)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    assert book["size_of"](tmp_path / "a.png") == (7, 5)
    assert all(np.isnan(side) for side in book["size_of"](tmp_path / "b.png"))
