"""Reading images and folders: a picture as it looks, or a ValueError that names the file."""

import io
import json
import sys
import urllib.error
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from lab import RUN_ID, datasets, networks, pictures, runs

RED = (255, 0, 0)


def noise(height=20, width=30, seed=0):
    """A picture whose every pixel differs: (H, W, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path, pixels=None, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise() if pixels is None else np.asarray(pixels)).save(path, **kwargs)
    return path


def read(path):
    return np.asarray(datasets.read_image(path))


# ---- images


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tiff", "a.PNG"])
def test_lossless_files_are_read_exactly(tmp_path, name):
    assert np.array_equal(read(save(tmp_path / name)), noise())


@pytest.mark.parametrize(
    ("orientation", "stored"),
    [
        (3, Image.Transpose.ROTATE_180),
        (5, Image.Transpose.TRANSPOSE),
        (8, Image.Transpose.ROTATE_270),
    ],
)
def test_a_turned_photograph_comes_back_upright(tmp_path, orientation, stored):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(noise()).transpose(stored).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read(tmp_path / "turned.png"), noise())


def test_16_bits_and_floats_are_scaled_and_not_cut_off(tmp_path):
    values = np.arange(256).reshape(16, 16)
    deep = read(save(tmp_path / "deep.png", (257 * values).astype(np.uint16)))
    unit = read(save(tmp_path / "unit.tif", (values / 255).astype(np.float32)))
    for found in (deep, unit):
        assert np.abs(found[..., 0].astype(int) - values).max() <= 1
    dark = read(save(tmp_path / "dark.png", (4 * values).astype(np.uint16)))
    assert dark.max() <= 4  # a dark picture stays dark
    for wrong in ([-1000.0, 0.0], [np.nan, 1.0]):  # Hounsfield units would come out upside down
        with pytest.raises(ValueError, match="ct.tif has grey values from"):
            read(save(tmp_path / "ct.tif", np.array([wrong], np.float32)))


def test_transparency_is_laid_on_white_and_other_modes_become_rgb(tmp_path):
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0] = [(*RED, 255), (*RED, 0), (0, 0, 0, 51)]  # a fifth of black on white is 204
    found = read(save(tmp_path / "a.png", pixels))
    assert found[0].tolist() == [list(RED), [255] * 3, [204] * 3]
    grey = noise()[..., 0]
    assert np.array_equal(read(save(tmp_path / "l.png", grey))[..., 2], grey)
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "c.jpg", quality=100)
    assert np.abs(read(tmp_path / "c.jpg").astype(int) - RED).max() <= 3


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # it warns of what it repairs
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_a_damaged_file_gives_an_image_or_a_valueerror_that_names_it(tmp_path, kind):
    buffer = io.BytesIO()
    Image.fromarray(noise(16, 16)).save(buffer, kind)
    whole = buffer.getvalue()
    rng = np.random.default_rng(0)
    file = tmp_path / "damaged"
    for trial in range(60):
        content = bytearray(whole)
        if trial % 2:
            del content[int(rng.integers(len(content))) :]
        for position in rng.integers(len(content), size=trial % 3) if content else ():
            content[position] = int(rng.integers(256))
        file.write_bytes(content)
        try:
            assert datasets.read_image(file).mode == "RGB"
        except ValueError as error:
            assert "damaged" in str(error)
    with pytest.raises(ValueError, match="there is no file .*gone.png"):
        datasets.read_image(tmp_path / "gone.png")


def test_preprocess_by_hand_and_the_whole_picture_is_squashed():
    x = networks.preprocess(Image.new("RGB", (5, 4), (255, 0, 51)), 8)
    expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    assert x.shape == (1, 3, 8, 8) and x[0, :, 3, 3].tolist() == pytest.approx(expected, abs=1e-6)
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:10, :30] = 255
    red = networks.preprocess(Image.fromarray(wide), 24)[0, 0]
    assert red[2, 2] > 2 and red[2, 21] < -2 and red[21, 2] < -2


# ---- folders


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["IMG_001.jpg", "IMG_002.JPG"], ["", ""]),  # one name for all tells nothing
        (["cat_1.png", "dog_2.png", "holiday.png"], ["", "", ""]),
        (["big_dog_1.png", "cat_1.png"], ["big_dog", "cat"]),
        (["cat/a.png", "dog/deep/c_3.png"], ["cat", "dog"]),
        (["test/cat_0.png", "val/dog_0.png"], ["cat", "dog"]),
        (["test/cat/0.png", "val/dog/0.png"], ["cat", "dog"]),
    ],
)
def test_layouts_of_folders_and_what_they_tell(tmp_path, names, labels):
    for name in names:
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    save(tmp_path / ".cache" / "thumb.png")
    frame = datasets.read(tmp_path)
    assert frame["label"].tolist() == labels and frame["id"].is_unique
    splits = [name.split("/")[0] if name[:4] in ("test", "val/") else "all" for name in names]
    assert frame["split"].tolist() == splits
    if "test" in splits:
        assert len(datasets.read(tmp_path, "test")) == 1
        with pytest.raises(ValueError, match="has no split 'train'; it has test, val"):
            datasets.read(tmp_path, "train")


def test_masks_and_twins_beside_the_images_and_two_files_of_one_name(tmp_path):
    for name in (
        "test/cat_1.jpg",
        "test/dog_2.jpg",
        "masks/test/cat_1.png",
        "twins/test/dog_2.png",
    ):
        save(tmp_path / name)
    frame = datasets.read(tmp_path)
    assert frame["mask"].tolist() == [str(tmp_path / "masks/test/cat_1.png"), ""]
    assert frame["twin"].tolist() == ["", str(tmp_path / "twins/test/dog_2.png")]
    save(tmp_path / "test/cat_1.png")
    assert datasets.read(tmp_path)["id"].is_unique


def test_a_manifest_is_read_as_text_and_sorted(tmp_path):
    rows = [
        {"id": "008", "split": "test", "label": "NA", "file": "b.png", "mask": "", "area": 0.0},
        {
            "id": "007",
            "split": "test",
            "label": "ring",
            "file": "a.png",
            "mask": "m.png",
            "area": 0.1,
        },
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "manifest.csv", index=False)
    frame = datasets.read(tmp_path)
    assert frame["id"].tolist() == ["007", "008"] and frame["label"].tolist() == ["ring", "NA"]
    assert frame["mask"].tolist() == [str(tmp_path / "m.png"), ""] and frame["area"][0] == 0.1


@pytest.mark.parametrize(
    ("names", "places"),
    [
        ("Train/cat/a valid/cat/b Testing/dog/c", "train:cat val:cat test:dog"),
        ("archive/TRAIN/cat/a archive/dev/dog/b", "train:cat val:dog"),
        ("images/train/cat/a images/val2017/dog/b", "train:cat val:dog"),
        ("training_set/cat/a Test-Images/dog/b", "train:cat test:dog"),
        ("seg_train/seg_train/sea/a seg_test/seg_test/ice/b", "train:sea test:ice"),
        ("cat_train/a cat_test/b dog_train/c dog_test/d", "train:cat test:cat train:dog test:dog"),
        ("cat/train/a dog/test/b", "train:cat test:dog"),
        ("train/a test/train/b test/car/c", "train: test:train test:car"),
        ("train_1 test_2", "train: test:"),
        ("Train/cat/a Train/dog/b", "train:cat train:dog"),
        ("photos/cat/a photos/dog/b", "all:cat all:dog"),
    ],
)
def test_splits_are_known_by_any_of_their_names_and_never_taken_as_labels(tmp_path, names, places):
    expected = {}
    for name, place in zip(names.split(), places.split(), strict=True):
        save(tmp_path / f"{name}.png")
        expected[name] = tuple(place.split(":"))
    frame = datasets.read(tmp_path)
    found = zip(frame["split"], frame["label"], strict=True)
    assert dict(zip(frame["id"], found, strict=True)) == expected


def test_what_may_be_a_split_or_lies_beside_one_is_said(tmp_path):
    for name in ("train/a.png", "test/b.png", "more/c.png"):
        save(tmp_path / "one" / name)
    with pytest.warns(UserWarning, match="1 images lie beside .* not measured: more/c.png"):
        assert datasets.read(tmp_path / "one")["split"].tolist() == ["all", "test", "train"]
    for name in ("ISIC_Training_Input/a.png", "other/b.png"):
        save(tmp_path / "two" / name)
    with pytest.warns(UserWarning, match="ISIC_Training_Input is taken as the name of a class"):
        datasets.read(tmp_path / "two")


def test_training_images_are_never_measured(tmp_path):
    for k in range(60):
        save(tmp_path / f"train/{k}.png", noise(4, 4, seed=k))
    with pytest.raises(ValueError, match="no test images, only train"):
        datasets.split_rows(datasets.read(tmp_path), "test")
    assert datasets.split_rows(datasets.read(tmp_path), "val").empty
    for k in range(60):
        save(tmp_path / f"valid/{k}.png", noise(4, 4, seed=100 + k))
    frame = datasets.read(tmp_path)
    halves = [set(datasets.split_rows(frame, split)["id"]) for split in ("val", "test")]
    assert halves[0] | halves[1] == set(frame["id"][frame["split"] == "val"])
    assert not halves[0] & halves[1] and min(map(len, halves)) > 15


# ---- kinds of files


@pytest.mark.parametrize("name", "a.ppm a.pgm a.gif a.avif a.jp2 a.WEBP a.tga a.jpe".split())
def test_whatever_pillow_opens_is_read(tmp_path, name):
    Image.new("RGB", (40, 30), (200, 200, 200)).convert("L").convert("RGB").save(tmp_path / name)
    frame = datasets.read(tmp_path)
    assert frame["id"].tolist() == ["a"]
    assert np.abs(read(frame["file"][0]).astype(int) - 200).max() <= 3


def test_of_an_animation_the_first_frame_is_taken_and_said(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match="film.gif has several frames; its first is taken"):
        assert read(tmp_path / "film.gif")[0, 0].tolist() == list(RED)


@pytest.mark.parametrize("name", ["b.HEIC", "b.dcm", "b.svg", "b.NEF", "b.eps"])
def test_an_image_that_cannot_be_read_is_named_and_counted(tmp_path, name):
    save(tmp_path / "a.png")
    (tmp_path / name).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (tmp_path / "notes.txt").write_text("no picture")
    rows, left_out = datasets.readable(datasets.read(tmp_path))
    assert rows["id"].tolist() == ["a"] and left_out["id"].tolist() == ["b"]
    assert f"{name} cannot be read" in left_out["reason"][0]
    assert "Convert it to PNG or JPEG" in left_out["reason"][0]
    assert ("pillow-heif" in left_out["reason"][0]) == (name == "b.HEIC")


def test_a_phones_photograph_is_read_where_its_package_is_installed(tmp_path, monkeypatch):
    def register():
        opener = Image.OPEN["PNG"]
        Image.register_open("HEIF", *opener)

    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    plugin = SimpleNamespace(register_heif_opener=register)
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    with monkeypatch.context() as only_heif:
        only_heif.setattr(pictures, "FORMATS", [])
        save(tmp_path / "a.png").rename(tmp_path / "a.heic")
        assert np.array_equal(read(tmp_path / "a.heic"), noise())


def test_a_folder_without_images_says_what_it_has(tmp_path):
    for name in ("a.mp4", "b.mp4", "c.txt"):
        (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=r"holds no images. It has 2 of .mp4, 1 of .txt"):
        datasets.read(tmp_path)
    (tmp_path / "d.heic").write_text("")
    with pytest.raises(ValueError, match="none of its 1 images can be read.*Convert it"):
        datasets.readable(datasets.read(tmp_path))


# ---- masks


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("x.png", "x_mask.png"),
        ("cat/x.jpg", "cat/x-mask.jpg"),
        ("x (1).png", "x (1)_Mask.tif"),
        ("ISIC_01.jpg", "ISIC_01_segmentation.png"),
        ("x.jpg", "x.gt.png"),
        ("test/cat/x.jpg", "masks/test/cat/x.bmp"),
        ("test/cat/x.jpg", "Masks/test/cat/x_mask.png"),
        ("test/images/x.jpg", "test/masks/x.png"),
        ("images/x.jpg", "labels/x.png"),
        ("train/x.jpg", "train_masks/x_mask.gif"),
        ("mask/x.jpg", "masks/mask/x.png"),
        ("cat/x.jpg", "masks/x.png"),
        ("jar/test/hole/x.png", "jar/ground_truth/hole/x_mask.png"),
    ],
)
def test_a_mask_is_known_by_its_name_and_never_explained(tmp_path, image, mask):
    for name in (image, mask, f"{Path(image).parent}/y.png"):
        save(tmp_path / name)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        frame = datasets.read(tmp_path).set_index("file")
    assert len(frame) == 2
    assert frame["mask"].to_dict() == {
        str(tmp_path / image): str(tmp_path / mask),
        str(tmp_path / image).replace(Path(image).name, "y.png"): "",
    }
    beside = "/" not in mask or mask.startswith("cat/")
    assert beside == any("taken as masks of the images beside" in str(w.message) for w in said)


def test_classes_that_are_called_mask_stay_classes(tmp_path):
    for name in ("mask/1.png", "no_mask/1.png", "no_mask/with_mask.png"):
        save(tmp_path / name)
    frame = datasets.read(tmp_path)
    assert frame["label"].tolist() == ["mask", "no_mask", "no_mask"] and set(frame["mask"]) == {""}


def test_maps_of_labels_are_neither_masks_nor_pictures_to_explain(tmp_path):
    for name in ("JPEGImages/a.jpg", "SegmentationClass/a.png"):
        save(tmp_path / name)
    with pytest.warns(UserWarning, match="1 maps of labels are not used: SegmentationClass/a.png"):
        frame = datasets.read(tmp_path)
    assert frame[["id", "label", "mask"]].values.tolist() == [["JPEGImages/a", "", ""]]


def test_a_mask_without_an_image_and_two_of_one_image_are_named(tmp_path):
    for name in ("a/x.png", "b/x.png", "c.png", "masks/x.png", "masks/b/c.png", "c_mask_1.png"):
        save(tmp_path / name)
    save(tmp_path / "masks/c.png")
    (tmp_path / "masks/c.npy").write_bytes(b"")
    with pytest.warns(UserWarning) as said:
        frame = datasets.read(tmp_path)
    assert len(frame) == 3 and set(frame["mask"]) == {""}
    text = " ".join(str(warning.message) for warning in said)
    assert "2 masks belong to no image, or to several" in text
    assert "masks/b/c.png, masks/x.png" in text
    assert "1 images have several masks, of which none is used: c.png" in text
    assert "1 files among the masks are no images: masks/c.npy" in text


# ---- manifests


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        ("id,file\n1,\xe4.png\n".encode("latin-1"), "is not in UTF-8"),
        (b"id,name\n1,a.png\n", "needs a column file; it has id, name"),
        (b"file\na.png\na.png\n", "line 3: has the id of another line"),
        (b"id,file\n1,a.png\n1,b.png\n", "line 3: has the id of another line"),
        (b"id,file\n1,a.png\n2,\n", "line 3: has no file"),
        (b"id,file,class\n1,a.png,b\n", "line 2: has a class that is no whole number"),
        (b"id,file\n1,a.png\n2,b.png,x,y\n", "cannot be read"),
        (b"id,file\n1,a.png,x\n2,b.png,x\n", "cannot be read"),
        (b"id,file\n", "holds no images"),
    ],
)
def test_a_manifest_that_is_none_is_refused_by_name(tmp_path, content, said):
    (tmp_path / "manifest.csv").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        datasets.read(tmp_path)


def test_a_manifest_from_a_spreadsheet_is_read(tmp_path):
    text = "id; file; split; label; class\r\n07; a.png; Valid; 003; 3\r\n08; b.png; Test; x; \r\n"
    (tmp_path / "manifest.csv").write_bytes(text.encode("utf-8-sig"))
    frame = datasets.read(tmp_path)
    assert frame[["id", "split", "label", "class"]].values.tolist() == [
        ["07", "val", "003", 3],
        ["08", "test", "x", -1],
    ]


def test_a_smaller_run_is_a_subset_of_a_larger_one():
    frame = pd.DataFrame({"id": [f"{k:02d}" for k in range(20)]})
    found = {n: datasets.subset(frame, n, seed=1)["id"].tolist() for n in (5, 12, 0, 99)}
    assert found[12][:5] == found[5] and found[0] == found[99]
    assert sorted(found[0]) == frame["id"].tolist() != found[0]


@pytest.mark.parametrize("count", [39, 60])
def test_a_set_without_splits_is_halved_by_content_or_all_of_it_is_measured(tmp_path, count):
    for k in range(count):
        save(tmp_path / f"p{k:03d}.png", noise(4, 4, seed=k))
    frame = datasets.read(tmp_path)
    val = set(datasets.split_rows(frame, "val")["id"])
    test = set(datasets.split_rows(frame, "test")["id"])
    assert val | test == set(frame["id"]) and not val & test
    assert len(val) == 0 if count < 40 else 15 < len(val) < 45
    (tmp_path / "p000.png").rename(tmp_path / "zzz.png")  # by content, not by name
    renamed = set(datasets.split_rows(datasets.read(tmp_path), "val")["id"])
    assert ("zzz" in renamed) == ("p000" in val) and renamed - {"zzz"} == val - {"p000"}


def test_masks_are_read_and_empty_or_missing_ones_named(tmp_path):
    mask = np.zeros((16, 16), np.uint8)
    mask[2:5, 7:9] = 255
    row = {"id": "i7", "mask": str(save(tmp_path / "m.png", mask))}
    assert np.array_equal(datasets.load_masks(pd.DataFrame([row]), size=16)[0], mask > 0)
    assert datasets.load_masks(pd.DataFrame([row]), size=32).sum() == 24
    row["mask"] = str(save(tmp_path / "labels.png", mask // 255))  # 0 and 1
    assert np.array_equal(datasets.load_masks(pd.DataFrame([row]), size=16)[0], mask > 0)
    row["mask"] = str(save(tmp_path / "black.png", 0 * mask))
    with pytest.raises(ValueError, match="mask of image i7 is empty .*black.png"):
        datasets.load_masks(pd.DataFrame([row]))
    with pytest.raises(ValueError, match="image i7 has no mask"):
        datasets.load_masks(pd.DataFrame([{**row, "mask": ""}]))


# ---- weights, tables


def test_the_weights_that_settings_mean(tmp_path):
    trained = str(tmp_path / "synthetic" / "checkpoints" / "resnet18.pth")
    assert runs.weights_of("auto", "auto", "synthetic", tmp_path) == "auto"
    assert runs.weights_of("auto", "auto", "synthetic", tmp_path, retrain=True) == trained
    assert runs.weights_of("auto", "mine.pth", "synthetic", tmp_path, retrain=True) == "mine.pth"
    assert runs.weights_of("auto", "auto", "photos", tmp_path) == "imagenet"
    own = runs.weights_of("auto", "auto", "photos", tmp_path, classes=["a", "b"])
    assert own.startswith(str(tmp_path / "trained" / "photos-")) and own.endswith("resnet18.pth")


def test_imagenet_weights_without_a_network(monkeypatch, tmp_path):
    """The message says what to fetch and where to put it."""

    def offline(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(ConnectionError) as caught:
        networks.load("resnet18", "imagenet")
    for part in ("resnet18-f37072fd.pth", "weights=FILE.pth", str(tmp_path), "service not known"):
        assert part in str(caught.value)


def test_tables_and_json_carry_the_run_and_latex_takes_any_text(tmp_path):
    table = pd.DataFrame({"share, %": [1 / 3, np.nan], "what": ["50 % & more", "grad_cam #1"]})
    runs.save_table(table, tmp_path / "t.csv", caption="95 % of a_b & more")
    assert (tmp_path / "t.csv").read_text().splitlines()[1] == f"0.333333333,50 % & more,{RUN_ID}"
    latex = (tmp_path / "t.tex").read_text("utf-8")
    assert r"\caption{95 \% of a\_b \& more}" in latex and r"50 \% \& more" in latex
    assert r"grad\_cam \#1" in latex and "0.3333" in latex and "--" in latex
    assert [latex.count(rf"\{name}rule") for name in ("top", "mid", "bottom")] == [1, 1, 1]
    runs.save_table(table, tmp_path / "plain.csv")
    assert not (tmp_path / "plain.tex").exists()
    runs.save_json({"b": 1, "a": "ä"}, tmp_path / "j.json")
    assert list(json.loads((tmp_path / "j.json").read_text("utf-8"))) == ["a", "b", "run"]
