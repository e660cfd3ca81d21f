"""Histograms of activations, per site: what ranges follow from.

Two passes: the first finds each site's minimum and maximum, the second counts values in `BINS` bins between them.
Extremes and counts do not depend on the order of the images, which are taken in a fixed order and in batches of one size
besides: calibrating again gives the same ranges to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitrm.baselines.networks import Baseline
from vitrm.calib.sites import NET, Site, observe
from vitrm.errors import UserError
from vitrm.model import ViTRM

BINS = 2048
_BATCH = 64


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
    for observer in (widen, count):
        for start in range(0, len(images), _BATCH):
            part = torch.from_numpy(images[start : start + _BATCH])
            observe(model, part, steps, observer)
            done += len(part)
            if progress:
                progress(done / total)
    return {
        site: Histogram(low, high, counts.get(site, np.zeros(BINS, np.int64))) for site, (low, high) in extremes.items()
    }
