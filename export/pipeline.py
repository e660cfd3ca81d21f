"""export(): from a checkpoint to a verified file."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray

import vitrm.runtime
from vitrm.baselines import Baseline
from vitrm.calib.calibration import (
    Calibration,
    calibrate,
    calibration_images,
    check_calibration,
    load_calibration,
)
from vitrm.calib.float16_headroom import FLOAT16_MAX, Headroom, float16_headroom
from vitrm.calib.sensitivity import IMAGES as SENSITIVITY_IMAGES
from vitrm.calib.sensitivity import Sensitivity, sensitivity
from vitrm.calib.simulation import StateError, draw, state_error
from vitrm.calib.sites import Site
from vitrm.checkpoint import CONFIG_FILE, WEIGHTS_FILE, Checkpoint
from vitrm.config import ViTRMConfig, to_dict
from vitrm.data import Images, affordable, load, photo_crops
from vitrm.errors import UserError
from vitrm.export.graph import layouts as shapes
from vitrm.export.graph.fragments import Fragment, Fragments, trace_baseline, trace_vitrm
from vitrm.export.precision.accuracy_budget import Budget, keep_within
from vitrm.export.precision.conversion import half_fragments, int8_fragments, int8_vit
from vitrm.export.precision.float16 import to_half
from vitrm.export.precision.int8_conv import int8_convolutions
from vitrm.export.settings import NEVER, Request, default_steps, depth_note
from vitrm.export.tensorrt.build import Built, EngineOptions
from vitrm.export.verify import BATCHES, IMAGES, Parity, check_integer_sums, verify
from vitrm.model import ViTRM
from vitrm.runtime.artifact.metadata import Metadata
from vitrm.runtime.artifact.onnx_file import MAX_FILE, write_metadata
from vitrm.runtime.artifact.sidecar import SUFFIXES
from vitrm.runtime.backends.eager import EagerSession
from vitrm.runtime.bench.accuracy import predict
from vitrm.system.files import atomic_folder, atomic_path, lock_path
from vitrm.system.locks import lock
from vitrm.system.outputs import check_outputs

_MEBIBYTES = 256  # of verification images
_SIMULATED = 16  # images that the error of int8 is told from


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export made, and the evidence for it."""

    path: Path  # the file; of stepwise the folder
    metadata: Metadata
    parity: Parity
    bytes: int  # of the file, or of the folder's
    float32_bytes: int  # of the model's weights in float32
    weights: int  # weight tensors, each stored once in a file
    half_weights: int  # of them float16
    int8_weights: int  # of them int8
    calibration: Calibration | None  # of int8 activations; None for the other precisions, and for convolutions
    state_error: StateError | None  # of int8, on a few of the images; None for the other precisions
    budget: Budget | None  # what keeping `max_drop` took; None where nothing was asked
    nodes: int  # of the main graph, or of the three
    headroom: Headroom | None  # of float16 activations; None for fp32
    verified_on: str  # the images, in words
    depth_note: str | None  # where the depth is not one that was trained
    seconds: float  # for all of it
    engine: Built | None = None  # of a plan
    plan_verified: bool = False  # whether the parity is that of the plan itself, which needs its GPU


