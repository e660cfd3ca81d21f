"""Measurement on corrupted images: accuracy, what halting still gives up, and whether halt_prob is still true.

A halting threshold keeps its accuracy budget on images like those it was chosen on.  This says what becomes of it when the
world changes: full depth and halting answer the same corrupted images, and the difference is paired, image by image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vitrm.errors import UserError
from vitrm.runtime.bench.accuracy import Predictions, predict
from vitrm.runtime.bench.images import Sample
from vitrm.runtime.bench.robustness.corruptions import CORRUPTIONS, SEVERITIES, Corruption, corrupt
from vitrm.runtime.halting.choose import DEFAULT_BUDGET, HaltingChoice, reliability

if TYPE_CHECKING:  # it imports the results, of which what is found here is a part
    from vitrm.runtime.bench.cases import Case

IMAGES = 1000  # by default: thirteen corruptions at five severities make 65,000 of them
CONFIDENCE = 1.645  # standard errors that a normal variable stays below in 95 % of cases
SEED = 0  # of what is drawn, the same in every run, so that runs compare

KEPT = "kept"  # the budget, on these images
UNCLEAR = "unclear"  # more is lost than the budget, but within chance
BROKEN = "broken"  # more is lost than the budget, with 95 % confidence


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Figures of an artifact at its depth and threshold, on the same images."""

    accuracy: float  # in [0, 1]
    full_accuracy: float | None = None  # at full depth; None where it never halts, or its threshold is built in
    lost: float | None = None  # by halting: full_accuracy − accuracy
    mean_steps_used: float | None = None  # None for a baseline
    mean_halt_prob: float | None = None  # of its answers; None for a baseline, or where one is not finite
    halt_ece: float | None = None  # expected calibration error of halt_prob against being right


@dataclass(frozen=True, kw_only=True)
class UnderCorruption:
    """An artifact under one corruption."""

    name: str
    group: str  # noise, blur, weather or digital
    severities: tuple[Figures, ...]  # at severity 1, 2, …
    mean: Figures  # over the severities, also of the calibration errors
    lost_error: float | None = None  # standard error of mean.lost over the choice of images
    budget: str | None = None  # kept, unclear or broken; None where mean.lost is not known


@dataclass(frozen=True, kw_only=True)
class Robustness:
    """An artifact on corrupted images."""

    name: str  # the artifact's, with its setting where it is measured at several
    data: str
    images: int  # under each corruption and severity
    total: int  # of them in the data set's part
    seed: int
    steps: int | None  # None for a baseline
    halt_threshold: float | None  # 1 or more never halts; None for a baseline
    budget: float | None  # that halting may give up, in [0, 1]; None where what it gives up is not known
    budget_from: str | None  # chosen: in this run; stored: in the artifact; default: nobody named one
    clean: Figures  # the same images as they are
    corruptions: tuple[UnderCorruption, ...]
    mean: Figures  # over the corruptions

    def at(self, severity: int, group: str | None = None) -> Figures:
        """The mean over all corruptions, or those of `group`, at one severity; 0 is clean."""
        if severity == 0:
            return self.clean
        return mean_of([c.severities[severity - 1] for c in self.corruptions if group in (None, c.group)])


def mean_of(figures: Sequence[Figures]) -> Figures:
    """Returns the mean of each field; None where one is."""
    columns = {f.name: [getattr(one, f.name) for one in figures] for f in fields(Figures)}
    means = {name: None if None in values else float(np.mean(values)) for name, values in columns.items()}
    accuracy = means.pop("accuracy")
    assert accuracy is not None
    return Figures(accuracy=accuracy, **means)


def measure_corruptions(
    cases: Sequence[Case],
    samples: Mapping[str, Sample],
    choices: Mapping[Path, HaltingChoice],
    images: int,
    notes: list[str],
    report: Callable[[str, float], None],
    corruptions: Sequence[Corruption] = CORRUPTIONS,
) -> tuple[Robustness, ...]:
    """Measures every artifact among `cases` on at most `images` of its `samples`, under each of `corruptions` at every severity.

    `choices` are the thresholds that this run chose, by artifact: their budgets are what halting may give up.
    `report` is called with what is being done and the fraction of it that is done.  Appends to `notes` what could not be
    measured and why.  Artifacts that failed before are left out.
    """
    artifacts = [e for e in cases if e.kind == "artifact" and e.predictions is not None]
    unlabelled = [e.name for e in artifacts if samples[e.group].labels is None]
    if unlabelled:
        notes.append(f"not measured under corruptions, which needs labelled images: {', '.join(unlabelled)}")
    parts = {id(s): _part(s, images) for s in samples.values() if s.labels is not None}
    measured: dict[str, Robustness] = {}
    for number, (which, sample) in enumerate(parts.items()):
        members = [e for e in artifacts if id(samples[e.group]) == which]

        def progress(done: float, before: int = number) -> None:
            report("accuracy under corruptions", (before + done) / len(parts))

        for case, answers in _run(members, sample, corruptions, notes, progress):
            measured[case.key] = _robustness(case, sample, corruptions, answers, choices)
    return tuple(measured[e.key] for e in artifacts if e.key in measured)


