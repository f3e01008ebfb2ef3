"""A folder of images as a table: splits, labels, masks, twins and boxes, however people lay them
out.

What fits nothing is named and counted in a warning. What is wrong with a file is a ValueError that
names it and says what is allowed.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from lab.pictures import IMAGE_TYPES

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
COLUMNS = ["id", "split", "label", "class", "file", "mask", "twin", "boxes"]
SPLITS = ("train", "val", "test")
BESIDE = ("twins", "hulls", "checkpoints")  # folders of a data set that hold no images to explain

# The words by which people call splits, and what may stand beside them: "train_images", "val2017".
_SPLIT_OF = {
    **dict.fromkeys("trainval train_val train-val training train trn".split(), "train"),
    **dict.fromkeys("validation validate valid val development devel dev".split(), "val"),
    **dict.fromkeys("testing tests test evaluation eval holdout".split(), "test"),
}
_WORD = "|".join(sorted(_SPLIT_OF, key=len, reverse=True))
_MORE = r"(?:set|data|split|folder|images?|imgs?|photos?|pictures?|samples?|files?|\d|[ _.-])*"
_SPLIT_NAME = re.compile(f"{_MORE}({_WORD}){_MORE}")
_SPLIT_WITHIN = re.compile(f"(?<![a-z])({_WORD})(?![a-z])")  # as in "seg_train"
# Folders that say only what kind of file is in them.
PLAIN = {"images", "image", "imgs", "img", "jpegimages"}
_MASK_FOLDER = re.compile(
    f"masks|ground[ _-]?truths?|({_WORD})[ _-]masks?|masks?[ _-]({_WORD})", re.IGNORECASE
)
# These may be masks or classes: masks, if each picture in it has its like elsewhere.
_MAYBE_MASKS = {"mask", "gt", "labels", "label", "seg", "segmentation", "segmentations"}
_LABEL_MAPS = {"segmentationclass", "segmentationobject", "trimaps"}  # a value for each class
_MASK_NAME = re.compile(
    r"(.+?)[ _.-]+(?:masks?|segmentation|seg|gt|ground[ _-]?truth)(?:[ _-]*\d+)?", re.IGNORECASE
)


def read(folder: str | Path, split: str | None = None):
    """A data set as a pandas table, one row per image, sorted; files as absolute paths.

    folder has either a manifest.csv, as notebook 01 writes it, or images in one of these layouts,
    with or without train/ val/ test/ (also valid/, Testing/ and such) at any depth:
    `{label}_{number}.jpg`, one folder per class, or plain files without labels. Masks lie in
    masks/, or beside the images as x_mask.png, twins in twins/, with the same names. Boxes:
    PASCAL VOC's XML files (beside the images or in Annotations/) or one boxes.csv with the columns
    file, x0, y0, x1, y1 (pixels, x1 and y1 exclusive; a line for each box) and, optionally, class.
    Columns: id, split ("all" where there are no splits), label ("" if unknown), class (the index
    that boxes.csv, or a number for a label, gives; else -1), file, mask, twin ("" if there is
    none), boxes (JSON, "" if unknown), truth ("mask", "boxes" or ""), and whatever else a manifest
    has. Images of a kind that cannot be read are rows too, so they are counted with those that are
    damaged. split: only these rows.

    What fits nothing is named and counted in a warning. Raises ValueError for a folder without
    images or without the asked split, for a manifest that cannot be used or names files outside the
    folder, and where there are boxes none of which can be used.
    """
    folder = Path(folder).expanduser().resolve()
    if (folder / "manifest.csv").is_file():
        frame = _read_manifest(folder)
    elif folder.is_dir():
        frame = pd.DataFrame(_scan(folder), columns=COLUMNS)
    else:
        raise ValueError(
            f"dataset: there is no folder {folder}. Run notebook 01 for the synthetic data, or "
            "give a folder of images."
        )
    if frame.empty:
        raise ValueError(f"dataset: {folder} holds no images. {_contents(folder)}")
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


def _contents(folder: Path) -> str:
    """What is in a folder without images, and what would be read."""
    ends = Counter(file.suffix.lower() or "no ending" for file in _files(folder))
    there = ", ".join(f"{count} of {end}" for end, count in ends.most_common(8)) or "nothing"
    usual = ".png, .jpg, .tif, .webp, .bmp, .gif, .avif, .jp2, .ppm"
    return f"It has {there}; files of {usual} and others that Pillow opens are read."


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def _some(names: Sequence, most: int = 5) -> str:
    """The first of some names, for a message."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def _read_csv(file: Path) -> tuple[str, str]:
    """(text of a CSV file, what separates its columns): commas, semicolons or tabs, in UTF-8, or in
    UTF-16 with a byte order mark. ValueError for an empty file or another encoding.
    """
    content = file.read_bytes()
    wide = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = content.decode("utf-16" if wide else "utf-8").lstrip("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not in UTF-8 ({error}). Save it as CSV in UTF-8.") from None
    if "\0" in text or not text.strip():
        raise ValueError(f"{file} is empty or no text. It must be a CSV file in UTF-8.")
    text = re.sub(r"\Asep=.", "", text)  # as spreadsheets begin
    head = text.strip().splitlines()[0]
    return text, max(",;\t", key=head.count)


