"""The error that int8 makes in the recursion's state, step by step: does it grow, or does the next step heal it?

The eager model runs twice, as it is and with fake quantizers at its linear layers.  The state's signal-to-noise ratio
after step s is 10 log₁₀(Σ v² / Σ (v − v̂)²) decibels, over all images and entries of y or z.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitrm.calib.calibration import Calibration
from vitrm.calib.fake_quant import FakeQuantizer
from vitrm.calib.quant_params import QuantTable
from vitrm.calib.sites import IN_WORDS, ROLES, run_observed
from vitrm.checkpoint import Checkpoint
from vitrm.model import ViTRM
from vitrm.system.picture import BLUE, DIM, ORANGE, TEAL, legend_above, picture, whole_numbers

_CAPTION = (
    "20 dB: an error of a tenth of the state; 40 dB: of a hundredth.\n"
    "Ranges by step: unrolled files; one range for all: loop and stepwise files."
)


@dataclass(frozen=True)
class StateError:
    """Signal-to-noise ratios in decibels, one for each step."""

    y: tuple[float, ...]
    z: tuple[float, ...]


def state_error(checkpoint: Checkpoint, table: QuantTable, images: NDArray[np.float32], steps: int) -> StateError:
    """Measures the error of the state over float32 images [n, 3, H, W] and `steps` steps, with the scales of `table`."""
    model, tensor = checkpoint.build(), torch.from_numpy(images)
    assert isinstance(model, ViTRM)
    exact = run_observed(model, tensor, steps)
    rounded = run_observed(model, tensor, steps, FakeQuantizer.of(model, table))
    y, z = zip(
        *((_decibels(a.y, b.y), _decibels(a.z, b.z)) for a, b in zip(exact, rounded, strict=True)),
        strict=True,
    )
    return StateError(y, z)


def _decibels(exact: Tensor, rounded: Tensor) -> float:
    noise = float((exact - rounded).double().square().sum())
    return 10 * math.log10(float(exact.double().square().sum()) / max(noise, 1e-30))


def draw_state_error(
    shared: StateError, own: StateError, calibration: Calibration, path: str | os.PathLike[str]
) -> None:
    """Draws a picture, PNG: the state's signal-to-noise ratio and the ranges of each role, by step.

    `shared` is with scales that all steps share, `own` with each step's own.
    """
    steps = range(1, calibration.steps + 1)
    roles = [role for role in ROLES[1:] if any(site.role == role for site in calibration.ranges)]
    count = -(-len(roles) // 2)
    with picture(path, 9.6, 4.6, "What int8 does to the state, and the ranges that it was given") as figure:
        panels_above, caption = figure.subfigures(2, 1, height_ratios=[4.1, 0.5])
        caption.text(0.01, 0.5, _CAPTION, va="center", fontsize=8.5, color=DIM)
        left, right = panels_above.subfigures(1, 2, width_ratios=[1, 1.1])
        _draw_ratio(left.subplots(), shared, own, steps)
        right.suptitle("Width of the layers' input ranges (largest − smallest)", x=0.02, ha="left", fontsize=10)
        panels = np.atleast_2d(right.subplots(2, max(count, 1), sharex=True, sharey=True)).ravel()
        for axes, role in zip(panels, roles, strict=False):
            _draw_ranges(axes, calibration, role, steps)
        for axes in panels[len(roles) :]:
            axes.set_visible(False)
        for axes in panels[max(len(roles) - count, 0) : len(roles)]:  # none below it
            axes.set_xlabel("step")
            axes.tick_params(labelbottom=True)
        right.supylabel("width (log scale, no unit)", fontsize=9, color=DIM)
        signs = panels[0].get_legend_handles_labels()
        right.legend(*signs, loc="outside lower left", ncols=2)


def _draw_ratio(axes: Any, shared: StateError, own: StateError, steps: range) -> None:
    for name, style, error in (("ranges by step", "-", own), ("one range for all", "--", shared)):
        marker = "o" if style == "-" else ""  # marks would hide the dashes
        axes.plot(steps, error.y, style, color=BLUE, marker=marker, label=f"answer y, {name}")
        axes.plot(steps, error.z, style, color=ORANGE, marker=marker, label=f"latents z, {name}")
    axes.set_title("Signal-to-noise ratio of the state, dB: higher is better", pad=36)
    axes.set_xlabel("step")
    whole_numbers(axes, 8)
    legend_above(axes, 2)


def _draw_ranges(axes: Any, calibration: Calibration, role: str, steps: range) -> None:
    """Draws the widths of one role's ranges by step: flat lines need no scales of their own."""
    from matplotlib.ticker import FixedLocator, NullFormatter

    widths = [
        [r.high - r.low for site, r in calibration.ranges.items() if (site.step, site.role) == (step, role)]
        for step in steps
    ]
    met = [(step, w) for step, w in zip(steps, widths, strict=True) if w]
    x = [step for step, _ in met]
    axes.fill_between(
        x,
        [min(w) for _, w in met],
        [max(w) for _, w in met],
        color=TEAL,
        alpha=0.22,
        lw=0,
        label="narrowest to widest layer",
    )
    axes.plot(x, [float(np.median(w)) for _, w in met], color=TEAL, marker="o", label="median layer")
    axes.set_yscale("log")
    ends = [r.high - r.low for site, r in calibration.ranges.items() if site.step and r.high > r.low]
    decades = math.log10(max(ends, default=1.0) / min(ends, default=1.0))
    # LogLocator puts its ticks too close where the axis is shorter than a decade.
    subs = (1, 1.5, 2, 3, 5, 7) if decades < 1 else (1, 2, 5) if decades < 2 else (1,)
    axes.yaxis.set_major_locator(FixedLocator([s * 10.0**k for k in range(-6, 7) for s in subs]))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title(IN_WORDS[role], fontsize=9, fontweight="normal")
    whole_numbers(axes, 6)
