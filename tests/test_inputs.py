"""Folders as people have them: broken files, boxes in XML and CSV, classes by number, any size; and
the pictures that are written of an explanation.
"""

from __future__ import annotations

import io
import json

import matplotlib
import matplotlib.pyplot as plt
import nets
import numpy as np
import oracle
import pandas as pd
import pytest
import torch
from PIL import Image

import cam_core as cc


def photo(file, size=(30, 20), colour=(90, 60, 30)):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(file)
    return file


# ---- sizes


def test_one_pixel_is_a_picture(tmp_path):
    image = cc.datasets.read_image(photo(tmp_path / "a.png", (1, 1)))
    found = cc.explain(nets.tiny(), image, target=1, layer="4", method="grad_cam", size=12)
    assert found.cam.shape == (12, 12)
    cc.figures.save_pictures(tmp_path, "one", image, found.cam)
    assert {Image.open(p).size for p in tmp_path.glob("one_*.png")} == {(1, 1)}


def test_a_picture_over_pillows_limit_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    for size in ((30, 20), (100, 20)):  # Pillow warns over the limit and raises over twice of it
        with pytest.raises(ValueError, match="bomb.png is refused"):
            cc.datasets.read_image(photo(tmp_path / "bomb.png", size))
    assert cc.datasets.read_image(photo(tmp_path / "small.png", (25, 20))).size == (25, 20)


# ---- broken files


