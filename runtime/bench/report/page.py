"""Page of a bench: one HTML file that needs nothing else: no network, no scripts, images and charts inside.

The template escapes everything that comes from a user (file names, class names, reasons, command line).  Control characters are
escaped too: a page with half a surrogate pair could not be written.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitrm.errors import UserError
from vitrm.runtime.bench.report import by_class, table
from vitrm.runtime.bench.robustness import table as corruption_table
from vitrm.runtime.bench.robustness.measure import BROKEN
from vitrm.system.terminal import neutral

if TYPE_CHECKING:
    from vitrm.runtime.bench.report.gallery import Gallery
    from vitrm.runtime.bench.rows import BenchResult, BenchRow, CaseEvidence

_FOLDER = Path(__file__).parent
_TEMPLATE, _STYLE = "page.html", "page.css"


def check_libraries() -> None:
    """Raises `UserError` where what writes a page is not installed, before minutes of measuring."""
    try:
        import jinja2  # noqa: F401
        import PIL  # noqa: F401
    except ImportError as error:
        raise UserError(f"--report needs Jinja2 and Pillow ({error}): pip install jinja2 pillow") from None


def render(result: BenchResult) -> str:
    """Returns the page.  `result` must carry its evidence, as `bench` returns it."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    style = Markup((_FOLDER / _STYLE).read_text(encoding="utf-8"))
    return neutral(environment.get_template(_TEMPLATE).render(style=style, **_contents(result)))


def _contents(result: BenchResult) -> dict[str, Any]:
    """Returns what the template shows, by the names it has there."""
    from vitrm.runtime.bench.report import figures
    from vitrm.runtime.bench.report.gallery import mistakes

    evidence = result.evidence
    assert evidence is not None
    color_of = figures.colors(result)
    artifacts = [case for case in evidence.cases if case.kind == "artifact"]
    rows = _first_rows(result)
    columns = table.columns(result)
    return {
        "title": f"vitrm-bench: {', '.join(r.name for r in rows if r.kind == 'artifact')}",
        "started": result.started.replace("T", " ").replace("+00:00", " UTC"),
        "headline": _headline(rows),
        "notes": result.notes,
        "cards": _cards(rows),
        "columns": columns,
        "left": table.LEFT,
        "rows": [(row, [cell(row) for _, cell in columns[1:]] if row.ok else []) for row in result.rows],
        "latency": figures.latency_figures(result, evidence.cases, color_of),
        "frontier": figures.frontier_figures(result),
        "class_tables": by_class.tables(result),
        "class_sentences": by_class.sentences(result),
        "confusions": by_class.confusion_figures(result, color_of),
        "mistakes": [g for g in map(mistakes, artifacts[: by_class.MOST]) if g],
        "halting": figures.halting_figures(result.halting),
        "corruption_sentences": [s for one in result.corruptions for s in corruption_table.sentences(one)],
        "corruption_figures": figures.corruption_figures(result.corruptions, color_of),
        "corruption_tables": [
            (corruption_table.title(one), corruption_table.head(one), corruption_table.lines(one))
            for one in result.corruptions
        ],
        "corruption_basis": corruption_table.basis(result.corruptions),
        "broken": BROKEN,
        "depths": [(curve, figures.depth_figure(curve, color_of)) for curve in evidence.depth_curves],
        "galleries": _galleries(artifacts),
        "artifacts": [(case.name, _artifact_facts(case, rows)) for case in artifacts],
        "method": _method_facts(result),
        "footer": table.footer(result),
        "percent": table.percent,
    }


def _first_rows(result: BenchResult) -> list[BenchRow]:
    """Returns the rows of the first batch size: each case once."""
    return [r for r in result.rows if r.batch == result.rows[0].batch]


def _headline(rows: Sequence[BenchRow]) -> str:
    """Says the finding in one sentence."""
    artifacts = [r for r in rows if r.kind == "artifact" and r.ok]
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


def _cards(rows: Sequence[BenchRow]) -> list[tuple[str, str, str]]:
    """Returns the figures of the only artifact, where there is one: what it is, how much, and what of it."""
    artifacts = [r for r in rows if r.kind == "artifact" and r.ok]
    if len(artifacts) != 1:
        return []
    row = artifacts[0]
    cards = []
    if row.latency_ms:
        p50, p99 = table.milliseconds(row.latency_ms.p50), table.milliseconds(row.latency_ms.p99)
        cards.append((f"p50, batch {row.batch}", f"{p50} ms", f"p99 {p99} ms"))
    if row.speedup is not None and row.speedup_range is not None:
        low, high = row.speedup_range
        cards.append(("× eager", f"{row.speedup:.2f} ×", f"{low:.2f} to {high:.2f} over the rounds"))
    if row.accuracy is not None and row.accuracy_interval is not None:
        low, high = row.accuracy_interval
        cards.append(("accuracy", table.percent(row.accuracy), f"95 %: {low * 100:.1f} to {high * 100:.1f} %"))
    if row.agreement is not None:
        flips = f"flips {table.flips(row)}" if row.flips else "top-1, without labels"
        cards.append(("agreement with eager", table.percent(row.agreement), flips))
    return [*cards, ("size", table.size(row.bytes), f"{row.precision}, {row.graph}")]


def _galleries(artifacts: Sequence[CaseEvidence]) -> list[Gallery]:
    from vitrm.runtime.bench.report.gallery import gallery

    galleries = []
    agreeing = False  # the images of an artifact that agrees are the same for the next one
    for case in artifacts:
        galleries.append(gallery(case, repeat=agreeing))
        agreeing |= case.comparison is not None and not len(case.comparison.disagreeing)
    return galleries


def _artifact_facts(case: CaseEvidence, rows: Sequence[BenchRow]) -> list[tuple[str, Any]]:
    m = case.metadata
    row = next(r for r in rows if r.name == case.name)
    halting = "never" if m.halt_threshold >= 1 else f"above {m.halt_threshold:g}"
    return [
        ("file", case.key),
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


def _method_facts(result: BenchResult) -> list[tuple[str, Any]]:
    busy = result.machine["other_cpus_busy"]
    return [
        *([("command", result.command)] if result.command else []),
        ("processor", f"{result.machine['cpu']}, {result.machine['physical_cores']} physical cores"),
        ("system", result.machine["system"]),
        ("other processes", "not known" if busy is None else f"{busy:.2f} CPUs busy while latency was measured"),
        ("versions", ", ".join(f"{k} {v}" for k, v in result.versions.items())),
    ]


def _value(value: Any) -> str:
    return "(" + ", ".join(f"{v:g}" for v in value) + ")" if isinstance(value, list) else str(value)
