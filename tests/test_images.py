"""Reading images, data sets and checkpoints of all kinds and of no kind; explain and overlay."""

from __future__ import annotations

import io
import json
import pickle
import re
import urllib.error

import numpy as np
import pandas as pd
import pytest
import torch
from nets import images, network, state, tiny
from PIL import Image
from torch import nn

import cam_core as cc
import cam_inputs

RED, BLUE = (255, 0, 0), (0, 0, 255)


def gradient(height=20, width=30, seed=0) -> np.ndarray:
    """A picture whose every pixel differs: (H, W, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pixels_of(x: torch.Tensor) -> np.ndarray:
    """The inverse of preprocess's scaling: (B, 3, H, W) -> uint8 (B, H, W, 3)."""
    v = x.permute(0, 2, 3, 1).numpy() * [0.229, 0.224, 0.225] + [0.485, 0.456, 0.406]
    return (255 * v).round().astype(np.uint8)


def save(path, pixels=None, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(gradient() if pixels is None else np.asarray(pixels)).save(path, **kwargs)
    return path


# ---------------------------------------------------------------------------------------------------------- read_image


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tiff", "a.PNG"])
def test_lossless_files_are_read_exactly(tmp_path, name):
    pixels = gradient()
    image = cc.read_image(save(tmp_path / name, pixels))
    assert image.mode == "RGB" and (np.asarray(image) == pixels).all()
    assert (np.asarray(cc.read_image(str(tmp_path / name))) == pixels).all()  # a string is a path too


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, orientation):
    """All eight orientations of one upright picture, stored turned as a camera does, come back upright."""
    upright = Image.fromarray(gradient())
    back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = upright.transpose(back[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.asarray(cc.read_image(tmp_path / "turned.png")), np.asarray(upright))


def test_16_bit_grey_is_scaled_not_cut_off(tmp_path):
    """257 * v is v in 16 bits. Clipping would make everything above 255 white."""
    values = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    image = np.asarray(cc.read_image(save(tmp_path / "x.png", values)))
    assert image.shape == (16, 16, 3) and np.abs(image[..., 0].ravel().astype(int) - np.arange(256)).max() <= 1
    dark = np.asarray(cc.read_image(save(tmp_path / "dark.png", values // 64)))
    assert dark.max() <= 4  # the file's own range counts, a dark picture stays dark


def test_32_bit_and_float_tiffs(tmp_path):
    values = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    image = np.asarray(cc.read_image(save(tmp_path / "unit.tif", values)))[..., 0].ravel()
    assert np.abs(image.astype(int) - np.arange(256)).max() <= 1
    image = np.asarray(cc.read_image(save(tmp_path / "int.tif", (values * 65535).astype(np.int32))))[..., 0].ravel()
    assert np.abs(image.astype(int) - np.arange(256)).max() <= 1


@pytest.mark.parametrize("values", [[-1000.0, 0.0, 1000.0], [np.nan, 0.0, 1.0]], ids=["Hounsfield units", "NaN"])
def test_float_tiff_with_negative_values_or_nan(tmp_path, values):
    """Either an order-preserving picture or an error: -1000 (air in a CT) must not come out brighter than 0."""
    file = save(tmp_path / "ct.tif", np.array([values], dtype=np.float32))
    try:
        image = np.asarray(cc.read_image(file)).astype(int)[0, :, 0]
    except ValueError as error:
        assert "ct.tif" in str(error)
    else:
        assert np.isfinite(values).all() and image[0] <= image[1] < image[2]


def test_transparency_is_laid_on_white(tmp_path):
    pixels = np.zeros((2, 3, 4), np.uint8)
    pixels[:, 0] = (*RED, 255)
    pixels[:, 1] = (*RED, 0)
    pixels[:, 2] = (0, 0, 0, 51)  # a fifth of black on white: 204
    image = np.asarray(cc.read_image(save(tmp_path / "a.png", pixels)))
    assert image[0].tolist() == [list(RED), [255] * 3, [204] * 3]


def test_palette_with_transparency(tmp_path):
    picture = Image.new("P", (3, 1))
    picture.putpalette([*RED, *BLUE, 0, 0, 0])
    picture.putdata([0, 1, 2])
    picture.save(tmp_path / "p.png", transparency=1)
    assert np.asarray(cc.read_image(tmp_path / "p.png")).tolist() == [[list(RED), [255] * 3, [0] * 3]]
    picture.save(tmp_path / "q.png")
    assert np.asarray(cc.read_image(tmp_path / "q.png")).tolist() == [[list(RED), list(BLUE), [0] * 3]]


def test_other_modes(tmp_path):
    grey = gradient()[..., 0]
    assert (np.asarray(cc.read_image(save(tmp_path / "l.png", grey))) == grey[..., None]).all()
    Image.fromarray(grey > 127).save(tmp_path / "1.png")
    assert (np.asarray(cc.read_image(tmp_path / "1.png")) == 255 * (grey > 127)[..., None]).all()
    la = Image.merge("LA", [Image.new("L", (2, 2), 0), Image.new("L", (2, 2), 0)])
    la.save(tmp_path / "la.png")
    assert (np.asarray(cc.read_image(tmp_path / "la.png")) == 255).all()
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "c.jpg", quality=100)
    assert np.abs(np.asarray(cc.read_image(tmp_path / "c.jpg")).astype(int) - RED).max() <= 3


def _truncated(path):
    whole = save(path.with_suffix(".jpg"), gradient(200, 200)).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    "write",
    [
        None,
        _truncated,
        lambda p: p.write_text("this is no picture"),
        lambda p: p.write_bytes(b""),
        lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50)),
        lambda p: p.mkdir(),
    ],
    ids=["missing", "truncated", "text", "empty", "header only", "folder"],
)
def test_bad_files_are_named(tmp_path, write):
    file = tmp_path / "holiday.png"
    if write:
        write(file)
    with pytest.raises(ValueError, match="image: .*holiday.png"):
        cc.read_image(file)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # it warns of what it repairs
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "BMP"])
def test_damaged_files_give_an_image_or_a_valueerror(tmp_path, kind):
    """A flipped byte or an early end anywhere, EXIF included: never another kind of error."""
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    Image.fromarray(gradient(16, 16)).save(buffer, kind, **({} if kind == "BMP" else {"exif": exif}))
    whole, draw = buffer.getvalue(), np.random.default_rng(0)
    file = tmp_path / "damaged"
    for trial in range(150):
        data = bytearray(whole)
        if trial % 3 == 0:
            del data[int(draw.integers(len(data))) :]
        for at in draw.integers(min(len(data), 400) or 1, size=2 * (trial % 3)):
            data[at] = int(draw.integers(256))
        file.write_bytes(data)
        try:
            assert cc.read_image(file).mode == "RGB"
        except ValueError as error:
            assert "damaged" in str(error)


