"""Corruptions on the page: charts of them, and one image under each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitrm.runtime.bench.case_names import case_name, file_and_settings
from vitrm.runtime.bench.report import numbers
from vitrm.runtime.bench.report.charts import Series, line_chart
from vitrm.runtime.bench.report.figures import MOST, SHARES, Figure, series_color, share, told
from vitrm.runtime.bench.report.gallery import png_address
from vitrm.runtime.bench.robustness.corruptions import CORRUPTIONS, corrupt
from vitrm.runtime.bench.robustness.measure import SEVERITIES, Robustness
from vitrm.runtime.bench.robustness.table import most_told, words
from vitrm.runtime.bench.rows import CaseEvidence

_NEAR = 0.01  # shares nearer to each other are one line to an eye
_SIDE = 64  # pixels of an example: fourteen of them stay far below a megabyte
_EXPECTED = 5  # color of what halt_prob expects, which no kind of corruption has
_FIELDS = ("accuracy", "full_accuracy", "mean_halt_prob")  # that are drawn


@dataclass(frozen=True)
class Example:
    """One image under one corruption."""

    image: str  # a data: address
    name: str
    figure: str  # what became of the accuracy


# Which are alike -------------------------------------------------------------------------------


def alike(found: Sequence[Robustness]) -> list[list[Robustness]]:
    """Puts together the artifacts whose charts no eye could tell apart, in order of their first ones."""
    groups: list[list[Robustness]] = []
    for one in found:
        for group in groups:
            if _near(one, group[0]):
                group.append(one)
                break
        else:
            groups.append([one])
    return groups


def _near(one: Robustness, other: Robustness) -> bool:
    if (one.data, one.images, len(one.corruptions)) != (other.data, other.images, len(other.corruptions)):
        return False
    for kind in (None, *dict.fromkeys(c.group for c in one.corruptions)):
        for field in _FIELDS:
            pairs = zip(_by_severity(one, field, kind), _by_severity(other, field, kind), strict=False)
            if any(abs(a - b) > _NEAR for (_, a), (_, b) in pairs):
                return False
    return (one.clean.mean_halt_prob is None) == (other.clean.mean_halt_prob is None)


def names(group: Sequence[Robustness]) -> str:
    """Names a group: the file once, where that is all that they differ by."""
    files, settings = zip(*(file_and_settings(one.name) for one in group), strict=True)
    if len(set(files)) == 1 and all(settings):
        return case_name(files[0], [", ".join(settings)])
    return ", ".join(one.name for one in group)


def same_within(group: Sequence[Robustness]) -> str:
    """Says whose charts are not drawn, as they would lie on the first one's; empty where none is left out."""
    if len(group) < 2:
        return ""
    others = ", ".join(one.name for one in group[1:])
    return f"The charts are of {group[0].name}; those of {others} are the same within {_NEAR * 100:g} point."


# Charts ----------------------------------------------------------------------------------------


def overview(groups: Sequence[Sequence[Robustness]], color_of: Mapping[str, int]) -> Figure | None:
    """Shows accuracy by severity of all artifacts together; None where all are alike, or too many for one chart."""
    if not 1 < len(groups) <= MOST:
        return None
    together = [Series(names(g), _by_severity(g[0], "accuracy"), color_of.get(g[0].name, 0)) for g in groups]
    return _figure("All artifacts", together, "Mean over the corruptions.")


def figure_rows(groups: Sequence[Sequence[Robustness]]) -> list[list[Figure]]:
    """Returns rows of figures: of a group, accuracy by kind of corruption, and beside it whether its halt_prob notices.

    Artifacts without halt_prob, which have the first figure alone, share a row.
    """
    single: list[Figure] = []
    reach = _reach(groups)
    pairs = []
    for group in groups:
        whose = f"{names(group)}: " if len(groups) > 1 else ""
        first = _by_kind(group[0], f"{whose}{'which' if whose else 'Which'} corruptions hurt", reach)
        if group[0].clean.mean_halt_prob is None:
            single.append(first)
        else:
            pairs.append(
                [first, _trust(most_told(group), f"{whose}{'does' if whose else 'Does'} halt_prob notice?", reach)]
            )
    return [single, *pairs] if single else pairs


