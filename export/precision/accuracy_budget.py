"""--max-drop: int8 within an accuracy budget, by keeping the sites that hurt most in floating point.

The artifact itself is judged, in ONNX Runtime on validation images; the sensitivity of its sites only says in which order
to give them up.  As few as meet the budget are kept: their number doubles until it does, then halves the gap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vitrm.calib.sites import Site

Unit = tuple[tuple[Site, ...], float]  # sites that are kept together, and their noise (vitrm.calib.sensitivity)


@dataclass(frozen=True)
class Budget:
    """The cost of keeping the budget.  Accuracies are in [0, 1], drops in percentage points, on `images` images."""

    allowed: float
    images: int
    exact: float  # accuracy of PyTorch
    first: float  # of the artifact with every site in int8
    final: float  # of the artifact that was made
    agreement: float  # share of the images on which it and PyTorch say the same
    kept: tuple[Unit, ...]  # in floating point, most harmful first

    @property
    def sites(self) -> frozenset[Site]:
        """All sites kept in floating point."""
        return frozenset(site for sites, _ in self.kept for site in sites)

    @property
    def drop(self) -> float:
        """Percentage points lost against PyTorch."""
        return 100 * (self.exact - self.final)


def keep_within(
    allowed: float,
    labels: NDArray[np.int64],
    exact: NDArray[np.int64],
    answers: Callable[[frozenset[Site]], NDArray[np.int64]],
    ranked: Callable[[], Sequence[Unit]],
) -> Budget:
    """Finds the fewest sites to keep, of those `ranked` gives, so that at most `allowed` percentage points are lost.

    `labels` [n] and PyTorch's predictions `exact` [n] are compared with the `answers` [n] of the artifact in which the
    given sites are floating point.
    """
    first = _judge(allowed, labels, exact, answers, ())
    if first.drop <= allowed:
        return first
    units = ranked()

    def tried(count: int) -> Budget:
        return replace(_judge(allowed, labels, exact, answers, units[:count]), first=first.final)

    fails, count = 0, 1
    while (best := tried(count)).drop > allowed and count < len(units):
        fails, count = count, min(2 * count, len(units))
    holds = count
    while holds - fails > 1:
        middle = (fails + holds) // 2
        budget = tried(middle)
        if budget.drop <= allowed:
            holds, best = middle, budget
        else:
            fails = middle
    return best


def _judge(
    allowed: float,
    labels: NDArray[np.int64],
    exact: NDArray[np.int64],
    answers: Callable[[frozenset[Site]], NDArray[np.int64]],
    kept: Sequence[Unit],
) -> Budget:
    answered = answers(frozenset(site for sites, _ in kept for site in sites))
    accuracy = float((answered == labels).mean())
    return Budget(
        allowed=allowed,
        images=len(labels),
        exact=float((exact == labels).mean()),
        first=accuracy,
        final=accuracy,
        agreement=float((answered == exact).mean()),
        kept=tuple(kept),
    )
