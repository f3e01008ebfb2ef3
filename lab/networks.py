"""Networks and their weights: torchvision's by name, your own, and checkpoints from anywhere; and
their input.

Nothing read here is executed but the FILE.py that names a network of your own. What is wrong with a
file is a ValueError that names it and says what is allowed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from lab import HOME, nearest, sha256

# ---- torchvision


def _declare_torchvision_ops() -> None:
    """Make `import torchvision` possible where its C++ operators cannot load.

    A torchvision wheel linked against CUDA finds no operators beside a CPU-only torch, and
    torchvision 0.28.0 then fails while it registers shape functions for `nms` and `qnms`. Nothing
    here calls them, so declaring the two schemas is enough. Where the operators do load, this
    function is never called.
    """
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declare_torchvision_ops.library = library  # the declaration lives as long as this object


try:
    import torchvision.transforms.v2
except RuntimeError as error:
    if "torchvision::" not in str(error):
        raise
    for _name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
        del sys.modules[_name]  # halves of the failed import
    _declare_torchvision_ops()
    import torchvision.transforms.v2

# ---- networks

MEAN, STD = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)  # of ImageNet; the shipped networks use the same


def pick_device(name: str = "auto") -> torch.device:
    """The torch device for "auto" (CUDA, else MPS, else CPU), "cpu", "cuda", "cuda:N", "mps" or
    "mps:0".

    Raises ValueError for another name and for a device that is not there.
    """
    cuda = torch.cuda.is_available()
    mps = torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    if not re.fullmatch(r"cpu|mps(:0)?|cuda(:\d+)?", str(name)):
        raise ValueError(f"device={name!r} is not one of auto, cpu, cuda, cuda:N, mps.")
    device = torch.device(name)
    count = {"cpu": 1, "cuda": torch.cuda.device_count() if cuda else 0, "mps": int(mps)}[
        device.type
    ]
    if (device.index or 0) >= count:
        raise ValueError(
            f"device={name!r} is not available on this machine. Use device=cpu, or auto to take "
            "what there is."
        )
    return device


def native_bf16(device: str | torch.device) -> bool:
    """Whether a device multiplies in bfloat16 itself. Elsewhere torch emulates it, which is slower
    than float32 and no more exact, so nothing is gained.
    """
    device = torch.device(device)
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        has = torch.cpu.get_capabilities()
        return any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))
    return False


def imagenet_classes() -> list[str]:
    """The 1000 ImageNet class names, from torchvision's metadata (offline)."""
    return list(torchvision.models.ResNet18_Weights.IMAGENET1K_V1.meta["categories"])


def load(
    arch: str | nn.Module = "auto",
    weights: str | Path = "auto",
    device: str | torch.device = "cpu",
    class_names: Sequence[str] = (),
) -> tuple[nn.Module, dict]:
    """A classifier with weights, in eval mode, frozen, channels-last (the faster layout), on
    `device`; and what is known of it.

    arch: any name of `torchvision.models.list_models`; a network of your own, as a module or as
    "FILE.py:name" (a class or function of that file which returns one; the file is executed); or
    "auto": what the weights are made for, which a file tells by its `arch` entry or its tensors,
    else resnet18. weights: "auto" (the checkpoint that ships in data/checkpoints; an own network as
    it is), "imagenet" (torchvision's best; it downloads and caches them) or one of torchvision's by
    name ("IMAGENET1K_V1"), or a file: a state dict, or a checkpoint with `model_state_dict` and,
    where it has them, `class_names`, `test_acc`, ... Files are loaded with `weights_only=True`, so
    nothing in them is executed; nor in a .safetensors file, whose metadata may tell `arch`, `size`,
    and `class_names` as a JSON list (give arch where they do not). class_names: names for the
    classes in place of the file's.

    Returns (model, info); info has arch, weights (name), sha256 (of the file; of an own network's
    tensors and source), class_names, size (the side of the input in pixels: the checkpoint's or the
    network's `image_size` or what torchvision's weights were trained for, else 224), and the
    checkpoint's own plain entries. Raises ValueError for an unknown arch, a file that does not fit
    it (says which keys and shapes, and which arch fits) or another number of names than classes,
    FileNotFoundError for a missing file, ConnectionError when ImageNet weights cannot be downloaded
    (says what to do).
    """
    known, name = torchvision.models.list_models(module=torchvision.models), str(weights)
    if isinstance(arch, nn.Module) or ".py:" in arch:
        model, info = _own_model(arch, weights, class_names)
    elif arch not in known and arch != "auto":
        raise ValueError(
            f"arch={arch!r} is neither a torchvision classifier nor FILE.py:name. "
            f"{nearest(arch, known)}"
        )
    elif name == "imagenet" or (name.startswith("IMAGENET1K") and not Path(weights).suffix):
        model, info = _pretrained(arch_name(arch), "DEFAULT" if name == "imagenet" else name)
    else:
        shipped = HOME / "data" / "checkpoints" / f"{arch_name(arch)}.pth"
        model, info = _load_checkpoint(
            arch, shipped if name == "auto" else Path(weights), class_names
        )
    if class_names and len(class_names) != len(info["class_names"]):
        raise ValueError(
            f"classes: {len(class_names)} names for a network with {len(info['class_names'])} "
            "classes."
        )
    info["class_names"] = list(class_names) or info["class_names"]
    if not isinstance(arch, nn.Module):
        model.image_size = info["size"]  # as torchvision's ViT has it; `explain` reads it
    device = pick_device(str(device))
    return model.eval().requires_grad_(False).to(
        device=device, memory_format=torch.channels_last
    ), info


