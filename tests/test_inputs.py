"""Folders as people have them: broken files, boxes in XML and CSV, classes by number, pictures of any size; and the
five pictures that are written of an explanation."""

from __future__ import annotations

import json
import resource
import time

import matplotlib
import nets
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import cam_core as cc


def photo(file, size=(30, 20), colour=(90, 60, 30)):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(file)
    return file


# --------------------------------------------------------------------------------------------------------------- sizes


def test_one_pixel_is_a_picture(tmp_path):
    image = cc.read_image(photo(tmp_path / "a.png", (1, 1)))
    found = cc.explain(nets.tiny(), image, target=1, layer="4", method="grad_cam", size=12)
    assert found.cam.shape == (12, 12) and cc.overlay(image, found.cam).shape == (1, 1, 3)
    cc.save_pictures(tmp_path, "one", image, found.cam)
    assert {Image.open(p).size for p in tmp_path.glob("one_*.png")} == {(1, 1)}


def test_eighty_million_pixels_are_handled(tmp_path):
    """20,000 x 4,000: read, squashed and laid over within seconds and about a gigabyte."""
    Image.new("RGB", (20_000, 4_000), (200, 100, 50)).save(tmp_path / "wide.png", compress_level=1)
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    image = cc.read_image(tmp_path / "wide.png")
    assert image.size == (20_000, 4_000) and cc.preprocess(image).shape == (1, 3, 224, 224)
    drawn = cc.overlay(image, np.eye(224, dtype=np.float32))
    assert drawn.shape == (4_000, 20_000, 3)
    assert time.monotonic() - begin < 60
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20 < 3


def test_a_picture_over_pillows_limit_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    for size in ((30, 20), (100, 20)):  # over the limit Pillow warns, over twice the limit it raises
        with pytest.raises(ValueError, match=r"bomb.png is refused: .*exceeds limit.* Scale it down first"):
            cc.read_image(photo(tmp_path / "bomb.png", size))
    assert cc.read_image(photo(tmp_path / "small.png", (25, 20))).size == (25, 20)


# -------------------------------------------------------------------------------------------------------- broken files


