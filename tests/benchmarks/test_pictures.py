"""Screenshots of few colors: grounds and panels keep theirs, whatever photos lie on them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image

_FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "pictures.py"


def test_flat_colors_stay_as_they_are() -> None:
    spec = importlib.util.spec_from_file_location("benchmarks_pictures", _FILE)
    assert spec is not None
    assert spec.loader is not None
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    page = np.full((300, 300, 3), (246, 246, 244), np.uint8)
    page[100:] = 255
    page[:60, :60] = (236, 238, 242)
    photo = np.random.default_rng(0).integers(0, 256, (150, 150, 3), np.uint8)
    page[120:270, 120:270] = photo
    small = pictures.with_few_colors(Image.fromarray(page))
    assert small.mode == "P"
    seen = np.asarray(small.convert("RGB")).astype(int)
    assert len(np.unique(seen.reshape(-1, 3), axis=0)) <= 256
    assert abs(seen[120:270, 120:270] - photo).mean() < 40
    seen[120:270, 120:270] = page[120:270, 120:270]
    np.testing.assert_array_equal(seen, page)
