"""The picture of the alternatives, drawn from its record: no name covers a file, a line or another name."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import alternatives
import numpy as np
import pictures
import pytest

RECORD = alternatives.RECORDS / "alternatives-amd-epyc-avx512-vnni.json"


def test_a_record_is_drawn_without_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record, docs, texts = pictures.redraw(alternatives, RECORD, tmp_path, monkeypatch)
    assert record.with_suffix(".png").exists()
    assert docs.exists()
    assert {"2", "5", "float32", "resnet20", "nano-cifar10, 6 steps"} <= set(texts)
    assert any(text.startswith("nano-v2-cifar10, halting: ") for text in texts)
    assert any(text.startswith("AMD EPYC with VNNI, 1 thread") for text in texts)


@pytest.mark.slow
def test_names_find_room_where_all_models_are_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    for i, row in enumerate(record["rows"]):
        row["latency_ms"]["mean"] = 4 + 0.02 * i
        if "accuracy" in row:
            row["accuracy"] = 0.93
    texts = pictures.watch(monkeypatch)
    alternatives.draw(record, tmp_path / "a.png")
    assert "resnet18-cifar" in texts


def test_lines_that_would_meet_are_drawn_apart() -> None:
    models = alternatives.drawn_models(json.loads(RECORD.read_text(encoding="utf-8")))
    moved, most = alternatives.moved_apart(models)
    assert 0 < most < 0.25
    heights = [np.mean([alternatives._height(y) for _, y, _ in model.points]) for model in moved]
    for i, j in itertools.combinations(range(len(moved)), 2):
        a, b = ([x for x, _, _ in moved[k].points] for k in (i, j))
        assert abs(heights[i] - heights[j]) > 0.95 * alternatives.APART or max(a) < min(b) or max(b) < min(a)
    alone = next(model for model in moved if model.label == "resnet20")
    assert alone.points[0] == pytest.approx(next(m for m in models if m.label == "resnet20").points[0])
    assert len({model.color for model in moved if model.label.startswith("small-v2-cifar10")}) == 2
