"""export(): from a checkpoint to a verified file, stage by stage.

calibrate → trace → quantize → assemble → verify → write, and for TensorRT → build → verify
"""

from __future__ import annotations

import functools
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

import vitrm.runtime
from vitrm.baselines.networks import Baseline
from vitrm.calib.calibration import Calibration
from vitrm.calib.float16_headroom import FLOAT16_MAX, Headroom, float16_headroom
from vitrm.calib.sensitivity import SENSITIVITY_IMAGES, sensitivity
from vitrm.calib.sites import Site
from vitrm.checkpoint import Checkpoint
from vitrm.data import Images
from vitrm.errors import UserError
from vitrm.export.graph.assemble import assemble
from vitrm.export.graph.fragments import Fragment, Fragments, trace_baseline, trace_vitrm
from vitrm.export.images import ExportImages
from vitrm.export.precision.accuracy_budget import Budget, keep_within
from vitrm.export.precision.conversion import convert
from vitrm.export.precision.int8_conv_networks import quantize_network
from vitrm.export.precision.scales import Scales, find_scales
from vitrm.export.result import ExportResult
from vitrm.export.settings import ExportSettings, OnStage, default_steps, depth_note
from vitrm.export.tensorrt.export_plan import build_verified
from vitrm.export.tensorrt.options import PlanOptions
from vitrm.export.tensorrt.toolchain import toolchain
from vitrm.export.verify import VERIFICATION_IMAGES
from vitrm.export.write import describe, save, write_verified
from vitrm.model import ViTRM
from vitrm.model_limits import NEVER
from vitrm.runtime.artifact.graph_names import PLAN_SUFFIXES
from vitrm.runtime.artifact.metadata import Metadata
from vitrm.runtime.backends.eager import EagerSession
from vitrm.runtime.bench.accuracy import predict


def export(
    checkpoint: Checkpoint,
    path: str | os.PathLike[str],
    *,
    steps: int | None = None,
    graph: str = "unrolled",
    precision: str = "fp32",
    halt_threshold: float = NEVER,
    every_step: bool = False,
    target: str | None = None,
    int8_convolutions: bool = False,
    calibration: Calibration | str | os.PathLike[str] | None = None,
    calibration_method: str = "mse",
    max_drop: float | None = None,
    sensitivity_file: str | os.PathLike[str] | None = None,
    images: NDArray[np.float32] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    plan: PlanOptions | None = None,
    progress: OnStage = lambda message: None,
) -> ExportResult:
    """Exports a checkpoint to a file, verified against eager PyTorch before it gets its name.

    Args (`ExportSettings` says more of the settings among them):
        checkpoint, path: the model; the file to write: .onnx, .plan or .engine (TensorRT plans), for stepwise a folder.
        steps: the depth.  Default: the depth that was trained, 1 where that is not known; a deeper one is noted in the result.
        graph: "unrolled" (fixed depth), "loop" (depth and threshold are inputs) or "stepwise" (three files in a folder).
        precision: "fp32", "fp16" or "int8".
        halt_threshold: the halt_prob in (0, 1) beyond which a sample halts; 1 or more never halts.
        every_step: True to output the heads of each step too (unrolled only).
        target: the target of int8, "cpu" or "tensorrt".  Default: "tensorrt" for a plan, else "cpu".
        int8_convolutions: True for the tokenizer's convolutions in int8, too; of a ViTRM, for a CPU.
        calibration: int8's activation ranges, or a file of them.  Default: found on training images.
        calibration_method: "minmax", "percentile", "mse" or "entropy", for ranges found here.
        max_drop, sensitivity_file: points of accuracy that int8 may lose on validation images; a file for each site's harm.
        images: float32 [≥ 7, 3, H, W] in [0, 1] to verify on.  Default: 64 validation images, or photo crops.
        data_dir, progress: the folder of the data set; called with the name of each stage that begins.
        plan: GPUs, batch sizes and flags of a TensorRT plan; with "stepwise" it makes a folder of plans.

    Returns the artifact's path, sizes and metadata, and the evidence for it.

    Raises:
        UserError: for impossible settings, a failed verification or an unwritable `path`; all is then as it was before.
    """
    plan = plan or (PlanOptions() if Path(path).suffix in PLAN_SUFFIXES else None)
    settings = ExportSettings(
        kind=checkpoint.model.kind,
        steps=default_steps(checkpoint) if steps is None else steps,
        graph=graph,
        precision=precision,
        halt_threshold=halt_threshold,
        every_step=every_step,
        target=target or ("cpu" if plan is None else "tensorrt"),
        int8_convolutions=int8_convolutions,
        calibration=calibration,
        calibration_method=calibration_method,
        max_drop=max_drop,
        sensitivity_file=sensitivity_file,
        plan=plan,
    )
    return run_stages(checkpoint, Path(path), settings, ExportImages(checkpoint, data_dir, images), progress)


def run_stages(
    checkpoint: Checkpoint, path: Path, settings: ExportSettings, images: ExportImages, on_stage: OnStage
) -> ExportResult:
    """Checks the settings, exports an ONNX graph, and builds a plan from it where one is asked for."""
    settings.check(path, checkpoint)
    if settings.plan is None:
        return export_onnx(checkpoint, path, settings, images, on_stage)
    toolchain(settings.plan)  # refuses here rather than after minutes of calibration
    with tempfile.TemporaryDirectory() as scratch:
        graphs = Path(scratch) / ("graphs" if settings.graph == "stepwise" else "graph.onnx")
        onnx = export_onnx(checkpoint, graphs, settings, images, on_stage)
        return build_verified(onnx, path, checkpoint, settings.plan, images.verification[0], on_stage)


