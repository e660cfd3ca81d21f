"""Cases of a bench, opened but not yet measured: artifacts, what other tools make of them, and their eager models.

Artifacts that compute the same function on the same images form a group.  Each group has one eager model.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vitrm.errors import UserError, first_line
from vitrm.model_limits import NEVER
from vitrm.runtime.artifact.metadata import Metadata
from vitrm.runtime.bench.accuracy import Predictions
from vitrm.runtime.bench.case_names import case_name
from vitrm.runtime.bench.energy import Energy
from vitrm.runtime.bench.images import Sample, load_sample
from vitrm.runtime.bench.latency import Timing
from vitrm.runtime.bench.options import BenchOptions
from vitrm.runtime.bench.reference import find_reference, load_run
from vitrm.runtime.bench.rows import OK
from vitrm.runtime.halting.choose import HaltingChoice, check_enough, choose, run_every_step
from vitrm.runtime.halting.store_threshold import check_storable
from vitrm.runtime.session import Session, open_session

if TYPE_CHECKING:
    from vitrm.checkpoint import Checkpoint

ReportProgress = Callable[[str, float], None]  # is told what is being done, and which fraction of it is done


@dataclass
class Case:
    """A session at one depth and threshold, and what was measured of it so far."""

    key: str
    name: str
    kind: str  # artifact, peer, eager or compiled; eager-bf16 or compiled-bf16
    session: Session
    group: str
    failure: str = OK
    predictions: Predictions | None = None
    refusals: dict[int, str] = field(default_factory=dict)  # by batch
    timings: dict[int, Timing] = field(default_factory=dict)  # by batch
    device_times: dict[int, NDArray[np.float64] | None] = field(default_factory=dict)  # by batch, milliseconds
    device_bytes: dict[int, int | None] = field(default_factory=dict)  # by batch, after it was measured
    energies: dict[int, Energy] = field(default_factory=dict)  # by batch, where there are sensors
    unmetered: str | None = None  # why a sensor that is there could not be read

    @property
    def metadata(self) -> Metadata:
        """The artifact's own description, at the case's depth and threshold."""
        return self.session.metadata


@dataclass(frozen=True)
class UnopenedCase:
    """An artifact, or another case, that could not even be opened."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class OpenArtifact:
    """An artifact that was opened, and what to call it."""

    name: str
    session: Session


@dataclass(frozen=True)
class OpenBench:
    """Everything that a bench measures, opened."""

    cases: list[Case]  # by group, each group's eager model first
    unopened: list[UnopenedCase]
    samples: dict[str, Sample]  # images by group
    choices: dict[Path, HaltingChoice]  # thresholds that were chosen, by artifact
    compared: bool  # with an eager model, at least one of the groups


def open_bench(
    artifacts: Sequence[str | os.PathLike[str]],
    options: BenchOptions,
    threads: int,
    notes: list[str],
    report: ReportProgress,
) -> OpenBench:
    """Opens `artifacts`, chooses thresholds where asked for, and adds peers, images and eager models.

    Where none of them opens, or there are none, a run that `options` name is measured alone: on a GPU without ONNX
    Runtime's provider and TensorRT, PyTorch still says what the model takes there.
    Appends to `notes` what a reader of the results should know.  Raises `UserError` when nothing can be measured, or
    `options` do not fit the artifacts; an artifact that fails is among the result's `unopened`.
    """
    opened, unopened = open_artifacts(artifacts, options, threads)
    cases, choices = artifact_cases(opened, unopened, options, notes, report)
    if not cases:
        cases = run_cases(unopened, options, threads)
        return OpenBench(cases, unopened, load_samples(cases, options, notes), choices, compared=True)
    if options.peers:
        cases += open_peers(opened, unopened, options, report)
    samples = load_samples(cases, options, notes)
    checkpoints = find_references(cases, options.run, notes) if options.eager else {}
    cases = with_eager(cases, unopened, checkpoints, options, threads)
    return OpenBench(cases, unopened, samples, choices, compared=bool(checkpoints))


# Artifacts -------------------------------------------------------------------------------------


