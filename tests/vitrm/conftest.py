"""Small real data and models that train in seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitrm import data
from vitrm.config import ModelConfig, preset
from vitrm.data import Splits
from vitrm.recipe import Recipe, recipe

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits() -> Splits:
    """The digits, whole."""
    return Splits(*(data.load("digits", split) for split in data.SPLITS))


@pytest.fixture(scope="session")
def few(digits: Splits) -> Splits:
    """A few of the digits: four batches of 16."""
    return Splits(digits.train.take(slice(0, 70)), digits.validation.take(slice(0, 40)), digits.test.take(slice(0, 40)))


@pytest.fixture(scope="session")
def model() -> ModelConfig:
    """A recursive model of a few thousand weights, with dropout."""
    return preset("tiny", dim=16, heads=2, layers=1, latents=2, n=1, dropout=0.1)


@pytest.fixture(scope="session")
def short() -> Recipe:
    """Three epochs with everything switched on that is drawn at random."""
    return recipe("paper", epochs=3, batch_size=16, lr=1e-3, n_sup=2, free_steps=2, flip="on", patience=0)


@pytest.fixture
def photos(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder of images by class: photos(count, classes) → path.  No two images are alike."""

    def make(count: int = 20, classes: tuple[str, ...] = ("cat", "dog"), root: str = "photos") -> Path:
        random = np.random.default_rng(1)
        for i, name in enumerate(classes):
            folder = tmp_path / root / name
            folder.mkdir(parents=True)
            for k in range(count):
                pixels = random.integers(0, 90, (20, 24, 3)) + 80 * i
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{k}.png")
        return tmp_path / root

    return make
