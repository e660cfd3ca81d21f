"""Figures of the page: which charts a result gives, with their captions and legends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vitrm.runtime.bench.accuracy import wilson
from vitrm.runtime.bench.case_names import file_and_settings
from vitrm.runtime.bench.report import numbers, table
from vitrm.runtime.bench.report.charts import FEW_RUNS, Series, distribution_chart, line_chart, spans_decades
from vitrm.runtime.bench.rows import BenchResult, BenchRow, CaseEvidence, DepthCurve
from vitrm.runtime.halting.choose import HaltingChoice, Reliability

if TYPE_CHECKING:
    from markupsafe import Markup

_COLORS = 6  # that the style has beside s0, the neutral one of the eager model
MOST = 12  # lines or ridges that one chart can show
_BATCHES = 3  # sizes from which on a line over them says more than the table
_SPREAD = 3  # lines whose whiskers can be told apart
SHARES = (0.0, 1.0)


@dataclass(frozen=True)
class Figure:
    """A chart with what stands around it."""

    chart: Markup
    caption: str
    title: str | None = None
    legend: Sequence[Series] = ()


def colors(result: BenchResult) -> dict[str, int]:
    """Returns a series color by name; the eager model is neutral, because everything is compared with it."""
    names = dict.fromkeys(r.name for r in result.rows if r.kind != "eager")
    return {name: series_color(i) for i, name in enumerate(names)}


def series_color(number: int) -> int:
    """Returns the index of the color of a further series."""
    return 1 + number % _COLORS


def share(value: float) -> str:
    """Writes a share on an axis or under the pointer."""
    return f"{value * 100:.4g} %"


# Latency ---------------------------------------------------------------------------------------


def latency_figures(result: BenchResult, evidence: Sequence[CaseEvidence], color_of: Mapping[str, int]) -> list[Figure]:
    """Shows the distribution of times at each batch size, and time per image by batch size."""
    batches = list(dict.fromkeys(r.batch for r in result.rows))
    figures = []
    every = {
        batch: [(c.name, color_of.get(c.name, 0), c.times_ms[batch]) for c in evidence if batch in c.times_ms]
        for batch in batches
    }
    drawn = {batch: rows for batch, rows in every.items() if 0 < len(rows) <= MOST}
    # One kind of axis for charts that are looked at together.
    log = any(spans_decades([times for _, _, times in rows]) for rows in drawn.values())
    for batch, rows in drawn.items():
        label = f"Distribution of latency at batch {batch}: " + "; ".join(
            f"{r.name} p50 {numbers.milliseconds(r.latency_ms.p50)} ms, p99 {numbers.milliseconds(r.latency_ms.p99)} ms"
            for r in result.rows
            if r.batch == batch and r.latency_ms
        )
        chart = distribution_chart(rows, label=label, text=numbers.milliseconds, log=log)
        figures.append(Figure(chart, _runs(rows, batch), f"Batch {batch}"))
    return [*figures, *_by_batch(result, color_of, batches)]


def _runs(rows: Sequence[tuple[str, int, NDArray[np.float64]]], batch: int) -> str:
    """Says what a distribution is of: its axis is that of its batch size alone."""
    counts = [len(times) for _, _, times in rows]
    runs = f"{min(counts):,}" if min(counts) == max(counts) else f"{min(counts):,} to {max(counts):,}"
    whole = "one image" if batch == 1 else f"all {batch} images together"
    strokes = (
        ", each a stroke" if max(counts) < FEW_RUNS else ", few of them as strokes" if min(counts) < FEW_RUNS else ""
    )
    return f"Times of {whole}: {runs} runs a row{strokes}. The long mark is p50, the short ones p90 and p99."


def _by_batch(result: BenchResult, color_of: Mapping[str, int], batches: Sequence[int]) -> list[Figure]:
    series: list[Series] = []
    for name in dict.fromkeys(r.name for r in result.rows):
        rows = sorted((r for r in result.rows if r.name == name), key=lambda r: r.batch)
        latencies = [(r.batch, r.latency_ms) for r in rows if r.latency_ms]
        if latencies:
            points = tuple((float(b), v.p50 / b) for b, v in latencies)
            spans = tuple((v.min / b, v.p90 / b) for b, v in latencies)
            color = color_of.get(name, 0)
            again = color == 0 and any(s.color == 0 for s in series)  # the eager model, at another threshold
            series.append(Series(name, points, color, spans, dashed=again))
    if len(batches) < _BATCHES or not 0 < len(series) <= MOST:
        return []
    spread = len(series) <= _SPREAD
    if not spread:
        series = [replace(s, spans=()) for s in series]
    chart = line_chart(
        series,
        label=told("Milliseconds per image by batch size", series, lambda y: f"{y:.3g}"),
        x_label="batch size",
        y_label="ms per image",
        y_text=lambda v: f"{v:g}",
        x_ticks=sorted(batches),
        log=True,
    )
    caption = "p50 divided by the batch size" + ("; whiskers from the fastest run to p90." if spread else ".")
    return [Figure(chart, caption, "By batch size", series)]


def told(subject: str, series: Sequence[Series], text: Callable[[float], str]) -> str:
    """Says every point in words, for those who hear the page."""
    return f"{subject}: " + "; ".join(
        f"{s.name} " + ", ".join(f"{text(y)} at {x:g}" for x, y in s.points) for s in series
    )


# Accuracy --------------------------------------------------------------------------------------


def frontier_figures(result: BenchResult) -> list[Figure]:
    """Shows for each batch size every artifact's accuracy over its time per image, and the line above which none lies."""
    figures = []
    for batch in dict.fromkeys(r.batch for r in result.rows):
        places = [
            (r, r.latency_ms.p50 / batch, r.accuracy)
            for r in result.rows
            if r.batch == batch and r.ok and r.latency_ms and r.accuracy is not None and r.kind == "artifact"
        ]
        if len(places) < 3:
            continue
        kinds = dict.fromkeys(_kind(r) for r, _, _ in places)
        series = []
        for i, kind in enumerate(kinds):
            points = tuple(sorted((ms, accuracy) for r, ms, accuracy in places if _kind(r) == kind))
            series.append(Series(kind, points, series_color(i), marks_only=True))
        best = _best([(ms, accuracy) for _, ms, accuracy in places])
        if len(best) > 1:
            series.append(Series("no other is both faster and more accurate", best, 0, dashed=True, dots=False))
        label = f"Accuracy against milliseconds per image at batch {batch}: " + "; ".join(
            f"{r.name} {numbers.percent(accuracy)} in {numbers.milliseconds(ms)} ms" for r, ms, accuracy in places
        )
        chart = line_chart(
            series, label=label, x_label="ms per image", y_label="accuracy", y_text=share, y_limits=SHARES
        )
        caption = "Every artifact at every depth and threshold measured." + _grain(places[0][0].images)
        figures.append(Figure(chart, caption, f"Batch {batch}", series))
    return figures


