"""A spy on pictures: no two texts of a drawn figure may lie on each other, and none may reach beyond the figure."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text


def watch(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns a list that fills with the texts of every saved figure; saving one with an overlap fails."""
    seen: list[str] = []
    save = Figure.savefig

    def checked(figure: Any, *args: Any, **kwargs: Any) -> None:
        save(figure, *args, **kwargs)
        seen.extend(_check(figure))

    monkeypatch.setattr(Figure, "savefig", checked)
    return seen


def redraw(
    benchmark: ModuleType, record: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Path, list[str]]:
    """Has a benchmark draw a copy of its record anew, by its flag; returns the copy, the picture for the docs, and all texts."""
    copy, docs = folder / record.name, folder / "docs.svg"
    copy.write_bytes(record.read_bytes())
    monkeypatch.setattr(benchmark, "DOCS_PICTURE", docs)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--draw", str(copy)])
    texts = watch(monkeypatch)
    benchmark.main()
    return copy, docs, texts


def _check(figure: Any) -> list[str]:
    figure.canvas.draw()
    beyond = set()  # labels of ticks outside an axis's range: they are there, and not drawn
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [*axis.majorTicks, *axis.minorTicks]
            if not axes.axison:
                low, high = 1, 0
                beyond.add(axis.label)
            beyond |= {label for t in ticks if not low <= t.get_loc() <= high for label in (t.label1, t.label2)}
    shown = [
        (text.get_text(), text.get_window_extent())
        for text in figure.findobj(Text)
        if text.get_visible() and text.get_text().strip() and text not in beyond
    ]
    for i, (one, a) in enumerate(shown):
        inside = a.x0 > -1 and a.y0 > -1 and a.x1 < figure.bbox.x1 + 1 and a.y1 < figure.bbox.y1 + 1
        assert inside, f"{one!r} reaches beyond the picture: {a} of {figure.bbox}"
        for other, b in shown[i + 1 :]:
            apart = min(a.x1, b.x1) - max(a.x0, b.x0) < 0.5 or min(a.y1, b.y1) - max(a.y0, b.y0) < 0.5
            assert apart, f"{one!r} lies on {other!r}"
    return [text for text, _ in shown]
