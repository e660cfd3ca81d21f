"""export() to a TensorRT plan: the ONNX file exactly as without one, verified, then built, and verified again where a GPU is."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vitrm.checkpoint import Checkpoint
from vitrm.errors import UserError
from vitrm.export import pipeline as artifact
from vitrm.export.settings import Request
from vitrm.export.tensorrt.build import Built, EngineOptions, build_engine, check_plan_path, toolchain
from vitrm.export.verify import Parity, verify
from vitrm.runtime.artifact.metadata import Metadata

if TYPE_CHECKING:
    from vitrm.export.pipeline import Exported, Means


def export_plan(checkpoint: Checkpoint, path: Path, options: EngineOptions, request: Request, means: Means) -> Exported:
    """`vitrm.export.export` to the plan `path`, or for stepwise to a folder of three."""
    stepwise = request.graph == "stepwise"
    check_plan_path(path, stepwise=stepwise)
    if request.precision == "int8" and request.target == "cpu":
        raise UserError(
            "a plan's int8 is that of TensorRT (Q/DQ with float16 around it), --target cpu makes ONNX Runtime's: leave out "
            "--target cpu, or name an .onnx file"
        )
    toolchain(options)  # refuses here rather than after minutes of calibration
    images, verified_on = means.images, "the given images"
    if images is None:
        images, verified_on = artifact.verification_images(checkpoint, means.data_dir)
    with tempfile.TemporaryDirectory() as scratch:
        graphs = Path(scratch) / ("graphs" if stepwise else "graph.onnx")
        made = artifact.export_onnx(checkpoint, graphs, request, replace(means, images=images))
        parity: list[Parity] = []

        def check(plan: Path) -> Metadata:
            found = verify(
                plan,
                checkpoint.build(),
                images,
                steps=request.steps,
                halt_threshold=request.halt_threshold,
                precision=request.precision,
            )
            parity.append(found)
            return replace(made.metadata, parity=artifact.as_metadata(found))

        built: Built = build_engine(
            made.path,
            path,
            options,
            metadata=made.metadata,
            source=str(checkpoint.source),
            check=check,
            progress=means.progress,
        )
    return replace(
        made,
        path=path,
        metadata=next(iter(built.sidecars.values())).metadata,
        parity=parity[0] if parity else made.parity,
        bytes=built.bytes,
        verified_on=verified_on,
        seconds=made.seconds + built.seconds,
        engine=built,
        plan_verified=bool(parity),
    )
