"""The choice of easy and hard test images."""

from __future__ import annotations

import numpy as np

from vitrm.export.web.gallery import beginning, choose, count_outcomes

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


def test_the_page_begins_with_the_one_that_halts_latest_before_the_end():
    halts = np.array(
        [[0.9, 0.1, 0.1, 0.1], [0.9, 0.9, 0.1, 0.1], [0.9, 0.9, 0.9, 0.1], [0.9, 0.9, 0.9, 0.9]], np.float32
    )
    assert beginning(halts, 0.8) == 2  # the last one takes every step: nothing is saved
    assert beginning(halts[:, :1], 0.8) == 0
    assert beginning(halts[:, :0], 0.8) == 0


def test_outcomes_are_those_of_every_depth_and_threshold():
    labels = np.array([0, 1])
    tops = np.array([[0, 0], [0, 1], [1, 1]])
    halts = np.array([[0.75, 0.25], [0.9, 0.5], [0.9, 0.9]], np.float32)
    found = count_outcomes(tops, halts, labels)
    assert found.images == 2
    assert found.steps.shape == found.right.shape == (3, 101)
    assert (found.steps[2, 100], found.right[2, 100]) == (6, 1)  # never halting: the first is wrong by then
    assert (found.steps[2, 70], found.right[2, 70]) == (4, 2)  # after 1 and 3 steps
    assert (found.steps[1, 70], found.right[1, 70]) == (3, 2)  # at most 2
    assert (found.steps[2, 25], found.right[2, 25]) == (3, 2)  # 0.25 does not exceed 0.25
    assert (found.steps[2, 24], found.right[2, 24]) == (2, 1)
