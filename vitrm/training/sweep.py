"""Ablations: one run for every combination of some settings' values, as a table and as pictures.

    vitrm-train --sweep n=1,2,3,6 n_sup=1,2,4,8,16 --data cifar10 --out runs/ablation

    runs/ablation/n=1,n_sup=1 …     a run folder per cell of the table
    sweep.csv                       a row per finished cell
    accuracy-over-n.png …           a picture per setting

The same command goes on where it was stopped: finished cells are taken as they are, an interrupted one is resumed.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitrm.config import KINDS
from vitrm.errors import UserError
from vitrm.fields import declared
from vitrm.recipe import Recipe
from vitrm.system import strict_json
from vitrm.system.files import write_text
from vitrm.system.picture import SERIES, heat_colors, picture
from vitrm.system.short_names import shorten, shorten_all
from vitrm.training.run_config import DEFAULT_MODEL, DataSettings, RunConfig, parse

if TYPE_CHECKING:
    from vitrm.training.loop import TrainingResult

CSV_FILE = "sweep.csv"
MAX_CELLS = 10_000
_MARKERS = "osD^v"
_MEANING = 40  # letters of a setting's help that fit into a title
_APART = 0.08  # of the axis: least distance of two values to scale
_LABEL, _TICKS, _LEGEND = (
    28,
    50,
    14,
)  # letters of a label; letters that stand side by side below a picture; lines that fit beside it
_COLUMNS = ("test_accuracy", "validation_accuracy", "best_epoch", "epochs", "seconds")


@dataclass(frozen=True)
class Axis:
    """A setting and the values that it takes."""

    name: str  # a field of the model's config or of the recipe, or model, recipe, seed, limit_train
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Cell:
    """One combination."""

    values: dict[str, Any]  # setting → value
    settings: RunConfig

    @property
    def name(self) -> str:
        return ",".join(f"{k}={v}" for k, v in self.values.items())


@dataclass(frozen=True)
class SweepRow:
    """The result of a finished cell."""

    cell: Cell
    depth: int  # steps at which the test accuracy is taken: the deepest that training reached
    result: TrainingResult

    @property
    def accuracy(self) -> float:
        """On the test images, in [0, 1]."""
        return self.result.test_accuracy[self.depth - 1]


def parse_axes(texts: Sequence[str]) -> list[Axis]:
    """Axes from NAME=VALUE,VALUE,… each.  Raises `UserError`."""
    axes: list[Axis] = []
    for text in texts:
        name, equals, values = text.partition("=")
        parsed = tuple(_value(v) for v in values.split(",")) if values else ()
        if not (name and equals and parsed) or "" in parsed:
            raise UserError(f"--sweep {text}: expected NAME=VALUE,VALUE,…, for example n=1,2,3")
        if len(set(map(repr, parsed))) < len(parsed) or name in [a.name for a in axes]:
            raise UserError(f"--sweep {text}: a value or a setting is named twice")
        parse({name: parsed[0]}, "--sweep")
        axes.append(Axis(name, parsed))
    return axes


def cells(axes: Sequence[Axis], base: RunConfig) -> list[Cell]:
    """Every combination of the axes' values over the settings `base`, the last axis changing fastest."""
    count = math.prod(len(axis.values) for axis in axes)
    if count > MAX_CELLS:
        raise UserError(f"--sweep: {count:,} combinations, at most {MAX_CELLS:,} are trained: name fewer values")
    made = []
    for values in itertools.product(*(axis.values for axis in axes)):
        chosen = {axis.name: value for axis, value in zip(axes, values, strict=True)}
        made.append(Cell(chosen, parse(chosen, "--sweep").over(base)))
    return made


def sweep(
    axes: Sequence[Axis],
    wanted: Sequence[Cell],
    out: Path,
    run: Callable[[Cell, Path], SweepRow],
    say: Callable[[str], None],
    writes: bool = True,
) -> list[SweepRow]:
    """Runs every cell of `wanted` by `run` in its folder under `out`, and keeps the table and pictures up to date.

    A cell that ends with a `UserError` (it diverged, say) is told and left out.  `writes`: False in a process that shares
    the work with another one, which writes.  Raises `UserError` in the end if a cell is missing, and KeyboardInterrupt.
    """
    rows: list[SweepRow] = []
    failed: list[str] = []
    for i, cell in enumerate(wanted):
        say(f"cell {i + 1} of {len(wanted)}: {cell.name}")
        try:
            rows.append(run(cell, out / cell.name))
        except UserError as error:
            say(f"cell {cell.name} failed: {error}")
            failed.append(cell.name)
            continue
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{len(rows)} of {len(wanted)} cells are done, the same command goes on") from None
        if writes:
            write_table(axes, rows, out / CSV_FILE)
            for axis in axes:
                draw_accuracy(axis, rows, out / f"accuracy-over-{axis.name}.png")
    if failed:
        raise UserError(f"{len(failed)} of {len(wanted)} cells failed ({', '.join(failed)}), the others are in {out}")
    return rows


def write_table(axes: Sequence[Axis], rows: Sequence[SweepRow], path: Path) -> None:
    """One line per row: the settings, what was found, and the test accuracy at every depth (test_1, test_2, …)."""
    text = io.StringIO()
    depths = max(len(row.result.test_accuracy) for row in rows)
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*(a.name for a in axes), "depth", *_COLUMNS, *(f"test_{i + 1}" for i in range(depths))])
    for row in rows:
        result = row.result
        seconds = round(sum(line["seconds"] for line in result.history), 1)
        table.writerow(
            [
                *row.cell.values.values(),
                row.depth,
                row.accuracy,
                result.validation_accuracy,
                result.best_epoch,
                result.epochs,
                seconds,
                *result.test_accuracy,
            ]
        )
    write_text(path, text.getvalue())


