"""Results of a bench as data: ready for JSON, for the table and for the report."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitrm.classification.confusion import Classification
from vitrm.runtime.artifact.metadata import Metadata
from vitrm.runtime.bench.accuracy import Comparison, Predictions
from vitrm.runtime.bench.images import Sample
from vitrm.runtime.bench.latency import Latency
from vitrm.runtime.bench.robustness.measure import Robustness
from vitrm.runtime.halting.choose import HaltingChoice, HaltingPoint

FORMAT = 3  # 1 spelled the kind of a row "artefact"; up to 2 a halting point had a drop_bound, not the images lost and gained
OK = "ok"


@dataclass(frozen=True, kw_only=True)
class Flips:
    """Images on which an artifact and its reference are not both right or both wrong."""

    gained: int  # reference wrong, artifact right
    lost: int  # reference right, artifact wrong


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """Figures of one case at one batch size."""

    name: str  # the artifact's file, what another tool made of it, or "eager PyTorch" or "torch.compile"
    kind: str  # artifact, peer, eager or compiled; eager-bf16 or compiled-bf16
    status: str = OK  # "ok", or why it could not run
    backend: str | None = None  # onnxruntime-cpu, pytorch-cpu …
    graph: str | None = None  # unrolled, loop, stepwise, single; eager for PyTorch
    precision: str | None = None  # fp32, fp16 or int8
    steps: int | None = None  # recursion steps; None for a baseline
    halt_threshold: float | None = None  # 1 or more never halts; None for a baseline
    batch: int  # images per run
    latency_ms: Latency | None = None  # of a whole batch
    device_ms: Latency | None = None  # of it, on the GPU's own clock, without copies from and to the host
    images_per_s: float | None = None  # batch / mean latency
    speedup: float | None = None  # times as fast as its eager model, from the same rounds
    speedup_range: tuple[float, float] | None = None  # the middle 80 % of the rounds
    watts: float | None = None  # mean while it runs over and over; None where no sensor says
    joules_per_image: float | None = None
    joules_per_correct_image: float | None = None  # that, divided by accuracy
    power_scope: str | None = None  # what was measured: the rails, packages or board, idle power included
    clocks_mhz: dict[str, float] | None = None  # mean meanwhile, of those that can be read: cpu, gpu, gpu_memory
    images: int | None = None  # images that accuracy and agreement were measured on
    accuracy: float | None = None  # top-1, in [0, 1]; None without labels
    accuracy_interval: tuple[float, float] | None = None  # Wilson, 95 %
    top5_accuracy: float | None = None  # in [0, 1]; None without labels, or for few classes
    balanced_accuracy: float | None = None  # mean recall of the classes, in [0, 1]
    agreement: float | None = None  # share of images with the eager model's top-1 answer, in [0, 1]
    flips: Flips | None = None
    max_logit_difference: float | None = None  # largest |Δlogit| from eager; None also where one is not finite
    halt_agreement: float | None = None  # share of images whose halt_prob > 0.5 says the same
    mean_steps_used: float | None = None
    halted_first: float | None = None  # share of images that halted after their first step; None where none may halt
    accuracy_without_halting: float | None = None  # of the same artifact where no image halts, where that was measured
    halting_speedup: float | None = (
        None  # times as fast as the same artifact where no image halts, from the same rounds
    )
    halting_speedup_range: tuple[float, float] | None = None  # the middle 80 % of the rounds
    halt_ece: float | None = None  # expected calibration error of halt_prob against being right, in [0, 1]
    steps_used_agreement: float | None = None  # share of images that used as many steps as the eager model
    bytes: int | None = None  # of the artifact's file; of the weights in memory for eager
    device_bytes: int | None = None  # memory on the GPU, where it is counted
    compiled_graphs: int | None = (
        None  # that torch.compile made for this batch size; None where nothing is compiled as it runs
    )
    device: str | None = None  # in words
    threads: int | None = None  # CPU threads
    run: str | None = None  # the checkpoint it comes from
    weights_sha256: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return self.status == OK


@dataclass(frozen=True, kw_only=True)
class ClassResults:
    """An artifact's results by class."""

    name: str  # the artifact's, with its setting where it is measured at several
    data: str
    result: Classification

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-ready values."""
        return {"name": self.name, "data": self.data, **self.result.to_dict()}


@dataclass(frozen=True, kw_only=True)
class DepthCurve:
    """A recursive model's accuracy after each step, eager, with the artifacts' own points on the same images."""

    run: str
    accuracy: tuple[float, ...]  # at depth 1, 2, …
    halt_prob: tuple[float, ...]  # mean over the images, at depth 1, 2, …
    images: int
    points: tuple[tuple[str, float, float], ...]  # (artifact, mean steps used, accuracy)
    steps: int  # full depth, at which halting is compared: that of the deepest artifact
    halting: tuple[
        HaltingPoint, ...
    ]  # what it would have given in `steps`, by rising threshold, never last; else empty
    glimpses: str = "none"  # what each step looks at
    total: int | None = None  # images that the artifacts were measured on, of which `images` are a random part
    trained_depth: int | None = None  # the deepest step that training reached; None where it is not known


@dataclass(frozen=True, kw_only=True)
class CaseEvidence:
    """Answers and times of one case, image by image and run by run."""

    file: str  # or folder, as it was named; what is measured, where it is none
    name: str
    kind: str  # artifact, peer, eager or compiled; eager-bf16 or compiled-bf16
    metadata: Metadata
    sample: Sample
    predictions: Predictions
    comparison: Comparison | None  # with its reference
    reference: Predictions | None
    times_ms: dict[int, NDArray[np.float64]]  # by batch


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Material that the report shows beside the figures."""

    cases: tuple[CaseEvidence, ...]
    depth_curves: tuple[DepthCurve, ...]  # to depths beyond the deepest artifact's
    halting_curves: tuple[DepthCurve, ...]  # to its depth, on more images where time allows; with `halting`


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """Result of one bench."""

    rows: tuple[BenchRow, ...]
    notes: tuple[str, ...]  # what a reader should know of the whole
    data: tuple[dict[str, Any], ...]  # name, split, images, total, labelled: what accuracy was measured on
    machine: dict[
        str, Any
    ]  # cpu, physical_cores, system, other_cpus_busy (by other processes, while measuring), disturbed (too many of them)
    versions: dict[str, str]  # package → version
    threads: int
    device: str  # as asked for: cpu, cuda or auto
    seconds: float  # measured per row
    rounds: int
    warm_up: int  # runs before the measuring, the fewest of all rows
    power: dict[str, Any] = field(default_factory=dict)  # vitrm.runtime.bench.energy.Meters.describe
    started: str  # ISO 8601, UTC
    command: str | None = None  # the command line, where one asked
    halting: tuple[HaltingChoice, ...] = ()  # thresholds chosen, where asked for
    by_class: tuple[ClassResults, ...] = ()  # of every artifact with labelled images
    corruptions: tuple[Robustness, ...] = ()  # what corrupted images do to each artifact, where asked for
    evidence: Evidence | None = field(default=None, repr=False, compare=False)

    @property
    def failed(self) -> tuple[BenchRow, ...]:
        """One row for each artifact that could not be measured."""
        rows = {r.name: r for r in self.rows if r.kind == "artifact" and not r.ok}
        return tuple(rows.values())

    @property
    def quiet(self) -> bool:
        """True if other processes left the machine alone meanwhile, as far as anybody counted."""
        return not self.machine.get("disturbed", False)

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-ready values: no evidence, and null for what is not finite."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "evidence"}
        values["rows"] = [dataclasses.asdict(r) for r in self.rows]
        values["halting"] = [dataclasses.asdict(c) for c in self.halting]
        values["by_class"] = [c.to_dict() for c in self.by_class]
        values["corruptions"] = [dataclasses.asdict(c) for c in self.corruptions]
        ready = to_plain({"format": FORMAT, **values})
        assert isinstance(ready, dict)
        return ready


def to_plain(value: Any) -> Any:
    """Returns JSON-ready values: lists for tuples, and null for what is not finite."""
    if isinstance(value, dict):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
