"""Page of a bench: one HTML file that needs nothing else: no network, no scripts, images and charts inside.

The template escapes everything that comes from a user (file names, class names, reasons, command line).  Control characters are
escaped too: a page with half a surrogate pair could not be written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitrm.errors import UserError
from vitrm.runtime.bench.case_names import file_and_settings
from vitrm.runtime.bench.report import by_class, headline, numbers, savings, table
from vitrm.runtime.bench.robustness import table as corruption_table
from vitrm.runtime.bench.robustness.measure import BROKEN, SEVERITIES, Robustness
from vitrm.system.short_names import shorten_all
from vitrm.system.terminal import neutral

if TYPE_CHECKING:
    from markupsafe import Markup

    from vitrm.runtime.bench.report.gallery import Gallery
    from vitrm.runtime.bench.rows import BenchResult, BenchRow, CaseEvidence

_FOLDER = Path(__file__).parent
_TEMPLATE, _STYLE = "page.html", "page.css"
_NAME = 56  # letters of a name in a table
_CLASSES = 24  # names of classes that are listed
_BRIEF = ("p50 ms", "× eager")  # columns of the speed's brief table
_UNIT = re.compile(r"(?<=\d) (?=(?:%|×|ms|kB|MB)(?!\w))")


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
        finalize=_with_units,
    )
    environment.filters["code"] = _code
    style = Markup((_FOLDER / _STYLE).read_text(encoding="utf-8"))
    return neutral(environment.get_template(_TEMPLATE).render(style=style, **_contents(result)))


def _with_units(value: Any) -> Any:
    """Keeps a number and its unit on one line."""
    return _UNIT.sub("\u00a0", value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _code(text: str) -> Markup:
    """Sets what stands between backticks as code, and escapes everything."""
    from markupsafe import Markup, escape

    parts = str(escape(_with_units(text))).split("`")
    if len(parts) % 2 == 0:  # a backtick of a name
        return Markup("`".join(parts))
    return Markup("".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts)))


def _contents(result: BenchResult) -> dict[str, Any]:
    """Returns what the template shows, by the names it has there."""
    from vitrm.runtime.bench.report import corruptions, figures
    from vitrm.runtime.bench.report.gallery import mistakes

    evidence = result.evidence
    assert evidence is not None
    color_of = figures.colors(result)
    artifacts = [case for case in evidence.cases if case.kind == "artifact"]
    rows = _first_rows(result)
    saved = savings.measured(result)
    alike = corruptions.alike(result.corruptions)
    return {
        "title": f"vitrm-bench: {', '.join(r.name for r in rows if r.kind == 'artifact')}",
        "started": result.started.replace("T", " ").replace("+00:00", " UTC"),
        "headline": headline.headline(rows, result.quiet),
        "notes": result.notes,
        "cards": headline.cards(rows, result.quiet),
        "tables": [_table(title, columns, shown) for title, columns, shown in table.page_tables(result)],
        "left": table.LEFT,
        "quiet": result.quiet,
        "short": _short_names(result),
        "savings": [(saving, savings.cards(saving, result.quiet)) for saving in saved],
        "saving_curves": [
            (
                f"{figures.model_name(curve)}: thresholds, at most {curve.steps} steps, {figures.on_images(curve)}",
                curve,
                figures.savings_figure(curve, color_of),
                savings.estimates(curve, rows),
            )
            for curve in evidence.halting_curves
        ],
        "saving_head": savings.HEAD,
        "latency": figures.latency_figures(result, evidence.cases, color_of),
        "frontier": figures.frontier_figures(result),
        "class_tables": by_class.tables(result),
        "class_sentences": by_class.sentences(result),
        "confusions": by_class.confusion_figures(result, color_of),
        "mistakes": mistakes(artifacts[: by_class.MOST]),
        "halting": figures.halting_figures(result.halting),
        "corruption_sentences": [s for group in alike for s in corruption_table.sentences(group)],
        "corruption_examples": corruptions.examples(result.corruptions, artifacts),
        "corruption_overview": corruptions.overview(alike, color_of),
        "corruption_rows": corruptions.figure_rows(alike),
        "corruption_tables": [_corruption_table(corruption_table.most_told(group)) for group in alike],
        "corruption_same": [said for group in alike if (said := corruptions.same_within(group))],
        "corruption_images": f"{result.corruptions[0].images:,}" if result.corruptions else "",
        "corruption_first": result.corruptions[0].name if result.corruptions else "",
        "corruption_basis": corruption_table.basis(result.corruptions),
        "corruption_reading": corruption_table.reading(result.corruptions),
        "broken": BROKEN,
        "depths": [(curve, figures.depth_figure(curve, color_of)) for curve in evidence.depth_curves],
        "galleries": _galleries(artifacts),
        "artifacts": _artifacts(artifacts, rows),
        "method": _method_facts(result),
        "percent": numbers.percent,
    }


def _first_rows(result: BenchResult) -> list[BenchRow]:
    """Returns the rows of the first batch size: each case once."""
    return [r for r in result.rows if r.batch == result.rows[0].batch]


def _galleries(artifacts: Sequence[CaseEvidence]) -> list[Gallery]:
    from vitrm.runtime.bench.report.gallery import gallery

    galleries = []
    agreeing = False  # the images of an artifact that agrees are the same for the next one
    for case in artifacts:
        galleries.append(gallery(case, repeat=agreeing))
        agreeing |= case.comparison is not None and not len(case.comparison.disagreeing)
    return galleries


def _artifacts(
    cases: Sequence[CaseEvidence], rows: Sequence[BenchRow]
) -> list[tuple[str, list[tuple[str, Any]], list[tuple[str, str]]]]:
    """Returns the facts of every file and its model's configuration, once however many depths and thresholds it was measured at."""
    files: dict[str, list[CaseEvidence]] = {}
    for case in cases:
        files.setdefault(case.file, []).append(case)
    return [
        (
            file_and_settings(those[0].name)[0] if len(those) > 1 else those[0].name,
            _artifact_facts(those, rows),
            [(k, _value(v)) for k, v in those[0].metadata.model.items() if v is not None],
        )
        for those in files.values()
    ]