@dataclass(frozen=True, kw_only=True)
class Means:
    """What an export has at hand: the arguments of `export` that are not settings, of the same names."""

    calibration: Calibration | str | os.PathLike[str] | None
    sensitivity_file: str | os.PathLike[str] | None
    images: NDArray[np.float32] | None
    data_dir: str | os.PathLike[str] | None
    progress: Callable[[str], None]


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
    calibration: Calibration | str | os.PathLike[str] | None = None,
    estimator: str = "mse",
    max_drop: float | None = None,
    sensitivity_file: str | os.PathLike[str] | None = None,
    images: NDArray[np.float32] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    engine: EngineOptions | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> Exported:
    """Exports `checkpoint` to `path`, verified against eager before it gets that name.

    `graph` is "unrolled" (one ONNX file of fixed depth), "loop" (one file, depth and threshold are inputs) or
    "stepwise" (a folder of three files, driven by the runtime).  `steps` is the depth, or the default of a loop or
    stepwise: the depth that was trained where nothing is said (`Checkpoint.trained_depth`; 1 where that is not known; a
    baseline has none); more is taken as asked, and `Exported.depth_note` says so.  A `halt_threshold` below 1 turns per-sample halting on, there
    as the default; `every_step` adds the heads of each step as outputs (unrolled only).

    A `path` ending in .plan or .engine, or (for stepwise: a folder of three plans) an `engine`, makes a TensorRT plan of
    that graph, with its side-car; `engine` says for which GPUs and batch sizes.

    `precision` is "fp32", "fp16" or "int8"; int8 is made for a `target` ("cpu": ONNX Runtime's CPU provider, the default
    of an .onnx file; "tensorrt": products in int8 and float16 elsewhere, that of a plan) with the activation ranges of `calibration`: a calibration, or a file to read
    it from, or to write it to if it is not there yet (default: one made here, on training images, with `estimator`).
    Of two exports that make such a file at the same time the first one's is kept, and the other goes on with it.
    With `max_drop`, the sites that hurt most stay floating point until at most so many percentage points of accuracy are
    lost on the validation images; `sensitivity_file` is where to write how much each site hurts.

    `images` float32 [≥ 7, 3, H, W] in [0, 1] are what parity is checked on: by default 64 of the validation part of the
    run's data set, or natural photo crops where that is not at hand; `Exported.parity.images` says how many of them
    seconds sufficed for (`vitrm.export.verify`).  Raises `UserError` for impossible requests, a failed
    verification or an unwritable `path`; nothing is left behind then and what was there before stays as it was.
    """
    path = Path(path)
    plan = engine is not None or path.suffix in SUFFIXES
    _check_outputs(checkpoint, path, calibration, sensitivity_file)
    request = Request(
        kind=checkpoint.model.kind,
        steps=default_steps(checkpoint) if steps is None else steps,
        graph=graph,
        precision=precision,
        halt_threshold=halt_threshold,
        every_step=every_step,
        target=target or ("tensorrt" if plan else "cpu"),
        estimator=estimator,
        max_drop=max_drop,
    )
    means = Means(
        calibration=calibration,
        sensitivity_file=sensitivity_file,
        images=images,
        data_dir=data_dir,
        progress=progress,
    )
    if plan:
        from vitrm.export.tensorrt.export_plan import export_plan

        return export_plan(checkpoint, path, engine or EngineOptions(), request, means)
    return export_onnx(checkpoint, path, request, means)


def _check_outputs(
    checkpoint: Checkpoint,
    path: Path,
    calibration: Calibration | str | os.PathLike[str] | None,
    sensitivity_file: str | os.PathLike[str] | None,
) -> None:
    """Raises `UserError` where a file that this export writes would destroy another one."""
    outputs: dict[str, Path | None] = {"-o": path}
    inputs = [Path(checkpoint.source) / name for name in (CONFIG_FILE, WEIGHTS_FILE)]
    for option, given in (("--calibration", calibration), ("--sensitivity", sensitivity_file)):
        if given is None or isinstance(given, Calibration):
            continue
        file = Path(given)
        if option == "--calibration" and file.exists():
            inputs.append(file)
        else:
            outputs |= {option: file, f"{option}'s picture": file.with_suffix(".png")}
    check_outputs(outputs, inputs, replacing=["-o"])