def arch_name(arch: str) -> str:
    """The name under which results and checkpoints of an `arch` parameter go."""
    return "resnet18" if arch == "auto" else arch.rpartition(":")[2]


def _size(arch: str, model: nn.Module) -> int:
    entry = torchvision.models.get_model_weights(arch).DEFAULT if arch else None
    return int(
        getattr(model, "image_size", None) or (entry.transforms().crop_size[0] if entry else 224)
    )


def _pretrained(arch: str, weights: str) -> tuple[nn.Module, dict]:
    entries = torchvision.models.get_model_weights(arch)
    if weights not in entries.__members__:
        raise ValueError(
            f"weights={weights!r}: torchvision has {', '.join(entries.__members__)} for {arch}."
        )
    entry = entries[weights]
    if tuple(entry.transforms().mean) != MEAN:
        raise ValueError(
            f"weights={entry} want inputs normalised otherwise than by ImageNet's mean: not "
            "supported."
        )
    try:
        model = torchvision.models.get_model(arch, weights=entry)
    except OSError as error:  # urllib's URLError is one
        raise ConnectionError(
            f"ImageNet weights for {arch} could not be downloaded ({error}). Without a network, "
            "fetch "
            f"{Path(entry.url).name} elsewhere and give its path, weights=FILE.pth, or put it into "
            f"{Path(torch.hub.get_dir()) / 'checkpoints'}."
        ) from None
    names = list(entry.meta["categories"])
    return model, {
        "arch": arch,
        "weights": str(entry),
        "sha256": "",
        "class_names": names,
        "size": _size(arch, model),
    }


def _own_model(
    arch: str | nn.Module, weights: str | Path, given: Sequence[str] = ()
) -> tuple[nn.Module, dict]:
    """A network of the user's own, as a module or as FILE.py:name."""
    digest = hashlib.sha256()
    if isinstance(arch, nn.Module):
        model, name = arch, type(arch).__name__
    else:
        place, _, name = arch.rpartition(":")
        if not Path(place).is_file():
            raise ValueError(f"arch={arch!r}: there is no file {place}.")
        spec = importlib.util.spec_from_file_location(f"own_{Path(place).stem}", place)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(
            spec
        )  # `code_hash` asks for its source
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
            f"arch={name} does not take a batch (1, 3, {size}, {size}) of images: {error} If its "
            "images have another "
            "size, give it an attribute image_size."
        ) from None
    for key, tensor in model.state_dict().items():
        digest.update(
            key.encode()
            + tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        )
    info = {
        **extra,
        "arch": name,
        "weights": "its own" if str(weights) == "auto" else Path(weights).name,
    }
    names = _class_names(extra, classes, given)
    return model, info | {"sha256": digest.hexdigest(), "class_names": names, "size": size}


