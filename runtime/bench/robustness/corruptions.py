"""Common corruptions of images: what noise, blur, weather and digital processing do to them, at five severities.

After Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations" (2019).  The
amounts are those of CIFAR-10-C, but where those do not rise with the severity (motion blur 4, elastic transform).  The images
are made here, so accuracies on them compare with each other and not with published figures on CIFAR-10-C.

Lengths (of blurs, grains, displacements) are given for a side of 32 pixels and grow with larger images; below 32 pixels they
stay.  Everything random is drawn for each image by itself, from the seed, the corruption and the image's position in its data
set: an image is corrupted the same way in any company, and with the same draws at each severity.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitrm.data import affordable
from vitrm.data.images import to_floats

SEVERITIES = (1, 2, 3, 4, 5)
_SIDE = 32  # pixels for which lengths are given
_MEBIBYTES = 8  # of images, as float32, that are worked on at once; a corruption takes some ten times as much

Floats = NDArray[np.floating]
Generators = list[np.random.Generator]


@dataclass(frozen=True)
class Corruption:
    """One way to corrupt images."""

    name: str  # CIFAR-10-C's
    group: str  # noise, blur, weather or digital
    # (images [n, 3, H, W] in [0, 1], severity, a generator for each image) → images that may leave [0, 1]
    apply: Callable[[Floats, int, Generators], Floats]


def corrupt(
    pixels: NDArray[np.uint8],
    corruption: Corruption,
    severity: int,
    *,
    seed: int = 0,
    positions: NDArray[np.int64] | None = None,
) -> NDArray[np.uint8]:
    """A corrupted copy of uint8 `pixels` [n, 3, H, W] of any size.

    `severity` is 1 … 5.  `positions` [n] tell the images apart in what is drawn (default: 0 … n − 1).
    Raises ValueError for pixels of another shape or type, or another severity.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"pixels are {pixels.dtype} {list(pixels.shape)}, expected uint8 [n, 3, H, W]")
    if severity not in SEVERITIES:
        raise ValueError(f"severity is {severity}, expected 1 to {SEVERITIES[-1]}")
    places = np.arange(len(pixels)) if positions is None else positions
    kind = zlib.crc32(corruption.name.encode())
    chunk = affordable(len(pixels), max(pixels.shape[2:]), _MEBIBYTES)
    made = np.empty_like(pixels)
    for start in range(0, len(pixels), chunk):
        images = to_floats(pixels[start : start + chunk])
        generators = [np.random.default_rng([seed, kind, int(place)]) for place in places[start : start + chunk]]
        corrupted = corruption.apply(images, severity, generators)
        made[start : start + chunk] = np.rint(np.clip(corrupted, 0, 1) * 255).astype(np.uint8)
    return made


# Noise -----------------------------------------------------------------------------------------


def _gaussian_noise(images: Floats, severity: int, generators: Generators) -> Floats:
    deviation = (0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1]
    return images + deviation * _each(generators, lambda g: g.standard_normal(images.shape[1:], np.float32))


def _shot_noise(images: Floats, severity: int, generators: Generators) -> Floats:
    photons = (500, 250, 100, 75, 50)[severity - 1]
    return np.stack([g.poisson(i * photons) / photons for g, i in zip(generators, images, strict=True)])


def _impulse_noise(images: Floats, severity: int, generators: Generators) -> Floats:
    share = (0.01, 0.02, 0.03, 0.05, 0.07)[severity - 1]  # of all values; half of them become 0, half 1
    drawn = _each(generators, lambda g: g.random(images.shape[1:], np.float32))
    return np.where(drawn < share / 2, 0, np.where(drawn >= 1 - share / 2, 1, images))


# Blur ------------------------------------------------------------------------------------------


def _defocus_blur(images: Floats, severity: int, generators: Generators) -> Floats:
    """A disk, its edge softened by a Gaussian that makes up for what the disk lacks of the whole's spread."""
    radius, spread = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.66), (1.5, 0.82))[severity - 1]  # standard deviation
    scale = _scale(images)
    reach = int(np.ceil(radius * scale))
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = (x**2 + y**2 <= (radius * scale) ** 2).astype(np.float32)
    disk /= disk.sum()
    softness = np.sqrt(max((spread * scale) ** 2 - float((disk * x**2).sum()), 0.01))
    return _convolve(_convolve(images, disk[None]), _gaussian(softness))


