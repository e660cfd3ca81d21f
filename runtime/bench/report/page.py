"""A bench as one HTML page that needs nothing else: no network, no scripts, images and charts inside.

Everything that comes from a user (file names, class names, reasons, command line) is escaped, control characters too: a page with half a
surrogate pair could not be written.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from vitrm.runtime.bench.accuracy import wilson
from vitrm.runtime.bench.disagreement import gallery
from vitrm.runtime.bench.report import table
from vitrm.runtime.bench.report.charts import Series, distribution_chart, line_chart
from vitrm.runtime.bench.report.style import STYLE
from vitrm.runtime.bench.robustness import table as corruption_table
from vitrm.runtime.bench.robustness.measure import BROKEN, SEVERITIES, Robustness
from vitrm.runtime.bench.rows import BenchResult, BenchRow, CaseEvidence, DepthCurve
from vitrm.runtime.halting.choose import HaltingChoice
from vitrm.system.terminal import neutral

_COLOURS = 6  # that the style has beside s0, the neutral one of the eager model
_MOST = 12  # things that charts with a row or a line for each can show


def render(result: BenchResult) -> str:
    """The page.  `result` must carry its evidence, as `bench` returns it."""
    assert result.evidence is not None
    colors = _colors(result)
    subjects = result.evidence.cases
    sections = [
        _section("Figures", _warnings(result) + _cards(result) + _figures(result)),
        _section("Latency", _latency(result, colors)),
        _section("Accuracy against latency", _frontier(result)),
        _section("Halting", _halting(result)),
        _section("Corruptions", _corruptions(result.corruptions, colors)),
        _section("Accuracy by depth", _depth(result.evidence.depth_curves, colors)),
        _section("Where the answers differ", _differences(subjects)),
        _section("What was measured", "".join(_card(s, result) for s in subjects if s.kind == "artifact")),
        _section("How it was measured", _method(result)),
    ]
    title = f"vitrm-bench: {', '.join(r.name for r in _first_rows(result) if r.kind == 'artifact')}"
    return neutral(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # The browser itself then refuses whatever this page might try to fetch.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><header>"
        f'<p class="eyebrow">vitrm-bench · {escape(result.started.replace("T", " ").replace("+00:00", " UTC"))}</p>'
        f"<h1>{escape(_headline(result))}</h1></header><main>{''.join(sections)}</main></body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def _first_rows(result: BenchResult) -> list[BenchRow]:
    """The rows of the first batch size: each thing once."""
    return [r for r in result.rows if r.batch == result.rows[0].batch]


def _colors(result: BenchResult) -> dict[str, int]:
    """A series color by name; the eager model is neutral, because everything is compared with it."""
    names = dict.fromkeys(r.name for r in result.rows if r.kind != "eager")
    return {name: 1 + i % _COLOURS for i, name in enumerate(names)}


def _headline(result: BenchResult) -> str:
    """The finding in one sentence."""
    artifacts = [r for r in _first_rows(result) if r.kind == "artifact" and r.ok]
    if not artifacts:
        return "Nothing could be measured"
    timed = [r for r in artifacts if r.latency_ms]
    best = min(timed, key=lambda r: r.latency_ms.p50 if r.latency_ms else 0) if timed else artifacts[0]
    subject = best.name if len(artifacts) == 1 else f"{best.name}, the fastest of {len(artifacts)},"
    parts = []
    if best.speedup is not None:
        parts.append(f"runs {best.speedup:.2f} × as fast as eager PyTorch at batch {best.batch}")
    elif best.latency_ms:
        parts.append(f"takes {table.milliseconds(best.latency_ms.p50)} ms at batch {best.batch}")
    if best.agreement is not None:
        all_of_them = "all" if best.agreement == 1 else f"{table.percent(best.agreement)} of"
        parts.append(f"gives its answer on {all_of_them} {best.images:,} images")
    return f"{subject} {' and '.join(parts)}" if parts else subject


def _warnings(result: BenchResult) -> str:
    """What a reader must know before the figures."""
    return "".join(f'<p class="warn">{escape(note)}</p>' for note in result.notes)


def _cards(result: BenchResult) -> str:
    artifacts = [r for r in _first_rows(result) if r.kind == "artifact" and r.ok]
    if len(artifacts) != 1:
        return ""
    row = artifacts[0]
    cards = []
    if row.latency_ms:
        cards.append(
            (
                f"p50, batch {row.batch}",
                f"{table.milliseconds(row.latency_ms.p50)} ms",
                f"p99 {table.milliseconds(row.latency_ms.p99)} ms",
            )
        )
    if row.speedup is not None and row.speedup_range is not None:
        low, high = row.speedup_range
        cards.append(("× eager", f"{row.speedup:.2f} ×", f"{low:.2f} to {high:.2f} over the rounds"))
    if row.accuracy is not None and row.accuracy_interval is not None:
        low, high = row.accuracy_interval
        cards.append(("accuracy", table.percent(row.accuracy), f"95 %: {low * 100:.1f} to {high * 100:.1f} %"))
    if row.agreement is not None:
        flips = f"flips {table.flips(row)}" if row.flips else "top-1, without labels"
        cards.append(("agreement with eager", table.percent(row.agreement), flips))
    cards.append(("size", table.size(row.bytes), f"{row.precision}, {row.graph}"))
    return (
        '<dl class="cards">'
        + "".join(
            f"<div><dt>{escape(a)}</dt><dd>{escape(b)}</dd><dd class=sub>{escape(c)}</dd></div>" for a, b, c in cards
        )
        + "</dl>"
    )


def _figures(result: BenchResult) -> str:
    columns = table.columns(result)
    head = "".join(f'<th scope="col"{_align(name)}>{escape(name)}</th>' for name, _ in columns)
    body = []
    for i, row in enumerate(result.rows):
        starts = " first" if i and result.rows[i - 1].batch != row.batch else ""
        cells = f'<th scope="row">{escape(row.name)}</th>'
        if row.ok:
            cells += "".join(f"<td{_align(name)}>{escape(cell(row))}</td>" for name, cell in columns[1:])
        else:
            cells += f'<td colspan="{len(columns) - 1}" class="failed">batch {row.batch}: {escape(row.status)}</td>'
        body.append(f'<tr class="{row.kind}{starts}">{cells}</tr>')
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Figures"><table aria-describedby="reading">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
        '<p class="hint" id="reading">Times are for a whole batch, from host memory to host memory. × eager is the median over rounds in '
        "which both ran. Agreement: the same top-1 answer as the eager model with the same weights and depth. Flips: images it "
        "newly gets right (+) and wrong (−).</p>"
    )


def _align(name: str) -> str:
    return "" if name in table.LEFT else ' class="n"'


# Charts ----------------------------------------------------------------------------------------


def _latency(result: BenchResult, colors: dict[str, int]) -> str:
    assert result.evidence is not None
    batches = list(dict.fromkeys(r.batch for r in result.rows))
    figures = []
    for batch in batches:
        rows = [
            (s.name, colors.get(s.name, 0), s.times_ms[batch]) for s in result.evidence.cases if batch in s.times_ms
        ]
        if 0 < len(rows) <= _MOST:
            label = f"Distribution of latency at batch {batch}: " + "; ".join(
                f"{r.name} p50 {table.milliseconds(r.latency_ms.p50)} ms, p99 {table.milliseconds(r.latency_ms.p99)} ms"
                for r in result.rows
                if r.batch == batch and r.latency_ms
            )
            chart = distribution_chart(rows, label=label, text=table.milliseconds)
            figures.append(
                _figure(
                    f"Batch {batch}",
                    chart,
                    "Where the timed runs lie. The long mark is p50, the short ones p90 and p99.",
                )
            )
    if len(batches) > 1:
        figures.append(_by_batch(result, colors, batches))
    return f'<div class="charts">{"".join(figures)}</div>' if figures else ""


def _by_batch(result: BenchResult, colors: dict[str, int], batches: Sequence[int]) -> str:
    series = []
    for name in dict.fromkeys(r.name for r in result.rows):
        rows = [r for r in result.rows if r.name == name and r.latency_ms]
        latencies = [(r.batch, r.latency_ms) for r in sorted(rows, key=lambda r: r.batch) if r.latency_ms]
        if latencies:
            points = tuple((float(b), v.p50 / b) for b, v in latencies)
            spans = tuple((v.min / b, v.p90 / b) for b, v in latencies)
            series.append(Series(name, points, colors.get(name, 0), spans))
    if not 0 < len(series) <= _MOST:
        return ""
    label = "Milliseconds per image by batch size: " + "; ".join(
        f"{s.name} " + ", ".join(f"{y:.3g} at {x:g}" for x, y in s.points) for s in series
    )
    chart = line_chart(
        series,
        label=label,
        x_label="batch size",
        y_label="ms per image",
        y_text=lambda v: f"{v:g}",
        x_ticks=sorted(batches),
        log=True,
    )
    return _figure(
        "By batch size", chart, "p50 divided by the batch size; whiskers from the fastest run to p90.", _legend(series)
    )


def _frontier(result: BenchResult) -> str:
    """For each batch size every row's accuracy over its time per image, and the line above which none lies."""
    figures = []
    for batch in dict.fromkeys(r.batch for r in result.rows):
        places = [
            (r, r.latency_ms.p50 / batch, r.accuracy)
            for r in result.rows
            if r.batch == batch and r.ok and r.latency_ms and r.accuracy is not None and r.kind == "artifact"
        ]
        if len(places) < 3:
            continue
        kinds = list(dict.fromkeys(_kind(r) for r, _, _ in places))
        series = [
            Series(
                kind,
                tuple(sorted((ms, accuracy) for r, ms, accuracy in places if _kind(r) == kind)),
                1 + i % _COLOURS,
                marks_only=True,
            )
            for i, kind in enumerate(kinds)
        ]
        best: list[tuple[float, float]] = []
        for _, ms, accuracy in sorted(places, key=lambda p: (p[1], -p[2])):
            if not best or accuracy > best[-1][1]:
                best.append((ms, accuracy))
        series.append(Series("no other is both faster and more accurate", tuple(best), 0, dashed=True))
        label = f"Accuracy against milliseconds per image at batch {batch}: " + "; ".join(
            f"{r.name} {table.percent(accuracy)} in {table.milliseconds(ms)} ms" for r, ms, accuracy in places
        )
        chart = line_chart(
            series,
            label=label,
            x_label="ms per image",
            y_label="accuracy",
            y_text=lambda v: f"{v * 100:.4g} %",
            y_limits=(0.0, 1.0),
        )
        figures.append(
            _figure(f"Batch {batch}", chart, "Every artifact at every depth and threshold measured.", _legend(series))
        )
    return f'<div class="charts">{"".join(figures)}</div>' if figures else ""


