"""The choice of easy and hard test images."""

from __future__ import annotations

import numpy as np

from vitrm.export.web.gallery import choose

THRESHOLD = 0.8


def _choose(count):
    """Twelve images over three steps: 0–5 easy, of two classes; 6 mended by depth; 7 in between; 8–11 never sure."""
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1, 0, 1, 0, 1])
    tops = np.tile(labels, (3, 1))
    tops[0, 6] = 0  # wrong at first
    tops[:, 11] = 0  # wrong to the end
    halts = np.full((3, 12), 0.5, np.float32)
    halts[:, :6] = [0.99, 0.98, 0.97, 0.96, 0.91, 0.9]
    halts[2, 6] = 0.9
    halts[1:, 7] = 0.9
    halts[:, 8:] = [0.4, 0.3, 0.2, 0.1]
    return choose(tops, halts, labels, THRESHOLD, count)


def test_easy_ones_are_right_at_once_and_of_all_classes():
    easy, _ = _choose(8)
    assert easy == [0, 4, 1, 5]  # the surest of each class, then the second ones


def test_hard_ones_are_mended_or_slow():
    easy, hard = _choose(8)
    assert hard == [6, 7, 11, 10]  # mended; halts in between; then the least sure
    assert not set(easy) & set(hard)


def test_there_may_be_fewer_than_asked_for():
    easy, hard = _choose(40)
    assert len(easy) == 6  # no more are right after one step
    assert len(hard) == 6
    assert _choose(0) == ([], [])
