"""Options of a TensorRT plan beside its graph."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from vitrm.errors import UserError
from vitrm.fields import Whole, checked, shown
from vitrm.runtime.artifact.graph_names import PARTS, PLAN_SUFFIXES
from vitrm.runtime.artifact.plan_sidecar import AMPERE_PLUS

DEFAULT_PROFILE = (1, 8, 64)  # batch sizes of the one profile that is made where none is asked for
MAX_PROFILE_BATCH = 1 << 20
MAX_WORKSPACE = 1 << 20  # MiB: a tebibyte
# Names in TensorRT's BuilderFlag; hardware_compatible is a setting of its own.
BUILDER_FLAGS = {"version_compatible": "VERSION_COMPATIBLE", "strip_weights": "STRIP_PLAN", "refit": "REFIT"}


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Options of a TensorRT plan beside its graph."""

    gpus: tuple[str, ...] = ()  # compute capabilities, as "sm89"; none: the GPU present, or all that can be
    profiles: tuple[tuple[int, int, int], ...] = (
        DEFAULT_PROFILE,
    )  # batch sizes (min, opt, max) of each optimization profile
    workspace_mib: int | None = None  # limit of the builder's scratch memory
    timing_cache: Path | None = None  # of TensorRT; None: beside the plan, one for each GPU and version
    version_compatible: bool = False  # also runs in later TensorRT of the same major version
    hardware_compatible: bool = False  # also runs on other GPUs, of compute capability 8.0 and later
    strip_weights: bool = False  # the plan holds no weights: they come from the ONNX file when it is opened
    refit: bool = False  # weights of the plan can be replaced
    flavour: str | None = None  # full or rtx, where both are installed

    @property
    def flags(self) -> list[str]:
        """The flags that are set, by the names that side-cars give them."""
        return [name for name in (*BUILDER_FLAGS, AMPERE_PLUS) if getattr(self, name)]

    def check(self) -> None:
        """Raises `UserError` for batch sizes, memory or flags that no TensorRT takes."""
        for profile in self.profiles:
            if len(profile) != 3 or not 1 <= profile[0] <= profile[1] <= profile[2] <= MAX_PROFILE_BATCH:
                raise UserError(
                    f"batch sizes are {shown(list(profile))}, expected MIN,OPT,MAX with 1 ≤ MIN ≤ OPT ≤ MAX ≤ {MAX_PROFILE_BATCH:,}"
                )
        if self.workspace_mib is not None:
            checked("workspace, in MiB,", self.workspace_mib, Whole(1, MAX_WORKSPACE))
        if self.strip_weights and self.refit:
            raise UserError("a plan without weights is refitted whenever it is opened: leave out --refit")


def normal_gpu(text: str) -> str:
    """Spells a compute capability ("sm89", "SM_89", "89" or "8.9") as "sm89"; raises `UserError` for anything else."""
    match = re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)", text.strip().lower())
    if not match:
        raise UserError(f"GPU is {text!r}, expected a compute capability such as sm89 (GeForce RTX 40) or sm87 (Orin)")
    return f"sm{match[1]}{match[2]}"


def check_plan_path(path: Path, *, stepwise: bool) -> None:
    """Raises `UserError` unless a plan may be written to `path`, or a stepwise folder of plans may take its place."""
    if not stepwise:
        if path.suffix not in PLAN_SUFFIXES:
            raise UserError(f"{path}: expected a file name ending in .plan or .engine")
        if path.is_dir():
            raise UserError(f"{path} is a folder: name a file")
        return
    if path.suffix == ".onnx":
        raise UserError(f"{path}: a stepwise plan is a folder of three plans: name a folder")
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file: a stepwise plan is a folder of three, name a folder")
    ours = {f"{part}.plan{suffix}" for part in PARTS for suffix in ("", ".json", ".onnx")}
    if path.is_dir() and {p.name for p in path.iterdir()} - ours:
        raise UserError(f"{path} is a folder with other things in it: name a new one")
