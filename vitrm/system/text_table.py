"""Text tables: drawn by `rich` on a terminal, aligned with spaces where there is no `rich`."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vitrm.system.terminal import neutral_line

if TYPE_CHECKING:
    from rich.console import Console


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
    wraps: bool = False  # whether the first column may take several lines

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
        for i, name in enumerate(self.head):
            justify = "left" if name in self.left else "right"
            table.add_column(name, justify=justify, no_wrap=i > 0 or not self.wraps, overflow="fold")  # type: ignore[arg-type]
        for row in self.rows:
            table.add_row(*map(Text, _neutral(row.cells)), style=row.style, end_section=row.ends_section)
        console.print(table)

    def plain(self) -> str:
        """Returns the table in letters alone: its title, its head above a rule, its rows."""
        rows = [self.head, *(_neutral(row.cells) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if name in self.left else cell.rjust(width)
                for cell, width, name in zip(row, widths, self.head, strict=True)
            ).rstrip()
            for row in rows
        ]
        title = [] if self.title is None else [neutral_line(self.title)]
        return "\n".join([*title, lines[0], "-" * len(lines[0]), *lines[1:]])


def _neutral(cells: Sequence[str]) -> list[str]:
    return [neutral_line(cell) for cell in cells]  # before widths are taken: columns are as wide as what is shown
