"""Savings by halting: the table of thresholds has the one that an artifact uses."""

from __future__ import annotations

from vitrm.runtime.bench.report.savings import estimates
from vitrm.runtime.bench.rows import BenchRow, DepthCurve
from vitrm.runtime.halting.choose import HaltingPoint


def point(threshold: float) -> HaltingPoint:
    return HaltingPoint(threshold=threshold, accuracy=0.9, mean_steps=1.5, halted_first=0.5, lost=1, gained=0)


CURVE = DepthCurve(
    run="runs/r",
    accuracy=(0.8, 0.9),
    halt_prob=(0.8, 0.9),
    images=300,
    points=(("a · halting at 0.96", 1.5, 0.9),),
    steps=2,
    halting=(point(0.94), point(0.95), point(0.96), point(2.0)),
)


def row(name: str, threshold: float) -> BenchRow:
    return BenchRow(name=name, kind="artifact", batch=1, halt_threshold=threshold)


def test_the_threshold_in_use_is_a_row() -> None:
    lines = estimates(CURVE, [row("a · halting at 0.96", 0.96), row("another", 0.94)])
    assert [(cells[0], used) for cells, used in lines] == [
        ("0.95", False),
        ("0.96, in\u00a0use", True),
        ("never", False),
    ]
    assert [cells[0] for cells, _ in estimates(CURVE, [])] == ["0.95", "never"]
