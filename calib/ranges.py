"""Activation ranges of a ViTRM, per site, step and role: what int8 scales are made from.

Two passes: the first finds each site's minimum and maximum, the second counts values in `BINS` bins between them.
Extremes and counts do not depend on the order of the images, which are taken in a fixed order and in batches of one size
besides: calibrating again gives the same ranges to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitrm.baselines import Baseline
from vitrm.calib.sites import NET, Site, watch
from vitrm.errors import UserError
from vitrm.model import ViTRM

BINS = 2048
BATCH = 64
ESTIMATORS = ("minmax", "percentile", "mse", "entropy")
_PERCENTILE = 99.99  # of the values, kept inside the range


@dataclass(frozen=True)
class Histogram:
    """The values met at a site."""

    low: float
    high: float
    counts: NDArray[np.int64]  # [BINS], of equal width from low to high

    @property
    def centers(self) -> NDArray[np.float64]:
        """The middle of each bin."""
        return self.low + (np.arange(BINS) + 0.5) * (self.high - self.low) / BINS


class Range(NamedTuple):
    """What int8 has to represent."""

    low: float
    high: float


def collect(
    model: ViTRM | Baseline,
    images: NDArray[np.float32],
    steps: int,
    *,
    progress: Callable[[float], None] | None = None,
) -> dict[Site, Histogram]:
    """Histograms of every site over float32 images [n, 3, H, W] in [0, 1] and `steps` steps.

    Raises `UserError` for no images, and where an activation is not finite.
    """
    if not len(images):
        raise UserError("there are no images to calibrate on")
    extremes: dict[Site, tuple[float, float]] = {}

    def widen(site: Site, values: Tensor) -> None:
        low, high = (float(v) for v in values.aminmax())
        if not (np.isfinite(low) and np.isfinite(high)):
            where = f"step {site.step}, {site.role}, {site.layer}" if site.step else f"the embedding, {site.layer}"
            where = site.layer if site.role == NET else where
            raise UserError(f"activations are NaN or infinite at {where}: the weights cannot be calibrated")
        known = extremes.get(site, (low, high))
        extremes[site] = min(low, known[0]), max(high, known[1])

    counts: dict[Site, NDArray[np.int64]] = {}
    counted: tuple[Tensor | None, NDArray[np.int64]] = None, np.zeros(BINS, np.int64)

    def count(site: Site, values: Tensor) -> None:
        nonlocal counted
        low, high = extremes[site]
        if low == high:  # nothing to count between, and torch would widen the range
            return
        if values is not counted[0]:  # queries, keys and values are made from one tensor
            counted = values, torch.histc(values.float(), BINS, low, high).to(torch.int64).numpy()
        counts[site] = counts.get(site, 0) + counted[1]

    done, total = 0, 2 * len(images)
    for look in (widen, count):
        for start in range(0, len(images), BATCH):
            part = torch.from_numpy(images[start : start + BATCH])
            watch(model, part, steps, look)
            done += len(part)
            if progress:
                progress(done / total)
    return {
        site: Histogram(low, high, counts.get(site, np.zeros(BINS, np.int64))) for site, (low, high) in extremes.items()
    }


def estimate(histogram: Histogram, estimator: str) -> Range:
    """The range that a site's int8 values should span.

    minmax: all that was seen.  percentile: its inner 99.99 %.  mse: of a hundred narrower and narrower ranges, the
    one whose rounding and clipping together cost the least squared error.  entropy: the one whose int8 histogram diverges
    least from the values' own.  A range always includes 0, and is never empty.
    """
    if estimator not in ESTIMATORS:
        raise UserError(f"estimator is {estimator!r}, expected one of {', '.join(ESTIMATORS)}")
    low, high, total = histogram.low, histogram.high, int(histogram.counts.sum())
    if total and estimator == "percentile":
        share = np.cumsum(histogram.counts) / total
        tail = (1 - _PERCENTILE / 100) / 2
        edges = np.linspace(low, high, BINS + 1)
        low, high = float(edges[np.searchsorted(share, tail)]), float(edges[np.searchsorted(share, 1 - tail) + 1])
    elif total and estimator in ("mse", "entropy"):
        loss = _squared_error if estimator == "mse" else _divergence
        candidates = [(low * s, high * s) for s in np.linspace(1.0, 0.01, 100)]
        low, high = min(candidates, key=lambda c: loss(histogram, *c))
    low, high = min(low, 0.0), max(high, 0.0)
    return Range(low, high) if high > low else Range(0.0, 1e-6)


def _squared_error(histogram: Histogram, low: float, high: float) -> float:
    """Σ (value − its int8 value)² over a histogram, for 255 levels between low and high (0 among them)."""
    low, high = min(low, 0.0), max(high, 0.0)
    if high <= low:
        return float("inf")
    scale = (high - low) / 255
    values = histogram.centers
    rounded = np.round(np.clip(values, low, high) / scale) * scale
    return float((histogram.counts * (values - rounded) ** 2).sum())


def _divergence(histogram: Histogram, low: float, high: float) -> float:
    """Kullback–Leibler divergence Σ p log(p / q) of a histogram from what 255 levels between low and high keep of it.

    p counts clipped values in its outermost bins; q spreads the count of each level evenly over the bins that round to it
    and hold a value, clipped ones left out: so clipping shows where the two differ.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if high <= low:
        return float("inf")
    centers, counts = histogram.centers, histogram.counts.astype(np.float64)
    inside = np.flatnonzero((centers >= low) & (centers <= high))
    if not len(inside):
        return float("inf")
    kept = counts[inside]
    p = kept.copy()
    p[0] += counts[: inside[0]].sum()
    p[-1] += counts[inside[-1] + 1 :].sum()
    level = np.round(centers[inside] / ((high - low) / 255)).astype(np.int64)
    level -= level.min()
    held = kept > 0
    total = np.bincount(level, kept)
    bins = np.bincount(level, held)
    q = np.where(held, (total / np.maximum(bins, 1))[level], 0.0)
    p, q = p / p.sum(), q / max(q.sum(), 1.0)
    some = p > 0
    return float((p[some] * np.log(p[some] / np.maximum(q[some], 1e-12))).sum())
