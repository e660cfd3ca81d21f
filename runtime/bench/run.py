"""Measures artifacts beside the eager models they were exported from.

Everything that shares weights and depth forms a group, and is compared with that group's eager model:
answers image by image, latency round by round.  What cannot run becomes a row that says why; the rest goes on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from vitrm.data import affordable
from vitrm.errors import UserError, first_line
from vitrm.runtime.artifact.metadata import Metadata
from vitrm.runtime.bench.accuracy import predict
from vitrm.runtime.bench.cases import Case, ReportProgress, open_bench
from vitrm.runtime.bench.collect import collect
from vitrm.runtime.bench.energy import Meters, measure
from vitrm.runtime.bench.images import Sample
from vitrm.runtime.bench.latency import interleave
from vitrm.runtime.bench.options import BenchOptions
from vitrm.runtime.bench.robustness.measure import measure_corruptions
from vitrm.runtime.bench.rows import OK, BenchResult, DepthCurve
from vitrm.runtime.halting.store_threshold import store_threshold
from vitrm.runtime.system import machine
from vitrm.runtime.system.power import ROOT, SensorError

EVALUATION_BATCH = 100
_INPUT_BATCHES = 8  # different inputs that a latency measurement cycles through …
_INPUT_IMAGES = 64  # … and the fewest images in them: of eight, chance decides how many halt early
_INPUT_MEBIBYTES = 1024  # of them, for each row
_DEPTHS = 16  # of the curve that a report shows, or two beyond the deepest artifact
_DEVICE_RUNS = 100  # timed on the GPU's own clock


def bench(
    artifacts: Sequence[str | os.PathLike[str]],
    options: BenchOptions | None = None,
    *,
    root: Path = ROOT,
    progress: ReportProgress | None = None,
    **settings: Any,
) -> BenchResult:
    """Measures accuracy, agreement with eager and latency of `artifacts`, each at every batch size.

    Args:
        artifacts: paths of .onnx files, plans and stepwise folders.  With a `run`, none of them need be there or open: the run
            is then measured in PyTorch alone.
        options: what is measured and how; None: the defaults of `BenchOptions`.
        root: folder that holds the machine's sys and proc.
        progress: is called with the stage and the fraction of it that is done, in [0, 1].
        **settings: fields of `BenchOptions` that replace those of `options`, such as `batches=(1, 8)`.

    Returns:
        A row for each case at each batch size, and the evidence that the report shows.  With `max_drop`, the chosen
        thresholds have been written into their artifacts.

    Raises:
        UserError: nothing can be measured, the options make no sense, or `run` or `data` do not fit the artifacts.  An
            artifact that fails becomes a row with the reason as its status, where anything else can be measured.
        TypeError: a setting that `BenchOptions` does not have.
    """
    options = replace(options or BenchOptions(), **settings)
    report = progress or (lambda stage, fraction: None)
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    threads = options.threads or machine.physical_cores()
    meters = Meters(root) if options.power else None
    notes: list[str] = []

    opened = open_bench(artifacts, options, threads, notes, report)
    cases, samples = opened.cases, opened.samples
    for case in cases:
        predict_case(case, samples[case.group], report)
    busy_cpus, disturbed = _measure_batches(cases, samples, options, threads, meters, notes, report)
    curves = _depth_curves(cases, samples, notes, report) if options.depths else []
    corruptions = (
        measure_corruptions(cases, samples, opened.choices, options.corruption_images, notes, report)
        if options.corruption_images
        else ()
    )
    for path, choice in opened.choices.items():
        store_threshold(path, choice.chosen.threshold, choice.steps, choice.evidence())
    return collect(
        opened,
        options,
        notes,
        started=started,
        threads=threads,
        busy_cpus=busy_cpus,
        disturbed=disturbed,
        power=meters.describe() if meters else {},
        curves=curves,
        corruptions=corruptions,
        root=root,
    )


def predict_case(case: Case, sample: Sample, report: ReportProgress) -> None:
    """Runs a case over all images; what fails is its failure."""
    stage = f"accuracy of {case.name}"
    try:
        case.predictions = predict(
            case.session,
            sample.pixels,
            batch=EVALUATION_BATCH,
            progress=lambda fraction: report(stage, fraction),
        )
    except Exception as error:
        case.failure = _reason(case, error)


def _measure_batches(
    cases: Sequence[Case],
    samples: Mapping[str, Sample],
    options: BenchOptions,
    threads: int,
    meters: Meters | None,
    notes: list[str],
    report: ReportProgress,
) -> tuple[float | None, bool]:
    """Measures every batch size.

    Returns how many CPUs other processes kept busy meanwhile, None where nobody counts, and whether that was too many for
    good figures, which it appends to `notes`.
    """
    before = machine.CpuClock.read()
    for batch in options.batches:
        measure_batch(cases, samples, batch, options.seconds, meters, report)
    after = machine.CpuClock.read()
    if before is None or after is None:
        return None, False
    busy = after.others_since(before)
    disturbed = busy > max(0.25, (after.cpus - threads) / 2)
    if disturbed:
        worst = " (threads that wait for each other suffer most)" if threads > 1 else ""
        notes.append(
            f"the machine was not quiet: other processes kept {busy:.1f} of {after.cpus} CPUs busy while latency was "
            f"measured, so times are too long and ratios uncertain{worst}"
        )
    return busy, disturbed


def measure_batch(
    cases: Sequence[Case],
    samples: Mapping[str, Sample],
    batch: int,
    seconds: float,
    meters: Meters | None,
    report: ReportProgress,
) -> None:
    """Measures latency at one batch size, everything interleaved; after it energy, one case after the other."""
    runners: dict[str, list[Callable[[], object]]] = {}
    by_key = {case.key: case for case in cases}

    def refuse(key: str, error: Exception) -> None:
        by_key[key].refusals[batch] = _reason(by_key[key], error)
        runners.pop(key, None)  # with the inputs that it holds
        by_key[key].session.release_memory()

    for case in cases:
        if case.failure != OK:
            continue
        report(f"preparing {case.name}, batch {batch}", 0.0)
        try:
            runners[case.key] = _prepare(case, samples[case.group], batch)
        except Exception as error:
            refuse(case.key, error)
    timings = interleave(
        dict(runners),
        seconds=seconds,
        progress=lambda fraction: report(f"latency, batch {batch}", fraction),
        failed=refuse,
    )
    for case in cases:
        if case.key not in timings:
            continue
        try:
            # Beside the interleaved rounds: the GPU's clock knows nothing of the host's load.
            case.device_times[batch] = case.session.device_times(samples[case.group].batch(batch, 0), _DEVICE_RUNS)
            case.device_bytes[batch] = case.session.device_bytes
            if meters:
                report(f"energy of {case.name}, batch {batch}", 0.0)
                _measure_energy(case, runners[case.key], batch, seconds, meters)
        except Exception as error:
            refuse(case.key, error)
        else:
            case.timings[batch] = timings[case.key]


def _prepare(case: Case, sample: Sample, batch: int) -> list[Callable[[], object]]:
    """Returns a run for each of several inputs, after the first of them has run once."""
    wanted = min(max(_INPUT_BATCHES * batch, _INPUT_IMAGES), len(sample))
    count = max(1, affordable(wanted, case.metadata.image_size, _INPUT_MEBIBYTES) // batch)
    prepared: list[Callable[[], object]] = [case.session.prepare(sample.batch(batch, i)) for i in range(count)]
    prepared[0]()  # compiles, allocates, or fails here rather than among the others
    return prepared


def _measure_energy(
    case: Case, runs: Sequence[Callable[[], object]], batch: int, seconds: float, meters: Meters
) -> None:
    """Measures energy at one batch size; a sensor that fails costs the row its energy alone."""
    try:
        meter = meters.of(case.session.device_kind, case.session.device_index)
        if meter:
            case.energies[batch] = measure(runs, batch, seconds, meter)
    except SensorError as error:
        case.unmetered = f"power was not measured: {error}"


def _reason(case: Case, error: Exception) -> str:
    """Says why a row could not run.

    torch.compile and GPUs fail in many ways (no memory, a kernel that does not exist, a device that is lost); what else an
    artifact raises on a CPU is a bug, and is raised.
    """
    if isinstance(error, UserError):
        return str(error).partition("\n")[0]
    if isinstance(error, MemoryError) or case.kind != "artifact" or case.session.device_kind == "cuda":
        return first_line(error, named=True)
    raise error


def _of_one_depth(metadata: Metadata) -> tuple[str, str]:
    """Returns what artifacts that answer alike at equal depth have in common: their weights, and what their steps look at."""
    return metadata.weights_sha256, metadata.glimpses


def _depth_curves(
    cases: Sequence[Case], samples: Mapping[str, Sample], notes: list[str], report: ReportProgress
) -> list[tuple[DepthCurve, DepthCurve | None]]:
    """Measures the curves, by depth and by threshold, of each recursive checkpoint with labelled images, whatever depths its artifacts have.

    Appends to `notes` why a checkpoint has none.
    """
    curves: dict[tuple[str, str], tuple[DepthCurve, DepthCurve | None]] = {}
    for case in cases:
        own, sample = case.metadata, samples[case.group]
        model = _of_one_depth(own)
        if case.kind != "eager" or not own.recursive or sample.labels is None or model in curves:
            continue
        from vitrm.runtime.backends.eager import EagerSession
        from vitrm.runtime.bench.depths import depth_curves

        assert isinstance(case.session, EagerSession)
        relatives = [
            c
            for c in cases
            if c.kind == "artifact" and _of_one_depth(c.metadata) == model and samples[c.group] is sample
        ]
        try:
            curves[model] = depth_curves(
                case.session,
                sample,
                max([_DEPTHS, *(c.metadata.steps + 2 for c in relatives)]),
                artifacts={c.name: c.predictions for c in relatives if c.predictions},
                steps=max([c.metadata.steps for c in relatives], default=own.steps),
                progress=lambda fraction: report("accuracy by depth", fraction),
            )
        except Exception as error:
            notes.append(f"no accuracy by depth of {case.name}: {_reason(case, error)}")
    return list(curves.values())
