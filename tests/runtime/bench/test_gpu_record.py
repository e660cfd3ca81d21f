"""The script of the GPU record, as far as a CPU goes."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
ARGUMENTS = [
    "--device",
    "cpu",
    "--steps",
    "2",
    "--graphs",
    "loop",
    "--precisions",
    "fp32",
    "--seconds",
    "0.02",
    "--limit",
    "8",
    "--threads",
    "1",
    "--no-compile",
]


@pytest.mark.slow
def test_the_record_grows_by_batch_size_and_goes_on(run: Path, loop: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    main = runpy.run_path(str(ROOT / "benchmarks" / "gpu.py"))["main"]
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    record = tmp_path / "record.json"
    fixed = [str(run), *ARGUMENTS, "--record", str(record), "--work", str(tmp_path / "work")]
    # What is in the work folder already is not exported again.
    kept = tmp_path / "work" / f"{run.name}-4"
    kept.mkdir(parents=True)
    shutil.copy(loop, kept / "loop-fp32.onnx")
    main([*fixed, "--batches", "2"])
    first = json.loads(record.read_text())
    rows = {row["name"]: row for row in first["rows"]}
    assert set(rows) == {"eager PyTorch", "eager PyTorch, bfloat16", "loop-fp32.onnx", "loop-fp32.plan"}
    assert [name for name, row in rows.items() if row["status"] != "ok"] == ["loop-fp32.plan"]
    assert rows["loop-fp32.plan"]["status"] == "a plan runs on a GPU, this record is of a CPU"
    assert rows["loop-fp32.onnx"]["agreement"] == 1
    assert rows["loop-fp32.onnx"]["speedup"] > 0
    assert rows["loop-fp32.onnx"]["device_ms"] is None  # a CPU has no clock of its own
    assert first["benches"][0]["machine"]["cpu"]
    assert first["benches"][0]["versions"]["onnxruntime"]

    capsys.readouterr()
    main([*fixed, "--batches", "2,3"])
    out = capsys.readouterr().out
    assert "batch 2: there already" in out
    assert "exporting" not in out
    second = json.loads(record.read_text())
    assert second["rows"][: len(rows)] == first["rows"]
    assert {row["batch"] for row in second["rows"]} == {2, 3}
    with pytest.raises(SystemExit, match="2"):
        main(["--device", "tpu"])
