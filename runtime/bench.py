"""Measures artefacts beside the eager models they were exported from.

Everything that shares weights and depth forms a group, and is compared with that group's eager model:
answers image by image, latency round by round.  What cannot run becomes a row that says why; the rest goes on.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitrm.errors import UserError
from vitrm.runtime import machine
from vitrm.runtime.accuracy import Predictions, accuracy, compare, predict
from vitrm.runtime.latency import ROUNDS, Timing, interleave, speedup
from vitrm.runtime.metadata import Metadata
from vitrm.runtime.reference import find_reference
from vitrm.runtime.results import OK, BenchResult, DepthCurve, Evidence, Flips, Row, Subject
from vitrm.runtime.samples import Sample, load_sample
from vitrm.runtime.session import Session, open_session

if TYPE_CHECKING:
    from vitrm.checkpoint import Checkpoint

Progress = Callable[[str, float], None]  # what is being done, and which fraction of it is done
EVALUATION_BATCH = 100
_INPUT_BATCHES = 8  # different inputs that a latency measurement cycles through
_DEPTHS = 16  # of the curve that a report shows, or two beyond the deepest artefact
_PACKAGES = ("vitrm", "numpy", "onnxruntime", "onnxruntime-gpu")


@dataclass
class _Entry:
    """A thing on its way through the bench."""

    key: str
    name: str
    kind: str  # artefact, eager or compiled
    session: Session
    group: str
    failure: str = OK
    predictions: Predictions | None = None
    refusals: dict[int, str] = field(default_factory=dict)  # by batch
    timings: dict[int, Timing] = field(default_factory=dict)  # by batch

    @property
    def metadata(self) -> Metadata:
        return self.session.metadata


@dataclass(frozen=True)
class _Unopened:
    """A thing that could not even be opened."""

    name: str
    kind: str
    reason: str


def bench(
    artefacts: Sequence[str | os.PathLike[str]],
    *,
    run: str | None = None,
    data: str | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    batches: Sequence[int] = (1, 32),
    threads: int | None = None,
    seconds: float = 2.0,
    limit: int | None = None,
    eager: bool = True,
    compile: bool = False,
    depths: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,
) -> BenchResult:
    """Accuracy, agreement with eager and latency of `artefacts`, each at every batch size.

    `run`, `data` and `data_dir` replace what the artefacts say of themselves; `seconds` is measured per artefact and
    batch size; `limit` bounds the images of the accuracy; `eager=False` leaves torch out; `compile` adds torch.compile;
    `depths` adds the accuracy by depth; `threads` None means every physical core.
    Raises `UserError` when nothing can be measured, or `run` or `data` do not fit the artefacts; one artefact of
    several that fails becomes a row with the reason as its status.
    """
    if not artefacts:
        raise UserError("no artefact to measure: name an .onnx file that vitrm-export wrote")
    if not batches or any(isinstance(b, bool) or not isinstance(b, int) or b < 1 for b in batches):
        raise UserError(f"batch sizes are {list(batches)}, expected whole numbers of at least 1")
    if not (math.isfinite(seconds) and seconds > 0):
        raise UserError(f"seconds is {seconds}, expected a positive number")
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}, expected at least 1 image")
    report = progress or (lambda stage, fraction: None)
    threads = threads or machine.physical_cores()
    load = machine.load_average()
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    batches = list(dict.fromkeys(batches))

    artefact_entries, unopened = _open_all(artefacts, device, threads)
    if not artefact_entries:
        raise UserError("; ".join(u.reason for u in unopened))
    notes: list[str] = []
    samples = _load_samples(artefact_entries, data, data_dir, limit, notes)
    checkpoints = _find_references(artefact_entries, run, notes) if eager else {}
    entries = _with_eager(artefact_entries, unopened, checkpoints, device, threads, compile)

    for entry in entries:
        _predict(entry, samples, report)
    for batch in batches:
        _measure(entries, samples, batch, seconds, report)

    evidence = Evidence(
        subjects=tuple(
            _subject(e, e.predictions, entries, samples[e.group]) for e in entries if e.predictions is not None
        ),
        depth_curves=tuple(_depth_curves(entries, samples, report)) if depths else (),
    )
    busy = machine.physical_cores() * 0.5
    if load is not None and load > busy:
        notes.append(
            f"the machine was busy before the bench began (load {load:.1f} on {machine.physical_cores()} cores): "
            "times are longer than on a quiet one; ratios come from the same rounds and hold better"
        )
    return BenchResult(
        rows=tuple(
            row
            for batch in batches
            for row in (
                *(_row(e, entries, samples[e.group], batch) for e in entries),
                *(Row(name=u.name, kind=u.kind, status=u.reason, batch=batch) for u in unopened),
            )
        ),
        notes=tuple(dict.fromkeys(notes)),
        data=tuple(_describe(s) for s in {id(s): s for s in samples.values()}.values()),
        machine={
            "cpu": machine.cpu_name(),
            "physical_cores": machine.physical_cores(),
            "system": machine.system(),
            "load_average": load,
        },
        versions=machine.versions([*_PACKAGES, *(["torch"] if checkpoints else [])]),
        threads=threads,
        device=device,
        seconds=seconds,
        rounds=ROUNDS,
        warm_up=min((t.warm_up for e in entries for t in e.timings.values()), default=0),
        started=started,
        evidence=evidence,
    )


# Preparing -------------------------------------------------------------------------------------


def _open_all(
    artefacts: Sequence[str | os.PathLike[str]], device: str, threads: int
) -> tuple[list[_Entry], list[_Unopened]]:
    paths = list(dict.fromkeys(str(a) for a in artefacts))
    short = [Path(p).name for p in paths]
    entries, unopened = [], []
    for path, file in zip(paths, short, strict=True):
        name = file if short.count(file) == 1 else path
        try:
            session = open_session(path, device=device, threads=threads)
        except UserError as error:
            unopened.append(_Unopened(name, "artefact", str(error)))
        else:
            entries.append(_Entry(path, name, "artefact", session, _group(session.metadata)))
    return entries, unopened


def _group(metadata: Metadata) -> str:
    """The same for artefacts that compute the same function: weights, settings and depth."""
    threshold = min(metadata.halt_threshold, 1.0)
    return json.dumps([metadata.weights_sha256, metadata.model, metadata.steps, threshold], sort_keys=True)


def _load_samples(
    entries: list[_Entry], data: str | None, data_dir: Any, limit: int | None, notes: list[str]
) -> dict[str, Sample]:
    """The images of each group.  Groups with the same data set and image size share them."""
    loaded: dict[tuple[Any, ...], Sample] = {}
    samples = {}
    for entry in entries:
        m = entry.metadata
        key = (data or m.data.get("name"), m.image_size, tuple(m.classes))
        if key not in loaded:
            loaded[key] = load_sample(m, entry.key, data=data, data_dir=data_dir, limit=limit)
            if note := loaded[key].note:
                notes.append(note)
        samples[entry.group] = loaded[key]
    return samples


def _find_references(entries: list[_Entry], run: str | None, notes: list[str]) -> dict[str, Checkpoint]:
    """The checkpoint of each group; with `run`, the one that every group must have."""
    checkpoints: dict[str, Checkpoint] = {}
    for entry in entries:
        if entry.group in checkpoints:
            continue
        try:
            checkpoints[entry.group] = find_reference(entry.metadata, entry.session.path, run)
        except UserError as error:
            if run is not None:
                raise
            notes.append(f"{error} (no eager row, no agreement)")
    return checkpoints


def _with_eager(
    artefacts: list[_Entry],
    unopened: list[_Unopened],
    checkpoints: dict[str, Checkpoint],
    device: str,
    threads: int,
    compile: bool,
) -> list[_Entry]:
    """The entries by group, each group's eager model first; one that does not start joins `unopened`."""
    entries = []
    for group in dict.fromkeys(e.group for e in artefacts):
        members = [e for e in artefacts if e.group == group]
        for compiled in (False, True) if compile else (False,):
            if group not in checkpoints:
                continue
            from vitrm.runtime.eager_session import EagerSession

            checkpoint, like = checkpoints[group], members[0].session
            name = "torch.compile" if compiled else "eager PyTorch"
            if len(checkpoints) > 1:
                name += f" · {Path(checkpoint.source).name}"
            kind = "compiled" if compiled else "eager"
            try:
                session = EagerSession(
                    checkpoint,
                    steps=like.metadata.steps,
                    halt_threshold=like.metadata.halt_threshold,
                    # For "auto", where the artefacts ended up: torch alone might go elsewhere.
                    device=like.device_kind if device == "auto" else device,
                    threads=threads,
                    compile=compiled,
                )
            except UserError as error:
                unopened.append(_Unopened(name, kind, str(error)))
            else:
                entries.append(_Entry(f"{kind} {group}", name, kind, session, group))
        entries += members
    return entries


