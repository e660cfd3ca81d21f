"""Results by class in words: a table, the most frequent confusions, and what to do about a class that is never recognized."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from vitrm.classification.confusion import Classification
from vitrm.system.text_table import TextRow, TextTable

ALL_CLASSES = 20  # the most that are listed whole; of more, the worst
_WORST = 10
_CONFUSED = 5


def class_table(results: Mapping[str, Classification]) -> TextTable:
    """Returns recall by class of each of `results`, by name; of a single one precision and what it is most often taken for, too.

    All are of the same classes and images.  Of many classes it lists those with the lowest recall.
    """
    first = next(iter(results.values()))
    count, alone = len(first.classes), len(results) == 1
    lowest = np.min([np.nan_to_num(r.recall, nan=2.0) for r in results.values()], 0)
    shown = range(count) if count <= ALL_CLASSES else np.argsort(lowest, kind="stable")[:_WORST]
    head = ["class", "images", *(("recall", "precision", "taken for") if alone else results)]
    rows = []
    for i in map(int, shown):
        cells = [first.classes[i], str(first.images[i]), *(_percent(r.recall[i]) for r in results.values())]
        if alone:
            cells += [_percent(first.precision[i]), _mistake(first, i)]
        rows.append(TextRow(cells))
    title = "By class" if alone else "Recall by class"
    if count > ALL_CLASSES:
        title += f": the {_WORST} of {count} with the lowest recall"
    return TextTable(head, rows, {"class", "taken for"}, title=title)


def confusions(result: Classification) -> str:
    """Says the most frequent mistakes in one line; empty where there are none."""
    most = [f"{result.classes[i]} taken for {result.classes[j]} ({n})" for i, j, n in result.most_confused(_CONFUSED)]
    return f"most common mistakes: {', '.join(most)}" if most else ""


def never_recognized(
    result: Classification,
    examples: NDArray[np.int64] | None = None,
    way_out: str = "add images of it to the training set",
) -> list[str]:
    """Says of each rare class whose recall is 0 that it is, and the way out.

    `examples` [classes] are the training images of each class, where they are known.
    """
    lines = []
    for i in result.never_recognized(examples):
        trained = "" if examples is None else f"; training had {examples[i]} of {examples.sum()}"
        name, count = repr(result.classes[i]), result.images[i]
        missed = f"the only image of {name} was not" if count == 1 else f"not one of the {count} images of {name} was"
        lines.append(f"{missed} recognized, a rare class{trained}: {way_out}")
    return lines


def _percent(share: float) -> str:
    return "–" if np.isnan(share) else f"{100 * share:.1f} %"


def _mistake(result: Classification, label: int) -> str:
    row = result.confusion[label].copy()
    row[label] = 0
    most = int(row.max())
    if not most:
        return "–"
    first, *others = (result.classes[i] for i in np.flatnonzero(row == most))
    if not others:
        return f"{first} ({most})"
    return (
        f"{first}, {others[0]} ({most} each)" if len(others) == 1 else f"{first} and {len(others)} more ({most} each)"
    )
