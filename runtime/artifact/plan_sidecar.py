"""`NAME.plan.json` beside `NAME.plan`: what is inside, and where alone the plan runs.

A plan is machine code for one kind of GPU, one TensorRT and one operating system, and opening it executes it.  So
everything is compared before TensorRT sees the file: that it is the file that was written (SHA-256), and that this
machine is one it was made for (vitrm.runtime.backends.tensorrt.check_machine).  The plan itself stays raw, so that trtexec
reads it too.

What the side-car says decides about answers as well (depth, threshold, classes) and about where the plan is opened, so it
holds a SHA-256 of itself: `sha256`, of its other values (vitrm.system.strict_json.digest).
"""

from __future__ import annotations

import dataclasses
import json
import platform
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitrm.errors import UserError, explain_os_error
from vitrm.runtime.artifact.graph_names import PLAN_SUFFIXES
from vitrm.runtime.artifact.metadata import DIGEST_SINCE, Metadata
from vitrm.runtime.artifact.onnx_file import inspect
from vitrm.runtime.backends.tensorrt.api import MODULES
from vitrm.system import strict_json
from vitrm.system.files import check_regular, read_json, sha256_of

VERSION_COMPATIBLE, STRIPPED, REFITTABLE = "version_compatible", "strip_weights", "refit"
AMPERE_PLUS = "hardware_compatible"
NOT_CHECKED = (
    "its side-car was written by vitrm 0.1, without a SHA-256 of its own: damage to it would not be noticed; build the plan "
    "again to have one"
)
_DIGEST = "sha256"
_MAX_BATCH = 1 << 20


@dataclass(frozen=True, kw_only=True)
class BuildRecord:
    """Record of a build: what a plan was built with, and for."""

    flavour: str  # full (TensorRT) or rtx (TensorRT for RTX)
    version: str  # of TensorRT
    gpus: list[str]  # compute capabilities it runs on, as "sm89"
    gpu_name: str | None  # the GPU it was built on; None where it was built without one, for `gpus`
    system: str  # operating system and architecture: "Linux x86_64"
    profiles: list[list[int]]  # batch sizes [min, opt, max] of each optimization profile
    flags: list[str]  # builder flags asked for
    workspace_mib: int | None  # limit of the builder's scratch memory
    source: str  # the run, or the ONNX file, that it was made from
    sha256: str  # of the plan
    bytes: int  # of the plan


