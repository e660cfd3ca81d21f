"""The error that int8 makes in the recursion's state, step by step: does it grow, or does the next step heal it?

The eager model runs twice, as it is and with fake quantizers at its linear layers.  The state's signal-to-noise ratio
after step s is 10 log₁₀(Σ v² / Σ (v − v̂)²) decibels, over all images and entries of y or z.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitrm.calib.calibration import Calibration
from vitrm.calib.fake_quant import FakeQuantizer
from vitrm.calib.quant_params import QuantTable
from vitrm.calib.sites import ROLES, run_observed
from vitrm.checkpoint import Checkpoint
from vitrm.model import ViTRM
from vitrm.system.files import atomic_path


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
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = range(1, calibration.steps + 1)
    for name, style, error in (("each step its own scales", "-", own), ("scales shared by all steps", "--", shared)):
        left.plot(steps, error.y, f"C0{style}", marker="o", label=f"y, {name}")
        left.plot(steps, error.z, f"C1{style}", marker="o", label=f"z, {name}")
    left.set(xlabel="step", ylabel="signal-to-noise ratio, dB", title="int8 error of the state", xticks=list(steps))
    left.legend(fontsize=8)
    for i, role in enumerate(ROLES[1:]):  # of what each step does
        widths = [
            [r.high - r.low for site, r in calibration.ranges.items() if (site.step, site.role) == (step, role)]
            for step in steps
        ]
        right.fill_between(steps, [min(w) for w in widths], [max(w) for w in widths], color=f"C{i}", alpha=0.2)
        right.plot(steps, [float(np.median(w)) for w in widths], f"C{i}", marker="o", label=role)
    right.set(
        xlabel="step",
        ylabel="width of the range",
        yscale="log",
        title="ranges: median of a role's sites, and all",
        xticks=list(steps),
    )
    right.legend(fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
