"""Is this machine one that a plan was made for?  And if not, how to make one that is.

The GPU, TensorRT and the operating system are compared with the plan's side-car, before TensorRT sees the plan.
"""

from __future__ import annotations

from pathlib import Path

from vitrm.errors import UserError
from vitrm.runtime.artifact.plan_sidecar import (
    AMPERE_PLUS,
    VERSION_COMPATIBLE,
    BuildRecord,
    Sidecar,
    rebuild,
    this_system,
)
from vitrm.runtime.backends.tensorrt.api import FULL, INSTALL, NAMES, TensorRT, load_tensorrt, version_tuple
from vitrm.runtime.system.gpus import Gpus


def needs(engine: BuildRecord) -> str:
    """Says what the plan runs on."""
    gpu = " or ".join(engine.gpus)
    if AMPERE_PLUS in engine.flags:
        gpu = "compute capability 8.0 or later"
    name = f", built on an {engine.gpu_name}" if engine.gpu_name else ""
    return f"an NVIDIA GPU of {gpu}{name}, {NAMES[engine.flavour]} {engine.version}, {engine.system}"


def check_here(sidecar: Sidecar, plan: Path, gpus: Gpus, index: int = 0) -> TensorRT:
    """The TensorRT that opens `plan` on this machine with these `gpus`, of which number `index` is used.

    Raises `UserError` naming everything in which the machine differs from what the plan needs, and the way out.
    """
    engine = sidecar.engine
    differences = []
    gpu = gpus.found[index] if index < len(gpus.found) else None
    if gpu is None:
        differences.append(f"no GPU ({gpus.problem})")
    elif not _fits(engine, gpu.sm):
        differences.append(f"an {gpu}")
    if this_system() != engine.system:
        differences.append(this_system())
    trt: TensorRT | None = None
    missing = ""
    try:
        trt = load_tensorrt(engine.flavour)
    except UserError as error:
        missing = str(error)
        differences.append(f"no {NAMES[engine.flavour]}")
    else:
        if not _version_fits(engine, trt.version):
            differences.append(str(trt))
    if trt is not None and not differences:
        return trt
    message = f"{plan} needs {needs(engine)}; here: {', '.join(differences)}"
    if gpu is None:
        if engine.source.endswith(".onnx"):
            raise UserError(f"{message}: run it on such a machine, or here the file it was built from, {engine.source}")
        raise UserError(
            f"{message}: run it on such a machine, or export for this one: {rebuild(sidecar, plan.with_suffix('.onnx'))}"
        )
    if missing and len(differences) == 1:
        raise UserError(f"{message}: {missing}")
    buildable = trt.targets if trt else None
    if buildable is not None and gpu.sm not in buildable:
        raise UserError(
            f"{message}; {trt} builds for {', '.join(buildable)} alone: use TensorRT ({INSTALL[FULL]}) and build it here: "
            + rebuild(sidecar, plan, gpu.sm)
        )
    raise UserError(f"{message}: build it for this machine: {rebuild(sidecar, plan, gpu.sm)}")


def _fits(engine: BuildRecord, sm: str) -> bool:
    if AMPERE_PLUS in engine.flags and engine.flavour == FULL:
        return int(sm[2:]) >= 80
    return sm in engine.gpus


def _version_fits(engine: BuildRecord, version: str) -> bool:
    if version == engine.version:
        return True
    built, found = version_tuple(engine.version), version_tuple(version)
    return VERSION_COMPATIBLE in engine.flags and built[:1] == found[:1] and found >= built
