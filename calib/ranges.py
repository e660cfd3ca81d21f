"""Activation ranges of a ViTRM, per site, step and role: what int8 scales are made from.

A site is the input of a linear layer.  The same layer sees other values in each role (the embedding, the part of a
step that both updates share, the latent update, the answer update) and at each step, so every (step, role, layer) has
its own histogram.

Two passes: the first finds each site's minimum and maximum, the second counts values in `BINS` bins between them.
Extremes and counts do not depend on the order of the images, which are taken in a fixed order and in batches of one size
besides: calibrating again gives the same ranges to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vitrm.errors import UserError
from vitrm.model import ViTRM

BINS = 2048
BATCH = 64
ESTIMATORS = ("minmax", "percentile", "mse")
_PERCENTILE = 99.99  # of the values, kept inside the range


class Site(NamedTuple):
    """Where an activation is quantised."""

    step: int  # 1, 2, …; 0 for what runs once per image
    role: str  # embed, project, latents or answer: the fragment it belongs to
    layer: str  # the linear layer whose input it is, e.g. "block.1.ffn.up"


@dataclass(frozen=True)
class Histogram:
    """The values met at a site."""

    low: float
    high: float
    counts: NDArray[np.int64]  # [BINS], of equal width from low to high

    @property
    def centres(self) -> NDArray[np.float64]:
        """The middle of each bin."""
        return self.low + (np.arange(BINS) + 0.5) * (self.high - self.low) / BINS


class Range(NamedTuple):
    """What int8 has to represent."""

    low: float
    high: float


def collect(
    model: ViTRM,
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
            raise UserError(f"activations are NaN or infinite at {where}: the weights cannot be calibrated")
        known = extremes.get(site, (low, high))
        extremes[site] = min(low, known[0]), max(high, known[1])

    counts: dict[Site, NDArray[np.int64]] = {}

    def count(site: Site, values: Tensor) -> None:
        low, high = extremes[site]
        if low == high:  # nothing to count between, and torch would widen the range
            return
        found = torch.histc(values.float(), BINS, low, high).to(torch.int64).numpy()
        counts[site] = counts.get(site, 0) + found

    done, total = 0, 2 * len(images)
    for look in (widen, count):
        with _watch(model, look) as at:
            for start in range(0, len(images), BATCH):
                part = torch.from_numpy(images[start : start + BATCH])
                _run(model, part, steps, at)
                done += len(part)
                if progress:
                    progress(done / total)
    return {
        site: Histogram(low, high, counts.get(site, np.zeros(BINS, np.int64))) for site, (low, high) in extremes.items()
    }


def _run(model: ViTRM, images: Tensor, steps: int, at: list[tuple[int, str]]) -> None:
    """One batch through the recursion; `at[0]` says which step and role is running."""
    with torch.no_grad():
        at[0] = 0, "embed"
        embedded = model.embed(images)
        y, z = model.initial_state(len(images))
        for step in range(1, steps + 1):
            for _ in range(model.config.recursions):
                at[0] = step, "project"
                of_y = model.project(y)
                at[0] = step, "latents"
                for _ in range(model.config.n):
                    z = model.update_latents(embedded, y, of_y, z)
                at[0] = step, "answer"
                y = model.update_answer(y, of_y, z)


@contextmanager
def _watch(model: nn.Module, look: Callable[[Site, Tensor], None]) -> Iterator[list[tuple[int, str]]]:
    """Calls `look` with the input of every linear layer that runs inside, and yields the place it is told of."""
    at: list[tuple[int, str]] = [(0, "")]

    def hook(layer: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: look(Site(*at[0], layer), inputs[0])

    handles = [
        module.register_forward_pre_hook(hook(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        yield at
    finally:
        for handle in handles:
            handle.remove()


def estimate(histogram: Histogram, estimator: str) -> Range:
    """The range that a site's int8 values should span.

    minmax: all that was seen.  percentile: its inner 99.99 %.  mse: of a hundred narrower and narrower ranges, the
    one whose rounding and clipping together cost the least squared error.  A range always includes 0, and is never empty.
    """
    if estimator not in ESTIMATORS:
        raise UserError(f"estimator is {estimator!r}, expected one of {', '.join(ESTIMATORS)}")
    low, high, total = histogram.low, histogram.high, int(histogram.counts.sum())
    if total and estimator == "percentile":
        share = np.cumsum(histogram.counts) / total
        tail = (1 - _PERCENTILE / 100) / 2
        edges = np.linspace(low, high, BINS + 1)
        low, high = float(edges[np.searchsorted(share, tail)]), float(edges[np.searchsorted(share, 1 - tail) + 1])
    elif total and estimator == "mse":
        candidates = [(low * s, high * s) for s in np.linspace(1.0, 0.01, 100)]
        low, high = min(candidates, key=lambda c: _squared_error(histogram, *c))
    low, high = min(low, 0.0), max(high, 0.0)
    return Range(low, high) if high > low else Range(0.0, 1e-6)


def _squared_error(histogram: Histogram, low: float, high: float) -> float:
    """Σ (value − its int8 value)² over a histogram, for 255 levels between low and high (0 among them)."""
    low, high = min(low, 0.0), max(high, 0.0)
    if high <= low:
        return float("inf")
    scale = (high - low) / 255
    values = histogram.centres
    rounded = np.round(np.clip(values, low, high) / scale) * scale
    return float((histogram.counts * (values - rounded) ** 2).sum())
