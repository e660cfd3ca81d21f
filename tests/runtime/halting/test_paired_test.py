"""The exact test of what halting loses: its level on any number of images, and what it takes to pass."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import multinomial

from vitrm.runtime.halting.paired_test import LEVEL, drop_bound, images_needed, p_value


@pytest.mark.slow
@pytest.mark.parametrize(
    ("images", "budget", "most_gained"),
    [(24, 0.15, 0.3), (24, 0.3, 0.3), (44, 0.07, 0.2), (44, 0.1, 0.2), (143, 0.03, 0.04)],
)
def test_what_loses_as_much_as_the_budget_passes_in_five_per_cent_of_cases(images, budget, most_gained):
    """Not simulated: the chance of every outcome that passes, summed up, for many shares of changed answers."""
    lost, gained = np.divmod(np.arange((images + 1) ** 2), images + 1)
    possible = lost + gained <= min(images, 44)
    lost, gained = lost[possible], gained[possible]
    passes = np.array([p_value(int(x), int(y), images, budget) <= LEVEL for x, y in zip(lost, gained, strict=True)])
    counts = np.stack([lost, gained, images - lost - gained], 1)
    assert 1 < passes.sum() < len(passes)
    for p_gained in np.linspace(0, most_gained, 21):
        chances = multinomial.pmf(counts, images, [p_gained + budget, p_gained, 1 - 2 * p_gained - budget])
        assert chances[passes].sum() <= LEVEL + 1e-9, f"{p_gained} gained"
        assert chances.sum() == pytest.approx(1, abs=1e-6), "what is left out cannot matter"


def test_a_budget_takes_as_many_images_as_make_a_clean_record_unlikely():
    for budget in (0.003, 0.01, 0.05, 0.3):
        needed = images_needed(budget)
        assert p_value(0, 0, needed, budget) <= LEVEL < p_value(0, 0, needed - 1, budget)
        # One image more than the exact binomial bound (1 − budget)^n ≤ 0.05, for the share that the interval of q takes.
        assert 0 <= needed - np.ceil(np.log(LEVEL) / np.log(1 - budget)) <= 1
    assert images_needed(0.003) == 998


def test_the_bound_of_many_images_is_nearly_the_normal_one():
    lost, gained, images = 30, 25, 5000
    share, drop = (lost + gained) / images, (lost - gained) / images
    normal = drop + 1.645 * np.sqrt((share - drop**2) / images)
    assert drop_bound(lost, gained, images) == pytest.approx(normal, rel=0.1)
    # Of few it is far from it: nothing lost on 44 images says less than 7 points, not 0.
    assert 0.06 < drop_bound(0, 0, 44) < 0.07


def test_more_lost_and_less_gained_never_helps():
    for images, budget in ((44, 0.1), (1000, 0.005)):
        for lost in range(6):
            for gained in range(5):
                here = p_value(lost, gained, images, budget)
                assert 0 < here <= 1
                assert p_value(lost + 1, gained, images, budget) >= here - 1e-9
                assert p_value(lost, gained, images, budget * 1.5) <= here + 1e-9
    assert p_value(44, 0, 44, 0.5) > 0.99
    assert p_value(0, 44, 44, 0.01) < 0.001