# ---- a manifest


def _read_manifest(folder: Path):
    """manifest.csv as a table, files as absolute paths. ValueError for one that cannot be read,
    lacks a column, a file or an id, has an id twice, or names a file outside its folder.
    """
    file = folder / "manifest.csv"
    text, separator = _read_csv(file)
    texts = ("id", "split", "label", "boxes", *PATHS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # longer lines would be cut
            frame = pd.read_csv(
                io.StringIO(text),
                sep=separator,
                skipinitialspace=True,
                keep_default_na=False,
                dtype=dict.fromkeys(texts, str),
                index_col=False,
            )
    except (pd.errors.ParserWarning, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error}).") from None
    frame = frame.rename(columns=str.strip)
    if "file" not in frame:
        raise ValueError(
            f"{file} needs a column file; it has {', '.join(frame)}. If it is not meant for this "
            "project, give it another name: then the folder is read as it lies."
        )
    frame["id"] = frame["id"] if "id" in frame else frame["file"]
    for column in [c for c in frame if c in texts]:
        frame[column] = frame[column].astype(str).str.strip()
    known = frame["class"].replace("", -1) if "class" in frame else pd.Series(-1, frame.index)
    frame["class"] = pd.to_numeric(known, errors="coerce")
    faults = {
        "has no file": frame["file"] == "",
        "has no id": frame["id"] == "",
        "has the id of another line": frame["id"].duplicated(),
        "has a class that is no whole number": frame["class"] % 1 != 0,
    }
    for fault, where in faults.items():
        if where.any():
            lines = np.flatnonzero(where) + 2
            raise ValueError(f"{file}, line {_some(lines)}: {fault}. Mend it, or leave it out.")
    frame["class"] = frame["class"].astype(int)
    for column in [c for c in frame if c in PATHS]:
        frame[column] = [_inside(folder, name, column) if name else "" for name in frame[column]]
    if "split" in frame:
        frame["split"] = [_split_named(name) or name or "all" for name in frame["split"]]
    return frame.sort_values("id", kind="stable")


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


# ---- a folder without a manifest


