"""Charts as inline SVG, without a plotting library: a device that measures need not have one.

Colors come from the page (`.s0`, `.s1` … set `color`), so that the same drawing suits a light and a dark one.
Names are escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

_WIDTH, _HEIGHT = 600, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 18, 14, 46
_BINS = 90


@dataclass(frozen=True)
class Series:
    """One line, or one set of marks."""

    name: str
    points: tuple[tuple[float, float], ...]
    color: int  # index of the page's series color
    spans: tuple[tuple[float, float], ...] = ()  # low and high at each point, drawn as a whisker
    dashed: bool = False
    marks_only: bool = False


@dataclass(frozen=True)
class Scale:
    """Data values to pixels, linear or logarithmic."""

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
        """Round values inside the scale: 1, 2 or 5 times a power of ten."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            # Over many decades, every 1-2-5 would crowd the axis.
            steps = (1, 2, 5) if last - first <= 3 else (1,)
            values = [m * 10.0**p for p in range(first, last + 1) for m in steps]
            return [v for v in values if self.low * 0.999 <= v <= self.high * 1.001]
        step = _round_step((self.high - self.low) / about)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _round_step(raw: float) -> float:
    power = 10.0 ** math.floor(math.log10(raw))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)


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
) -> str:
    """Lines with marks over x; `label` says in words what the chart shows, `log` makes both axes logarithmic.

    Without `x_ticks` the axis gets round values of its own.
    """
    xs = [*(x_ticks or ()), *(x for s in series for x, _ in s.points)]
    ys = [y for s in series for _, y in s.points] + [v for s in series for span in s.spans for v in span]
    if log:
        x_low, x_high = min(xs) / 1.15, max(xs) * 1.15
        y_low, y_high = min(ys) / 1.25, max(ys) * 1.25
    else:
        margin = 0.3 if x_ticks else max((max(xs) - min(xs)) * 0.04, 1e-6)
        x_low, x_high = min(xs) - margin, max(xs) + margin
        pad = max((max(ys) - min(ys)) * 0.12, 0.005)
        y_low, y_high = min(ys) - pad, max(ys) + pad
    if y_limits:
        y_low, y_high = max(y_low, y_limits[0]), min(y_high, y_limits[1])
    x = Scale(x_low, x_high, _LEFT, _WIDTH - _RIGHT, log)
    y = Scale(y_low, y_high, _HEIGHT - _BOTTOM, _TOP, log)
    parts = []
    for tick in y.ticks():
        at = y(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{y_text(tick)}</text>')
    for tick in x_ticks or x.ticks(8):
        parts.append(
            f'<text class="tick" x="{x(tick):.1f}" y="{_HEIGHT - _BOTTOM + 19}" text-anchor="middle">{tick:g}</text>'
        )
    parts.append(
        f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{_HEIGHT - _BOTTOM}" y2="{_HEIGHT - _BOTTOM}"/>'
    )
    middle_x, middle_y = (_LEFT + _WIDTH - _RIGHT) / 2, (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(
        f'<text class="name" x="{middle_x}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>'
        f'<text class="name" transform="translate(15 {middle_y}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    for s in series:
        parts.append(_draw(s, x, y, y_text))
    return _svg(_HEIGHT, label, parts)


def _draw(s: Series, x: Scale, y: Scale, y_text: Callable[[float], str]) -> str:
    parts = [f'<g class="s{s.color}">']
    if not s.marks_only:
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in s.points)
        dash = ' stroke-dasharray="5 5"' if s.dashed else ""
        parts.append(f'<polyline class="line" points="{path}"{dash}/>')
    for (a, _), (low, high) in zip(s.points, s.spans or (), strict=bool(s.spans)):
        parts.append(f'<line class="whisker" x1="{x(a):.1f}" x2="{x(a):.1f}" y1="{y(low):.1f}" y2="{y(high):.1f}"/>')
    for a, b in s.points:
        title = f"<title>{escape(s.name)}: {y_text(float(f'{b:.4g}'))} at {a:g}</title>"
        if s.marks_only:
            parts.append(f'<circle class="ring" cx="{x(a):.1f}" cy="{y(b):.1f}" r="7">{title}</circle>')
        elif not s.dashed:
            parts.append(f'<circle class="dot" cx="{x(a):.1f}" cy="{y(b):.1f}" r="3.5">{title}</circle>')
    return "".join(parts) + "</g>"


def distribution_chart(
    rows: Sequence[tuple[str, int, NDArray[np.float64]]], *, label: str, text: Callable[[float], str]
) -> str:
    """One ridge a row (name, color, milliseconds of every run): where its times lie, with p50, p90 and p99 marked."""
    height_of_row, left = 58, 150
    height = len(rows) * height_of_row + _BOTTOM + 6
    marks = [np.percentile(samples, [50, 90, 99]) for _, _, samples in rows]
    # The slowest per cent of a busy machine would squeeze everything else: the axis ends soon after p99.
    fastest = min(float(samples.min()) for _, _, samples in rows)
    slowest = max(float(m[2]) for m in marks)
    log = slowest / fastest > 12
    low, high = (fastest / 1.15, slowest * 1.15) if log else (0.0, slowest * 1.06)
    x = Scale(low, high, left, _WIDTH - _RIGHT, log)
    bottom = len(rows) * height_of_row + 6
    parts = []
    for tick in x.ticks(6):
        at = x(tick)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="6" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{at:.1f}" y="{bottom + 18}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<line class="axis" x1="{left}" x2="{_WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    scale = "milliseconds, logarithmic" if log else "milliseconds"
    parts.append(
        f'<text class="name" x="{(left + _WIDTH - _RIGHT) / 2}" y="{height - 6}" text-anchor="middle">{scale}</text>'
    )
    for i, ((name, color, samples), (p50, p90, p99)) in enumerate(zip(rows, marks, strict=True)):
        base = 6 + (i + 1) * height_of_row - 6
        parts.append(
            f'<g class="s{color}"><text class="row" x="0" y="{base - 22}">{escape(_short(name))}'
            f'<title>{escape(name)}</title></text><text class="tick" x="0" y="{base - 5}">{text(p50)} · {text(p90)} · {text(p99)}</text>'
        )
        parts.append(_ridge(samples, x, base, height_of_row - 16))
        for value, length, what in ((p50, 40, "p50"), (p90, 14, "p90"), (p99, 14, "p99")):
            at = x(float(value))
            parts.append(
                f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{base}" y2="{base - length}">'
                f"<title>{escape(name)} {what}: {text(float(value))} ms</title></line>"
            )
        parts.append("</g>")
    return _svg(height, label, parts)


def _ridge(samples: NDArray[np.float64], x: Scale, base: float, height: float) -> str:
    pixels = np.clip([x(float(v)) for v in samples], x.start, x.end)
    counts, edges = np.histogram(pixels, bins=_BINS, range=(x.start, x.end))
    smooth = np.convolve(counts, [0.25, 0.5, 0.25], mode="same")
    levels = smooth / smooth.max() * height
    outline = " ".join(
        f"{(a + b) / 2:.1f},{base - level:.1f}" for a, b, level in zip(edges[:-1], edges[1:], levels, strict=True)
    )
    return f'<polygon class="area" points="{x.start:.1f},{base} {outline} {x.end:.1f},{base}"/>'


def _short(name: str, length: int = 20) -> str:
    return name if len(name) <= length else name[: length // 2 - 1] + "…" + name[-(length // 2) :]


def _svg(height: float, label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height:g}" role="img" aria-label="{escape(label, quote=True)}">'
        f"{''.join(parts)}</svg>"
    )
