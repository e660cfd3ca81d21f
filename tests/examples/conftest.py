"""An exported model and a folder of pictures, for examples that run as their users would run them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_models import make_checkpoint

from vitrm.export import export


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with mine.onnx and mine-stepwise."""
    folder = tmp_path_factory.mktemp("artifacts")
    made = make_checkpoint("tiny")
    export(made, folder / "mine.onnx", steps=3)
    export(made, folder / "mine-stepwise", steps=4, graph="stepwise")
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 24 pictures, and a damaged one."""
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(24):
        few = random.integers(0, 256, (4, 6, 3), np.uint8)
        Image.fromarray(few).resize((90, 60), Image.Resampling.BICUBIC).save(folder / f"{i:02}.jpg")
    (folder / "damaged.jpg").write_bytes((folder / "00.jpg").read_bytes()[:300])
    return folder
