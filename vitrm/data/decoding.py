"""An image file as people see it: RGB, upright, 8 bits a channel, on a white ground where it is transparent.

    orientation    the EXIF tag that phones write is applied
    depth          16-bit gray is scaled (65535 becomes 255); floats and 32-bit integers have no agreed range and are refused
    transparency   composited on white
    palette, gray, CMYK, LA, 1 bit: converted to RGB

Then `fit_square`: the shorter side to the model's size, bicubic, the center of the longer one.
"""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vitrm.errors import UserError, first_line
from vitrm.system.files import check_regular

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".dib", ".gif", ".webp", ".avif"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
}
HEIF_SUFFIXES = {".heic", ".heif"}  # with pillow-heif
# What those names may hold. Pillow knows others, some of which start programs: an EPS, whatever it is called, Ghostscript.
_FORMATS = ("PNG", "JPEG", "MPO", "BMP", "DIB", "GIF", "WEBP", "AVIF", "TIFF", "PPM")
MAX_PIXELS = 178_956_970  # of an image; Pillow's own limit, half a gigabyte as RGB
LONGEST = 64  # times the shorter side: of what is longer, the middle is taken first
BACKGROUND = (255, 255, 255)  # of what is transparent: what a page or a sheet of paper shows
_TRANSPARENT = ("RGBA", "LA", "PA", "RGBa", "La")
_RANGELESS = {"F": "floating-point numbers", "I": "32-bit integers"}


def readable_suffixes() -> set[str]:
    """File name endings, in lower case, of the images that can be decoded here."""
    return IMAGE_SUFFIXES | (HEIF_SUFFIXES if _opens_heif() else set())


def decode(file: Path) -> NDArray[np.uint8]:
    """The pixels [H, W, 3] of an image file, see this module.  Raises `UserError`, naming it, whatever is wrong with it."""
    from PIL import Image

    check_regular(file, "image")
    formats = (*_FORMATS, "HEIF") if file.suffix.lower() in HEIF_SUFFIXES and _opens_heif() else _FORMATS
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit follows
            image = Image.open(file, formats=[f for f in formats if f in _known_formats()])
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"it has {image.width} × {image.height} pixels, at most {MAX_PIXELS:,} are decoded")
            return np.asarray(_as_seen(image))
    except Exception as error:  # decoders raise anything for a damaged file: IndexError, struct.error, MemoryError, …
        why = first_line(error)
        raise UserError(f"{file} cannot be read as an image ({why}): replace or remove it") from None


def fit_square(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """An RGB image [H, W, 3] as [3, size, size]: shorter side to `size`, then the center.

    In this order, and with these roundings, as transformers' and torchvision's processors do it: to the last bit.
    """
    from PIL import Image

    height, width = image.shape[:2]
    if (height, width) != (size, size):
        shorter = min(height, width)
        if max(height, width) > LONGEST * shorter:  # a strip: as a whole it would grow beyond all memory
            image = _center(image, min(height, LONGEST * shorter), min(width, LONGEST * shorter))
            height, width = image.shape[:2]
        height, width = (size * side // shorter for side in (height, width))
        whole = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
        image = _center(np.asarray(whole), size, size)
    return np.ascontiguousarray(image.transpose(2, 0, 1))


def _center(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return np.ascontiguousarray(image[top : top + height, left : left + width])


def _as_seen(image: Image.Image) -> Image.Image:
    from PIL import Image, ImageOps

    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16") or (upright.mode == "I" and image.format in ("PNG", "PPM")):
        # Pillow reads 16-bit PNGs as "I" or "I;16", by version, and would cut off all above 255.
        values = np.asarray(upright.convert("I"), dtype=np.int64)
        upright = Image.fromarray(((values.clip(0, 65535) + 128) // 257).astype(np.uint8))
    if upright.mode in _RANGELESS:
        raise ValueError(
            f"its pixels are {_RANGELESS[upright.mode]}, which have no agreed range: save it with 8 or 16 bits a channel"
        )
    if upright.mode in _TRANSPARENT or "transparency" in upright.info:
        layers = upright.convert("RGBA")
        ground = Image.new("RGBA", layers.size, (*BACKGROUND, 255))
        upright = Image.alpha_composite(ground, layers)
    return upright.convert("RGB")


@functools.cache
def _known_formats() -> set[str]:
    from PIL import Image

    Image.init()
    return set(Image.OPEN)


@functools.cache  # a package that is missing is looked for anew by every import
def _opens_heif() -> bool:
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True
