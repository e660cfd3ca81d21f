"""The learning curves of a run as a picture: loss, learning rate, accuracy, and what depth brought in the best epoch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from vitrm.system.picture import BLUE, DIM, NEUTRAL, ORANGE, legend_above, picture, whole_numbers

_PAD, _ROW = 8.0, 12.8  # points between a plot and its title, and for each row of the legend between them
_SEEN = 0.03  # of an axis's height: a narrower band is hidden by its line
_TITLES = {"loss": "Loss", "accuracy": "Accuracy, %", "depth": "Accuracy by step, %"}
_LEAST_POINTS = 3.0  # that the axis of depth spans: a fifth of a point is no cliff


def draw_curves(
    history: Sequence[dict[str, Any]], path: str | os.PathLike[str], title: str, best: int | None = None
) -> None:
    """Writes the curves of `history` (the lines of metrics.jsonl) to `path` as PNG or SVG.  Needs no display.

    `best` is the epoch whose weights are kept, counted from 1; None: the last.
    """
    if not history:
        return
    epochs = [line["epoch"] for line in history]
    kept = next((line for line in history if line["epoch"] == best), history[-1])
    depths = len(kept["validation_accuracy"])
    panels = [["loss", "accuracy", "depth"], ["lr", "accuracy", "depth"]]
    ratios = [2.7, 2.9, 2.3]
    if depths == 1:
        panels, ratios = [row[:2] for row in panels], ratios[:2]
    band = _spread_is_seen(history)
    rows = 4 if band else 3
    with picture(path, 8 if depths > 1 else 6.4, 3.7, title) as figure:
        axes = figure.subplot_mosaic(panels, width_ratios=ratios, height_ratios=[3.4, 1])
        marker = "." if len(epochs) < 40 else ""
        _draw_loss(axes["loss"], history, epochs, marker)
        axes["lr"].plot(epochs, [line["lr"] for line in history], color=NEUTRAL, marker=marker)
        axes["lr"].set_ylim(bottom=0)
        axes["lr"].set_ylabel("learning\nrate")
        _draw_accuracy(axes["accuracy"], history, epochs, kept, marker, band)
        if depths > 1:
            _draw_depth(axes["depth"], kept)
        for name in ("loss", "lr", "accuracy"):
            label = f"epoch {kept['epoch']}, kept" if name == "loss" else None
            axes[name].axvline(kept["epoch"], color=ORANGE, linestyle=":", linewidth=1.2, zorder=1, label=label)
            whole_numbers(axes[name], 6)
            axes[name].set_xlim(*_limits(epochs))
        axes["loss"].tick_params(labelbottom=False)
        for name in ("loss", "accuracy"):
            legend_above(axes[name], 1)
        for name, title in _TITLES.items():
            if name in axes:
                axes[name].set_title(title, pad=_PAD + _ROW * rows)
        for name in ("lr", "accuracy"):
            axes[name].set_xlabel("epoch")


def _draw_loss(axes: Any, history: Sequence[dict[str, Any]], epochs: Sequence[int], marker: str) -> None:
    axes.plot(
        epochs, [line["train_loss"] for line in history], color=NEUTRAL, marker=marker, label="training, all terms"
    )
    last = [line["validation_loss"][-1] for line in history]
    axes.plot(epochs, last, color=BLUE, marker=marker, label="validation, cross-entropy")


def _draw_accuracy(
    axes: Any, history: Sequence[dict[str, Any]], epochs: Sequence[int], kept: dict[str, Any], marker: str, band: bool
) -> None:
    """Draws the deepest step's accuracy, with `band` all steps around it, and the epoch that was kept."""
    training = [100 * line["train_accuracy"] for line in history]
    axes.plot(epochs, training, color=NEUTRAL, marker=marker, label="training")
    by_epoch = [[100 * share for share in line["validation_accuracy"]] for line in history]
    depths = len(by_epoch[-1])
    name = f"validation, step {depths}" if depths > 1 else "validation"
    axes.plot(epochs, [steps[-1] for steps in by_epoch], color=BLUE, marker=marker, label=name)
    lowest, highest = list(map(min, by_epoch)), list(map(max, by_epoch))
    if band:
        axes.fill_between(epochs, lowest, highest, color=BLUE, alpha=0.25, label=f"steps 1 to {depths}", lw=0)
    value = 100 * kept["validation_accuracy"][-1]
    best = f"best: epoch {kept['epoch']}, {value:.1f} %"  # in the legend, where it covers no curve
    axes.plot([kept["epoch"]], [value], "o", color=ORANGE, markersize=7, label=best)


def _spread_is_seen(history: Sequence[dict[str, Any]]) -> bool:
    """Returns whether the steps' accuracies lie apart in most epochs: the line hides a narrow band."""
    steps = [line["validation_accuracy"] for line in history]
    widths = sorted(max(shares) - min(shares) for shares in steps)
    all_shares = [share for line in history for share in (*line["validation_accuracy"], line["train_accuracy"])]
    return widths[len(widths) // 2] > _SEEN * (max(all_shares) - min(all_shares))


def _draw_depth(axes: Any, kept: dict[str, Any]) -> None:
    """Draws what each further step brought with the weights that were kept."""
    values = [100 * share for share in kept["validation_accuracy"]]
    steps = range(1, len(values) + 1)
    axes.plot(steps, values, color=BLUE, marker="o")
    half = max(0.9 * (max(values) - min(values)), _LEAST_POINTS / 2)
    top = min((max(values) + min(values)) / 2 + half, 100.4)
    axes.set_ylim(top - 2 * half, top)
    brought = f"{values[-1] - values[0]:+.1f} points by step {len(values)}".replace("-", "−")
    axes.annotate(
        f"weights of epoch {kept['epoch']}:\n{brought}",
        (0, 1),
        xycoords="axes fraction",
        xytext=(0, 5),
        textcoords="offset points",
        color=DIM,
        fontsize=8.5,
        linespacing=1.4,
    )
    whole_numbers(axes, 8)
    axes.set_xlabel("step")


def _limits(epochs: Sequence[int]) -> tuple[float, float]:
    margin = max((epochs[-1] - epochs[0]) * 0.03, 0.3)
    return epochs[0] - margin, epochs[-1] + margin
