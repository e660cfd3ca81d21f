"""A picture file as a model's input, as a `Preprocessing` says: `prepare`, which is `decode` and then `fit`.

    orientation    the EXIF tag that phones write is applied
    depth          16-bit gray is scaled (65535 becomes 255); floats and 32-bit integers have no agreed range and are refused
    transparency   composited on the background
    palette, gray, CMYK, LA, 1 bit: converted to RGB
    shape          crop, letterbox or squash

The order of a resize's two passes, each of which rounds to 8 bits, is fixed here: Pillow changed its own in version 13.
"""

from __future__ import annotations

import functools
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vitrm.errors import UserError, first_line
from vitrm.preprocessing import Preprocessing
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
LONGEST = 64  # times the shorter side: of what is longer, a crop takes the middle first
_LONGEST_SIDE = 1 << 16  # pixels: of what is longer, a letterbox takes the middle first
_PADDED_WHOLE = 1 << 22  # pixels: a letterbox of more is never in memory as a whole
_TRANSPARENT = ("RGBA", "LA", "PA", "RGBa", "La")
_RANGELESS = {"F": "floating-point numbers", "I": "32-bit integers"}
_ORIENTATION, _LYING = 0x0112, (5, 6, 7, 8)  # the EXIF tag, and the values that exchange height and width


def readable_suffixes() -> set[str]:
    """File name endings, in lower case, of the images that can be decoded here."""
    return IMAGE_SUFFIXES | (HEIF_SUFFIXES if _opens_heif() else set())


