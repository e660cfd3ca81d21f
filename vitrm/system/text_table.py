"""Text tables: drawn by `rich` on a terminal, aligned with spaces where there is no `rich`."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vitrm.system.short_names import shorten_all
from vitrm.system.terminal import neutral_line

if TYPE_CHECKING:
    from rich.console import Console

_GAP = "  "  # between two columns
_EDGES = 2  # columns that the rules of a table take at its sides
_LEAST = 12  # letters of a shortened name


@dataclass(frozen=True)
class TextRow:
    """Cells of one row, and how `rich` shows them."""

    cells: Sequence[str]
    style: str = ""
    ends_section: bool = False  # whether a rule follows


@dataclass(frozen=True)
class TextTable:
    """A table of text.  Control characters in its cells come out as escapes."""

    head: Sequence[str]
    rows: Sequence[TextRow]
    left: Container[str]  # names of the columns that are aligned to the left; all others are numbers
    title: str | None = None
    shortens: bool = False  # whether the first column's cells lose letters in the middle where a terminal is too narrow

    def print(self, console: Console) -> None:
        """Prints the table to a `vitrm.system.terminal.console`."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(
            box=box.SIMPLE_HEAD,
            title=None if self.title is None else neutral_line(self.title),
            title_justify="left",
            title_style="bold",
            pad_edge=False,
            collapse_padding=True,
        )
        cells = [_neutral(row.cells) for row in self.rows]
        for name, head in zip(self.head, self._heads(cells, console.width), strict=True):
            justify = "left" if name in self.left else "right"
            table.add_column(Text(head), justify=justify, no_wrap=True, overflow="fold")  # type: ignore[arg-type]
        if self.shortens:
            short = shorten_all([row[0] for row in cells], self._room(cells, console.width))
            cells = [[name, *rest] for name, (_, *rest) in zip(short, cells, strict=True)]
        for row, written in zip(self.rows, cells, strict=True):
            table.add_row(*map(Text, written), style=row.style, end_section=row.ends_section)
        console.print(table)

    def _heads(self, cells: Sequence[Sequence[str]], width: int) -> list[str]:
        """Returns the heads, shortened alike where they, and not what stands below, make the table too wide."""
        heads = _neutral(self.head)
        widest = [max(map(len, column)) for column in zip(*cells, strict=True)] or [0] * len(heads)
        if self.shortens:
            widest[0] = min(widest[0], _LEAST)
        for length in range(max(map(len, heads)), _LEAST - 1, -1):
            short = shorten_all(heads, length)
            if sum(max(len(h), w) + len(_GAP) for h, w in zip(short, widest, strict=True)) <= width - _EDGES + len(
                _GAP
            ):
                return short
        return shorten_all(heads, _LEAST)

    def _room(self, cells: Sequence[Sequence[str]], width: int) -> int:
        """Returns the letters that a terminal `width` columns wide leaves for the first column."""
        others = [max(map(len, column)) for column in zip(self.head, *cells, strict=True)][1:]
        return max(width - _EDGES - sum(others) - len(_GAP) * len(others), _LEAST)

    def plain(self) -> str:
        """Returns the table in letters alone: its title, its head above a rule, its rows."""
        rows = [self.head, *(_neutral(row.cells) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            _GAP.join(
                cell.ljust(width) if name in self.left else cell.rjust(width)
                for cell, width, name in zip(row, widths, self.head, strict=True)
            ).rstrip()
            for row in rows
        ]
        title = [] if self.title is None else [neutral_line(self.title)]
        return "\n".join([*title, lines[0], "-" * len(lines[0]), *lines[1:]])


def _neutral(cells: Sequence[str]) -> list[str]:
    return [neutral_line(cell) for cell in cells]  # before widths are taken: columns are as wide as what is shown
