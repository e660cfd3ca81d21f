"""Collects what was measured of every case into rows and evidence: the figures, and what the report shows beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitrm.classification.confusion import Classification, classify
from vitrm.classification.text import never_recognized
from vitrm.runtime.bench.accuracy import Predictions, accuracy, compare, in_top5
from vitrm.runtime.bench.cases import Case, OpenBench
from vitrm.runtime.bench.images import Sample
from vitrm.runtime.bench.latency import ROUNDS, speedup, summarize
from vitrm.runtime.bench.options import BenchOptions
from vitrm.runtime.bench.robustness.measure import Robustness
from vitrm.runtime.bench.rows import BenchResult, BenchRow, CaseEvidence, ClassResults, DepthCurve, Evidence, Flips
from vitrm.runtime.halting.choose import reliability
from vitrm.runtime.system import machine
from vitrm.runtime.system.power import Clocks

_PACKAGES = ("vitrm", "numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "cuda-bindings")
_PEER_PACKAGES = ("openvino", "nncf", "optimum-onnx")


def collect(
    opened: OpenBench,
    options: BenchOptions,
    notes: Sequence[str],
    *,
    started: str,
    threads: int,
    busy_cpus: float | None,
    disturbed: bool,
    power: dict[str, Any],
    curves: Sequence[tuple[DepthCurve, DepthCurve | None]],
    corruptions: tuple[Robustness, ...],
    root: Path,
) -> BenchResult:
    """Makes the result of a bench whose cases have been measured.

    Args:
        opened: the cases, with what was measured of them.
        options: what was asked for.
        notes: what a reader should know of the whole; repeated ones are left out.
        started: ISO 8601, UTC.
        threads: CPU threads of every case.
        busy_cpus: CPUs that other processes kept busy meanwhile; None where nobody counts.
        disturbed: whether those were too many for good figures.
        power: what `Meters.describe` says; empty where energy was not asked for.
        curves: accuracy after every step, and what halting gives at every threshold, where asked for.
        corruptions: what corrupted images do, where asked for.
        root: folder that holds the machine's sys and proc.
    """
    cases, samples = opened.cases, opened.samples
    packages = [
        *_PACKAGES,
        *(["torch"] if opened.compared else []),
        *(_PEER_PACKAGES if options.peers else []),
    ]
    by_class = _by_class(cases, samples)
    return BenchResult(
        rows=rows_of(opened, options.batches),
        notes=tuple(dict.fromkeys([*notes, *_never_recognized(by_class)])),
        data=tuple(_describe(s) for s in {id(s): s for s in samples.values()}.values()),
        machine={**describe_machine(busy_cpus, root), "disturbed": disturbed},
        versions=machine.versions(packages),
        threads=threads,
        device=options.device,
        seconds=options.seconds,
        rounds=ROUNDS,
        warm_up=min((t.warm_up for c in cases for t in c.timings.values()), default=0),
        power=power,
        started=started,
        halting=tuple(opened.choices.values()),
        by_class=by_class,
        corruptions=corruptions,
        evidence=Evidence(
            cases=tuple(
                _evidence(c, _reference(c, cases), samples[c.group]) for c in cases if c.predictions is not None
            ),
            depth_curves=tuple(deep for deep, _ in curves),
            halting_curves=tuple(shallow for _, shallow in curves if shallow),
        ),
    )


def _by_class(cases: Sequence[Case], samples: Mapping[str, Sample]) -> tuple[ClassResults, ...]:
    found = []
    for case in cases:
        sample, answers = samples[case.group], case.predictions
        if case.kind == "artifact" and answers is not None and sample.labels is not None:
            result = _classification(answers, sample, sample.labels)
            found.append(ClassResults(name=case.name, data=sample.name, result=result))
    return tuple(found)


def _classification(answers: Predictions, sample: Sample, labels: NDArray[np.int64]) -> Classification:
    return classify(labels, answers.top1, sample.classes, in_top5(answers, labels))


def _never_recognized(found: Sequence[ClassResults]) -> list[str]:
    """Says which rare classes artifacts never recognize, each sentence once with the artifacts it is true of."""
    names: dict[str, list[str]] = {}
    for one in found:
        for line in never_recognized(one.result, way_out="train on more images of it, or with --balance sampling"):
            names.setdefault(line, []).append(one.name)
    return [f"{', '.join(those)}: {line}" for line, those in names.items()]


def _describe(sample: Sample) -> dict[str, Any]:
    return {
        "name": sample.name,
        "split": sample.split,
        "images": len(sample),
        "total": sample.total,
        "labelled": sample.labels is not None,
    }


def describe_machine(busy_cpus: float | None, root: Path) -> dict[str, Any]:
    """Describes the processor and what it did meanwhile, for a result."""
    return {
        "cpu": machine.cpu_name(),
        "cpu_features": list(machine.cpu_features()),
        "physical_cores": machine.physical_cores(),
        "system": machine.system(),
        "other_cpus_busy": busy_cpus,
        "clocks_mhz": Clocks([], root).read(),
    }


def _reference(case: Case, cases: Sequence[Case]) -> Case | None:
    """Returns the eager model that a case is compared with."""
    return next((c for c in cases if c.kind == "eager" and c.group == case.group and c is not case), None)


def _evidence(case: Case, reference: Case | None, sample: Sample) -> CaseEvidence:
    assert case.predictions is not None
    answers = reference.predictions if reference else None
    return CaseEvidence(
        file=case.session.name,
        name=case.name,
        kind=case.kind,
        metadata=case.metadata,
        sample=sample,
        predictions=case.predictions,
        comparison=compare(answers, case.predictions, sample.labels) if answers else None,
        reference=answers,
        times_ms={batch: timing.samples for batch, timing in case.timings.items()},
    )


# Rows ------------------------------------------------------------------------------------------


def rows_of(opened: OpenBench, batches: Sequence[int]) -> tuple[BenchRow, ...]:
    """Makes a row for every case at every batch size, those that did not open last."""
    return tuple(
        row
        for batch in batches
        for row in (
            *(_row(c, opened.cases, opened.samples[c.group], batch) for c in opened.cases),
            *(BenchRow(name=u.name, kind=u.kind, status=u.reason, batch=batch) for u in opened.unopened),
        )
    )


def _row(case: Case, cases: Sequence[Case], sample: Sample, batch: int) -> BenchRow:
    session, own, reference = case.session, case.metadata, _reference(case, cases)
    answers = _answer_figures(case, reference, sample)
    return BenchRow(
        name=case.name,
        kind=case.kind,
        status=case.refusals.get(batch, case.failure),
        backend=session.backend,
        graph=own.graph if case.kind in ("artifact", "peer") else "eager",
        precision=own.precision,
        steps=own.steps if own.recursive else None,
        halt_threshold=own.halt_threshold if own.recursive else None,
        batch=batch,
        bytes=session.size_bytes,
        device=session.device,
        threads=session.threads,
        compiled_graphs=session.compiled_graphs(batch),
        run=own.run,
        weights_sha256=own.weights_sha256,
        notes=_notes(case, batch),
        **answers,
        **_speed_figures(case, reference, batch),
        **_halting_figures(case, cases, sample, batch),
        **_energy_figures(case, batch, answers.get("accuracy")),
    )


def _notes(case: Case, batch: int) -> tuple[str, ...]:
    notes = [*case.session.notes_at(batch), *([case.unmetered] if case.unmetered else [])]
    if case.predictions is not None and (broken := int((~np.isfinite(case.predictions.logits)).any(1).sum())):
        notes.append(f"NaN or infinite logits on {broken} of {len(case.predictions.logits)} images")
    return tuple(notes)


def _answer_figures(case: Case, reference: Case | None, sample: Sample) -> dict[str, Any]:
    """Returns the fields of a row that follow from the answers."""
    predictions = case.predictions
    if predictions is None:
        return {}
    values: dict[str, Any] = {"images": len(sample)}
    if sample.labels is not None:
        found = accuracy(predictions, sample.labels)
        by_class = _classification(predictions, sample, sample.labels)
        values |= {
            "accuracy": found.value,
            "accuracy_interval": (found.low, found.high),
            "top5_accuracy": by_class.top5_accuracy,
            "balanced_accuracy": by_class.balanced_accuracy,
        }
        if predictions.halt_prob is not None and np.isfinite(predictions.halt_prob).all():
            values["halt_ece"] = reliability(predictions.halt_prob, predictions.top1 == sample.labels).ece
    if predictions.steps_used is not None:
        values["mean_steps_used"] = float(predictions.steps_used.mean())
    if reference is None or reference.predictions is None:
        return values
    compared = compare(reference.predictions, predictions, sample.labels)
    finite = math.isfinite(compared.max_logit_difference)
    values |= {
        "agreement": compared.agreement,
        "max_logit_difference": compared.max_logit_difference if finite else None,
        "halt_agreement": compared.halt_agreement,
        "steps_used_agreement": compared.steps_used_agreement,
    }
    if compared.gained is not None and compared.lost is not None:
        values["flips"] = Flips(gained=compared.gained, lost=compared.lost)
    return values


def _speed_figures(case: Case, reference: Case | None, batch: int) -> dict[str, Any]:
    """Returns the fields of a row that follow from its times."""
    timing = case.timings.get(batch)
    if timing is None:
        return {}
    latency, device_times = timing.latency, case.device_times[batch]
    values: dict[str, Any] = {
        "latency_ms": latency,
        "images_per_s": batch / latency.mean * 1000,
        "device_ms": None if device_times is None else summarize(device_times),
        "device_bytes": case.device_bytes[batch],
    }
    if reference and batch in reference.timings:
        ratio = speedup(reference.timings[batch], timing)
        values |= {"speedup": ratio.median, "speedup_range": (ratio.low, ratio.high)}
    return values


def _halting_figures(case: Case, cases: Sequence[Case], sample: Sample, batch: int) -> dict[str, Any]:
    """Returns the fields of a row that say what halting saves; none where no image may halt."""
    own, answers = case.metadata, case.predictions
    if not own.recursive or own.halt_threshold >= 1 or own.steps == 1 or answers is None:
        return {}
    values: dict[str, Any] = {}
    if answers.steps_used is not None:
        values["halted_first"] = float((answers.steps_used == 1).mean())
    timing, full = case.timings.get(batch), _without_halting(case, cases)
    if full and full.predictions and sample.labels is not None:
        values["accuracy_without_halting"] = accuracy(full.predictions, sample.labels).value
    if timing and full and batch in full.timings:
        ratio = speedup(full.timings[batch], timing, of_means=True)
        values |= {"halting_speedup": ratio.median, "halting_speedup_range": (ratio.low, ratio.high)}
    return values


def _without_halting(case: Case, cases: Sequence[Case]) -> Case | None:
    """Returns the same artifact at the same depth, where no image halts, if that was measured too."""
    path, depth = case.session.path, case.metadata.steps
    return next(
        (
            c
            for c in cases
            if c.kind == case.kind == "artifact"
            and (c.session.path, c.metadata.steps) == (path, depth)
            and c.metadata.halt_threshold >= 1
        ),
        None,
    )


def _energy_figures(case: Case, batch: int, right: float | None) -> dict[str, Any]:
    """Returns the fields of a row that follow from its energy; `right` is its accuracy, in [0, 1]."""
    energy = case.energies.get(batch)
    if energy is None:
        return {}
    return {
        "watts": energy.watts,
        "joules_per_image": energy.joules_per_image,
        "joules_per_correct_image": energy.joules_per_image / right if right else None,
        "power_scope": energy.scope,
        "clocks_mhz": energy.clocks_mhz,
    }
