"""Results by class: what an eye could not tell apart is drawn and said once."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from vitrm.classification.confusion import Classification
from vitrm.runtime.bench.report.by_class import confusion_figures, sentences
from vitrm.runtime.bench.rows import ClassResults


def results(*moved: int) -> SimpleNamespace:
    """A result of an artifact for each of `moved`, with so many of 400 images in another cell than the first one's."""
    found = []
    for i, count in enumerate(moved):
        confusion = np.array([[180, 20], [10, 190]]) + count * np.array([[-1, 1], [0, 0]])
        classes = Classification(("cat", "dog"), confusion, confusion.sum(1))
        found.append(ClassResults(name=f"{i}.onnx", data="a set", result=classes))
    return SimpleNamespace(by_class=found)


def test_nearly_the_same_matrix_is_drawn_once() -> None:
    figures = confusion_figures(results(0, 3, 40, 41), {})
    assert [figure.title for figure in figures] == ["0.onnx", "2.onnx"]
    assert "1.onnx (3)" in figures[0].caption
    assert "3.onnx (1)" in figures[1].caption


def test_a_small_share_is_seen() -> None:
    chart = str(confusion_figures(results(0), {})[0].chart)
    assert 'fill-opacity="0.224"' in chart  # 10 of 200 images


def test_the_same_mistakes_are_said_once() -> None:
    said = sentences(results(0, 3))
    assert len(said) == 2  # other counts, other sentences
    assert len(sentences(results(0, 0))) == 2  # the very same matrix, and its mistakes once
