"""Stages "build" and "verify" of a plan: from the verified ONNX file, and verified again where its GPU is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitrm.checkpoint import Checkpoint
from vitrm.export.result import ExportResult
from vitrm.export.settings import OnStage
from vitrm.export.tensorrt.build import build_engine
from vitrm.export.tensorrt.options import PlanOptions
from vitrm.export.verify import Parity, verify
from vitrm.export.write import with_parity
from vitrm.runtime.artifact.metadata import Metadata


def build_verified(
    onnx: ExportResult,
    path: Path,
    checkpoint: Checkpoint,
    options: PlanOptions,
    images: NDArray[np.float32],
    on_stage: OnStage,
) -> ExportResult:
    """Builds the plan `path` from an exported ONNX file, or for stepwise a folder of three from a folder.

    Where it can run here, it is verified on float32 images [≥ 7, 3, H, W]; raises `UserError` where it answers otherwise
    than the model, or cannot be built.
    """
    parity: list[Parity] = []

    def check(plan: Path) -> Metadata:
        m = onnx.metadata
        parity.append(
            verify(
                plan,
                checkpoint.build(),
                images,
                steps=m.steps,
                halt_threshold=m.halt_threshold,
                precision=m.precision,
            )
        )
        return with_parity(m, parity[-1])

    build = build_engine(
        onnx.path,
        path,
        options,
        metadata=onnx.metadata,
        source=str(checkpoint.source),
        check=check,
        progress=on_stage,
    )
    return replace(
        onnx,
        path=path,
        metadata=next(iter(build.sidecars.values())).metadata,
        parity=parity[0] if parity else onnx.parity,
        bytes=build.bytes,
        seconds=onnx.seconds + build.seconds,
        plan=build,
        plan_verified=bool(parity),
    )
