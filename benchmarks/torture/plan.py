"""The parts of a run, in their order, and what each is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .concurrency import concurrency
from .damage.formats import FORMATS
from .disk import disk
from .environment import environment
from .findings import GOOD, Finding, Part
from .halting import halting
from .kills import SMALL, kills
from .oracle import MIB, judge

Progress = Callable[[str], None]
"""Called with a few words on how far a part is."""


__all__ = ["PARTS", "SMALL", "Budget"]


@dataclass(frozen=True)
class Budget:
    """How much of everything."""

    seed: int
    share: float  # times the cases of a full run
    work: Path  # `subjects` are in it
    format: str | None = None  # this one alone
    case: int | None = None  # of it, this one alone

    @property
    def subjects(self) -> Path:
        return self.work / "subjects"

    def of(self, cases: int, least: int = 1) -> int:
        """So many of `cases`."""
        return max(least, round(cases * self.share))

    def repeat(self, words: str) -> str:
        """The command that repeats what `words` name."""
        return f"PYTHONPATH=benchmarks python -m torture --seed {self.seed} {words}"


def formats(budget: Budget, progress: Progress) -> Part:
    """Damaged files of every kind."""
    part = Part("formats")
    by_format: dict[str, dict[str, object]] = {}
    died: list[str] = []  # ONNX Runtime itself
    for fmt in FORMATS:
        if budget.format not in (None, fmt.name):
            continue
        if absent := [n for n in fmt.needs if not (budget.subjects / n).exists()]:
            part.skipped.append(f"{fmt.name}: {', '.join(absent)} could not be made")
            continue
        count = budget.of(fmt.cases)
        indices = list(range(count)) if budget.case is None else [budget.case]
        outcomes: dict[str, int] = {}
        slowest, largest = 0.0, 0
        for verdict in judge(fmt, indices, budget.seed, budget.subjects):
            outcomes[verdict.outcome] = outcomes.get(verdict.outcome, 0) + 1
            slowest, largest = max(slowest, verdict.cpu), max(largest, verdict.grown)
            if verdict.outcome in GOOD:
                part.count(verdict.outcome)
                if verdict.outcome == "backend":
                    died.append(f"{fmt.name} case {verdict.index}: {verdict.mutation}: {verdict.detail}")
            else:
                again = budget.repeat(f"--part formats --format {fmt.name} --case {verdict.index}")
                part.found(Finding("formats", fmt.name, verdict.outcome, verdict.mutation, verdict.detail, again))
            if budget.case is not None:
                print(
                    f"{verdict.mutation}\n{verdict.outcome}: {verdict.detail}\n{verdict.cpu} s, {verdict.grown // MIB} MiB"
                )
            progress(f"{fmt.name} {verdict.index + 1} of {count}")
        by_format[fmt.name] = {
            "cases": sum(outcomes.values()),
            **dict(sorted(outcomes.items())),
            "slowest_cpu_s": round(slowest, 2),
            "largest_mib": largest // MIB,
        }
    part.figures = {"formats": by_format, "onnxruntime died of": died}
    return part


Scenes = Callable[[Part, int, float, Path, Callable[[str], str], Progress], None]
"""What runs a part's scenes: (part, seed, share, work, repeat, progress)."""


def _scenes(name: str, run: Scenes) -> Callable[[Budget, Progress], Part]:
    def part(budget: Budget, progress: Progress) -> Part:
        found = Part(name)
        run(found, budget.seed, budget.share, budget.work, budget.repeat, progress)
        return found

    return part


PARTS: dict[str, Callable[[Budget, Progress], Part]] = {
    "formats": formats,
    "kills": _scenes("kills", kills),
    "disk": _scenes("disk", disk),
    "environment": _scenes("environment", environment),
    "concurrency": _scenes("concurrency", concurrency),
    "halting": _scenes("halting", halting),
}
