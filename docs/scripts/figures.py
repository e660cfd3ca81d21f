r"""Compares every figure in README.md and docs/ with the record in benchmarks/records/ that it comes from.

python docs/scripts/figures.py            fails where prose and record differ, or a figure has no record
python docs/scripts/figures.py --list     each figure with its record and the machine

A comment before a paragraph or table names the figures in it, in the order in which they stand there:

    <!-- figures: RECORD
    rows/name=fp32.onnx/accuracy | *100 | .2f
    -->

A line is a path into the record, a factor where the prose has another unit, and the format. A part of a path is a key, a place in a
list (a slash within a key is written \/), `key=value` (with commas between several) for the first element that has them, or one of median, min, max, count. `A - B` is a
difference. A line `RECORD: …` reads from another record. A bundled checkpoint's config.json, which training wrote, is named by its path. What only looks like a measurement (a setting, a version) is named once a page:

    <!-- not measured: "0.3 points", "10.3" -->
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "benchmarks" / "records"

# A number with a unit of measurement, or with a decimal point.
_UNIT = r"(?:%|×(?!\s*\d)|(?:k|M|G)i?B\b|ms\b|s\b|min\b|minutes?\b|points?\b|images/s|images per second|times\b)"
_FIGURE = re.compile(rf"(?<![\w.,/-])[−-]?\d[\d,]*(?:\.\d+)?\s?{_UNIT}|(?<![\w.,/-])[−-]?\d[\d,]*\.\d+(?!\w|\.\d)")
_COMMENT = re.compile(r"<!--\s*figures:\s*(\S+)\s*\n(.*?)-->", re.DOTALL)
_EXEMPT = re.compile(r"<!--\s*not measured:(.*?)-->", re.DOTALL)
_CODE = re.compile(
    r"^(```|~~~).*?^\1[^\n]*$|`[^`\n]+`|<!--.*?-->|\]\([^)\n]*\)|^(?: {4}|\t)[^\n]*$", re.DOTALL | re.MULTILINE
)
_NAMES = re.compile(r"arXiv \d+\.\d+|Python (?:≥ )?3\.\d+")  # they have points and measure nothing
_SUMMARIES = {"median": statistics.median, "min": min, "max": max, "count": len}


class FigureError(Exception):
    """A figure's path or format that its record does not have."""


@dataclass(frozen=True)
class StatedFigure:
    """A figure that a page names a record for."""

    page: str
    line: int
    record: str
    path: str
    factor: float
    format: str

    def text(self) -> str:
        """The figure as the page has to print it."""
        value = self.value()
        if isinstance(value, str):
            return value
        return format(round(value * self.factor) if self.format.endswith("d") else value * self.factor, self.format)

    def value(self) -> Any:
        """The figure as the record has it."""
        first, *rest = (look_up(read_record(self.record), part, self.record) for part in self.path.split(" - "))
        for other in rest:
            first -= other
        return first


@cache
def read_record(name: str) -> Any:
    """The record of that name, parsed."""
    path = ROOT / name if "/" in name else RECORDS / f"{name.removesuffix('.json')}.json"
    if not path.is_file():
        raise FigureError(f"there is no record {name}")
    return json.loads(path.read_text())


def machine(name: str) -> str:
    """The processor that a record was made on, as it says itself."""
    record = read_record(name)
    where = record.get("machine", record)
    features = where.get("cpu_features")
    return f"{where.get('cpu', '?')}{' (' + ', '.join(features) + ')' if features else ''}"


def look_up(record: Any, path: str, name: str) -> Any:
    """Returns what stands at `path` in a record; raises FigureError where nothing does."""
    found = record
    for part in re.split(r"(?<!\\)/", path.strip()):
        part = part.replace("\\/", "/")
        try:
            if isinstance(found, list) and part in _SUMMARIES:
                found = _SUMMARIES[part](found)
            elif isinstance(found, list) and "=" in part:
                wanted = dict(pair.split("=", 1) for pair in re.split(r",(?=\w+=)", part))
                found = next(item for item in found if all(str(item.get(k)) == v for k, v in wanted.items()))
            else:
                found = found[int(part) if isinstance(found, list) else part]
        except (KeyError, IndexError, ValueError, TypeError, StopIteration):
            raise FigureError(f"{name} has no {path.strip()!r} (at {part!r})") from None
    if found is None or isinstance(found, bool | dict | list):
        raise FigureError(f"{name}: {path.strip()!r} is no figure")
    return found