def export_onnx(checkpoint: Checkpoint, path: Path, request: Request, means: Means) -> Exported:
    """`export` to an .onnx file, or for stepwise to a folder of three."""
    began = time.perf_counter()
    request.check(path, sensitivity=means.sensitivity_file is not None, calibration=means.calibration is not None)
    model = checkpoint.build()
    steps, precision, halt_threshold = request.steps, request.precision, request.halt_threshold
    images, data_dir, progress = means.images, means.data_dir, means.progress
    # Loaded first: a data set that is not there should not cost minutes of calibration.
    validation = _validation(checkpoint, data_dir) if request.max_drop is not None else None
    if images is None:
        images, verified_on = verification_images(checkpoint, data_dir)
    else:
        verified_on = "the given images"
    if len(images) < max(BATCHES):
        raise UserError(f"verification needs at least {max(BATCHES)} images, got {len(images)}")

    made = error = None
    if precision == "int8" and not request.convolutions:
        some = images[:_SIMULATED]
        made = _calibration(checkpoint, request, means, some)
        if isinstance(model, ViTRM):
            progress("simulating int8")
            error = state_error(checkpoint, made, some, target=request.target, shared=request.shares_steps)
    headroom = None
    if request.float16:
        progress("measuring float16 headroom")
        headroom = float16_headroom(model, torch.from_numpy(images[:IMAGES]), steps)
        if headroom.factor < 1:
            raise UserError(
                f"activations reach {headroom.where}, float16 ends at {FLOAT16_MAX:.0f}: export in another precision, or fewer "
                "steps"
            )
    progress("tracing")
    traced: Fragment | Fragments = trace_vitrm(model) if isinstance(model, ViTRM) else trace_baseline(model)
    metadata = Metadata(
        model=to_dict(checkpoint.model),
        classes=[str(c) for c in checkpoint.data.get("classes", range(checkpoint.model.classes))],
        data={k: v for k, v in checkpoint.data.items() if k != "classes"},
        graph=request.graph if isinstance(model, ViTRM) else "single",
        steps=steps,
        halt_threshold=halt_threshold,
        trained_depth=checkpoint.trained_depth if isinstance(model, ViTRM) else None,
        precision=precision,
        target=request.target if precision == "int8" else "any",
        exact_sums=precision == "int8",
        calibration_id=made.id if made else None,
        weights_sha256=checkpoint.weights_id,
        run=Path(checkpoint.source).name,
        versions=_versions(),
    )

    sites = None
    if made is not None and means.sensitivity_file is not None:
        sites = _sensitivity(checkpoint, made, images, request, progress)
        sites.save(means.sensitivity_file)
    budget = None
    if made is not None and request.max_drop is not None and validation is not None:

        def answers(floats: frozenset[Site]) -> NDArray[np.int64]:
            progress(
                f"int8 on validation images, {len(floats)} sites in floating point"
                if floats
                else "int8 on validation images"
            )
            with tempfile.TemporaryDirectory() as folder:
                candidate = Path(folder) / path.name
                if request.graph == "stepwise":
                    candidate.mkdir()
                _save(_models(model, traced, request, made, floats), metadata, candidate)
                return predict(vitrm.runtime.open(candidate), validation.pixels).top1

        progress("PyTorch on validation images")
        exact = predict(EagerSession(checkpoint, steps=steps, halt_threshold=halt_threshold), validation.pixels).top1
        budget = keep_within(
            request.max_drop,
            validation.labels,
            exact,
            answers,
            lambda: (sites or _sensitivity(checkpoint, made, images, request, progress)).ranked(),
        )
        metadata = replace(metadata, kept_float=[str(site) for site in sorted(budget.sites)])
    progress("assembling")
    models = _models(model, traced, request, made, budget.sites if budget else frozenset())
    if precision == "int8" and request.convolutions:
        progress("calibrating")
        models = {
            "": int8_convolutions(models[""], calibration_images(checkpoint, data_dir)[0].floats(), request.target)
        }
    with (atomic_folder if request.graph == "stepwise" else atomic_path)(path) as temporary:
        progress("verifying")
        _save(models, metadata, temporary)
        for file in models:
            onnx.checker.check_model(str(temporary / file), full_check=True)
            check_integer_sums(temporary / file)
        parity = verify(temporary, model, images, steps=steps, halt_threshold=halt_threshold, precision=precision)
        metadata = replace(metadata, parity=as_metadata(parity))
        _save(models, metadata, temporary)
    stored = {k: v for m in models.values() for k, v in m.graph.initializers.items() if not k.startswith("const.")}
    return Exported(
        path=path,
        metadata=metadata,
        parity=parity,
        bytes=sum((path / file).stat().st_size for file in models),
        float32_bytes=4 * sum(weight.numel() for weight in checkpoint.weights.values()),
        weights=sum(not k.endswith(".scale") for k in stored),
        half_weights=sum(v.dtype == ir.DataType.FLOAT16 and not k.endswith(".scale") for k, v in stored.items()),
        int8_weights=sum(v.dtype == ir.DataType.INT8 and not k.endswith(".scale") for k, v in stored.items()),
        calibration=made,
        state_error=error,
        budget=budget,
        nodes=sum(len(list(m.graph)) for m in models.values()),
        headroom=headroom,
        verified_on=verified_on,
        depth_note=depth_note(checkpoint, steps),
        seconds=time.perf_counter() - began,
    )


