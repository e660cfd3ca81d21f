"""The picture of equal training time, drawn from its record."""

from __future__ import annotations

import json
from pathlib import Path

import equal_training_time
import pictures
import pytest

RECORD = equal_training_time.RECORDS / "equal_training_time-amd-epyc.json"


def test_a_record_is_drawn_without_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record, docs, texts = pictures.redraw(equal_training_time, RECORD, tmp_path, monkeypatch)
    assert docs.read_bytes() == record.with_suffix(".svg").read_bytes()
    assert {"nano: ViTRM, 2 steps", "vit-small", "1.0 M parameters", "float32 file", "int8 file"} <= set(texts)
    difference = "int8 points: float32's accuracy plus the difference on 2,000 images"
    assert f"AMD EPYC, 1 thread; CIFAR-10, all test images\n{difference}" in texts
    assert "Accuracy and latency after 13 to 15 minutes of training each" in texts


def test_axes_end_soon_after_what_they_hold() -> None:
    models = json.loads(RECORD.read_text(encoding="utf-8"))["models"].values()
    percent = [y for model in models for y in equal_training_time.accuracies(model)]
    assert percent[0] == pytest.approx(73.08)  # as in the table of the docs
    low, high = equal_training_time.accuracy_limits(percent)
    assert 0 <= min(percent) - low < 10
    assert 3 <= high - max(percent) < 13
    assert equal_training_time.accuracy_limits([0.5, 15.5, 24.0]) == (0, 30)