def _kind(row: BenchRow) -> str:
    halts = row.halt_threshold is not None and row.halt_threshold < 1
    return f"{row.graph} {row.precision}{', halting' if halts else ''}"


def _halting(result: BenchResult) -> str:
    """How each threshold was chosen, and how far halt_prob can be trusted."""
    figures = []
    for choice in result.halting:
        sweep = Series("every threshold", tuple(sorted((p.mean_steps, p.accuracy) for p in choice.points)), 1)
        fixed = Series(
            "every sample the same depth",
            tuple((float(i), a) for i, a in enumerate(choice.by_depth, 1)),
            0,
            dashed=True,
        )
        chosen = Series(
            f"chosen: {choice.chosen.threshold:g}",
            ((choice.chosen.mean_steps, choice.chosen.accuracy),),
            2,
            marks_only=True,
        )
        series = [sweep, fixed, chosen]
        chart = line_chart(
            series,
            label=f"Accuracy against mean steps of {table.halting(choice)}",
            x_label="mean steps",
            y_label="validation accuracy",
            y_text=lambda v: f"{v * 100:.4g} %",
            x_ticks=list(range(1, choice.steps + 1)),
            y_limits=(0.0, 1.0),
        )
        figures.append(_figure(f"{choice.name}: the threshold", chart, table.halting(choice) + ".", _legend(series)))
        figures.append(_reliability(choice))
    return f'<div class="charts">{"".join(figures)}</div>' if figures else ""