@dataclass(frozen=True)
class Sidecar:
    """The whole of it."""

    metadata: Metadata
    engine: BuildRecord

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-ready values: the metadata's fields, `engine` and the digest of both."""
        values = {**self.metadata.to_dict(), "engine": dataclasses.asdict(self.engine)}
        return values if self.metadata.format < DIGEST_SINCE else {**values, _DIGEST: strict_json.digest(values)}

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks for users of the plan."""
        return () if self.metadata.format >= DIGEST_SINCE else (NOT_CHECKED,)


def sidecar_path(plan: Path) -> Path:
    """Returns the path of the side-car of `plan`."""
    return plan.with_name(plan.name + ".json")


def weights_path(plan: Path) -> Path:
    """Beside a plan without weights: the ONNX file they come from."""
    return plan.with_name(plan.name + ".onnx")


def this_system() -> str:
    """Operating system and architecture, as far as a plan depends on them."""
    return f"{platform.system()} {platform.machine()}"


def read_sidecar(plan: Path) -> Sidecar:
    """Reads the side-car of `plan` and checks that the plan is the file it speaks of.

    Raises `UserError` when it is missing or damaged, or the plan is another file or not whole.
    """
    path = sidecar_path(plan)
    if not path.exists():
        raise UserError(
            f"{plan} has no side-car {path.name}, which says what is inside and where it may run: copy it along, or build "
            "the plan with vitrm-export (trtexec runs plans without one)"
        )
    check_regular(plan, "plan")
    values = read_json(path, "side-car")
    told = values.pop(_DIGEST, None)
    if told is not None and told != strict_json.digest(values):
        raise UserError(
            f"{path} is damaged, or was changed after the plan was built (its SHA-256 is another than it says), so {plan} is not "
            "opened: copy both files again, or build the plan again"
        )
    engine = values.pop("engine", None)
    fields = {f.name for f in dataclasses.fields(BuildRecord)}
    if not isinstance(engine, dict) or set(engine) != fields:
        found = sorted(engine) if isinstance(engine, dict) else type(engine).__name__
        raise UserError(f"{path}: its engine section is {found}, expected {sorted(fields)}: build the plan again")
    metadata = Metadata.from_dict(values, str(path))
    if told is None and metadata.format >= DIGEST_SINCE:
        raise UserError(f"{path} lacks its {_DIGEST}: copy both files again, or build the plan again")
    sidecar = Sidecar(metadata, BuildRecord(**engine))
    if not _plausible(sidecar.engine):
        raise UserError(
            f"{path}: its engine section has values of other kinds than this version writes: build it again"
        )
    try:
        size = plan.stat().st_size
        if size != sidecar.engine.bytes:
            raise UserError(
                f"{plan} has {size} bytes, its side-car says {sidecar.engine.bytes}: it is not whole, or another plan; copy "
                "both files again, or build it again: " + rebuild(sidecar, plan)
            )
        digest = sha256_of(plan)
    except OSError as error:
        raise explain_os_error(error, f"reading {plan}") from error
    if digest != sidecar.engine.sha256:
        raise UserError(
            f"{plan} has SHA-256 {digest[:12]}…, its side-car says {sidecar.engine.sha256[:12]}…: it was changed after it "
            "was built, so it is not opened (a plan is code); build it again: " + rebuild(sidecar, plan)
        )
    return sidecar


def read_weights(plan: Path, metadata: Metadata) -> Path:
    """The ONNX file beside `plan` that holds its weights, checked; `metadata` is the plan's own.

    Raises `UserError` where it is not there, damaged, or has other weights than the plan was built from.
    """
    path = weights_path(plan)
    if not path.is_file():
        raise UserError(f"{plan} holds no weights and {path} is not there: copy it along")
    found = inspect(path).metadata.weights_sha256
    if found != metadata.weights_sha256:
        raise UserError(
            f"{path} has other weights ({found[:12]}) than {plan} was built from ({metadata.weights_sha256[:12]}): copy both "
            "files again, or build the plan again"
        )
    return path


def _plausible(engine: BuildRecord) -> bool:
    """Tells whether the values are of the kinds, and within the bounds, that are read below."""
    lists = (engine.gpus, engine.flags, engine.profiles)
    texts = (engine.version, engine.system, engine.sha256, engine.source, engine.gpu_name or "")
    return (
        isinstance(engine.flavour, str)
        and engine.flavour in MODULES
        and all(isinstance(v, str) and len(v) <= 4096 for v in texts)
        and re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})*[A-Za-z0-9.+-]{0,32}", engine.version) is not None
        and all(isinstance(v, list) and len(v) <= 64 for v in lists)
        and bool(engine.gpus)
        and all(isinstance(v, str) and re.fullmatch(r"sm[0-9]{2,3}", v) for v in engine.gpus)
        and all(v in (VERSION_COMPATIBLE, STRIPPED, REFITTABLE, AMPERE_PLUS) for v in engine.flags)
        and bool(engine.profiles)
        and all(
            isinstance(p, list) and len(p) == 3 and all(map(_whole, p)) and 1 <= p[0] <= p[1] <= p[2] <= _MAX_BATCH
            for p in engine.profiles
        )
        and _whole(engine.bytes)
        and (engine.workspace_mib is None or _whole(engine.workspace_mib))
    )


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def rebuild(sidecar: Sidecar, path: Path, gpu: str | None = None) -> str:
    """The command that makes the artifact `path` anew, with the plan's own settings; `gpu` replaces its targets."""
    m, e = sidecar.metadata, sidecar.engine
    words = ["vitrm-export", e.source]
    if not e.source.endswith(".onnx"):
        if m.recursive:
            words += ["--steps", str(m.steps)]
        if m.glimpses != "none":
            words += ["--glimpses", m.glimpses]
        if m.graph in ("loop", "stepwise"):
            words += ["--graph", m.graph]
        if m.halt_threshold < 1:
            words += ["--halt-threshold", f"{m.halt_threshold:g}"]
        words += {"fp16": ["--fp16"], "int8": ["--int8"]}.get(m.precision, [])
    if path.suffix in PLAN_SUFFIXES or path.suffix == "":
        # A stepwise artifact is known by its folder.
        folder = m.graph == "stepwise"
        words += ["-o", str(path.parent if folder else path), *(["--plan"] if folder else [])]
        for profile in e.profiles:
            words += ["--batch", ",".join(map(str, profile))]
        words += [f"--{flag.replace('_', '-')}" for flag in e.flags]
        if e.workspace_mib is not None:
            words += ["--workspace", str(e.workspace_mib)]
        targets = [gpu] if gpu else e.gpus
        words += ["--gpu", ",".join(targets)]
    else:
        if m.precision == "int8":
            words += ["--target", "cpu"]
        folder = m.graph == "stepwise"
        words += ["-o", str(path.parent.with_suffix("")) + "-onnx" if folder else str(path)]
    return shlex.join(words)


def write_sidecar(sidecar: Sidecar, path: Path) -> None:
    """Writes it to `path`: part of a group of files that get their names together, so not atomic by itself."""
    path.write_text(json.dumps(sidecar.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
