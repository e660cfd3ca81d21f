"""The test results of a run as pictures, the confusion matrix and the surest mistakes, and as a table for spreadsheets."""

from __future__ import annotations

import csv
import io
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitrm.classification.confusion import MATRIX_CLASSES, Classification, surest_mistakes
from vitrm.data import Images
from vitrm.system.picture import heat_colors, on_cell, picture
from vitrm.system.short_names import shorten, shorten_all
from vitrm.system.terminal import neutral_line

_NAMED = 100  # classes whose names fit beside the matrix
_SORTED = 50  # classes from which on those that are taken for each other stand side by side
_TYPE = 9.0  # points
_PITCH = 0.65 * _TYPE  # points of a cell of many classes: names alternate between two sides
_COUNTED = 20  # classes whose counts fit into its cells
_MISTAKES = 25
_COLUMNS = 5
_LONG = 16  # letters of a class's name that fit


def confusion_csv(result: Classification) -> str:
    """Returns the confusion matrix: a row for each class, a column for each answer, images in the cells."""
    file = io.StringIO()
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(["class", *result.classes])
    rows.writerows([name, *map(int, row)] for name, row in zip(result.classes, result.confusion, strict=True))
    return file.getvalue()


def draw_confusion(result: Classification, path: str | os.PathLike[str], title: str) -> None:
    """Writes the confusion matrix to `path` as PNG, each row shaded by the shares of its class.

    The shades follow the square root of the share: a twentieth of a class is to be seen.  Of more than `MATRIX_CLASSES` classes nothing is drawn: nobody could read it.
    """
    from matplotlib.colors import PowerNorm

    count = len(result.classes)
    if count > MATRIX_CLASSES:
        return
    many = count >= _SORTED
    order = _alike_together(result) if many else np.arange(count)
    confusion, images = result.confusion[np.ix_(order, order)], result.images[order]
    cells = count * _PITCH / 72 if many else 3 + 0.35 * min(count, _SORTED)  # inches
    title = f"Confusion matrix, {title}" + ("; classes taken for each other side by side" if many else "")
    with picture(path, cells + (4.6 if many else 2), cells + (4 if many else 1), title) as figure:
        figure.set_layout_engine("compressed")  # for axes that stay square
        axes = figure.subplots()
        axes.grid(visible=False)
        shares = confusion / np.maximum(images[:, None], 1)
        # What nobody answered stays blank: mistakes are what the eye looks for.
        shade = PowerNorm(0.5, vmin=0, vmax=1)
        image = axes.imshow(np.where(confusion > 0, shares, np.nan), cmap=heat_colors(), norm=shade)
        if count <= _NAMED:
            _write_names(axes, [neutral_line(result.classes[label]) for label in order], 72 * cells / count)
        if count <= _COUNTED:
            for (i, j), number in np.ndenumerate(confusion):
                if number:
                    color = on_cell(float(shade(shares[i, j])))
                    axes.text(j, i, str(number), ha="center", va="center", color=color, fontsize=_count_size(result))
        axes.set_xlabel("the model's answer")
        axes.set_ylabel("the image's class")
        bar = figure.colorbar(image, ax=axes, label="share of the class's images, %", shrink=0.6, aspect=28)
        bar.set_ticks([0, 0.01, 0.05, 0.1, 0.2, 0.5, 1], labels=["0", "1", "5", "10", "20", "50", "100"])


def _write_names(axes: Any, classes: list[str], pitch: float) -> None:
    """Writes the classes beside the matrix, whose cells are `pitch` points wide: on two sides in turn where one has no room."""
    names = shorten_all(classes, _LONG)
    turned = 90 if max(map(len, names)) * 0.65 * _TYPE > pitch else 0
    sides = 1 if pitch > 1.2 * _TYPE else 2
    size = min(_TYPE, 0.8 * sides * pitch)
    look: dict[str, Any] = {"parse_math": False, "fontsize": size}
    axes.set_xticks(range(0, len(names), sides), names[::sides], rotation=turned, **look)
    axes.set_yticks(range(0, len(names), sides), names[::sides], **look)
    axes.tick_params(length=0)
    if sides == 2:
        top, right = axes.secondary_xaxis("top"), axes.secondary_yaxis("right")
        top.set_xticks(range(1, len(names), 2), names[1::2], rotation=turned, **look)
        right.set_yticks(range(1, len(names), 2), names[1::2], **look)
        for side in (top, right):
            side.tick_params(length=0)
            for spine in side.spines.values():
                spine.set_visible(False)


def _alike_together(result: Classification) -> NDArray[np.int64]:
    """Returns the labels in an order in which classes that are taken for each other stand side by side.

    Groups that are alike most on average are joined until one is left, with those ends together that are alike most.
    """
    shares = result.confusion / np.maximum(result.images[:, None], 1)
    alike = shares + shares.T
    groups: list[list[int]] = [[label] for label in range(len(shares))]
    means = alike.copy()
    np.fill_diagonal(means, -1)
    while len(groups) > 1:
        i, j = sorted(map(int, np.unravel_index(means.argmax(), means.shape)))
        a, b = groups[i], groups[j]
        ends = [(one, other) for one in (a, a[::-1]) for other in (b, b[::-1])]
        first, second = max(ends, key=lambda pair: alike[pair[0][-1], pair[1][0]])
        mean = (len(a) * means[i] + len(b) * means[j]) / (len(a) + len(b))
        groups[i] = first + second
        means[i], means[:, i] = mean, mean
        means[i, i] = -1
        means = np.delete(np.delete(means, j, 0), j, 1)
        del groups[j]
    return np.array(groups[0], np.int64)


def draw_mistakes(
    images: Images,
    answers: NDArray[np.int64],
    confidence: NDArray[np.floating[Any]],
    path: str | os.PathLike[str],
    title: str,
) -> None:
    """Writes the wrong `answers` [n] of the highest `confidence` [n] to `path` as PNG, each image with both classes.

    Nothing is drawn where there are none.
    """
    worst = surest_mistakes(images.labels, answers, confidence, _MISTAKES)
    if not len(worst):
        return
    rows = -(-len(worst) // _COLUMNS)
    width = 1.9 * _COLUMNS
    with picture(
        path, width, 2.35 * rows + 0.5, f"Surest mistakes: class → answer, its softmax share; {title}"
    ) as figure:
        for place, i in enumerate(worst, 1):
            axes = figure.add_subplot(rows, _COLUMNS, place)
            axes.imshow(images.pixels[i].transpose(1, 2, 0), interpolation="nearest")
            axes.set_axis_off()
            truth, answer = (
                shorten(neutral_line(images.classes[int(label)]), _LONG) for label in (images.labels[i], answers[i])
            )
            text = f"{truth}\n→ {answer}, {100 * confidence[i]:.0f} %"
            axes.set_title(text, fontsize=9, fontweight="normal", parse_math=False)


def _count_size(result: Classification) -> float:
    """Returns the size of the counts, points: the longest fits into its cell."""
    return 9.0 if len(str(result.confusion.max())) <= 3 else 6.5
