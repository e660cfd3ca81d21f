"""Calibration methods: from the values met at a site to the range that int8 represents."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vitrm.errors import UserError

if TYPE_CHECKING:
    from vitrm.calib.histogram import Histogram

METHODS = ("minmax", "percentile", "mse", "entropy")
_PERCENTILE = 99.99  # of the values, kept inside the range
_LEVELS = 255  # steps between the lowest and the highest of 256 integers


class Range(NamedTuple):
    """The interval of values that int8 has to represent."""

    low: float
    high: float


def activation_range(histogram: Histogram, method: str) -> Range:
    """The range that a site's int8 values should span, by the calibration `method`.

    minmax: all that was seen.  percentile: its inner 99.99 %.  mse: of a hundred narrower and narrower ranges, the
    one whose rounding and clipping together cost the least squared error.  entropy: the one whose int8 histogram diverges
    least from the values' own.  A range always includes 0, and is never empty.

    Raises:
        UserError: for a method that is none of `METHODS`.
    """
    if method not in METHODS:
        raise UserError(f"calibration method is {method!r}, expected one of {', '.join(METHODS)}")
    low, high, total = histogram.low, histogram.high, int(histogram.counts.sum())
    if total and method == "percentile":
        share = np.cumsum(histogram.counts) / total
        tail = (1 - _PERCENTILE / 100) / 2
        edges = np.linspace(low, high, len(histogram.counts) + 1)
        low, high = float(edges[np.searchsorted(share, tail)]), float(edges[np.searchsorted(share, 1 - tail) + 1])
    elif total and method in ("mse", "entropy"):
        loss = _squared_error if method == "mse" else _divergence
        candidates = [(low * s, high * s) for s in np.linspace(1.0, 0.01, 100)]
        low, high = min(candidates, key=lambda c: loss(histogram, *c))
    low, high = min(low, 0.0), max(high, 0.0)
    return Range(low, high) if high > low else Range(0.0, 1e-6)


def _squared_error(histogram: Histogram, low: float, high: float) -> float:
    """Σ (value − its int8 value)² over a histogram, for 255 levels between low and high (0 among them)."""
    low, high = min(low, 0.0), max(high, 0.0)
    if high <= low:
        return float("inf")
    scale = (high - low) / _LEVELS
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
    level = np.round(centers[inside] / ((high - low) / _LEVELS)).astype(np.int64)
    level -= level.min()
    held = kept > 0
    total = np.bincount(level, kept)
    bins = np.bincount(level, held)
    q = np.where(held, (total / np.maximum(bins, 1))[level], 0.0)
    p, q = p / p.sum(), q / max(q.sum(), 1.0)
    some = p > 0
    return float((p[some] * np.log(p[some] / np.maximum(q[some], 1e-12))).sum())
