"""Results by class: against scikit-learn's, and where there is nothing to count."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.metrics import (
    balanced_accuracy_score,
    confusion_matrix,
    precision_recall_fscore_support,
    top_k_accuracy_score,
)

from vitrm.classification.confusion import classify, surest_mistakes
from vitrm.classification.text import class_table, confusions, never_recognized

NAMES = ("cat", "dog", "eel")


def test_figures_are_scikit_learns():
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 30, 2000), rng.random((2000, 30))
    scores[np.arange(2000), labels] += rng.random(2000)
    answers = scores.argmax(1)
    in_top5 = (np.argsort(-scores, 1)[:, :5] == labels[:, None]).any(1)
    found = classify(labels, answers, [f"c{i}" for i in range(30)], in_top5)
    precision, recall, _, images = precision_recall_fscore_support(labels, answers)
    np.testing.assert_array_equal(found.confusion, confusion_matrix(labels, answers))
    np.testing.assert_allclose(found.precision, precision)
    np.testing.assert_allclose(found.recall, recall)
    np.testing.assert_array_equal(found.images, images)
    assert found.balanced_accuracy == pytest.approx(balanced_accuracy_score(labels, answers))
    assert found.accuracy == pytest.approx((answers == labels).mean())
    assert found.top5_accuracy == pytest.approx(top_k_accuracy_score(labels, scores, k=5))
    (label, answer, count), *rest = found.most_confused(4)
    assert count == ((labels == label) & (answers == answer)).sum() >= rest[0][2]
    assert label != answer


def test_a_class_without_images_or_answers_has_no_share():
    # Two cats, one of them without an answer; dogs are there and never the answer; no eels, but one answer.
    found = classify(np.array([0, 0, 1, 1]), np.array([0, -1, 0, 2]), NAMES, np.ones(4, bool))
    np.testing.assert_array_equal(found.images, [2, 2, 0])
    np.testing.assert_array_equal(found.recall, [0.5, 0, np.nan])
    np.testing.assert_array_equal(found.precision, [0.5, np.nan, 0])
    assert (found.accuracy, found.balanced_accuracy, found.top5_accuracy) == (0.25, 0.25, None)
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values["classes"][2] == {"name": "eel", "images": 0, "recall": None, "precision": 0.0}
    assert values["confusion"] == [[1, 0, 0], [1, 0, 1], [0, 0, 0]]
    assert values["most_confused"][0] == {"class": "dog", "taken_for": "cat", "images": 1}
    many = classify(np.arange(300), np.arange(300)[::-1], [str(i) for i in range(300)])
    assert many.to_dict()["confusion"] is None
    assert len(many.to_dict()["most_confused"]) == 20


def test_one_image_of_a_rare_class_does_not_choose_between_models():
    labels = np.array([0] * 20 + [1])
    learned, chance = (
        np.zeros(21, np.int64),
        np.array([0] * 4 + [1] * 17),
    )  # all common ones right; a coin that hit the rare one
    found, other = (classify(labels, answers, NAMES[:2]) for answers in (learned, chance))
    assert other.balanced_accuracy > found.balanced_accuracy
    assert found.estimated_balanced_accuracy == pytest.approx((21 / 22 + 1 / 3) / 2)
    assert other.estimated_balanced_accuracy < found.estimated_balanced_accuracy
    # With ten of them it does: 9 of 10 are more than a coin.
    labels = np.array([0] * 20 + [1] * 10)
    found, other = (classify(labels, np.array(a), NAMES[:2]) for a in ([0] * 30, [0] * 15 + [1] * 5 + [0] + [1] * 9))
    assert other.estimated_balanced_accuracy > found.estimated_balanced_accuracy


def test_the_surest_mistakes_come_first():
    labels, answers = np.array([0, 0, 1, 1, 2]), np.array([1, 0, 0, -1, 1])
    confidence = np.array([0.6, 0.99, 0.9, 1.0, 0.7])
    np.testing.assert_array_equal(surest_mistakes(labels, answers, confidence, 2), [2, 4])
    assert len(surest_mistakes(labels, labels, confidence, 2)) == 0


def test_a_rare_class_that_is_never_recognized_is_named_with_a_way_out():
    labels = np.array([0] * 20 + [1] * 20 + [2] * 2)
    answers = np.where(labels == 2, 0, labels)
    found = classify(labels, answers, NAMES)
    (line,) = never_recognized(found)
    assert line.startswith("not one of the 2 images of 'eel' was recognized")
    (line,) = never_recognized(found, np.array([100, 94, 6]), "try --balance")
    assert "training had 6 of 200: try --balance" in line
    assert not never_recognized(found, np.array([70, 70, 60])), "it is not rare: something else is wrong"
    assert not never_recognized(classify(labels, labels, NAMES))
    assert confusions(found) == "most common mistakes: eel taken for cat (2)"
    assert confusions(classify(labels, labels, NAMES)) == ""


def test_tables_list_all_of_few_classes_and_the_worst_of_many():
    labels = np.repeat(np.arange(3), 4)
    found = classify(labels, np.where(np.arange(12) == 5, 0, labels), NAMES)
    plain = class_table({"": found}).plain()
    assert [line.split() for line in plain.splitlines()[3:]] == [
        ["cat", "4", "100.0", "%", "80.0", "%", "–"],
        ["dog", "4", "75.0", "%", "100.0", "%", "cat", "(1)"],
        ["eel", "4", "100.0", "%", "100.0", "%", "–"],
    ]
    two = class_table({"a.onnx": found, "b.onnx": classify(labels, labels, NAMES)}).plain()
    assert two.splitlines()[1].split() == ["class", "images", "a.onnx", "b.onnx"]
    assert two.splitlines()[4].split() == ["dog", "4", "75.0", "%", "100.0", "%"]
    labels = np.arange(100)
    many = classify(labels, np.where(labels == 70, 3, labels), [f"c{i}" for i in labels])
    lines = class_table({"": many}).plain().splitlines()
    assert "10 of 100" in lines[0]
    assert len(lines) == 13
    assert lines[3].split()[:4] == ["c70", "1", "0.0", "%"]
    hostile = class_table({"": classify(np.array([0, 1]), np.array([1, 0]), ("a\x1b[2J", "b\nc"))}).plain()
    assert "\x1b" not in hostile
    assert len(hostile.splitlines()) == 5
