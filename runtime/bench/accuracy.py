"""Answers of a model to many images, and the differences between two sets of answers.

Two models of the same accuracy can disagree on many images.  Paired figures say so: top-1 agreement,
and the flips an artifact gained (wrong → right) and lost (right → wrong).  On 10,000 images the
standard error of an accuracy is 0.25 points; one flip is 0.01.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitrm.data import affordable
from vitrm.data.images import to_floats
from vitrm.runtime.session import Result, Session

BATCH_MEBIBYTES = 128  # of images that are run at once
NO_ANSWER = -1  # the prediction where a logit is NaN or infinite: agrees with nothing, is never right


@dataclass(frozen=True)
class Predictions:
    """Answers to N images."""

    logits: NDArray[np.float32]  # [N, classes]
    halt_prob: NDArray[np.float32] | None  # [N]
    steps_used: NDArray[np.int64] | None  # [N]

    @property
    def top1(self) -> NDArray[np.int64]:
        """The predicted labels [N]; NO_ANSWER where a logit is not finite."""
        return np.where(self._finite, self.logits.argmax(1), NO_ANSWER)

    @property
    def probabilities(self) -> NDArray[np.float64]:
        """softmax(logits) [N, classes]; zeros where a logit is not finite."""
        finite = self._finite[:, None]
        logits = np.where(finite, self.logits, 0).astype(np.float64)
        exponents = np.exp(logits - logits.max(1, keepdims=True))
        return exponents / exponents.sum(1, keepdims=True) * finite

    @property
    def _finite(self) -> NDArray[np.bool_]:
        return np.asarray(np.isfinite(self.logits).all(1))


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers with its Wilson 95 % interval, all in [0, 1]."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Differences of an artifact's answers from the reference's, image by image."""

    agreement: float  # share of images with the same top-1 answer, in [0, 1]
    disagreeing: NDArray[np.int64]  # indices of the others
    gained: int | None  # reference wrong, artifact right; None without labels
    lost: int | None  # reference right, artifact wrong
    max_logit_difference: float  # largest |Δlogit| anywhere; infinite if one side is not finite
    halt_agreement: float | None  # share of images on which halt_prob > 0.5 says the same; None without a halting head
    steps_used_agreement: float | None  # share of images that used the same number of steps; None without steps


def predict(
    session: Session,
    pixels: NDArray[np.uint8],
    *,
    batch: int = 100,
    steps: int | None = None,
    halt_threshold: float | None = None,
    progress: Callable[[float], None] | None = None,
) -> Predictions:
    """Runs `session` over uint8 pixels [N, 3, H, W], in batches of `batch`, or fewer where the images are large.

    `progress` is called with the fraction that is done.
    """
    batch = affordable(batch, pixels.shape[-1], BATCH_MEBIBYTES)
    results: list[Result] = []
    for start in range(0, len(pixels), batch):
        images = to_floats(pixels[start : start + batch])
        count = len(images)
        if session.prefers_one_batch and results:
            images = np.concatenate([images, np.repeat(images[-1:], batch - count, 0)])
        result = session.infer(images, steps=steps, halt_threshold=halt_threshold)
        results.append(result if len(images) == count else _first(result, count))
        if progress:
            progress(min(1.0, (start + batch) / len(pixels)))
    halts = [r.halt_prob for r in results if r.halt_prob is not None]
    used = [r.steps_used for r in results if r.steps_used is not None]
    return Predictions(
        np.concatenate([r.logits for r in results]),
        np.concatenate(halts) if halts else None,
        np.concatenate(used) if used else None,
    )


def _first(result: Result, count: int) -> Result:
    halt_prob, steps_used = result.halt_prob, result.steps_used
    return Result(
        result.logits[:count],
        None if halt_prob is None else halt_prob[:count],
        None if steps_used is None else steps_used[:count],
    )


def accuracy(predictions: Predictions, labels: NDArray[np.int64]) -> Accuracy:
    """Share of the predictions that equal `labels` [N]."""
    right = int((predictions.top1 == labels).sum())
    low, high = wilson(right, len(labels))
    return Accuracy(right / len(labels), low, high)


def in_top5(predictions: Predictions, labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Tells which of `labels` [N] are among an image's five likeliest; none where a logit is not finite."""
    likeliest = np.argsort(-predictions.logits, axis=1, kind="stable")[:, :5]
    return np.asarray((likeliest == labels[:, None]).any(1) & (predictions.top1 != NO_ANSWER))


def wilson(right: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval for `right` of `count` (95 % by default): it stays in [0, 1], also at 100 %."""
    share = right / count
    spread = z * z / count
    center = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, center - half), min(1.0, center + half)


def compare(reference: Predictions, own: Predictions, labels: NDArray[np.int64] | None) -> Comparison:
    """Compares the answers to the same N images; `labels` [N] count flips, None where there are none."""
    same = (reference.top1 == own.top1) & (reference.top1 != NO_ANSWER)
    gained = lost = None
    if labels is not None:
        was, now = reference.top1 == labels, own.top1 == labels
        gained, lost = int((~was & now).sum()), int((was & ~now).sum())
    with np.errstate(invalid="ignore"):
        difference = np.abs(reference.logits.astype(np.float64) - own.logits)
    halt_agreement = None
    if reference.halt_prob is not None and own.halt_prob is not None:
        halt_agreement = float(((reference.halt_prob > 0.5) == (own.halt_prob > 0.5)).mean())
    steps_used_agreement = None
    if reference.steps_used is not None and own.steps_used is not None:
        steps_used_agreement = float((reference.steps_used == own.steps_used).mean())
    return Comparison(
        agreement=float(same.mean()),
        disagreeing=np.flatnonzero(~same),
        gained=gained,
        lost=lost,
        max_logit_difference=float(difference.max()) if np.isfinite(difference).all() else math.inf,
        halt_agreement=halt_agreement,
        steps_used_agreement=steps_used_agreement,
    )


def least_certain(predictions: Predictions, count: int) -> NDArray[np.int64]:
    """Indices of the `count` images whose two likeliest classes are closest, closest first."""
    ranked = np.sort(predictions.probabilities, 1)
    return np.argsort(ranked[:, -1] - ranked[:, -2], kind="stable")[:count]
