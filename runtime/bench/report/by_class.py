"""Results by class of a bench: tables and sentences for the terminal, confusion matrices for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from vitrm.classification.text import class_table, confusions
from vitrm.runtime.bench.case_names import file_and_settings
from vitrm.runtime.bench.rows import BenchResult, ClassResults
from vitrm.system.terminal import neutral_line

if TYPE_CHECKING:
    from rich.console import Console

    from vitrm.runtime.bench.report.figures import Figure
    from vitrm.system.text_table import TextTable

MOST = 4  # artifacts shown beside each other
MATRIX_CLASSES = 100  # the most whose matrix is drawn
_NEAR = 0.01  # share of images in other cells up to which two matrices look the same


def tables(result: BenchResult) -> list[TextTable]:
    """Returns a table for each set of images: recall by class of the first `MOST` different artifacts measured on it."""
    sets: dict[tuple[str, tuple[str, ...]], dict[str, ClassResults]] = {}
    for one, _ in different(result):
        artifacts = sets.setdefault((one.data, one.result.classes), {})
        if len(artifacts) < MOST:
            artifacts[one.name] = one
    return [class_table({name: one.result for name, one in artifacts.items()}) for artifacts in sets.values()]


def different(result: BenchResult) -> list[tuple[ClassResults, list[str]]]:
    """Returns the results that differ, each with the names of further artifacts that have the very same confusion matrix."""
    found: list[tuple[ClassResults, list[str]]] = []
    for one in result.by_class:
        for other, names in found:
            same = (one.data, one.result.classes) == (other.data, other.result.classes)
            if same and np.array_equal(one.result.confusion, other.result.confusion):
                names.append(one.name)
                break
        else:
            found.append((one, []))
    return found


def sentences(result: BenchResult) -> list[str]:
    """Says the most frequent mistakes of the first `MOST` artifacts that differ, and which are the same."""
    lines = []
    mistakes: dict[str, list[str]] = {}
    apart = different(result)
    for one, others in apart[:MOST]:
        if others:
            lines.append(_same(one.name, others, len(apart) == 1))
        if line := confusions(one.result):
            mistakes.setdefault(line, []).append(one.name)
    lines += [line if len(apart) == 1 else f"{', '.join(names)}: {line}" for line, names in mistakes.items()]
    return [neutral_line(line) for line in lines]


def _same(name: str, others: Sequence[str], alone: bool) -> str:
    """Says that others give the same results as `name`: by their settings, where they are of the same file.

    `alone`: whether there are no other results, so that the file need not be named.
    """
    file, setting = file_and_settings(name)
    of_file = "" if alone else f" ({file})"
    gives = "gives" if len(others) == 1 else "give"
    apart = [file_and_settings(other) for other in others]
    if setting and all(of == file and theirs for of, theirs in apart):
        settings = ", ".join(theirs for _, theirs in apart)
        return f"{settings} {gives} the same results by class as {setting}" + of_file
    return f"{', '.join(others)} {gives} the same results by class as {name}"


def print_by_class(result: BenchResult, console: Console) -> None:
    """Prints the tables and sentences to a `vitrm.system.terminal.console`."""
    for table in tables(result):
        table.print(console)
    for line in sentences(result):
        console.print(line, style="dim")


def plain_by_class(result: BenchResult) -> str:
    """Returns the same in letters alone; empty where no images have labels."""
    return "\n".join([*(table.plain() for table in tables(result)), *sentences(result)])


def confusion_figures(result: BenchResult, color_of: Mapping[str, int]) -> list[Figure]:
    """Shows the confusion matrices of the first `MOST` artifacts; of those that are all but the same, one."""
    from vitrm.runtime.bench.report.charts import heat_map
    from vitrm.runtime.bench.report.figures import Figure

    figures = []
    for one, others, near in _told_apart(different(result)[:MOST]):
        found = one.result
        if len(found.classes) > MATRIX_CLASSES:
            continue
        chart = heat_map(
            found.confusion,
            found.confusion / np.maximum(found.images[:, None], 1),
            found.classes,
            color=color_of.get(one.name, 1),
            label=f"Confusion matrix of {one.name}: {confusions(found) or 'no mistakes'}",
            x_label="the model's answer",
            y_label="the image's class",
        )
        caption = (
            "Images of the row's class that were taken for the column's; shaded by the square root of their share of the class, "
            "so that mistakes are seen."
        )
        if others:
            caption += f" The same for {', '.join(others)}."
        if near:
            moved = ", ".join(f"{name} ({count:,})" for name, count in near)
            caption += f" All but the same for others of which few images (how many) lie in another cell: {moved}."
        figures.append(Figure(chart, caption, one.name))
    return figures


def _told_apart(
    those: Sequence[tuple[ClassResults, list[str]]],
) -> list[tuple[ClassResults, list[str], list[tuple[str, int]]]]:
    """Returns those whose matrices an eye could tell apart, each with the (name, images in another cell) of those it could not."""
    apart: list[tuple[ClassResults, list[str], list[tuple[str, int]]]] = []
    for one, others in those:
        for shown, _, near in apart:
            same = (one.data, one.result.classes) == (shown.data, shown.result.classes)
            moved = int(abs(one.result.confusion - shown.result.confusion).sum() + 1) // 2 if same else 0
            if same and moved <= _NEAR * shown.result.images.sum():
                near += [(name, moved) for name in (one.name, *others)]
                break
        else:
            apart.append((one, others, []))
    return apart