def _scan(folder: Path) -> list[dict]:
    """The rows of a folder without a manifest. Warns of what belongs to no image."""
    files = [file.relative_to(folder) for file in _files(folder)]
    pictures = [p for p in files if p.suffix.lower() in IMAGE_TYPES]
    twins = {p: [_without(p, "twins")] for p in pictures if p.parts[0] == "twins"}
    pictures = [p for p in pictures if len(p.parts) == 1 or p.parts[0] not in BESIDE]
    maps = {p for p in pictures if not _LABEL_MAPS.isdisjoint(map(str.lower, p.parts[:-1]))}
    if maps:
        _warn(
            f"dataset: {len(maps)} maps of labels are not used: {_some(sorted(maps))}. Masks must "
            "be white on black."
        )
    pictures = [p for p in pictures if p not in maps]
    masks = _masks(pictures)
    other = [p for p in files if any(map(_MASK_FOLDER.fullmatch, p.parts[:-1]))]
    other = [p for p in other if p.suffix.lower() not in IMAGE_TYPES | {".txt", ".md"}]
    if other:
        _warn(f"dataset: {len(other)} files among the masks are no images: {_some(other)}.")
    images = [p for p in pictures if p not in masks]
    names = _Names(images)
    stems = Counter(p.with_suffix("") for p in images)
    rows = {}
    for path, (split, label) in _places(images).items():
        stem = path.with_suffix("")
        rows[path] = {
            "id": stem.as_posix() if stems[stem] == 1 else path.as_posix(),
            "split": split,
            "label": label,
            "class": -1,
            "file": str(folder / path),
            "mask": "",
            "twin": "",
            "boxes": "",
        }
    _add_files("mask", masks, rows, names, folder)
    _add_files("twin", twins, rows, names, folder)
    _add_boxes(rows, names, files, folder)
    return list(rows.values())


def _files(folder: Path) -> list[Path]:
    """All files below a folder, sorted, but for hidden ones and those in hidden folders."""
    files = []
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if not hidden and file.is_file():
            files.append(file)
    return files


def _without(path: Path, *folders: str) -> Path:
    """A path without the folders of these names, in any capitals."""
    return Path(*[part for part in path.parts[:-1] if part.lower() not in folders], path.name)


def _bare(path: Path) -> str:
    """A file's name without its ending, capitals, and folders called images."""
    path = _without(path, *PLAIN)
    return str(path.with_suffix("") if path.suffix.lower() in IMAGE_TYPES else path).casefold()


class _Names:
    """Finds the images that another file means by a name."""

    def __init__(self, images: Sequence[Path]):
        self.by_path: dict[str, list[Path]] = {}
        self.by_name: dict[str, list[Path]] = {}
        for path in images:
            self.by_path.setdefault(_bare(path), []).append(path)
            self.by_name.setdefault(_bare(path).rpartition("/")[2], []).append(path)

    def of(self, path: Path, ending: str = "") -> list[Path]:
        """The images of this path, whatever their endings, or else the only one of this file name
        that lies in all of the path's folders; [] if there is none. ending: only those that end so.
        """
        found = [p for p in self.by_path.get(_bare(path), []) if p.name.lower().endswith(ending)]
        if found:
            return [path] if ending and path in found else found
        *folders, name = _bare(path).split("/")
        for image in self.by_name.get(name, []):
            within = _bare(image).split("/")[:-1]
            if set(folders) <= set(within) and image.name.lower().endswith(ending):
                found.append(image)
        return found if len(found) == 1 else []


# ---- splits and labels


def _split_named(name: str) -> str:
    """The split that a folder's name means, "" if none: "Training", "val2017", "test_images"."""
    named = _SPLIT_NAME.fullmatch(name.lower().strip())
    return _SPLIT_OF[named[1]] if named else ""