def export_onnx(
    checkpoint: Checkpoint, path: Path, settings: ExportSettings, images: ExportImages, on_stage: OnStage
) -> ExportResult:
    """Exports to an .onnx file, or for stepwise to a folder of three.

    Args:
        checkpoint: the model.
        path: the file or folder to write.
        settings: checked settings.
        images: the images to calibrate, judge and verify on.
        on_stage: told of each stage.

    Returns:
        The artifact, and the evidence for it.

    Raises:
        UserError: for data that is not there, activations that int8 or float16 cannot hold, a calibration of something
            else, and a graph that answers otherwise than the model.
    """
    began = time.perf_counter()
    model = checkpoint.build()
    # Loaded first: a data set that is not there should not cost minutes of calibration.
    validation = images.validation() if settings.max_drop is not None else None
    verification, verified_on = images.verification

    scales = find_scales(settings, images, on_stage)
    headroom = _float16_headroom(model, verification, settings, on_stage)
    on_stage("tracing")
    traced = trace_vitrm(model) if isinstance(model, ViTRM) else trace_baseline(model)
    metadata = describe(checkpoint, settings, scales.calibration.id if scales else None)
    budget = _keep_floats(checkpoint, traced, metadata, scales, validation, settings, images, on_stage)
    if budget is not None:
        metadata = replace(metadata, kept_float=[str(site) for site in sorted(budget.sites)])
    on_stage("assembling")
    models = _graphs(checkpoint, traced, settings, scales, budget.sites if budget else frozenset())
    if settings.precision == "int8" and settings.convolutional:
        on_stage("calibrating")
        models = {"": quantize_network(models[""], images.calibration(), settings.target)}
    metadata, parity = write_verified(models, metadata, path, model, verification, on_stage)

    types = _weight_types(models)
    return ExportResult(
        path=path,
        metadata=metadata,
        parity=parity,
        bytes=sum((path / file).stat().st_size for file in models),
        float32_bytes=4 * sum(weight.numel() for weight in checkpoint.weights.values()),
        weights=len(types),
        half_weights=types.count(ir.DataType.FLOAT16),
        int8_weights=types.count(ir.DataType.INT8),
        nodes=sum(len(list(graph.graph)) for graph in models.values()),
        calibration=scales.calibration if scales else None,
        state_error=scales.state_error if scales else None,
        budget=budget,
        headroom=headroom,
        verified_on=verified_on,
        depth_note=depth_note(checkpoint, settings.steps),
        seconds=time.perf_counter() - began,
    )


def _float16_headroom(
    model: ViTRM | Baseline, images: NDArray[np.float32], settings: ExportSettings, on_stage: OnStage
) -> Headroom | None:
    """The headroom of float16, where tensors are.  Raises `UserError` where there is none."""
    if not settings.float16:
        return None
    on_stage("measuring float16 headroom")
    headroom = float16_headroom(model, torch.from_numpy(images[:VERIFICATION_IMAGES]), settings.steps)
    if headroom.factor < 1:
        raise UserError(
            f"activations reach {headroom.where}, float16 ends at {FLOAT16_MAX:.0f}: export in another precision, or fewer "
            "steps"
        )
    return headroom


def _keep_floats(
    checkpoint: Checkpoint,
    traced: Fragment | Fragments,
    metadata: Metadata,
    scales: Scales | None,
    validation: Images | None,
    settings: ExportSettings,
    images: ExportImages,
    on_stage: OnStage,
) -> Budget | None:
    """The sites to keep in floating point for `max_drop`; writes the sensitivity of all where that is asked for."""
    if scales is None:
        return None
    measured = functools.cache(
        lambda: sensitivity(
            checkpoint,
            scales.calibration,
            scales.table,
            images.verification[0][:SENSITIVITY_IMAGES],
            progress=lambda done: on_stage(f"measuring each site's sensitivity, {done:.0%}"),
        )
    )
    if settings.sensitivity_file is not None:
        measured().save(settings.sensitivity_file)
    if settings.max_drop is None or validation is None:
        return None

    def answers(floats: frozenset[Site]) -> NDArray[np.int64]:
        more = f", {len(floats)} sites in floating point" if floats else ""
        on_stage(f"int8 on validation images{more}")
        with tempfile.TemporaryDirectory() as folder:
            candidate = Path(folder) / ("stepwise" if settings.graph == "stepwise" else "candidate.onnx")
            if settings.graph == "stepwise":
                candidate.mkdir()
            save(_graphs(checkpoint, traced, settings, scales, floats), metadata, candidate)
            return predict(vitrm.runtime.open(candidate), validation.pixels).top1

    on_stage("PyTorch on validation images")
    eager = EagerSession(checkpoint, steps=settings.steps, halt_threshold=settings.halt_threshold)
    exact = predict(eager, validation.pixels).top1
    return keep_within(settings.max_drop, validation.labels, exact, answers, lambda: measured().ranked())


def _graphs(
    checkpoint: Checkpoint,
    traced: Fragment | Fragments,
    settings: ExportSettings,
    scales: Scales | None,
    floats: frozenset[Site],
) -> dict[str, ir.Model]:
    """Quantizes, but for the sites `floats`, and assembles."""
    table = scales.table if scales else None
    if table is not None:  # a convolution's output stays floating point with its input
        table = replace(table, params={s: p for s, p in table.params.items() if s.of_input not in floats})
    fragments = convert(traced, float16=settings.float16, table=table, steps=settings.steps)
    return assemble(checkpoint.model, fragments, settings)


def _weight_types(models: dict[str, ir.Model]) -> list[ir.DataType | None]:
    """The type of every weight tensor stored; scales and small constants are none."""
    stored = {name: value for model in models.values() for name, value in model.graph.initializers.items()}
    return [v.dtype for name, v in stored.items() if not name.startswith("const.") and not name.endswith(".scale")]
