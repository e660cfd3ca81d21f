"""An exported file against the eager model, on real images, before the file gets its name."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from vitrm.baselines.networks import Baseline
from vitrm.errors import UserError
from vitrm.model import ViTRM
from vitrm.runtime.artifact.saturation_check import integer_products
from vitrm.runtime.session import Result, Session

VERIFICATION_BATCHES = (1, 2, 7)  # one image, the batch that was traced, and one that was not
VERIFICATION_IMAGES = 64  # what is compared, where it takes no longer than SECONDS
SECONDS = 10.0  # for what goes beyond the images of VERIFICATION_BATCHES
_LARGER = 19  # images in a batch of the others
_BATCH_SECONDS = 2.0  # what is slow needs memory as well: a batch takes no longer
# Largest |Δ| of halt_prob allowed, and of logits as a share of the largest |logit| met (of 1 where none exceeds it).  The
# first two are rounding.  int8's is a guard against a wrong graph or scale, not a promise of accuracy: rounding to int8
# moves logits by some percent (with convolutions one of hundreds of images by 14, and halt_prob of one photo unlike the training
# images by 0.23), and whether answers change is what top-1 agreement, --max-drop and vitrm-bench say.
LIMITS = {"fp32": 1e-4, "fp16": 3e-2, "int8": 0.3}
_HARDLY_LEARNED = 2.0  # largest |logit|: a model that has learned its training images gives larger ones


@dataclass(frozen=True)
class Parity:
    """The largest differences between an artifact and eager."""

    logits: float  # max |Δ logit|
    halt_prob: float  # max |Δ halt_prob|; 0 for a baseline
    agreement: float  # share of answers with the same top-1 class
    images: int  # images compared
    limit: float  # what |Δ logit| may be: the precision's share of the largest |logit| met
    tolerance: float  # that share, and what |Δ halt_prob| may be


def check_integer_sums(path: Path) -> None:
    """Raises ValueError if a sum in an integer matmul of the ONNX file could saturate on some CPU.

    Parity is found on one processor; this holds for all of them.
    """
    sums = integer_products(onnx.load(path).graph)
    if sums.saturating:
        raise ValueError(f"{sums}: {', '.join(sorted(sums.saturating)[:5])}")


def verify(
    path: Path,
    model: ViTRM | Baseline,
    images: NDArray[np.float32],
    *,
    steps: int,
    halt_threshold: float,
    precision: str,
    seconds: float = SECONDS,
) -> Parity:
    """Compares the file at `path` with `model` on float32 images [≥ 7, 3, H, W].

    The first 7 in batches of 1, 2 and 7, whatever that takes, and as many of the others as `seconds` allow in larger ones.
    A file that takes its depth at run time is also compared at one step, and with a threshold in the middle of the
    halting probabilities met.  Each sample is compared with eager after the step that the file says it used; that
    step must be the one after which eager's halt_prob passes the threshold, give or take the precision's limit.
    Raises `UserError` when logits differ by more than the precision's share (`LIMITS`) of the largest |logit| that eager
    gives to these images, halt_prob by more than that share, or steps_used is not explained by eager.  So the limit bounds
    the difference relative to the surest answer: a small logit may be off by as much.
    """
    import vitrm.runtime

    compared = _Comparison(vitrm.runtime.open(path), model, steps, halt_threshold, precision)
    first = max(VERIFICATION_BATCHES)
    for batch in VERIFICATION_BATCHES:
        began = time.perf_counter()
        compared.add(images[:batch])
    per_image = (time.perf_counter() - began) / first
    done, end = first, time.perf_counter() + seconds
    while done < len(images) and (left := end - time.perf_counter()) > per_image:
        part = images[done : done + max(1, min(_LARGER, int(min(left, _BATCH_SECONDS) / per_image)))]
        compared.add(part)
        done += len(part)
    return compared.judged(done)


class _Comparison:
    """The largest differences so far, batch by batch."""

    def __init__(
        self, session: Session, model: ViTRM | Baseline, steps: int, halt_threshold: float, precision: str
    ) -> None:
        self.session, self.model, self.steps, self.precision = session, model, steps, precision
        self.halt_threshold, self.tolerance = halt_threshold, LIMITS[precision]
        self.worst_logits = self.worst_halt = self.largest = 0.0
        self.same = self.count = self.wrong = 0

    def add(self, images: NDArray[np.float32]) -> None:
        """Compares the answers to one batch at every setting."""
        with torch.no_grad():
            tensor = torch.from_numpy(images)
            if isinstance(self.model, ViTRM):
                # [steps, n, classes], [steps, n]
                logits, halts = (t.numpy() for t in self.model.trajectory(tensor, self.steps))
            else:
                logits, halts = self.model(tensor).numpy()[None], None
        self.largest = max(self.largest, float(np.abs(logits).max()))
        batch = np.arange(len(images))
        for depth, threshold in _settings(self.steps, self.halt_threshold, halts, self.session.takes_depth):
            if halts is None:
                result, last = self.session.infer(images), np.zeros(len(images), np.int64)
            else:
                result = self.session.infer(images, steps=depth, halt_threshold=threshold)
                last, halt_difference, wrong = _halting(result, halts[:depth], threshold, self.tolerance)
                self.worst_halt, self.wrong = _larger(self.worst_halt, halt_difference), self.wrong + wrong
            expected = logits[last, batch]
            self.worst_logits = _larger(self.worst_logits, float(np.abs(result.logits - expected).max()))
            self.same += int((result.logits.argmax(1) == expected.argmax(1)).sum())
            self.count += len(images)

    def judged(self, images: int) -> Parity:
        """The parity, on so many images.  Raises `UserError` where it is not one."""
        limit = self.tolerance * max(1.0, self.largest)
        # `not <=` also catches NaN.
        if not self.worst_logits <= limit or not self.worst_halt <= self.tolerance or self.wrong:
            raise UserError(
                f"the exported graph differs from the eager model: logits by {self.worst_logits:.3g} (limit {limit:.3g}, "
                f"{self.tolerance:g} of the largest), halt_prob by {self.worst_halt:.3g}, steps_used in {self.wrong} of "
                f"{self.count} samples; no file was written{self._way_out()}"
            )
        return Parity(self.worst_logits, self.worst_halt, self.same / self.count, images, limit, self.tolerance)

    def _way_out(self) -> str:
        """Says what to do about a difference, of a precision that rounds much; what float32 differs by is a bug."""
        if self.precision == "int8" and self.largest < _HARDLY_LEARNED:
            return (
                f": no logit is larger than {self.largest:.2g}, as of a model that has hardly learned yet, and whose answers int8 changes "
                "easily; train it for more epochs or from trained weights (vitrm-train --init RUN), or export with --fp16"
            )
        if self.precision == "int8":
            return ": calibrate in another way (--estimator minmax), keep what costs most in float (--max-drop), or export with --fp16"
        return ": export in float32" if self.precision == "fp16" else ""


def _larger(a: float, b: float) -> float:
    """The larger one; NaN where either is."""
    return float(np.maximum(a, b))


def _settings(
    steps: int, halt_threshold: float, halts: NDArray[np.float32] | None, takes_depth: bool
) -> list[tuple[int, float]]:
    """The depths and thresholds to compare at."""
    settings = [(steps, halt_threshold)]
    if takes_depth and halts is not None:
        settings += [(1, halt_threshold), (steps, float(np.median(halts)))]
    return settings


def _halting(
    result: Result, halts: NDArray[np.float32], threshold: float, tolerance: float
) -> tuple[NDArray[np.int64], float, int]:
    """The step (from 0) that each sample ended with, max |Δ halt_prob|, and in how many samples that step is not explained.

    `halts` are eager's, [steps, batch].
    """
    steps, batch = halts.shape
    if result.halt_prob is None or result.steps_used is None:
        raise ValueError("the exported graph lacks halt_prob or steps_used")
    last = result.steps_used - 1
    if ((last < 0) | (last >= steps)).any():
        raise ValueError(f"the exported graph says steps_used {result.steps_used}, at a depth of {steps}")
    own = halts[last, np.arange(batch)]
    earlier = np.arange(steps)[:, None] < last
    halted_earlier = (earlier & (halts > threshold + tolerance)).any(0)
    not_halted = (last < steps - 1) & (own < threshold - tolerance)
    return last, float(np.abs(result.halt_prob - own).max()), int((halted_earlier | not_halted).sum())