# ----------------------------------------------------------------------------------------------------------- preprocess


def test_preprocess_by_hand():
    """(v / 255 - mean) / deviation of ImageNet, channel by channel."""
    x = cc.preprocess(Image.new("RGB", (5, 4), (255, 0, 51)), size=8)
    assert x.shape == (1, 3, 8, 8) and x.dtype == torch.float32
    expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    assert x[0, :, 3, 3].tolist() == pytest.approx(expected, abs=1e-6)


def test_the_whole_picture_is_squashed():
    """No crop: the four corners of a wide picture stay in the corners; upright stays upright."""
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:10, :30], wide[30:, 90:] = RED, BLUE
    x = pixels_of(cc.preprocess(Image.fromarray(wide), size=24))[0]
    assert x[2, 2].tolist() == list(RED) and x[21, 21].tolist() == list(BLUE) and not x[2, 21].any()


def test_preprocess_takes_one_or_many_sizes_and_modes():
    pictures = [Image.fromarray(gradient(9, 30)), Image.fromarray(gradient()).convert("L")]
    x = cc.preprocess(pictures, 16)
    assert x.shape == (2, 3, 16, 16)
    assert all(torch.equal(x[k], cc.preprocess(p, 16)[0]) for k, p in enumerate(pictures))
    assert cc.preprocess(pictures[0]).shape == (1, 3, 224, 224)


# -------------------------------------------------------------------------------------------------------- read_dataset


def test_plain_files_have_no_labels(tmp_path):
    for name in ("IMG_002.jpg", "IMG_001.JPG", "IMG_010.jpeg", "notes.txt"):
        (tmp_path / name).write_text("x") if name.endswith("txt") else save(tmp_path / name)
    frame = cc.read_dataset(tmp_path)
    assert frame["id"].tolist() == ["IMG_001", "IMG_002", "IMG_010"]
    assert (frame.label == "").all() and (frame.split == "all").all() and (frame.twin == "").all()
    assert all(cc.read_image(f) for f in frame.file) and str(tmp_path) in frame.file[0]


def test_label_and_number_in_the_name(tmp_path):
    for name in ("cat_2", "cat_1", "big_dog_1"):
        save(tmp_path / f"{name}.png")
    frame = cc.read_dataset(tmp_path)
    assert list(zip(frame["id"], frame.label, strict=True)) == [
        ("big_dog_1", "big_dog"), ("cat_1", "cat"), ("cat_2", "cat"),
    ]  # fmt: skip


@pytest.mark.parametrize("names", [("cat_1", "dog_2", "holiday"), ("cat_1", "cat_2"), ("cat", "dog")])
def test_names_that_are_no_labels(tmp_path, names):
    for name in names:
        save(tmp_path / f"{name}.png")
    assert (cc.read_dataset(tmp_path).label == "").all()


def test_one_folder_per_class(tmp_path):
    for name in ("cat/a.png", "cat/b.png", "dog/a.png", "dog/deep/c_3.png"):
        save(tmp_path / name)
    frame = cc.read_dataset(tmp_path)
    assert frame["id"].tolist() == ["cat/a", "cat/b", "dog/a", "dog/deep/c_3"]
    assert frame.label.tolist() == ["cat", "cat", "dog", "dog"] and frame["id"].is_unique


@pytest.mark.parametrize("layout", ["{split}/{label}_{n}.png", "{split}/{label}/{n}.png"])
def test_split_folders(tmp_path, layout):
    for split, n in (("train", 3), ("val", 1), ("test", 2)):
        for k in range(n):
            for label in ("cat", "dog"):
                save(tmp_path / layout.format(split=split, label=label, n=k))
    frame = cc.read_dataset(tmp_path)
    assert frame.groupby("split").size().to_dict() == {"train": 6, "val": 2, "test": 4}
    assert set(frame.label) == {"cat", "dog"} and frame["id"].is_unique
    test = cc.read_dataset(tmp_path, "test")
    assert len(test) == 4 and test.index.tolist() == [0, 1, 2, 3] and (test.split == "test").all()


def test_masks_and_twins_beside(tmp_path):
    for name in ("test/cat_1.jpg", "test/dog_2.jpg", "masks/test/cat_1.png", "twins/test/dog_2.png", "hulls/x.png"):
        save(tmp_path / name)
    save(tmp_path / ".cache" / "thumb.png")
    frame = cc.read_dataset(tmp_path).set_index("id")
    assert frame.index.tolist() == ["test/cat_1", "test/dog_2"]  # neither masks nor hidden folders are images
    assert frame["mask"].tolist() == [str(tmp_path / "masks/test/cat_1.png"), ""]
    assert frame.twin.tolist() == ["", str(tmp_path / "twins/test/dog_2.png")]


