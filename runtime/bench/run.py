"""Measures artifacts beside the eager models they were exported from.

Everything that shares weights and depth forms a group, and is compared with that group's eager model:
answers image by image, latency round by round.  What cannot run becomes a row that says why; the rest goes on.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from vitrm.data import affordable
from vitrm.errors import UserError
from vitrm.model_size import MAX_STEPS
from vitrm.runtime.bench.accuracy import Predictions, accuracy, compare, predict
from vitrm.runtime.bench.cases import (
    Entry,
    Opened,
    Unopened,
    at_settings,
    find_references,
    load_samples,
    open_all,
    open_peers,
    with_eager,
)
from vitrm.runtime.bench.energy import Meters, measure
from vitrm.runtime.bench.images import Sample, load_sample
from vitrm.runtime.bench.latency import ROUNDS, interleave, speedup, summarize
from vitrm.runtime.bench.robustness.measure import measure_corruptions
from vitrm.runtime.bench.rows import OK, BenchResult, DepthCurve, Evidence, Flips, Row, Subject
from vitrm.runtime.halting.choose import HaltingChoice, choose, reliability, run_every_step
from vitrm.runtime.halting.store import check_storable, store_threshold
from vitrm.runtime.system import machine
from vitrm.runtime.system.power import ROOT, Clocks, SensorError

Progress = Callable[[str, float], None]  # what is being done, and which fraction of it is done
EVALUATION_BATCH = 100
_INPUT_BATCHES = 8  # different inputs that a latency measurement cycles through
_INPUT_MEBIBYTES = 1024  # of them, for each row
_DEPTHS = 16  # of the curve that a report shows, or two beyond the deepest artifact
_DEVICE_RUNS = 100  # timed on the GPU's own clock
_PACKAGES = ("vitrm", "numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "cuda-bindings")
_PEER_PACKAGES = ("openvino", "nncf", "optimum-onnx")


def bench(
    artifacts: Sequence[str | os.PathLike[str]],
    *,
    run: str | None = None,
    data: str | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    batches: Sequence[int] = (1, 32),
    steps: Sequence[int] = (),
    halt_thresholds: Sequence[float] = (),
    max_drop: float | None = None,
    threads: int | None = None,
    seconds: float = 2.0,
    limit: int | None = None,
    eager: bool = True,
    compile: bool | str = False,
    bf16: bool = False,
    peers: bool = False,
    depths: bool = False,
    corruption_images: int | None = None,
    device: str = "cpu",
    provider: str | None = None,
    power: bool = True,
    verify: bool = True,
    root: Path = ROOT,
    progress: Progress | None = None,
) -> BenchResult:
    """Accuracy, agreement with eager and latency of `artifacts`, each at every batch size.

    `steps` and `halt_thresholds` measure every loop and stepwise artifact at each combination of them (default: its own).
    `max_drop` chooses each such artifact's threshold on the validation images, the cheapest that gives up at most this
    share of accuracy (in [0, 1]), measures it with and without halting, and at last writes threshold and depth into it.
    `run`, `data` and `data_dir` replace what the artifacts say of themselves; `seconds` is measured per artifact and
    batch size; `limit` bounds the images of the accuracy; `eager=False` leaves torch out; `compile` adds torch.compile, in
    the mode it names; `bf16` adds PyTorch in bfloat16; `peers` adds what other tools make of the artifacts
    (vitrm.runtime.bench.peers); `depths` adds the accuracy by depth; `corruption_images` adds what
    at most so many images do when they are corrupted (vitrm.runtime.bench.robustness.measure); `threads` None means every physical core;
    `device`, `provider` and `verify` are those of `vitrm.runtime.open`; `power` measures energy where there are sensors, which takes
    as long as latency once more; `root` is where the machine's /sys and /proc are.
    Raises `UserError` when nothing can be measured, or `run` or `data` do not fit the artifacts; one artifact of
    several that fails becomes a row with the reason as its status.
    """
    if not artifacts:
        raise UserError("no artifact to measure: name an .onnx file that vitrm-export wrote")
    if not batches or any(isinstance(b, bool) or not isinstance(b, int) or b < 1 for b in batches):
        raise UserError(f"batch sizes are {list(batches)}, expected whole numbers of at least 1")
    if not (math.isfinite(seconds) and seconds > 0):
        raise UserError(f"seconds is {seconds}, expected a positive number")
    if max_drop is not None and (halt_thresholds or len(steps) > 1):
        raise UserError(
            "a threshold is chosen for one depth, and measured with and without: name no thresholds and at most one depth"
        )
    if max_drop is not None and not verify:
        raise UserError(
            "a threshold is written into files that were verified alone: leave out verify=False (--no-verify)"
        )
    if max_drop is not None and not 0 <= max_drop < 1:
        raise UserError(f"max_drop is {max_drop}, expected a share of accuracy in [0, 1)")
    for depth in steps:
        if isinstance(depth, bool) or not isinstance(depth, int) or not 1 <= depth <= MAX_STEPS:
            raise UserError(f"steps are {list(steps)}, expected whole numbers from 1 to {MAX_STEPS}")
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}, expected at least 1 image")
    if corruption_images is not None and corruption_images < 1:
        raise UserError(f"corruption_images is {corruption_images}, expected at least 1 image")
    report = progress or (lambda stage, fraction: None)
    threads = threads or machine.physical_cores()
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    batches = list(dict.fromkeys(batches))

    notes: list[str] = []
    opened, unopened = open_all(artifacts, device, threads, provider, verify)
    if not opened:
        raise UserError("; ".join(u.reason for u in unopened))
    choices: dict[Path, HaltingChoice] = {}
    artifact_entries: list[Entry] = []
    for one in opened:
        thresholds = halt_thresholds
        if max_drop is not None and one.session.takes_depth and one.session.path is not None:
            depth = steps[0] if steps else one.session.metadata.steps
            try:
                check_storable(one.session.path)
                choice = _choose_threshold(one, depth, max_drop, data, data_dir, limit, report)
            except UserError as error:
                unopened.append(Unopened(one.name, "artifact", str(error)))
                continue
            choices[one.session.path] = choice
            thresholds = list(dict.fromkeys((1.0, choice.chosen.threshold)))
        artifact_entries += at_settings(one, steps, thresholds, notes)
    if not artifact_entries:
        raise UserError("; ".join(u.reason for u in unopened))
    if max_drop is not None and not choices:
        raise UserError(
            "no loop or stepwise artifact to choose a threshold for: make one with vitrm-export --graph stepwise"
        )
    if peers:
        # The files are read whole when they are opened.
        with tempfile.TemporaryDirectory() as folder:
            found, failed = open_peers(opened, Path(folder), data, data_dir, report)
        artifact_entries += found
        unopened += failed
    samples = load_samples(artifact_entries, data, data_dir, limit, notes)
    checkpoints = find_references(artifact_entries, run, notes) if eager else {}
    entries = with_eager(artifact_entries, unopened, checkpoints, device, threads, compile, bf16)

    for entry in entries:
        _predict(entry, samples, report)
    meters = Meters(root) if power else None
    before = machine.CpuClock.read()
    for batch in batches:
        _measure(entries, samples, batch, seconds, meters, report)
    after = machine.CpuClock.read()
    others = after.others_since(before) if before and after else None

    evidence = Evidence(
        subjects=tuple(
            _subject(e, e.predictions, entries, samples[e.group]) for e in entries if e.predictions is not None
        ),
        depth_curves=tuple(_depth_curves(entries, samples, report)) if depths else (),
    )
    corruptions = (
        measure_corruptions(entries, samples, choices, corruption_images, notes, report) if corruption_images else ()
    )
    if after and others is not None and others > max(0.25, (after.cpus - threads) / 2):
        notes.append(
            f"the machine was not quiet: other processes kept {others:.1f} of {after.cpus} CPUs busy while latency was "
            "measured, so times are too long and ratios uncertain (two threads that wait for each other suffer most)"
        )
    for path, choice in choices.items():
        store_threshold(path, choice.chosen.threshold, choice.steps, choice.evidence())
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
            "cpu_features": list(machine.cpu_features()),
            "physical_cores": machine.physical_cores(),
            "system": machine.system(),
            "other_cpus_busy": others,
            "clocks_mhz": Clocks([], root).read(),
        },
        versions=machine.versions(
            [*_PACKAGES, *(["torch"] if checkpoints else []), *(_PEER_PACKAGES if peers else [])]
        ),
        threads=threads,
        device=device,
        seconds=seconds,
        rounds=ROUNDS,
        warm_up=min((t.warm_up for e in entries for t in e.timings.values()), default=0),
        power=meters.describe() if meters else {},
        started=started,
        halting=tuple(choices.values()),
        corruptions=corruptions,
        evidence=evidence,
    )


def _choose_threshold(
    opened: Opened, steps: int, max_drop: float, data: str | None, data_dir: Any, limit: int | None, report: Progress
) -> HaltingChoice:
    """Chooses a threshold on the validation images."""
    session, stage = opened.session, f"halting of {opened.name}"
    sample = load_sample(session.metadata, session.name, data=data, data_dir=data_dir, limit=limit, split="validation")
    trajectory = run_every_step(session, sample, steps, progress=lambda fraction: report(stage, fraction))
    return choose(opened.name, sample, trajectory, max_drop)


# Measuring -------------------------------------------------------------------------------------


def _predict(entry: Entry, samples: dict[str, Sample], report: Progress) -> None:
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


def _measure(
    entries: list[Entry],
    samples: dict[str, Sample],
    batch: int,
    seconds: float,
    meters: Meters | None,
    report: Progress,
) -> None:
    """Latency at one batch size, everything interleaved; after it energy, one thing after the other."""
    runners = {}
    for entry in entries:
        if entry.failure != OK:
            continue
        sample = samples[entry.group]
        report(f"preparing {entry.name}, batch {batch}", 0.0)
        try:
            wanted = min(_INPUT_BATCHES * batch, len(sample))
            count = max(1, affordable(wanted, entry.metadata.image_size, _INPUT_MEBIBYTES) // batch)
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
            images = samples[entry.group].batch(batch, 0)
            # Beside the interleaved rounds: the GPU's clock knows nothing of the host's load.
            entry.device_times[batch] = entry.session.device_times(images, _DEVICE_RUNS)
            entry.device_bytes[batch] = entry.session.device_bytes
            if meters:
                report(f"energy of {entry.name}, batch {batch}", 0.0)
                _meter(entry, runners[entry.key], batch, seconds, meters)


def _meter(entry: Entry, runs: Sequence[Callable[[], object]], batch: int, seconds: float, meters: Meters) -> None:
    """Energy at one batch size; a sensor that fails costs the row its energy alone."""
    try:
        meter = meters.of(entry.session.device_kind)
        if meter:
            entry.energies[batch] = measure(runs, batch, seconds, meter)
    except SensorError as error:
        entry.unmetered = f"power was not measured: {error}"


def _reason(entry: Entry, error: Exception) -> str:
    """Why a row could not run.  torch.compile and GPUs fail in many ways; a failing artifact's other errors are bugs."""
    if isinstance(error, (UserError, MemoryError)) or entry.kind != "artifact":
        lines = str(error).strip().splitlines() or [""]
        return lines[0] if isinstance(error, UserError) else f"{type(error).__name__}: {lines[0][:200]}"
    raise error


