"""What comes from outside: networks and their weights, images, data sets. `cam_core` hands all of it on.

    1  torchvision   the one place that makes it importable next to a CPU-only torch
    2  networks      load_model: torchvision's, your own, and checkpoints from anywhere
    3  images        read_image, preprocess
    4  data sets     read_dataset, readable, load_batch, load_masks, load_boxes

Nothing read here is executed but the FILE.py that names a network of your own. What is wrong with a file is a
ValueError that names it and says what is allowed.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import os
import re
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import safe_open
from torch import Tensor, nn

# -------------------------------------------------------------------------------------------------------- 1 torchvision


def _declare_torchvision_ops() -> None:
    """Make `import torchvision` possible where its C++ operators cannot load.

    A torchvision wheel linked against CUDA finds no operators beside a CPU-only torch, and torchvision 0.28.0 then
    fails while it registers shape functions for `nms` and `qnms`. Nothing here calls them, so declaring the two schemas
    is enough. Where the operators do load, this function is never called.
    """
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declare_torchvision_ops.library = library  # the declaration lives as long as this object


try:
    import torchvision
except RuntimeError as error:
    if "torchvision::" not in str(error):
        raise
    for _name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
        del sys.modules[_name]  # halves of the failed import
    _declare_torchvision_ops()
    import torchvision

# ----------------------------------------------------------------------------------------------------------- 2 networks

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet; the shipped networks use the same
HOME = Path(__file__).resolve().parent


def nearest(name: str, known: Sequence[str] | Mapping[str, str], most: int = 60) -> str:
    """The words nearest to a wrong one, and the known ones (with what a mapping says of them), for an error message."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.4)
    about = known if isinstance(known, Mapping) else {}
    top = [f"{k} ({about[k]})" if k in about else k for k in known if k.count(".") < 2][:most]
    return (
        f"Nearest: {', '.join(close)}. " if close else ""
    ) + f"Known: {', '.join(top)}{', ...' if len(known) > len(top) else ''}"


def sha256(file: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def pick_device(name: str = "auto") -> torch.device:
    """The torch device for "auto" (CUDA, else MPS, else CPU), "cpu", "cuda", "cuda:N" or "mps". ValueError where it is
    not there.
    """
    if name == "auto":
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", str(name)):
        raise ValueError(f"device={name!r} is not one of auto, cpu, cuda, cuda:N, mps.")
    device = torch.device(name)
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}[device.type]
    if not there or (device.index or 0) >= max(1, torch.cuda.device_count()):
        raise ValueError(
            f"device={name!r} is not available on this machine. Use device=cpu, or auto to take what there is."
        )
    return device


def imagenet_classes() -> list[str]:
    """The 1000 ImageNet class names, from torchvision's metadata (offline)."""
    return list(torchvision.models.ResNet18_Weights.IMAGENET1K_V1.meta["categories"])


