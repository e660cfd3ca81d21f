"""The picture of the alternatives, drawn from its record: no name covers a file, a line or another name."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import alternatives
import pictures
import pytest

RECORD = alternatives.RECORDS / "alternatives-amd-epyc-avx512-vnni.json"


def test_a_record_is_drawn_without_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = tmp_path / RECORD.name
    record.write_bytes(RECORD.read_bytes())
    monkeypatch.setattr(sys, "argv", ["alternatives.py", "--draw", str(record)])
    texts = pictures.watch(monkeypatch)
    alternatives.main()
    assert record.with_suffix(".png").exists()
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
