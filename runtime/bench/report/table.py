"""Text of a bench: one table where the terminal is wide enough for it, else several with a few columns each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from vitrm.runtime.bench.report.numbers import milliseconds, number, percent, size, times
from vitrm.runtime.bench.report.savings import measured, sentence
from vitrm.runtime.bench.rows import BenchResult, BenchRow
from vitrm.runtime.halting.choose import HaltingChoice
from vitrm.system.terminal import neutral_line
from vitrm.system.text_table import TextRow, TextTable

if TYPE_CHECKING:
    from rich.console import Console

Column = tuple[str, Callable[[BenchRow], str]]  # its head, and its cell of a row
_WIDE = 150  # columns that the one table needs
_EAGER = "× eager"


def difference(row: BenchRow) -> str:
    """Writes the largest |Δlogit|, or why there is none."""
    if row.max_logit_difference is None:
        return "not finite" if row.agreement is not None else "–"
    largest = row.max_logit_difference
    return f"{largest:.2g}" if largest < 99.5 else f"{largest:.0f}"


def flips(row: BenchRow) -> str:
    """Writes the answers gained and lost."""
    return f"+{row.flips.gained} −{row.flips.lost}" if row.flips else "–"


def depth(row: BenchRow) -> str:
    """Writes the steps, and the mean that was used where samples halt."""
    if row.steps is None:
        return "–"
    if row.halt_threshold is not None and row.halt_threshold < 1 and row.mean_steps_used is not None:
        return f"{row.mean_steps_used:.1f} of {row.steps}"
    return str(row.steps)


def columns(result: BenchResult) -> list[Column]:
    """Returns the columns for `result`: those of energy and top-5 accuracy only where some of it was measured."""
    at = next(i for i, (name, _) in enumerate(COLUMNS) if name == "accuracy")
    metered = any(r.watts is not None for r in result.rows)
    top5 = any(r.top5_accuracy is not None for r in result.rows)
    speedup: Column = (
        _EAGER,
        lambda r: times(r.speedup, r.speedup_range, result.quiet) if r.kind != "eager" else "1",
    )
    chosen = [*COLUMNS[:at], *(ENERGY if metered else []), COLUMNS[at], *([TOP5] if top5 else []), *COLUMNS[at + 1 :]]
    return [speedup if name == _EAGER else (name, cell) for name, cell in chosen]


def result_tables(result: BenchResult, width: int | None = None) -> list[TextTable]:
    """Returns one table, or several where a terminal of `width` columns is too narrow for it."""
    if width is None or width >= _WIDE:
        return [_table(result, columns(result))]
    shown = dict(columns(result))
    tables = []
    for title, names, once in _NARROW:
        chosen = [(name, shown[name]) for name in names if name in shown]
        if len(chosen) > 2:  # energy may not have been measured
            tables.append(_table(result, chosen, title=title, once=once))
    return tables


def page_tables(result: BenchResult) -> list[tuple[str, list[Column], list[BenchRow]]]:
    """Returns the page's tables: of each its title, its columns and its rows.

    Two, which fit on a sheet of paper: times are of a batch size, answers are not.
    """
    shown = columns(result)
    speed = [c for c in shown if c[0] not in _ANSWERS]
    answers = [c for c in shown if c[0] in ("artifact", *_ANSWERS)]
    once = [r for r in result.rows if r.batch == result.rows[0].batch]
    return [("Speed", speed, list(result.rows)), ("Answers", answers, once)]


def print_result(result: BenchResult, console: Console) -> None:
    """Prints the tables and, below them, what the figures were measured on, to a `vitrm.system.terminal.console`."""
    for table in result_tables(result, console.width):
        table.print(console)
    for line in footer(result):
        console.print(line, style="dim" if not line.startswith("✗") else "red")


def plain_text(result: BenchResult) -> str:
    """Returns the same in letters alone: for devices without `rich`."""
    return "\n".join([*(table.plain() for table in result_tables(result)), "", *footer(result)])


def _table(result: BenchResult, columns: list[Column], title: str | None = None, once: bool = False) -> TextTable:
    """Makes a table of these columns; `once` leaves out all batch sizes but the first."""
    rows = [r for r in result.rows if not once or r.batch == result.rows[0].batch]
    return TextTable(
        head=[name for name, _ in columns],
        rows=[
            TextRow(
                _cells(row, columns),
                style="red" if not row.ok else "dim" if row.kind != "artifact" else "",
                ends_section=any(later.batch != row.batch for later in rows[i + 1 : i + 2]),
            )
            for i, row in enumerate(rows)
        ],
        left=LEFT,
        title=title,
        shortens=True,
    )


def _cells(row: BenchRow, chosen: list[Column]) -> list[str]:
    cells = [cell(row) if row.ok or name == "batch" else "–" for name, cell in chosen]
    cells[0] = row.name
    if not row.ok:
        cells[2 if chosen[1][0] == "batch" else 1] = "failed"
    return cells


COLUMNS: list[Column] = [
    ("artifact", lambda r: r.name),
    ("backend", lambda r: r.backend or "–"),
    ("precision", lambda r: r.precision or "–"),
    ("steps", depth),
    ("batch", lambda r: str(r.batch)),
    ("p50 ms", lambda r: milliseconds(r.latency_ms.p50 if r.latency_ms else None)),
    ("p90 ms", lambda r: milliseconds(r.latency_ms.p90 if r.latency_ms else None)),
    ("p99 ms", lambda r: milliseconds(r.latency_ms.p99 if r.latency_ms else None)),
    ("images/s", lambda r: number(r.images_per_s)),
    (_EAGER, lambda r: times(r.speedup, r.speedup_range) if r.kind != "eager" else "1"),
    ("accuracy", lambda r: percent(r.accuracy)),
    ("agreement", lambda r: percent(r.agreement)),
    ("flips", flips),
    ("max Δlogit", difference),
    ("size", lambda r: size(r.bytes)),
]
TOP5: Column = ("top-5", lambda r: percent(r.top5_accuracy))
ENERGY: list[Column] = [
    ("W", lambda r: milliseconds(r.watts)),
    ("mJ/image", lambda r: milliseconds(None if r.joules_per_image is None else r.joules_per_image * 1e3)),
    (
        "mJ/correct",
        lambda r: milliseconds(None if r.joules_per_correct_image is None else r.joules_per_correct_image * 1e3),
    ),
]
_ANSWERS = ("backend", "accuracy", "top-5", "agreement", "flips", "max Δlogit", "size")
# Tables for a narrow terminal: title, columns, and whether the first batch size says it all.  Each leaves a name at least
# 28 of 80 columns.
_NARROW: list[tuple[str, Sequence[str], bool]] = [
    ("Artifacts", ("artifact", "backend", "precision", "steps", "size"), True),
    ("Speed", ("artifact", "batch", "p50 ms", "p90 ms", "p99 ms", "images/s", _EAGER), False),
    ("Energy", ("artifact", "batch", *(name for name, _ in ENERGY)), False),
    ("Answers", ("artifact", "accuracy", "top-5", "agreement", "flips", "max Δlogit"), True),
]
LEFT = {"artifact", "backend", "precision"}


def footer(result: BenchResult) -> list[str]:
    """Says what the figures were measured on, one fact a line; a row that failed starts with ✗."""
    lines = [
        f"✗ {name}: {status}" for name, status in dict.fromkeys((r.name, r.status) for r in result.rows if not r.ok)
    ]
    devices = dict.fromkeys(r.device for r in result.rows if r.device)
    lines.append(
        f"{', '.join(d for d in devices if d)} · {result.threads} thread{'s' if result.threads > 1 else ''} · "
        + " · ".join(f"{k} {v}" for k, v in result.versions.items())
    )
    lines += basis(result)
    lines += [halting(choice) for choice in result.halting]
    lines += [sentence(saving, result.quiet) for saving in measured(result)]
    lines += result.notes
    for note, names in row_notes(result.rows).items():
        lines.append(f"{', '.join(names)}: {note}")
    return [neutral_line(line) for line in lines]


def basis(result: BenchResult) -> list[str]:
    """Says how latency and power were measured and what accuracy is of: a name, a colon, and the fact."""
    counts = [r.latency_ms.n for r in result.rows if r.latency_ms]
    lines = []
    if counts:
        low, high = min(counts), max(counts)
        often = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        line = (
            f"latency: each row was timed {often} times in {result.rounds} interleaved rounds, after at least {result.warm_up} runs "
            "to warm up, from host memory to host memory"
        )
        if any(r.speedup is not None for r in result.rows):
            line += "; × eager is the range of the middle 80 % of rounds"
            line += ", or the median where that spans at most a tenth of it" if result.quiet else ""
        lines.append(line + ("; with under 100 runs p99 is close to the slowest" if low < 100 else ""))
    lines += power(result)
    for data in result.data:
        if data["labelled"]:
            whole = data["images"] == data["total"]
            part = f"all {data['total']:,}" if whole else f"{data['images']:,} of the {data['total']:,}"
            what = "accuracy and agreement" if any(r.agreement is not None for r in result.rows) else "accuracy"
            split = f"{data['split']} " if data["split"] else ""
            lines.append(f"{what}: on {part} {split}images of {data['name']}")
    return lines


def power(result: BenchResult) -> list[str]:
    """Says what power is of, or why there is none."""
    lines = []
    idle: dict[str, float] = result.power.get("idle_watts", {})
    for scope in dict.fromkeys(r.power_scope for r in result.rows if r.power_scope):
        rest = f", {milliseconds(idle[scope])} W of it when idle" if scope in idle else ""
        lines.append(f"power: {scope}, everything on it{rest}")
    reasons = result.power.get("not_measured", {})
    lines += [f"power of {kind} rows not measured: {reason}" for kind, reason in reasons.items()]
    return lines


def halting(choice: HaltingChoice) -> str:
    """Says a choice of threshold in one line."""
    chosen, full = choice.chosen, choice.full
    what = "never halting" if chosen.threshold >= 1 else f"threshold {chosen.threshold:g}"
    loss = f", {chosen.lost} lost and {chosen.gained} gained: at most {choice.drop_bound * 100:.2f} given up with 95 % confidence"
    return (
        f"halting: {choice.name} now has {what}, chosen on {choice.images:,} validation images of {choice.data} (not more than "
        f"{choice.budget * 100:g} points given up{loss if chosen.threshold < 1 else ''}): {percent(chosen.accuracy)} after {chosen.mean_steps:.2f} steps on average, "
        f"{percent(full.accuracy)} after {choice.steps}; calibration error of halt_prob {percent(choice.reliability.ece, 1)}"
    )


def row_notes(rows: Sequence[BenchRow]) -> dict[str, list[str]]:
    """Returns each note with the names of the rows that have it."""
    notes: dict[str, list[str]] = {}
    for row in rows:
        for note in row.notes:
            if row.name not in notes.setdefault(note, []):
                notes[note].append(row.name)
    return notes