def _motion_blur(images: Floats, severity: int, generators: Generators) -> Floats:
    # CIFAR-10-C has 2 at the third and the fourth.
    deviation = (1, 1.5, 2, 2.25, 2.5)[severity - 1]
    angles = _each(generators, lambda g: g.uniform(-np.pi / 4, np.pi / 4))
    return _convolve(images, _trails(angles, deviation * _scale(images)))


def _zoom_blur(images: Floats, severity: int, generators: Generators) -> Floats:
    """The mean of magnifications about the center, by 1.00, 1.01, … up to the largest."""
    magnifications = 1 + np.arange((6, 11, 16, 21, 26)[severity - 1]) / 100
    total = images.copy()  # CIFAR-10-C counts the image itself twice
    for magnification in magnifications:
        total += _magnified(images, float(magnification))
    return total / (len(magnifications) + 1)


# Weather ---------------------------------------------------------------------------------------


def _fog(images: Floats, severity: int, generators: Generators) -> Floats:
    thickness, decay = ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))[severity - 1]
    height, width = images.shape[2:]
    side = 1 << (max(height, width, 2) - 1).bit_length()
    plasma = _plasma(_each(generators, lambda g: g.uniform(-1, 1, (side, side))), decay**2)[:, None, :height, :width]
    brightest = images.max((1, 2, 3), keepdims=True)
    return (images + thickness * plasma) * brightest / (brightest + thickness)


def _snow(images: Floats, severity: int, generators: Generators) -> Floats:
    """Flakes, drawn out as they fall, over a paler image."""
    mean, deviation, size, threshold, trail, kept = (
        (0.1, 0.2, 1, 0.6, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 12, 0.8),
    )[severity - 1]
    scale = _scale(images)
    flakes = mean + deviation * _each(generators, lambda g: g.standard_normal(images.shape[2:], np.float32))[:, None]
    flakes = _magnified(flakes, size * scale)
    flakes = np.clip(np.where(flakes < threshold, 0, flakes), 0, 1)
    angles = _each(generators, lambda g: g.uniform(-3 * np.pi / 4, -np.pi / 4))
    flakes = _convolve(flakes, _trails(angles, trail * scale))
    gray = np.tensordot(np.asarray([0.299, 0.587, 0.114], np.float32), images, ([0], [1]))[:, None]
    pale = np.maximum(images, gray * 1.5 + 0.5)
    return kept * images + (1 - kept) * pale + flakes + flakes[:, :, ::-1, ::-1]


def _brightness(images: Floats, severity: int, generators: Generators) -> Floats:
    """More value, at the hue and saturation there are."""
    more = (0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1]
    value = images.max(1, keepdims=True)
    brighter = np.minimum(value + more, 1)
    return np.where(value > 0, images * (brighter / np.maximum(value, 1e-6)), brighter)


# Digital ---------------------------------------------------------------------------------------


def _contrast(images: Floats, severity: int, generators: Generators) -> Floats:
    kept = (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1]
    mean = images.mean((2, 3), keepdims=True)
    return (images - mean) * kept + mean


def _elastic_transform(images: Floats, severity: int, generators: Generators) -> Floats:
    """The image bent: as a whole, by three corners that move, and locally, by a smooth field of displacements."""
    # Pixels.  In CIFAR-10-C the first falls as the second rises, and severity 1 is farther from the original than 2.
    corner = (0.8, 1.0, 1.2, 1.4, 1.6)[severity - 1]  # each corner moves by up to this
    local = (0.2, 0.35, 0.5, 0.65, 0.8)[severity - 1]  # root mean square
    height, width = images.shape[2:]
    scale = _scale(images)
    smoothing = _gaussian(1.5 * scale)
    moved = corner * scale * _each(generators, lambda g: g.uniform(-1, 1, (3, 2)))
    field = _each(generators, lambda g: g.uniform(-1, 1, (2, height, width)).astype(np.float32))
    field = _convolve(field, smoothing) * (local * scale / np.sqrt((smoothing**2).sum() / 3))
    y, x = (np.arange(extent, dtype=np.float32) - (extent - 1) / 2 for extent in (height, width))
    third = max(1.0, min(height, width) / 3)  # the corners' distance from the center, along each axis
    first, second, last = (moved[:, i, :, None, None] for i in range(3))  # at (+, +), (+, −) and (−, −)
    whole = (first + last) / 2 + (second - last) / 2 * (y[:, None] / third) + (first - second) / 2 * (x[None] / third)
    field = field + whole
    return _displaced(images, field[:, 0] + np.arange(height)[:, None], field[:, 1] + np.arange(width))