def load_model(
    arch: str | nn.Module = "auto",
    weights: str | Path = "auto",
    device: str | torch.device = "cpu",
    class_names: Sequence[str] = (),
) -> tuple[nn.Module, dict]:
    """A classifier with weights, in eval mode, frozen, channels-last (the faster layout), on `device`; and what is
    known of it.

    arch: any name of `torchvision.models.list_models`; a network of your own, as a module or as "FILE.py:name" (a class
    or function of that file which returns one; the file is executed); or "auto": what the weights are made for, which a
    file tells by its `arch` entry or its tensors, else resnet18. weights: "auto" (the checkpoint that ships in
    data/checkpoints; an own network as it is), "imagenet" (torchvision's best; it downloads and caches them) or one of
    torchvision's by name ("IMAGENET1K_V1"), or a file: a state dict, or a checkpoint with `model_state_dict` and, where
    it has them, `class_names`, `test_acc`, ... Files are loaded with `weights_only=True`, so nothing in them is
    executed; nor in a .safetensors file, whose metadata may tell `arch`, `size`, and `class_names` as a JSON list (give
    arch where they do not). class_names: names for the classes in place of the file's.

    Returns (model, info); info has arch, weights (name), sha256 (of the file; of an own network's tensors and source),
    class_names, size (the side of the input in pixels: the checkpoint's or the network's `image_size` or what
    torchvision's weights were trained for, else 224), and the checkpoint's own plain entries. Raises ValueError for an
    unknown arch, a file that does not fit it (says which keys and shapes, and which arch fits) or another number of
    names than classes, FileNotFoundError for a missing file, ConnectionError when ImageNet weights cannot be downloaded
    (says what to do).
    """
    known, name = torchvision.models.list_models(module=torchvision.models), str(weights)
    if isinstance(arch, nn.Module) or ".py:" in arch:
        model, info = _own_model(arch, weights, class_names)
    elif arch not in known and arch != "auto":
        raise ValueError(f"arch={arch!r} is neither a torchvision classifier nor FILE.py:name. {nearest(arch, known)}")
    elif name == "imagenet" or (name.startswith("IMAGENET1K") and not Path(weights).suffix):
        model, info = _pretrained(arch_name(arch), "DEFAULT" if name == "imagenet" else name)
    else:
        shipped = HOME / "data" / "checkpoints" / f"{arch_name(arch)}.pth"
        model, info = _load_checkpoint(arch, shipped if name == "auto" else Path(weights), class_names)
    if class_names and len(class_names) != len(info["class_names"]):
        raise ValueError(f"classes: {len(class_names)} names for a network with {len(info['class_names'])} classes.")
    info["class_names"] = list(class_names) or info["class_names"]
    if not isinstance(arch, nn.Module):
        model.image_size = info["size"]  # as torchvision's ViT has it; `explain` reads it
    device = pick_device(str(device))
    return model.eval().requires_grad_(False).to(device=device, memory_format=torch.channels_last), info


def arch_name(arch: str) -> str:
    """The name under which results and checkpoints of an `arch` parameter go."""
    return "resnet18" if arch == "auto" else arch.rpartition(":")[2]


def _size(arch: str, model: nn.Module) -> int:
    entry = torchvision.models.get_model_weights(arch).DEFAULT if arch else None
    return int(getattr(model, "image_size", None) or (entry.transforms().crop_size[0] if entry else 224))


def _pretrained(arch: str, weights: str) -> tuple[nn.Module, dict]:
    entries = torchvision.models.get_model_weights(arch)
    if weights not in entries.__members__:
        raise ValueError(f"weights={weights!r}: torchvision has {', '.join(entries.__members__)} for {arch}.")
    entry = entries[weights]
    if tuple(entry.transforms().mean) != MEAN:
        raise ValueError(f"weights={entry} want inputs normalised otherwise than by ImageNet's mean: not supported.")
    try:
        model = torchvision.models.get_model(arch, weights=entry)
    except OSError as error:  # urllib's URLError is one
        raise ConnectionError(
            f"ImageNet weights for {arch} could not be downloaded ({error}). Without a network, fetch "
            f"{Path(entry.url).name} elsewhere and give its path, weights=FILE.pth, or put it into "
            f"{Path(torch.hub.get_dir()) / 'checkpoints'}."
        ) from None
    names = list(entry.meta["categories"])
    return model, {"arch": arch, "weights": str(entry), "sha256": "", "class_names": names, "size": _size(arch, model)}


