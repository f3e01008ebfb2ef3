"""Pictures: a file, array or tensor as an RGB image.

What is wrong with one is a ValueError that names it and says what to do.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

# ---- files

# What Pillow opens, but for drawings that run another program (EPS, WMF) and formats of which
# Pillow only knows the name.
_NOT_OPENED = {"BUFR", "EPS", "FLI", "GRIB", "HDF5", "MPEG", "PDF", "WMF"}
Image.init()
FORMATS = sorted(set(Image.OPEN) - _NOT_OPENED)
READ_TYPES = {end for end, name in Image.registered_extensions().items() if name in FORMATS}
# Images by their name that Pillow cannot open: they are named and counted with the unreadable ones.
PHONES = {".heic", ".heif", ".hif"}
OTHER_TYPES = PHONES | set(
    ".3fr .ai .arw .cr2 .cr3 .crw .czi .dcm .dicom .djvu .dng .emf .eps .erf .exr .hdr .jp3d .jxl "
    ".jxr .kdc .lif .mrw .mrxs .nd2 .ndpi .nef .nii .nrw .orf .pef .ps .raf .raw .rw2 .sr2 .srw "
    ".svg .svgz .svs .vsi .wdp .wmf .x3f .xcf".split()
)
IMAGE_TYPES = READ_TYPES | OTHER_TYPES


@functools.cache
def _warn_once(message: str) -> None:
    """Say what is odd about a file, once in a process: it is read more than once."""
    warnings.warn(message, stacklevel=3)


def read_image(file: str | Path) -> Image.Image:
    """An image file as RGB, turned as its EXIF says, 16-bit grey scaled to 8, transparency laid on
    white; of an animation the first frame, with a warning. ValueError names a bad file, one of a
    kind that cannot be read, and one with more than Pillow's MAX_IMAGE_PIXELS (89 million), which
    may be a decompression bomb.
    """
    _register_heif(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS + ["HEIF"] * ("HEIF" in Image.OPEN)) as opened:
                image = ImageOps.exif_transpose(opened)
                with contextlib.suppress(Exception):  # of what follows the first frame
                    several = opened.format != "MPO" and getattr(opened, "is_animated", False)
                    if several:
                        _warn_once(f"image: {file} has several frames; its first is taken.")
    except FileNotFoundError:
        raise ValueError(f"image: there is no file {file}.") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(f"image: {file} is refused: {error} Scale it down first.") from None
    except Exception as error:  # of any decoder, on a damaged file
        raise ValueError(f"image: {file} cannot be read ({error}).{_way_out(file)}") from None
    try:
        return as_rgb(image)
    except ValueError as error:
        raise ValueError(str(error).replace("image: it", f"image: {file}", 1)) from None


def _register_heif(file) -> None:
    """Let Pillow read the photographs of phones, where the package for it is installed."""
    if Path(str(file)).suffix.lower() in PHONES and "HEIF" not in Image.OPEN:
        with contextlib.suppress(ImportError):
            import pillow_heif

            pillow_heif.register_heif_opener()


def _way_out(file) -> str:
    """What to do about a file of a kind that cannot be read."""
    suffix = Path(str(file)).suffix.lower()
    plugin = ", or install the package pillow-heif" if suffix in PHONES else ""
    return f" Convert it to PNG or JPEG{plugin}." if suffix in OTHER_TYPES else ""


# ---- what people hold of a picture


def as_rgb(image) -> Image.Image:
    """What people hold of a picture, as a PIL image in RGB: a PIL image of any mode, a file, or an
    array or tensor.

    An array is (H, W), (H, W, C) or (C, H, W), with or without a batch of one before, C = 1 (grey),
    3 (RGB) or 4 (RGBA, laid on white); where both readings fit, an array has its channels last and
    a tensor first. Values: uint8, uint16, other whole numbers from 0 to 255 or else 65535, floats
    in [0, 1], or true and false. ValueError for anything else.
    """
    if isinstance(image, str | os.PathLike) or hasattr(image, "read"):
        return read_image(image)
    if not isinstance(image, Image.Image):
        return _laid_on_white(Image.fromarray(_as_bytes(*_as_array(image))))
    if not image.width or not image.height:
        raise ValueError(f"image: it is empty, {image.width} x {image.height} pixels.")
    if image.mode.startswith(("I", "F")):
        grey = np.asarray(image, dtype=np.float32)
        if not (grey.min() >= 0 and grey.max() < np.inf):
            raise ValueError(
                f"image: it has grey values from {grey.min()} to {grey.max()}; scale them to 0 and "
                "more."
            )
        full = max(grey.max(), 65535 if image.mode.startswith("I") else 1)
        image = Image.fromarray((grey / full * 255).round().astype(np.uint8))
    return _laid_on_white(image)


def _laid_on_white(image: Image.Image) -> Image.Image:
    """An 8-bit image as RGB."""
    if image.mode in ("La", "RGBa"):  # colours multiplied by their opacity
        image = image.convert(image.mode.upper())
    try:
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except ValueError as error:
        raise ValueError(f"image: it is {image.mode} ({error}). Convert it to RGB.") from None


ASKED = "Give a PIL image, a file, or an array (H, W), (H, W, C) or (C, H, W) with C = 1, 3 or 4"


def _as_array(image) -> tuple[np.ndarray, str]:
    """(array, its shape as it was given): (H, W) or (H, W, C) of a picture in an array or tensor;
    ValueError for another shape.
    """
    first = isinstance(image, Tensor)  # where both readings fit
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        image = image.float() if image.is_floating_point() else image
    try:
        pixels = np.asarray(image)
    except (TypeError, ValueError) as error:
        raise ValueError(f"image: {error}. {ASKED}.") from None
    if pixels.dtype.kind not in "biuf":
        raise ValueError(f"image: a {type(image).__name__} is no picture. {ASKED}.")
    shape = f"shape {tuple(pixels.shape)}"
    if not pixels.size:
        raise ValueError(f"image: {shape} is empty. {ASKED}.")
    while pixels.ndim > 3 and len(pixels) == 1:
        pixels = pixels[0]
    if pixels.ndim == 3:
        last_fits, first_fits = pixels.shape[-1] in (1, 3, 4), pixels.shape[0] in (1, 3, 4)
        if first_fits and (first or not last_fits):
            pixels = np.moveaxis(pixels, 0, -1)
        elif not last_fits:
            raise ValueError(f"image: {shape} has neither 1, 3 nor 4 channels. {ASKED}.")
        pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    if pixels.ndim != 2 and pixels.ndim != 3:
        several = " One picture at a time, such as image[0]." if pixels.ndim > 3 else ""
        raise ValueError(f"image: {shape} is no picture. {ASKED}.{several}")
    return pixels, shape


def _as_bytes(pixels: np.ndarray, shape: str) -> np.ndarray:
    """Pixels as uint8; ValueError where what they count is not known."""
    if pixels.dtype == np.uint8:
        return np.ascontiguousarray(pixels)
    low, high = pixels.min(), pixels.max()
    if pixels.dtype.kind == "f":
        full = 1
        advice = "Floats must be in [0, 1]: divide by 255 what goes up to 255; of a normalised "
        advice += "tensor take x * std + mean, or the photograph itself"
    else:
        full = 65535 if pixels.dtype == np.uint16 or high > 255 else 255
        full = 1 if pixels.dtype == bool else full
        advice = "Whole numbers must be from 0 to 255 (8 bits) or 65535 (16 bits)"
    slack = 1e-4 if pixels.dtype.kind == "f" else 0  # of rounding
    if not (low >= -slack and high <= full + slack):
        raise ValueError(f"image: {shape} has values from {low} to {high}. {advice}.")
    scaled = pixels.astype(np.float32) * (255 / full)
    return np.ascontiguousarray(scaled.round().clip(0, 255).astype(np.uint8))