def _steps(cases: Sequence[CaseEvidence]) -> str:
    """Says the depths and thresholds that a file was measured at."""
    if not cases[0].metadata.recursive:
        return "no recursion"
    return "; ".join(
        f"{m.steps} for every image"
        if m.halt_threshold >= 1
        else f"at most {m.steps} with halting above {m.halt_threshold:g}"
        for m in (case.metadata for case in cases)
    )


def _artifact_facts(cases: Sequence[CaseEvidence], rows: Sequence[BenchRow]) -> list[tuple[str, Any]]:
    case, m = cases[0], cases[0].metadata
    row = next(r for r in rows if r.name == case.name)
    return [
        ("folder" if m.graph == "stepwise" else "file", case.file),
        ("size", f"{numbers.size(row.bytes)} ({row.bytes:,} bytes)" if row.bytes else "–"),
        ("model", m.model.get("kind", "not said")),
        ("graph", m.graph),
        ("steps", _steps(cases)),
        ("precision", m.precision),
        ("made for", m.target),
        ("classes", _classes(m.classes)),
        ("trained on", m.data.get("name") or "not said"),
        ("exported from", m.run or "not said"),
        ("weights", m.weights_sha256 or "not said"),
        ("calibration", m.calibration_id or "none"),
        ("parity at export", _parity(m.parity)),
        ("exported with", ", ".join(f"{k} {v}" for k, v in m.versions.items()) or "not recorded"),
        ("backend here", f"{row.backend}, {row.device}"),
        *(("note", note) for note in row.notes),
    ]


def _parity(parity: Mapping[str, float]) -> str:
    """Says how far the export was from the model: the largest differences, and how many answers were the same."""
    images = round(parity.get("images", 0))
    parts = [f"{name} {value:.3g}" for name, value in parity.items() if name not in ("agreement", "images")]
    if images and "agreement" in parity:
        parts.append(f"{round(parity['agreement'] * images):,} of {images:,} answers the same")
    return "; ".join(parts) or "not recorded"


def _corruption_table(found: Robustness) -> dict[str, Any]:
    """Returns a table as the template draws it: the figures of its heads, each with two columns below, and its lines."""
    return {
        "title": corruption_table.title(found),
        "figures": corruption_table.figures(found),
        "worst": f"severity {SEVERITIES[-1]}",
        "lines": corruption_table.lines(found),
    }


def _table(title: str, columns: Sequence[table.Column], rows: Sequence[BenchRow]) -> dict[str, Any]:
    """Returns a table as the template draws it: its heads, and of each row the cells beside the name.

    Of speed there is a brief one as well, for a phone, where eight columns would make a card of every row.
    """
    named = dict(columns)
    brief = [name for name in _BRIEF if name in named] if _BRIEF[0] in named else []
    return {
        "title": title,
        "heads": [name for name, _ in columns],
        "brief_heads": brief,
        "brief": [(row, [named[name](row) for name in brief] if row.ok else []) for row in rows] if brief else [],
        "rows": [(row, [cell(row) for _, cell in columns[1:]] if row.ok else []) for row in rows],
    }


def _short_names(result: BenchResult) -> dict[str, str]:
    """Returns every name as tables show it, short enough for a sheet of paper; the whole one is in what was measured."""
    names = list(dict.fromkeys(row.name for row in result.rows))
    return dict(zip(names, shorten_all(names, _NAME), strict=True))


def _classes(names: Sequence[str]) -> str:
    more = f" and {len(names) - _CLASSES} more" if len(names) > _CLASSES else ""
    return f"{len(names)}: {', '.join(names[:_CLASSES])}{more}"


def _method_facts(result: BenchResult) -> list[tuple[str, Any]]:
    from vitrm.runtime.bench.report import command_line

    busy = result.machine["other_cpus_busy"]
    references = [row for row in result.rows if row.kind != "artifact"]  # an artifact's notes are among its facts
    return [
        *([("command", command_line.marked_up(result.command))] if result.command else []),
        ("processor", f"{result.machine['cpu']}, {result.machine['physical_cores']} physical cores{_threads(result)}"),
        ("system", result.machine["system"]),
        # Of a busy machine the warning at the top says it.
        *([("other processes", _others(busy))] if result.quiet else []),
        ("versions", ", ".join(f"{k} {v}" for k, v in result.versions.items())),
        *(_named(line) for line in table.basis(result)),
        *(("note", f"{', '.join(names)}: {note}") for note, names in table.row_notes(references).items()),
    ]


def _threads(result: BenchResult) -> str:
    return f", {result.threads} thread{'s' * (result.threads > 1)} used"


def _others(busy: float | None) -> str:
    return "not known" if busy is None else f"{busy:.2f} CPUs busy while latency was measured"


def _named(line: str) -> tuple[str, str]:
    """Splits a fact from its name, in front of a colon; why power was not measured is a fact of power's."""
    if line.startswith("power of "):
        return "power", line.removeprefix("power ")
    name, _, fact = line.partition(": ")
    return name, fact


def _value(value: Any) -> str:
    return "(" + ", ".join(f"{v:g}" for v in value) + ")" if isinstance(value, list) else str(value)