@pytest.fixture
def folder(tmp_path):
    """Five images of which two cannot be read: one is cut off, one is text."""
    for k in range(5):
        photo(tmp_path / f"p{k}.png", (40, 40), (50 * k, 90, 30))
    whole = (tmp_path / "p1.png").read_bytes()
    (tmp_path / "p1.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "p3.png").write_text("no picture")
    return tmp_path


@pytest.mark.parametrize("n", [1, 2, 0])
def test_what_cannot_be_read_is_left_out_with_its_reason(folder, n):
    frame = cc.datasets.read(folder)
    readable = [i for i in cc.datasets.subset(frame, 0, 0)["id"] if i not in ("p1", "p3")]
    rows, left_out = cc.datasets.readable(frame, n)
    assert rows["id"].tolist() == readable[: n or 3]
    measured, _ = cc.measurable(nets.tiny(), frame, n, batch_size=2, size=12)
    assert measured["id"].tolist() == rows["id"].tolist()
    if n == 0:
        assert sorted(left_out["id"]) == ["p1", "p3"]
    for name, reason in zip(left_out["id"], left_out["reason"], strict=True):
        assert name in reason


def test_a_run_tells_what_was_left_out_and_keeps_a_table(folder, capsys):
    _, left_out = cc.datasets.readable(cc.datasets.read(folder))
    run = cc.runs.open(2, dataset=str(folder), results_dir=str(folder / "out"))
    run.report_left_out(left_out)
    printed = capsys.readouterr().out
    assert "2 left out" in printed and "p1.png" in printed and "p3.png" in printed
    table = pd.read_csv(folder / "out" / "tables" / "02_skipped.csv")
    assert sorted(table.id) == ["p1", "p3"]


def test_strict_stops_at_the_first(folder):
    frame = cc.datasets.read(folder)
    with pytest.raises(ValueError, match="p[13].png cannot be read"):
        cc.datasets.readable(frame, strict=True)
    with pytest.raises(ValueError, match="p[13].png cannot be read"):
        cc.measurable(nets.tiny(), frame, strict=True, size=12)


def test_a_broken_mask_or_twin_counts_as_well(folder):
    photo(folder / "masks" / "p0.png").write_text("no mask")
    photo(folder / "twins" / "p2.png").write_bytes(b"")
    rows, left_out = cc.datasets.readable(cc.datasets.read(folder))
    assert rows["id"].tolist() == ["p4"] and len(left_out) == 4
    reasons = left_out.set_index("id").reason
    assert "masks" in reasons["p0"] and "twins" in reasons["p2"]


def test_a_mask_that_shows_nothing_leaves_its_image_out(tmp_path):
    """An empty mask, and one whose object lies outside the crop; the others are measured."""
    for name in ("a", "b", "c"):
        photo(tmp_path / f"{name}.png", (60, 20))
    (tmp_path / "masks").mkdir()
    for name, (x0, x1) in {"a": (25, 35), "b": (0, 10), "c": (0, 0)}.items():
        pixels = np.zeros((20, 60), np.uint8)
        pixels[:, x0:x1] = 255
        Image.fromarray(pixels).save(tmp_path / "masks" / f"{name}.png")
    frame = cc.datasets.read(tmp_path)
    crop = cc.networks.Preprocessing(size=(12, 12), fit="crop", shorter=12)
    for size, kept in ((12, ["a", "b"]), (crop, ["a"])):
        rows, left_out = cc.measurable(nets.tiny(), frame, size=size)
        assert sorted(rows["id"]) == kept
        assert sorted(left_out["id"]) == sorted({"a", "b", "c"} - set(kept))
        assert left_out["reason"].str.contains("is empty").all()


def test_nothing_readable_and_nothing_there(tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(ValueError, match="none of its 1 images can be read.*a.png"):
        cc.datasets.readable(cc.datasets.read(tmp_path))
    (tmp_path / "a.png").unlink()
    with pytest.raises(ValueError, match="holds no images"):
        cc.datasets.read(tmp_path)
    with pytest.raises(ValueError, match="no folder .*gone"):
        cc.datasets.read(tmp_path / "gone")


# ---- boxes


def voc(file, *objects):
    """A file as PASCAL VOC has it: (name, xmin, ymin, xmax, ymax) of each object."""
    parts = []
    for name, x0, y0, x1, y1 in objects:
        low, high = f"<xmin>{x0}</xmin><ymin>{y0}</ymin>", f"<xmax>{x1}</xmax><ymax>{y1}</ymax>"
        parts.append(f"<object><name>{name}</name><bndbox>{low}{high}</bndbox></object>")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"<annotation>{''.join(parts)}</annotation>")


@pytest.mark.parametrize("place", ["cat/a.xml", "Annotations/a.xml", "Annotations/cat/a.xml"])
def test_voc_boxes_of_the_images_class(tmp_path, place):
    """VOC counts pixels from 1 and includes the last one."""
    photo(tmp_path / "cat" / "a.png")
    photo(tmp_path / "dog" / "b.png")
    voc(tmp_path / place, ("dog", 1, 1, 4, 4), ("cat", 11, 6, 20, 15), ("cat", 21, 1, 30, 20))
    frame = cc.datasets.read(tmp_path).set_index("id")
    assert json.loads(frame.boxes["cat/a"]) == [[10, 5, 20, 15], [20, 0, 30, 20]]
    assert frame.truth.to_dict() == {"cat/a": "boxes", "dog/b": ""}
    mask = cc.datasets.load_masks(frame.reset_index().iloc[:1], size=30)[0]
    expected = torch.zeros(30, 30, dtype=torch.bool)
    expected[7:22, 10:20] = True  # rows 5 to 15 of 20 are 7.5 to 22.5 of 30; pixels are centres
    expected[:, 20:] = True
    assert torch.equal(mask, expected)


def test_an_unlabelled_image_takes_its_label_from_its_sheet(tmp_path):
    photo(tmp_path / "a.png")
    voc(tmp_path / "a.xml", ("owl", 1, 1, 10, 10))
    row = cc.datasets.read(tmp_path).iloc[0]
    assert row.label == "owl" and json.loads(row.boxes) == [[0, 0, 10, 10]]


ENTITY = '<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/hostname">]>'  # reads another file
BOMB = "".join(f'<!ENTITY e{k} "{f"&e{k - 1};" * 20}">' for k in range(1, 12))  # fills the memory
OBJECT = "<object><name>a</name><bndbox><xmin>{}</xmin><ymin>1</ymin><xmax>20</xmax><ymax>20</ymax>"
SHEETS = [
    "",
    "<annotation",
    "<annotation><object><name>a</name></object></annotation>",
    f"<annotation>{OBJECT.format('x')}</bndbox></object></annotation>",
    f"{ENTITY}<annotation>{OBJECT.format('&e;')}</bndbox></object></annotation>",
    f'<!DOCTYPE a [<!ENTITY e0 "1">{BOMB}]><a>{OBJECT.format("&e11;")}</bndbox></object></a>',
]


@pytest.mark.parametrize("text", SHEETS, ids=["empty", "cut", "no box", "word", "entity", "bomb"])
def test_a_sheet_that_is_damaged_or_a_trap_is_refused_by_name(tmp_path, text):
    photo(tmp_path / "a.png")
    (tmp_path / "a.xml").write_text(text)
    with pytest.raises(ValueError, match="a.xml is no PASCAL VOC file"):
        cc.datasets.read(tmp_path)


def test_boxes_and_classes_in_a_table(tmp_path):
    for name in "abc":
        photo(tmp_path / f"{name}.png")
    boxes = "a.png,0,0,15,10,281\na.png,15,10,30,20,281\nb.png,,,,,7\n"
    (tmp_path / "boxes.csv").write_text(f"file,x0,y0,x1,y1,class\n{boxes}")
    frame = cc.datasets.read(tmp_path)
    assert frame["class"].tolist() == [281, 7, -1]
    assert frame["truth"].tolist() == ["boxes", "", ""]
    names = cc.networks.imagenet_classes()
    assert len(names) == 1000 and names[281] == "tabby"
    assert cc.datasets.class_indices(frame, names) == [281, 7, -1]
    assert cc.datasets.load_boxes(frame[:1], size=60) == [[[0, 0, 30, 30], [30, 30, 60, 60]]]
    assert cc.datasets.load_masks(frame[:1], size=60)[0].float().mean() == 0.5
    with pytest.raises(ValueError, match="image b"):
        cc.datasets.load_boxes(frame[1:2])
    with pytest.raises(ValueError, match="class 281 of .*a.png.* 10 classes"):
        cc.datasets.class_indices(frame, list("abcdefghij"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name,x0\na.png,1", "needs the columns"),
        ("file,x0,y0\na.png,1,1", "needs the columns"),
        ("file,x0,y0,x1,y1\nz.png,0,0,5,5", "line 2"),
        ("file,x0,y0,x1,y1\na.png,0,0,5,5\na.png,5,0,5,5", "line 3"),
        ("file,x0,y0,x1,y1\na.png,-1,0,5,5", "line 2"),
        ("file,x0,y0,x1,y1\na.png,a,0,5,5", "line 2"),
        ("file,x0,y0,x1,y1,class\na.png,0,0,5,5,1.5", "line 2"),
        ("file,x0,y0,x1,y1,class\na.png,0,0,5,5,-2", "line 2"),
    ],
)
def test_a_wrong_table_of_boxes_is_refused_with_its_line(tmp_path, text, said):
    photo(tmp_path / "a.png")
    (tmp_path / "boxes.csv").write_text(text)
    with pytest.raises(ValueError, match=f"boxes.csv.*{said}"):
        cc.datasets.read(tmp_path)


SPELLINGS = {
    "README's header": "file, x0, y0, x1, y1\na.png, 1, 2, 15, 10\n",
    "capitals": "File,X0,Y0,X1,Y1\nA.PNG,1,2,15,10\n",
    "byte order mark": "\ufefffile,x0,y0,x1,y1\na.png,1,2,15,10\n",
    "semicolons": "file;x0;y0;x1;y1\na.png;1,0;2;15;10\n",
    "tabs": "file\tx0\ty0\tx1\ty1\na.png\t1\t2\t15\t10\n",
    "quotes": '"file","x0","y0","x1","y1"\n"a.png","1","2","15","10"\n',
    "quotes and spaces": '"file", "x0", "y0", "x1", "y1"\n"a.png", "1", "2", "15", "10"\n',
    "Windows": "file,x0,y0,x1,y1\r\n.\\a.png,1,2,15,10\r\n",
    "blank lines": "\n\nfile,x0,y0,x1,y1\n\na.png,1,2,15,10\n\n",
    "from here": "file,x0,y0,x1,y1\n./a.png,1,2,15,10\n",
    "the folder too": "file,x0,y0,x1,y1\nset/a.png,1,2,15,10\n",
    "a full path": "file,x0,y0,x1,y1\n{folder}/a.png,1,2,15,10\n",
    "without ending": "file,x0,y0,x1,y1\na,1,2,15,10\n",
    "a spreadsheet's first line": "sep=;\nfile;x0;y0;x1;y1\na.png;1;2;15;10\n",
    "single quotes": "file,x0,y0,x1,y1\n'a.png',1,2,15,10\n",
    "another order": "y1,x1,y0,x0,file\n10,15,2,1,a.png\n",
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("text", SPELLINGS.values(), ids=SPELLINGS)
def test_boxes_are_read_however_their_table_is_written(tmp_path, text, encoding):
    folder = photo(tmp_path / "set" / "a.png").parent
    photo(folder / "b.png")
    (folder / "boxes.csv").write_bytes(text.replace("{folder}", str(folder)).encode(encoding))
    frame = cc.datasets.read(folder)
    assert [json.loads(boxes or "[]") for boxes in frame.boxes] == [[[1, 2, 15, 10]], []]
    assert frame.truth.tolist() == ["boxes", ""]


def test_a_table_of_boxes_beside_the_images_of_a_split_counts_too(tmp_path):
    for name in ("train/a.png", "test/a.png"):
        photo(tmp_path / name)
        (tmp_path / name).with_name("boxes.csv").write_text(
            f"file,x0,y0,x1,y1\na.png,0,0,{len(name)},9"
        )
    assert [json.loads(boxes)[0][2] for boxes in cc.datasets.read(tmp_path).boxes] == [10, 11]


def test_boxes_of_images_in_folders_are_found_by_path_or_by_a_name_of_its_own(tmp_path):
    for name in ("cat/a.png", "dog/a.png", "dog/b.png"):
        photo(tmp_path / name)
    lines = ["file,x0,y0,x1,y1", "cat\\a.png,1,1,2,2", "b.png,3,3,4,4", "a.png,5,5,6,6"]
    (tmp_path / "Boxes.csv").write_text("\n".join(lines))
    with pytest.warns(UserWarning, match="1 faults.*line 4: 'a.png,5,5,6,6' must name an image"):
        frame = cc.datasets.read(tmp_path)
    assert frame.boxes.tolist() == ["[[1.0, 1.0, 2.0, 2.0]]", "", "[[3.0, 3.0, 4.0, 4.0]]"]


def test_a_wrong_line_is_named_and_the_others_count(tmp_path):
    for name in "abc":
        photo(tmp_path / f"{name}.png")
    lines = ["file,x0,y0,x1,y1,note", "a.png,1,1,2,2,x", "", "b.png,3,3,4,4,x", "b.png,9,9,4,4,x"]
    lines += ["gone.png,1,1,2,2,x", "c.png,1,1,2,2,x,y"]
    (tmp_path / "boxes.csv").write_text("\n".join(lines))
    with pytest.warns(UserWarning) as said:
        frame = cc.datasets.read(tmp_path)
    assert frame.truth.tolist() == ["boxes", "", ""]  # b with one of its two boxes would mislead
    text = " ".join(str(warning.message) for warning in said)
    assert "3 faults" in text and "these columns are not used: note" in text
    assert all(f"line {number}: " in text for number in (5, 6, 7))


def test_two_classes_of_one_image_and_columns_of_another_meaning_are_refused(tmp_path):
    photo(tmp_path / "a.png")
    for text, said in (
        ("file,x0,y0,x1,y1,class\na.png,1,1,2,2,3\na.png,1,1,2,2,4", "line 3"),
        ("file,x,y,w,h\na.png,1,1,2,2", "needs the columns .* it has file, x, y, w, h"),
        ("file\na.png", "needs the columns"),
        ("", "boxes.csv is empty"),
    ):
        (tmp_path / "boxes.csv").write_text(text)
        with pytest.raises(ValueError, match=said):
            cc.datasets.read(tmp_path)
    (tmp_path / "boxes.csv").write_bytes("file,x0\nä.png,1".encode("latin-1"))
    with pytest.raises(ValueError, match="boxes.csv is not in UTF-8"):
        cc.datasets.read(tmp_path)


def test_a_wrong_sheet_and_one_of_no_image_are_named_and_the_others_count(tmp_path):
    for name in ("cat/a.png", "dog/a.png", "dog/b.png", "dog/c.png"):
        photo(tmp_path / name)
    voc(tmp_path / "Annotations" / "b.xml", ("dog", 1, 1, 4, 4))
    voc(tmp_path / "Annotations" / "a.xml", ("cat", 1, 1, 4, 4))  # of which a?
    voc(tmp_path / "annotations" / "dog" / "c.xml", ("dog", 9, 9, 4, 4))
    with pytest.warns(UserWarning) as said:
        frame = cc.datasets.read(tmp_path)
    assert frame.truth.tolist() == ["", "", "boxes", ""]
    text = " ".join(str(warning.message) for warning in said)
    assert "1 XML files belong to no image: Annotations/a.xml" in text
    assert "c.xml is no PASCAL VOC file" in text


def test_a_box_across_the_border_is_cut_and_one_beside_the_image_is_refused(tmp_path):
    photo(tmp_path / "a.png")
    photo(tmp_path / "b.png")
    lines = ["file,x0,y0,x1,y1", "a.png,20,10,300,200", "b.png,50,50,60,60"]
    (tmp_path / "boxes.csv").write_text("\n".join(lines))
    frame = cc.datasets.read(tmp_path)
    assert cc.datasets.load_boxes(frame[:1], 30) == [[[20, 15, 30, 30]]]
    with pytest.raises(ValueError, match="image b.*beside the image"):
        cc.datasets.load_boxes(frame[1:])


def test_numbers_as_labels_are_class_indices(tmp_path):
    for name in ("281_0001", "281_0002", "7_0001"):
        photo(tmp_path / f"{name}.jpg")
    frame = cc.datasets.read(tmp_path)
    names = cc.networks.imagenet_classes()
    assert cc.datasets.class_indices(frame, names) == [281, 281, 7]


def test_boxes_count_only_where_the_known_class_is_predicted(tmp_path):
    for k, name in enumerate("abcd"):
        photo(tmp_path / f"{name}.png", (12, 12), (60 * k, 255 - 60 * k, 90))
    model, frame = nets.tiny(), cc.datasets.read(tmp_path)
    seen = cc.probabilities(model, cc.datasets.load_batch(frame, size=12)).argmax(1).tolist()
    lines = ["file,x0,y0,x1,y1,class"]
    for name, predicted in zip("abcd", seen, strict=True):
        known = predicted if name in "ab" else (predicted + 1) % 4
        lines.append(f"{name}.png,0,0,6,6,{known}")
    (tmp_path / "boxes.csv").write_text("\n".join(lines))
    frame = cc.datasets.read(tmp_path)
    frame = frame.assign(known=cc.datasets.class_indices(frame, list("wxyz")))
    rows, left_out = cc.measurable(model, frame, size=12)
    assert sorted(rows["id"]) == ["a", "b"] and sorted(left_out["id"]) == ["c", "d"]
    assert set(left_out["reason"]) == {cc.runs.MISTAKEN}


# ---- pictures


def enlarged(cam, height, width):
    """Bilinear, by the oracle's weights."""
    return oracle.weights(height, cam.shape[0]) @ cam @ oracle.weights(width, cam.shape[1]).T


def table_of(colormap):
    """The 256 colours of a colormap, from 0 to 255."""
    return matplotlib.colormaps[colormap](np.arange(256))[:, :3] * 255


@pytest.mark.parametrize("opacity", [0.75, 1, 0])
def test_the_opacity_of_an_overlay_follows_the_map(opacity):
    """(1 - a) image + a colour, a = opacity * map: zero attribution leaves the image as it is."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (30, 40, 3), np.uint8)
    cam = rng.random((5, 8)).astype(np.float32)
    cam[:, :4] = 0
    cam[4, 7] = 1
    large = enlarged(cam, 30, 40)[..., None]
    colour = table_of("viridis")[np.minimum(large[..., 0] * 256, 255).astype(int)]
    expected = (1 - opacity * large) * image + opacity * large * colour
    drawn = cc.figures.overlay(Image.fromarray(image), cam, opacity, "viridis")
    assert drawn.dtype == np.uint8 and np.abs(drawn - expected).max() < 2  # a colour's neighbour
    assert np.array_equal(drawn[:, :15], image[:, :15])
    if opacity == 1:
        assert np.abs(drawn[-1, -1] - table_of("viridis")[-1]).max() < 1
    assert np.array_equal(cc.figures.overlay(image, 0 * cam, opacity), image)


PIXELS = np.random.default_rng(1).integers(0, 256, (20, 30, 4), np.uint8)
RGB = PIXELS[..., :3]
WHITE = 255 - (255 - RGB.astype(float)) * PIXELS[..., 3:] / 255  # RGBA, laid on white
GREY = np.repeat(PIXELS[..., :1], 3, 2)
CHW = torch.from_numpy(RGB.transpose(2, 0, 1).copy())
HELD = {
    "float": (RGB / 255, RGB),
    "float32 tensor": (CHW / 255, RGB),
    "tensor with a gradient": ((CHW / 255).requires_grad_(), RGB),
    "bfloat16": ((CHW / 255).bfloat16(), RGB),
    "tensor": (CHW, RGB),
    "tensor of int64": (CHW.long(), RGB),
    "channels last tensor": (torch.from_numpy(RGB), RGB),
    "channels first array": (CHW.numpy(), RGB),
    "batch of one": (CHW[None] / 255, RGB),
    "array in a batch of one": (RGB[None], RGB),
    "RGBA": (PIXELS, WHITE),
    "16 bits": (RGB.astype(np.uint16) * 257, RGB),
    "grey": (PIXELS[..., 0], GREY),
    "grey, one channel": (PIXELS[..., :1], GREY),
    "grey tensor": (CHW[:1], GREY),
    "grey float": (PIXELS[..., 0] / 255, GREY),
    "true and false": (PIXELS[..., 0] > 99, np.where(GREY > 99, 255, 0)),
    "a list": (RGB.tolist(), RGB),
    "strided": (RGB[::-1, ::-1], RGB[::-1, ::-1]),
    "PIL": (Image.fromarray(RGB), RGB),
    "PIL L": (Image.fromarray(PIXELS[..., 0]), GREY),
    "PIL RGBA": (Image.fromarray(PIXELS), WHITE),
    "PIL LA": (Image.fromarray(PIXELS[..., 0]).convert("LA"), GREY),
    "PIL I;16": (Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257), GREY),
    "PIL I": (Image.fromarray(PIXELS[..., 0].astype(np.int32) * 257), GREY),
    "PIL F": (Image.fromarray((PIXELS[..., 0] / 255).astype(np.float32)), GREY),
    "PIL 1": (Image.fromarray(PIXELS[..., 0] > 99), np.where(GREY > 99, 255, 0)),
    "PIL RGBX": (Image.fromarray(RGB).convert("RGBX"), RGB),
    "PIL RGBa": (Image.fromarray(PIXELS).convert("RGBa"), WHITE),
}


@pytest.mark.parametrize(("image", "seen"), HELD.values(), ids=HELD)
def test_pictures_as_people_hold_them_are_all_the_same_picture(tmp_path, image, seen):
    picture = np.asarray(cc.datasets.as_rgb(image))
    assert picture.dtype == np.uint8 and np.abs(picture - np.asarray(seen, float)).max() <= 2
    cam = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    same = Image.fromarray(picture)
    for draw in (cc.figures.overlay, cc.figures.edge_overlay):
        assert np.array_equal(draw(image, cam), draw(same, cam))
    cc.figures.save_pictures(str(tmp_path), "p", image, cam)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "p_original.png")), picture)
    fig, axes = plt.subplots(1, 2)
    cc.figures.panel(axes[0], image, cam)
    cc.figures.panel(axes[1], same, cam)
    first, second = (np.asarray(ax.images[0].get_array()) for ax in axes)
    plt.close(fig)
    assert np.array_equal(first, second)


@pytest.mark.parametrize("mode", ["P", "PA", "CMYK", "YCbCr", "HSV", "La"])
def test_a_pil_image_of_any_mode_is_a_picture(mode):
    grey = Image.new("L", (8, 6), 102)  # of the palette
    image = grey.convert("RGB").convert(mode) if mode != "La" else grey.convert("LA").convert("La")
    assert np.abs(np.asarray(cc.datasets.as_rgb(image)).astype(int) - 102).max() <= 2


def test_a_file_is_a_picture(tmp_path):
    file = photo(tmp_path / "a.png")
    cam = np.ones((2, 2), np.float32)
    drawn = cc.figures.overlay(Image.open(file), cam)
    assert np.array_equal(cc.figures.overlay(file, cam), drawn)
    assert np.array_equal(cc.figures.overlay(str(file), cam), drawn)
    assert np.array_equal(cc.figures.overlay(io.BytesIO(file.read_bytes()), cam), drawn)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (np.zeros((9, 9, 5), np.uint8), r"shape \(9, 9, 5\) has neither 1, 3 nor 4 channels"),
        (torch.zeros(2, 9, 9), "neither 1, 3 nor 4 channels"),
        (torch.zeros(2, 3, 9, 9), "One picture at a time"),
        (np.zeros(9, np.uint8), "is no picture"),
        (np.zeros((0, 9, 3), np.uint8), "is empty"),
        (torch.randn(3, 9, 9) * 9, "normalised tensor take x \\* std"),
        (np.full((9, 9), 200.0), "divide by 255"),
        (np.full((9, 9), np.nan), "values from nan"),
        (np.full((9, 9), -1), "Whole numbers must be from 0 to 255"),
        (np.full((9, 9), 70_000), "65535"),
        (np.full((9, 9), 1j), "no picture"),
        (None, "no picture"),
        ("gone.png", "there is no file gone.png"),
        (Image.new("RGB", (0, 4)), "is empty"),
    ],
)
def test_what_is_no_picture_is_refused_with_what_to_do(image, said):
    for draw in (cc.figures.overlay, cc.figures.edge_overlay):
        with pytest.raises(ValueError, match=said):
            draw(image, np.ones((2, 2), np.float32))


def test_a_map_may_have_axes_of_length_one_and_must_be_finite_and_in_0_to_1():
    image, cam = Image.new("RGB", (8, 6)), np.linspace(0, 1, 12).reshape(3, 4)
    drawn = cc.figures.overlay(image, cam)
    for same in (torch.tensor(cam)[None], cam[None, None], cam[..., None], torch.tensor(cam)):
        assert np.array_equal(cc.figures.overlay(image, same), drawn)
        assert cc.figures.edge_overlay(image, same).shape == (6, 8, 3)
    for wrong in (cam * 2, cam - 0.5, cam * np.nan, np.stack([cam] * 2), cam[:0], "map", None):
        for draw in (cc.figures.overlay, cc.figures.edge_overlay):
            with pytest.raises(ValueError, match="cam must be"):
                draw(image, wrong)


def test_five_pictures_at_the_photographs_own_size(tmp_path):
    """Also of one that its camera has turned."""
    turned = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    image = cc.datasets.read_image(tmp_path / "turned.jpg")
    cam = np.linspace(0, 1, 49, dtype=np.float32).reshape(7, 7)
    cc.figures.save_pictures(tmp_path, "p", image, cam, "viridis")
    found = {p.stem.partition("_")[2]: np.asarray(Image.open(p)) for p in tmp_path.glob("p_*.png")}
    assert set(found) == {"original", "grayscale", "heatmap", "overlay", "edges"}
    assert {picture.shape[:2] for picture in found.values()} == {(60, 40)}
    assert np.array_equal(found["original"], image)
    grey = found["grayscale"]
    assert grey.ndim == 2 and np.abs(grey - 255 * enlarged(cam, 60, 40)).max() < 2
    assert np.abs(found["heatmap"] - table_of("viridis")[grey]).max() < 3
    overlay = cc.figures.overlay(image, cam, colormap="viridis")
    assert np.array_equal(found["overlay"], overlay)


def test_the_same_edges_are_drawn_in_a_small_and_in_a_large_photograph():
    """Canny's thresholds count per pixel: without care a large photograph would have no edges."""
    pixels = np.full((60, 80, 3), 90, np.uint8)
    pixels[20:40, 30:50] = 160
    square, cam, shares = Image.fromarray(pixels), np.zeros((60, 80), np.float32), []
    for width, height in ((320, 240), (2000, 1500)):
        large = square.resize((width, height), Image.Resampling.BICUBIC)
        white = (cc.figures.edge_overlay(large, cam) == 255).all(2)
        rows, columns = np.flatnonzero(white.any(1)) / height, np.flatnonzero(white.any(0)) / width
        assert (rows.min(), rows.max()) == pytest.approx((1 / 3, 2 / 3), abs=0.02)
        assert (columns.min(), columns.max()) == pytest.approx((3 / 8, 5 / 8), abs=0.02)
        inside = white[int(0.4 * height) : int(0.6 * height), int(0.45 * width) : int(0.55 * width)]
        assert not inside.any()
        shares.append(white.mean())
    assert min(shares) > 0.5 * max(shares) > 0


def test_the_most_likely_classes():
    p = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3]])
    table = cc.top_classes(p, ["a", "b", "c"], ["x", "y"], 2)
    rows = [["x", 1, "b", 1], ["x", 2, "c", 2], ["y", 1, "a", 0], ["y", 2, "c", 2]]
    assert table[["image", "rank", "name", "class"]].values.tolist() == rows
    assert table["probability"].tolist() == pytest.approx([0.6, 0.3, 0.5, 0.3])
    assert len(cc.top_classes(p, ["a", "b", "c"], ["x", "y"], 5)) == 6  # no more than there are
