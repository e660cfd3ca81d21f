"""The picture of equal training time, drawn from its record."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import equal_training_time
import pictures
import pytest

RECORD = equal_training_time.RECORDS / "equal_training_time-amd-epyc.json"


def test_a_record_is_drawn_without_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = tmp_path / RECORD.name
    record.write_bytes(RECORD.read_bytes())
    docs = tmp_path / "docs.svg"
    monkeypatch.setattr(equal_training_time, "DOCS_PICTURE", docs)
    monkeypatch.setattr(sys, "argv", ["equal_training_time.py", "--draw", str(record)])
    texts = pictures.watch(monkeypatch)
    equal_training_time.main()
    assert docs.read_bytes() == record.with_suffix(".svg").read_bytes()
    assert {"nano", "1.0 M parameters", "float32 file", "int8 file"} <= set(texts)
    assert "AMD EPYC, 1 thread; 2,000 test images of CIFAR-10" in texts


def test_axes_end_soon_after_what_they_hold() -> None:
    models = json.loads(RECORD.read_text(encoding="utf-8"))["models"].values()
    files = [file for model in models for file in model["files"].values()]
    percent = [100 * file["accuracy"] for file in files]
    low, high = equal_training_time.accuracy_limits(percent)
    assert 3 <= min(percent) - low < 13
    assert 3 <= high - max(percent) < 13
    assert equal_training_time.accuracy_limits([0.5, 99.5]) == (0, 100)
