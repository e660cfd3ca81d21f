"""Headline of the page, and the figures below it: the finding, with no more certainty than the measurement has."""

from __future__ import annotations

from collections.abc import Sequence

from vitrm.runtime.bench.report.numbers import between, milliseconds, percent, size, times
from vitrm.runtime.bench.report.table import flips
from vitrm.runtime.bench.rows import BenchRow

_CLOSE = 1.1  # times as fast as the next one: below it none is "the fastest" …
_CLOSE_DISTURBED = 1.5  # … and where other processes ran
_WIDE = 1.5  # high / low of a range around 1, above which it tells nothing
_MANY = 2000  # images from which on a share has two decimals


def headline(rows: Sequence[BenchRow], quiet: bool) -> str:
    """Says the finding in one sentence.

    Args:
        rows: each case once.
        quiet: whether other processes left the machine alone while latency was measured.
    """
    artifacts = [r for r in rows if r.kind == "artifact" and r.ok]
    if not artifacts:
        return "Nothing could be measured"
    timed = sorted((r for r in artifacts if r.latency_ms), key=_p50)
    best = timed[0] if timed else artifacts[0]
    parts = [part for part in (_speed(best, quiet), _agreement(best)) if part]
    subject = best.name + ("" if _unclear(best) else _rank(timed, quiet))
    # A comma: what stands before it may end in what is doubtful about it.
    return f"{subject} {', and '.join(parts)}" if parts else subject


def cards(rows: Sequence[BenchRow], quiet: bool) -> list[tuple[str, str, str]]:
    """Returns the figures of the only artifact, where there is one: what it is, how much, and what of it."""
    artifacts = [r for r in rows if r.kind == "artifact" and r.ok]
    if len(artifacts) != 1:
        return []
    row = artifacts[0]
    found = []
    if row.latency_ms:
        p50, p99 = milliseconds(row.latency_ms.p50), milliseconds(row.latency_ms.p99)
        found.append((f"p50, batch {row.batch}", f"{p50} ms", f"p99 {p99} ms"))
    if row.speedup is not None and row.speedup_range is not None:
        low, high = row.speedup_range
        detail = f"{between(low, high)} over the rounds" if quiet else "uncertain: the machine was busy"
        found.append(("× eager", f"{times(row.speedup, row.speedup_range, quiet)} ×", detail))
    if row.accuracy is not None and row.accuracy_interval is not None:
        low, high = row.accuracy_interval
        found.append(("accuracy", percent(row.accuracy), f"95 %: {low * 100:.1f} to {high * 100:.1f} %"))
    if row.agreement is not None:
        changed = f"flips {flips(row)}" if row.flips else "top-1, without labels"
        found.append(("agreement with eager", percent(row.agreement), changed))
    return [*found, ("size", size(row.bytes), f"{row.precision}, {row.graph}")]


def _p50(row: BenchRow) -> float:
    return row.latency_ms.p50 if row.latency_ms else 0.0


def _rank(timed: Sequence[BenchRow], quiet: bool) -> str:
    """Calls the first of `timed`, which are in order, the fastest only where the next one is clearly slower."""
    if len(timed) < 2:
        return ""
    clear = _p50(timed[1]) > _p50(timed[0]) * (_CLOSE if quiet else _CLOSE_DISTURBED)
    return f", {'the fastest' if clear else 'among the fastest'} of {len(timed)},"


def _speed(row: BenchRow, quiet: bool) -> str:
    doubt = "" if quiet else " (uncertain: the machine was busy)"
    if row.speedup_range is not None:
        low, high = row.speedup_range
        span = f"({between(low, high)} ×{'' if quiet else '; the machine was busy'})"
        if _unclear(row):
            return f"cannot be told apart in speed from {_eager(row)} {span}"
        if low < 1 < high:
            return f"is about as fast as {_eager(row)} {span}"
        return f"runs {between(low, high)} × as fast as {_eager(row)}{doubt}"
    if row.latency_ms:
        return f"takes {milliseconds(row.latency_ms.p50)} ms at batch {row.batch}{doubt}"
    return ""


def _unclear(row: BenchRow) -> bool:
    """Returns whether a row's range around 1 tells nothing; a rank would then say more than is known."""
    if row.speedup_range is None:
        return False
    low, high = row.speedup_range
    return low < 1 < high and high > low * _WIDE


def _eager(row: BenchRow) -> str:
    """Says what the row is compared with; that its steps are as many and halt alike stands below the table."""
    return f"eager PyTorch at batch {row.batch}"


def _agreement(row: BenchRow) -> str:
    if row.agreement is None or row.images is None:
        return ""
    share = "all" if row.agreement == 1 else f"{percent(row.agreement, 2 if row.images >= _MANY else 1)} of"
    return f"gives the same answer on {share} {row.images:,} images"
