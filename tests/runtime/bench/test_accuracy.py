"""Counting right answers, agreement and flips, on cases worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

import vitrm.runtime
from vitrm import data
from vitrm.runtime.bench.accuracy import NO_ANSWER, Predictions, accuracy, compare, least_certain, predict, wilson


def answers(*labels: int, halt: list[float] | None = None, scale: float = 1.0) -> Predictions:
    logits = np.zeros((len(labels), 4), np.float32)
    logits[np.arange(len(labels)), labels] = scale
    return Predictions(logits, None if halt is None else np.asarray(halt, np.float32), None)


def test_flips_and_agreement() -> None:
    labels = np.array([0, 1, 2, 3, 0, 1])
    #          right, right, wrong, wrong, right, wrong
    reference = answers(0, 1, 0, 0, 0, 2, halt=[0.9, 0.9, 0.1, 0.6, 0.9, 0.5])
    #          right, lost, gained, other wrong answer, right, same wrong answer
    own = answers(0, 3, 2, 1, 0, 2, halt=[0.8, 0.4, 0.1, 0.51, 0.9, 0.500001], scale=1.5)
    compared = compare(reference, own, labels)
    assert compared.agreement == 3 / 6
    assert compared.disagreeing.tolist() == [1, 2, 3]
    assert (compared.gained, compared.lost) == (1, 1)
    assert compared.max_logit_difference == 1.5
    assert compared.halt_agreement == pytest.approx(4 / 6)  # image 1, and 5: 0.5 itself does not halt
    assert accuracy(reference, labels).value == 3 / 6
    assert accuracy(own, labels).value == 3 / 6


def test_without_labels_or_halting_head() -> None:
    compared = compare(answers(0, 1), answers(0, 2), None)
    assert (compared.gained, compared.lost, compared.halt_agreement) == (None, None, None)
    assert compared.agreement == 0.5


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_agrees_with_nothing(broken: float) -> None:
    own = answers(0, 1)
    own.logits[0, 3] = broken
    assert own.top1.tolist() == [NO_ANSWER, 1]
    labels = np.array([0, 1])
    assert accuracy(own, labels).value == 0.5
    assert compare(answers(0, 1), own, labels).agreement == 0.5
    assert compare(own, own, labels).agreement == 0.5
    assert compare(answers(0, 1), own, labels).max_logit_difference == math.inf
    assert own.probabilities[0].tolist() == [0, 0, 0, 0]


def test_wilson() -> None:
    # Textbook values (Brown, Cai & DasGupta's definition), and its behavior at the ends.
    low, high = wilson(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson(0, 10)[0] == 0
    assert wilson(10, 10)[1] == pytest.approx(1)
    assert wilson(10, 10)[0] < 0.73
    low, high = wilson(9310, 10000)
    assert high - low == pytest.approx(4 * 0.00253, rel=0.02)


def test_probabilities_survive_large_logits() -> None:
    large = Predictions(np.array([[1000.0, 0, 0, 999]], np.float32), None, None)
    assert large.probabilities.sum() == pytest.approx(1)
    assert large.probabilities[0, 0] == pytest.approx(1 / (1 + math.exp(-1)))


def test_least_certain_comes_first() -> None:
    logits = np.array([[5, 0, 0], [1, 0.9, 0], [3, 0, 2]], np.float32)
    assert least_certain(Predictions(logits, None, None), 2).tolist() == [1, 2]


@pytest.mark.slow
def test_predict_is_the_same_in_any_batches(artifact: Path) -> None:
    pixels = data.load("digits", "test").pixels[:45]
    session = vitrm.runtime.open(artifact, threads=1)
    fractions: list[float] = []
    whole = predict(session, pixels, batch=45)
    parts = predict(session, pixels, batch=20, progress=fractions.append)
    np.testing.assert_allclose(whole.logits, parts.logits, atol=1e-3)
    assert parts.logits.shape == (45, 10)
    assert parts.halt_prob is not None
    assert parts.steps_used is not None
    assert fractions == [pytest.approx(20 / 45), pytest.approx(40 / 45), 1.0]
    session.prefers_one_batch = True  # the last, smaller batch is filled up, and cut again
    padded = predict(session, pixels, batch=20)
    assert padded.logits.shape == (45, 10)
    assert padded.steps_used is not None
    assert len(padded.steps_used) == 45
    np.testing.assert_allclose(padded.logits, parts.logits, atol=1e-3)