def _split_folders(folders: set[str]) -> dict[str, tuple[str, str]]:
    """{folder: (split, label)} of those names that mean a split: "Train"; "seg_train" if there is
    "seg_test" too; and "cat_train" if there are "cat_test" and the like of another class.
    """
    found = {}
    pairs: dict[str, dict[str, str]] = {}
    for folder in sorted(folders):
        within = _SPLIT_WITHIN.search(folder.lower())
        if _split_named(folder):
            found[folder] = (_split_named(folder), "")
        elif within:
            rest = f"{folder[: within.start()]}{folder[within.end() :]}".strip(" _.-")
            pairs.setdefault(rest, {})[folder] = _SPLIT_OF[within[1]]
    several = {rest: named for rest, named in pairs.items() if len(set(named.values())) > 1}
    for rest, named in several.items():
        for folder, split in named.items():
            found[folder] = (split, rest if len(several) > 1 else "")
    doubtful = [name for rest, named in pairs.items() if rest not in several for name in named]
    if doubtful:
        _warn(
            f"dataset: {_some(doubtful)} is taken as the name of a class. If it is a split, call "
            "it train, val or test."
        )
    return found


def _places(images: Sequence[Path]) -> dict[Path, tuple[str, str]]:
    """{image: (split, label)} as the folders say, or else the files' names; "all" and "" if nothing
    does. Warns of images beside the splits.
    """
    inside: dict[tuple, set[str]] = {}
    for path in images:
        for k, part in enumerate(path.parts):
            inside.setdefault(path.parts[:k], set()).add(part)
    known = _split_folders({part for path in images for part in path.parts[:-1]})
    splits = {}
    folders = {}
    for path in images:
        parts = list(path.parts[:-1])
        for k in reversed(range(1, len(parts))):  # train/train/, as archives unpack
            if parts[k] == parts[k - 1] and inside[path.parts[:k]] == {parts[k]}:
                del parts[k]
        at = next((k for k, part in enumerate(parts) if part in known), None)
        splits[path], label = known[parts[at]] if at is not None else ("all", "")
        if at is not None:
            parts[at : at + 1] = [label] if label else []
        folders[path] = [part for part in parts if part.lower() not in PLAIN]
    while all(folders.values()) and len({parts[0] for parts in folders.values()}) == 1:
        for parts in folders.values():  # one folder for all, such as "photos", tells nothing
            del parts[0]
    labels = {path: parts[0] if parts else "" for path, parts in folders.items()}
    prefixes = {} if any(labels.values()) else _label_prefixes(images)
    if prefixes and all(map(_split_named, prefixes.values())):
        splits |= {path: _split_named(name) for path, name in prefixes.items()}
    else:
        labels |= prefixes
    beside = [path for path in images if splits[path] == "all"]
    if beside and len(beside) < len(images):
        _warn(
            f"dataset: {len(beside)} images lie beside the folders of the splits and are not "
            f"measured: {_some(beside)}. Put them into one of these, or, if a class is called "
            "like a split, give it another name."
        )
    return {path: (splits[path], labels[path]) for path in images}


def _label_prefixes(files: Sequence[Path]) -> dict[Path, str]:
    """{file: label} if all are named {label}_{number}, with two labels or more: IMG_0001, IMG_0002
    ... are no labels.
    """
    found = {file: re.fullmatch(r"(.+)_(\d+)", file.stem) for file in files}
    if not all(found.values()):
        return {}
    labels = {file: match[1] for file, match in found.items()}
    return labels if len(set(labels.values())) > 1 else {}


# ---- masks and twins


def _masks(pictures: Sequence[Path]) -> dict[Path, list[Path]]:
    """{mask: what its image may be called} of the masks among some pictures: those in a folder of
    masks, and x_mask.png beside x.png, of which it warns.
    """
    there = {_bare(path) for path in pictures}
    found = {}
    maybe: dict[tuple, dict[Path, list[Path]]] = {}
    for path in pictures:
        for k, folder in enumerate(path.parts[:-1]):
            called = _unmasked(Path(*path.parts[:k], *path.parts[k + 1 :]))
            if _MASK_FOLDER.fullmatch(folder):
                found[path] = called
            elif folder.lower() in _MAYBE_MASKS:
                maybe.setdefault(path.parts[: k + 1], {})[path] = called
    for masks in maybe.values():
        if all(not there.isdisjoint(map(_bare, called)) for called in masks.values()):
            found |= masks
    beside = {}
    for path in pictures:
        own = _unmasked(path)[1:]
        if path not in found and own and _bare(own[0]) in there:
            beside[path] = own
    if beside:
        _warn(
            f"dataset: {len(beside)} pictures are taken as masks of the images beside them: "
            f"{_some(list(beside))}."
        )
    return found | beside


