"""An exported file against the eager model, on real images, before the file gets its name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from vitrm.baselines import Baseline
from vitrm.errors import UserError
from vitrm.model import ViTRM
from vitrm.runtime.saturation import integer_products
from vitrm.runtime.session import Result

BATCHES = (1, 2, 7)  # one image, the batch that was traced, and one that was not
# Largest |Δ| of halt_prob allowed, and of logits, there × the logits' own size where that exceeds 1.
LIMITS = {"fp32": 1e-4, "fp16": 3e-2, "int8": 0.1}


@dataclass(frozen=True)
class Parity:
    """The largest differences found between an artefact and eager."""

    logits: float  # max |Δ logit|
    halt_prob: float  # max |Δ halt_prob|; 0 for a baseline
    agreement: float  # share of images with the same top-1 class
    steps_used_wrong: int  # samples that halted after a step at which eager would not have
    images: int  # images compared
    limit: float  # what |Δ logit| may be


def check_integer_sums(path: Path) -> None:
    """Raises ValueError if a sum in an integer product of the ONNX file could saturate on some CPU.

    Parity is found on one processor; this holds for all of them.
    """
    found = integer_products(onnx.load(path).graph)
    if found.saturating:
        raise ValueError(f"{found}: {', '.join(sorted(found.saturating)[:5])}")


def verify(
    path: Path,
    model: ViTRM | Baseline,
    images: NDArray[np.float32],
    *,
    steps: int,
    halt_threshold: float,
    precision: str,
) -> Parity:
    """Compares the file at `path` with `model` on float32 images [≥ 7, 3, H, W], in batches of 1, 2 and 7.

    A file that takes its depth at run time is also compared at one step, and with a threshold in the middle of the
    halting probabilities met.  Each sample is compared with eager after the step that the file says it used; that
    step must be the one after which eager's halt_prob passes the threshold, give or take the precision's limit.
    Raises `UserError` when logits or halt_prob differ by more than the limit, or steps_used is not explained by eager.
    """
    import vitrm.runtime

    images = images[: max(BATCHES)]
    with torch.no_grad():
        tensor = torch.from_numpy(images)
        if isinstance(model, ViTRM):
            logits, halts = (t.numpy() for t in model.trajectory(tensor, steps))  # [steps, n, classes], [steps, n]
        else:
            logits, halts = model(tensor).numpy()[None], None
    tolerance = LIMITS[precision]
    limit = tolerance * max(1.0, float(np.abs(logits).max()))
    session = vitrm.runtime.open(path)
    worst_logits = worst_halt = 0.0
    same = count = wrong = 0
    for depth, threshold in _settings(steps, halt_threshold, halts, session.takes_depth):
        for batch in BATCHES:
            if halts is None:
                result, last = session.infer(images[:batch]), np.zeros(batch, np.int64)
            else:
                result = session.infer(images[:batch], steps=depth, halt_threshold=threshold)
                last, halt_difference, not_explained = _halting(result, halts[:depth, :batch], threshold, tolerance)
                worst_halt, wrong = max(worst_halt, halt_difference), wrong + not_explained
            expected = logits[last, np.arange(batch)]
            worst_logits = max(worst_logits, float(np.abs(result.logits - expected).max()))
            same += int((result.logits.argmax(1) == expected.argmax(1)).sum())
            count += batch
    # `not <=` also catches NaN.
    if not worst_logits <= limit or not worst_halt <= tolerance or wrong:
        raise UserError(
            f"the exported graph differs from the eager model: logits by {worst_logits:.3g} (limit {limit:.3g}), "
            f"halt_prob by {worst_halt:.3g}, steps_used in {wrong} of {count} samples; no file was written"
        )
    return Parity(worst_logits, worst_halt, same / count, wrong, len(images), limit)


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