def _reliability(choice: HaltingChoice) -> str:
    found = choice.reliability
    points = tuple((p, t) for p, t, n in zip(found.stated, found.true, found.count, strict=True) if n)
    spans = tuple(wilson(round(t * n), n) for t, n in zip(found.true, found.count, strict=True) if n)
    series = [
        Series("halting head", points, 1, spans),
        Series("perfectly calibrated", ((0.0, 0.0), (1.0, 1.0)), 0, dashed=True),
    ]
    chart = line_chart(
        series,
        label="Share of right answers by stated chance: "
        + "; ".join(f"{table.percent(t, 0)} at {p:.2f}" for p, t in points),
        x_label="halt_prob",
        y_label="share of right answers",
        y_text=lambda v: f"{v * 100:.4g} %",
        y_limits=(0.0, 1.0),
    )
    caption = (
        f"halt_prob after each of {choice.steps} steps on {choice.images:,} validation images, in {len(found.count)} bins, against "
        f"how often the answer was right (whiskers: 95 %). Expected calibration error {table.percent(found.ece, 1)}."
    )
    return _figure(f"{choice.name}: is halt_prob true?", chart, caption, _legend(series))


def _depth(curves: Iterable[DepthCurve], colors: dict[str, int]) -> str:
    figures = []
    for curve in curves:
        depths = range(1, len(curve.accuracy) + 1)
        series = [
            Series("eager PyTorch", tuple(zip(map(float, depths), curve.accuracy, strict=True)), 0),
            Series(
                "halting head's own estimate",
                tuple(zip(map(float, depths), curve.halt_prob, strict=True)),
                0,
                dashed=True,
            ),
            *(Series(name, ((x, y),), colors.get(name, 1), marks_only=True) for name, x, y in curve.points),
        ]
        label = f"Accuracy of {Path(curve.run).name} by steps: " + ", ".join(
            f"{table.percent(a, 1)} at {d}" for d, a in zip(depths, curve.accuracy, strict=True)
        )
        chart = line_chart(
            series,
            label=label,
            x_label="recursion steps",
            y_label="accuracy",
            y_text=lambda v: f"{v * 100:.4g} %",
            x_ticks=list(depths),
            y_limits=(0.0, 1.0),
        )
        note = (
            f"{Path(curve.run).name} after each step, on {curve.images:,} test images; a ring is an artifact's own answer on them. "
            "The halting head estimates the chance that the answer is right: where its line lies on the other, it knows."
        )
        figures.append(_figure(None, chart, note, _legend(series)))
        rows = "".join(
            f'<tr><th scope="row" class="n">{d}</th><td class="n">{table.percent(a)}</td><td class="n">{table.percent(h)}</td></tr>'
            for d, a, h in zip(depths, curve.accuracy, curve.halt_prob, strict=True)
        )
        figures.append(
            '<div class="scroll"><table class="narrow"><thead><tr><th scope="col" class="n">steps</th><th scope="col" class="n">'
            'accuracy</th><th scope="col" class="n">halting head says</th></tr></thead>'
            f"<tbody>{rows}</tbody></table></div>"
        )
    return f'<div class="charts">{"".join(figures)}</div>' if figures else ""


