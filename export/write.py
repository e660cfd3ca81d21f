"""Stages "verify" and "write": the files of an artifact, which get their name once they answer like PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from vitrm.baselines.networks import Baseline
from vitrm.checkpoint import Checkpoint
from vitrm.config import to_dict
from vitrm.errors import UserError
from vitrm.export.settings import ExportSettings, OnStage
from vitrm.export.verify import Parity, check_integer_sums, verify
from vitrm.model import ViTRM
from vitrm.runtime.artifact.metadata import Metadata
from vitrm.runtime.artifact.onnx_file import MAX_FILE, write_metadata
from vitrm.system.files import atomic_folder, atomic_path


def describe(checkpoint: Checkpoint, settings: ExportSettings, calibration_id: str | None) -> Metadata:
    """The metadata of an artifact before it is verified."""
    recursive = checkpoint.model.kind == "vitrm"
    return Metadata(
        model=to_dict(checkpoint.model),
        classes=[str(c) for c in checkpoint.data.get("classes", range(checkpoint.model.classes))],
        data={k: v for k, v in checkpoint.data.items() if k not in ("classes", "preprocessing")},
        preprocessing=checkpoint.preprocessing,
        graph=settings.graph if recursive else "single",
        steps=settings.steps,
        halt_threshold=settings.halt_threshold,
        trained_depth=checkpoint.trained_depth if recursive else None,
        precision=settings.precision,
        target=settings.target if settings.precision == "int8" else "any",
        exact_sums=settings.precision == "int8",
        calibration_id=calibration_id,
        weights_sha256=checkpoint.weights_id,
        run=Path(checkpoint.source).name,
        versions=_versions(),
    )


def write_verified(
    models: Mapping[str, ir.Model],
    metadata: Metadata,
    path: Path,
    model: ViTRM | Baseline,
    images: NDArray[np.float32],
    on_stage: OnStage,
) -> tuple[Metadata, Parity]:
    """Writes graphs to `path`, a file or a folder, verified against `model` on float32 images [≥ 7, 3, H, W].

    Returns the metadata with the parity, and the parity.  Raises `UserError` where the graphs answer otherwise than the
    model; nothing is left behind then.
    """
    with (atomic_path if "" in models else atomic_folder)(path) as temporary:
        on_stage("verifying")
        save(models, metadata, temporary)
        for file in models:
            onnx.checker.check_model(str(temporary / file), full_check=True)
            check_integer_sums(temporary / file)
        parity = verify(
            temporary,
            model,
            images,
            steps=metadata.steps,
            halt_threshold=metadata.halt_threshold,
            precision=metadata.precision,
        )
        metadata = with_parity(metadata, parity)
        save(models, metadata, temporary)
    return metadata, parity


def with_parity(metadata: Metadata, parity: Parity) -> Metadata:
    """The metadata with the part of a parity that an artifact itself keeps."""
    kept = {name: getattr(parity, name) for name in ("logits", "halt_prob", "agreement", "images")}
    return replace(metadata, parity=kept)


def save(models: Mapping[str, ir.Model], metadata: Metadata, path: Path) -> None:
    """Writes graphs, with their metadata, to the file or into the folder `path`."""
    for file, model in models.items():
        stored = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
        if stored > MAX_FILE:
            raise UserError(
                f"the weights take {stored / 1e9:.1f} GB, an ONNX file has at most {MAX_FILE / 1e9:.1f}: export with --fp16 or --int8"
            )
        model.metadata_props.clear()
        ir.save(model, path / file)
        write_metadata(path / file, path / file, metadata)


def _versions() -> dict[str, str]:
    versions = {}
    for package in ("vitrm", "torch", "onnx", "onnx-ir", "onnxscript"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
