"""Writes a halting threshold into an artifact, where `infer` takes it as the default from then on."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from vitrm.errors import UserError
from vitrm.runtime.artifact.graph_names import PARTS, PLAN_SUFFIXES
from vitrm.runtime.artifact.metadata import Metadata
from vitrm.runtime.artifact.onnx_file import inspect, write_metadata
from vitrm.runtime.artifact.plan_sidecar import read_sidecar, sidecar_path, write_sidecar
from vitrm.system.files import atomic_folder, atomic_path


def check_storable(path: Path) -> None:
    """Raises `UserError` now rather than after a sweep if a threshold could not be written into the artifact at `path`."""
    folder = path.resolve().parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"a threshold cannot be written into {path}: no permission in {folder}; copy the artifact")


def store_threshold(path: str | os.PathLike[str], threshold: float, steps: int, evidence: dict[str, Any]) -> Metadata:
    """Makes `threshold`, at a depth of `steps`, the default of the loop or stepwise artifact at `path`.

    `evidence` says how the threshold was chosen, and is kept beside it.  Everything else in the artifact, and other files
    in a stepwise folder, stay as they are; it is replaced whole or not at all.  Returns its new metadata.
    Raises `UserError` for an artifact of another graph, or one that is damaged.
    """
    path = Path(path)
    check_storable(path)
    if path.suffix in PLAN_SUFFIXES and not path.is_dir():
        # A plan's side-car has it; the plan stays as it is.
        with atomic_path(sidecar_path(path)) as temporary:
            return _rewrite_sidecar(path, temporary, threshold, steps, evidence)
    if not path.is_dir():
        with atomic_path(path) as temporary:
            return _rewrite(path, temporary, threshold, steps, evidence)
    with atomic_folder(path) as temporary:
        for entry in path.iterdir():
            if entry.is_dir():
                shutil.copytree(entry, temporary / entry.name, symlinks=True)
            else:
                shutil.copy2(entry, temporary / entry.name, follow_symlinks=False)
        for part in PARTS:
            if _is_plan(path):
                plan = path / f"{part}.plan"
                metadata = _rewrite_sidecar(plan, sidecar_path(temporary / plan.name), threshold, steps, evidence)
            else:
                metadata = _rewrite(path / f"{part}.onnx", temporary / f"{part}.onnx", threshold, steps, evidence)
    return metadata


def _is_plan(path: Path) -> bool:
    return path.suffix in PLAN_SUFFIXES or (path / f"{PARTS[0]}.plan").is_file()


def _rewrite_sidecar(plan: Path, target: Path, threshold: float, steps: int, evidence: dict[str, Any]) -> Metadata:
    found = read_sidecar(plan)
    metadata = _with_threshold(found.metadata, str(plan), threshold, steps, evidence)
    write_sidecar(replace(found, metadata=metadata), target)
    return metadata


def _with_threshold(found: Metadata, where: str, threshold: float, steps: int, evidence: dict[str, Any]) -> Metadata:
    if found.graph not in ("loop", "stepwise"):
        raise UserError(
            f"{where} is {found.graph}, its threshold is part of the graph: export it with vitrm-export --halt-threshold {threshold:g}"
        )
    return replace(found, halt_threshold=threshold, steps=steps, halting=evidence)


def _rewrite(source: Path, target: Path, threshold: float, steps: int, evidence: dict[str, Any]) -> Metadata:
    metadata = _with_threshold(inspect(source).metadata, str(source), threshold, steps, evidence)
    write_metadata(source, target, metadata)
    return metadata