def _corruptions(found: Sequence[Robustness], colors: dict[str, int]) -> str:
    """What follows, charts by severity, and every figure."""
    if not found:
        return ""
    told = [sentence for one in found for sentence in corruption_table.sentences(one)]
    warnings = "".join(f'<p class="{"warn" if warns else "hint"}">{escape(text)}.</p>' for text, warns in told)
    figures = []
    if 1 < len(found) <= _MOST:
        together = [Series(one.name, _by_severity(one, "accuracy"), colors.get(one.name, 0)) for one in found]
        figures.append(_severity_figure("All artifacts", together, "Mean over the corruptions."))
    for one in found:
        groups = dict.fromkeys(c.group for c in one.corruptions)
        series = [
            Series(group, _by_severity(one, "accuracy", group), 1 + i % _COLOURS) for i, group in enumerate(groups)
        ]
        series.append(Series("all corruptions", _by_severity(one, "accuracy"), 0, dashed=True))
        figures.append(_severity_figure(one.name, series, "Mean over the corruptions of each kind."))
        trust = [
            Series("right", _by_severity(one, "accuracy"), 1),
            Series("right at full depth", _by_severity(one, "full_accuracy"), 0),
            Series("mean halt_prob", _by_severity(one, "mean_halt_prob"), 2, dashed=True),
        ]
        if one.clean.mean_halt_prob is not None:
            note = "Mean over the corruptions. Where halt_prob's line lies above the answers', it trusts them too much."
            shown = [s for s in trust if s.points]
            figures.append(_severity_figure(f"{one.name}: does halt_prob notice?", shown, note))
    tables = "".join(_corruption_figures(one) for one in found)
    basis = "".join(f'<p class="hint">{escape(line)}.</p>' for line in corruption_table.basis(found))
    return f'{warnings}<div class="charts">{"".join(figures)}</div>{tables}{basis}'


def _by_severity(found: Robustness, field: str, group: str | None = None) -> tuple[tuple[float, float], ...]:
    """(severity, mean over the corruptions), the clean images at 0; empty where it is not known."""
    values = [getattr(found.at(severity, group), field) for severity in (0, *SEVERITIES)]
    return () if None in values else tuple((float(i), v) for i, v in enumerate(values))


