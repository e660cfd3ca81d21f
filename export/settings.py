"""The settings of an export, checked before any of the work begins."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vitrm.baseline_configs import CONVOLUTIONAL
from vitrm.calib.methods import METHODS
from vitrm.config import with_article
from vitrm.errors import UserError
from vitrm.export.tensorrt.options import PlanOptions, check_plan_path
from vitrm.model_limits import NEVER
from vitrm.runtime.artifact.graph_names import PARTS
from vitrm.runtime.artifact.metadata import PRECISIONS
from vitrm.system.outputs import check_outputs

if TYPE_CHECKING:
    from vitrm.calib.calibration import Calibration
    from vitrm.checkpoint import Checkpoint

LAYOUTS = ("unrolled", "loop", "stepwise")
INT8_TARGETS = ("cpu", "tensorrt")
MAX_UNROLLED = 256  # each adds nodes to an unrolled file
MAX_THRESHOLD = 1000  # it becomes a float32, and JSON, which has no infinity

OnStage = Callable[[str], None]  # told of each stage that begins, in words


def default_steps(checkpoint: Checkpoint) -> int:
    """The depth of an export that names none: the depth that was trained, as deeper steps may answer worse.

    1 where the checkpoint does not say: every training reaches the first step.
    """
    return checkpoint.trained_depth or 1


def depth_note(checkpoint: Checkpoint, steps: int) -> str | None:
    """A warning about an export at `steps` steps; None at a depth that was trained."""
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
class ExportSettings:
    """The settings of `vitrm.export.export`, of the same names."""

    kind: str  # of the model: of vitrm.config.KINDS
    steps: int  # the depth; of a loop or stepwise the default at run time; 1 for a baseline
    # One of LAYOUTS: one file of fixed depth; one file whose depth and threshold are inputs; a folder of three files that
    # the runtime drives.
    graph: str = "unrolled"
    precision: str = "fp32"  # one of PRECISIONS
    # A sample halts once its halt_prob exceeds this; of a loop or stepwise the default at run time.
    halt_threshold: float = NEVER
    every_step: bool = False  # whether an unrolled graph outputs the heads of each step too
    target: str = "cpu"  # of int8, one of INT8_TARGETS: ONNX Runtime's CPU provider, or int8 with float16 around it
    # Whether int8 is for a ViTRM's tokenizer, too, on a CPU: all convolutions but the first ones.
    int8_convolutions: bool = False
    # A file that is not there yet is written.  Of two exports that write one at the same time the first one's is kept, and
    # the other goes on with it.
    calibration: Calibration | str | os.PathLike[str] | None = None
    calibration_method: str = "mse"  # one of METHODS
    # Percentage points of accuracy on validation images: the sites that hurt most stay floating point until no more is lost.
    max_drop: float | None = None
    sensitivity_file: str | os.PathLike[str] | None = None
    plan: PlanOptions | None = None  # of a TensorRT plan; None for ONNX alone

    @property
    def convolutional(self) -> bool:
        """True where int8 is for convolutions, not for linear layers."""
        return self.kind in CONVOLUTIONAL

    @property
    def shares_steps(self) -> bool:
        """True where one graph serves all steps, and so one set of int8 scales."""
        return self.graph != "unrolled"

    @property
    def float16(self) -> bool:
        """True where tensors are float16, but for those that are int8."""
        return self.precision == "fp16" or (
            self.precision == "int8" and self.target == "tensorrt" and not self.convolutional
        )

    def check(self, path: Path, checkpoint: Checkpoint) -> None:
        """Checks every setting, and that the artifact of `checkpoint` may be written to `path`.

        Raises:
            UserError: for what cannot be exported, or not to `path`.
        """
        self._check_overwriting(path, checkpoint)
        if self.plan is not None:
            check_plan_path(path, stepwise=self.graph == "stepwise")
            if self.precision == "int8" and self.target == "cpu":
                raise UserError(
                    "a plan's int8 is that of TensorRT (Q/DQ with float16 around it), --target cpu makes ONNX Runtime's: "
                    "leave out --target cpu, or name an .onnx file"
                )
        else:
            self._check_onnx_path(path)
        self._check_choices()
        if self.kind != "vitrm":
            self._check_baseline()
        if self.int8_convolutions:
            self._check_int8_convolutions(checkpoint)
        self._check_numbers()
        if self.every_step and self.graph != "unrolled":
            raise UserError(f"--every-step needs --graph unrolled: a {self.graph} graph gives its last answer only")

    def _check_int8_convolutions(self, checkpoint: Checkpoint) -> None:
        if self.precision != "int8" or self.target != "cpu":
            raise UserError(
                f"--int8-convolutions is for int8 on a CPU, this is {self.precision} for {self.target}: TensorRT's convolutions "
                "stay float16, as too many answers would be others; leave it out"
            )
        if getattr(checkpoint.model, "tokenizer", "patch") == "patch":
            raise UserError(
                f"--int8-convolutions is for a tokenizer of several convolutions, {checkpoint.source} has none to make int8 beside "
                "what --int8 does: leave it out"
            )

    def _check_overwriting(self, path: Path, checkpoint: Checkpoint) -> None:
        """Raises `UserError` where a file of this export would destroy another one, or one of the checkpoint."""
        from vitrm.checkpoint import CONFIG_FILE, WEIGHTS_FILE

        outputs: dict[str, Path | None] = {"-o": path}
        inputs = [Path(checkpoint.source) / name for name in (CONFIG_FILE, WEIGHTS_FILE)]
        for option, given in (("--calibration", self.calibration), ("--sensitivity", self.sensitivity_file)):
            if not isinstance(given, (str, os.PathLike)):
                continue
            file = Path(given)
            if option == "--calibration" and file.exists():
                inputs.append(file)
            else:
                outputs |= {option: file, f"{option}'s picture": file.with_suffix(".png")}
        check_outputs(outputs, inputs, replacing=["-o"])

    def _check_onnx_path(self, path: Path) -> None:
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise UserError(f"{path}: its name is not UTF-8, and ONNX Runtime opens no other: name another") from None
        if self.graph == "stepwise":
            _check_folder(path)
        elif path.suffix != ".onnx":
            raise UserError(f"{path}: expected a file name ending in .onnx, or .plan for TensorRT")
        elif path.is_dir():
            raise UserError(f"{path} is a folder: name a file")

    def _check_choices(self) -> None:
        for name, value, choices in (
            ("graph", self.graph, LAYOUTS),
            ("precision", self.precision, PRECISIONS),
            ("target", self.target, INT8_TARGETS),
            ("calibration method", self.calibration_method, METHODS),
        ):
            if value not in choices:
                raise UserError(f"{name} is {value!r}, expected one of {', '.join(choices)}")

    def _check_numbers(self) -> None:
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

    def _check_baseline(self) -> None:
        kind = with_article(self.kind)
        if self.precision == "int8" and self.convolutional and self.calibration is not None:
            raise UserError(f"--calibration is for ViTRMs, ViTs and CCTs, {kind} is calibrated anew: leave it out")
        if self.max_drop is not None or self.sensitivity_file is not None:
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