def open_artifacts(
    artifacts: Sequence[str | os.PathLike[str]], options: BenchOptions, threads: int
) -> tuple[list[OpenArtifact], list[UnopenedCase]]:
    """Opens every path once; what does not open is returned with the reason."""
    paths = list(dict.fromkeys(str(a) for a in artifacts))
    short = [Path(p).name for p in paths]
    opened, unopened = [], []
    for path, file in zip(paths, short, strict=True):
        name = file if short.count(file) == 1 else path
        try:
            session = open_session(
                path, device=options.device, threads=threads, provider=options.provider, verify=options.verify
            )
        except UserError as error:
            unopened.append(UnopenedCase(name, "artifact", str(error)))
        except Exception as error:
            if options.device == "cpu":
                raise  # a bug; a GPU's libraries fail in ways of their own
            unopened.append(UnopenedCase(name, "artifact", first_line(error, named=True)))
        else:
            opened.append(OpenArtifact(name, session))
    return opened, unopened


def artifact_cases(
    opened: Sequence[OpenArtifact],
    unopened: list[UnopenedCase],
    options: BenchOptions,
    notes: list[str],
    report: ReportProgress,
) -> tuple[list[Case], dict[Path, HaltingChoice]]:
    """Returns the cases of every artifact, and the thresholds chosen for them.

    An artifact for which none can be chosen joins `unopened`.  Raises `UserError` where a threshold was asked for and none
    of the artifacts that opened takes one.
    """
    cases: list[Case] = []
    choices: dict[Path, HaltingChoice] = {}
    for one in opened:
        thresholds, path = options.halt_thresholds, one.session.path
        if options.max_drop is not None and one.session.takes_depth and path is not None:
            try:
                check_storable(path)
                choices[path] = _choose_threshold(one, options.max_drop, options, report)
            except UserError as error:
                unopened.append(UnopenedCase(one.name, "artifact", str(error)))
                continue
            thresholds = list(dict.fromkeys((1.0, choices[path].chosen.threshold)))
        cases += at_settings(one, options.steps, thresholds, notes)
    if options.max_drop is not None and cases and not choices:
        raise UserError(
            "no loop or stepwise artifact to choose a threshold for: make one with vitrm-export --graph stepwise"
        )
    return cases, choices


def _choose_threshold(
    opened: OpenArtifact, max_drop: float, options: BenchOptions, report: ReportProgress
) -> HaltingChoice:
    """Chooses a threshold on the validation images."""
    session, stage = opened.session, f"halting of {opened.name}"
    steps = options.steps[0] if options.steps else session.metadata.steps
    sample = load_sample(
        session.metadata,
        session.name,
        data=options.data,
        data_dir=options.data_dir,
        limit=options.limit,
        split="validation",
    )
    check_enough(len(sample), sample.name, max_drop)  # before minutes of running
    trajectory = run_every_step(session, sample, steps, progress=lambda fraction: report(stage, fraction))
    return choose(opened.name, sample, trajectory, max_drop)


def at_settings(
    opened: OpenArtifact, steps: Sequence[int], halt_thresholds: Sequence[float], notes: list[str]
) -> list[Case]:
    """Returns a case for each of `steps` × `halt_thresholds`; where none are named, or none can be chosen, the artifact's own.

    One step is measured once: no threshold changes it.  Appends to `notes` where an artifact cannot be told what was asked for.
    """
    session, name = opened.session, opened.name
    if not session.takes_depth:
        if (steps or halt_thresholds) and session.metadata.recursive:
            notes.append(f"{name} has its {session.metadata.steps} steps built in: it is measured at those alone")
        steps = halt_thresholds = ()
    _note_untrained(opened, steps or [session.metadata.steps], notes)
    cases = []
    depths: Sequence[int | None] = steps or [None]
    thresholds: Sequence[float | None] = halt_thresholds or [None]
    for depth, threshold in product(depths, thresholds):
        if depth == 1 and threshold != thresholds[-1]:
            continue
        view = session if depth is None and threshold is None else session.at(steps=depth, halt_threshold=threshold)
        setting = [f"{depth} step{'s' * (depth > 1)}"] if depth is not None and len(steps) > 1 else []
        if threshold is not None and len(halt_thresholds) > 1:
            setting.append(_threshold_words(threshold))
        label = case_name(name, setting)
        cases.append(Case(f"{session.name} {depth} {threshold}", label, "artifact", view, group_key(view.metadata)))
    return cases


