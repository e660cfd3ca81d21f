"""The picture of the alternatives, drawn from its record: no name covers a file, a line or another name."""

from __future__ import annotations

import json
from pathlib import Path

import alternatives
import pictures
import pytest

RECORD = alternatives.RECORDS / "alternatives-amd-epyc-avx512-vnni.json"


def test_a_record_is_drawn_without_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record, docs, texts = pictures.redraw(alternatives, RECORD, tmp_path, monkeypatch)
    assert record.with_suffix(".png").exists()
    assert docs.exists()
    assert {"2", "5", "float32", "resnet20", "cct-7-3x1"} <= set(texts)
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


def test_files_are_drawn_where_they_were_measured() -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    models = alternatives.drawn_models(record)
    drawn = [point[:2] for model in models for point in model.points]
    halting = [row for row in record["rows"] if row["steps"] == "halting"]
    assert {(row["latency_ms"]["mean"], 100 * row["accuracy"]) for row in halting} <= set(drawn)
    assert len(drawn) == len(halting) + sum(row["model"] not in alternatives.OURS for row in record["rows"])
    assert [model.label for model in models if model.ours] == [
        "nano-v3-cifar10, halting: 1.0 steps",
        "nano-v2-cifar10, halting: 1.1 steps",
        "small-v2-cifar10, halting: 1.0 steps",
    ]
