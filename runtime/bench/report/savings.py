"""Savings by halting: how many steps and how much time, beside the accuracy that they cost.

Measured where an artifact ran with a threshold; else what any threshold would save, from the eager model's answers after
every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vitrm.runtime.bench.report.numbers import between, percent
from vitrm.runtime.bench.rows import BenchResult, BenchRow, DepthCurve
from vitrm.runtime.halting.choose import HaltingPoint

_SHOWN = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.97, 0.99)  # thresholds of the table, of all that a curve has


@dataclass(frozen=True)
class Saving:
    """A saving: what halting did with one artifact at one threshold."""

    name: str
    threshold: float
    steps: int  # at most
    mean_steps: float
    halted_first: float  # share of images that stopped after the first step, in [0, 1]
    accuracy: float | None  # in [0, 1]; None without labels
    full_accuracy: float | None  # of the same artifact where no image halts; None where that was not measured
    images: int
    speedups: tuple[
        tuple[int, tuple[float, float]], ...
    ]  # (batch, middle 80 % of the rounds): times as fast as without


def measured(result: BenchResult) -> list[Saving]:
    """Returns what halting did with each artifact that was measured with a threshold below 1."""
    rows: dict[str, list[BenchRow]] = {}
    for row in result.rows:
        if row.kind == "artifact" and row.ok and row.halted_first is not None:
            rows.setdefault(row.name, []).append(row)
    return [_saving(own) for own in rows.values()]


def _saving(own: Sequence[BenchRow]) -> Saving:
    """Makes one of an artifact's rows, one for each batch size."""
    row = own[0]
    assert row.steps is not None
    assert row.halt_threshold is not None
    assert row.mean_steps_used is not None
    assert row.halted_first is not None
    assert row.images is not None
    return Saving(
        name=row.name,
        threshold=row.halt_threshold,
        steps=row.steps,
        mean_steps=row.mean_steps_used,
        halted_first=row.halted_first,
        accuracy=row.accuracy,
        full_accuracy=row.accuracy_without_halting,
        images=row.images,
        speedups=tuple((r.batch, r.halting_speedup_range) for r in own if r.halting_speedup_range),
    )


def sentence(saving: Saving, quiet: bool) -> str:
    """Says it in one line."""
    parts = [
        f"{saving.mean_steps:.2f} of {saving.steps} steps on average",
        f"{percent(saving.halted_first, 1)} of {saving.images:,} images stop after the first",
    ]
    if saving.accuracy is not None:
        full = "" if saving.full_accuracy is None else f" ({percent(saving.full_accuracy)} without halting)"
        parts.append(f"{percent(saving.accuracy)} right{full}")
    if saving.speedups:
        speed = ", ".join(f"{between(*span)} × at batch {batch}" for batch, span in saving.speedups)
        parts.append(f"as fast as without: {speed}{'' if quiet else ' (uncertain)'}")
    return f"halting above {saving.threshold:g}: {saving.name.partition(' · halting')[0]} takes {'; '.join(parts)}"


def cards(saving: Saving, quiet: bool) -> list[tuple[str, str, str]]:
    """Returns the figures of one artifact: what it is, how much, and what of it."""
    found = [
        ("steps, mean", f"{saving.mean_steps:.2f} of {saving.steps}", f"halting above {saving.threshold:g}"),
        ("stop after step 1", percent(saving.halted_first, 1), f"of {saving.images:,} images"),
    ]
    if saving.accuracy is not None:
        full = saving.full_accuracy
        beside = "not measured without halting" if full is None else f"without halting {percent(full)}"
        found.append(("accuracy", percent(saving.accuracy), beside))
    for batch, span in saving.speedups[:2]:
        detail = "as fast as without halting, in the middle 80 % of rounds"
        found.append((f"speed, batch {batch}", f"{between(*span, '–')} ×", detail if quiet else f"{detail}; uncertain"))
    return found


# What any threshold would save -----------------------------------------------------------------


HEAD = ("halts above", "mean steps", "stop after step 1", "accuracy", "lost", "gained")


def estimates(curve: DepthCurve, rows: Sequence[BenchRow]) -> list[tuple[tuple[str, ...], bool]]:
    """Returns lines for a table with `HEAD`: what some thresholds, and none, would have given on the curve's images.

    Each line comes with whether its threshold is that of an artifact among `rows`.
    """
    names = {name for name, _, _ in curve.points}
    used = {r.halt_threshold for r in rows if r.name in names and r.halt_threshold is not None and r.halt_threshold < 1}
    shown = [p for p in curve.halting if p.threshold in _SHOWN or p.threshold in used or p.threshold >= 1]
    return [(_estimate(p, p.threshold in used), p.threshold in used) for p in shown]


def _estimate(p: HaltingPoint, used: bool) -> tuple[str, ...]:
    return (
        "never" if p.threshold >= 1 else f"{p.threshold:g}, in\u00a0use" if used else f"{p.threshold:g}",
        f"{p.mean_steps:.2f}",
        percent(p.halted_first, 1),
        percent(p.accuracy),
        f"{p.lost:,}",
        f"{p.gained:,}",
    )
