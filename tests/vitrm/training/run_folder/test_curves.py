"""The learning curves: the epoch that was kept is named, and no label lies on another."""

from __future__ import annotations

import json
from pathlib import Path

import pictures
import pytest
from PIL import Image

from vitrm.training.run_folder.curves import draw_curves

RECORD = Path(__file__).parents[4] / "benchmarks" / "records" / "nano-v2-cifar10-training.json"


def history(epochs: int, depths: int) -> list[dict]:
    """The first epochs of a real run, with the accuracies of its first steps."""
    lines = json.loads(RECORD.read_text())["stages"][0]["epochs"][:epochs]
    some = ("validation_accuracy", "validation_loss")
    return [{**line, **{name: line[name][:depths] for name in some}} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("depths", [1, 2, 6])
@pytest.mark.parametrize("epochs", [1, 3, 32])
def test_labels_never_overlap(epochs, depths, tmp_path, monkeypatch):
    seen = pictures.watch(monkeypatch)
    lines = history(epochs, depths)
    draw_curves(lines, tmp_path / "curve.png", "a$b$ " * 40, best=max(1, epochs - 1))
    kept = lines[max(0, epochs - 2)]
    assert f"best: epoch {kept['epoch']}, {100 * kept['validation_accuracy'][-1]:.1f} %" in seen
    assert any(text.startswith("Accuracy by step") for text in seen) == (depths > 1)
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 400


def test_an_svg_has_a_light_and_a_dark_look(tmp_path):
    draw_curves(history(3, 6), tmp_path / "curve.svg", "a run", best=2)
    text = (tmp_path / "curve.svg").read_text()
    assert "@media(prefers-color-scheme:dark){:root{--panel:#1a1d23" in text
    drawing = text[text.index("</style>") :]
    assert "var(--blue)" in drawing
    assert "#0b66c3" not in drawing  # no color of the light look is left
    assert "#ffffff" not in drawing
    draw_curves(history(3, 6), tmp_path / "again.svg", "a run", best=2)
    assert (tmp_path / "again.svg").read_text() == text