def _grain(images: int | None) -> str:
    """Says how much of the accuracy one image is: steps of that size are not to be read as trends."""
    return f" One image is {100 / images:.2g} points." if images else ""


def _kind(row: BenchRow) -> str:
    halts = row.halt_threshold is not None and row.halt_threshold < 1
    return f"{row.graph} {row.precision}{', halting' if halts else ''}"


def _best(places: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Returns the (milliseconds, accuracy) than which none is both faster and more accurate."""
    best: list[tuple[float, float]] = []
    for ms, accuracy in sorted(places, key=lambda p: (p[0], -p[1])):
        if not best or accuracy > best[-1][1]:
            best.append((ms, accuracy))
    return tuple(best)


def depth_figure(curve: DepthCurve, color_of: Mapping[str, int]) -> Figure:
    """Shows accuracy after each step, what the halting head says of it, and the artifacts' own points."""
    depths, name = range(1, len(curve.accuracy) + 1), model_name(curve)
    accuracy = tuple(zip(map(float, depths), curve.accuracy, strict=True))
    halt_prob = tuple(zip(map(float, depths), curve.halt_prob, strict=True))
    series = [
        Series("eager PyTorch", accuracy, 0),
        Series("halting head's own estimate", halt_prob, 0, dashed=True, dots=False),
        *(Series(name, ((x, y),), color_of.get(name, 1), marks_only=True) for name, x, y in curve.points),
    ]
    trained = curve.trained_depth
    chart = line_chart(
        series,
        label=f"Accuracy of {name} by steps: " + ", ".join(f"{numbers.percent(a, 1)} at {d:g}" for d, a in accuracy),
        x_label="recursion steps",
        y_label="accuracy",
        y_text=share,
        x_ticks=list(depths),
        y_limits=SHARES,
        x_mark=(trained, f"trained to {trained}") if trained is not None and trained in depths else None,
    )
    caption = f"{_ring(curve)} The halting head estimates the chance that its answer is right. Its line is the mean: above the other it trusts the answers too much."
    return Figure(chart, caption, f"{name}, {on_images(curve)}", series)


def model_name(curve: DepthCurve) -> str:
    """Names a curve as the rest of the page names its artifact; by its checkpoint where it has several, or none."""
    files = {file_and_settings(name)[0] for name, _, _ in curve.points}
    return files.pop() if len(files) == 1 else Path(curve.run).name


def on_images(curve: DepthCurve) -> str:
    """Says what part of the images a curve is of: its accuracies differ from those of all."""
    total = curve.total or curve.images
    return f"on {curve.images:,}" + (" test images" if total == curve.images else f" of the {total:,} test images")


def _known(curve: DepthCurve) -> str:
    """Says how much of a difference between accuracies may be chance."""
    low, high = wilson(curve.accuracy[-1] * curve.images, curve.images)
    return f"On {curve.images:,} images an accuracy like these is known to ±{50 * (high - low):.1f} points (95 %)."


def _part(curve: DepthCurve) -> str:
    if curve.total in (None, curve.images):
        return ""
    return f" Being a part of the {curve.total:,}, these images have other accuracies than all of them above."


def _ring(curve: DepthCurve) -> str:
    return f"The eager model after each step; a ring is an artifact at its mean steps, on the same images.{_grain(curve.images)}"


# Halting ---------------------------------------------------------------------------------------


def savings_figure(curve: DepthCurve, color_of: Mapping[str, int]) -> Figure:
    """Shows accuracy over the mean steps that every threshold takes, beside that of the same depth for every image."""
    name, steps = model_name(curve), curve.steps
    by_threshold = tuple(sorted((p.mean_steps, p.accuracy) for p in curve.halting))
    by_depth = tuple((float(i), a) for i, a in enumerate(curve.accuracy[:steps], 1))
    points = [(name, x, y) for name, x, y in curve.points if x <= steps]
    series = [
        Series("halting, every threshold", by_threshold, 0, dots=False),
        Series("every image the same depth", by_depth, 0, dashed=True, dots=False),
        *(Series(name, ((x, y),), color_of.get(name, 1), marks_only=True) for name, x, y in points),
    ]
    chart = line_chart(
        series,
        label=f"Accuracy of {name} by mean steps: "
        + ", ".join(
            f"{numbers.percent(p.accuracy, 1)} after {p.mean_steps:.2f} above {p.threshold:g}"
            for p in curve.halting[::20]
        ),
        x_label="mean steps",
        y_label="accuracy",
        y_text=share,
        x_ticks=list(range(1, steps + 1)),
        y_limits=SHARES,
    )
    caption = f"{_ring(curve)} On the left, low thresholds; on the right, never halting. {_known(curve)}{_part(curve)}"
    return Figure(chart, caption, f"{name}: what a threshold buys, {on_images(curve)}", series)


def halting_figures(choices: Sequence[HaltingChoice]) -> list[Figure]:
    """Shows how each threshold was chosen, and how far halt_prob can be trusted."""
    return [figure for choice in choices for figure in (_threshold(choice), _reliability(choice))]


def _threshold(choice: HaltingChoice) -> Figure:
    chosen = choice.chosen
    by_depth = tuple((float(i), a) for i, a in enumerate(choice.by_depth, 1))
    by_threshold = tuple(sorted({(p.mean_steps, p.accuracy) for p in (*choice.points, choice.full)}))
    series = [
        Series("every threshold", by_threshold, 0, dots=False),
        Series("every image the same depth", by_depth, 0, dashed=True, dots=False),
        Series(f"chosen: {chosen.threshold:g}", ((chosen.mean_steps, chosen.accuracy),), 2, marks_only=True),
    ]
    chart = line_chart(
        series,
        label=f"Accuracy against mean steps of {table.halting(choice)}",
        x_label="mean steps",
        y_label="validation accuracy",
        y_text=share,
        x_ticks=list(range(1, choice.steps + 1)),
        y_limits=SHARES,
        y_mark=(choice.full.accuracy - choice.budget, "the budget"),
    )
    return Figure(chart, _choice(choice), f"{choice.name}: the threshold, on validation images", series)


def _choice(choice: HaltingChoice) -> str:
    """Says in two sentences how a threshold was chosen, and what it costs."""
    chosen, full = choice.chosen, choice.full
    found = f"{numbers.percent(chosen.accuracy)} are right after {chosen.mean_steps:.2f} steps on average, {numbers.percent(full.accuracy)} after {choice.steps}"
    aim = f"of {choice.images:,} validation images of {choice.data}, at most {choice.budget * 100:g} points may be given up"
    if chosen.threshold >= 1:
        return f"Never halting: no threshold is sure to keep the budget ({aim}). {found}."
    return (
        f"Chosen: {chosen.threshold:g}, the cheapest threshold that is sure (95 %) to keep the budget ({aim}). {found}: {chosen.lost:,} lost, "
        f"{chosen.gained:,} gained, with 95 % confidence at most {choice.drop_bound * 100:.2f} points.{_cheaper(choice)}"
    )


def _cheaper(choice: HaltingChoice) -> str:
    """Says why a cheaper threshold was not chosen, where the curve shows one above the budget's line."""
    least = choice.full.accuracy - choice.budget
    if all(p.accuracy < least for p in choice.points if p.mean_steps < choice.chosen.mean_steps):
        return ""
    return " Cheaper ones above the dotted line keep it on these images, perhaps by luck."


def _reliability(choice: HaltingChoice) -> Figure:
    found = choice.reliability
    points = tuple((p, t) for p, t, n in zip(found.stated, found.true, found.count, strict=True) if n)
    spans = tuple(_whisker(t, n, choice.steps) for t, n in zip(found.true, found.count, strict=True) if n)
    series = [
        Series("halting head", points, 1, spans),
        Series("perfectly calibrated", ((0.0, 0.0), (1.0, 1.0)), 0, dashed=True, dots=False),
    ]
    said = "; ".join(f"{numbers.percent(t, 0)} at {p:.2f}" for p, t in points)
    chart = line_chart(
        series,
        label=f"Share of right answers by stated chance: {said}",
        x_label="halt_prob",
        y_label="right answers",
        y_text=share,
        y_limits=SHARES,
    )
    caption = (
        f"halt_prob after each of {choice.steps} steps on {choice.images:,} validation images, in {len(found.count)} bins, against "
        f"how often the answer was right. {_last_bin(found)} Whiskers: 95 %; the {choice.steps} answers to an image count as one, "
        f"because they are alike. Expected calibration error {numbers.percent(found.ece, 1)}."
    )
    return Figure(chart, caption, f"{choice.name}: is halt_prob true?", series)


def _whisker(share: float, answers: int, steps: int) -> tuple[float, float]:
    """Returns the 95 % interval of a share of right answers, of as many images as gave them with so many answers each."""
    images = max(1, round(answers / steps))
    return wilson(share * images, images)


def _last_bin(found: Reliability) -> str:
    """Says how many answers lie in the last bin, whose mark looks like any other."""
    bins = len(found.count)
    share = numbers.percent(found.count[-1] / sum(found.count), 0)
    return f"{share} of the answers lie in the last bin, above {(bins - 1) / bins:.2f}."
