"""What a bench measures, before it is measured: artifacts opened and grouped, each group with its images and eager model.

Artifacts that compute the same function on the same images form a group; each group has one eager model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vitrm.errors import UserError
from vitrm.runtime.artifact.metadata import Metadata
from vitrm.runtime.bench.accuracy import Predictions
from vitrm.runtime.bench.energy import Energy
from vitrm.runtime.bench.images import Sample, load_sample
from vitrm.runtime.bench.latency import Timing
from vitrm.runtime.bench.reference import find_reference
from vitrm.runtime.bench.rows import OK
from vitrm.runtime.session import Session, open_session

if TYPE_CHECKING:
    from vitrm.checkpoint import Checkpoint


@dataclass
class Entry:
    """A thing on its way through the bench."""

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
        return self.session.metadata


@dataclass(frozen=True)
class Unopened:
    """A thing that could not even be opened."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Opened:
    """An artifact that was opened, and what to call it."""

    name: str
    session: Session


def open_all(
    artifacts: Sequence[str | os.PathLike[str]],
    device: str,
    threads: int,
    provider: str | None = None,
    verify: bool = True,
) -> tuple[list[Opened], list[Unopened]]:
    """Opens every path once; what does not open is returned with the reason."""
    paths = list(dict.fromkeys(str(a) for a in artifacts))
    short = [Path(p).name for p in paths]
    opened, unopened = [], []
    for path, file in zip(paths, short, strict=True):
        name = file if short.count(file) == 1 else path
        try:
            opened.append(
                Opened(name, open_session(path, device=device, threads=threads, provider=provider, verify=verify))
            )
        except UserError as error:
            unopened.append(Unopened(name, "artifact", str(error)))
    return opened, unopened


def at_settings(
    opened: Opened, steps: Sequence[int], halt_thresholds: Sequence[float], notes: list[str]
) -> list[Entry]:
    """An entry for each of `steps` × `halt_thresholds`; where none are named, or none can be chosen, the artifact's own.

    One step is measured once: no threshold changes it.  Appends to `notes` where an artifact cannot be told what was asked for.
    """
    session, name = opened.session, opened.name
    if not session.takes_depth:
        if (steps or halt_thresholds) and session.metadata.recursive:
            notes.append(f"{name} has its {session.metadata.steps} steps built in: it is measured at those alone")
        steps = halt_thresholds = ()
    _note_untrained(opened, steps or [session.metadata.steps], notes)
    entries = []
    depths: Sequence[int | None] = steps or [None]
    thresholds: Sequence[float | None] = halt_thresholds or [None]
    for depth, threshold in product(depths, thresholds):
        if depth == 1 and threshold != thresholds[-1]:
            continue
        view = session if depth is None and threshold is None else session.at(steps=depth, halt_threshold=threshold)
        setting = [f"{depth} step{'s' * (depth > 1)}"] if depth is not None and len(steps) > 1 else []
        if threshold is not None and len(halt_thresholds) > 1:
            setting.append("no halting" if threshold >= 1 else f"halting at {threshold:g}")
        label = " · ".join([name, *setting])
        entries.append(Entry(f"{session.name} {depth} {threshold}", label, "artifact", view, _group(view.metadata)))
    return entries


def _note_untrained(opened: Opened, depths: Sequence[int], notes: list[str]) -> None:
    """Appends to `notes` which of `depths` training never reached."""
    trained = opened.session.metadata.trained_depth
    deeper = [str(depth) for depth in depths if trained is not None and depth > trained]
    if deeper:
        notes.append(
            f"{opened.name} was trained to {trained} step{'s' * (trained != 1)}: {_listed(deeper)} "
            f"{'are' if len(deeper) > 1 else 'is'} deeper, and may answer worse"
        )


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words) if len(words) <= 3 else f"{words[0]} … {words[-1]}"


def open_peers(
    opened: Sequence[Opened], folder: Path, data: str | None, data_dir: Any, report: Callable[[str, float], None]
) -> tuple[list[Entry], list[Unopened]]:
    """An entry for what each other tool makes of each opened artifact; what fails is returned with the reason."""
    from vitrm.runtime.bench.peers import peers_of

    entries, unopened = [], []
    for one in opened:
        for peer in peers_of(one.session, one.name, folder, data, data_dir):
            report(f"making {peer.name}", 0.0)
            try:
                session = peer.make()
            except UserError as error:
                unopened.append(Unopened(peer.name, "peer", str(error)))
            else:
                entries.append(Entry(f"peer {peer.name}", peer.name, "peer", session, _group(session.metadata)))
    return entries, unopened


