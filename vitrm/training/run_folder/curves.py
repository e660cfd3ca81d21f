"""The learning curves of a run as a picture: loss, validation accuracy by depth, learning rate."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from vitrm.system.files import atomic_path


def draw_curves(history: Sequence[dict[str, Any]], path: str | os.PathLike[str], title: str) -> None:
    """Writes the curves of `history` (the lines of metrics.jsonl) to `path` as PNG.  Needs no display."""
    # Without pyplot: no global state, no backend to choose, half the import time.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not history:
        return
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    loss_axes, accuracy_axes, lr_axes = figure.subplots(1, 3)
    epochs = [line["epoch"] for line in history]
    marker = "." if len(epochs) < 40 else ""

    loss_axes.plot(epochs, [line["train_loss"] for line in history], marker=marker, label="training")
    loss_axes.plot(epochs, [line["validation_loss"][-1] for line in history], marker=marker, label="validation (CE)")
    loss_axes.set_ylabel("loss")
    loss_axes.legend()

    accuracy_axes.plot(epochs, [100 * line["train_accuracy"] for line in history], color="0.7", label="training")
    depths = len(history[-1]["validation_accuracy"])
    for depth in range(depths):
        values = [100 * line["validation_accuracy"][depth] for line in history]
        label = f"validation, step {depth + 1}" if depths > 1 else "validation"
        # One hue, darker with depth: the order of the steps is what the eye should read.
        accuracy_axes.plot(
            epochs, values, marker=marker, label=label, color=(0.1, 0.3, 0.6, 0.35 + 0.65 * (depth + 1) / depths)
        )
    accuracy_axes.set_ylabel("accuracy, %")
    accuracy_axes.legend(fontsize="small")

    lr_axes.plot(epochs, [line["lr"] for line in history], marker=marker)
    lr_axes.set_ylabel("learning rate at the epoch's end")
    for axes in (loss_axes, accuracy_axes, lr_axes):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title, parse_math=False)  # a folder may be called "a$b$"
    with atomic_path(path) as temporary:
        canvas.print_png(temporary)