def _depth_curves(entries: list[Entry], samples: dict[str, Sample], report: Progress) -> list[DepthCurve]:
    """One curve for each recursive checkpoint with labelled images, whatever depths its artifacts have."""
    curves: dict[str, DepthCurve] = {}
    for entry in entries:
        own, sample = entry.metadata, samples[entry.group]
        weights = own.weights_sha256
        if entry.kind != "eager" or not own.recursive or sample.labels is None or weights in curves:
            continue
        from vitrm.runtime.backends.eager import EagerSession
        from vitrm.runtime.bench.depths import depth_curve

        assert isinstance(entry.session, EagerSession)
        relatives = [
            e
            for e in entries
            if e.kind == "artifact" and e.metadata.weights_sha256 == weights and samples[e.group] is sample
        ]
        curves[weights] = depth_curve(
            entry.session,
            sample,
            max([_DEPTHS, *(e.metadata.steps + 2 for e in relatives)]),
            artifacts={e.name: e.predictions for e in relatives if e.predictions},
            progress=lambda fraction: report("accuracy by depth", fraction),
        )
    return list(curves.values())


# Reporting -------------------------------------------------------------------------------------


def _reference_of(entry: Entry, entries: list[Entry]) -> Entry | None:
    return next((e for e in entries if e.kind == "eager" and e.group == entry.group and e is not entry), None)


