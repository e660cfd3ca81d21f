"""export(): from a checkpoint to a verified file."""

from __future__ import annotations

import os
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

from vitrm.baselines import Baseline
from vitrm.calib.calibration import Calibration, calibrate, check_calibration, load_calibration
from vitrm.calib.headroom import FLOAT16_MAX, Headroom, float16_headroom
from vitrm.calib.ranges import Range
from vitrm.calib.simulation import StateError, draw, state_error
from vitrm.checkpoint import Checkpoint
from vitrm.config import to_dict
from vitrm.data import load, photo_crops
from vitrm.errors import UserError
from vitrm.export import shapes
from vitrm.export.fragments import BODY, Fragment, Fragments, trace_baseline, trace_vitrm
from vitrm.export.half import to_half
from vitrm.export.int8 import TARGETS, to_int8
from vitrm.export.verification import BATCHES, Parity, verify
from vitrm.files import atomic_folder, atomic_path
from vitrm.model import ViTRM
from vitrm.runtime.metadata import PARTS, Metadata

GRAPHS = ("unrolled", "loop", "stepwise")
PRECISIONS = ("fp32", "fp16", "int8")
MAX_STEPS = 256  # each adds nodes to an unrolled file
_SIMULATED = 16  # images that the error of int8 is told from
NEVER = 2.0  # a halt_threshold no probability exceeds


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export made, and the evidence for it."""

    path: Path  # the file; of stepwise the folder
    metadata: Metadata
    parity: Parity
    bytes: int  # of the file, or of the folder's
    weights: int  # weight tensors, each stored once in a file
    half_weights: int  # of them float16
    int8_weights: int  # of them int8
    calibration: Calibration | None  # of int8 activations; None for the other precisions
    state_error: StateError | None  # of int8, on a few of the images; None for the other precisions
    nodes: int  # of the main graph, or of the three
    headroom: Headroom | None  # of float16 activations; None for fp32
    verified_on: str  # the images, in words
    seconds: float  # for all of it


def export(
    checkpoint: Checkpoint,
    path: str | os.PathLike[str],
    *,
    steps: int | None = None,
    graph: str = "unrolled",
    precision: str = "fp32",
    halt_threshold: float = NEVER,
    every_step: bool = False,
    target: str = "cpu",
    calibration: Calibration | str | os.PathLike[str] | None = None,
    images: NDArray[np.float32] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> Exported:
    """Exports `checkpoint` to `path`, verified against eager before it gets that name.

    `graph` is "unrolled" (one ONNX file of fixed depth), "loop" (one file, depth and threshold are inputs) or
    "stepwise" (a folder of three files, driven by the runtime).  `steps` is the depth, or the default of a loop or
    stepwise (6 where nothing is said; a baseline has none); a `halt_threshold` below 1 turns per-sample halting on, there
    as the default; `every_step` adds the heads of each step as outputs (unrolled only).

    `precision` is "fp32", "fp16" or "int8"; int8 is made for a `target` ("cpu": ONNX Runtime's CPU provider, "tensorrt":
    products in int8 and float16 elsewhere) with the activation ranges of `calibration`: a calibration, or a file to read
    it from, or to write it to if it is not there yet (default: one made here, on training images).  `images` float32
    [≥ 7, 3, H, W] in [0, 1] are what parity is checked on: by default the validation part of the run's data set, or
    natural photo crops where that is not at hand.  Raises `UserError` for impossible requests, a failed verification
    or an unwritable `path`; nothing is left behind then and what was there before stays as it was.
    """
    start = time.perf_counter()
    path = Path(path)
    model = checkpoint.build()
    steps = _check(model, path, steps, graph, precision, target, halt_threshold, every_step)
    if images is None:
        images, verified_on = verification_images(checkpoint, data_dir)
    else:
        verified_on = "the given images"
    if len(images) < max(BATCHES):
        raise UserError(f"verification needs at least {max(BATCHES)} images, got {len(images)}")

    made = error = None
    if precision == "int8":
        some = images[:_SIMULATED]
        made = _calibration(checkpoint, steps, calibration, some, target, data_dir, progress)
        progress("simulating int8")
        error = state_error(checkpoint, made, some, target=target, shared=graph != "unrolled")
    headroom = None
    half = precision == "fp16" or (precision == "int8" and target == "tensorrt")
    if half:
        progress("measuring float16 headroom")
        headroom = float16_headroom(model, torch.from_numpy(images[:64]), steps)
        if headroom.factor < 1:
            raise UserError(
                f"activations reach {headroom.where}, float16 ends at {FLOAT16_MAX:.0f}: export in another precision, or fewer "
                "steps"
            )
    progress("tracing")
    traced: Fragment | Fragments = trace_vitrm(model) if isinstance(model, ViTRM) else trace_baseline(model)
    by_step: tuple[Fragments, ...] = ()
    if precision == "int8":
        assert isinstance(traced, Fragments)
        assert made is not None
        if graph == "unrolled":
            by_step = tuple(_int8(traced, made, target, step) for step in range(1, steps + 1))
        traced = by_step[0] if by_step else _int8(traced, made, target, None)
    if half:
        traced, by_step = _half(traced), tuple(f for f in map(_half, by_step) if isinstance(f, Fragments))
    progress("assembling")
    models: dict[str, ir.Model]  # by file name in the folder; the one model of a single file by ""
    if isinstance(traced, Fragment):
        models, graph = {"": shapes.single(traced, model.config.image_size)}, "single"
    else:
        assert isinstance(model, ViTRM)
        recursion = shapes.Recursion(model.config, traced, by_step)
        if graph == "stepwise":
            models = {f"{part}.onnx": m for part, m in shapes.stepwise(recursion).items()}
        elif graph == "loop":
            models = {"": shapes.loop(recursion)}
        else:
            models = {"": shapes.unrolled(recursion, steps, halt_threshold, every_step)}
    metadata = Metadata(
        model=to_dict(checkpoint.model),
        classes=[str(c) for c in checkpoint.data.get("classes", range(checkpoint.model.classes))],
        data={k: v for k, v in checkpoint.data.items() if k != "classes"},
        graph=graph,
        steps=steps,
        halt_threshold=halt_threshold,
        precision=precision,
        target=target if precision == "int8" else "any",
        calibration_id=made.id if made else None,
        weights_sha256=checkpoint.weights_id,
        run=Path(checkpoint.source).name,
        versions=_versions(),
    )
    with (atomic_folder if graph == "stepwise" else atomic_path)(path) as temporary:
        progress("verifying")
        _save(models, metadata, temporary)
        for file in models:
            onnx.checker.check_model(str(temporary / file), full_check=True)
        parity = verify(temporary, model, images, steps=steps, halt_threshold=halt_threshold, precision=precision)
        metadata = replace(
            metadata,
            parity={
                "logits": parity.logits,
                "halt_prob": parity.halt_prob,
                "agreement": parity.agreement,
                "images": parity.images,
            },
        )
        _save(models, metadata, temporary)
    stored = {k: v for m in models.values() for k, v in m.graph.initializers.items() if not k.startswith("const.")}
    return Exported(
        path=path,
        metadata=metadata,
        parity=parity,
        bytes=sum((path / file).stat().st_size for file in models),
        weights=sum(not k.endswith(".scale") for k in stored),
        half_weights=sum(v.dtype == ir.DataType.FLOAT16 and not k.endswith(".scale") for k, v in stored.items()),
        int8_weights=sum(v.dtype == ir.DataType.INT8 for v in stored.values()),
        calibration=made,
        state_error=error,
        nodes=sum(len(list(m.graph)) for m in models.values()),
        headroom=headroom,
        verified_on=verified_on,
        seconds=time.perf_counter() - start,
    )


def verification_images(
    checkpoint: Checkpoint, data_dir: str | os.PathLike[str] | None, count: int = 64
) -> tuple[NDArray[np.float32], str]:
    """Real images to check parity on, float32 [count, 3, H, W] in [0, 1], and what they are, in words.

    The validation part of the checkpoint's data set; natural photo crops where the set is not at hand.
    """
    size, name = checkpoint.model.image_size, str(checkpoint.data.get("name", ""))
    try:
        part = load(name, "validation", data_dir=data_dir, size=size)
        if len(part) >= max(BATCHES):
            return part.floats(slice(0, count)), f"{name}'s validation images"
        reason = f"{name} has only {len(part)} validation images"
    except UserError as error:
        if data_dir is not None:
            raise
        reason = str(error).split(":")[0]
    return photo_crops(count, size).astype(np.float32) / np.float32(255), f"crops of photographs ({reason})"


def _check(
    model: ViTRM | Baseline,
    path: Path,
    steps: int | None,
    graph: str,
    precision: str,
    target: str,
    halt_threshold: float,
    every_step: bool,
) -> int:
    """The depth to export at; raises `UserError` for what cannot be exported."""
    if path.suffix == ".plan" or path.suffix == ".engine":
        raise UserError(
            f"{path}: this version writes .onnx files; build the plan from one with: trtexec --onnx=FILE.onnx --saveEngine={path}"
        )
    if graph not in GRAPHS:
        raise UserError(f"graph is {graph!r}, expected one of {', '.join(GRAPHS)}")
    if graph == "stepwise":
        _check_folder(path)
    elif path.suffix != ".onnx":
        raise UserError(f"{path}: expected a file name ending in .onnx")
    elif path.is_dir():
        raise UserError(f"{path} is a folder: name a file")
    if precision not in PRECISIONS:
        raise UserError(f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")
    if target not in TARGETS:
        raise UserError(f"target is {target!r}, expected one of {', '.join(TARGETS)}")
    if precision == "int8" and isinstance(model, Baseline):
        raise UserError(f"int8 is for ViTRMs, this is a {model.config.kind}: quantise it with a tool made for those")
    if not halt_threshold > 0:
        raise UserError(f"halt threshold is {halt_threshold}, expected a number above 0 (1 or more never halts)")
    if isinstance(model, Baseline):
        if steps not in (None, 1) or every_step or halt_threshold < 1 or graph == "stepwise":
            raise UserError(
                f"a {model.config.kind} has no recursion: leave out --steps, --every-step, --halt-threshold and "
                "--graph stepwise, or name a vitrm run"
            )
        return 1
    steps = 6 if steps is None else steps
    if not 1 <= steps <= MAX_STEPS:
        raise UserError(f"steps is {steps}, expected 1 to {MAX_STEPS}")
    if every_step and graph != "unrolled":
        raise UserError(f"--every-step needs --graph unrolled: a {graph} graph gives its last answer only")
    return steps


def _check_folder(path: Path) -> None:
    """Raises `UserError` unless a stepwise artefact may take the place of `path`: only another one may be replaced."""
    if path.suffix == ".onnx":
        raise UserError(f"{path}: a stepwise artefact is a folder of three files: leave out .onnx")
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file: name a folder")
    if path.is_dir():
        files = {p.name for p in path.iterdir()}
        if files - {f"{part}.onnx" for part in PARTS}:
            raise UserError(f"{path} is a folder with other things in it: name a new one")


def _calibration(
    checkpoint: Checkpoint,
    steps: int,
    given: Calibration | str | os.PathLike[str] | None,
    images: NDArray[np.float32],
    target: str,
    data_dir: str | os.PathLike[str] | None,
    progress: Callable[[str], None],
) -> Calibration:
    """The calibration given, read from the file given, or made now and written there, with its picture."""
    if isinstance(given, Calibration):
        check_calibration(given, checkpoint, steps, "the calibration given")
        return given
    if given is not None and Path(given).exists():
        return load_calibration(given, checkpoint, steps)
    made = calibrate(checkpoint, steps, data_dir=data_dir, progress=lambda done: progress(f"calibrating, {done:.0%}"))
    if given is not None:
        made.save(given)
        shared, own = (state_error(checkpoint, made, images, target=target, shared=s) for s in (True, False))
        draw(shared, own, made, Path(given).with_suffix(".png"))
    return made


def _int8(traced: Fragments, calibration: Calibration, target: str, step: int | None) -> Fragments:
    """int8 fragments with the ranges of one step, or those that all steps share."""

    def made(role: str) -> Fragment:
        def range_of(layer: str) -> Range:
            if role == "embed":
                return calibration.at(0, role, layer)
            return calibration.shared(role, layer) if step is None else calibration.at(step, role, layer)

        return to_int8(getattr(traced, role), range_of, target)

    return replace(traced, **{role: made(role) for role in BODY})


def _half(traced: Fragment | Fragments) -> Fragment | Fragments:
    if isinstance(traced, Fragment):
        return to_half(traced)
    return replace(traced, **{name: to_half(getattr(traced, name)) for name in BODY})


def _save(models: dict[str, ir.Model], metadata: Metadata, path: Path) -> None:
    for file, model in models.items():
        model.metadata_props.clear()
        model.metadata_props.update(metadata.to_props())
        ir.save(model, path / file)


def _versions() -> dict[str, str]:
    found = {}
    for package in ("vitrm", "torch", "onnx", "onnx-ir", "onnxscript"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