def draw_accuracy(axis: Axis, rows: Sequence[SweepRow], path: Path) -> None:
    """The test accuracy over the values of `axis` as PNG: one line for each combination of the other settings.

    Runs that differ in their seed alone are one line, of their mean, with a bar from the least to the largest.
    """
    lines = _lines(axis, rows)
    named = any(lines)
    with picture(
        path, 7.6 if named else 5.4, 3.9, f"{_subject(rows)}: test accuracy by {_meaning(axis.name)}, %"
    ) as figure:
        axes = figure.subplots()
        places = _draw_axis(axes, axis)
        for i, (label, points) in enumerate(lines.items()):
            values = sorted(points)
            means = [sum(points[v]) / len(points[v]) for v in values]
            spread = [[m - min(points[v]) for v, m in zip(values, means, strict=True)]]
            spread.append([max(points[v]) - m for v, m in zip(values, means, strict=True)])
            bars = spread if any(len(points[v]) > 1 for v in values) else None
            # More lines than colors are one hue, darker line by line: the order of the values is what the eye reads.
            color = SERIES[i] if len(lines) <= len(SERIES) else heat_colors()(0.35 + 0.65 * (i + 1) / len(lines))
            look = {
                "marker": _MARKERS[i % len(_MARKERS)],
                "color": color,
                "capsize": 3,
                "label": shorten(label, _LABEL),
            }
            axes.errorbar([places[v] for v in values], means, yerr=bars, **look)
        trainings = "mean and range of seeds" if _several_seeds(lines) else "one training each"
        axes.set_title(f"after the deepest trained step; {trainings}", fontweight="normal")
        if named:
            others = [name for name in rows[0].cell.values if name not in (axis.name, "seed")]
            columns = -(-len(lines) // _LEGEND)
            title = _words(others[0], _LABEL) if len(others) == 1 else None
            look = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "ncols": columns, "alignment": "left"}
            axes.legend(title=title, title_fontsize=8.5, **look)


def _subject(rows: Sequence[SweepRow]) -> str:
    """Returns the model and the data set of the runs, where all have the same."""
    models = {str(row.cell.settings.model.get("preset", DEFAULT_MODEL)) for row in rows}
    sets = {str(row.cell.settings.data.get("name", DataSettings().name)) for row in rows}
    return f"{models.pop() if len(models) == 1 else 'models'} on {Path(sets.pop()).name if len(sets) == 1 else 'data sets'}"


def _words(name: str, width: int) -> str:
    """Returns a setting's name and what it means, in lines of `width` letters."""
    meaning = _meaning(name)
    return "\n".join(textwrap.wrap(name if meaning == name else f"{name}: {meaning}", width))


def _meaning(name: str) -> str:
    """Returns what a setting's help says, without what stands in brackets or behind a comma; its name where that is long."""
    settings = {**declared(Recipe), **{key: value for kind in KINDS.values() for key, value in declared(kind).items()}}
    if name not in settings:
        return name
    meaning = re.split(r"[,;:] ", re.sub(r" \([^)]*\)", "", settings[name].help))[0]
    return meaning if len(meaning) <= _MEANING else name


def _draw_axis(axes: Any, axis: Axis) -> list[float]:
    """Draws the axis of a setting's values and returns their places: numbers to scale, unless their labels would meet."""
    numbers = [v for v in axis.values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    places = [float(i) for i in range(len(axis.values))]
    if len(numbers) == len(axis.values) > 1:
        scales = [numbers, [math.log(v) for v in numbers]] if min(numbers) > 0 else [numbers]
        for scale in scales:
            at = sorted(scale)
            if min(b - a for a, b in itertools.pairwise(at)) > _APART * (at[-1] - at[0]):
                places = [(v - at[0]) / (at[-1] - at[0]) * (len(at) - 1) for v in scale]
                break
    texts = shorten_all([str(v) for v in axis.values], _LABEL)
    crowded = sum(map(len, texts)) > _TICKS
    axes.set_xticks(places, texts, rotation=90 if crowded else 0, parse_math=False)
    axes.set_xlim(-0.3, len(texts) - 0.7)
    axes.set_xlabel(_words(axis.name, 60), parse_math=False)
    return places


def _lines(axis: Axis, rows: Sequence[SweepRow]) -> dict[str, dict[int, list[float]]]:
    """Returns the accuracies of each line, percent: by the other settings, then by the place of the axis's value."""
    places = {repr(value): i for i, value in enumerate(axis.values)}
    lines: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        others = {k: v for k, v in row.cell.values.items() if k not in (axis.name, "seed")}
        label = ", ".join(f"{k} = {v}" for k, v in others.items())
        place = places[repr(row.cell.values[axis.name])]
        lines.setdefault(label, {}).setdefault(place, []).append(100 * row.accuracy)
    return lines


def _several_seeds(lines: dict[str, dict[int, list[float]]]) -> bool:
    return any(len(values) > 1 for points in lines.values() for values in points.values())


def _value(text: str) -> Any:
    """A number, true or false, or else the text itself."""
    try:
        value = strict_json.parse(text)
    except ValueError:
        return text
    return value if isinstance(value, (int, float, bool)) else text