def parse_figure(line: str, record: str, page: str, number: int) -> StatedFigure:
    """A line of a `figures` comment."""
    named = re.match(r"([\w./-]+): (.*)", line)
    if named:
        record, line = named[1], named[2]
    path, *rest = (part.strip() for part in line.split(" | "))
    factor = 1.0
    if rest and rest[0][:1] in "*/":
        number_text = rest.pop(0)
        factor = float(number_text[1:]) if number_text[0] == "*" else 1 / float(number_text[1:])
    if len(rest) > 1:
        raise FigureError(f"{page}:{number}: expected PATH | *FACTOR | FORMAT, found {line!r}")
    return StatedFigure(page, number, record, path, factor, rest[0] if rest else "")


def pages(root: Path = ROOT) -> Iterator[Path]:
    """README.md and every page of the documentation."""
    yield root / "README.md"
    yield from sorted((root / "docs").rglob("*.md"))


def check_page(text: str, page: str) -> tuple[list[str], list[StatedFigure]]:
    """Complaints about a page's figures, and the figures that have records."""
    complaints: list[str] = []
    figures: list[StatedFigure] = []
    covered: list[tuple[int, int]] = []
    for comment in _COMMENT.finditer(text):
        block = re.compile(r"\s*(.*?)(?:\n\s*\n|\Z)", re.DOTALL).match(text, comment.end())
        assert block
        position = block.start(1)
        first = text.count("\n", 0, comment.start()) + 2
        for offset, line in enumerate(comment[2].splitlines()):
            if not line.strip():
                continue
            try:
                figure = parse_figure(line.strip(), comment[1], page, first + offset)
                wanted = figure.text()
            except (FigureError, ValueError) as error:
                complaints.append(f"{page}:{first + offset}: {error}")
                continue
            figures.append(figure)
            found = _find(wanted, text, position, block.end(1))
            if found is None:
                complaints.append(
                    f"{page}:{figure.line}: {figure.record} says {wanted} ({figure.path}), which the block below does not"
                    " say in this place"
                )
            else:
                position = found[1]
                covered.append(found)
    return complaints + _without_record(text, page, covered), figures


def _find(wanted: str, text: str, start: int, end: int) -> tuple[int, int] | None:
    pattern = re.escape(wanted).replace(r"\-", "[−-]") if wanted.startswith("-") else re.escape(wanted)
    found = re.compile(rf"(?<![\w.,]){pattern}(?!\d|[.,]\d)").search(text, start, end)
    return found.span() if found else None


def _without_record(text: str, page: str, covered: list[tuple[int, int]]) -> list[str]:
    """Complaints about what looks like a measurement and has no record."""
    exempt = [w for comment in _EXEMPT.findall(text) for w in re.findall(r'"([^"]+)"', comment)]
    hidden = [m.span() for m in (*_CODE.finditer(text), *_NAMES.finditer(text))]
    for words in exempt:
        hidden += [m.span() for m in re.finditer(rf"(?<![\d.,]){re.escape(words)}(?![\d]|\.\d)", text)]
    complaints = []
    for figure in _FIGURE.finditer(text):
        if not any(low < figure.end() and figure.start() < high for low, high in covered + hidden):
            line = text.count("\n", 0, figure.start()) + 1
            complaints.append(f"{page}:{line}: {figure[0]!r} has no record: name one, or take the figure out")
    return complaints


def main(argv: list[str] | None = None) -> int:
    """Checks all pages; returns 1 where a figure is wrong or has no record."""
    parser = argparse.ArgumentParser(description="Compare every figure in README.md and docs/ with its record.")
    parser.add_argument("--list", action="store_true", help="print each figure with its record and the machine")
    args = parser.parse_args(argv)
    complaints: list[str] = []
    figures: list[StatedFigure] = []
    for page in pages():
        wrong, named = check_page(page.read_text(), str(page.relative_to(ROOT)))
        complaints += wrong
        figures += named
    if args.list:
        for figure in figures:
            print(
                f"{figure.page}:{figure.line}: {figure.text()} = {figure.path} of {figure.record}, {machine(figure.record)}"
            )
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    print(
        f"{len(figures)} figures from {len({f.record for f in figures})} records, {len(complaints)} wrong or without record"
    )
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
