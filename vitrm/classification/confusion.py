"""Results of a classifier by class: precision, recall, confusions and the surest mistakes.

Made here once, for the end of training and for the bench.  Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

TOP5_CLASSES = 20  # the fewest classes of which five say something: a guess is among them in a quarter of cases
MATRIX_CLASSES = 200  # the most that a whole confusion matrix is written out for, as JSON or as a picture
_RARE = 0.5  # share of the mean images per class below which a class is rare


@dataclass(frozen=True, eq=False)
class Classification:
    """Answers to labelled images, counted by class."""

    classes: tuple[str, ...]  # names, by label
    confusion: NDArray[np.int64]  # [classes, classes]: images of the row's class that were taken for the column's
    images: NDArray[np.int64]  # [classes]: of each; with those that got no answer, so it may exceed the row's sum
    top5_accuracy: float | None = None  # in [0, 1]; None for few classes, or where it is not known

    @property
    def recall(self) -> NDArray[np.float64]:
        """Of the images of each class, the share that was recognized [classes]; NaN where there are none."""
        return _share(np.diagonal(self.confusion), self.images)

    @property
    def precision(self) -> NDArray[np.float64]:
        """Of the images taken for each class, the share that is of it [classes]; NaN where there are none."""
        return _share(np.diagonal(self.confusion), self.confusion.sum(0))

    @property
    def accuracy(self) -> float:
        """Share of all images that were recognized."""
        return float(np.diagonal(self.confusion).sum() / self.images.sum())

    @property
    def balanced_accuracy(self) -> float:
        """Mean recall of the classes that have images: each counts the same, however rare."""
        return float(np.nanmean(self.recall))

    @property
    def estimated_balanced_accuracy(self) -> float:
        """Mean over all classes of what their recall is expected to be, having seen so few images: (right + 1) / (images + 2).

        That is the mean of the posterior with nothing known before (Laplace's rule of succession).  Of a class with one image the recall
        is 0 or 1, by chance; to choose between models by `balanced_accuracy` would be to choose by that one image.
        """
        return float(((np.diagonal(self.confusion) + 1) / (self.images + 2)).mean())

    def most_confused(self, count: int) -> list[tuple[int, int, int]]:
        """Returns (label, answer, images) of the `count` most frequent mistakes, the most frequent first."""
        wrong = self.confusion - np.diag(np.diagonal(self.confusion))
        order = np.argsort(-wrong, axis=None, kind="stable")[:count]
        return [
            (int(i), int(j), int(wrong[i, j]))
            for i, j in zip(*np.unravel_index(order, wrong.shape), strict=True)
            if wrong[i, j]
        ]

    def never_recognized(self, examples: NDArray[np.int64] | None = None) -> list[int]:
        """Returns the labels of rare classes of which not one image was recognized.

        Rare is what has under half of the mean `examples` per class [classes]: training images, or these images where none are given.
        """
        counts = self.images if examples is None else examples
        rare = counts < _RARE * counts.sum() / len(counts)
        return [int(i) for i in np.flatnonzero(rare & (self.recall == 0))]

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-ready values; null for a share of nothing, and no matrix of more than `MATRIX_CLASSES` classes."""
        small = len(self.classes) <= MATRIX_CLASSES
        columns = zip(self.classes, self.images, self.recall, self.precision, strict=True)
        return {
            "accuracy": self.accuracy,
            "balanced_accuracy": self.balanced_accuracy,
            "top5_accuracy": self.top5_accuracy,
            "classes": [
                {"name": name, "images": int(count), "recall": _or_none(recall), "precision": _or_none(precision)}
                for name, count, recall, precision in columns
            ],
            "confusion": self.confusion.tolist() if small else None,
            "most_confused": [
                {"class": self.classes[i], "taken_for": self.classes[j], "images": count}
                for i, j, count in self.most_confused(20)
            ],
        }


def classify(
    labels: NDArray[np.int64],
    answers: NDArray[np.int64],
    classes: Sequence[str],
    in_top5: NDArray[np.bool_] | None = None,
) -> Classification:
    """Counts `answers` [n] to images with `labels` [n]; a negative answer is none.

    `in_top5` [n] says which labels are among an image's five likeliest.
    """
    count = len(classes)
    given = answers >= 0
    pairs = labels[given] * count + answers[given]
    enough = in_top5 is not None and count >= TOP5_CLASSES
    return Classification(
        classes=tuple(classes),
        confusion=np.bincount(pairs, minlength=count * count).reshape(count, count),
        images=np.bincount(labels, minlength=count),
        top5_accuracy=float(in_top5.mean()) if enough and in_top5 is not None else None,
    )


def surest_mistakes(
    labels: NDArray[np.int64], answers: NDArray[np.int64], confidence: NDArray[np.floating[Any]], count: int
) -> NDArray[np.int64]:
    """Returns the indices of the `count` images with wrong answers of the highest `confidence` [n], the surest first."""
    wrong = np.flatnonzero((answers != labels) & (answers >= 0))
    return wrong[np.argsort(-confidence[wrong], kind="stable")[:count]]


def _share(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)


def _or_none(share: float) -> float | None:
    return None if np.isnan(share) else float(share)
