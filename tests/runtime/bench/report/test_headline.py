"""The headline: as sure as its figures, and no surer."""

from __future__ import annotations

from dataclasses import replace

from vitrm.runtime.bench.latency import Latency
from vitrm.runtime.bench.report.headline import headline
from vitrm.runtime.bench.rows import BenchRow


def row(name: str, p50: float, speedup: tuple[float, float], agreement: float = 1.0) -> BenchRow:
    return BenchRow(
        name=name,
        kind="artifact",
        batch=1,
        latency_ms=Latency(p50, p50, p50, p50, p50, p50, 100),
        speedup=sum(speedup) / 2,
        speedup_range=speedup,
        agreement=agreement,
        images=1000,
    )


def test_a_ratio_is_a_range_and_an_uncertain_one_is_called_so() -> None:
    one = row("a.onnx", 1.0, (61.2, 79.8), agreement=0.9914)
    calm = "a.onnx runs 61 to 80 × as fast as eager PyTorch at batch 1"
    assert headline([one], quiet=True) == f"{calm}, and gives the same answer on 99.1 % of 1,000 images"
    assert headline([one], quiet=False).startswith(f"{calm} (uncertain: the machine was busy)")


def test_a_range_that_tells_nothing_is_called_so() -> None:
    one = replace(row("a.onnx", 1.0, (0.84, 6.7)), steps=6, halt_threshold=0.9)
    said = "a.onnx cannot be told apart in speed from eager PyTorch at batch 1 (0.84 to 6.7 ×"
    assert headline([one], quiet=True).startswith(f"{said})")
    assert headline([one], quiet=False).startswith(f"{said}; the machine was busy)")
    near = replace(one, speedup_range=(0.9, 1.2), halt_threshold=2.0)
    assert "is about as fast as eager PyTorch at batch 1 (0.9 to 1.2 ×)" in headline([near], quiet=True)


def test_what_cannot_be_told_apart_is_not_ranked() -> None:
    assert "a.onnx is about as fast as eager" in headline([row("a.onnx", 1.0, (0.9, 1.3))], quiet=True)
    near, far = row("b.onnx", 1.05, (2, 2.1)), row("b.onnx", 1.3, (2, 2.1))
    first = row("a.onnx", 1.0, (2.2, 2.3))
    assert headline([near, first], quiet=True).startswith("a.onnx, among the fastest of 2, runs")
    assert headline([far, first], quiet=True).startswith("a.onnx, the fastest of 2, runs")
    assert headline([far, first], quiet=False).startswith("a.onnx, among the fastest of 2, runs")
