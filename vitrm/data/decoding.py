"""An image file as people see it: RGB, upright, 8 bits a channel, on a white ground where it is transparent.

    orientation    the EXIF tag that phones write is applied
    depth          16-bit gray is scaled (65535 becomes 255); floats and 32-bit integers have no agreed range and are refused
    transparency   composited on white
    palette, gray, CMYK, LA, 1 bit: converted to RGB

Then `fit_square`: the shorter side to the model's size, bicubic, the center of the longer one.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vitrm.errors import UserError
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
        why = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UserError(f"{file} cannot be read as an image ({why}): replace or remove it") from None


def fit_square(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """An RGB image [H, W, 3] as [3, size, size]: shorter side to `size`, then the center."""
    from PIL import Image

    height, width = image.shape[:2]
    if (height, width) != (size, size):
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = Image.fromarray(np.ascontiguousarray(image[top : top + side, left : left + side]))
        image = np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))
    return np.ascontiguousarray(image.transpose(2, 0, 1))


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


def _known_formats() -> set[str]:
    from PIL import Image

    Image.init()
    return set(Image.OPEN)


def _opens_heif() -> bool:
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True
