"""Options of a bench: what is measured, beside what, and how long; checked once, before anything is opened."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

from vitrm.errors import UserError
from vitrm.model_limits import MAX_STEPS


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Settings of `vitrm.runtime.bench.run.bench`.  Raises `UserError` for values that make no sense, alone or together."""

    # What is measured
    run: str | None = None  # checkpoint to compare with; None: the one each artifact was exported from
    data: str | None = None  # data set; None: the one each artifact was trained on
    data_dir: str | os.PathLike[str] | None = None  # folder of the data set's files; None: $VITRM_DATA, else data
    limit: int | None = None  # most images that accuracy is measured on; None: all
    batches: Sequence[int] = (1, 32)  # images per run; each artifact is measured at every one
    steps: Sequence[int] = ()  # depths of loop and stepwise artifacts; none: each artifact's own
    halt_thresholds: Sequence[float] = ()  # thresholds to measure them at, with every depth; none: the artifact's own
    max_drop: float | None = None  # accuracy in (0, 1) that a threshold may give up; None: no threshold is chosen
    depths: bool = False  # measure accuracy after every step, for the report
    corruption_images: int | None = None  # most images that corrupted copies are made of; None: no corruptions
    # Beside what
    eager: bool = True  # compare with the eager model, which needs torch
    compile: bool | str = False  # add torch.compile, in the mode that a string names
    bf16: bool = False  # add PyTorch in bfloat16
    peers: bool = False  # add what other tools make of the artifacts (vitrm.runtime.bench.peers)
    # How
    device: str = "cpu"  # cpu, cuda, cuda:1 … or auto, as in `vitrm.runtime.open`
    provider: str | None = None  # ONNX Runtime's provider on a GPU, as in `vitrm.runtime.open`
    threads: int | None = None  # CPU threads; None: every physical core
    seconds: float = 2.0  # measured per row
    power: bool = True  # measure energy where there are sensors, which takes as long as latency once more
    verify: bool = True  # compare .onnx files with the SHA-256 they hold

    def __post_init__(self) -> None:
        for name in ("batches", "steps", "halt_thresholds"):
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))
        self._check_values()
        self._check_halting()

    def _check_values(self) -> None:
        if not self.batches or not all(_whole(b) and b >= 1 for b in self.batches):
            raise UserError(f"batch sizes are {list(self.batches)}, expected whole numbers of at least 1")
        if not (math.isfinite(self.seconds) and self.seconds > 0):
            raise UserError(f"seconds is {self.seconds}, expected a positive number")
        if not all(_whole(depth) and 1 <= depth <= MAX_STEPS for depth in self.steps):
            raise UserError(f"steps are {list(self.steps)}, expected whole numbers from 1 to {MAX_STEPS}")
        for name in ("limit", "corruption_images"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise UserError(f"{name} is {count}, expected at least 1 image")

    def _check_halting(self) -> None:
        """Checks what choosing a threshold asks for."""
        if self.max_drop is None:
            return
        if self.halt_thresholds or len(self.steps) > 1:
            raise UserError(
                "a threshold is chosen for one depth, and measured with and without: name no thresholds and at most one depth"
            )
        if not self.verify:
            raise UserError(
                "a threshold is written into files that were verified alone: leave out verify=False (--no-verify)"
            )
        if not 0 < self.max_drop < 1:
            raise UserError(
                f"max_drop is {self.max_drop}, expected a share of accuracy between 0 and 1: that nothing at all is given up cannot be "
                "shown on any number of images"
            )


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