def _unmasked(path: Path) -> list[Path]:
    """[the path, and the same without "_mask" and such, where it has that]"""
    own = _MASK_NAME.fullmatch(path.stem)
    return [path, path.with_name(own[1] + path.suffix)] if own else [path]


def _add_files(
    column: str, files: dict[Path, list[Path]], rows: dict, names: _Names, folder: Path
) -> None:
    """Fill in the masks or twins, and warn of those that belong to no image, or of which an image
    has several.
    """
    owners = {}
    for file, called in files.items():
        owners[file] = next(filter(None, map(names.of, called)), [])
    count = Counter(image for images in owners.values() for image in images)
    for file, images in owners.items():
        for image in images:
            if count[image] == 1:
                rows[image][column] = str(folder / file)
    lost = [file for file, images in owners.items() if not images]
    if lost:
        _warn(
            f"dataset: {len(lost)} {column}s belong to no image, or to several of one name: "
            f"{_some(lost)}. Call them, and their folders, as their images."
        )
    several = [image for image, found in count.items() if found > 1]
    if several:
        _warn(
            f"dataset: {len(several)} images have several {column}s, of which none is used: "
            f"{_some(several)}. Unite them in one file."
        )


# ---- boxes


SIDES = ("x0", "y0", "x1", "y1")


def _add_boxes(rows: dict, names: _Names, files: Sequence[Path], folder: Path) -> None:
    """Fill in boxes, and the classes or labels that come with them, from boxes.csv or PASCAL VOC's
    files. An image of which a box is wrong has none, and a warning says so.
    """
    listed = {}
    faults = []
    for path in files:
        if path.name.lower() == "boxes.csv":
            found, wrong = _read_boxes(folder / path, names, path.parent)
            listed |= found
            faults += wrong
    for image, (boxes, number) in listed.items():
        rows[image]["class"] = number
        rows[image]["boxes"] = json.dumps(boxes) if boxes else ""
    lost = []
    for path in files:
        if path.suffix.lower() != ".xml":
            continue
        images = names.of(_without(path.with_suffix(""), "annotations"))
        lost += [] if images else [path]
        for image in images:
            try:
                label, boxes = _read_voc(folder / path, rows[image]["label"])
            except ValueError as error:
                faults.append(str(error))
                continue
            if not rows[image]["boxes"]:
                rows[image]["label"] = label
                rows[image]["boxes"] = json.dumps(boxes) if boxes else ""
    if faults and not listed and not any(row["boxes"] for row in rows.values()):
        raise ValueError(f"{faults[0]} ({len(faults)} such faults.)")
    if faults:
        _warn(
            f"boxes: {len(faults)} faults; the images concerned count as without boxes: "
            f"{' '.join(faults[:5])}"
        )
    if lost:
        _warn(f"boxes: {len(lost)} XML files belong to no image: {_some(lost)}.")
    if rows and not listed and all(row["label"].isdecimal() for row in rows.values()):
        for row in rows.values():
            row["class"] = int(row["label"])


