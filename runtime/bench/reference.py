"""The checkpoint an artifact was exported from: what it is compared with must have the same weights.

Torch is needed to find it (the weights' hash is taken over tensors), so it is imported inside.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitrm.errors import UserError
from vitrm.runtime.artifact.metadata import Metadata

if TYPE_CHECKING:
    from vitrm.checkpoint import Checkpoint


def load_run(run: str) -> Checkpoint:
    """Loads the checkpoint that `run` names.  Raises `UserError` when it is none, or torch is missing."""
    checkpoint: Checkpoint = _checkpoints(run).load(run)
    return checkpoint


def _checkpoints(run: str | None) -> Any:
    """Returns the module of checkpoints.  Raises `UserError` when torch is missing, or no run is called `run`."""
    from vitrm import checkpoint

    if run is not None:
        checkpoint.find(run)  # a mistyped name should not wait for torch
    try:
        import torch  # noqa: F401
    except ImportError:
        raise UserError(
            "torch is not installed, so there is no eager model to compare with: pip install torch"
        ) from None
    return checkpoint


def find_reference(metadata: Metadata, path: Path | None, run: str | None = None) -> Checkpoint:
    """Finds the checkpoint with the weights inside the artifact at `path`.

    `run` names it; None looks where the artifact says it came from, beside the artifact, and at the run trained
    last or the bundled default.  Raises `UserError` when torch is missing, when `run` is another model or has other
    weights, or when none of the places has the right ones.
    """
    checkpoints = _checkpoints(run)
    artifact = str(path) if path else "the artifact"
    if run is not None:
        checkpoint: Checkpoint = _looking_as(metadata, checkpoints.load(run))
        difference = _difference(metadata, checkpoint)
        if difference:
            raise UserError(
                f"run {run} {difference}: {artifact} was exported from {metadata.run}; name that run, or export {run} anew"
            )
        return checkpoint
    differing = []
    for place in _places(metadata, path):
        try:
            checkpoint = _looking_as(metadata, checkpoints.load(place))
        except UserError:
            continue
        difference = _difference(metadata, checkpoint)
        if not difference:
            return checkpoint
        differing.append(f"{checkpoint.source} {difference}")
    found = differing[0] if differing else f"no run {metadata.run!r} here, in {checkpoints.RUNS} or beside the file"
    raise UserError(
        f"no eager model to compare {artifact} with ({found}): name the run it was exported from with --run, or export it again"
    )


def _places(metadata: Metadata, path: Path | None) -> list[str | None]:
    """Returns where the artifact's run may be: an artifact knows its run's name, not its folder."""
    from vitrm.checkpoint import CONFIG_FILE, RUNS

    folders = [Path(metadata.run), RUNS / metadata.run]
    if path is not None:
        beside = path.absolute().parent
        folders += [beside, beside.parent, beside / metadata.run, beside / RUNS / metadata.run]
    there = [
        str(folder) for folder in dict.fromkeys(folders) if os.path.isfile(folder / CONFIG_FILE)
    ]  # False too for a name that no file can have
    return [*there, metadata.run, None]


def _looking_as(metadata: Metadata, checkpoint: Checkpoint) -> Checkpoint:
    """Returns the checkpoint, whose steps look as the artifact's do: an export may choose that."""
    from vitrm.config import ViTRMConfig

    if not isinstance(checkpoint.model, ViTRMConfig) or checkpoint.model.glimpses == metadata.glimpses:
        return checkpoint
    return replace(checkpoint, model=replace(checkpoint.model, glimpses=metadata.glimpses))


def _difference(metadata: Metadata, checkpoint: Checkpoint) -> str | None:
    """Says why `checkpoint` is not the artifact's own model, as a phrase; None if it is."""
    from vitrm.config import from_dict, to_dict

    theirs, ours = to_dict(checkpoint.model), metadata.model
    if theirs["kind"] != ours.get("kind"):
        return f"is a {theirs['kind']}, the artifact a {ours.get('kind')}"
    if checkpoint.weights_id != metadata.weights_sha256:
        return f"has other weights ({checkpoint.weights_id[:12]}, the artifact {metadata.weights_sha256[:12]})"
    ours = to_dict(from_dict(dict(ours), "the artifact"))  # an earlier version did not know every setting
    changed = [k for k in sorted(set(theirs) | set(ours)) if theirs.get(k) != ours.get(k) and k != "dropout"]
    if changed:
        return (
            "has other settings ("
            + ", ".join(f"{k} {theirs.get(k)!r}, the artifact {ours.get(k)!r}" for k in changed)
            + ")"
        )
    return None
