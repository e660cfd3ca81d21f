"""Pictures with one look: what training, sweeps and calibration draw with matplotlib.

A .png has the light look.  A .svg has both: its colors are variables of a style that follows the reader's setting.  The colors are those
of the bench's report, which draws its own SVG because a device that measures has no matplotlib.
"""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vitrm.system.files import atomic_path, write_text
from vitrm.system.short_names import shorten
from vitrm.system.terminal import neutral_line, say

# Light and dark: each light color stands for its dark one, so no two are alike.
_LOOK = {
    "panel": ("#ffffff", "#1a1d23"),
    "ink": ("#1b1d22", "#e9ebef"),
    "dim": ("#5d6470", "#a0a7b4"),
    "line": ("#e2e4e8", "#2e333c"),
    "neutral": ("#6b7280", "#a5adba"),
    "blue": ("#0b66c3", "#62aef7"),
    "orange": ("#c2410c", "#ff9a62"),
    "teal": ("#0f766e", "#4fd0c0"),
    "plum": ("#9d3c8c", "#e58bd4"),
    "ochre": ("#8a6100", "#e6b74a"),
}
PANEL, INK, DIM, LINE, NEUTRAL, BLUE, ORANGE, TEAL, PLUM, OCHRE = (light for light, _ in _LOOK.values())
SERIES = (BLUE, ORANGE, TEAL, PLUM, OCHRE, NEUTRAL)
# Cells of a heat map and the writing on them are the same in both looks: a value's color means the value.
CELL_LIGHT, CELL_DARK, ON_LIGHT, ON_DARK = "#e8f1fb", "#083a73", "#1b1d23", "#fffffe"

_OTHER_SCRIPTS = (
    *(
        "Noto Sans CJK SC",
        "Noto Sans CJK JP",
        "Source Han Sans SC",
        "WenQuanYi Zen Hei",
        "WenQuanYi Micro Hei",
        "Droid Sans Fallback",
    ),
    *(
        "Noto Sans Devanagari",
        "Noto Sans Bengali",
        "Noto Sans Tamil",
        "Noto Sans Thai",
        "Noto Emoji",
        "Symbola",
        "Unifont",
    ),
)

_STYLE: dict[Any, Any] = {
    "figure.facecolor": PANEL,
    "figure.constrained_layout.use": True,
    "figure.titlesize": 11.5,
    "figure.titleweight": "bold",
    "font.size": 9,
    "text.color": INK,
    "axes.facecolor": PANEL,
    "axes.edgecolor": DIM,
    "axes.labelcolor": DIM,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    "xtick.color": DIM,
    "ytick.color": DIM,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.fonttype": "path",  # the reader's fonts have other widths, and labels would meet
    "svg.hashsalt": "vitrm",
}


@contextmanager
def picture(path: str | os.PathLike[str], width: float, height: float, title: str = "") -> Iterator[Any]:
    """Gives a matplotlib figure of `width` × `height` inches to draw on, and writes it to `path`, .png or .svg, whole or not at all.

    `title` stands above everything, and is shortened to what fits.
    """
    from cycler import cycler
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without pyplot: no global state, no backend to choose, half the import time.
    with rc_context({**_STYLE, "font.family": _fonts(), "axes.prop_cycle": cycler(color=SERIES)}):
        figure = Figure(figsize=(width, height))
        FigureCanvasAgg(figure)
        with _missing_letters_said(path):
            if title:
                _write_title(figure, title)
            yield figure
            if Path(path).suffix == ".svg":
                text = io.StringIO()
                figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
                write_text(path, _both_looks(text.getvalue()))
                return
            with atomic_path(path) as temporary:
                figure.savefig(temporary, format="png", dpi=144)


def _fonts() -> list[str]:
    """matplotlib's own font, and of those that have other scripts the ones installed, for what it lacks."""
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in _OTHER_SCRIPTS if name in installed)]


@contextmanager
def _missing_letters_said(path: str | os.PathLike[str]) -> Iterator[None]:
    """Says in one line which letters no font has, where matplotlib warns of each every time it meets it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", message="Glyph .* missing from")
        yield
    letters: dict[str, None] = {}
    for warning in caught:
        glyph = re.match(r"Glyph (\d+) .*missing from", str(warning.message))
        if glyph:
            letters[chr(int(glyph[1]))] = None
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if letters:
        say(
            f"note: {Path(path).name} has boxes in place of {shorten(' '.join(letters), 40)}, which no font found here has: install one that does, "
            "such as Noto Sans CJK",
            error=True,
        )


def _write_title(figure: Any, title: str) -> None:
    """Writes as much of the title as fits."""
    # parse_math: a folder may be called "a$b$".
    text = figure.suptitle(neutral_line(title), x=0.01, ha="left", parse_math=False)
    for length in range(len(title), 10, -1):
        if text.get_window_extent().x1 < 0.99 * figure.bbox.x1:
            return
        text.set_text(shorten(neutral_line(title), length))


def whole_numbers(axes: Any, most: int) -> None:
    """Puts the ticks of the x-axis at whole numbers, at `most` of them and one."""
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=most)


def legend_above(axes: Any, columns: int) -> None:
    """Puts the legend between the title and the plot, where it covers no line."""
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        ncols=columns,
        borderaxespad=0.2,
        columnspacing=1.2,
        handlelength=2,
    )


def heat_colors() -> Any:
    """Returns the color map of heat maps, from light to dark blue."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("vitrm", [CELL_LIGHT, "#7fb2e5", "#1d6fc0", CELL_DARK])


def on_cell(darkness: float) -> str:
    """Returns the color of writing on a heat map's cell; `darkness` is its place in `heat_colors`, in [0, 1]."""
    return ON_DARK if darkness > 0.5 else ON_LIGHT


def _both_looks(svg: str) -> str:
    """Replaces an SVG's colors by variables with a value for a light page and one for a dark page."""
    for name, (light, _) in _LOOK.items():
        svg = re.sub(f"{light}\\b", f"var(--{name})", svg, flags=re.IGNORECASE)
    variables = [";".join(f"--{name}:{pair[look]}" for name, pair in _LOOK.items()) for look in (0, 1)]
    style = f"<style>:root{{{variables[0]}}}@media(prefers-color-scheme:dark){{:root{{{variables[1]}}}}}</style>"
    start = re.search(r"<svg\b[^>]*>", svg)
    assert start is not None
    return svg[: start.end()] + style + svg[start.end() :]