def _threshold_words(threshold: float) -> str:
    return "no halting" if threshold >= 1 else f"halting at {threshold:g}"


def _note_untrained(opened: OpenArtifact, depths: Sequence[int], notes: list[str]) -> None:
    """Appends to `notes` which of `depths` training never reached."""
    trained = opened.session.metadata.trained_depth
    deeper = [str(depth) for depth in depths if trained is not None and depth > trained]
    if deeper:
        listed = ", ".join(deeper) if len(deeper) <= 3 else f"{deeper[0]} … {deeper[-1]}"
        notes.append(
            f"{opened.name} was trained to {trained} step{'s' * (trained != 1)}: {listed} "
            f"{'are' if len(deeper) > 1 else 'is'} deeper, and may answer worse"
        )


def run_cases(unopened: list[UnopenedCase], options: BenchOptions, threads: int) -> list[Case]:
    """Returns the cases of the run that `options` name, without an artifact: eager and compiled, at each depth and threshold.

    Raises `UserError` for the artifacts that did not open where no run is named or PyTorch is left out, and where the run
    itself cannot be measured.
    """
    reasons = [u.reason for u in unopened] or ["no artifact to measure: name an .onnx file that vitrm-export wrote"]
    if options.run is None or not options.eager or options.max_drop is not None:
        raise UserError("; ".join(reasons))
    checkpoint = load_run(options.run)
    from vitrm.runtime.backends.eager import describe

    recursive = checkpoint.model.kind == "vitrm"
    depths = (options.steps if recursive else ()) or [checkpoint.trained_depth or 1]
    thresholds = (options.halt_thresholds if recursive else ()) or [NEVER]
    wanted = [describe(checkpoint, steps=s, halt_threshold=t) for s, t in product(depths, thresholds)]
    groups = {group_key(metadata): metadata for metadata in wanted}
    labels = _eager_labels(groups, dict.fromkeys(groups, checkpoint))
    cases = []
    for group, metadata in groups.items():
        cases += _open_eager(group, metadata, options.device, unopened, checkpoint, labels[group], options, threads)
    if not cases:
        raise UserError("; ".join(u.reason for u in unopened))
    return cases


# Peers, images, eager models -------------------------------------------------------------------


def open_peers(
    opened: Sequence[OpenArtifact], unopened: list[UnopenedCase], options: BenchOptions, report: ReportProgress
) -> list[Case]:
    """Returns a case for what each other tool makes of each opened artifact; what fails joins `unopened`."""
    from vitrm.runtime.bench.peers import peers_of

    cases = []
    with tempfile.TemporaryDirectory() as folder:  # only while they are opened: the files are read whole
        for one in opened:
            for peer in peers_of(one.session, one.name, Path(folder), options.data, options.data_dir):
                report(f"making {peer.name}", 0.0)
                try:
                    session = peer.make()
                except UserError as error:
                    unopened.append(UnopenedCase(peer.name, "peer", str(error)))
                else:
                    cases.append(Case(f"peer {peer.name}", peer.name, "peer", session, group_key(session.metadata)))
    return cases


def group_key(metadata: Metadata) -> str:
    """Names the group: the same for artifacts that compute the same function (weights, settings, depth) on the same images."""
    m = metadata
    function = [m.weights_sha256, m.model, m.steps, min(m.halt_threshold, 1.0)]
    return json.dumps([*function, m.data.get("name"), m.classes], sort_keys=True)


def load_samples(cases: list[Case], options: BenchOptions, notes: list[str]) -> dict[str, Sample]:
    """Loads the images of each group; groups with the same data set, classes and image size share them.

    Appends to `notes` where they are not the artifact's own.  Raises `UserError` for a data set that does not fit.
    """
    loaded: dict[tuple[Any, ...], Sample] = {}
    samples = {}
    for case in cases:
        m = case.metadata
        key = (options.data or m.data.get("name"), m.preprocessing, tuple(m.classes))
        if key not in loaded:
            loaded[key] = load_sample(
                m,
                case.session.name,
                data=options.data,
                data_dir=options.data_dir,
                limit=options.limit,
                # A threshold is chosen on the validation part: the figures must not be of the same images.
                whole=options.max_drop is None,
            )
            if note := loaded[key].note:
                notes.append(note)
        samples[case.group] = loaded[key]
    return samples


