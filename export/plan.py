"""export() to a TensorRT plan: the ONNX file exactly as without one, verified, then built, and verified again where a GPU is."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vitrm.checkpoint import Checkpoint
from vitrm.errors import UserError
from vitrm.export import artefact
from vitrm.export.engine import Built, EngineOptions, build_engine, check_plan_path, toolchain
from vitrm.export.verification import Parity, verify
from vitrm.runtime.metadata import Metadata

if TYPE_CHECKING:
    from vitrm.export.artefact import Exported


def export_plan(
    checkpoint: Checkpoint,
    path: Path,
    options: EngineOptions,
    *,
    graph: str,
    precision: str,
    halt_threshold: float,
    target: str | None,
    images: NDArray[np.float32] | None,
    data_dir: Any,
    progress: Callable[[str], None],
    **settings: Any,
) -> Exported:
    """`vitrm.export.export` to the plan `path`, or for stepwise to a folder of three; `settings` are its others."""
    check_plan_path(path, stepwise=graph == "stepwise")
    if precision == "int8" and target == "cpu":
        raise UserError(
            "a plan's int8 is that of TensorRT (Q/DQ with float16 around it), --target cpu makes ONNX Runtime's: leave out "
            "--target cpu, or name an .onnx file"
        )
    toolchain(options)  # refuses here rather than after minutes of calibration
    verified_on = "the given images"
    if images is None:
        images, verified_on = artefact.verification_images(checkpoint, data_dir)
    with tempfile.TemporaryDirectory() as scratch:
        made = artefact.export(
            checkpoint,
            Path(scratch) / ("graphs" if graph == "stepwise" else "graph.onnx"),
            graph=graph,
            precision=precision,
            halt_threshold=halt_threshold,
            target="tensorrt" if precision == "int8" else None,
            images=images,
            data_dir=data_dir,
            progress=progress,
            **settings,
        )
        parity: list[Parity] = []

        def check(plan: Path) -> Metadata:
            found = verify(
                plan,
                checkpoint.build(),
                images,
                steps=made.metadata.steps,
                halt_threshold=halt_threshold,
                precision=precision,
            )
            parity.append(found)
            return replace(made.metadata, parity=artefact.as_metadata(found))

        built: Built = build_engine(
            made.path,
            path,
            options,
            metadata=made.metadata,
            source=str(checkpoint.source),
            check=check,
            progress=progress,
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