@pytest.fixture
def folder(tmp_path):
    """Five images of which two cannot be read: one is cut off, one is text."""
    for k in range(5):
        photo(tmp_path / f"p{k}.png", (40, 40), (50 * k, 90, 30))
    whole = (tmp_path / "p1.png").read_bytes()
    (tmp_path / "p1.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "p3.png").write_text("no picture")
    return tmp_path


def test_what_cannot_be_read_is_named_skipped_and_counted(folder, tmp_path, capsys):
    rows, left_out = cc.readable(cc.read_dataset(folder))
    assert sorted(rows["id"]) == ["p0", "p2", "p4"] and sorted(left_out["id"]) == ["p1", "p3"]
    assert all(name in reason for name, reason in zip(left_out["id"], left_out["reason"], strict=True))
    (tmp_path / "tables").mkdir()
    cc.report_left_out(left_out, tmp_path, "02")
    said = capsys.readouterr().out
    assert "2 left out because a file cannot be read" in said and "p1.png" in said and "p3.png" in said
    assert sorted(pd.read_csv(tmp_path / "tables" / "02_skipped.csv").id) == ["p1", "p3"]


def test_strict_stops_at_the_first(folder):
    with pytest.raises(ValueError, match=r"p[13].png cannot be read"):
        cc.readable(cc.read_dataset(folder), strict=True)
    with pytest.raises(ValueError, match=r"p[13].png cannot be read"):
        cc.measurable(nets.tiny(), cc.read_dataset(folder), strict=True, size=12)


@pytest.mark.parametrize("n", [1, 2, 3, 0])
def test_as_many_as_asked_for_are_found_behind_broken_ones(folder, n):
    frame = cc.read_dataset(folder)
    rows, _ = cc.readable(frame, n)
    good = [i for i in cc.subset(frame, 0, 0)["id"] if i not in ("p1", "p3")]
    assert rows["id"].tolist() == good[: n or 3]
    measured, left_out = cc.measurable(nets.tiny(), frame, n, batch_size=2, size=12)
    assert measured["id"].tolist() == rows["id"].tolist() and set(left_out["id"]) <= {"p1", "p3"}


def test_a_broken_mask_or_twin_counts_as_well(folder):
    photo(folder / "masks" / "p0.png")
    photo(folder / "twins" / "p2.png")
    (folder / "masks" / "p0.png").write_text("no mask")
    (folder / "twins" / "p2.png").write_bytes(b"")
    rows, left_out = cc.readable(cc.read_dataset(folder))
    assert rows["id"].tolist() == ["p4"] and len(left_out) == 4
    assert "masks" in left_out.set_index("id").reason["p0"] and "twins" in left_out.set_index("id").reason["p2"]


def test_nothing_readable_and_nothing_there(tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(ValueError, match="none of its 1 images can be read, such as .*a.png"):
        cc.readable(cc.read_dataset(tmp_path))
    (tmp_path / "a.png").unlink()
    with pytest.raises(ValueError, match=r"holds no images \(.bmp, .*.png"):
        cc.read_dataset(tmp_path)
    with pytest.raises(ValueError, match="there is no folder .*gone"):
        cc.read_dataset(tmp_path / "gone")


# --------------------------------------------------------------------------------------------------------------- boxes


def voc(file, *objects):
    """A file as PASCAL VOC has it: (name, xmin, ymin, xmax, ymax) of each object."""
    file.parent.mkdir(parents=True, exist_ok=True)
    sides = ("xmin", "ymin", "xmax", "ymax")
    inside = "".join(
        f"<object><name>{name}</name><bndbox>{''.join(f'<{s}>{v}</{s}>' for s, v in zip(sides, box, strict=True))}"
        "</bndbox></object>" for name, *box in objects
    )  # fmt: skip
    file.write_text(f"<annotation><size><width>30</width></size>{inside}</annotation>")


@pytest.mark.parametrize("place", ["cat/a.xml", "Annotations/a.xml", "Annotations/cat/a.xml"])
def test_voc_boxes_of_the_images_class(tmp_path, place):
    photo(tmp_path / "cat" / "a.png")
    photo(tmp_path / "dog" / "b.png")
    voc(tmp_path / place, ("dog", 1, 1, 4, 4), ("cat", 11, 6, 20, 15), ("cat", 21, 1, 30, 20))
    frame = cc.read_dataset(tmp_path).set_index("id")
    assert json.loads(frame.boxes["cat/a"]) == [[10, 5, 20, 15], [20, 0, 30, 20]]
    assert frame.truth.to_dict() == {"cat/a": "boxes", "dog/b": ""}
    mask = cc.load_masks(frame.reset_index().iloc[:1], size=30)[0]
    expected = torch.zeros(30, 30, dtype=torch.bool)
    expected[7:22, 10:20] = True  # rows 5 to 15 of 20 are 7.5 to 22.5 of 30; the last centre before that is 21.5
    expected[:, 20:] = True
    assert torch.equal(mask, expected)


def test_an_unlabelled_image_takes_its_label_from_its_sheet(tmp_path):
    photo(tmp_path / "a.png")
    voc(tmp_path / "a.xml", ("owl", 1, 1, 10, 10))
    row = cc.read_dataset(tmp_path).iloc[0]
    assert row.label == "owl" and json.loads(row.boxes) == [[0, 0, 10, 10]]


@pytest.mark.parametrize(
    "text",
    ["", "<annotation", "<annotation><object><name>a</name></object></annotation>",
     "<annotation><object><bndbox><xmin>x</xmin></bndbox></object></annotation>"],
)  # fmt: skip
def test_a_damaged_sheet_is_named(tmp_path, text):
    photo(tmp_path / "a.png")
    (tmp_path / "a.xml").write_text(text)
    with pytest.raises(ValueError, match=r"a.xml is no PASCAL VOC file"):
        cc.read_dataset(tmp_path)


def test_a_sheet_reaches_no_other_file_and_does_not_grow(tmp_path):
    """XML's two classic traps: an entity that is a file, and entities of entities that would fill the memory."""
    photo(tmp_path / "a.png")
    (tmp_path / "secret").write_text("12")
    entity = f'<!DOCTYPE a [<!ENTITY e SYSTEM "file://{tmp_path}/secret">]>'
    bomb = "".join(f'<!ENTITY e{k} "{f"&e{k - 1};" * 20}">' for k in range(1, 12))
    for head, value in ((entity, "&e;"), (f'<!DOCTYPE a [<!ENTITY e0 "1">{bomb}]>', "&e11;")):
        box = f"<xmin>{value}</xmin><ymin>1</ymin><xmax>20</xmax><ymax>20</ymax>"
        (tmp_path / "a.xml").write_text(f"{head}<a><object><name>x</name><bndbox>{box}</bndbox></object></a>")
        begin = time.monotonic()
        with pytest.raises(ValueError, match="a.xml is no PASCAL VOC file"):
            cc.read_dataset(tmp_path)
        assert time.monotonic() - begin < 5


def test_boxes_csv(tmp_path):
    for name in "abc":
        photo(tmp_path / f"{name}.png")
    (tmp_path / "boxes.csv").write_text(
        "file,x0,y0,x1,y1,class\na.png,0,0,15,10,281\na.png,15,10,30,20,281\nb.png,,,,,7\n"
    )
    frame = cc.read_dataset(tmp_path)
    assert frame["class"].tolist() == [281, 7, -1] and frame["truth"].tolist() == ["boxes", "", ""]
    assert cc.class_indices(frame, cc.imagenet_classes()) == [281, 7, -1]
    assert cc.load_boxes(frame[:1], size=60) == [[[0, 0, 30, 30], [30, 30, 60, 60]]]
    assert cc.load_masks(frame[:1], size=60)[0].float().mean() == 0.5
    with pytest.raises(ValueError, match="image b: its boxes .none. are empty"):
        cc.load_boxes(frame[1:2])
    with pytest.raises(ValueError, match="class 281 of .*a.png is out of range: the network has 10 classes"):
        cc.class_indices(frame, [str(k) for k in "abcdefghij"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name,x0\na.png,1", "needs the columns file, x0, y0, x1, y1"),
        ("file,x0,y0\na.png,1,1", "needs the columns file, x0, y0, x1, y1"),
        ("file,x0,y0,x1,y1\nz.png,0,0,5,5", "line 2: .*must name an image of this folder"),
        ("file,x0,y0,x1,y1\na.png,0,0,5,5\na.png,5,0,5,5", "line 3: .*x0 < x1"),
        ("file,x0,y0,x1,y1\na.png,-1,0,5,5", "line 2: .*0 <= x0"),
        ("file,x0,y0,x1,y1\na.png,a,0,5,5", "line 2: "),
        ("file,x0,y0,x1,y1,class\na.png,0,0,5,5,1.5", "a whole number as its class"),
        ("file,x0,y0,x1,y1,class\na.png,0,0,5,5,-2", "a whole number as its class"),
    ],
)
def test_a_wrong_boxes_csv_is_refused_with_its_line(tmp_path, text, said):
    photo(tmp_path / "a.png")
    (tmp_path / "boxes.csv").write_text(text)
    with pytest.raises(ValueError, match=f"boxes.csv.*{said}"):
        cc.read_dataset(tmp_path)


def test_a_box_beside_the_image_is_refused_and_one_across_its_border_is_cut(tmp_path):
    photo(tmp_path / "a.png")
    photo(tmp_path / "b.png")
    (tmp_path / "boxes.csv").write_text("file,x0,y0,x1,y1\na.png,20,10,300,200\nb.png,50,50,60,60\n")
    frame = cc.read_dataset(tmp_path)
    assert cc.load_boxes(frame[:1], 30) == [[[20, 15, 30, 30]]]
    with pytest.raises(ValueError, match="image b: its boxes .* are empty or beside the image"):
        cc.load_boxes(frame[1:])


def test_numbers_as_labels_are_class_indices(tmp_path):
    for name in ("281_0001", "281_0002", "7_0001"):
        photo(tmp_path / f"{name}.jpg")
    frame = cc.read_dataset(tmp_path)
    assert cc.class_indices(frame, cc.imagenet_classes()) == [281, 281, 7]
    with pytest.raises(ValueError, match="class 281 of .*281_0001.jpg is out of range: the network has 8 classes"):
        cc.class_indices(frame, [f"c{k}" for k in range(8)])


def test_boxes_count_only_where_the_known_class_is_predicted(tmp_path):
    for k, name in enumerate("abcd"):
        photo(tmp_path / f"{name}.png", (12, 12), (60 * k, 255 - 60 * k, 90))
    model, frame = nets.tiny(), cc.read_dataset(tmp_path)
    seen = cc.probabilities(model, cc.load_batch(frame, size=12)).argmax(1).tolist()
    lines = [f"{n}.png,0,0,6,6,{s if n in 'ab' else (s + 1) % 4}" for n, s in zip("abcd", seen, strict=True)]
    (tmp_path / "boxes.csv").write_text("\n".join(["file,x0,y0,x1,y1,class", *lines]))
    frame = cc.read_dataset(tmp_path)
    frame = frame.assign(known=cc.class_indices(frame, list("wxyz")))
    rows, left_out = cc.measurable(model, frame, size=12)
    assert sorted(rows["id"]) == ["a", "b"] and sorted(left_out["id"]) == ["c", "d"]
    assert set(left_out["reason"]) == {cc.MISTAKEN}


# ------------------------------------------------------------------------------------------------------------ pictures


def test_five_pictures_at_the_photographs_own_size(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    turned = Image.fromarray(pixels)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    image, cam = cc.read_image(tmp_path / "turned.jpg"), np.linspace(0, 1, 7 * 7, dtype=np.float32).reshape(7, 7)
    cc.save_pictures(tmp_path, "p", image, cam, "viridis")
    kinds = ("original", "grayscale", "heatmap", "overlay", "edges")
    found = {kind: Image.open(tmp_path / f"p_{kind}.png") for kind in kinds}
    assert sorted(p.name for p in tmp_path.glob("p_*")) == sorted(f"p_{kind}.png" for kind in kinds)
    assert {p.size for p in found.values()} == {(40, 60)} and found["grayscale"].mode == "L"
    assert np.array_equal(found["original"], image)
    grey = np.asarray(found["grayscale"])
    assert grey[0, 0] == 0 and grey[-1, -1] == 255 and int(grey[30, 20]) == pytest.approx(128, abs=3)
    table = (matplotlib.colormaps["viridis"](np.arange(256))[:, :3] * 255).round().astype(int)
    assert np.abs(np.asarray(found["heatmap"], int) - table[grey]).max() <= 2
    assert np.array_equal(found["overlay"], cc.overlay(image, cam, colormap="viridis"))


def test_edges_are_where_the_photograph_has_them():
    pixels = np.full((60, 80, 3), 40, np.uint8)
    pixels[20:40, 30:50] = 220
    image, cam = Image.fromarray(pixels), np.zeros((60, 80), np.float32)
    drawn, flat = cc.edge_overlay(image, cam), cc.edge_overlay(Image.new("RGB", (80, 60), (40, 40, 40)), cam)
    changed = (drawn != flat).any(2)
    rows, columns = np.nonzero(changed)
    assert changed.any() and rows.min() in range(18, 22) and rows.max() in range(38, 42)
    assert columns.min() in range(28, 32) and columns.max() in range(48, 52)
    assert not changed[25:35, 35:45].any(), "inside the square there is no edge"


def test_the_same_edges_are_drawn_in_a_small_and_in_a_large_photograph():
    """Canny's thresholds count per pixel: without care a photograph of a telephone's size would have no edges."""
    pixels = np.full((60, 80, 3), 90, np.uint8)
    pixels[20:40, 30:50] = 160
    photo, cam, shares = Image.fromarray(pixels), np.zeros((60, 80), np.float32), []
    for size in ((320, 240), (1200, 900), (4000, 3000)):
        white = (cc.edge_overlay(photo.resize(size, Image.Resampling.BICUBIC), cam) == 255).all(2)
        rows, columns = (np.flatnonzero(white.any(axis)) / side for axis, side in ((1, size[1]), (0, size[0])))
        assert (rows.min(), rows.max()) == pytest.approx((1 / 3, 2 / 3), abs=0.02)
        assert (columns.min(), columns.max()) == pytest.approx((3 / 8, 5 / 8), abs=0.02)
        shares.append(white.mean())
    assert min(shares) > 0.5 * max(shares) > 0


def test_a_colormap_that_is_not_there():
    with pytest.raises(ValueError, match="colormap='vridis'.*viridis"):
        cc.colours(np.zeros((4, 4), np.float32), colormap="vridis")


def test_the_most_likely_classes():
    p = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3]])
    table = cc.top_classes(p, ["a", "b", "c"], ["x", "y"], 2)
    assert table[["image", "rank", "name", "class"]].values.tolist() == [
        ["x", 1, "b", 1], ["x", 2, "c", 2], ["y", 1, "a", 0], ["y", 2, "c", 2],
    ]  # fmt: skip
    assert table["probability"].tolist() == pytest.approx([0.6, 0.3, 0.5, 0.3])
    assert len(cc.top_classes(p, ["a", "b", "c"], ["x", "y"], 5)) == 6, "no more than there are"
    assert cc.imagenet_classes()[281] == "tabby" and len(cc.imagenet_classes()) == 1000