def _reach(groups: Sequence[Sequence[Robustness]]) -> list[float]:
    """Returns the values that all vertical axes hold, so that the same height is the same share in every chart."""
    values: list[float] = []
    for group in groups:
        for one, field in [(group[0], "accuracy"), *((most_told(group), field) for field in _FIELDS)]:
            values += [y for _, y in _by_severity(one, field)]
        for kind in dict.fromkeys(c.group for c in group[0].corruptions):
            values += [y for _, y in _by_severity(group[0], "accuracy", kind)]
    return values


def _by_kind(found: Robustness, title: str, reach: Sequence[float]) -> Figure:
    groups = dict.fromkeys(c.group for c in found.corruptions)
    series = [Series(group, _by_severity(found, "accuracy", group), series_color(i)) for i, group in enumerate(groups)]
    series.append(Series("all corruptions", _by_severity(found, "accuracy"), 0))
    return _figure(title, series, "Mean over the corruptions of each kind.", reach)


def _trust(found: Robustness, title: str, reach: Sequence[float]) -> Figure:
    """Shows the share of right answers beside what halt_prob expects.

    Its colors are none of the kinds' in the chart beside it, but for the line that both have.
    """
    right, full = _by_severity(found, "accuracy"), _by_severity(found, "full_accuracy")
    coincide = bool(full) and all(abs(a - b) <= _NEAR for (_, a), (_, b) in zip(full, right, strict=True))
    series = [
        Series("right, all corruptions", right, 0),
        Series("expected by halt_prob (its mean)", _by_severity(found, "mean_halt_prob"), _EXPECTED),
    ]
    if full and not coincide:
        series.append(Series("right at full depth", full, 0, dashed=True))
    caption = "Mean over the corruptions. Where the expected line lies above the other, halt_prob trusts the answers too much."
    if coincide:
        caption += " On average over them halting costs at most 1 point at any severity."
    return _figure(title, series, caption, reach)


def _by_severity(found: Robustness, field: str, group: str | None = None) -> tuple[tuple[float, float], ...]:
    """Returns (severity, mean over the corruptions), the clean images at 0; nothing where it is not known."""
    values = [getattr(found.at(severity, group), field) for severity in (0, *SEVERITIES)]
    return () if None in values else tuple((float(i), v) for i, v in enumerate(values))


def _figure(title: str, series: Sequence[Series], caption: str, reach: Sequence[float] = ()) -> Figure:
    chart = line_chart(
        series,
        label=told(f"{title}, by severity", series, lambda y: numbers.percent(y, 1)),
        x_label="severity (0: the images as they are)",
        y_label="right answers",
        y_text=share,
        x_ticks=[0, *SEVERITIES],
        y_limits=SHARES,
        y_holds=reach,
    )
    return Figure(chart, caption, title, series)


# Examples --------------------------------------------------------------------------------------


def examples(found: Sequence[Robustness], cases: Sequence[CaseEvidence]) -> list[Example]:
    """Shows one test image as it is and under every corruption at the worst severity, for the first artifact."""
    case = next((c for c in cases if found and c.name == found[0].name), None)
    if case is None:
        return []
    one, sample, decimals = found[0], case.sample, numbers.digits(found[0].images)
    at = sample.order()[:1]
    pixels, kinds = sample.pixels[at], {c.name: c for c in CORRUPTIONS}
    made = [Example(_picture(pixels[0]), "as it is", numbers.percent(one.clean.accuracy, decimals))]
    for under in one.corruptions:
        worst = corrupt(pixels, kinds[under.name], SEVERITIES[-1], seed=one.seed, positions=sample.index[at])
        right = numbers.percent(under.severities[-1].accuracy, decimals)
        made.append(Example(_picture(worst[0]), words(under), right))
    return made


def _picture(pixels: NDArray[np.uint8]) -> str:
    """Returns an image [3, H, W] as a `data:` address, a large one smaller."""
    from PIL import Image

    if max(pixels.shape[1:]) > _SIDE:
        image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        image.thumbnail((_SIDE, _SIDE))
        pixels = np.asarray(image).transpose(2, 0, 1)
    return png_address(pixels)
