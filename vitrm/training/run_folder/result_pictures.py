"""The test results of a run as pictures, the confusion matrix and the surest mistakes, and as a table for spreadsheets."""

from __future__ import annotations

import csv
import io
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitrm.classification.results import MATRIX_CLASSES, Classification, surest_mistakes
from vitrm.data import Images
from vitrm.system.files import atomic_path
from vitrm.system.terminal import neutral_line

_NAMED = 40  # classes whose names fit beside the matrix
_COUNTED = 20  # classes whose counts fit into its cells
_MISTAKES = 25
_COLUMNS = 5
_LONG = 18  # letters of a class's name that fit


def confusion_csv(result: Classification) -> str:
    """Returns the confusion matrix: a row for each class, a column for each answer, images in the cells."""
    file = io.StringIO()
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(["class", *result.classes])
    rows.writerows([name, *map(int, row)] for name, row in zip(result.classes, result.confusion, strict=True))
    return file.getvalue()


def draw_confusion(result: Classification, path: str | os.PathLike[str], title: str) -> None:
    """Writes the confusion matrix to `path` as PNG, each row shaded by the shares of its class.

    Of more than `MATRIX_CLASSES` classes nothing is drawn: nobody could read it.
    """
    count = len(result.classes)
    if count > MATRIX_CLASSES:
        return
    side = min(4 + 0.3 * count, 16)
    canvas, figure = _figure(side + 1, side)
    axes = figure.subplots()
    shares = result.confusion / np.maximum(result.images[:, None], 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if count <= _NAMED:
        names = [_short(name) for name in result.classes]
        axes.set_xticks(range(count), names, rotation=90, parse_math=False)
        axes.set_yticks(range(count), names, parse_math=False)
    if count <= _COUNTED:
        for (i, j), images in np.ndenumerate(result.confusion):
            if images:
                color = "white" if shares[i, j] > 0.5 else "black"
                axes.text(j, i, str(images), ha="center", va="center", color=color, fontsize="small")
    axes.set_xlabel("answer")
    axes.set_ylabel("class")
    figure.colorbar(image, ax=axes, label="share of the class's images", shrink=0.7)
    figure.suptitle(_short(title, 90), parse_math=False)
    with atomic_path(path) as temporary:
        canvas.print_png(temporary)


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
    canvas, figure = _figure(2.2 * _COLUMNS, 2.6 * rows + 0.6)
    for place, i in enumerate(worst, 1):
        axes = figure.add_subplot(rows, _COLUMNS, place)
        axes.imshow(images.pixels[i].transpose(1, 2, 0), interpolation="nearest")
        axes.set_axis_off()
        truth, answer = (_short(images.classes[int(label)]) for label in (images.labels[i], answers[i]))
        axes.set_title(f"{truth}\n→ {answer} {100 * confidence[i]:.0f} %", fontsize="small", parse_math=False)
    figure.suptitle(_short(f"surest mistakes, {title}", 90), parse_math=False)
    with atomic_path(path) as temporary:
        canvas.print_png(temporary)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    """Returns a canvas and its figure.  Without pyplot: no global state, no backend to choose."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return FigureCanvasAgg(figure), figure


def _short(text: str, length: int = _LONG) -> str:
    text = neutral_line(text)
    return text if len(text) <= length else text[: length - 1] + "…"