def _class_names(extra: Mapping, classes: int, given: Sequence[str]) -> list[str]:
    """The given class names; else those that a checkpoint holds, as a list, by index or with their
    index; else ImageNet's for 1000 classes, or numbers. ValueError for another number of names than
    classes.
    """
    names = given or extra.get("class_names")
    if isinstance(names, Mapping):
        index = (
            {str(v): k for k, v in names.items()} if all(isinstance(k, str) for k in names) else {}
        )
        by_number = (
            index
            if set(index) == {str(k) for k in range(classes)}
            else {str(k): v for k, v in names.items()}
        )
        names = [by_number[str(k)] for k in range(classes) if str(k) in by_number]
    names = list(
        names or (imagenet_classes() if classes == 1000 else [f"class {k}" for k in range(classes)])
    )
    if len(names) != classes:
        raise ValueError(
            f"classes: {len(names)} names {'' if given else 'in the file '}for a network with "
            f"{classes} classes."
            f"{'' if given else ' Give them, classes=a,b,c.'}"
        )
    return names


def _read_checkpoint(file: Path) -> tuple[dict[str, Tensor], dict]:
    """(state dict, what else is in the file), read without executing anything in it."""
    if not file.is_file():
        shipped = sorted(p.stem for p in (HOME / "data" / "checkpoints").glob("*.pth"))
        raise FileNotFoundError(
            f"weights: there is no file {file}. Checkpoints that ship: "
            f"{', '.join(shipped) or 'none'}. Notebook 01 "
            "makes those in trained/ and synthetic/."
        )
    scalar = np.float64(0).__reduce__()[
        0
    ]  # accuracies are often NumPy's numbers, which hold data only
    numbers = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    numbers += [
        np.dtype,
        *(type(np.dtype(t)) for t in (np.float64, np.float32, np.int64, np.int32)),
    ]
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                content = {
                    **(opened.metadata() or {}),
                    "state_dict": {k: opened.get_tensor(k) for k in opened.keys()},
                }
            content["class_names"] = json.loads(content.get("class_names", "[]"))
        else:
            with torch.serialization.safe_globals(numbers):
                content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types here; all mean: not a file of tensors
        raise ValueError(
            f"weights={file} is not a PyTorch file of plain tensors ({type(error).__name__}). It "
            "may be damaged, or a "
            "whole model, which is not read, since reading it would execute what is in it: save "
            "its state_dict()."
        ) from None
    inside = next(
        (
            content[k]
            for k in ("model_state_dict", "state_dict")
            if isinstance(content, dict) and k in content
        ),
        content,
    )
    if (
        not isinstance(inside, dict)
        or not inside
        or not all(isinstance(v, Tensor) for v in inside.values())
    ):
        raise ValueError(
            f"weights={file} holds no state dict: expected tensors by name, or a "
            "'model_state_dict' entry."
        )
    state = {k: v.float() if v.is_floating_point() else v for k, v in inside.items()}
    state = _unprefixed(
        _unprefixed(state, "_orig_mod."), "module."
    )  # what torch.compile and DataParallel put before
    return state, {k: v for k, v in content.items() if inside is not content and v is not inside}


def _unprefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return (
        {k.removeprefix(prefix): v for k, v in state.items()}
        if all(k.startswith(prefix) for k in state)
        else state
    )


def _load_checkpoint(arch: str, file: Path, given: Sequence[str] = ()) -> tuple[nn.Module, dict]:
    """A torchvision classifier from a file; arch "auto" takes the file's word, or the one that its
    tensors fit.
    """
    state, extra = _read_checkpoint(file)
    state = _unprefixed(state, "model.")  # as Lightning has it
    arch = _arch_asked(arch, file, state, extra)
    state = _as_today(arch, state, ordered=file.suffix != ".safetensors")
    last, head = list(state.items())[-1]
    if head.ndim == 0:
        raise ValueError(
            f"weights={file} does not end in a classifier but in {last!r}: its head is missing."
        )
    classes = len(head)
    settings = {}
    if arch in WITH_AUXILIARY_HEADS:
        settings["aux_logits"] = any(k.startswith(("aux", "Aux")) for k in state)
        settings["transform_input"] = bool(extra.get("transform_input", classes == 1000))
        settings["init_weights"] = False
    model = torchvision.models.get_model(arch, weights=None, num_classes=classes, **settings)
    fits = _arch_of(state)
    hint = "" if fits in ("", arch) else f" Its tensors are those of arch={fits}."
    _fit(model, state, f"weights={file} does not fit arch={arch}", hint)
    size = int(extra.get("size") or _size(arch, model))
    info = {**extra, "arch": arch, "weights": file.name, "sha256": sha256(file), "size": size}
    return model, info | {"class_names": _class_names(extra, classes, given)}


WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")  # both were trained on inputs scaled otherwise


def _arch_asked(arch: str, file: Path, state: Mapping[str, Tensor], extra: Mapping) -> str:
    """The architecture to build: the one given, else the file's own word, else the one its tensors
    belong to.
    """
    word = str(extra.get("arch") or "")
    own = ""
    if word.lower() in torchvision.models.list_models(module=torchvision.models):
        own = word.lower()
    if arch != "auto":
        if own not in ("", arch):
            raise ValueError(
                f"weights={file} was saved for arch={own!r}, not {arch!r}. Give arch={own}."
            )
        return arch
    found = own or _arch_of(state)
    if not found and word:
        raise ValueError(
            f"weights={file} was saved for arch={word!r}, your own? Give arch=FILE.py:{word}."
        )
    return found or "resnet18"


def _as_today(arch: str, state: dict[str, Tensor], ordered: bool) -> dict[str, Tensor]:
    """The tensors under the names of today's torchvision, in the network's own order, classifier
    last.
    """
    if arch.startswith("densenet"):  # older files call them norm.1 where it is norm1 today
        state = {
            re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", k): v
            for k, v in state.items()
        }
    if ordered:
        return state
    quick = {"init_weights": False} if arch in WITH_AUXILIARY_HEADS else {}
    with torch.device("meta"):
        model = torchvision.models.get_model(arch, weights=None, **quick)
    order = {name: k for k, name in enumerate(model.state_dict())}
    return dict(sorted(state.items(), key=lambda item: order.get(item[0], -1)))


def _arch_of(state: Mapping[str, Tensor]) -> str:
    """The torchvision classifier that tensors belong to, told by its number of parameters, which is
    unlike any other's; "" if there is none.
    """
    if any(
        k.startswith(("inception3a.", "Mixed_5b.")) for k in state
    ):  # auxiliary heads may be there or not
        return "googlenet" if "inception3a.branch1.conv.weight" in state else "inception_v3"
    buffers = (
        "running_mean",
        "running_var",
        "num_batches_tracked",
        "position_index",
        "coords_table",
    )
    kept = [v for k, v in state.items() if not k.endswith(buffers)]
    if len(kept) < 2 or not kept[-1].ndim or kept[-2].ndim < 2:
        return ""
    count = sum(v.numel() for v in kept) + (1000 - len(kept[-1])) * (
        kept[-2][0].numel() + 1
    )  # as for 1000 classes
    known = torchvision.models.list_models(module=torchvision.models)
    entries = (
        (name, entry) for name in known for entry in torchvision.models.get_model_weights(name)
    )
    return next((name for name, entry in entries if entry.meta["num_params"] == count), "")


def _fit(model: nn.Module, state: dict[str, Tensor], what: str, hint: str = "") -> None:
    """Load a state dict; a ValueError says which keys and shapes are wrong."""
    for name, buffer in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            state.setdefault(
                name, buffer
            )  # files from before torch 0.4.1 have no such counters; nothing reads them
    expected = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    found = {k: tuple(v.shape) for k, v in state.items()}
    if expected != found:
        missing, surplus = (
            sorted(expected.keys() - found.keys()),
            sorted(found.keys() - expected.keys()),
        )
        shapes = [
            f"{k} {found[k]} instead of {expected[k]}"
            for k in expected
            if k in found and found[k] != expected[k]
        ]
        parts = [
            f"{what}: {', '.join(v[:4])}{f' and {len(v) - 4} more' if len(v) > 4 else ''}"
            for what, v in (("missing", missing), ("unknown", surplus), ("shape", shapes))
            if v
        ]
        raise ValueError(f"{what}. {'; '.join(parts)}.{hint}")
    model.load_state_dict(state)


# ---- their input


def preprocess(images: Image.Image | Sequence[Image.Image], size: int = 224) -> Tensor:
    """RGB images -> (B, 3, size, size) float32: squashed to a square, scaled to [0, 1], minus
    ImageNet's mean, over its deviation.

    The whole picture is squashed, not its centre cut out, so a map covers the whole photograph and
    can be laid over it at any size.
    """
    images = [images] if isinstance(images, Image.Image) else images
    pixels = np.stack(
        [
            np.asarray(i.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))
            for i in images
        ]
    )
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255  # stays channels-last in memory
    return (x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
