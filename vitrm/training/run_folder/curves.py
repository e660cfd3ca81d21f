"""The learning curves of a run as a picture: loss, learning rate, accuracy, and what depth brought in the best epoch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from vitrm.system.picture import BLUE, DIM, NEUTRAL, ORANGE, PANEL, legend_above, picture, whole_numbers


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
    ratios = [3, 3, 2.2]
    if depths == 1:
        panels, ratios = [row[:2] for row in panels], ratios[:2]
    with picture(path, 10.5 if depths > 1 else 8, 3.6, title) as figure:
        axes = figure.subplot_mosaic(panels, width_ratios=ratios, height_ratios=[3.4, 1])
        marker = "." if len(epochs) < 40 else ""
        _draw_loss(axes["loss"], history, epochs, marker)
        axes["lr"].plot(epochs, [line["lr"] for line in history], color=NEUTRAL, marker=marker)
        axes["lr"].set_ylim(bottom=0)
        axes["lr"].set_ylabel("learning\nrate")
        _draw_accuracy(axes["accuracy"], history, epochs, kept, marker)
        if depths > 1:
            _draw_depth(axes["depth"], kept)
        for name in ("loss", "lr", "accuracy"):
            axes[name].axvline(kept["epoch"], color=ORANGE, linestyle=":", linewidth=1.2, zorder=1)
            whole_numbers(axes[name], 6)
            axes[name].set_xlim(*_limits(epochs))
        axes["loss"].tick_params(labelbottom=False)
        for name in ("lr", "accuracy"):
            axes[name].set_xlabel("epoch")


def _draw_loss(axes: Any, history: Sequence[dict[str, Any]], epochs: Sequence[int], marker: str) -> None:
    axes.plot(
        epochs, [line["train_loss"] for line in history], color=NEUTRAL, marker=marker, label="training, all terms"
    )
    last = [line["validation_loss"][-1] for line in history]
    axes.plot(epochs, last, color=BLUE, marker=marker, label="validation, cross-entropy")
    axes.set_title("Loss", pad=22)
    legend_above(axes, 2)


def _draw_accuracy(
    axes: Any, history: Sequence[dict[str, Any]], epochs: Sequence[int], kept: dict[str, Any], marker: str
) -> None:
    """Draws the deepest step's accuracy, all steps as a band around it, and the epoch that was kept."""
    training = [100 * line["train_accuracy"] for line in history]
    axes.plot(epochs, training, color=NEUTRAL, marker=marker, label="training")
    by_epoch = [[100 * share for share in line["validation_accuracy"]] for line in history]
    depths = len(by_epoch[-1])
    if depths > 1:
        lowest, highest = list(map(min, by_epoch)), list(map(max, by_epoch))
        seen = max(high - low for low, high in zip(lowest, highest, strict=True)) >= 1  # else the line hides it
        band = f"steps 1 to {depths}" if seen else None
        axes.fill_between(epochs, lowest, highest, color=BLUE, alpha=0.25, label=band, lw=0)
    name = f"validation, step {depths}" if depths > 1 else "validation"
    axes.plot(epochs, [steps[-1] for steps in by_epoch], color=BLUE, marker=marker, label=name)
    value = 100 * kept["validation_accuracy"][-1]
    axes.plot([kept["epoch"]], [value], "o", color=ORANGE, markersize=7)
    # Beside its line in the lower half, where no curve that rises comes by.
    left = kept["epoch"] > sum(_limits(epochs)) / 2
    axes.annotate(
        f"best: epoch {kept['epoch']}, {value:.1f} %",
        (kept["epoch"], 0.08),
        xycoords=("data", "axes fraction"),
        xytext=(-6 if left else 6, 0),
        textcoords="offset points",
        ha="right" if left else "left",
        color=ORANGE,
        weight="bold",
        bbox={"facecolor": PANEL, "edgecolor": "none", "pad": 1.5},
    )
    axes.set_title("Accuracy, %", pad=22)
    legend_above(axes, 3)


def _draw_depth(axes: Any, kept: dict[str, Any]) -> None:
    """Draws what each further step brought with the weights that were kept."""
    values = [100 * share for share in kept["validation_accuracy"]]
    steps = range(1, len(values) + 1)
    axes.plot(steps, values, color=BLUE, marker="o")
    low, high = min(values), max(values)
    room = max(high - low, 0.5)  # a tenth of a point is no cliff
    axes.set_ylim(low - 0.4 * room, min(high + 0.6 * room, 100.4))
    axes.annotate(
        f"{values[-1] - values[0]:+.1f} points by step {len(values)}".replace("-", "−"),
        (0.02, 0.93),
        xycoords="axes fraction",
        va="top",
        color=DIM,
        bbox={"facecolor": PANEL, "edgecolor": "none", "pad": 1.5},
    )
    whole_numbers(axes, 8)
    axes.set_xlabel("step")
    axes.set_title(f"By depth, epoch {kept['epoch']}, %", pad=22)


def _limits(epochs: Sequence[int]) -> tuple[float, float]:
    margin = max((epochs[-1] - epochs[0]) * 0.03, 0.3)
    return epochs[0] - margin, epochs[-1] + margin