def _severity_figure(title: str, series: Sequence[Series], caption: str) -> str:
    label = f"{title}, by severity: " + "; ".join(
        f"{s.name} " + ", ".join(f"{table.percent(y, 1)} at {x:g}" for x, y in s.points) for s in series
    )
    chart = line_chart(
        series,
        label=label,
        x_label="severity (0: the images as they are)",
        y_label="share of images",
        y_text=lambda v: f"{v * 100:.4g} %",
        x_ticks=[0, *SEVERITIES],
        y_limits=(0.0, 1.0),
    )
    return _figure(title, chart, caption, _legend(series))


def _corruption_figures(found: Robustness) -> str:
    columns = corruption_table.head(found)
    head = "".join(
        f'<th scope="col"{_align("artifact" if not i else c)}>{escape(c)}</th>' for i, c in enumerate(columns)
    )
    rows = "".join(
        f'<tr{" class=failed" if budget == BROKEN else ""}><th scope="row">{escape(name)}</th>'
        + "".join(f'<td class="n">{escape(cell)}</td>' for cell in cells)
        + "</tr>"
        for name, cells, budget in corruption_table.lines(found)
    )
    label = f"Corruptions: {corruption_table.title(found)}"
    return (
        f'<h3>{escape(corruption_table.title(found))}</h3><div class="scroll" tabindex="0" role="region" '
        f'aria-label="{escape(label, quote=True)}"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _figure(title: str | None, chart: str, caption: str, legend: str = "") -> str:
    heading = f"<h3>{escape(title)}</h3>" if title else ""
    return f"<figure>{heading}{legend}{chart}<figcaption>{escape(caption)}</figcaption></figure>"


def _legend(series: Sequence[Series]) -> str:
    items = []
    for s in series:
        shape = "ring" if s.marks_only else "dash" if s.dashed else "line"
        items.append(f'<li><span class="key {shape} s{s.color}"></span>{escape(s.name)}</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


# Images, artifacts, method -----------------------------------------------------------------------


def _differences(subjects: Sequence[CaseEvidence]) -> str:
    galleries = []
    agreeing = False  # the images of an artifact that agrees are the same for the next one
    for subject in subjects:
        if subject.kind == "artifact":
            galleries.append(gallery(subject, repeat=agreeing))
            agreeing |= subject.comparison is not None and not len(subject.comparison.disagreeing)
    return "".join(galleries)


def _card(subject: CaseEvidence, result: BenchResult) -> str:
    m = subject.metadata
    row = next(r for r in result.rows if r.name == subject.name)
    halting = "never" if m.halt_threshold >= 1 else f"above {m.halt_threshold:g}"
    facts: list[tuple[str, Any]] = [
        ("file", subject.key),
        ("size", f"{row.bytes:,} bytes" if row.bytes else "–"),
        ("model", ", ".join(f"{k} {_value(v)}" for k, v in m.model.items())),
        ("graph", m.graph),
        ("steps", f"{m.steps}, halting {halting}" if m.recursive else "no recursion"),
        ("precision", m.precision),
        ("made for", m.target),
        ("classes", f"{len(m.classes)}: {', '.join(m.classes)}"),
        ("trained on", m.data.get("name", "not said")),
        ("exported from", m.run),
        ("weights", m.weights_sha256),
        ("calibration", m.calibration_id or "none"),
        ("parity at export", "; ".join(f"{k} {v:.3g}" for k, v in m.parity.items()) or "not recorded"),
        ("exported with", ", ".join(f"{k} {v}" for k, v in m.versions.items()) or "not recorded"),
        ("backend here", f"{row.backend}, {row.device}"),
        *(("note", note) for note in row.notes),
    ]
    return f"<details open><summary>{escape(subject.name)}</summary>{_list(facts)}</details>"


def _method(result: BenchResult) -> str:
    busy = result.machine["other_cpus_busy"]
    facts: list[tuple[str, Any]] = [("command", result.command)] if result.command else []
    facts += [
        ("processor", f"{result.machine['cpu']}, {result.machine['physical_cores']} physical cores"),
        ("system", result.machine["system"]),
        ("other processes", "not known" if busy is None else f"{busy:.2f} CPUs busy while latency was measured"),
        ("versions", ", ".join(f"{k} {v}" for k, v in result.versions.items())),
    ]
    notes = "".join(f"<li>{escape(line)}</li>" for line in table.footer(result))
    return f'{_list(facts)}<ul class="notes">{notes}</ul>'


def _list(facts: Iterable[tuple[str, Any]]) -> str:
    return '<dl class="facts">' + "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in facts) + "</dl>"


def _value(value: Any) -> str:
    return "(" + ", ".join(f"{v:g}" for v in value) + ")" if isinstance(value, list) else str(value)
