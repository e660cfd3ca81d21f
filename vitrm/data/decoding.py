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
import math
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
_ORIENTATION = 0x0112  # the EXIF tag
_LYING = (5, 6, 7, 8)  # its values that exchange height and width
_FROM_RIGHT, _FROM_BOTTOM = (2, 3, 6, 7), (3, 4, 7, 8)  # those by which the end of rows or columns comes first

Box = tuple[float, float, float, float]  # left, top, right, bottom, pixels


def readable_suffixes() -> set[str]:
    """File name endings, in lower case, of the images that can be decoded here."""
    return IMAGE_SUFFIXES | (HEIF_SUFFIXES if _opens_heif() else set())


def prepare(file: Path, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """The picture in `file` as uint8 [3, height, width].  Raises `UserError`, naming it, whatever is wrong with it."""
    image, box = _decoded(file, preprocessing)
    return _fitted(image, preprocessing, box)


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

    return _fitted(Image.fromarray(image), preprocessing, (0, 0, image.shape[1], image.shape[0]))


def fit_square(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """`fit` by the default preprocessing: an RGB image [H, W, 3] as [3, size, size], shorter side to `size`, then the center."""
    return fit(image, Preprocessing.square(size))


def _decoded(file: Path, of: Preprocessing, *, reduced: bool = True) -> tuple[Image.Image, Box]:
    """The picture in RGB, upright, and the box of it that counts: a reduced JPEG may end in a part of a pixel."""
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
            turned = _orientation(image) if of.orientation == "exif" else 1
            whole = (image.height, image.width) if turned in _LYING else image.size
            factor = _reduction(whole, of) if reduced and image.format in ("JPEG", "MPO") else 1
            if factor > 1:
                image.draft(None, (image.width // factor, image.height // factor))
            upright = _as_seen(image, of)
            if factor == 1:
                return upright, (0, 0, *upright.size)
            width, height = whole[0] / factor, whole[1] / factor
            left = upright.width - width if turned in _FROM_RIGHT else 0.0
            top = upright.height - height if turned in _FROM_BOTTOM else 0.0
            return upright, (left, top, left + width, top + height)
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


def _fitted(image: Image.Image, of: Preprocessing, box: Box) -> NDArray[np.uint8]:
    """`fit` of an RGB picture, of which `box` counts."""
    height, width = of.size
    if image.size != (width, height) or box != (0, 0, width, height):
        image = {"crop": _cropped, "letterbox": _letterboxed, "squash": _squashed}[of.fit](image, of, box)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _squashed(image: Image.Image, of: Preprocessing, box: Box) -> Image.Image:
    return _resized(image, of.size[1], of.size[0], box, of)


def _cropped(image: Image.Image, of: Preprocessing, box: Box) -> Image.Image:
    """Resized until it covers the size, then cut to the center."""
    height, width = of.size
    if box == (0, 0, *image.size):  # a strip would grow beyond all memory as a whole
        w, h = image.size
        longest = max(1, LONGEST * h * width // height), max(1, LONGEST * w * height // width)
        image = _center(image, min(w, longest[0]), min(h, longest[1]))
        box = (0, 0, *image.size)
    full_width, full_height = box[2] - box[0], box[3] - box[1]
    if full_width * height >= full_height * width:
        cover = int(height * full_width // full_height), height
    else:
        cover = width, int(width * full_height // full_width)
    return _center(_resized(image, *cover, box, of), width, height)


def _letterboxed(image: Image.Image, of: Preprocessing, box: Box) -> Image.Image:
    """Padded to the shape of the size, then resized: transformers' LLaVA processor does it so.

    A large one is not padded as a whole: its longer side is resized before the bars are added, which gives the same but for roundings.
    """
    height, width = of.size
    if max(image.size) > _LONGEST_SIDE:
        image = _center(image, min(image.width, _LONGEST_SIDE), min(image.height, _LONGEST_SIDE))
        box = (0, 0, *image.size)
    w, h = box[2] - box[0], box[3] - box[1]
    wide = w * height >= h * width
    bars = max(w * height / width - h, 0) if wide else max(h * width / height - w, 0)
    if (w + (0 if wide else bars)) * (h + (bars if wide else 0)) > _PADDED_WHOLE:
        if wide:
            image = _resized(image, width, image.height, (box[0], 0, box[2], image.height), of)
            box = (0, box[1], width, box[3])
        else:
            image = _resized(image, image.width, height, (0, box[1], image.width, box[3]), of)
            box = (box[0], 0, box[2], height)
    return _resized(*_with_bars(image, box, bars, wide, of), of=of)


def _with_bars(
    image: Image.Image, box: Box, bars: float, wide: bool, of: Preprocessing
) -> tuple[Image.Image, int, int, Box]:
    """A picture between two bars of together `bars` pixels, above and below a `wide` one, and what `_resized` makes of it."""
    from PIL import Image

    height, width = of.size
    start, end = (box[1], box[3]) if wide else (box[0], box[2])
    size = image.height if wide else image.width
    if (start, end) == (0, size):
        before, total = round(bars) // 2, size + round(bars)
        first, last = 0.0, float(total)
    else:
        before = math.ceil(bars / 2)
        total = size + 2 * before
        first = before + start - bars / 2
        last = first + bars + end - start
    canvas = Image.new("RGB", (image.width, total) if wide else (total, image.height), of.padding)
    canvas.paste(image, (0, before) if wide else (before, 0))
    return canvas, width, height, ((box[0], first, box[2], last) if wide else (first, box[1], last, box[3]))


def _resized(image: Image.Image, width: int, height: int, box: Box, of: Preprocessing) -> Image.Image:
    """Resizes the `box` of a picture in two passes, in the order of Pillow 13."""
    from PIL import Image

    by = Image.Resampling[of.resampling.upper()]
    left, top, right, bottom = box
    less_wide, less_high = image.width - width, image.height - height

    def across(picture: Image.Image) -> Image.Image:
        return picture.resize((width, picture.height), by, box=(left, 0, right, picture.height))

    def down(picture: Image.Image) -> Image.Image:
        return picture.resize((picture.width, height), by, box=(0, top, picture.width, bottom))

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