def _group(metadata: Metadata) -> str:
    """The same for artifacts that compute the same function (weights, settings, depth) on the same images."""
    m = metadata
    function = [m.weights_sha256, m.model, m.steps, min(m.halt_threshold, 1.0)]
    return json.dumps([*function, m.data.get("name"), m.classes], sort_keys=True)


def _eager_labels(entries: list[Entry], checkpoints: dict[str, Checkpoint]) -> dict[str, str]:
    """By group, what tells its eager rows from another group's: nothing, or the run, the depth, a number."""
    first = {group: next(e.metadata for e in entries if e.group == group) for group in checkpoints}
    runs = {group: Path(checkpoint.source).name for group, checkpoint in checkpoints.items()}
    labels: dict[str, str] = {}
    for group, m in first.items():
        parts = []
        if len(set(runs.values())) > 1:
            parts.append(runs[group])
        if len({other.steps for g, other in first.items() if runs[g] == runs[group]}) > 1:
            parts.append(f"{m.steps} steps")
        if len({other.halt_threshold for g, other in first.items() if runs[g] == runs[group]}) > 1:
            parts.append("no halting" if m.halt_threshold >= 1 else f"halting at {m.halt_threshold:g}")
        label = "".join(f" · {part}" for part in parts)
        labels[group] = label if label not in labels.values() else f"{label} ({len(labels) + 1})"
    return labels


def load_samples(
    entries: list[Entry], data: str | None, data_dir: Any, limit: int | None, notes: list[str]
) -> dict[str, Sample]:
    """The images of each group; groups with the same data set, classes and image size share them.

    Appends to `notes` where they are not the artifact's own.  Raises `UserError` for `data` that does not fit.
    """
    loaded: dict[tuple[Any, ...], Sample] = {}
    samples = {}
    for entry in entries:
        m = entry.metadata
        key = (data or m.data.get("name"), m.image_size, tuple(m.classes))
        if key not in loaded:
            loaded[key] = load_sample(m, entry.session.name, data=data, data_dir=data_dir, limit=limit)
            if note := loaded[key].note:
                notes.append(note)
        samples[entry.group] = loaded[key]
    return samples


def find_references(entries: list[Entry], run: str | None, notes: list[str]) -> dict[str, Checkpoint]:
    """The checkpoint of each group that has one; appends to `notes` why another has none.

    Raises `UserError` if `run` is named and is not what every artifact was exported from.
    """
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
            continue
        if checkpoints[entry.group].note:
            notes.append(f"{checkpoints[entry.group].source}: {checkpoints[entry.group].note}")
    return checkpoints


def with_eager(
    artifacts: list[Entry],
    unopened: list[Unopened],
    checkpoints: dict[str, Checkpoint],
    device: str,
    threads: int,
    compile: bool | str,
    bf16: bool,
) -> list[Entry]:
    """The entries by group, each group's eager model first; one that does not start joins `unopened`."""
    ways = [
        (compiled, half)
        for half in ((False, True) if bf16 else (False,))
        for compiled in dict.fromkeys((False, compile))
    ]
    entries = []
    labels = _eager_labels(artifacts, checkpoints)
    for group in dict.fromkeys(e.group for e in artifacts):
        members = [e for e in artifacts if e.group == group]
        for compiled, half in ways:
            if group not in checkpoints:
                continue
            from vitrm.runtime.backends.eager import EagerSession

            checkpoint, like = checkpoints[group], members[0].session
            # For "auto", where the artifacts ended up: torch alone might go elsewhere.
            where = "cuda" if any(m.session.device_kind == "cuda" for m in members) else like.device_kind
            mode = f" {compiled}" if isinstance(compiled, str) else ""
            name = (
                (f"torch.compile{mode}" if compiled else "eager PyTorch")
                + (", bfloat16" if half else "")
                + labels[group]
            )
            kind = ("compiled" if compiled else "eager") + ("-bf16" if half else "")
            try:
                session = EagerSession(
                    checkpoint,
                    steps=like.metadata.steps,
                    halt_threshold=like.metadata.halt_threshold,
                    device=where if device == "auto" else device,
                    threads=threads,
                    compile=compiled,
                    bf16=half,
                )
            except UserError as error:
                unopened.append(Unopened(name, kind, str(error)))
            else:
                entries.append(Entry(f"{kind} {group}", name, kind, session, group))
        entries += members
    return entries
