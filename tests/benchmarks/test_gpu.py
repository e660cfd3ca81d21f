"""The script of the GPU record, as far as a CPU goes: which rows, how it goes on, and what ends a row."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import gpu
import pytest
from gpu_record import engines
from gpu_record.engines import Engine, read_trtexec
from small_models import make_checkpoint

from vitrm import checkpoint as checkpoints
from vitrm.errors import UserError

FIXED = ["--device", "cpu", "--steps", "2", "--graphs", "loop", "--precisions", "fp32", "--seconds", "0.02"]
FIXED += ["--limit", "8", "--threads", "1", "--no-power"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpu") / "run"
    checkpoints.save(path, make_checkpoint("tiny"))
    return path


@pytest.fixture
def arguments(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    return [str(run), *FIXED, "--record", str(tmp_path / "record.json"), "--work", str(tmp_path / "work")]


def rows(tmp_path: Path) -> dict[tuple[str, int], dict]:
    return {(r["name"], r["batch"]): r for r in json.loads((tmp_path / "record.json").read_text())["rows"]}


def test_a_dry_run_lists_every_row_with_its_time_and_what_is_missing(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu.main([*arguments, "--dry-run", "--batches", "1,64"])
    lines = capsys.readouterr().out.splitlines()
    listed = [line.split("  batch")[0].strip() for line in lines[:-1]]
    wanted = [
        "eager PyTorch",
        "plain equations",
        "loop-fp32.onnx",
        "loop-fp32.plan",
        "torch.compile max-autotune",
        "AOTInductor",
    ]
    assert set(wanted) < set(listed)
    assert all(listed.count(name) == 2 for name in listed)
    assert all("about" in line for line in lines)
    assert any("loop-fp32.plan" in line and "missing: a plan runs on a GPU" in line for line in lines)
    assert any("eager PyTorch, CUDA graph" in line and "missing: runs on a GPU" in line for line in lines)
    assert not any("loop-fp32.onnx" in line and "missing" in line for line in lines)
    assert not (tmp_path / "record.json").exists()


def test_the_gpu_is_named_where_there_is_none(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if engines.find_gpus().found:
        pytest.skip("this is about machines without a GPU")
    with pytest.raises(UserError, match="so there is nothing to record: --device cpu tries"):
        gpu.main([*arguments, "--device", "cuda"])
    gpu.main([*arguments, "--device", "cuda", "--dry-run"])
    assert "0 to measure" in capsys.readouterr().out


@pytest.mark.slow
def test_the_record_grows_by_rows_and_goes_on(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = [*arguments, "--only", "loop"]
    gpu.main([*few, "--batches", "2"])
    first = rows(tmp_path)
    assert {n: r["status"] for (n, _), r in first.items()} == {
        "loop-fp32.onnx": "ok",
        "loop-fp32.plan": "a plan runs on a GPU, this record is of a CPU",
    }
    own = first["loop-fp32.onnx", 2]
    assert own["agreement"] == 1
    assert own["speedup"] > 0
    assert own["device_ms"] is None  # a CPU has no clock of its own
    assert own["latency_ms"]["n"] >= 10
    about = json.loads((tmp_path / "record.json").read_text())["about"]["loop-fp32.onnx"]
    assert about["machine"]["cpu"]
    assert about["versions"]["onnxruntime"]

    capsys.readouterr()
    gpu.main([*few, "--batches", "2,3"])
    assert "loop-fp32.onnx: batch 3" in capsys.readouterr().out
    second = rows(tmp_path)
    assert {key: second[key] for key in first} == first
    assert set(second) == {(name, batch) for name, _ in first for batch in (2, 3)}
    gpu.main([*few, "--batches", "2,3"])
    assert "batch" not in capsys.readouterr().out
    with pytest.raises(UserError, match="rename it to measure anew"):
        gpu.main([*few, "--seconds", "1"])


def with_engine(engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str) -> None:
    """Lists `engine` alone, whose worker does `how`."""
    monkeypatch.setattr(gpu, "engines", lambda graphs, precisions: [engine])
    folder = tmp_path / "stand-in"
    (folder / "gpu_record").mkdir(parents=True)
    (folder / "gpu_record" / "__init__.py").touch()
    (folder / "gpu_record" / "worker.py").write_text(
        "import json, os, sys, time\n"
        "asked = json.load(sys.stdin)['measure']\n"
        "def say(**answer): print(json.dumps(answer), flush=True)\n"
        "def row(batch): say(row={'name': 'one', 'kind': 'peer', 'batch': batch, 'status': 'ok', 'latency_ms': {'p50': 1},\n"
        "                         'device_ms': None, 'speedup': None})\n" + how
    )
    monkeypatch.setattr(gpu, "__file__", str(folder / "gpu.py"))


ENGINE = Engine("one", "peer", lambda *_: pytest.fail("opened here"), lambda job: None)


def test_a_worker_that_crashes_costs_one_row(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = "say(stage=f'batch {asked[0]}: preparing')\nif asked[0] == 2: os.kill(os.getpid(), 11)\n[row(b) for b in asked]\n"
    with_engine(ENGINE, monkeypatch, tmp_path, how)
    gpu.main([*arguments, "--batches", "2,3,4"])
    assert [r["status"] for r in rows(tmp_path).values()] == [
        "its process crashed (signal 11) while batch 2: preparing",
        "ok",
        "ok",
    ]
    gpu.main([*arguments, "--batches", "2,3,4"])  # it is not tried again unless asked
    assert rows(tmp_path)["one", 2]["status"].startswith("its process crashed")


def test_a_worker_that_hangs_is_ended(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how = "row(2)\nsay(stage='batch 3: preparing it')\ntime.sleep(600)\n"
    with_engine(ENGINE, monkeypatch, tmp_path, how)
    gpu.main([*arguments, "--batches", "2,3", "--compile-limit", "0.5"])
    assert rows(tmp_path)["one", 3]["status"] == "took longer than 0 s (batch 3: preparing it)"
    assert rows(tmp_path)["one", 2]["status"] == "ok"


@pytest.mark.slow
def test_what_is_over_time_is_left_for_the_next_call(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "_START_S", 0.0)
    monkeypatch.setattr(gpu, "_ROW_S", 0.0)
    with_engine(ENGINE, monkeypatch, tmp_path, "row(2)\nsay(stage='batch 3: preparing it')\ntime.sleep(600)\n")
    gpu.main([*arguments, "--batches", "2,3", "--minutes", "0.1"])
    assert list(rows(tmp_path)) == [("one", 2)]
    assert "the time is over: the same command goes on from here" in capsys.readouterr().out
    gpu.main([*arguments, "--batches", "2,3", "--minutes", "0.0001"])
    assert "one takes about 0 s, 0 s are left" in capsys.readouterr().out


def test_stages_have_limits_of_their_own() -> None:
    args = argparse.Namespace(build_limit=1.0, compile_limit=2.0, row_limit=3.0, seconds=1.0)
    stages = (
        "building a.plan",
        "batch 8: preparing a, batch 8",
        "batch 8: latency",
        "opening",
        "answering 9 images, a",
    )
    assert [gpu.stage_limit(stage, args) for stage in stages] == [1, 2, 11, 11, 13]


def test_trtexecs_summary_is_read() -> None:
    # As TensorRT 10 prints it.
    text = (
        "[12/01/2024-10:00:00] [I] Latency: min = 0.5 ms, max = 1.5 ms, mean = 0.75 ms, median = 0.7 ms, percentile(90%) = 0.9 ms,"
        " percentile(95%) = 1 ms, percentile(99%) = 1.25 ms\n"
        "[12/01/2024-10:00:00] [I] GPU Compute Time: min = 0.25 ms, max = 1 ms, mean = 0.5 ms, median = 0.5 ms,"
        " percentile(90%) = 0.6 ms, percentile(95%) = 0.7 ms, percentile(99%) = 0.8 ms\n"
    )
    assert read_trtexec(text, "Latency") == {"p50": 0.7, "p90": 0.9, "p99": 1.25, "mean": 0.75, "min": 0.5, "max": 1.5}
    assert read_trtexec(text, "GPU Compute Time")["p99"] == 0.8
    with pytest.raises(UserError, match="printed no line 'Latency'"):
        read_trtexec("", "Latency")