def _own_model(arch: str | nn.Module, weights: str | Path, given: Sequence[str] = ()) -> tuple[nn.Module, dict]:
    """A network of the user's own, as a module or as FILE.py:name."""
    digest = hashlib.sha256()
    if isinstance(arch, nn.Module):
        model, name = arch, type(arch).__name__
    else:
        place, _, name = arch.rpartition(":")
        if not Path(place).is_file():
            raise ValueError(f"arch={arch!r}: there is no file {place}.")
        spec = importlib.util.spec_from_file_location(f"own_{Path(place).stem}", place)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # `code_hash` asks for its source
        spec.loader.exec_module(module)
        if not callable(getattr(module, name, None)):
            raise ValueError(f"arch={arch!r}: {place} defines no class or function {name}.")
        model = getattr(module, name)()
        digest.update(Path(place).read_bytes())
    if not isinstance(model, nn.Module):
        raise ValueError(f"arch={arch!r} gives a {type(model).__name__}, not a torch.nn.Module.")
    extra = {}
    if str(weights) != "auto":
        state, extra = _read_checkpoint(Path(weights))
        _fit(model, state, f"weights={weights} does not fit {name}")
    size = int(extra.get("size") or _size("", model))
    first = next(model.parameters(), torch.zeros(()))
    try:
        with torch.no_grad():
            logits = model.eval()(torch.zeros(1, 3, size, size).to(first))
        classes = getattr(logits, "logits", logits).shape[1]
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(
            f"arch={name} does not take a batch (1, 3, {size}, {size}) of images: {error} If its images have another "
            "size, give it an attribute image_size."
        ) from None
    for key, tensor in model.state_dict().items():
        digest.update(key.encode() + tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    info = {**extra, "arch": name, "weights": "its own" if str(weights) == "auto" else Path(weights).name}
    names = _class_names(extra, classes, given)
    return model, info | {"sha256": digest.hexdigest(), "class_names": names, "size": size}


def _class_names(extra: Mapping, classes: int, given: Sequence[str]) -> list[str]:
    """The given class names; else those that a checkpoint holds, as a list, by index or with their index; else
    ImageNet's for 1000 classes, or numbers. ValueError for another number of names than classes.
    """
    names = given or extra.get("class_names")
    if isinstance(names, Mapping):
        index = {str(v): k for k, v in names.items()} if all(isinstance(k, str) for k in names) else {}
        by_number = index if set(index) == {str(k) for k in range(classes)} else {str(k): v for k, v in names.items()}
        names = [by_number[str(k)] for k in range(classes) if str(k) in by_number]
    names = list(names or (imagenet_classes() if classes == 1000 else [f"class {k}" for k in range(classes)]))
    if len(names) != classes:
        raise ValueError(
            f"classes: {len(names)} names {'' if given else 'in the file '}for a network with {classes} classes."
            f"{'' if given else ' Give them, classes=a,b,c.'}"
        )
    return names


def _read_checkpoint(file: Path) -> tuple[dict[str, Tensor], dict]:
    """(state dict, what else is in the file), read without executing anything in it."""
    if not file.is_file():
        shipped = sorted(p.stem for p in (HOME / "data" / "checkpoints").glob("*.pth"))
        raise FileNotFoundError(
            f"weights: there is no file {file}. Checkpoints that ship: {', '.join(shipped) or 'none'}. Notebook 01 "
            "makes those in trained/ and synthetic/."
        )
    scalar = np.float64(0).__reduce__()[0]  # accuracies are often NumPy's numbers, which hold data only
    numbers = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    numbers += [np.dtype, *(type(np.dtype(t)) for t in (np.float64, np.float32, np.int64, np.int32))]
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                content = {**(opened.metadata() or {}), "state_dict": {k: opened.get_tensor(k) for k in opened.keys()}}
            content["class_names"] = json.loads(content.get("class_names", "[]"))
        else:
            with torch.serialization.safe_globals(numbers):
                content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types here; all mean: not a file of tensors
        raise ValueError(
            f"weights={file} is not a PyTorch file of plain tensors ({type(error).__name__}). It may be damaged, or a "
            "whole model, which is not read, since reading it would execute what is in it: save its state_dict()."
        ) from None
    inside = next(
        (content[k] for k in ("model_state_dict", "state_dict") if isinstance(content, dict) and k in content), content
    )
    if not isinstance(inside, dict) or not inside or not all(isinstance(v, Tensor) for v in inside.values()):
        raise ValueError(
            f"weights={file} holds no state dict: expected tensors by name, or a 'model_state_dict' entry."
        )
    state = {k: v.float() if v.is_floating_point() else v for k, v in inside.items()}
    state = _unprefixed(_unprefixed(state, "_orig_mod."), "module.")  # what torch.compile and DataParallel put before
    return state, {k: v for k, v in content.items() if inside is not content and v is not inside}


def _unprefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items()} if all(k.startswith(prefix) for k in state) else state