def manifest(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(folder / "manifest.csv", index=False)


def test_manifest(tmp_path):
    rows = [
        dict(id="007", split="test", label="ring", file="test/a.png", mask="masks/a.png", twin="twins/a.png", area=0.1),
        dict(id="008", split="test", label="NA", file="test/b.png", mask="", twin="", area=0.0),
        dict(id="001", split="val", label="ring", file="val/c.png", mask="masks/c.png", twin="", area=0.2),
    ]
    manifest(tmp_path, rows)
    frame = cc.read_dataset(tmp_path, "test")
    assert frame["id"].tolist() == ["007", "008"]  # text, although they look like numbers
    assert frame.label.tolist() == ["ring", "NA"] and frame["mask"].tolist() == [str(tmp_path / "masks/a.png"), ""]
    assert frame.file[0] == str(tmp_path / "test/a.png") and frame.area.tolist() == [0.1, 0.0]
    assert frame.twin.tolist() == [str(tmp_path / "twins/a.png"), ""]


def test_rows_are_sorted_however_the_manifest_is(tmp_path):
    """ "One row per image, sorted": a subset must not depend on the order in which a manifest was written."""
    rows = [dict(id=f"{k:03d}", split="test", label="x", file=f"{k}.png", mask="", twin="") for k in range(9)]
    manifest(tmp_path / "a", rows)
    manifest(tmp_path / "b", rows[::-1])
    a, b = (cc.subset(cc.read_dataset(tmp_path / name), 4, seed=0)["id"].tolist() for name in "ab")
    assert a == b


def test_two_files_of_one_name_are_two_images(tmp_path):
    """IMG_1.jpg beside IMG_1.png: with equal ids one's pictures would overwrite the other's, and metrics not pair."""
    save(tmp_path / "IMG_1.jpg")
    save(tmp_path / "IMG_1.png")
    assert cc.read_dataset(tmp_path)["id"].is_unique


def test_order_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    for name in ("b.png", "a.png", "c/z.png", "c/a.png", "B.png"):
        save(tmp_path / name)
    expected = cc.read_dataset(tmp_path)
    rglob = type(tmp_path).rglob
    monkeypatch.setattr(type(tmp_path), "rglob", lambda self, pattern: reversed(list(rglob(self, pattern))))
    pd.testing.assert_frame_equal(cc.read_dataset(tmp_path), expected)


def test_dataset_errors(tmp_path):
    with pytest.raises(ValueError, match="there is no folder .*nowhere"):
        cc.read_dataset(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no images"):
        cc.read_dataset(tmp_path)
    save(tmp_path / "val" / "a_1.png")
    save(tmp_path / "test" / "b_1.png")
    with pytest.raises(ValueError, match="has no split 'train'; it has test, val"):
        cc.read_dataset(tmp_path, "train")
    with pytest.raises(ValueError, match="there is no folder"):
        cc.read_dataset(tmp_path / "val" / "a_1.png")


def test_dataset_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cc.dataset_folder(tmp_path, "data", "synthetic") == tmp_path / "data" / "synthetic"
    assert cc.dataset_folder(tmp_path, "data", "/elsewhere/photos") == cc.Path("/elsewhere/photos")
    assert cc.dataset_folder(tmp_path / "repo", "data", "~/photos") == tmp_path / "photos"
    assert cc.dataset_folder(tmp_path, "data", "my/photos") == tmp_path / "my" / "photos"


def test_subset_is_nested_and_seeded():
    frame = pd.DataFrame({"id": [f"{k:02d}" for k in range(20)]})
    runs = {n: cc.subset(frame, n, seed=1)["id"].tolist() for n in (1, 5, 12, 20, 0, 99)}
    assert runs[12][:5] == runs[5] and runs[5][:1] == runs[1] and runs[20][:12] == runs[12]
    assert runs[0] == runs[99] == runs[20] and sorted(runs[0]) == frame["id"].tolist() and runs[0] != sorted(runs[0])
    assert cc.subset(frame, 5, seed=2)["id"].tolist() != runs[5]
    assert cc.subset(frame, 5, seed=1).index.tolist() == [0, 1, 2, 3, 4]


def photographs(folder, n: int) -> pd.DataFrame:
    for k in range(n):
        save(folder / f"p{k:03d}.png", gradient(4, 4, seed=k))
    return cc.read_dataset(folder)


def test_split_rows_of_a_set_with_splits():
    frame = pd.DataFrame({"id": list("abcde"), "split": ["train", "val", "val", "test", "train"]})
    assert cc.split_rows(frame, "val")["id"].tolist() == ["b", "c"]
    assert cc.split_rows(frame, "test")["id"].tolist() == ["d"]
    assert cc.split_rows(frame[frame.split != "val"], "val").empty  # no validation split: none is made up


def test_split_rows_halves_a_set_without_splits_by_content(tmp_path):
    frame = photographs(tmp_path, 60)
    val, test = (cc.split_rows(frame, s) for s in ("val", "test"))
    assert sorted([*val["id"], *test["id"]]) == frame["id"].tolist() and 15 < len(val) < 45
    (tmp_path / "p000.png").rename(tmp_path / "zzz.png")  # by content, not by name or position
    save(tmp_path / "new.png", gradient(4, 4, seed=99))
    again = cc.split_rows(cc.read_dataset(tmp_path), "val")
    names = {"p000": "zzz"}
    assert {names.get(i, i) for i in val["id"]} == set(again["id"]) - {"new"}


def test_split_rows_of_a_small_set_are_all_for_measuring(tmp_path):
    frame = photographs(tmp_path, 39)
    assert len(cc.split_rows(frame, "val")) == 0 and cc.split_rows(frame, "test")["id"].tolist() == frame["id"].tolist()


def test_split_rows_never_share_an_image(tmp_path):
    """Images beside a test/ or val/ folder: what is measured on must not have been chosen on."""
    frame = photographs(tmp_path, 60)
    for name in ("test", "val", "train"):
        mixed = frame.assign(split=["all"] * 10 + [name] * 50)
        val, test = (set(cc.split_rows(mixed, s)["id"]) for s in ("val", "test"))
        assert not val & test, name
        assert name != "train" or not (val | test) & set(mixed[mixed.split == "train"]["id"])


def test_load_batch_and_masks(tmp_path):
    pixels, mask = gradient(16, 16), np.zeros((16, 16), np.uint8)
    mask[2:5, 7:9] = 255
    row = dict(id="a", file=str(save(tmp_path / "a.png", pixels)), mask=str(save(tmp_path / "m.png", mask)))
    row["twin"] = str(save(tmp_path / "t.png", 255 - pixels))
    frame = pd.DataFrame([row, row])
    assert (pixels_of(cc.load_batch(frame, size=16)) == pixels).all()
    assert (pixels_of(cc.load_batch(frame, "twin", size=16)) == 255 - pixels).all()
    masks = cc.load_masks(frame, size=16)
    assert masks.dtype == torch.bool and masks.shape == (2, 16, 16) and (masks[1].numpy() == (mask > 0)).all()
    assert cc.load_masks(frame, size=32)[0, 4:10, 14:18].all() and cc.load_masks(frame, size=32)[0].sum() == 24
    assert cc.load_batch(frame).shape == (2, 3, 224, 224) and cc.load_masks(frame).shape == (2, 224, 224)


def test_load_masks_errors(tmp_path):
    black = str(save(tmp_path / "black.png", np.zeros((8, 8), np.uint8)))
    with pytest.raises(ValueError, match="image i7 has no mask"):
        cc.load_masks(pd.DataFrame([dict(id="i7", mask="")]))
    with pytest.raises(ValueError, match="mask of image i7 is empty .*black.png"):
        cc.load_masks(pd.DataFrame([dict(id="i7", mask=black)]))
    with pytest.raises(ValueError, match="there is no file .*gone.png"):
        cc.load_masks(pd.DataFrame([dict(id="i7", mask=str(tmp_path / "gone.png"))]))


@pytest.mark.parametrize(
    "hostile",
    ["../../etc/passwd", "/etc/passwd", "..", ".", "", "a/b\\c", "C:\\x", ".hidden", "a\nb", "a\0b", "~", "*"],
)
def test_safe_name_stays_in_its_folder(tmp_path, hostile):
    name = cc.safe_name(hostile)
    assert name and re.fullmatch(r"[^/\\\0\n:*~]+", name) and not name.startswith(".")
    (tmp_path / name).write_text("x")
    assert (tmp_path / name).resolve().parent == tmp_path.resolve()


def test_safe_name_keeps_what_is_harmless():
    assert cc.safe_name("ring_004-b.v2+x") == "ring_004-b.v2+x" and cc.safe_name("größe") == "größe"
    assert cc.safe_name(17) == "17"


def test_two_ids_never_share_a_file_name():
    names = [cc.safe_name(i) for i in ("a/b", "a_b", "a b", ".a_b")]
    assert len(set(names)) == 4 and all(name.startswith("a_b") and "/" not in name for name in names)


# ---------------------------------------------------------------------------------------------------------- measurable


class Brightness(nn.Module):
    """Two classes; the probability of the second is the mean grey value of the picture."""

    def forward(self, x):
        pixels = x * torch.tensor(cc.STD).view(1, 3, 1, 1) + torch.tensor(cc.MEAN).view(1, 3, 1, 1)
        p = pixels.mean((1, 2, 3)).clamp(0.01, 0.99)
        return torch.stack([torch.zeros_like(p), torch.log(p / (1 - p))], 1)


@pytest.fixture
def pairs(tmp_path):
    """Twelve images of brightness 0.9. Twins: 0.2 (used: 0.7 of difference), 0.6 (not used), none."""
    rows = []
    for k in range(12):
        file = str(save(tmp_path / f"{k}.png", np.full((8, 8, 3), 230, np.uint8)))
        grey = {0: 51, 1: 153, 2: None}[k % 3]
        twin = "" if grey is None else str(save(tmp_path / f"t{k}.png", np.full((8, 8, 3), grey, np.uint8)))
        rows.append(dict(id=f"{k:02d}", split="test", label="x", file=file, mask="", truth="", twin=twin, kind=k % 3))
    return pd.DataFrame(rows)


@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize("n", [0, 1, 2, 4, 9])
@pytest.mark.parametrize("seed", [1, 5])
def test_measurable(pairs, n, batch_size, seed):
    """Walk the seeded permutation by hand: take what the network uses, count what it does not, until n are found."""
    walked, left_out = [], 0
    for _, one in cc.subset(pairs[pairs.twin != ""], 0, seed).iterrows():
        if n and len(walked) == n:
            break
        if one.kind == 0:
            walked.append(one["id"])
        else:
            left_out += 1
    found, passed_over = cc.measurable(Brightness(), pairs, n, seed, batch_size)
    assert found["id"].tolist() == walked and len(passed_over) == left_out
    assert set(passed_over.reason) <= {cc.UNUSED}
    assert found.p_image.tolist() == pytest.approx([230 / 255] * len(walked), abs=1e-5)
    assert found.p_twin.tolist() == pytest.approx([0.2] * len(walked), abs=1e-5) and (found.target == 1).all()
    assert found.index.tolist() == list(range(len(walked)))


def test_measurable_without_twins_takes_all_images(pairs):
    pairs["twin"] = ""
    found, left_out = cc.measurable(Brightness(), pairs, 5, seed=1)
    assert found["id"].tolist() == cc.subset(pairs, 5, 1)["id"].tolist() and left_out.empty
    assert "p_twin" not in found and len(cc.measurable(Brightness(), pairs, 0)[0]) == 12


def test_measurable_where_the_network_uses_nothing(pairs):
    found, left_out = cc.measurable(Brightness(), pairs[pairs.kind == 1], 3)
    assert len(found) == 0 and len(left_out) == 4 and "target" in found


# ---------------------------------------------------------------------------------------------------------- load_model

ARCH = "squeezenet1_1"  # the smallest that torchvision has, without batch norm; resnet18 where that matters


def checkpoint(path, arch=ARCH, classes=5, half=True, prefix="", **extra):
    net = network(arch, seed=1, classes=classes)
    rounded = {
        prefix + k: v.half() if half and v.is_floating_point() and "running" not in k else v
        for k, v in net.state_dict().items()
    }
    torch.save({"model_state_dict": rounded, "arch": arch, **extra}, path)
    return net


@pytest.mark.parametrize("arch", [ARCH, "resnet18"])
def test_checkpoint_round_trip_in_half_precision(tmp_path, arch):
    names = ["healthy", "nodule", "ring", "spiculated", "cluster"]
    net = checkpoint(tmp_path / "c.pth", arch, class_names=names, test_acc=0.97, epoch=12)
    model, info = cc.load_model(arch, tmp_path / "c.pth")
    assert info["class_names"] == names and info["arch"] == arch and info["weights"] == "c.pth"
    assert info["test_acc"] == 0.97 and info["epoch"] == 12 and len(info["sha256"]) == 64
    assert "model_state_dict" not in info
    assert not any(m.training for m in model.modules()) and not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for key, value in model.state_dict().items():
        original = net.state_dict()[key]
        if original.is_floating_point() and "running" not in key:
            original = original.half().float()
        assert torch.equal(value, original), key
    x = images(2, (64, 64))
    with torch.no_grad():
        assert torch.allclose(model(x), net(x), atol=0.05) and not torch.equal(model(x)[0], model(x)[1])


def test_plain_state_dicts_with_and_without_prefix(tmp_path):
    net = network(ARCH, seed=1, classes=5)
    torch.save(net.state_dict(), tmp_path / "plain.pth")
    torch.save({f"module.{k}": v for k, v in net.state_dict().items()}, tmp_path / "parallel.pth")
    torch.save({"state_dict": net.state_dict(), "epoch": 3}, tmp_path / "other.pth")
    for name in ("plain", "parallel", "other"):
        model, info = cc.load_model(ARCH, tmp_path / f"{name}.pth")
        assert state(model)["tensors"] == state(net)["tensors"]
        assert info["class_names"] == [f"class {k}" for k in range(5)]
    assert info["epoch"] == 3


def test_a_thousand_classes_are_imagenets(tmp_path):
    torch.save(network(ARCH, classes=1000).state_dict(), tmp_path / "c.pth")
    names = cc.load_model(ARCH, str(tmp_path / "c.pth"))[1]["class_names"]
    assert len(names) == 1000 and names[0] == "tench" and names == cc.imagenet_classes()


def test_old_checkpoints_without_batch_counters(tmp_path):
    """torchvision's own resnet18-f37072fd.pth is from before `num_batches_tracked`; torch loads it all the same."""
    net = network("resnet18", classes=5)
    old = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "old.pth")
    model, _ = cc.load_model("resnet18", tmp_path / "old.pth")
    x = images(1, (64, 64))
    with torch.no_grad():
        assert torch.allclose(model(x), net(x), atol=1e-5)


def test_densenet_file_as_torchvision_offers_it(tmp_path):
    """densenet121-a639ec97.pth has `norm.1` where the model has `norm1`; torchvision renames while it loads."""
    net = network("densenet121", classes=5)
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", k): v for k, v in net.state_dict().items()}
    assert any("norm.1" in k for k in old)
    torch.save(old, tmp_path / "densenet.pth")
    assert state(cc.load_model("densenet121", tmp_path / "densenet.pth")[0])["tensors"] == state(net)["tensors"]


def test_googlenet_file_behaves_as_googlenets_imagenet_weights_do(tmp_path):
    """torchvision switches `transform_input` on with these weights: without it the input's scale is wrong."""
    net = cc.torchvision.models.googlenet(weights=None, init_weights=False, transform_input=True).eval()
    torch.save(net.state_dict(), tmp_path / "googlenet-1378be20.pth")
    model, _ = cc.load_model("googlenet", tmp_path / "googlenet-1378be20.pth")
    x = 3 * images(1, (64, 64))
    with torch.no_grad():
        expected, found = net(x), model(x)
        net.transform_input = False
        assert (net(x) - expected).abs().max() > 1e-5
        assert torch.allclose(found, expected, atol=1e-6)


def test_wrong_architecture_says_which_keys_and_shapes(tmp_path):
    torch.save(network("squeezenet1_0", classes=5).state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError) as caught:
        cc.load_model("resnet18", tmp_path / "other.pth")
    message = str(caught.value)
    assert "does not fit arch=resnet18" in message and "missing: bn1.bias" in message and "other.pth" in message
    assert "unknown: classifier.1.bias" in message and "more" in message and len(message) < 1000
    wide = network("resnet18", classes=5).state_dict()
    wide["conv1.weight"] = torch.zeros(64, 4, 7, 7)
    torch.save(wide, tmp_path / "four.pth")
    with pytest.raises(ValueError, match=r"shape: conv1.weight \(64, 4, 7, 7\) instead of \(64, 3, 7, 7\)"):
        cc.load_model("resnet18", tmp_path / "four.pth")
    checkpoint(tmp_path / "named.pth")
    with pytest.raises(ValueError, match=f"saved for arch='{ARCH}', not 'resnet18'"):
        cc.load_model("resnet18", tmp_path / "named.pth")


def test_a_headless_state_dict_says_what_is_missing(tmp_path):
    """A backbone ends in a batch norm's counter, a number without a length."""
    body = {k: v for k, v in network("resnet18").state_dict().items() if not k.startswith("fc")}
    torch.save(body, tmp_path / "body.pth")
    with pytest.raises(ValueError, match="body.pth"):
        cc.load_model("resnet18", tmp_path / "body.pth")


class Malicious:
    def __init__(self, flag):
        self.flag = str(flag)

    def __reduce__(self):
        return (open, (self.flag, "w"))


@pytest.mark.parametrize("inside", [False, True])
def test_nothing_in_a_file_is_executed(tmp_path, inside):
    flag = tmp_path / "flag"
    bad = {"model_state_dict": {"w": torch.ones(1)}, "note": Malicious(flag)} if inside else Malicious(flag)
    torch.save(bad, tmp_path / "bad.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(bad))
    for name in ("bad.pth", "raw.pth"):
        with pytest.raises(ValueError, match=f"{name} is not a PyTorch file of plain tensors"):
            cc.load_model(ARCH, tmp_path / name)
    assert not flag.exists()
    pickle.loads((tmp_path / "raw.pth").read_bytes())
    assert flag.exists()  # the trap works: an ordinary load would have sprung it


@pytest.mark.parametrize("content", [b"", b"no model", {}, {"epoch": 3}, {"model_state_dict": {}}, torch.ones(3), [1]])
def test_files_that_hold_no_weights(tmp_path, content):
    file = tmp_path / "w.pth"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(ValueError, match="weights=.*w.pth"):
        cc.load_model(ARCH, file)


def test_missing_file_and_unknown_architecture(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="there is no file .*gone.pth. Checkpoints that ship"):
        cc.load_model(ARCH, tmp_path / "gone.pth")
    monkeypatch.setattr(cam_inputs, "HOME", tmp_path)
    with pytest.raises(FileNotFoundError, match="Checkpoints that ship: none"):
        cc.load_model("resnet18")
    with pytest.raises(
        ValueError, match="arch='resnet19' is neither a torchvision classifier nor FILE.py:name. Nearest: resnet1"
    ):
        cc.load_model("resnet19")


def test_auto_is_the_checkpoint_that_ships(tmp_path, monkeypatch):
    monkeypatch.setattr(cam_inputs, "HOME", tmp_path)
    (tmp_path / "data" / "checkpoints").mkdir(parents=True)
    net = checkpoint(tmp_path / "data" / "checkpoints" / f"{ARCH}.pth", half=False)
    assert state(cc.load_model(ARCH)[0])["tensors"] == state(net)["tensors"]


def test_imagenet_weights_without_a_network(monkeypatch, tmp_path):
    """The message has to say what to fetch and where to put it; with or without a network on this machine."""

    def offline(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(ConnectionError) as caught:
        cc.load_model("resnet18", "imagenet")
    message = str(caught.value)
    assert "resnet18-f37072fd.pth" in message and "weights=FILE.pth" in message and str(tmp_path) in message
    assert "Name or service not known" in message


def test_resolve_weights(tmp_path):
    resolve = cc.resolve_weights
    assert resolve("resnet18", "auto", "synthetic", tmp_path) == "auto"
    assert resolve("resnet18", "auto", "photos", tmp_path) == "imagenet"
    trained = str(tmp_path / "synthetic" / "checkpoints" / "resnet18.pth")
    assert resolve("resnet18", "auto", "synthetic", tmp_path, retrain=True) == trained
    assert resolve("resnet18", "mine.pth", "synthetic", tmp_path, retrain=True) == "mine.pth"


def test_pick_device():
    assert cc.pick_device("cpu") == torch.device("cpu") and cc.pick_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("gpu", "", "cuda:x", "3", 3):
        with pytest.raises(ValueError, match="is not one of auto, cpu, cuda, cuda:N, mps"):
            cc.pick_device(name)
    for name in ("cuda:99", *([] if torch.cuda.is_available() else ["cuda"])):
        with pytest.raises(ValueError, match="not available on this machine. Use device=cpu"):
            cc.pick_device(name)


# ------------------------------------------------------------------------------------------------------------- explain


@pytest.fixture
def photo(tmp_path):
    return save(tmp_path / "photo.png", gradient(50, 70))


def by_hand(net, x, method="hybrid", layer="6", shallow="2", target=None, alpha=0.5):
    shot = cc.capture(net, x, [layer, shallow], target)
    A, G = shot.activations, shot.gradients
    if method == "hybrid":
        return cc.hybrid(cc.grad_cam(A[layer], G[layer]), cc.layer_cam(A[shallow], G[shallow]), alpha, x.shape[2:])[0]
    return cc.enlarge(cc.CAMS[method](A[layer], G[layer]), x.shape[2:])[0]


@pytest.mark.parametrize("method", ["hybrid", *cc.CAMS])
def test_explain_is_the_pipeline_in_one_call(photo, method):
    net = tiny(3)
    x = cc.preprocess(cc.read_image(photo), 24)
    found = cc.explain(net, photo, 2, method, "6", "2", alpha=0.3, size=24)
    assert np.array_equal(found.cam, by_hand(net, x, method, target=2, alpha=0.3).numpy())
    assert found.cam.dtype == np.float32 and found.cam.shape == (24, 24) and found.cam.max() == 1
    assert (found.target, found.method, found.layer, found.alpha) == (2, method, "6", 0.3)
    assert found.shallow_layer == ("2" if method == "hybrid" else "")
    assert found.probability == pytest.approx(float(cc.probabilities(net, x)[0, 2]), abs=1e-6)


def test_explain_takes_path_picture_and_tensor(photo):
    net, picture = tiny(3), cc.read_image(photo)
    x = cc.preprocess(picture, 24)
    maps = [
        cc.explain(net, i, layer="6", shallow_layer="2", size=24).cam for i in (photo, str(photo), picture, x, x[0])
    ]
    assert all(np.allclose(m, maps[0], atol=1e-5) for m in maps) and maps[0].any()


def test_explain_with_several_layers_and_a_rule(photo):
    """Layers joined by "+" are as in cam_at, the rule is that of hybrid."""
    net, x = tiny(3), cc.preprocess(cc.read_image(photo), 24)
    shot, size = cc.capture(net, x, ["0", "2", "4", "6"], 1), (24, 24)
    found = cc.explain(net, photo, 1, layer="4+6", shallow_layer="0+2", alpha=0.3, size=24, rule="floored")
    coarse, fine = cc.cam_at(shot, cc.grad_cam, "4+6", size), cc.cam_at(shot, cc.layer_cam, "0+2", size)
    assert (found.layer, found.shallow_layer) == ("4+6", "0+2") and found.cam.any()
    assert np.allclose(found.cam, cc.hybrid(coarse, fine, 0.3, rule="floored")[0], atol=1e-5)
    alone = cc.explain(net, photo, 1, "hires_cam", layer="2+4", size=24)
    assert np.allclose(alone.cam, cc.cam_at(shot, cc.hires_cam, "2+4", size)[0], atol=1e-5) and alone.cam.any()


def test_explain_chooses_class_and_layers(photo):
    net = network("resnet18")
    found = cc.explain(net, photo, size=96)
    assert (found.layer, found.shallow_layer, found.cam.shape) == ("layer4", "layer2", (96, 96))
    p = cc.probabilities(net, cc.preprocess(cc.read_image(photo), 96))[0]
    assert found.target == int(p.argmax()) and found.probability == pytest.approx(float(p.max()), abs=1e-6)
    assert cc.explain(net, photo, layer="layer3", size=96).shallow_layer == "layer2"
    assert cc.explain(net, photo, shallow_layer="layer1", size=96).layer == "layer4"
    assert cc.explain(net, photo, method="grad_cam", size=96).layer == "layer4"
    assert cc.explain(net, photo, method="layer_cam", layer="layer2", size=96).layer == "layer2"


def test_explain_leaves_the_model_alone_and_follows_its_precision(photo):
    net = tiny(3).train()
    before = state(net)
    cc.explain(net, photo, size=24)
    assert state(net) == before
    half = cc.explain(tiny(3).bfloat16(), photo, 1, layer="6", shallow_layer="2", size=24)
    assert half.cam.dtype == np.float32
    assert np.abs(half.cam - cc.explain(tiny(3), photo, 1, layer="6", shallow_layer="2", size=24).cam).mean() < 0.05


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (dict(method="gradcam"), "method='gradcam' is unknown. Nearest: grad_cam"),
        (dict(layer="nowhere"), "layer='nowhere' is not in this"),
        (dict(target=17), "target=17 is out of range"),
        (dict(alpha=2), "alpha=2 must be a number"),
        (dict(image=images(2, (24, 24))), "one at a time"),
        (dict(image=images(1, (24, 24))[0, 0]), "one at a time"),
        (dict(image="nowhere.png"), "there is no file nowhere.png"),
        (dict(image=gradient(24, 24)), "image"),
        (dict(image=None), "image"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_explain_errors(call, says):
    image = call.pop("image") if "image" in call else images(1, (24, 24))
    with pytest.raises(ValueError, match=re.escape(says)):
        cc.explain(tiny(3), image, **call)


# ------------------------------------------------------------------------------------------------------------- overlay


def test_overlay_at_both_ends():
    import matplotlib

    pixels, cam = gradient(), np.linspace(0, 1, 600, dtype=np.float32).reshape(20, 30)
    assert (cc.overlay(pixels, cam, opacity=0) == pixels).all()
    colours = (matplotlib.colormaps["inferno"](cam)[..., :3] * 255).round()
    assert np.abs(cc.overlay(pixels, cam, opacity=1) - colours).max() <= 1  # eight-bit colours
    assert (cc.overlay(pixels, cam, opacity=1, colormap="viridis") != colours).any()


def test_overlay_by_hand():
    """A zero map is inferno's black (0.001462, 0.000466, 0.013866): 0.6 * 200 + 0.4 * 255 * 0.0139 = 121.4 in blue."""
    found = cc.overlay(np.full((2, 2, 3), 200, np.uint8), np.zeros((2, 2)), opacity=0.4)
    assert found[0, 0].tolist() == [120, 120, 121] and found.dtype == np.uint8


def test_overlay_has_the_size_of_the_picture():
    """The map is enlarged bilinearly, and the picture never: what is fine in it stays fine."""
    pixels, cam = gradient(60, 90), np.array([[0.0, 1.0]], np.float32)
    found = cc.overlay(pixels, cam, opacity=0.5)
    assert found.shape == (60, 90, 3)
    expected = cc.enlarge(torch.from_numpy(cam)[None], (60, 90))[0].numpy()
    assert np.abs(found.astype(int) - cc.overlay(pixels, expected, opacity=0.5)).max() <= 1
    assert (cc.overlay(pixels, cam, opacity=0) == pixels).all()


def test_overlay_takes_pictures_arrays_and_grey():
    pixels, cam = gradient(), np.ones((20, 30), np.float32)
    expected = cc.overlay(pixels, cam)
    assert (cc.overlay(Image.fromarray(pixels), torch.from_numpy(cam)) == expected).all()
    grey = pixels[..., 0]
    assert (cc.overlay(grey, cam) == cc.overlay(np.stack([grey] * 3, 2), cam)).all()
    assert (cc.overlay(Image.fromarray(grey), cam) == cc.overlay(grey, cam)).all()
    assert (pixels == gradient()).all()  # and leaves them alone


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (dict(opacity=1.5), "opacity=1.5"),
        (dict(opacity=-0.1), "opacity=-0.1"),
        (dict(opacity=float("nan")), "opacity=nan"),
        (dict(cam=np.full((4, 4), 2.0)), "values from 2.0 to 2.0"),
        (dict(cam=np.full((4, 4), -0.5)), "cam must be a map"),
        (dict(cam=np.full((4, 4), np.nan)), "cam must be a map"),
        (dict(cam=np.zeros((1, 4, 4))), r"shape (1, 4, 4)"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_overlay_errors(call, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        cc.overlay(gradient(), **{"cam": np.zeros((4, 4)), **call})


# ------------------------------------------------------------------------------------------------------ what runs write


def test_equal_figures_are_equal_bytes(tmp_path):
    import matplotlib.pyplot as plt

    out = cc.start_run(tmp_path, "results/x", seed=3)
    assert out == tmp_path / "results" / "x" and all((out / d).is_dir() for d in ("figures", "tables", "images"))
    first = torch.rand(1)
    cc.start_run(tmp_path, "results/x", seed=3)  # a second time over what is there
    assert torch.equal(torch.rand(1), first)
    for name in ("a.png", "b.png"):
        fig, ax = plt.subplots()
        cc.panel(ax, gradient(), np.ones((4, 4)), np.eye(20, 30) > 0, "title")
        cc.save_figure(fig, out / "figures" / name)
        assert not plt.fignum_exists(fig.number)
    for kind in ("png", "pdf"):
        assert (out / "figures" / f"a.{kind}").read_bytes() == (out / "figures" / f"b.{kind}").read_bytes()
    assert Image.open(out / "figures" / "a.png").info["Run"] == cc.RUN_ID
    pdf = (out / "figures" / "a.pdf").read_bytes()
    assert pdf[:5] == b"%PDF-" and f"/Keywords ({cc.RUN_ID})".encode() in pdf and b"Date" not in pdf
    assert sorted(p.name for p in (out / "figures").iterdir()) == ["a.pdf", "a.png", "b.pdf", "b.png"]


def rows_of(tex: str) -> list[list[str]]:
    """The cells of a LaTeX table, header first; refuses what LaTeX would refuse."""
    body = re.sub(r"\\label\{[^}]*\}", "", tex.partition("\n")[2])  # behind the comment in the first line
    plain = re.sub(r"\\[%&#_{}$\\]", "", body)  # what is escaped is text
    assert not re.search(r"[%#_$]", plain) and plain.count("{") == plain.count("}")
    assert re.findall(r"\\(?:top|mid|bottom)rule", body) == [r"\toprule", r"\midrule", r"\bottomrule"]
    for name in ("table", "tabular"):
        assert body.count(rf"\begin{{{name}}}") == body.count(rf"\end{{{name}}}") == 1
    head, rows = re.search(r"\\toprule\n(.*?)\\midrule\n(.*?)\\bottomrule", body, re.S).groups()
    lines = [line.removesuffix(r"\\").strip() for line in (head + rows).strip().splitlines()]
    cells = [[re.sub(r"\\([%&#_])", r"\1", c.strip()) for c in re.split(r"(?<!\\)&", line)] for line in lines]
    assert len({len(row) for row in cells}) == 1
    return cells


def test_tables_for_latex(tmp_path):
    draw = np.random.default_rng(0).normal(size=4)
    frame = pd.DataFrame({
        "average_precision, %": draw, "method": ["grad_cam", "50 % & more", "#1", "a"], "n": [100, 20, 3, 4],
        "p": [1e-9, 0.05, np.nan, 1.0], "identical": [True, False, False, True],
    }, index=[0, 0, 1, 2])  # fmt: skip
    for name in ("t_1.csv", "again.csv"):
        cc.save_table(frame, tmp_path / name, caption="A 95 % interval of average_precision & more")
    tex = (tmp_path / "t_1.tex").read_text(encoding="utf-8")
    assert tex.startswith(f"% run {cc.RUN_ID}") and r"\caption{A 95 \% interval of average\_precision \& more}" in tex
    assert tex == (tmp_path / "again.tex").read_text(encoding="utf-8").replace("tab:again", "tab:t_1")
    head, *rows = rows_of(tex)
    table = pd.read_csv(tmp_path / "t_1.csv")
    assert head == list(frame.columns) and [*head, "run"] == list(table.columns) and len(rows) == len(table) == 4
    for found, written in zip(rows, table.to_dict("records"), strict=True):
        for name, cell in zip(head, found, strict=True):
            if isinstance(written[name], float):
                assert cell == "--" if np.isnan(written[name]) else cell == f"{written[name]:.4f}"
            else:
                assert cell == str(written[name])
    cc.save_table(frame, tmp_path / "t_1.csv", caption=r"Escaped 95 \% already")
    assert r"{Escaped 95 \% already}" in (tmp_path / "t_1.tex").read_text(encoding="utf-8")


def test_no_caption_no_latex(tmp_path):
    cc.save_table(pd.DataFrame({"a": [1.0]}), tmp_path / "t.csv")
    assert [p.name for p in tmp_path.iterdir()] == ["t.csv"]


def test_tables_and_json_carry_the_run(tmp_path):
    cc.save_table(pd.DataFrame({"a": [1 / 3, 2.0]}), tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text().splitlines() == [
        "a,run", f"0.333333333,{cc.RUN_ID}", f"2,{cc.RUN_ID}",
    ]  # fmt: skip
    cc.save_json({"b": 1, "a": "ä"}, tmp_path / "j.json")
    text = (tmp_path / "j.json").read_text(encoding="utf-8")
    assert list(json.loads(text)) == ["a", "b", "run"] and "ä" in text and text.endswith("\n")
