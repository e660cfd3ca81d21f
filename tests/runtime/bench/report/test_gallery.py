"""Gallery of the page: who is wrong is said under every image."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from vitrm.runtime.bench.accuracy import Predictions, compare
from vitrm.runtime.bench.images import Sample
from vitrm.runtime.bench.report.gallery import Tile, gallery, mistakes
from vitrm.runtime.bench.rows import CaseEvidence

CLASSES = ("ant", "bee", "cat", "dog")


def answers(*labels: int) -> Predictions:
    logits = np.zeros((len(labels), 4), np.float32)
    for row, label in zip(logits, labels, strict=True):
        row[label] = 3 if label >= 0 else np.nan
    return Predictions(logits, None, None)


def case(own: Predictions, eager: Predictions | None, labels: list[int] | None) -> CaseEvidence:
    count = len(own.logits)
    truth = None if labels is None else np.array(labels)
    pixels = np.zeros((count, 3, 4, 4), np.uint8)
    sample = Sample(pixels, truth, np.arange(count) + 100, CLASSES, "insects", "test", count)
    metadata: Any = SimpleNamespace(classes=CLASSES)
    return CaseEvidence(
        file="a.onnx",
        name="a.onnx",
        kind="artifact",
        metadata=metadata,
        sample=sample,
        predictions=own,
        comparison=None if eager is None else compare(eager, own, truth),
        reference=eager,
        times_ms={},
    )


def lines(tile: Tile) -> list[str]:
    shown = [*([tile.verdict] if tile.verdict else []), *tile.answers]
    return [line.text.replace("\u00a0", " ") for line in shown]


def test_says_whose_mistake_it_is() -> None:
    # newly wrong, newly right, both wrong with different answers, both wrong with the same, both right
    found = case(answers(1, 1, 1, 2, 3), answers(0, 0, 2, 2, 3), [0, 1, 0, 0, 3])
    shown = gallery(found)
    assert "3 of 5 images differently" in shown.text
    assert (
        "1 newly wrong (only eager is right), 1 newly right (only eager is wrong), 1 both wrong (with different"
        in shown.text
    )
    assert [lines(tile) for tile in shown.tiles] == [
        ["✗ newly wrong", "✓ eager: ant (87 %)", "✗ artifact: bee (87 %)"],
        ["✓ newly right", "✗ eager: ant (87 %)", "✓ artifact: bee (87 %)"],
        ["✗ both wrong", "✗ eager: cat (87 %)", "✗ artifact: bee (87 %)"],
    ]
    (worst,) = mistakes([found])
    assert worst.text == "is wrong on 3 of 5 images. On 2 of them its eager model is wrong too. The 3 it is surest of:"
    assert lines(worst.tiles[2]) == ["✗ both wrong: cat", "both 87 %"]
    assert worst.tiles[2].verdict is not None
    assert worst.tiles[2].verdict.verdict == "wrong"


def test_says_that_both_are_right_where_nothing_differs() -> None:
    shown = gallery(case(answers(0, 1), answers(0, 1), [0, 2]))
    assert sorted(lines(tile)[0] for tile in shown.tiles) == ["✓ both right: ant", "✗ both wrong: bee"]


def test_without_eager_model_or_labels() -> None:
    alone = case(answers(1), None, [0])
    assert lines(gallery(alone).tiles[0]) == ["✗ wrong", "✗ bee (87 %)"]
    assert mistakes([alone])[0].text == "is wrong on 1 of 1 images. The 1 it is surest of:"
    unlabelled = gallery(case(answers(1), answers(2), None)).tiles[0]
    assert unlabelled.verdict is None
    assert lines(unlabelled) == ["eager: cat (87 %)", "artifact: bee (87 %)"]


def test_an_answer_that_is_not_finite_is_wrong() -> None:
    tile = gallery(case(answers(-1), answers(0), [0])).tiles[0]
    assert lines(tile) == ["✗ newly wrong", "✓ eager: ant (87 %)", "✗ artifact: not finite"]
    both = gallery(case(answers(-1), answers(-1), [0])).tiles[0]
    assert lines(both) == ["✗ both wrong", "✗ eager: not finite", "✗ artifact: not finite"]