def _pixelate(images: Floats, severity: int, generators: Generators) -> Floats:
    from PIL import Image

    kept = (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1]  # of the side, at 32 pixels
    block = 1 + (1 / kept - 1) * _scale(images)
    height, width = images.shape[2:]
    coarse = max(1, int(width / block)), max(1, int(height / block))
    box = Image.Resampling.BOX
    return _each_picture(images, lambda picture: picture.resize(coarse, box).resize((width, height), box))


def _jpeg_compression(images: Floats, severity: int, generators: Generators) -> Floats:
    from PIL import Image

    quality = (80, 65, 58, 50, 40)[severity - 1]

    def compressed(picture: Image.Image) -> Image.Image:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality)
        return Image.open(file, formats=("JPEG",))

    return _each_picture(images, compressed)


CORRUPTIONS = (
    Corruption("gaussian_noise", "noise", _gaussian_noise),
    Corruption("shot_noise", "noise", _shot_noise),
    Corruption("impulse_noise", "noise", _impulse_noise),
    Corruption("defocus_blur", "blur", _defocus_blur),
    Corruption("motion_blur", "blur", _motion_blur),
    Corruption("zoom_blur", "blur", _zoom_blur),
    Corruption("fog", "weather", _fog),
    Corruption("brightness", "weather", _brightness),
    Corruption("snow", "weather", _snow),
    Corruption("contrast", "digital", _contrast),
    Corruption("elastic_transform", "digital", _elastic_transform),
    Corruption("pixelate", "digital", _pixelate),
    Corruption("jpeg_compression", "digital", _jpeg_compression),
)


# What they are made of -------------------------------------------------------------------------


def _scale(images: Floats) -> float:
    """Returns how many times as long lengths are as at 32 pixels; at least 1, as a blur of less than a pixel is none."""
    return max(1.0, min(images.shape[2:]) / _SIDE)


def _each(generators: Iterable[np.random.Generator], draw: Callable[[np.random.Generator], object]) -> Floats:
    """Draws for each image, and stacks."""
    return np.asarray([draw(g) for g in generators])


def _each_picture(images: Floats, change: Callable[..., object]) -> Floats:
    """Applies a function of a Pillow image to every image."""
    from PIL import Image

    pixels = np.rint(images * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    changed = np.stack([np.asarray(change(Image.fromarray(np.ascontiguousarray(p)))) for p in pixels])
    return to_floats(changed.transpose(0, 3, 1, 2))


def _convolve(images: Floats, kernels: Floats) -> Floats:
    """Images [n, c, H, W], mirrored at their edges, convolved with kernels [n or 1, k, k], k odd."""
    half = kernels.shape[-1] // 2
    padded = np.pad(images, ((0, 0), (0, 0), (half, half), (half, half)), mode="symmetric")
    shape = padded.shape[-2:]
    spectrum = np.fft.rfft2(padded) * np.fft.rfft2(kernels, s=shape)[:, None]
    return np.fft.irfft2(spectrum, s=shape)[..., 2 * half :, 2 * half :].astype(np.float32)


def _gaussian(deviation: float) -> Floats:
    """A kernel [1, k, k] that sums to 1."""
    reach = max(1, int(np.ceil(3 * deviation)))
    line = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2)
    kernel = np.outer(line, line)
    return (kernel / kernel.sum()).astype(np.float32)[None]


