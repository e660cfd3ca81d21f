"""The pictures of test results: every class has its name, and names never overlap."""

from __future__ import annotations

import numpy as np
import pictures
import pytest

from vitrm.classification.confusion import classify
from vitrm.data import Images
from vitrm.training.run_folder.result_pictures import _alike_together, draw_confusion, draw_mistakes


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 10, 20, 40, 100])
def test_a_confusion_matrix_is_legible(classes, tmp_path, monkeypatch):
    seen = pictures.watch(monkeypatch)
    random = np.random.default_rng(0)
    labels = random.integers(0, classes, 2000)
    answers = np.where(random.random(2000) < 0.8, labels, random.integers(0, classes, 2000))
    names = [f"a class with a rather long name, number {i}" for i in range(classes)]
    result = classify(labels, answers, names)
    draw_confusion(result, tmp_path / "confusion.png", "a long title " * 20)
    named = [text for text in seen if text.startswith("a cl")]
    assert len(set(named)) == classes
    counts = [text for text in seen if text.isdigit()]
    ticks = 7  # of the color bar
    assert len(counts) == ticks + (int((result.confusion > 0).sum()) if classes <= 20 else 0)


def test_classes_taken_for_each_other_stand_side_by_side():
    labels = np.repeat(np.arange(60), 10)
    other = np.where(np.arange(600) % 10 < 4, (labels + 30) % 60, labels)  # i and i + 30 are alike
    order = list(_alike_together(classify(labels, other, [str(i) for i in range(60)])))
    assert sorted(order) == list(range(60))
    assert all(abs(order.index(i) - order.index(i + 30)) == 1 for i in range(30))


def test_mistakes_have_both_classes(tmp_path, monkeypatch):
    seen = pictures.watch(monkeypatch)
    images = Images(
        name="a set",
        split="test",
        pixels=np.zeros((30, 3, 8, 8), np.uint8),
        labels=np.zeros(30, np.int64),
        classes=("a class with a long name", "another one"),
    )
    answers, confidence = np.ones(30, np.int64), np.linspace(0.5, 0.99, 30)
    draw_mistakes(images, answers, confidence, tmp_path / "mistakes.png", "a run")
    captions = [text for text in seen if "\n→" in text]
    assert len(captions) == 25
    assert captions[0].endswith("→ another one, 99 %")