def _load_checkpoint(arch: str, file: Path, given: Sequence[str] = ()) -> tuple[nn.Module, dict]:
    """A torchvision classifier from a file; arch "auto" takes the file's word, or the one that its tensors fit."""
    state, extra = _read_checkpoint(file)
    state = _unprefixed(state, "model.")  # as Lightning has it
    said = str(extra.get("arch") or "")
    own = said.lower() if said.lower() in torchvision.models.list_models(module=torchvision.models) else ""
    if arch == "auto":
        arch = own or _arch_of(state) or ("" if said else "resnet18")
        if not arch:
            raise ValueError(f"weights={file} was saved for arch={said!r}, your own? Give arch=FILE.py:{said}.")
    elif own not in ("", arch):
        raise ValueError(f"weights={file} was saved for arch={own!r}, not {arch!r}. Give arch={own}.")
    if arch.startswith("densenet"):  # older files
        state = {re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", k): v for k, v in state.items()}
    if file.suffix == ".safetensors":  # it keeps its tensors in no order, and the last one tells the number of classes
        with torch.device("meta"):
            plain = {"init_weights": False} if arch in ("googlenet", "inception_v3") else {}
            order = [*torchvision.models.get_model(arch, weights=None, **plain).state_dict()]
        state = {k: state[k] for k in sorted(state, key=lambda k: order.index(k) if k in order else -1)}
    head = list(state.values())[-1]
    if head.ndim == 0:
        raise ValueError(
            f"weights={file} does not end in a classifier but in {list(state)[-1]!r}: its head is missing."
        )
    classes, settings = len(head), {}
    if arch in ("googlenet", "inception_v3"):  # both were trained with auxiliary heads and on inputs scaled otherwise
        settings["aux_logits"] = any(k.startswith(("aux", "Aux")) for k in state)
        settings["transform_input"] = bool(extra.get("transform_input", classes == 1000))
        settings["init_weights"] = False
    model = torchvision.models.get_model(arch, weights=None, num_classes=classes, **settings)
    fits = _arch_of(state)
    hint = f" Its tensors are those of arch={fits}." if fits not in ("", arch) else ""
    _fit(model, state, f"weights={file} does not fit arch={arch}", hint)
    size = int(extra.get("size") or _size(arch, model))
    info = {**extra, "arch": arch, "weights": file.name, "sha256": sha256(file), "size": size}
    return model, info | {"class_names": _class_names(extra, classes, given)}


def _arch_of(state: Mapping[str, Tensor]) -> str:
    """The torchvision classifier that tensors belong to, told by its number of parameters, which is unlike any other's;
    "" if there is none.
    """
    if any(k.startswith(("inception3a.", "Mixed_5b.")) for k in state):  # auxiliary heads may be there or not
        return "googlenet" if "inception3a.branch1.conv.weight" in state else "inception_v3"
    buffers = ("running_mean", "running_var", "num_batches_tracked", "position_index", "coords_table")
    kept = [v for k, v in state.items() if not k.endswith(buffers)]
    if len(kept) < 2 or not kept[-1].ndim or kept[-2].ndim < 2:
        return ""
    count = sum(v.numel() for v in kept) + (1000 - len(kept[-1])) * (kept[-2][0].numel() + 1)  # as for 1000 classes
    known = torchvision.models.list_models(module=torchvision.models)
    entries = ((name, entry) for name in known for entry in torchvision.models.get_model_weights(name))
    return next((name for name, entry in entries if entry.meta["num_params"] == count), "")


def _fit(model: nn.Module, state: dict[str, Tensor], what: str, hint: str = "") -> None:
    """Load a state dict; a ValueError says which keys and shapes are wrong."""
    for name, buffer in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            state.setdefault(name, buffer)  # files from before torch 0.4.1 have no such counters; nothing reads them
    expected = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    found = {k: tuple(v.shape) for k, v in state.items()}
    if expected != found:
        missing, surplus = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        shapes = [
            f"{k} {found[k]} instead of {expected[k]}" for k in expected if k in found and found[k] != expected[k]
        ]
        parts = [
            f"{what}: {', '.join(v[:4])}{f' and {len(v) - 4} more' if len(v) > 4 else ''}"
            for what, v in (("missing", missing), ("unknown", surplus), ("shape", shapes))
            if v
        ]
        raise ValueError(f"{what}. {'; '.join(parts)}.{hint}")
    model.load_state_dict(state)


def resolve_weights(
    arch: str, weights: str, dataset: str, data: Path, retrain: bool = False, classes: Sequence[str] = ()
) -> str:
    """The `weights` argument of `load_model` that a notebook's parameters mean.

    "auto" is the shipped checkpoint for the synthetic data (with `retrain`, the one that notebook 01 trained here), the
    one that 01 trained on a folder of your own if `classes` or `retrain` is given, and ImageNet else. An own network,
    FILE.py:name, is taken as it is.
    """
    if weights != "auto" or ".py:" in arch:
        return weights
    if dataset == "synthetic":
        return str(data / dataset / "checkpoints" / f"{arch_name(arch)}.pth") if retrain else "auto"
    if dataset in DATASETS or not (classes or retrain):
        return "imagenet"
    return str(trained_folder(data, dataset_folder(HOME, str(data), dataset)) / f"{arch_name(arch)}.pth")


def trained_folder(data: Path, folder: Path) -> Path:
    """Where notebook 01 puts the networks that it trained on a folder of your own."""
    return data / "trained" / f"{folder.name}-{zlib.crc32(os.fsencode(folder)):08x}"


# ------------------------------------------------------------------------------------------------------------- 3 images

IMAGE_TYPES = {".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".webp", ".tif", ".tiff"}


def read_image(file: str | Path) -> Image.Image:
    """An image file as RGB, turned as its EXIF says, 16-bit grey scaled to 8, transparency laid on white. ValueError
    names a bad file, and one with more than Pillow's MAX_IMAGE_PIXELS (89 million), which may be a decompression bomb.
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
                f"image: {file} has grey values from {grey.min()} to {grey.max()}; scale them to 0 and more."
            )
        full = max(grey.max(), 65535 if image.mode.startswith("I") else 1)
        image = Image.fromarray((grey / full * 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def preprocess(images: Image.Image | Sequence[Image.Image], size: int = 224) -> Tensor:
    """RGB images -> (B, 3, size, size) float32: squashed to a square, scaled to [0, 1], minus ImageNet's mean, over its
    deviation.

    The whole picture is squashed, not its centre cut out, so a map covers the whole photograph and can be laid over it
    at any size.
    """
    images = [images] if isinstance(images, Image.Image) else images
    pixels = np.stack([np.asarray(i.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)) for i in images])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255  # stays channels-last in memory
    return (x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


# ---------------------------------------------------------------------------------------------------------- 4 data sets

DATASETS = ("synthetic", "cifar10", "samples")  # those that notebook 01 makes; any other name is a folder


def read_dataset(folder: str | Path, split: str | None = None):
    """A data set as a pandas table, one row per image, sorted; files as absolute paths.

    folder has either a manifest.csv, as notebook 01 writes it, or images in one of these layouts, with or without
    train/ val/ test/ above: `{label}_{number}.jpg`, one folder per class, or plain files without labels. Beside them
    may be masks/ and twins/ with the same relative names (.png), and boxes: PASCAL VOC's XML files (beside the images
    or in Annotations/) or one boxes.csv with the columns file, x0, y0, x1, y1 (pixels, x1 and y1 exclusive; a line for
    each box) and, optionally, class. Columns: id, split ("all" where there are no splits), label ("" if unknown), class
    (the index that boxes.csv, or a number for a label, gives; else -1), file, mask, twin ("" if there is none), boxes
    (JSON, "" if unknown), truth ("mask", "boxes" or ""), and whatever else a manifest has. split: only these rows.
    Raises ValueError for a folder without images or without the asked split, for a manifest that names files outside
    the folder, and for files of boxes that are wrong.
    """
    import pandas as pd

    folder = Path(folder).resolve()
    if (folder / "manifest.csv").is_file():
        frame = pd.read_csv(folder / "manifest.csv", keep_default_na=False, dtype={"id": str})
        for column in [c for c in frame if c in ("file", "mask", "hull", "twin", "mask_b")]:
            frame[column] = [_inside(folder, str(name), column) if name else "" for name in frame[column]]
        frame = frame.sort_values("id", kind="stable")
    elif folder.is_dir():
        frame = pd.DataFrame(_scan(folder), columns=["id", "split", "label", "class", "file", "mask", "twin", "boxes"])
    else:
        raise ValueError(
            f"dataset: there is no folder {folder}. Run notebook 01 for the synthetic data, or give a folder of images."
        )
    if frame.empty:
        raise ValueError(f"dataset: {folder} holds no images ({', '.join(sorted(IMAGE_TYPES))}).")
    for column, default in {"class": -1, "mask": "", "twin": "", "boxes": "", "label": "", "split": "all"}.items():
        frame[column] = frame[column] if column in frame else default
    boxed = ~frame["boxes"].isin(["", "[]"])
    frame["truth"] = np.where(frame["mask"] != "", "mask", np.where(boxed, "boxes", ""))
    if split is not None:
        known = sorted(frame.split.unique())
        frame = frame[frame.split == split]
        if frame.empty:
            raise ValueError(f"dataset: {folder} has no split {split!r}; it has {', '.join(known)}.")
    return frame.reset_index(drop=True)


def _inside(folder: Path, name: str, column: str) -> str:
    """The absolute path of a file that a manifest names; ValueError for one beside the manifest's folder."""
    path = Path(os.path.normpath(folder / name))
    if not path.is_relative_to(folder):
        raise ValueError(
            f"dataset: {folder / 'manifest.csv'} names {name!r} as a {column}, which is outside its folder. Name files "
            "inside it, such as test/a.png; a link that you put there yourself is followed."
        )
    return str(path)


def _scan(folder: Path) -> list[tuple]:
    side = ("masks", "twins", "hulls", "checkpoints")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_TYPES and p.is_file())
    parts = [p.relative_to(folder).parts for p in files]
    kept = [
        (p, q) for p, q in zip(files, parts, strict=True) if q[0] not in side and not any(s.startswith(".") for s in q)
    ]
    numbered = [re.fullmatch(r"(.+)_(\d+)", p.stem) for p, _ in kept]
    named = bool(kept) and all(numbered) and len({m[1] for m in numbered}) > 1  # IMG_0001, IMG_0002 ... are no labels
    stems = [p.relative_to(folder).with_suffix("").as_posix() for p, _ in kept]
    often = Counter(stems)
    listed = _read_boxes(folder / "boxes.csv", {p.relative_to(folder).as_posix() for p, _ in kept})
    sheets = {re.sub(r"^Annotations/", "", p.relative_to(folder).with_suffix("").as_posix()): p
              for p in sorted(folder.rglob("*.xml"))}  # fmt: skip
    rows = []
    for (file, part), match, stem in zip(kept, numbered, stems, strict=True):
        split = part[0] if part[0] in ("train", "val", "test") and len(part) > 1 else "all"
        inner = part[1:-1] if split != "all" else part[:-1]
        label = inner[0] if inner else match[1] if named else ""
        beside = [folder / name / file.relative_to(folder).with_suffix(".png") for name in ("masks", "twins")]
        mask, twin = (str(p) if p.is_file() else "" for p in beside)
        image_id = stem if often[stem] == 1 else f"{stem}{file.suffix}"
        rows.append([image_id, split, label, -1, str(file), mask, twin, ""])
    if len({row[2] for row in rows}) == 1:  # one name for all, such as a folder called "photos", tells no classes apart
        rows = [[*row[:2], "", *row[3:]] for row in rows]
    for row, (file, _), stem in zip(rows, kept, stems, strict=True):
        sheet = sheets.get(stem) or sheets.get(file.stem)
        boxes, row[3] = listed.get(file.relative_to(folder).as_posix(), ([], -1))
        if sheet and not boxes:
            row[2], boxes = _read_voc(sheet, row[2])
        row[7] = json.dumps(boxes) if boxes else ""
    if rows and all(row[2].isdigit() for row in rows) and not listed:
        rows = [[*row[:3], int(row[2]), *row[4:]] for row in rows]
    return rows