def _trails(angles: Floats, deviation: float) -> Floats:
    """Kernels [n, k, k] that sum to 1: from the center out along each of `angles` [n], fading as half a Gaussian."""
    reach = max(1, int(np.ceil(3 * deviation)))
    along = np.arange(reach + 1)
    weights = np.exp(-0.5 * (along / deviation) ** 2)
    rows, columns = reach - np.outer(np.sin(angles), along), reach + np.outer(np.cos(angles), along)
    kernels = np.zeros((len(angles), 2 * reach + 2, 2 * reach + 2), np.float32)
    number = np.arange(len(angles))[:, None]
    top, left = np.floor(rows).astype(np.int64), np.floor(columns).astype(np.int64)
    for down in (0, 1):  # a point between pixels is shared by the four around it
        for right in (0, 1):
            share = np.abs(1 - down - (rows - top)) * np.abs(1 - right - (columns - left))
            np.add.at(kernels, (number, top + down, left + right), share * weights)
    kernels = kernels[:, :-1, :-1]
    return kernels / kernels.sum((1, 2), keepdims=True)


def _magnified(images: Floats, times: float) -> Floats:
    """Images [n, c, H, W] enlarged about their center, cut to the same size."""
    for axis in (2, 3):
        extent = images.shape[axis]
        at = (np.arange(extent) - (extent - 1) / 2) / times + (extent - 1) / 2
        low = np.clip(np.floor(at).astype(np.int64), 0, max(0, extent - 2))
        part = np.clip(at - low, 0, 1).astype(np.float32).reshape((-1, 1) if axis == 2 else (-1,))
        high = np.minimum(low + 1, extent - 1)
        images = images.take(low, axis) * (1 - part) + images.take(high, axis) * part
    return images


def _displaced(images: Floats, rows: Floats, columns: Floats) -> Floats:
    """Images [n, c, H, W] read at positions [n, H, W] between pixels; beyond the edges they are mirrored."""
    count, channels, height, width = images.shape
    flat = images.reshape(count, channels, -1)
    (top, bottom, down), (left, right, across) = _neighbors(rows, height), _neighbors(columns, width)

    def at(row: NDArray[np.int64], column: NDArray[np.int64]) -> Floats:
        return np.take_along_axis(flat, (row * width + column).reshape(count, 1, -1), 2).reshape(images.shape)

    above = at(top, left) * (1 - across) + at(top, right) * across
    below = at(bottom, left) * (1 - across) + at(bottom, right) * across
    return above * (1 - down) + below * down


def _neighbors(at: Floats, extent: int) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats]:
    """The pixels before and after positions [n, H, W] along an axis, and how far behind the first they lie [n, 1, H, W]."""
    last = extent - 1
    mirrored = np.clip(last - np.abs(last - np.abs(at)), 0, last)
    low = np.floor(mirrored).astype(np.int64)
    return low, np.minimum(low + 1, last), (mirrored - low).astype(np.float32)[:, None]


def _plasma(draws: Floats, decay: float) -> Floats:
    """Clouds [n, S, S] in [0, 1] by the diamond-square method, S a power of two, from `draws` [n, S, S] in [−1, 1].

    Each halving of the grid divides what chance adds by `decay`.
    """
    clouds = np.zeros_like(draws)
    step, amount = draws.shape[-1], 1.0
    while step >= 2:
        whole, half = slice(None, None, step), slice(step // 2, None, step)
        corners = clouds[:, whole, whole]
        pairs = corners + np.roll(corners, -1, 1), corners + np.roll(corners, -1, 2)
        clouds[:, half, half] = (pairs[0] + np.roll(pairs[0], -1, 2)) / 4 + amount * draws[:, half, half]
        centers = clouds[:, half, half]
        clouds[:, whole, half] = (pairs[1] + centers + np.roll(centers, 1, 1)) / 4 + amount * draws[:, whole, half]
        clouds[:, half, whole] = (pairs[0] + centers + np.roll(centers, 1, 2)) / 4 + amount * draws[:, half, whole]
        step, amount = step // 2, amount / decay
    clouds -= clouds.min((1, 2), keepdims=True)
    return (clouds / np.maximum(clouds.max((1, 2), keepdims=True), 1e-12)).astype(np.float32)