# Measuring -------------------------------------------------------------------------------------


def _predict(entry: _Entry, samples: dict[str, Sample], report: Progress) -> None:
    stage = f"accuracy of {entry.name}"
    try:
        entry.predictions = predict(
            entry.session,
            samples[entry.group].pixels,
            batch=EVALUATION_BATCH,
            progress=lambda fraction: report(stage, fraction),
        )
    except Exception as error:
        entry.failure = _reason(entry, error)


def _measure(entries: list[_Entry], samples: dict[str, Sample], batch: int, seconds: float, report: Progress) -> None:
    """Latency at one batch size, everything interleaved."""
    runners = {}
    for entry in entries:
        if entry.failure != OK:
            continue
        sample = samples[entry.group]
        report(f"preparing {entry.name}, batch {batch}", 0.0)
        try:
            count = min(_INPUT_BATCHES, max(1, len(sample) // batch))
            prepared = [entry.session.prepare(sample.batch(batch, i)) for i in range(count)]
            prepared[0]()  # compiles, allocates, or fails here rather than among the others
        except Exception as error:
            entry.refusals[batch] = _reason(entry, error)
            continue
        runners[entry.key] = prepared
    timings = interleave(
        runners, seconds=seconds, progress=lambda fraction: report(f"latency, batch {batch}", fraction)
    )
    for entry in entries:
        if entry.key in timings:
            entry.timings[batch] = timings[entry.key]


def _reason(entry: _Entry, error: Exception) -> str:
    """Why a row could not run.  torch.compile and GPUs fail in many ways; a failing artefact's other errors are bugs."""
    if isinstance(error, (UserError, MemoryError)) or entry.kind != "artefact":
        lines = str(error).strip().splitlines() or [""]
        return lines[0] if isinstance(error, UserError) else f"{type(error).__name__}: {lines[0][:200]}"
    raise error


def _depth_curves(entries: list[_Entry], samples: dict[str, Sample], report: Progress) -> list[DepthCurve]:
    """One curve for each recursive checkpoint with labelled images, whatever depths its artefacts have."""
    curves: dict[str, DepthCurve] = {}
    for entry in entries:
        own, sample = entry.metadata, samples[entry.group]
        weights = own.weights_sha256
        if entry.kind != "eager" or not own.recursive or sample.labels is None or weights in curves:
            continue
        from vitrm.runtime.depths import depth_curve
        from vitrm.runtime.eager_session import EagerSession

        assert isinstance(entry.session, EagerSession)
        relatives = [e for e in entries if e.kind == "artefact" and e.metadata.weights_sha256 == weights]
        curves[weights] = depth_curve(
            entry.session,
            sample,
            max([_DEPTHS, *(e.metadata.steps + 2 for e in relatives)]),
            artefacts={e.name: e.predictions for e in relatives if e.predictions},
            progress=lambda fraction: report("accuracy by depth", fraction),
        )
    return list(curves.values())


# Reporting -------------------------------------------------------------------------------------


def _reference_of(entry: _Entry, entries: list[_Entry]) -> _Entry | None:
    return next((e for e in entries if e.kind == "eager" and e.group == entry.group and e is not entry), None)


def _subject(entry: _Entry, predictions: Predictions, entries: list[_Entry], sample: Sample) -> Subject:
    reference = _reference_of(entry, entries)
    answers = reference.predictions if reference else None
    return Subject(
        key=entry.key,
        name=entry.name,
        kind=entry.kind,
        metadata=entry.metadata,
        sample=sample,
        predictions=predictions,
        comparison=compare(answers, predictions, sample.labels) if answers else None,
        reference=answers,
        times_ms={batch: timing.samples for batch, timing in entry.timings.items()},
    )


def _row(entry: _Entry, entries: list[_Entry], sample: Sample, batch: int) -> Row:
    session, own = entry.session, entry.metadata
    values: dict[str, Any] = {}
    reference = _reference_of(entry, entries)
    if entry.predictions is not None:
        predictions = entry.predictions
        values["images"] = len(sample)
        if sample.labels is not None:
            found = accuracy(predictions, sample.labels)
            values |= {"accuracy": found.value, "accuracy_interval": (found.low, found.high)}
        if predictions.steps_used is not None:
            values["mean_steps_used"] = float(predictions.steps_used.mean())
        if reference and reference.predictions is not None:
            compared = compare(reference.predictions, predictions, sample.labels)
            finite = math.isfinite(compared.max_logit_difference)
            values |= {
                "agreement": compared.agreement,
                "max_logit_difference": compared.max_logit_difference if finite else None,
                "halt_agreement": compared.halt_agreement,
            }
            if compared.gained is not None and compared.lost is not None:
                values["flips"] = Flips(gained=compared.gained, lost=compared.lost)
    notes = list(session.notes)
    if entry.predictions is not None and (broken := int((~np.isfinite(entry.predictions.logits)).any(1).sum())):
        notes.append(f"NaN or infinite logits on {broken} of {len(entry.predictions.logits)} images")
    if timing := entry.timings.get(batch):
        latency = timing.latency
        values |= {"latency_ms": latency, "images_per_s": batch / latency.mean * 1000}
        if reference and batch in reference.timings:
            ratio = speedup(reference.timings[batch], timing)
            values |= {"speedup": ratio.median, "speedup_range": (ratio.low, ratio.high)}
    return Row(
        name=entry.name,
        kind=entry.kind,
        status=entry.refusals.get(batch, entry.failure),
        backend=session.backend,
        graph=own.graph if entry.kind == "artefact" else "eager",
        precision=own.precision,
        steps=own.steps if own.recursive else None,
        halt_threshold=own.halt_threshold if own.recursive else None,
        batch=batch,
        bytes=session.size_bytes,
        device=session.device,
        threads=session.threads,
        run=own.run,
        weights_sha256=own.weights_sha256,
        notes=tuple(notes),
        **values,
    )


def _describe(sample: Sample) -> dict[str, Any]:
    return {
        "name": sample.name,
        "split": sample.split,
        "images": len(sample),
        "total": sample.total,
        "labelled": sample.labels is not None,
    }
