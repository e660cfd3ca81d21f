"""A part of a data set in memory: pixels, labels, class names."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitrm.data.mapped_rows import MappedRows
from vitrm.errors import UserError
from vitrm.preprocessing import Preprocessing

_CHUNK = 64 << 20  # bytes of pixels looked at together


@dataclass(frozen=True)
class Normalization:
    """Per-channel mean and standard deviation of the training images, in [0, 1] units."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def to_floats(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Returns uint8 pixels of any shape as the models take them: float32 in [0, 1]."""
    return pixels.astype(np.float32) / np.float32(255)


@dataclass(frozen=True)
class Images:
    """A part of a data set."""

    pixels: NDArray[np.uint8]  # [n, 3, H, W]; or MappedRows, which are indexed like an array and know no arithmetic
    labels: NDArray[np.int64]  # [n]
    classes: tuple[str, ...]  # names, by label
    name: str  # of the data set: digits, cifar10, cifar100 or a folder's path
    split: str  # train, validation or test
    notes: tuple[str, ...] = ()  # what of the set was left out, guessed or is odd: a sentence each
    preprocessing: Preprocessing | None = None  # how files became pixels; None for those that are no files

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, index: Any) -> Images:
        """The images at `index` (a slice, an index array or a mask)."""
        pixels: Any = self.pixels.take(index) if isinstance(self.pixels, MappedRows) else self.pixels[index]
        return replace(self, pixels=pixels, labels=self.labels[index])

    def loaded(self, *, at_most: int | None = None) -> Images:
        """The same with its pixels in memory; of more than `at_most` bytes as it is.  Raises `UserError` for more than memory holds."""
        if not isinstance(self.pixels, MappedRows) or (at_most is not None and self.pixels.nbytes > at_most):
            return self
        check_fits(len(self), self.pixels.shape[2:], self.name)
        return replace(self, pixels=self.pixels[:])

    def chunks(self) -> Iterator[NDArray[np.uint8]]:
        """The pixels, some images at a time."""
        each = max(1, _CHUNK // max(1, int(np.prod(self.pixels.shape[1:]))))
        for start in range(0, len(self), each):
            yield self.pixels[start : start + each]

    def floats(self, index: Any = slice(None)) -> NDArray[np.float32]:
        """Pixels as the models take them: float32 [n, 3, H, W] in [0, 1]."""
        return to_floats(self.pixels[index])

    @property
    def id(self) -> str:
        """SHA-256 of the pixels and labels: which images these are, in which order."""
        digest = hashlib.sha256()
        for pixels in self.chunks():
            digest.update(np.ascontiguousarray(pixels).data)
        digest.update(np.ascontiguousarray(self.labels).data)
        return digest.hexdigest()


# The training sets' own statistics, over all training pixels (CIFAR-100 differs from CIFAR-10).
NORMALISATION = {
    "cifar10": Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Normalization((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


def normalization(images: Images) -> Normalization:
    """The mean and standard deviation that a model trained on `images` should normalize with."""
    if images.name in NORMALISATION:
        return NORMALISATION[images.name]
    # Of every value there are so many: exact, and without the images as floating-point numbers.
    counts = np.zeros((3, 256), np.int64)
    for pixels in images.take(slice(0, 10_000)).chunks():
        for channel in range(3):
            counts[channel] += np.bincount(pixels[:, channel].ravel(), minlength=256)
    values, shares = np.arange(256) / 255, counts / counts.sum(1, keepdims=True)
    mean = shares @ values
    std = np.sqrt((shares * (values - mean[:, None]) ** 2).sum(1))
    r, g, b = (round(float(v), 4) for v in mean)
    sr, sg, sb = (max(round(float(v), 4), 1e-3) for v in std)
    return Normalization((r, g, b), (sr, sg, sb))


def affordable(count: int, size: int, mebibytes: int, *, least: int = 1) -> int:
    """`count`, or as many images of `size` × `size` pixels as fit into `mebibytes` as float32, but no fewer than `least`."""
    return max(least, min(count, (mebibytes << 20) // (12 * size * size)))


def memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_fits(count: int, size: tuple[int, int], name: str) -> None:
    """Raises `UserError` if `count` images of `size`, height and width, are more than this machine's memory."""
    needed, there = 3 * count * size[0] * size[1], memory()
    if needed > there:
        raise UserError(
            f"{count:,} images of {name} at {size[0]} × {size[1]} pixels take {needed / 2**30:,.0f} GiB, this machine has "
            f"{there / 2**30:,.0f}: lower the image size, or use fewer images"
        )