def _read_boxes(file: Path, names: set[str]) -> dict[str, tuple[list, int]]:
    """boxes.csv as {image: ([[x0, y0, x1, y1], ...], class or -1)}; ValueError with the line of what is wrong."""
    import pandas as pd

    if not file.is_file():
        return {}
    table = pd.read_csv(file)
    if "file" not in table or len({"x0", "y0", "x1", "y1"} & set(table)) not in (0, 4):
        raise ValueError(f"{file} needs the columns file, x0, y0, x1, y1, or file, class; it has {', '.join(table)}.")
    found: dict[str, tuple[list, int]] = {}
    for line, row in enumerate(table.to_dict("records"), 2):
        box = [row.get(side, np.nan) for side in ("x0", "y0", "x1", "y1")]
        index = row.get("class", np.nan)
        numbers = all(isinstance(v, Real) for v in [*box, index])
        whole = numbers and (np.isnan(index) or (index == int(index) and index >= 0))
        right = numbers and (np.isnan(box).all() or (min(box) >= 0 and box[0] < box[2] and box[1] < box[3]))
        if row["file"] not in names or not whole or not right:
            raise ValueError(
                f"{file}, line {line}: {row} must name an image of this folder, with 0 <= x0 < x1 and 0 <= y0 < y1, "
                "and a whole number as its class."
            )
        boxes, known = found.setdefault(row["file"], ([], -1 if np.isnan(index) else int(index)))
        boxes += [] if np.isnan(box).any() else [[float(v) for v in box]]
    return found


