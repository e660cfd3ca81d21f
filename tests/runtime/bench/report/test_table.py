"""The table on a terminal: a line for each row, however narrow."""

from __future__ import annotations

import contextlib
import io

import pytest

from vitrm.runtime.bench.latency import Latency
from vitrm.runtime.bench.report.table import plain_text, print_result
from vitrm.runtime.bench.rows import BenchResult, BenchRow, Flips
from vitrm.system.terminal import console

NAMES = [f"an-experiment-of-a-long-afternoon-{kind}-with-a-long-name-s6.onnx" for kind in ("fp32", "int8")]


def row(name: str, batch: int, **more: object) -> BenchRow:
    values = {"kind": "artifact", "backend": "onnxruntime-cpu", "precision": "fp32", "steps": 6, "device": "a CPU"}
    figures = {
        "latency_ms": Latency(1234.5, 1300.0, 1400.0, 1250.0, 1200.0, 1500.0, 100),
        "images_per_s": 12345.0,
        "speedup": 3.5,
        "speedup_range": (2.1, 14.0),
        "accuracy": 0.9,
        "agreement": 0.9999,
        "images": 1000,
        "flips": Flips(gained=100, lost=100),
        "max_logit_difference": 0.123,
        "bytes": 123_456_789,
    }
    return BenchRow(name=name, batch=batch, **{**values, **figures, **more})  # type: ignore[arg-type]


def result(*rows: BenchRow, disturbed: bool = False) -> BenchResult:
    return BenchResult(
        rows=rows,
        notes=(),
        data=(),
        machine={"cpu": "a CPU", "disturbed": disturbed},
        versions={},
        threads=1,
        device="cpu",
        seconds=1.0,
        rounds=10,
        warm_up=3,
        started="2026-01-01T00:00:00+00:00",
    )


def printed(found: BenchResult, width: int) -> list[str]:
    with contextlib.redirect_stdout(io.StringIO()) as text:
        print_result(found, console(width=width))
    return text.getvalue().splitlines()


@pytest.mark.parametrize("width", [72, 80, 100, 200])
def test_every_row_is_one_line_that_tells_artifacts_apart(width: int) -> None:
    rows = [row(name, batch) for batch in (1, 32) for name in NAMES]
    lines = printed(result(*rows), width)
    assert max(map(len, lines)) <= width
    figures = [line for line in lines if line.lstrip().startswith("an")]
    once = 2 if width < 150 else 0  # tables of what no batch size changes: artifacts and answers
    assert len(figures) == len(rows) + once * len(NAMES)
    assert sum("fp32" in line.split()[0] for line in figures) == sum("int8" in line.split()[0] for line in figures)
    assert "…" not in " ".join(line.partition(".onnx")[2] for line in figures)  # no figure is cut
    assert NAMES[0] in plain_text(result(*rows))


def test_ratios_of_a_busy_machine_are_ranges() -> None:
    calm = row("a.onnx", 1, speedup=3.512, speedup_range=(3.42, 3.61))
    assert "3.51" in plain_text(result(calm))
    assert "or the median where that spans at most a tenth of it" in plain_text(result(calm))
    busy = plain_text(result(calm, disturbed=True))
    assert "3.4–3.6" in busy
    assert "3.51" not in busy
    assert "× eager is the range of the middle 80 % of rounds" in busy
    assert "the median where" not in busy


def test_what_halting_saves_is_said() -> None:
    halting = row(
        "a.onnx · halting at 0.9",
        1,
        halt_threshold=0.9,
        mean_steps_used=1.468,
        halted_first=0.897,
        accuracy_without_halting=0.91,
        halting_speedup=2.0,
        halting_speedup_range=(1.9, 2.1),
    )
    said = (
        "halting above 0.9: a.onnx takes 1.47 of 6 steps on average; 89.7 % of 1,000 images stop after the first; 90.00 % right "
        "(91.00 % without halting); as fast as without: 1.9 to 2.1 × at batch 1"
    )
    assert said in plain_text(result(halting)).splitlines()