def _models(
    model: ViTRM | Baseline,
    traced: Fragment | Fragments,
    request: Request,
    calibration: Calibration | None,
    floats: frozenset[Site],
) -> dict[str, ir.Model]:
    """The graphs, by file name in the folder; the one graph of a single file by "".  int8 leaves the sites `floats` out."""
    if isinstance(traced, Fragment):
        if calibration is not None:
            made = int8_vit(traced, calibration, request.target)
        else:
            made = to_half(traced) if request.float16 else traced
        return {"": shapes.single(made, model.config.image_size)}
    assert isinstance(model, ViTRM)
    fragments: tuple[Fragments, ...] = (half_fragments(traced) if request.float16 else traced,)
    if calibration is not None:
        numbers = [None] if request.shares_steps else range(1, request.steps + 1)
        fragments = tuple(int8_fragments(traced, calibration, request.target, n, floats) for n in numbers)
    recursion = shapes.Recursion(model.config, fragments[0], fragments if len(fragments) > 1 else ())
    if request.graph == "stepwise":
        return {f"{part}.onnx": m for part, m in shapes.stepwise(recursion).items()}
    if request.graph == "loop":
        return {"": shapes.loop(recursion)}
    return {"": shapes.unrolled(recursion, request.steps, request.halt_threshold, request.every_step)}


def as_metadata(parity: Parity) -> dict[str, float]:
    """What of a parity the artifact itself keeps."""
    return {
        "logits": parity.logits,
        "halt_prob": parity.halt_prob,
        "agreement": parity.agreement,
        "images": parity.images,
    }


def _validation(checkpoint: Checkpoint, data_dir: str | os.PathLike[str] | None) -> Images:
    """The validation part of the checkpoint's data set, to judge accuracy on; raises `UserError` where it is not at hand."""
    name, size = str(checkpoint.data.get("name", "")), checkpoint.model.image_size
    try:
        return load(name, "validation", data_dir=data_dir, size=size)
    except UserError as error:
        raise UserError(f"--max-drop is judged on validation images: {error}") from None


def verification_images(
    checkpoint: Checkpoint, data_dir: str | os.PathLike[str] | None, count: int = IMAGES
) -> tuple[NDArray[np.float32], str]:
    """Real images to check parity on, float32 [n, 3, H, W] in [0, 1], and what they are, in words.

    The first `count` of the validation part of the checkpoint's data set, or fewer where they are large or there are no
    more; natural photo crops where the set is not at hand, or in addition where it has too few.
    """
    size, name, least = checkpoint.model.image_size, str(checkpoint.data.get("name", "")), max(BATCHES)
    count = affordable(count, size, _MEBIBYTES, least=least)
    try:
        images = load(name, "validation", data_dir=data_dir, size=size).floats(slice(0, count))
    except UserError as error:
        if data_dir is not None:
            raise
        reason = str(error).split(":")[0]
        return photo_crops(count, size).astype(np.float32) / np.float32(255), f"crops of photographs ({reason})"
    if len(images) >= least:
        return images, f"{name}'s validation images"
    crops = photo_crops(count - len(images), size).astype(np.float32) / np.float32(255)
    return np.concatenate([images, crops]), (
        f"{name}'s validation images, which are {len(images)}, and crops of photographs"
    )


def _calibration(
    checkpoint: Checkpoint,
    request: Request,
    means: Means,
    images: NDArray[np.float32],
) -> Calibration:
    """The calibration given, read from the file given, or made now and written there, with its picture."""
    steps, given = request.steps, means.calibration
    if isinstance(given, Calibration):
        check_calibration(given, checkpoint, steps, "the calibration given")
        return given
    if given is not None and Path(given).exists():
        return load_calibration(given, checkpoint, steps)
    made = calibrate(
        checkpoint,
        steps,
        estimator=request.estimator,
        data_dir=means.data_dir,
        progress=lambda done: means.progress(f"calibrating, {done:.0%}"),
    )
    if given is not None:
        with lock(lock_path(Path(given)), str(given), "try again"):
            # Another export may have written it in the meantime: the first one's ranges hold, as they would have before.
            if Path(given).exists():
                return load_calibration(given, checkpoint, steps)
            made.save(given)
        if isinstance(checkpoint.model, ViTRMConfig):
            shared, own = (
                state_error(checkpoint, made, images, target=request.target, shared=s) for s in (True, False)
            )
            draw(shared, own, made, Path(given).with_suffix(".png"))
    return made


def _sensitivity(
    checkpoint: Checkpoint,
    calibration: Calibration,
    images: NDArray[np.float32],
    request: Request,
    progress: Callable[[str], None],
) -> Sensitivity:
    return sensitivity(
        checkpoint,
        calibration,
        images[:SENSITIVITY_IMAGES],
        target=request.target,
        shared=request.shares_steps,
        progress=lambda done: progress(f"measuring each site's sensitivity, {done:.0%}"),
    )


def _save(models: dict[str, ir.Model], metadata: Metadata, path: Path) -> None:
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
    found = {}
    for package in ("vitrm", "torch", "onnx", "onnx-ir", "onnxscript"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
