"""The result of an export: what was written, and the evidence for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vitrm.calib.calibration import Calibration
from vitrm.calib.float16_headroom import Headroom
from vitrm.calib.state_error import StateError
from vitrm.export.precision.accuracy_budget import Budget
from vitrm.export.tensorrt.build import BuildResult
from vitrm.export.verify import Parity
from vitrm.runtime.artifact.metadata import Metadata


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """An artifact, and the evidence for it."""

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
    budget: Budget | None  # the cost of keeping `max_drop`; None where nothing was asked
    nodes: int  # of the main graph, or of the three
    headroom: Headroom | None  # of float16 activations; None for fp32
    verified_on: str  # the images, in words
    depth_note: str | None  # a warning where the depth is not one that was trained
    seconds: float  # for all of it
    plan: BuildResult | None = None  # None for ONNX alone
    plan_verified: bool = False  # whether the parity is that of the plan itself, which needs its GPU
