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
_ROOM = 12.0  # inches for the cells of the largest matrix
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
    side = min(4 + 0.3 * count, 16)
    with picture(path, side + 1, side, f"Confusion matrix, {title}") as figure:
        figure.set_layout_engine("compressed")  # for axes that stay square
        axes = figure.subplots()
        axes.grid(visible=False)
        shares = result.confusion / np.maximum(result.images[:, None], 1)
        # What nobody answered stays blank: mistakes are what the eye looks for.
        shade = PowerNorm(0.5, vmin=0, vmax=1)
        image = axes.imshow(np.where(result.confusion > 0, shares, np.nan), cmap=heat_colors(), norm=shade)
        if count <= _NAMED:
            names = shorten_all([neutral_line(name) for name in result.classes], _LONG)
            size = min(9.0, 0.8 * _ROOM * 72 / count)
            axes.set_xticks(range(count), names, rotation=90, parse_math=False, fontsize=size)
            axes.set_yticks(range(count), names, parse_math=False, fontsize=size)
            axes.tick_params(length=0)
        if count <= _COUNTED:
            for (i, j), images in np.ndenumerate(result.confusion):
                if images:
                    color = on_cell(float(shade(shares[i, j])))
                    axes.text(j, i, str(images), ha="center", va="center", color=color, fontsize=_count_size(result))
        axes.set_xlabel("the model's answer")
        axes.set_ylabel("the image's class")
        bar = figure.colorbar(image, ax=axes, label="share of the class's images, %", shrink=0.6, aspect=28)
        bar.set_ticks([0, 0.01, 0.05, 0.1, 0.2, 0.5, 1], labels=["0", "1", "5", "10", "20", "50", "100"])


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
    with picture(path, width, 2.35 * rows + 0.5, f"Surest mistakes (class → answer), {title}") as figure:
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