def _read_voc(file: Path, label: str) -> tuple[str, list]:
    """(label, boxes [[x0, y0, x1, y1], ...]) of a PASCAL VOC file: the boxes of the objects of this label, or of all if
    none has it; without a label the first object's. VOC counts pixels from 1 and includes the last one.
    """
    from defusedxml import ElementTree  # refuses entities: they may name other files, or grow without end

    try:
        objects = [(o.findtext("name", ""), [float(o.find("bndbox").findtext(side))
                    for side in ("xmin", "ymin", "xmax", "ymax")])
                   for o in ElementTree.parse(file).getroot().iter("object")]  # fmt: skip
    except (ElementTree.ParseError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"boxes: {file} is no PASCAL VOC file of objects with a bndbox ({error}).") from None
    label = label or next((name for name, _ in objects), "")
    mine = [box for name, box in objects if name == label] or [box for _, box in objects]
    return label, [[max(0.0, x0 - 1), max(0.0, y0 - 1), x1, y1] for x0, y0, x1, y1 in mine]


def class_indices(frame, class_names: Sequence[str]) -> list[int]:
    """For each row the index of its class among class_names, told by its label's name or, where that is none or a
    number, by its `class`; -1 where it is none of these. ValueError for a number out of range names the image.
    """
    index = {name.lower(): k for k, name in reversed(list(enumerate(class_names)))}
    found = []
    for file, label, number in zip(frame["file"], frame["label"].astype(str), frame["class"], strict=True):
        known = label.lower() in index
        if not known and (label == "" or label.isdigit()) and int(number) >= len(class_names):
            raise ValueError(f"class {number} of {file} is out of range: the network has {len(class_names)} classes.")
        found.append(index[label.lower()] if known else int(number) if label == "" or label.isdigit() else -1)
    return found


