"""What is asked of an export, checked before any of the work begins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vitrm.baselines import Baseline, ViT
from vitrm.calib.ranges import ESTIMATORS
from vitrm.errors import UserError
from vitrm.export.int8 import TARGETS
from vitrm.model import ViTRM
from vitrm.runtime.metadata import PARTS

GRAPHS = ("unrolled", "loop", "stepwise")
PRECISIONS = ("fp32", "fp16", "int8")
MAX_STEPS = 256  # each adds nodes to an unrolled file
NEVER = 2.0  # a halt_threshold no probability exceeds


@dataclass(frozen=True, kw_only=True)
class Request:
    """The settings of `vitrm.export.export`, of the same names."""

    steps: int
    graph: str
    precision: str
    halt_threshold: float
    every_step: bool
    target: str
    estimator: str
    max_drop: float | None
    convolutions: bool  # whether int8 is for convolutions, not for linear layers

    @property
    def shares_steps(self) -> bool:
        """Whether one graph serves all steps, and so one set of int8 scales."""
        return self.graph != "unrolled"

    @property
    def float16(self) -> bool:
        """Whether tensors are float16, but for what is int8."""
        return self.precision == "fp16" or (
            self.precision == "int8" and self.target == "tensorrt" and not self.convolutions
        )


def check(
    model: ViTRM | Baseline,
    path: Path,
    *,
    steps: int | None,
    graph: str,
    precision: str,
    halt_threshold: float,
    every_step: bool,
    target: str,
    estimator: str,
    max_drop: float | None,
    sensitivity: bool = False,
    calibration: bool = False,
) -> Request:
    """The request, with the depth filled in; raises `UserError` for what cannot be exported, or not to `path`."""
    if graph not in GRAPHS:
        raise UserError(f"graph is {graph!r}, expected one of {', '.join(GRAPHS)}")
    if graph == "stepwise":
        _check_folder(path)
    elif path.suffix != ".onnx":
        raise UserError(f"{path}: expected a file name ending in .onnx, or .plan for TensorRT")
    elif path.is_dir():
        raise UserError(f"{path} is a folder: name a file")
    if precision not in PRECISIONS:
        raise UserError(f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")
    if target not in TARGETS:
        raise UserError(f"target is {target!r}, expected one of {', '.join(TARGETS)}")
    if estimator not in ESTIMATORS:
        raise UserError(f"estimator is {estimator!r}, expected one of {', '.join(ESTIMATORS)}")
    convolutions = isinstance(model, Baseline) and not isinstance(model.net, ViT)
    if precision == "int8" and convolutions and calibration:
        raise UserError(f"--calibration is for ViTRMs and ViTs, a {model.config.kind} is calibrated anew: leave it out")
    if isinstance(model, Baseline) and (max_drop is not None or sensitivity):
        raise UserError(f"--max-drop and --sensitivity are for ViTRMs, this is a {model.config.kind}: leave them out")
    if max_drop is not None and (precision != "int8" or not 0 <= max_drop <= 100):
        raise UserError(f"max drop is {max_drop} at {precision}, expected 0 to 100 percentage points, at int8")
    if not halt_threshold > 0:
        raise UserError(f"halt threshold is {halt_threshold}, expected a number above 0 (1 or more never halts)")
    if isinstance(model, Baseline):
        if steps not in (None, 1) or every_step or halt_threshold < 1 or graph == "stepwise":
            raise UserError(
                f"a {model.config.kind} has no recursion: leave out --steps, --every-step, --halt-threshold and "
                "--graph stepwise, or name a vitrm run"
            )
        steps = 1
    steps = 6 if steps is None else steps
    if not 1 <= steps <= MAX_STEPS:
        raise UserError(f"steps is {steps}, expected 1 to {MAX_STEPS}")
    if every_step and graph != "unrolled":
        raise UserError(f"--every-step needs --graph unrolled: a {graph} graph gives its last answer only")
    return Request(
        steps=steps,
        graph=graph,
        precision=precision,
        halt_threshold=halt_threshold,
        every_step=every_step,
        target=target,
        estimator=estimator,
        max_drop=max_drop,
        convolutions=convolutions,
    )


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
