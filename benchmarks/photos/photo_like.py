"""Pictures that are drawn to be somewhat like photos: a lit object of a class in front of a blurred, uneven ground.

For what must be run on photos and may not depend on any data set: `make(folder, {"ball": 100, "box": 100, "ring": 100})`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CLASSES = ("ball", "box", "ring")
_SIDEWAYS = 6  # EXIF's orientation of a phone held upright
_ORIENTATION = 0x0112


def make(folder: Path, counts: Mapping[str, int], *, size: int = 224, seed: int = 0) -> None:
    """Writes `counts[class]` JPEG files of each class; every fourth lies sideways, as phones store it."""
    rng = np.random.default_rng(seed)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            picture = draw(name, rng, size)
            exif = Image.Exif()
            if i % 4 == 0:
                picture = picture.transpose(Image.Transpose.ROTATE_90)
                exif[_ORIENTATION] = _SIDEWAYS
            picture.save(folder / name / f"{name}-{i:03}.jpg", quality=int(rng.integers(60, 95)), exif=exif)


def draw(name: str, rng: np.random.Generator, size: int) -> Image.Image:
    """A picture [size, size], or [size, 4 / 3 size] for a tall one, of the class `name`."""
    height, width = (size * 4 // 3, size) if rng.random() < 0.25 else (size, size)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    picture = _ground(rng, height, width)
    middle, radius = rng.uniform(0.35, 0.65, 2) * (width, height), rng.uniform(0.14, 0.26) * size
    angle = rng.uniform(0, np.pi)
    u = ((x - middle[0]) * np.cos(angle) + (y - middle[1]) * np.sin(angle)) / radius
    v = ((y - middle[1]) * np.cos(angle) - (x - middle[0]) * np.sin(angle)) / radius
    across = np.hypot(u, v)
    distance = {
        "ball": across - 1,
        "box": np.maximum(np.abs(u), 0.8 * np.abs(v)) - 0.85,
        "ring": np.abs(across - 0.8) - 0.24,
    }[name]
    light = rng.uniform(0, 2 * np.pi)
    shade = 0.72 + 0.28 * (u * np.cos(light) + v * np.sin(light)).clip(-1, 1)
    color = rng.uniform(40, 255, 3).astype(np.float32)
    cover = (-distance * radius / 1.5).clip(0, 1)[..., None]
    shadow = 1 - 0.45 * (1 - np.hypot(u - 0.25, v - 0.25) / 1.5).clip(0, 1)[..., None]
    picture = (1 - cover) * picture * shadow + cover * color * shade[..., None]
    picture += rng.normal(0, rng.uniform(2, 9), picture.shape)
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def _ground(rng: np.random.Generator, height: int, width: int) -> NDArray[np.float32]:
    """Noise of all scales, the coarse ones the strongest, between two colors."""
    level = np.zeros((height, width), np.float32)
    for cells in (2, 4, 8, 16, 32):
        coarse = Image.fromarray(rng.random((cells, cells)).astype(np.float32))
        level += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) / cells**0.7
    level = ((level - level.min()) / np.ptp(level))[..., None]
    dark, light = rng.uniform(20, 150, 3), rng.uniform(80, 230, 3)
    return ((1 - level) * dark + level * light).astype(np.float32)