# Running ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Answers:
    """Answers of one artifact, image by image [n]."""

    right: NDArray[np.bool_]
    full_right: NDArray[np.bool_] | None  # at full depth, where that is known
    predictions: Predictions

    def figures(self) -> Figures:
        """Sums them up."""
        full = None if self.full_right is None else float(self.full_right.mean())
        accuracy = float(self.right.mean())
        steps, chances = self.predictions.steps_used, self.predictions.halt_prob
        known = chances is not None and bool(np.isfinite(chances).all())
        return Figures(
            accuracy=accuracy,
            full_accuracy=full,
            lost=None if full is None else full - accuracy,
            mean_steps_used=None if steps is None else float(steps.mean()),
            mean_halt_prob=float(chances.mean()) if known and chances is not None else None,
            halt_ece=reliability(chances, self.right).ece if known and chances is not None else None,
        )


def _run(
    cases: Sequence[Case],
    sample: Sample,
    corruptions: Sequence[Corruption],
    notes: list[str],
    progress: Callable[[float], None],
) -> list[tuple[Case, list[_Answers]]]:
    """Collects each case's answers to the images as they are, then to every corruption at every severity.

    Leaves out a case that fails, and appends the reason to `notes`.
    """
    conditions: list[tuple[Corruption, int] | None] = [None, *((c, s) for c in corruptions for s in SEVERITIES)]
    answers: dict[str, list[_Answers]] = {e.key: [] for e in cases}
    for number, condition in enumerate(conditions):
        pixels = sample.pixels
        if condition is not None:
            corruption, severity = condition
            pixels = corrupt(pixels, corruption, severity, seed=SEED, positions=sample.index)
        runs: dict[tuple[str, int, float], Predictions] = {}
        for place, case in enumerate(e for e in cases if e.key in answers):
            progress((number + place / len(cases)) / len(conditions))
            try:
                answers[case.key].append(_answer(case, pixels, sample, runs))
            except (UserError, MemoryError) as error:
                del answers[case.key]
                notes.append(f"{case.name} was not measured under corruptions: {error or type(error).__name__}")
    progress(1.0)
    return [(e, answers[e.key]) for e in cases if e.key in answers]


def _answer(
    case: Case, pixels: NDArray[np.uint8], sample: Sample, runs: dict[tuple[str, int, float], Predictions]
) -> _Answers:
    """Returns a case's answers to `pixels`; `runs` has those that another setting of the same artifact has already given."""
    session, own = case.session, case.metadata

    def run(threshold: float) -> Predictions:
        key = session.name, own.steps, min(threshold, 1.0)
        if key not in runs:
            runs[key] = predict(session, pixels, halt_threshold=threshold if session.takes_depth else None)
        return runs[key]

    predictions = run(own.halt_threshold)
    full = run(1.0) if _can_be_told_not_to_halt(case) else None
    return _Answers(
        right=np.asarray(predictions.top1 == sample.labels),
        full_right=None if full is None else np.asarray(full.top1 == sample.labels),
        predictions=predictions,
    )


def _can_be_told_not_to_halt(case: Case) -> bool:
    own = case.metadata
    return case.session.takes_depth and own.recursive and own.halt_threshold < 1 and own.steps > 1


def _part(sample: Sample, count: int) -> Sample:
    """Returns at most `count` images, drawn in the sample's fixed order."""
    assert sample.labels is not None
    chosen = np.sort(sample.order()[:count])
    return replace(sample, pixels=sample.pixels[chosen], labels=sample.labels[chosen], index=sample.index[chosen])


# Summing up ------------------------------------------------------------------------------------


def _robustness(
    case: Case,
    sample: Sample,
    corruptions: Sequence[Corruption],
    answers: list[_Answers],
    choices: Mapping[Path, HaltingChoice],
) -> Robustness:
    own = case.metadata
    budget, origin = _budget(case, choices) if _can_be_told_not_to_halt(case) else (None, None)
    clean, rest = answers[0], answers[1:]
    count = len(SEVERITIES)
    found = tuple(
        _under(corruption, rest[i * count : (i + 1) * count], budget) for i, corruption in enumerate(corruptions)
    )
    return Robustness(
        name=case.name,
        data=sample.name,
        images=len(sample),
        total=sample.total,
        seed=SEED,
        steps=own.steps if own.recursive else None,
        halt_threshold=own.halt_threshold if own.recursive else None,
        budget=budget,
        budget_from=origin,
        clean=clean.figures(),
        corruptions=found,
        mean=mean_of([c.mean for c in found]),
    )


def _under(corruption: Corruption, answers: Sequence[_Answers], budget: float | None) -> UnderCorruption:
    figures = tuple(a.figures() for a in answers)
    found = UnderCorruption(name=corruption.name, group=corruption.group, severities=figures, mean=mean_of(figures))
    if budget is None:
        return found
    # An image's losses at five severities are not five independent ones: their mean is what varies with the images.
    lost = np.mean([a.full_right.astype(np.float64) - a.right for a in answers if a.full_right is not None], 0)
    error = float(lost.std() / np.sqrt(len(lost)))
    return replace(found, lost_error=error, budget=_judge(float(lost.mean()), error, budget))


def _judge(lost: float, error: float, budget: float) -> str:
    if lost <= budget + 1e-12:
        return KEPT
    return BROKEN if lost - CONFIDENCE * error > budget else UNCLEAR


def _budget(case: Case, choices: Mapping[Path, HaltingChoice]) -> tuple[float, str]:
    """Returns the accuracy that halting may give up, and who says so."""
    path = case.session.path
    if path is not None and path in choices:
        return choices[path].budget, "chosen"
    stored = case.metadata.halting.get("max_drop")
    if isinstance(stored, (int, float)) and not isinstance(stored, bool) and 0 <= stored < 1:
        return float(stored), "stored"
    return DEFAULT_BUDGET, "default"