def prepare(file: Path, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """The picture in `file` as uint8 [3, height, width].  Raises `UserError`, naming it, whatever is wrong with it."""
    image, whole = _decoded(file, preprocessing)
    return _fitted(image, preprocessing, whole)


def decode(file: Path, preprocessing: Preprocessing | None = None) -> NDArray[np.uint8]:
    """The pixels [H, W, 3] of an image file, all of them.  Raises `UserError`, naming it, whatever is wrong with it.

    Of the `preprocessing`, orientation and background count; None for the default one.
    """
    of = preprocessing or Preprocessing.square(1)
    return np.asarray(_decoded(file, of, reduced=False)[0])


def fit(image: NDArray[np.uint8], preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """An RGB image [H, W, 3] at the size of `preprocessing`, shaped as it says, uint8 [3, height, width].

    In this order, and with these roundings, as transformers' and torchvision's processors do it with Pillow 13: to the last bit.
    """
    from PIL import Image

    return _fitted(Image.fromarray(image), preprocessing, (image.shape[1], image.shape[0]))


def fit_square(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """`fit` by the default preprocessing: an RGB image [H, W, 3] as [3, size, size], shorter side to `size`, then the center."""
    return fit(image, Preprocessing.square(size))


def _decoded(file: Path, of: Preprocessing, *, reduced: bool = True) -> tuple[Image.Image, tuple[float, float]]:
    """The picture in RGB, upright, and how much of it counts, width and height: a reduced JPEG may end in part of a pixel."""
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
            lying = of.orientation == "exif" and _orientation(image) in _LYING
            whole = (image.height, image.width) if lying else image.size
            factor = _reduction(whole, of) if reduced and image.format in ("JPEG", "MPO") else 1
            if factor > 1:
                image.draft(None, (image.width // factor, image.height // factor))
            upright = _as_seen(image, of)
            # As it is decoded: a format may know better than its header.
            counted = (whole[0] / factor, whole[1] / factor) if factor > 1 else upright.size
            return upright, counted
    except Exception as error:  # decoders raise anything for a damaged file: IndexError, struct.error, MemoryError, …
        why = first_line(error)
        raise UserError(f"{file} cannot be read as an image ({why}): replace or remove it") from None


def _orientation(image: Image.Image) -> int | None:
    with suppress(Exception):  # damaged EXIF data: Pillow's own `exif_transpose` says what is to be said
        return image.getexif().get(_ORIENTATION)
    return None


def _reduction(whole: tuple[int, int], of: Preprocessing) -> int:
    """By how much a JPEG of `whole` = (width, height) pixels, upright, may be reduced while it is decoded: 1, 2, 4 or 8."""
    height, width = of.size
    shares = whole[0] / width, whole[1] / height
    if not of.jpeg_reduction or (of.fit == "crop" and max(shares) > LONGEST * min(shares)):
        return 1
    largest = (max if of.fit == "letterbox" else min)(shares) / of.jpeg_reduction
    return next((factor for factor in (8, 4, 2) if factor <= largest), 1)


def _fitted(image: Image.Image, of: Preprocessing, whole: tuple[float, float]) -> NDArray[np.uint8]:
    """`fit` of an RGB picture, of which `whole` = (width, height) counts."""
    height, width = of.size
    if image.size != (width, height) or whole != image.size:
        image = {"crop": _cropped, "letterbox": _letterboxed, "squash": _squashed}[of.fit](image, of, whole)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _squashed(image: Image.Image, of: Preprocessing, whole: tuple[float, float]) -> Image.Image:
    return _resized(image, of.size[1], of.size[0], of, whole)


def _cropped(image: Image.Image, of: Preprocessing, whole: tuple[float, float]) -> Image.Image:
    """Resized until it covers the size, then cut to the center."""
    height, width = of.size
    if whole == image.size:  # a strip would grow beyond all memory as a whole
        w, h = image.size
        image = _center(
            image, min(w, max(1, LONGEST * h * width // height)), min(h, max(1, LONGEST * w * height // width))
        )
        whole = image.size
    full_width, full_height = whole
    if full_width * height >= full_height * width:
        cover = int(height * full_width // full_height), height
    else:
        cover = width, int(width * full_height // full_width)
    return _center(_resized(image, *cover, of, whole), width, height)


def _letterboxed(image: Image.Image, of: Preprocessing, whole: tuple[float, float]) -> Image.Image:
    """Padded to the shape of the size, then resized: transformers' LLaVA processor does it so.

    A large one is not padded as a whole: its longer side is resized before the bars are added, which gives the same but for roundings.
    """
    from PIL import Image

    height, width = of.size
    if max(image.size) > _LONGEST_SIDE:
        image = _center(image, min(image.width, _LONGEST_SIDE), min(image.height, _LONGEST_SIDE))
        whole = image.size
    if whole != image.size:  # of a reduced JPEG: bars need whole pixels
        whole = image.size
    w, h = image.size
    wide = w * height >= h * width
    padded = (w, max(h, round(w * height / width))) if wide else (max(w, round(h * width / height)), h)
    if padded[0] * padded[1] > _PADDED_WHOLE:
        image = _resized(image, width, h, of) if wide else _resized(image, w, height, of)
        padded = (width, padded[1]) if wide else (padded[0], height)
    if image.size != padded:
        bars = Image.new("RGB", padded, of.padding)
        bars.paste(image, ((padded[0] - image.width) // 2, (padded[1] - image.height) // 2))
        image = bars
    return _resized(image, width, height, of)


def _resized(
    image: Image.Image, width: int, height: int, of: Preprocessing, whole: tuple[float, float] | None = None
) -> Image.Image:
    """Resizes what counts of a picture, `whole` = (width, height), in two passes in the order of Pillow 13."""
    from PIL import Image

    by = Image.Resampling[of.resampling.upper()]
    right, bottom = whole or image.size
    less_wide, less_high = image.width - width, image.height - height

    def across(picture: Image.Image) -> Image.Image:
        return picture.resize((width, picture.height), by, box=(0, 0, right, picture.height))

    def down(picture: Image.Image) -> Image.Image:
        return picture.resize((picture.width, height), by, box=(0, 0, picture.width, bottom))

    return across(down(image)) if less_high > 0 and less_high > 2 * less_wide else down(across(image))


def _center(image: Image.Image, width: int, height: int) -> Image.Image:
    if image.size == (width, height):
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _as_seen(image: Image.Image, of: Preprocessing) -> Image.Image:
    from PIL import Image, ImageOps

    upright = ImageOps.exif_transpose(image) if of.orientation == "exif" else image
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
        ground = Image.new("RGBA", layers.size, (*of.background, 255))
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