def _subject(entry: Entry, predictions: Predictions, entries: list[Entry], sample: Sample) -> Subject:
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


def _row(entry: Entry, entries: list[Entry], sample: Sample, batch: int) -> Row:
    session, own = entry.session, entry.metadata
    values: dict[str, Any] = {}
    reference = _reference_of(entry, entries)
    if entry.predictions is not None:
        predictions = entry.predictions
        values["images"] = len(sample)
        if sample.labels is not None:
            found = accuracy(predictions, sample.labels)
            values |= {"accuracy": found.value, "accuracy_interval": (found.low, found.high)}
            if predictions.halt_prob is not None and np.isfinite(predictions.halt_prob).all():
                values["halt_ece"] = reliability(predictions.halt_prob, predictions.top1 == sample.labels).ece
        if predictions.steps_used is not None:
            values["mean_steps_used"] = float(predictions.steps_used.mean())
        if reference and reference.predictions is not None:
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
    notes = [*session.notes_at(batch), *([entry.unmetered] if entry.unmetered else [])]
    if entry.predictions is not None and (broken := int((~np.isfinite(entry.predictions.logits)).any(1).sum())):
        notes.append(f"NaN or infinite logits on {broken} of {len(entry.predictions.logits)} images")
    if timing := entry.timings.get(batch):
        latency = timing.latency
        values |= {"latency_ms": latency, "images_per_s": batch / latency.mean * 1000}
        if (device_times := entry.device_times[batch]) is not None:
            values["device_ms"] = summarize(device_times)
        values["device_bytes"] = entry.device_bytes[batch]
        if energy := entry.energies.get(batch):
            right = values.get("accuracy")
            values |= {
                "watts": energy.watts,
                "joules_per_image": energy.joules_per_image,
                "joules_per_correct_image": energy.joules_per_image / right if right else None,
                "power_scope": energy.scope,
                "clocks_mhz": energy.clocks_mhz,
            }
        if reference and batch in reference.timings:
            ratio = speedup(reference.timings[batch], timing)
            values |= {"speedup": ratio.median, "speedup_range": (ratio.low, ratio.high)}
    return Row(
        name=entry.name,
        kind=entry.kind,
        status=entry.refusals.get(batch, entry.failure),
        backend=session.backend,
        graph=own.graph if entry.kind in ("artifact", "peer") else "eager",
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
