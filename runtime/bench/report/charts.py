"""Charts of the page, as inline SVG.

This is the only chart system of the runtime, and it needs no plotting library.  SVG inside the page takes its colors from
the page's style (`.s0`, `.s1` … set `color`), so one drawing suits a light page, a dark one and paper.  Its text stays text,
every mark says its value under the pointer, and a chart takes about ten kilobytes.  A picture made by matplotlib has none
of these, and a device that measures would have to install it.  The standard library's XML writer escapes names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from vitrm.system.short_names import shorten_all

Node = ElementTree.Element
_WIDTH, _HEIGHT = 480, 280  # a phone's width times 1.4: text stays legible there
_RIGHT, _TOP, _BOTTOM = 18, 14, 46
_LETTER = 7.6  # width of a digit where the style makes text largest: on a phone
_BINS = 90
_Y_TICKS = 8  # at most, on a vertical axis
_LOG_TICKS = 9  # at most, on a horizontal logarithmic one
_LOG_STEPS = (
    (1, 1.5, 2, 3, 4, 5, 6, 8),
    (1, 2, 3, 5, 7),
    (1, 2, 5),
    (1, 3),
    (1,),
)  # within a power of ten, the finest first
_RING, _RING_STEP = 7.0, 4.5  # radius of a ring, and how much more the next around it has
_FEW, _NAMED, _COUNTED = 12, 32, 16  # rows of a matrix up to which text is large, names fit, counts fit into the cells
_LARGE = 600  # width of a matrix with more than a few rows
_NAME_LETTER, _CLASS = 7.2, 13  # width of a letter of a class's name, and letters that are written of it
_RIDGE, _RIDGE_NAME = 66, 36  # height of one distribution, and the letters of its name
_PERCENTILES = ("p50", "p90", "p99")
_HEADING = 14  # height of the line that names a distribution's figures
FEW_RUNS = 100  # below which a histogram would show the noise of its bins: every run has a mark of its own


@dataclass(frozen=True)
class Series:
    """One line, or one set of marks."""

    name: str
    points: tuple[tuple[float, float], ...]
    color: int  # index of the page's series color
    spans: tuple[tuple[float, float], ...] = ()  # low and high at each point, drawn as a whisker
    dashed: bool = False
    marks_only: bool = False
    dots: bool = (
        True  # False where points are so many that their dots would hide the line, and where they are no measurements
    )

    @property
    def key(self) -> str:
        """The style of its sign in a legend."""
        return "ring" if self.marks_only else "dash" if self.dashed else "line"


@dataclass(frozen=True)
class Scale:
    """A map from data values to pixels, linear or logarithmic."""

    low: float
    high: float
    start: float  # pixel of `low`
    end: float  # pixel of `high`
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(max(value, 1e-12))
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self, about: int = 5) -> list[float]:
        """Returns round values inside the scale: linear, 1, 2 or 5 times a power of ten; logarithmic, more where it spans little."""
        if self.log:
            choices = [self._powers(steps) for steps in _LOG_STEPS]
            return next((values for values in choices if len(values) <= about), choices[-1])
        step = _round_step((self.high - self.low) / about)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def _powers(self, steps: Sequence[float]) -> list[float]:
        """Returns these multiples of powers of ten inside the scale."""
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        values = [m * 10.0**p for p in range(first, last + 1) for m in steps]
        return [v for v in values if self.low * 0.999 <= v <= self.high * 1.001]


def _round_step(raw: float) -> float:
    power = 10.0 ** math.floor(math.log10(raw))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)


# Lines -----------------------------------------------------------------------------------------


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    x_label: str,
    y_label: str,
    y_text: Callable[[float], str],
    x_ticks: Sequence[float] | None = None,
    log: bool = False,
    y_limits: tuple[float, float] | None = None,
    x_mark: tuple[float, str] | None = None,
    y_mark: tuple[float, str] | None = None,
    y_holds: Sequence[float] = (),
) -> Markup:
    """Draws lines with marks over x.

    Args:
        series: what is drawn, the first at the bottom.
        label: says in words what the chart shows.
        x_label: name of the horizontal axis.
        y_label: name of the vertical axis.
        y_text: writes a value of the vertical axis.
        x_ticks: values marked on the horizontal axis; None: round ones.
        log: makes both axes logarithmic.
        y_limits: values that the vertical axis does not go beyond.
        x_mark: a value of the horizontal axis that a vertical line marks, and what is written beside it.
        y_mark: the same of the vertical axis.
        y_holds: further values that the vertical axis reaches, as those of a chart beside this one.
    """
    x, y = _scales(series, x_ticks, log, y_limits, [*y_holds, *([y_mark[0]] if y_mark else [])])
    y_ticks = [(tick, y_text(tick)) for tick in y.ticks(_Y_TICKS)]
    left = 42 + _LETTER * max((len(text) for _, text in y_ticks), default=0)
    x = replace(x, start=left)
    svg = _svg(_HEIGHT, label)
    for tick, text in y_ticks:
        _horizontal(svg, "grid", y(tick), left)
        _text(svg, "tick", left - 8, y(tick) + 4, text, anchor="end")
    for tick, text in _apart([(x(t), f"{t:g}") for t in x_ticks or x.ticks(6)]):
        _text(svg, "tick", tick, _HEIGHT - _BOTTOM + 19, text)
    _horizontal(svg, "axis", _HEIGHT - _BOTTOM, left)
    _text(svg, "name", (left + _WIDTH - _RIGHT) / 2, _HEIGHT - 8, x_label)
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    name = _node(svg, "text", "name", transform=f"translate(15 {middle}) rotate(-90)", text_anchor="middle")
    name.text = y_label
    _draw_marks(svg, x, y, x_mark, y_mark)
    rings: list[tuple[float, float]] = []
    for one in series:
        _draw(svg, one, x, y, y_text, rings)
    return _markup(svg)


def _draw_marks(
    svg: Node, x: Scale, y: Scale, x_mark: tuple[float, str] | None, y_mark: tuple[float, str] | None
) -> None:
    """Draws the lines that mark a value of an axis, each with its name where curves that rise leave room."""
    if x_mark:
        place = x(x_mark[0])
        _vertical(svg, "bound", place, _TOP, _HEIGHT - _BOTTOM)
        _text(svg, "tick", place + 5, _HEIGHT - _BOTTOM - 8, x_mark[1], anchor="start")
    if y_mark:
        _horizontal(svg, "bound", y(y_mark[0]), x.start)
        _text(svg, "tick", _WIDTH - _RIGHT, y(y_mark[0]) + 16, y_mark[1], anchor="end")


def _apart(labels: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """Leaves out the labels (place of the middle, text) that would touch the one before."""
    kept: list[tuple[float, str]] = []
    for place, text in labels:
        if not kept or place - kept[-1][0] > _LETTER * (len(text) + len(kept[-1][1]) + 1.5) / 2:
            kept.append((place, text))
    return kept


def _scales(
    series: Sequence[Series],
    x_ticks: Sequence[float] | None,
    log: bool,
    y_limits: tuple[float, float] | None,
    y_holds: Sequence[float],
) -> tuple[Scale, Scale]:
    """Returns the axes that hold every point, whisker and tick, and what they shall hold besides, with a margin."""
    xs = [*(x_ticks or ()), *(x for s in series for x, _ in s.points)]
    ys = [*y_holds, *(y for s in series for _, y in s.points), *(v for s in series for span in s.spans for v in span)]
    if log:
        x_low, x_high = min(xs) / 1.15, max(xs) * 1.15
        y_low, y_high = min(ys) / 1.25, max(ys) * 1.25
    else:
        margin = 0.3 if x_ticks else max((max(xs) - min(xs)) * 0.04, 1e-6)
        x_low, x_high = min(xs) - margin, max(xs) + margin
        pad = max((max(ys) - min(ys)) * 0.12, 0.005)
        y_low, y_high = min(ys) - pad, max(ys) + pad
        for _ in range(3):  # a wider axis may have wider steps; it ends at values that are written
            step = _round_step((y_high - y_low) / _Y_TICKS)
            y_low, y_high = math.floor(y_low / step) * step, math.ceil(y_high / step) * step
    if y_limits:
        y_low, y_high = max(y_low, y_limits[0]), min(y_high, y_limits[1])
    return (
        Scale(x_low, x_high, 0, _WIDTH - _RIGHT, log),
        Scale(y_low, y_high, _HEIGHT - _BOTTOM, _TOP, log),
    )


def _draw(
    svg: Node, s: Series, x: Scale, y: Scale, y_text: Callable[[float], str], rings: list[tuple[float, float]]
) -> None:
    """Draws one series; `rings` are the pixels of those drawn before, around which a further ring is larger."""
    group = _node(svg, "g", f"s{s.color}")
    if not s.marks_only:
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in s.points)
        _node(group, "polyline", "line", points=path, **({"stroke_dasharray": "5 5"} if s.dashed else {}))
    for (a, _), (low, high) in zip(s.points, s.spans or (), strict=bool(s.spans)):
        _vertical(group, "whisker", x(a), y(low), y(high))
    for a, b in s.points:
        title = f"{s.name}: {y_text(float(f'{b:.4g}'))} at {a:g}"
        if s.marks_only:
            place = (x(a), y(b))
            inside = sum(math.dist(place, other) < _RING / 2 for other in rings)
            rings.append(place)
            _titled(_node(group, "circle", "ring", cx=place[0], cy=place[1], r=_RING + inside * _RING_STEP), title)
        else:
            # Where no dot is seen, the pointer finds the value all the same.
            _titled(_node(group, "circle", "dot" if s.dots else "spot", cx=x(a), cy=y(b), r="3.5"), title)


# Distributions ---------------------------------------------------------------------------------


def spans_decades(times: Sequence[NDArray[np.float64]]) -> bool:
    """Returns whether times differ by so much that a linear axis would squeeze the fast ones into its first stroke."""
    return max(float(np.percentile(t, 99)) for t in times) > 12 * min(float(t.min()) for t in times)


def distribution_chart(
    rows: Sequence[tuple[str, int, NDArray[np.float64]]], *, label: str, text: Callable[[float], str], log: bool
) -> Markup:
    """Draws one ridge a row, or a mark for each run where they are few: where its times lie, with p50, p90 and p99 marked.

    Args:
        rows: of each its name, its color and the milliseconds of every run.
        label: says in words what the chart shows.
        text: writes milliseconds.
        log: makes the axis logarithmic.
    """
    marks = [np.percentile(samples, [50, 90, 99]) for _, _, samples in rows]
    # The slowest per cent of a busy machine would squeeze everything else: the axis ends soon after p99.
    fastest = min(float(samples.min()) for _, _, samples in rows)
    slowest = max(float(m[2]) for m in marks)
    low, high = (fastest / 1.15, slowest * 1.15) if log else (0.0, slowest * 1.06)
    x = Scale(low, high, _RIGHT, _WIDTH - _RIGHT, log)
    top = _HEADING + 6
    height, bottom = len(rows) * _RIDGE + _BOTTOM + top, len(rows) * _RIDGE + top
    svg = _svg(height, label)
    _text(svg, "tick", _WIDTH, _HEADING - 2, f"{' · '.join(_PERCENTILES)}, ms", anchor="end")
    for tick, written in _apart([(x(t), f"{t:g}") for t in x.ticks(_LOG_TICKS if log else 6)]):
        for i in range(1, len(rows) + 1):  # beside the names, not through them
            _vertical(svg, "grid", tick, _HEADING + i * _RIDGE - _RIDGE + 32, _HEADING + i * _RIDGE)
        _text(svg, "tick", tick, bottom + 18, written)
    _horizontal(svg, "axis", bottom, left=_RIGHT)
    _text(svg, "name", _WIDTH / 2, height - 6, "milliseconds, logarithmic" if log else "milliseconds")
    names = shorten_all([name for name, _, _ in rows], _RIDGE_NAME)
    for i, (row, short, percentiles) in enumerate(zip(rows, names, marks, strict=True)):
        _draw_ridge(svg, row, short, percentiles, x, base=_HEADING + (i + 1) * _RIDGE, text=text)
    return _markup(svg)


def _draw_ridge(
    svg: Node,
    row: tuple[str, int, NDArray[np.float64]],
    short: str,
    percentiles: NDArray[np.float64],
    x: Scale,
    *,
    base: float,
    text: Callable[[float], str],
) -> None:
    name, color, samples = row
    group = _node(svg, "g", f"s{color}")
    heading = _text(group, "row", 0, base - _RIDGE + 22, short, anchor=None)
    _titled(heading, name)
    figures = " · ".join(text(float(p)) for p in percentiles)
    _text(group, "tick", _WIDTH, base - _RIDGE + 22, figures, anchor="end")
    if len(samples) < FEW_RUNS:
        for sample in samples[samples <= x.high]:
            _vertical(group, "run", x(float(sample)), base - 2, base - 20)
    else:
        _node(group, "polygon", "area", points=_ridge(samples, x, base, _RIDGE - 32))
    for value, length, what in zip(percentiles, (_RIDGE - 30, 12, 12), _PERCENTILES, strict=True):
        mark = _vertical(group, "mark", x(float(value)), base, base - length)
        _titled(mark, f"{name} {what}: {text(float(value))} ms")


def _ridge(samples: NDArray[np.float64], x: Scale, base: float, height: float) -> str:
    """Returns the outline of a smoothed histogram, as an SVG list of points."""
    pixels = np.clip([x(float(v)) for v in samples], x.start, x.end)
    counts, edges = np.histogram(pixels, bins=_BINS, range=(x.start, x.end))
    smooth = np.convolve(counts, [0.25, 0.5, 0.25], mode="same")
    levels = smooth / smooth.max() * height
    outline = " ".join(
        f"{(a + b) / 2:.1f},{base - level:.1f}" for a, b, level in zip(edges[:-1], edges[1:], levels, strict=True)
    )
    return f"{x.start:.1f},{base} {outline} {x.end:.1f},{base}"


# Matrices --------------------------------------------------------------------------------------


def heat_map(
    counts: NDArray[np.int64],
    shares: NDArray[np.float64],
    names: Sequence[str],
    *,
    color: int,
    label: str,
    x_label: str,
    y_label: str,
) -> Markup:
    """Draws a square matrix as cells.

    Args:
        counts: written into the cells where there is room [n, n]; where it is 0 nothing is drawn.
        shares: in [0, 1]; a cell is as dark as the square root of its own, so that small ones are seen [n, n].
        names: of rows and columns alike, written where there is room.
        color: index of the page's series color.
        label: says in words what the matrix shows.
        x_label: what columns are.
        y_label: what rows are.
    """
    many = len(names)
    named, counted = many <= _NAMED, many <= _COUNTED
    written = shorten_all(names, _CLASS)
    room = 36 + _NAME_LETTER * max(map(len, written), default=0) if named else 34
    left, bottom = room, room
    width = _WIDTH if many <= _FEW else _LARGE
    side = width - left - _RIGHT
    cell = side / many
    svg = _svg(side + _TOP + bottom, label, width)
    group = _node(svg, "g", f"s{color}")
    for (row, column), count in np.ndenumerate(counts):
        if not count:
            continue
        x, y, shade = left + column * cell, _TOP + row * cell, math.sqrt(shares[row, column])
        drawn = _node(group, "rect", "cell", x=x, y=y, width=cell, height=cell, fill_opacity=f"{shade:.3f}")
        _titled(drawn, f"{names[row]} taken for {names[column]}: {count}")
        if counted:
            style = "over" if shade > 0.7 else "count"
            _text(svg, style, x + cell / 2, y + cell / 2 + 4, str(count))
    _node(svg, "rect", "frame", x=left, y=_TOP, width=side, height=side)
    if named:
        for i, (name, short) in enumerate(zip(names, written, strict=True)):
            middle = (i + 0.5) * cell
            _titled(_text(svg, "tick", left - 6, _TOP + middle + 4, short, anchor="end"), name)
            x, y = left + middle + 4, _TOP + side + 8
            below = _node(svg, "text", "tick", transform=f"translate({x:.1f} {y:.1f}) rotate(-90)", text_anchor="end")
            below.text = short
    _text(svg, "name", left + side / 2, side + _TOP + bottom - 6, x_label)
    turned = _node(
        svg, "text", "name", transform=f"translate(14 {_TOP + side / 2:.1f}) rotate(-90)", text_anchor="middle"
    )
    turned.text = y_label
    return _markup(svg)


# SVG -------------------------------------------------------------------------------------------


def _svg(height: float, label: str, width: float = _WIDTH) -> Node:
    return ElementTree.Element("svg", {"viewBox": f"0 0 {width:g} {height:g}", "role": "img", "aria-label": label})


def _node(parent: Node, tag: str, style: str, **attributes: Any) -> Node:
    """Adds an element; numbers are written with one decimal."""
    texts = {
        name.replace("_", "-"): v if isinstance(v, str) else f"{v:.1f}".removesuffix(".0")
        for name, v in attributes.items()
    }
    return ElementTree.SubElement(parent, tag, {"class": style, **texts})


def _horizontal(parent: Node, style: str, y: float, left: float) -> Node:
    return _node(parent, "line", style, x1=left, x2=_WIDTH - _RIGHT, y1=y, y2=y)


def _vertical(parent: Node, style: str, x: float, y1: float, y2: float) -> Node:
    return _node(parent, "line", style, x1=x, x2=x, y1=y1, y2=y2)


def _text(parent: Node, style: str, x: float, y: float, text: str, anchor: str | None = "middle") -> Node:
    node = _node(parent, "text", style, x=x, y=y, **({"text_anchor": anchor} if anchor else {}))
    node.text = text
    return node


def _titled(node: Node, title: str) -> None:
    """Adds what a browser shows under the pointer."""
    ElementTree.SubElement(node, "title").text = title


def _markup(svg: Node) -> Markup:
    return Markup(ElementTree.tostring(svg, encoding="unicode"))
