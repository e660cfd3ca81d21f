"""How a picture file becomes a model's input, as data: stored with a run and in every artifact made from it.

    file → decoded → upright → RGB, on `background` where transparent → `fit` to `size` → divided by 255

`vitrm.data.decoding.prepare` does it; training, vitrm-predict, vitrm-bench, the page for the browser, the Hugging Face folder and
Triton's folder follow the same data.  Imports neither torch nor numpy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vitrm.errors import UserError
from vitrm.fields import Several, Whole, check, checked, choice, from_values, shown, three_whole, whole
from vitrm.model_limits import MAX_IMAGE_SIZE

FITS = ("crop", "letterbox", "squash")
_SIDES = Several(Whole(1, MAX_IMAGE_SIZE))


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """The preprocessing of picture files."""

    size: tuple[int, int]  # height and width of the result, pixels
    fit: str = choice(
        *FITS,
        help="how a picture of another shape is brought to the model's: crop resizes the shorter side and keeps the center; letterbox "
        "keeps all of it, with bars (padded, then resized); squash resizes both sides, and distorts",
    )
    padding: tuple[int, int, int] = three_whole((114, 114, 114), 0, 255, "color of a letterbox's bars, RGB")
    background: tuple[int, int, int] = three_whole((255, 255, 255), 0, 255, "color under what is transparent, RGB")
    orientation: str = choice(
        "exif", "stored", help="exif: turned upright as the EXIF tag says; stored: as it lies there"
    )
    resampling: str = choice("bicubic", "bilinear", help="Pillow's filter")
    jpeg_reduction: int = whole(
        4,
        0,
        64,
        "a JPEG is decoded at 1/8, 1/4 or 1/2 of its size where that leaves at least so many times the size wanted; 0: always whole",
    )

    def __post_init__(self) -> None:
        check(self)
        sides = checked("size", self.size, _SIDES)
        if len(sides) != 2:
            raise UserError(f"size is {shown(self.size)}, expected height and width")
        object.__setattr__(self, "size", sides)

    @classmethod
    def square(cls, side: int, **changes: Any) -> Preprocessing:
        """The default preprocessing to `side` × `side` pixels, with fields replaced by `changes`."""
        return cls(size=(side, side), **changes)

    @classmethod
    def unrecorded(cls, side: int) -> Preprocessing:
        """The preprocessing of runs and artifacts that say nothing of theirs: they are of a version that had one alone."""
        return cls.square(side, jpeg_reduction=0)

    @classmethod
    def recorded(cls, values: Any, side: int, where: str) -> Preprocessing:
        """The preprocessing that `where` holds as JSON, None for one that does not, of a model for `side` × `side` pixels.

        Raises `UserError` for unknown keys, values out of range, and another size than the model's.
        """
        if values is None:
            return cls.unrecorded(side)
        if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
            raise UserError(f"{where}: the preprocessing is {shown(values)}, expected an object")
        if "size" not in values:
            raise UserError(f"{where}: the preprocessing has no size")
        found: Preprocessing = from_values(cls, dict(values), where, "a preprocessing")
        if found.size != (side, side):
            raise UserError(
                f"{where}: the preprocessing gives {found.size[0]} × {found.size[1]} pixels, the model takes {side} × {side}"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    def __str__(self) -> str:
        """In words, for a comment or a message."""
        height, width = self.size
        to = {
            "crop": f"resized to cover {height} × {width} pixels, then cut to the center",
            "letterbox": f"padded with RGB {self.padding} to the shape of {height} × {width} pixels, then resized",
            "squash": f"resized to {height} × {width} pixels, whatever its shape",
        }[self.fit]
        upright = "turned upright (EXIF)" if self.orientation == "exif" else "as stored"
        return f"{upright}, RGB, on {self.background} where transparent, {to} ({self.resampling}), divided by 255"