def dataset_folder(repo: Path, data_dir: str, dataset: str) -> Path:
    """Where the data set of the parameters lies: data_dir/NAME for those that 01 makes, else the given folder."""
    return Path(repo) / data_dir / dataset if dataset in DATASETS else (Path(repo) / Path(dataset).expanduser())


def words(text: str) -> list[str]:
    """The parts of a parameter that holds several: "a, b" -> ["a", "b"]."""
    return [part.strip() for part in text.split(",") if part.strip()]


def split_rows(frame, split: str):
    """The rows of a split, "val" or "test", for choosing and for measuring.

    A set without splits and with 40 or more images is halved by the hash of each file, so a file stays on its side
    when others are added. A smaller one has no validation rows (an empty table) and all of it is for measuring.
    """
    named, loose = frame[frame["split"] == split], frame[frame["split"] == "all"]
    if not named.empty or (frame["split"] != "all").any():
        return named.reset_index(drop=True)
    if len(loose) < 40:
        return loose if split == "test" else loose.iloc[:0]
    odd = np.array([int(sha256(f)[:8], 16) % 2 == 1 for f in loose["file"]])
    return loose[odd == (split == "test")].reset_index(drop=True)


def subset(frame, n: int, seed: int):
    """The first n rows of a seeded permutation of the table (n = 0 or too large: all of it), so a smaller run is a
    subset of a larger one.
    """
    order = np.random.default_rng([seed, 7]).permutation(len(frame))
    return frame.iloc[order[: n or None]].reset_index(drop=True)


