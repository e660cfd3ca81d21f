"""Exact test of what halting loses, image by image, against a budget.

Of n images halting loses X (right at full depth, wrong when halted) and gains Y (the other way round).  The drop of accuracy is
δ = P(lost) − P(gained).  Tested is the hypothesis δ ≥ budget; a small p-value is evidence that the budget holds.

The test is the exact unconditional one: outcomes (X, Y) are ordered by the score statistic (Tango, 1998), and the p-value is the
chance, largest over the share q of images that change their answer's rightness, of an outcome at least as extreme (Hsueh, Liu & Chen,
2001).  q is bounded by its own exact interval, whose error is added (Berger & Boos, 1994).  So the p-value holds on any number
of images; the normal approximation calls every threshold free that loses nothing on a handful of them.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.05  # chance, at most, that a budget which does not hold passes
_OUTSIDE = 1e-4  # chance that q lies above its interval: a part of LEVEL
_SHARES = 64  # values of q among which the largest chance is looked for
_TAIL = 1e-12  # chance of the outcomes that a sum leaves out


@lru_cache(maxsize=65536)
def p_value(lost: int, gained: int, images: int, budget: float) -> float:
    """Returns the p-value of δ ≥ `budget` ∈ (0, 1): δ < budget may be claimed where it is at most `LEVEL`."""
    from scipy.stats import beta, binom

    changed = lost + gained
    highest = 1.0 if changed == images else float(beta.isf(_OUTSIDE, changed + 1, images - changed))
    if highest <= budget:
        return _OUTSIDE  # δ cannot exceed q
    most = int(binom.isf(_TAIL, images, highest))
    totals = np.arange(most + 1)
    extreme = _most_lost(totals, _score(np.array(lost), np.array(gained), images, budget), images, budget)
    # Steps of equal length in standard errors.
    angles = np.linspace(math.asin(math.sqrt(budget)), math.asin(math.sqrt(highest)), _SHARES)
    shares = (np.sin(angles) ** 2)[:, None]
    lost_of_changed = np.clip((shares + budget) / (2 * shares), 0, 1)
    chances = binom.pmf(totals, images, shares) * binom.cdf(extreme, totals, lost_of_changed)
    return min(1.0, float(chances.sum(1).max()) + _OUTSIDE)


@lru_cache(maxsize=4096)
def drop_bound(lost: int, gained: int, images: int) -> float:
    """Returns the upper 95 % confidence bound of δ, in [0, 1]: the smallest budget that the test says holds."""
    low, high = 0.0, 1.0
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (low, middle) if p_value(lost, gained, images, middle) <= LEVEL else (middle, high)
    return high


def images_needed(budget: float) -> int:
    """Returns the fewest images on which a `budget` ∈ (0, 1) can be shown to hold where not one answer changes."""
    count = max(1, math.ceil(math.log(LEVEL - _OUTSIDE) / math.log1p(-budget)))
    while p_value(0, 0, count, budget) > LEVEL:
        count += 1
    return count


def _score(lost: NDArray[np.int64], gained: NDArray[np.int64], images: int, budget: float) -> NDArray[np.float64]:
    """Returns the score statistic of δ = `budget`: the more negative, the more it speaks for a smaller δ."""
    # P(gained) that is likeliest where δ is the budget: the positive root of 2n p² − linear p − gained budget (1 − budget).
    linear = (lost + gained) * (1 + budget) - 2 * budget * (images + gained)
    root = np.sqrt(linear**2 + 8.0 * images * gained * budget * (1 - budget))
    likeliest = np.maximum(linear + root, 0) / (4 * images)
    variance = images * (2 * likeliest + budget * (1 - budget))
    return np.asarray((lost - gained - images * budget) / np.sqrt(variance))


def _most_lost(totals: NDArray[np.int64], score: NDArray[np.float64], images: int, budget: float) -> NDArray[np.int64]:
    """Returns for each number of changed answers the most that may be lost with a score up to `score`; −1 where none may."""
    low, high = np.full_like(totals, -1), totals.copy()
    while (low < high).any():  # the score rises with the lost among the changed
        middle = (low + high + 1) // 2
        holds = _score(middle, totals - middle, images, budget) <= score + 1e-9
        low, high = np.where(holds, middle, low), np.where(holds, high, middle - 1)
    return low
