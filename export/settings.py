"""What is asked of an export, checked before any of the work begins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vitrm.baseline_configs import CONVOLUTIONAL
from vitrm.calib.ranges import ESTIMATORS
from vitrm.checkpoint import Checkpoint
from vitrm.config import with_article
from vitrm.errors import UserError
from vitrm.export.precision.int8_linear import TARGETS
from vitrm.runtime.artifact.metadata import PARTS

GRAPHS = ("unrolled", "loop", "stepwise")
PRECISIONS = ("fp32", "fp16", "int8")
MAX_UNROLLED = 256  # each adds nodes to an unrolled file
MAX_THRESHOLD = 1000  # it becomes a float32, and JSON, which has no infinity
NEVER = 2.0  # a halt_threshold no probability exceeds


def default_steps(checkpoint: Checkpoint) -> int:
    """The depth of an export that names none: the depth that was trained, as deeper steps may answer worse.

    1 where the checkpoint does not say: every training reaches the first step.
    """
    return checkpoint.trained_depth or 1


def depth_note(checkpoint: Checkpoint, steps: int) -> str | None:
    """What is to be known of an export at `steps` steps; None at a depth that was trained."""
    trained = checkpoint.trained_depth
    if trained is None:
        source = checkpoint.source or "the checkpoint"
        return (
            f"{source} does not say how deep it was trained: any training reaches 1 step, deeper ones may answer worse"
        )
    if steps > trained:
        return f"{steps} steps, deeper than the {trained} step{'s' * (trained > 1)} it was trained to, which may answer worse"
    return None


@dataclass(frozen=True, kw_only=True)
class Request:
    """The settings of `vitrm.export.export`, of the same names."""

    kind: str  # of the model: of vitrm.config.KINDS
    steps: int
    graph: str
    precision: str
    halt_threshold: float
    every_step: bool
    target: str
    estimator: str
    max_drop: float | None

    @property
    def convolutions(self) -> bool:
        """Whether int8 is for convolutions, not for linear layers."""
        return self.kind in CONVOLUTIONAL

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

    def check(self, path: Path, *, sensitivity: bool, calibration: bool) -> None:
        """Raises `UserError` for what cannot be exported, or not to `path`, or not with what is given beside it."""
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise UserError(f"{path}: its name is not UTF-8, and ONNX Runtime opens no other: name another") from None
        if self.graph not in GRAPHS:
            raise UserError(f"graph is {self.graph!r}, expected one of {', '.join(GRAPHS)}")
        if self.graph == "stepwise":
            _check_folder(path)
        elif path.suffix != ".onnx":
            raise UserError(f"{path}: expected a file name ending in .onnx, or .plan for TensorRT")
        elif path.is_dir():
            raise UserError(f"{path} is a folder: name a file")
        if self.precision not in PRECISIONS:
            raise UserError(f"precision is {self.precision!r}, expected one of {', '.join(PRECISIONS)}")
        if self.target not in TARGETS:
            raise UserError(f"target is {self.target!r}, expected one of {', '.join(TARGETS)}")
        if self.estimator not in ESTIMATORS:
            raise UserError(f"estimator is {self.estimator!r}, expected one of {', '.join(ESTIMATORS)}")
        if self.kind != "vitrm":
            self._check_baseline(sensitivity, calibration)
        if self.max_drop is not None and (self.precision != "int8" or not 0 <= self.max_drop <= 100):
            raise UserError(
                f"max drop is {self.max_drop} at {self.precision}, expected 0 to 100 percentage points, at int8"
            )
        if not 0 < self.halt_threshold <= MAX_THRESHOLD:
            raise UserError(
                f"halt threshold is {self.halt_threshold}, expected a number above 0, at most {MAX_THRESHOLD} (1 or more never halts)"
            )
        if not 1 <= self.steps <= MAX_UNROLLED:
            raise UserError(f"steps is {self.steps}, expected 1 to {MAX_UNROLLED}")
        if self.every_step and self.graph != "unrolled":
            raise UserError(f"--every-step needs --graph unrolled: a {self.graph} graph gives its last answer only")

    def _check_baseline(self, sensitivity: bool, calibration: bool) -> None:
        kind = with_article(self.kind)
        if self.precision == "int8" and self.convolutions and calibration:
            raise UserError(f"--calibration is for ViTRMs, ViTs and CCTs, {kind} is calibrated anew: leave it out")
        if self.max_drop is not None or sensitivity:
            raise UserError(f"--max-drop and --sensitivity are for ViTRMs, this is {kind}: leave them out")
        if self.steps != 1 or self.every_step or self.halt_threshold < 1 or self.graph == "stepwise":
            raise UserError(
                f"{kind} has no recursion: leave out --steps, --every-step, --halt-threshold and "
                "--graph stepwise, or name a vitrm run"
            )


def _check_folder(path: Path) -> None:
    """Raises `UserError` unless a stepwise artifact may take the place of `path`: only another one may be replaced."""
    if path.suffix == ".onnx":
        raise UserError(f"{path}: a stepwise artifact is a folder of three files: leave out .onnx")
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file: name a folder")
    if path.is_dir():
        files = {p.name for p in path.iterdir()}
        if files - {f"{part}.onnx" for part in PARTS}:
            raise UserError(f"{path} is a folder with other things in it: name a new one")