def readable(frame, n: int = 0, seed: int = 0, strict: bool = False):
    """The first n rows (0: all) of a seeded permutation whose image, mask and twin can be read: (rows, left out).

    left out: a table of id, file and reason; see `report_left_out`. Raises ValueError with strict at the first file
    that cannot be read, and else when there is none that can.
    """
    import pandas as pd

    frame, kept, left_out = subset(frame, 0, seed), [], []
    for begin in range(0, len(frame), 64):
        good, bad = split_readable(frame.iloc[begin : begin + 64], strict)
        kept.append(good)
        left_out += bad
        if n and sum(map(len, kept)) >= n:
            break
    rows = pd.concat(kept).head(n or len(frame)).reset_index(drop=True) if kept else frame
    if rows.empty and left_out:
        raise ValueError(f"dataset: none of its {len(left_out)} images can be read, such as {left_out[0]['file']}.")
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
    """The boxes of a table's rows in the pixels of the squashed image, size x size: for each row [[x0, y0, x1, y1],
    ...], cut to the image. ValueError names a row without a box, or with an empty one.
    """
    found = []
    for row_id, file, text in zip(frame["id"], frame["file"], frame["boxes"], strict=True):
        width, height = read_image(file).size
        scale = np.array([size / width, size / height] * 2)
        boxes = (np.array(json.loads(text or "[]"), float).reshape(-1, 4) * scale).clip(0, size)
        if not len(boxes) or not (boxes[:, :2] < boxes[:, 2:]).all():
            raise ValueError(f"image {row_id}: its boxes {text or '(none)'} are empty or beside the image ({file}).")
        found.append(boxes.tolist())
    return found


def load_masks(frame, column: str = "mask", size: int = 224) -> Tensor:
    """The masks of a table's column as booleans, (B, size, size). A row whose truth is "boxes" gets its boxes as its
    mask: the pixels whose centre lies in one. ValueError names an empty mask, or a row that has none.
    """
    masks, centre = [], torch.arange(size) + 0.5
    for position, (row_id, file) in enumerate(zip(frame["id"], frame[column], strict=True)):
        if not file and column == "mask" and "truth" in frame and frame["truth"].iloc[position] == "boxes":
            mask = torch.zeros(size, size, dtype=torch.bool)
            for x0, y0, x1, y1 in load_boxes(frame.iloc[[position]], size)[0]:
                mask |= ((centre >= y0) & (centre < y1))[:, None] & (centre >= x0) & (centre < x1)
            mask = mask.numpy()
        elif not file:
            raise ValueError(f"image {row_id} has no {column}: keep only rows that have one.")
        else:
            mask = np.asarray(read_image(file).convert("L").resize((size, size), Image.Resampling.NEAREST)) > 127
        if not mask.any():
            raise ValueError(f"the {column} of image {row_id} is empty ({file}); what counts are values above 127.")
        masks.append(mask)
    return torch.from_numpy(np.stack(masks))


def safe_name(image_id: str) -> str:
    """An image's id as a file name: everything but letters, digits, `.`, `+`, `-` becomes `_`, so it stays in its
    folder, and a checksum follows where anything changed, so two ids never share a name.
    """
    name = re.sub(r"[^\w.+-]", "_", str(image_id)).lstrip(".") or "_"
    return name if name == str(image_id) else f"{name}-{zlib.crc32(str(image_id).encode()):08x}"
