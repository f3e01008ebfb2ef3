"""Data sets: the images that are explained, as one table with splits, masks, twins and boxes.

What is wrong with a file is a ValueError that names it and says what is allowed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Sequence
from numbers import Real
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from lab import HOME, sha256
from lab.networks import preprocess, torchvision

# ---- images

IMAGE_TYPES = {".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".webp", ".tif", ".tiff"}


def read_image(file: str | Path) -> Image.Image:
    """An image file as RGB, turned as its EXIF says, 16-bit grey scaled to 8, transparency laid on
    white. ValueError names a bad file, and one with more than Pillow's MAX_IMAGE_PIXELS (89
    million), which may be a decompression bomb.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as opened:
                image = ImageOps.exif_transpose(opened)
    except FileNotFoundError:
        raise ValueError(f"image: there is no file {file}.") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(f"image: {file} is refused: {error} Scale it down first.") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"image: {file} cannot be read ({error}).") from None
    if image.mode.startswith(("I", "F")):
        grey = np.asarray(image, dtype=np.float32)
        if not (grey.min() >= 0 and grey.max() < np.inf):
            raise ValueError(
                f"image: {file} has grey values from {grey.min()} to {grey.max()}; scale them to 0 "
                "and more."
            )
        full = max(grey.max(), 65535 if image.mode.startswith("I") else 1)
        image = Image.fromarray((grey / full * 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# ---- tables of images

PATHS = (
    "file",
    "mask",
    "hull",
    "twin",
    "mask_b",
    "moved",
    "marker",
)  # columns of a manifest that name files
DATASETS = (
    "synthetic",
    "cifar10",
    "samples",
)  # those that notebook 01 makes; any other name is a folder
COLUMNS = ["id", "split", "label", "class", "file", "mask", "twin", "boxes"]
SPLITS = ("train", "val", "test")
BESIDE = (
    "masks",
    "twins",
    "hulls",
    "checkpoints",
)  # folders of a data set that hold no images to explain


def read(folder: str | Path, split: str | None = None):
    """A data set as a pandas table, one row per image, sorted; files as absolute paths.

    folder has either a manifest.csv, as notebook 01 writes it, or images in one of these layouts,
    with or without train/ val/ test/ above: `{label}_{number}.jpg`, one folder per class, or plain
    files without labels. Beside them may be masks/ and twins/ with the same relative names (.png),
    and boxes: PASCAL VOC's XML files (beside the images or in Annotations/) or one boxes.csv with
    the columns file, x0, y0, x1, y1 (pixels, x1 and y1 exclusive; a line for each box) and,
    optionally, class. Columns: id, split ("all" where there are no splits), label ("" if unknown),
    class (the index that boxes.csv, or a number for a label, gives; else -1), file, mask, twin (""
    if there is none), boxes (JSON, "" if unknown), truth ("mask", "boxes" or ""), and whatever else
    a manifest has. split: only these rows. Raises ValueError for a folder without images or without
    the asked split, for a manifest that names files outside the folder, and for files of boxes that
    are wrong.
    """
    folder = Path(folder).resolve()
    if (folder / "manifest.csv").is_file():
        frame = pd.read_csv(folder / "manifest.csv", keep_default_na=False, dtype={"id": str})
        for column in [c for c in frame if c in PATHS]:
            frame[column] = [
                _inside(folder, str(name), column) if name else "" for name in frame[column]
            ]
        frame = frame.sort_values("id", kind="stable")
    elif folder.is_dir():
        frame = pd.DataFrame(_scan(folder), columns=COLUMNS)
    else:
        raise ValueError(
            f"dataset: there is no folder {folder}. Run notebook 01 for the synthetic data, or "
            "give a folder of images."
        )
    if frame.empty:
        raise ValueError(f"dataset: {folder} holds no images ({', '.join(sorted(IMAGE_TYPES))}).")
    for column, default in {
        "class": -1,
        "mask": "",
        "twin": "",
        "boxes": "",
        "label": "",
        "split": "all",
    }.items():
        frame[column] = frame[column] if column in frame else default
    boxed = ~frame["boxes"].isin(["", "[]"])
    frame["truth"] = np.where(frame["mask"] != "", "mask", np.where(boxed, "boxes", ""))
    if split is not None:
        known = sorted(frame.split.unique())
        frame = frame[frame.split == split]
        if frame.empty:
            raise ValueError(
                f"dataset: {folder} has no split {split!r}; it has {', '.join(known)}."
            )
    return frame.reset_index(drop=True)


def _inside(folder: Path, name: str, column: str) -> str:
    """The absolute path of a file that a manifest names; ValueError for one beside the manifest's
    folder.
    """
    path = Path(os.path.normpath(folder / name))
    if not path.is_relative_to(folder):
        raise ValueError(
            f"dataset: {folder / 'manifest.csv'} names {name!r} as a {column}, which is outside "
            "its folder. Name files "
            "inside it, such as test/a.png; a link that you put there yourself is followed."
        )
    return str(path)


def _scan(folder: Path) -> list[dict]:
    """The rows of a folder without a manifest."""
    files = _image_files(folder)
    relative = {file: file.relative_to(folder) for file in files}
    stems = Counter(path.with_suffix("") for path in relative.values())
    prefixes = _label_prefixes(files)
    rows = []
    for file, path in relative.items():
        split, inner = "all", path.parts[:-1]
        if path.parts[0] in SPLITS and len(path.parts) > 1:
            split, inner = path.parts[0], path.parts[1:-1]
        stem = path.with_suffix("").as_posix()
        rows.append(
            {
                "id": stem if stems[path.with_suffix("")] == 1 else f"{stem}{file.suffix}",
                "split": split,
                "label": inner[0] if inner else prefixes.get(file, ""),
                "class": -1,
                "file": str(file),
                "mask": _beside(folder / "masks", path),
                "twin": _beside(folder / "twins", path),
                "boxes": "",
            }
        )
    if (
        len({row["label"] for row in rows}) == 1
    ):  # one name for all, such as "photos", tells no classes apart
        for row in rows:
            row["label"] = ""
    _add_boxes(rows, folder)
    return rows


def _image_files(folder: Path) -> list[Path]:
    """All image files below a folder, sorted, but for those in hidden folders and in the folders
    beside the images.
    """
    files = []
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        hidden = any(part.startswith(".") for part in parts)
        if (
            file.suffix.lower() in IMAGE_TYPES
            and file.is_file()
            and parts[0] not in BESIDE
            and not hidden
        ):
            files.append(file)
    return files


def _label_prefixes(files: Sequence[Path]) -> dict[Path, str]:
    """{file: label} if all are named {label}_{number}, with two labels or more: IMG_0001, IMG_0002
    ... are no labels.
    """
    found = {file: re.fullmatch(r"(.+)_(\d+)", file.stem) for file in files}
    if not all(found.values()):
        return {}
    labels = {file: match[1] for file, match in found.items()}
    return labels if len(set(labels.values())) > 1 else {}


def _beside(folder: Path, path: Path) -> str:
    """The PNG of the same relative name in a folder of masks or twins, "" if there is none."""
    file = folder / path.with_suffix(".png")
    return str(file) if file.is_file() else ""


def _add_boxes(rows: list[dict], folder: Path) -> None:
    """Fill in boxes, and the classes or labels that come with them, from boxes.csv or PASCAL VOC's
    files.
    """
    names = {Path(row["file"]).relative_to(folder).as_posix(): row for row in rows}
    listed = _read_boxes(folder / "boxes.csv", set(names))
    sheets = {}
    for sheet in sorted(folder.rglob("*.xml")):
        path = sheet.relative_to(folder).with_suffix("").as_posix()
        sheets[path.removeprefix("Annotations/")] = sheet
    for name, row in names.items():
        path = Path(name)
        boxes, row["class"] = listed.get(name, ([], -1))
        sheet = sheets.get(path.with_suffix("").as_posix()) or sheets.get(path.stem)
        if sheet and not boxes:
            row["label"], boxes = _read_voc(sheet, row["label"])
        if boxes:
            row["boxes"] = json.dumps(boxes)
    if rows and not listed and all(row["label"].isdigit() for row in rows):
        for row in rows:
            row["class"] = int(row["label"])


def _read_boxes(file: Path, names: set[str]) -> dict[str, tuple[list, int]]:
    """boxes.csv as {image: ([[x0, y0, x1, y1], ...], class or -1)}; ValueError with the line of
    what is wrong.
    """
    if not file.is_file():
        return {}
    table = pd.read_csv(file)
    if "file" not in table or len({"x0", "y0", "x1", "y1"} & set(table)) not in (0, 4):
        raise ValueError(
            f"{file} needs the columns file, x0, y0, x1, y1, or file, class; it has "
            f"{', '.join(table)}."
        )
    found: dict[str, tuple[list, int]] = {}
    for line, row in enumerate(table.to_dict("records"), 2):
        box = [row.get(side, np.nan) for side in ("x0", "y0", "x1", "y1")]
        index = row.get("class", np.nan)
        numbers = all(isinstance(v, Real) for v in [*box, index])
        whole = numbers and (np.isnan(index) or (index == int(index) and index >= 0))
        right = numbers and (
            np.isnan(box).all() or (min(box) >= 0 and box[0] < box[2] and box[1] < box[3])
        )
        if row["file"] not in names or not whole or not right:
            raise ValueError(
                f"{file}, line {line}: {row} must name an image of this folder, with 0 <= x0 < x1 "
                "and 0 <= y0 < y1, "
                "and a whole number as its class."
            )
        boxes, known = found.setdefault(row["file"], ([], -1 if np.isnan(index) else int(index)))
        boxes += [] if np.isnan(box).any() else [[float(v) for v in box]]
    return found


def _read_voc(file: Path, label: str) -> tuple[str, list]:
    """(label, boxes [[x0, y0, x1, y1], ...]) of a PASCAL VOC file: the boxes of the objects of this
    label, or of all if none has it; without a label the first object's. VOC counts pixels from 1
    and includes the last one.
    """
    from defusedxml import ElementTree  # XML without entities, which may grow without end

    objects = []
    try:
        for found in ElementTree.parse(file).getroot().iter("object"):
            corners = found.find("bndbox")
            box = [float(corners.findtext(side)) for side in ("xmin", "ymin", "xmax", "ymax")]
            objects.append((found.findtext("name", ""), box))
    except (ElementTree.ParseError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"boxes: {file} is no PASCAL VOC file of objects with a bndbox ({error})."
        ) from None
    label = label or next((name for name, _ in objects), "")
    mine = [box for name, box in objects if name == label] or [box for _, box in objects]
    return label, [[max(0.0, x0 - 1), max(0.0, y0 - 1), x1, y1] for x0, y0, x1, y1 in mine]


def class_indices(frame, class_names: Sequence[str]) -> list[int]:
    """For each row the index of its class among class_names, told by its label's name or, where
    that is none or a number, by its `class`; -1 where it is none of these. ValueError for a number
    out of range names the image.
    """
    index = {name.lower(): k for k, name in reversed(list(enumerate(class_names)))}
    found = []
    for file, label, number in zip(
        frame["file"], frame["label"].astype(str), frame["class"], strict=True
    ):
        known = label.lower() in index
        if not known and (label == "" or label.isdigit()) and int(number) >= len(class_names):
            raise ValueError(
                f"class {number} of {file} is out of range: the network has {len(class_names)} "
                "classes."
            )
        found.append(
            index[label.lower()] if known else int(number) if label == "" or label.isdigit() else -1
        )
    return found


def folder_of(data: Path, dataset: str) -> Path:
    """Where a data set lies: data/NAME for those that 01 makes, else the given folder, seen from
    the repository.
    """
    return data / dataset if dataset in DATASETS else HOME / Path(dataset).expanduser()


def split_rows(frame, split: str):
    """The rows of a split, "val" or "test", for choosing and for measuring.

    A set without splits and with 40 or more images is halved by the hash of each file, so a file
    stays on its side when others are added. A smaller one has no validation rows (an empty table)
    and all of it is for measuring.
    """
    named, loose = frame[frame["split"] == split], frame[frame["split"] == "all"]
    if not named.empty or (frame["split"] != "all").any():
        return named.reset_index(drop=True)
    if len(loose) < 40:
        return loose if split == "test" else loose.iloc[:0]
    odd = np.array([int(sha256(f)[:8], 16) % 2 == 1 for f in loose["file"]])
    return loose[odd == (split == "test")].reset_index(drop=True)


def subset(frame, n: int, seed: int):
    """The first n rows of a seeded permutation of the table (n = 0 or too large: all of it), so a
    smaller run is a subset of a larger one.
    """
    order = np.random.default_rng([seed, 7]).permutation(len(frame))
    return frame.iloc[order[: n or None]].reset_index(drop=True)


def readable(frame, n: int = 0, seed: int = 0, strict: bool = False):
    """The first n rows (0: all) of a seeded permutation whose image, mask and twin can be read:
    (rows, left out).

    left out: a table of id, file and reason; see `report_left_out`. Raises ValueError with strict
    at the first file that cannot be read, and else when there is none that can.
    """
    frame, kept, left_out = subset(frame, 0, seed), [], []
    for begin in range(0, len(frame), 64):
        good, bad = split_readable(frame.iloc[begin : begin + 64], strict)
        kept.append(good)
        left_out += bad
        if n and sum(map(len, kept)) >= n:
            break
    rows = pd.concat(kept).head(n or len(frame)).reset_index(drop=True) if kept else frame
    if rows.empty and left_out:
        raise ValueError(
            f"dataset: none of its {len(left_out)} images can be read, such as "
            f"{left_out[0]['file']}."
        )
    return rows, pd.DataFrame(left_out, columns=["id", "file", "reason"])


def split_readable(part, strict: bool):
    """(rows whose files can all be read, what the others' trouble is)"""
    bad = []
    for row in part[["id", "file", "mask", "twin"]].to_dict("records"):
        try:
            for file in filter(None, (row["file"], row["mask"], row["twin"])):
                read_image(file)
        except ValueError as error:
            if strict:
                raise
            bad.append({"id": row["id"], "file": file, "reason": str(error)})
    return part[~part["id"].isin([b["id"] for b in bad])], bad


def load_batch(frame, column: str = "file", size: int = 224) -> Tensor:
    """The images of a table's column ("file" or "twin"), preprocessed: (B, 3, size, size)."""
    return preprocess([read_image(f) for f in frame[column]], size)


def load_boxes(frame, size: int = 224) -> list[list[list[float]]]:
    """The boxes of a table's rows in the pixels of the squashed image, size x size: for each row
    [[x0, y0, x1, y1], ...], cut to the image. ValueError names a row without a box, or with an
    empty one.
    """
    found = []
    for row_id, file, text in zip(frame["id"], frame["file"], frame["boxes"], strict=True):
        width, height = read_image(file).size
        scale = np.array([size / width, size / height] * 2)
        boxes = (np.array(json.loads(text or "[]"), float).reshape(-1, 4) * scale).clip(0, size)
        if not len(boxes) or not (boxes[:, :2] < boxes[:, 2:]).all():
            raise ValueError(
                f"image {row_id}: its boxes {text or '(none)'} are empty or beside the image "
                f"({file})."
            )
        found.append(boxes.tolist())
    return found


def load_masks(frame, column: str = "mask", size: int = 224) -> Tensor:
    """The masks of a table's column as booleans, (B, size, size). A row whose truth is "boxes" gets
    its boxes as its mask: the pixels whose centre lies in one. ValueError names an empty mask, or a
    row that has none.
    """
    masks, centre = [], torch.arange(size) + 0.5
    for position, (row_id, file) in enumerate(zip(frame["id"], frame[column], strict=True)):
        if (
            not file
            and column == "mask"
            and "truth" in frame
            and frame["truth"].iloc[position] == "boxes"
        ):
            mask = torch.zeros(size, size, dtype=torch.bool)
            for x0, y0, x1, y1 in load_boxes(frame.iloc[[position]], size)[0]:
                mask |= ((centre >= y0) & (centre < y1))[:, None] & (centre >= x0) & (centre < x1)
            mask = mask.numpy()
        elif not file:
            raise ValueError(f"image {row_id} has no {column}: keep only rows that have one.")
        else:
            mask = (
                np.asarray(
                    read_image(file).convert("L").resize((size, size), Image.Resampling.NEAREST)
                )
                > 127
            )
        if not mask.any():
            raise ValueError(
                f"the {column} of image {row_id} is empty ({file}); what counts are values above "
                "127."
            )
        masks.append(mask)
    return torch.from_numpy(np.stack(masks))


def safe_name(image_id: str) -> str:
    """An image's id as a file name: everything but letters, digits, `.`, `+`, `-` becomes `_`, so
    it stays in its folder, and a checksum follows where anything changed, so two ids never share a
    name.
    """
    name = re.sub(r"[^\w.+-]", "_", str(image_id)).lstrip(".") or "_"
    return name if name == str(image_id) else f"{name}-{zlib.crc32(str(image_id).encode()):08x}"


def content_hash(frame) -> str:
    """SHA-256 of a data set's table: of ids, splits, labels, boxes and the bytes of images, twins,
    masks and hulls.
    """
    columns = [
        c
        for c in ("id", "split", "label", "class", "boxes", "file", "twin", "mask", "hull")
        if c in frame
    ]
    digest = hashlib.sha256()
    for row in frame[columns].sort_values("id", kind="stable").astype(str).to_dict("records"):
        row |= {c: sha256(row[c]) for c in ("file", "twin", "mask", "hull") if row.get(c)}
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()


# ---- data sets that notebook 01 makes, beside the synthetic one (lab/drawing.py)

SAMPLES = {
    # box around the object (x0, y0, x1, y1, measured by hand), the nearest ImageNet class
    "chelsea": ((0, 0, 398, 300), 281),  # tabby
    "coffee": ((172, 18, 408, 309), 967),  # espresso
    "rocket": ((307, 127, 338, 405), 657),  # missile
}


def make_samples(folder: Path) -> None:
    """Three photographs of scikit-image with boxes.csv, in the layout that a folder of your own may
    have. data/README.md names their authors and licences.
    """
    from skimage import data as photographs

    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, ((x0, y0, x1, y1), number) in SAMPLES.items():
        pixels = getattr(photographs, name)()
        Image.fromarray(pixels).save(folder / f"{name}.png")
        rows.append(
            {"file": f"{name}.png", "x0": x0, "y0": y0, "x1": x1, "y1": y1, "class": number}
        )
    pd.DataFrame(rows).to_csv(folder / "boxes.csv", index=False, lineterminator="\n")


def make_cifar10(folder: Path, count: int = 0) -> None:
    """The first `count` test images of CIFAR-10 (0: all) as folder/test/NAME_00000.png, in its
    order, with a manifest.

    torchvision downloads the archive into the folder, once, and compares it and what is in it with
    the published MD5s. ConnectionError, where that fails, says what to fetch and where to put it.
    (A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.)
    """
    archive = torchvision.datasets.CIFAR10
    try:
        cifar = archive(folder, train=False, download=True)
    except (OSError, RuntimeError) as error:
        raise ConnectionError(
            f"dataset: CIFAR-10 could not be downloaded ({error}). Without a network, fetch "
            f"{archive.url} "
            f"elsewhere and put it into {folder.resolve()}. Its MD5 must be {archive.tgz_md5}; a "
            "file of "
            "another is cut off or something else."
        ) from None
    (folder / "test").mkdir(exist_ok=True)
    rows = []
    for k, (image, number) in enumerate(cifar):
        if count and k == count:
            break
        label = cifar.classes[number]
        file = f"test/{label}_{k:05d}.png"
        image.save(folder / file)
        row = {
            "id": f"test_{k:05d}",
            "split": "test",
            "label": label,
            "class": number,
            "file": file,
        }
        rows.append(row)
    unfinished = folder / "manifest.new"
    pd.DataFrame(rows).to_csv(unfinished, index=False, lineterminator="\n")
    unfinished.replace(folder / "manifest.csv")  # in one step, when all images are there