def _read_boxes(
    file: Path, names: _Names, place: Path
) -> tuple[dict[Path, tuple[list, int]], list[str]]:
    """(boxes.csv as {image: ([[x0, y0, x1, y1], ...], class or -1)}, what is wrong with other
    lines). An image of which a line is wrong is left out. place: the file's folder, seen from the
    data set's. ValueError for other columns.
    """
    text, separator = _read_csv(file)
    reader = csv.reader(io.StringIO(text), delimiter=separator, skipinitialspace=True)
    columns: list[str] = []
    while not any(columns):
        columns = [cell.strip().lower() for cell in next(reader)]
    sides = set(SIDES) & set(columns)
    if "file" not in columns or not sides and "class" not in columns or len(sides) not in (0, 4):
        raise ValueError(
            f"{file} needs the columns file, x0, y0, x1, y1 (x1 and y1 lie just outside the box), "
            f"or file, class; it has {', '.join(columns)}."
        )
    unused = [name for name in columns if name and name not in ("file", "class", *SIDES)]
    if unused:
        _warn(f"{file}: these columns are not used: {', '.join(unused)}.")
    found: dict[Path, tuple[list, int]] = {}
    faults = []
    wrong = set()
    for cells in reader:
        if not any(cell.strip() for cell in cells):
            continue
        row = dict(zip(columns, map(str.strip, cells), strict=False))
        image = _image_named(row.get("file", ""), names, file.parent, place)
        decimal = "," if separator != "," else "."
        box, number = _box_of(row, decimal) if len(cells) <= len(columns) else (None, -1)
        if number != -1 and number != found.get(image, ([], number))[1]:
            box = None
        if image is None or box is None:
            wrong.add(image)
            faults.append(
                f"{file}, line {reader.line_num}: {separator.join(cells)!r} must name an image of "
                "this folder, with 0 <= x0 < x1 and 0 <= y0 < y1, and a whole number as its class, "
                "the same in each line of an image."
            )
            continue
        boxes, _ = found.setdefault(image, ([], number))
        boxes += [box] if box else []
    return {image: about for image, about in found.items() if image not in wrong}, faults


def _image_named(name: str, names: _Names, folder: Path, place: Path) -> Path | None:
    """The one image that a line of boxes.csv names; None if there is none, or more than one."""
    path = Path(name.strip("'").replace("\\", "/"))
    path = path.relative_to(folder) if path.is_relative_to(folder) else path
    if path.is_absolute() or ".." in path.parts or not path.name:
        return None
    ending = path.suffix.lower() if path.suffix.lower() in IMAGE_TYPES else ""
    tried = [place / path, path]
    if path.parts[0] == folder.name:
        tried.append(path.relative_to(folder.name))
    found = next(filter(None, (names.of(one, ending) for one in tried)), [])
    return found[0] if len(found) == 1 else None


def _box_of(row: dict[str, str], decimal: str = ".") -> tuple[list | None, int]:
    """(the box of a line, [] where its sides are empty and None where it is wrong; class or -1)"""
    try:
        cells = {name: row.get(name, "").replace(decimal, ".") for name in (*SIDES, "class")}
        box = [float(cells[side]) for side in SIDES if cells[side]]
        number = float(cells["class"] or -1)
    except ValueError:
        return None, -1
    right = not box or len(box) == 4 and _is_box(box)
    whole = not cells["class"] or number >= 0 and number % 1 == 0
    return (box, int(number)) if right and whole else (None, -1)


def _is_box(box: Sequence[float]) -> bool:
    x0, y0, x1, y1 = box
    return 0 <= x0 < x1 < np.inf and 0 <= y0 < y1 < np.inf


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
            x0, y0, x1, y1 = (float(corners.findtext(s)) for s in ("xmin", "ymin", "xmax", "ymax"))
            box = [max(0.0, x0 - 1), max(0.0, y0 - 1), x1, y1]
            if not _is_box(box):
                raise ValueError(f"a box is ({x0}, {y0}, {x1}, {y1})")
            objects.append((found.findtext("name", "").strip(), box))
    except (ElementTree.ParseError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"boxes: {file} is no PASCAL VOC file of objects with a bndbox ({error})."
        ) from None
    label = label or next((name for name, _ in objects), "")
    return label, [box for name, box in objects if name == label] or [box for _, box in objects]