def find_references(cases: list[Case], run: str | None, notes: list[str]) -> dict[str, Checkpoint]:
    """Finds the checkpoint of each group that has one; appends to `notes` why another has none.

    Raises `UserError` if `run` is named and is not what every artifact was exported from.
    """
    checkpoints: dict[str, Checkpoint] = {}
    for case in cases:
        if case.group in checkpoints:
            continue
        try:
            checkpoints[case.group] = find_reference(case.metadata, case.session.path, run)
        except UserError as error:
            if run is not None:
                raise
            notes.append(f"{error} (no eager row, no agreement)")
            continue
        if checkpoints[case.group].note:
            notes.append(f"{checkpoints[case.group].source}: {checkpoints[case.group].note}")
    return checkpoints


def with_eager(
    cases: Sequence[Case],
    unopened: list[UnopenedCase],
    checkpoints: Mapping[str, Checkpoint],
    options: BenchOptions,
    threads: int,
) -> list[Case]:
    """Returns the cases by group, each group's eager models first; one that does not start joins `unopened`."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.group, []).append(case)
    labels = _eager_labels({group: groups[group][0].metadata for group in checkpoints}, checkpoints)
    grouped = []
    for group, members in groups.items():
        if group in checkpoints:
            # For "auto", where the artifacts ended up: torch alone might go elsewhere.
            gpu = next((f"cuda:{m.session.device_index}" for m in members if m.session.device_kind == "cuda"), None)
            where = (gpu or members[0].session.device_kind) if options.device == "auto" else options.device
            label = labels[group]
            grouped += _open_eager(
                group, members[0].metadata, where, unopened, checkpoints[group], label, options, threads
            )
        grouped += members
    return grouped


def _open_eager(
    group: str,
    like: Metadata,
    device: str,
    unopened: list[UnopenedCase],
    checkpoint: Checkpoint,
    label: str,
    options: BenchOptions,
    threads: int,
) -> list[Case]:
    """Opens a group's eager model at the depth and threshold of `like`, and as options ask for it compiled and in bfloat16."""
    from vitrm.runtime.backends.eager import EagerSession

    cases = []
    for half, compiled in product((False, True) if options.bf16 else (False,), dict.fromkeys((False, options.compile))):
        mode = f" {compiled}" if isinstance(compiled, str) else ""
        name = f"{f'torch.compile{mode}' if compiled else 'eager PyTorch'}{', bfloat16' * half}{label}"
        kind = f"{'compiled' if compiled else 'eager'}{'-bf16' * half}"
        try:
            session = EagerSession(
                checkpoint,
                steps=like.steps,
                halt_threshold=like.halt_threshold,
                device=device,
                threads=threads,
                compile=compiled,
                precision="bf16" if half else "fp32",
            )
        except Exception as error:  # no memory, for one
            reason = str(error) if isinstance(error, UserError) else first_line(error, named=True)
            unopened.append(UnopenedCase(name, kind, reason))
        else:
            cases.append(Case(f"{kind} {group}", name, kind, session, group))
    return cases


def _eager_labels(first: Mapping[str, Metadata], checkpoints: Mapping[str, Checkpoint]) -> dict[str, str]:
    """Returns by group what tells its eager rows from another group's: nothing, or the run, the depth, a number.

    `first` is the description of each group's first case.
    """
    runs = {group: Path(checkpoint.source).name for group, checkpoint in checkpoints.items()}
    labels: dict[str, str] = {}
    for group, m in first.items():
        relatives = [other for g, other in first.items() if runs[g] == runs[group]]
        parts = []
        if len(set(runs.values())) > 1:
            parts.append(runs[group])
        if len({other.steps for other in relatives}) > 1:
            parts.append(f"{m.steps} steps")
        if len({other.halt_threshold for other in relatives}) > 1:
            parts.append(_threshold_words(m.halt_threshold))
        label = "".join(f" · {part}" for part in parts)
        labels[group] = label if label not in labels.values() else f"{label} ({len(labels) + 1})"
    return labels
