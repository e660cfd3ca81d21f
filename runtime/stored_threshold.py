"""Writes a halting threshold into an artefact, where the runtime takes it as the default from then on."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from vitrm.errors import UserError
from vitrm.files import atomic_folder, atomic_path
from vitrm.runtime.metadata import PARTS, PREFIX, Metadata


def store_threshold(path: str | os.PathLike[str], threshold: float, evidence: dict[str, Any]) -> Metadata:
    """Replaces the default threshold of the loop or stepwise artefact at `path`; returns its new metadata.

    `evidence` says how the threshold was chosen, and is kept beside it.  Everything else in the artefact stays as it
    is; it is replaced whole or not at all.  Raises `UserError` for an artefact of another graph or without `onnx`.
    """
    path = Path(path)
    if not path.is_dir():
        with atomic_path(path) as temporary:
            return _rewrite(path, temporary, threshold, evidence)
    with atomic_folder(path) as temporary:
        for part in PARTS:
            metadata = _rewrite(path / f"{part}.onnx", temporary / f"{part}.onnx", threshold, evidence)
    return metadata


def _rewrite(source: Path, target: Path, threshold: float, evidence: dict[str, Any]) -> Metadata:
    try:
        import onnx
    except ImportError:
        raise UserError(f"writing a threshold into {source} needs the onnx package: pip install onnx") from None
    model = onnx.load(str(source))
    found = Metadata.from_props({p.key: p.value for p in model.metadata_props}, str(source))
    if found.graph not in ("loop", "stepwise"):
        raise UserError(
            f"{source} is {found.graph}, its threshold is part of the graph: export it with vitrm-export --halt-threshold {threshold:g}"
        )
    metadata = replace(found, halt_threshold=threshold, halting=evidence)
    others = [(p.key, p.value) for p in model.metadata_props if not p.key.startswith(PREFIX)]
    del model.metadata_props[:]
    for key, value in (*others, *metadata.to_props().items()):
        model.metadata_props.add(key=key, value=value)
    onnx.save(model, str(target))
    return metadata
