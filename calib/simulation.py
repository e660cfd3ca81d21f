"""What int8 does to the recursion's state, step by step: does the error grow, or does the next step heal it?

The eager model runs twice, as it is and with the inputs and weights of its linear layers rounded as an int8 graph rounds
them.  The state's signal-to-noise ratio after step s is 10 log₁₀(Σ v² / Σ (v − v̂)²) decibels, over all images and
entries of y or z.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vitrm.calib.calibration import Calibration
from vitrm.calib.quantize import LEVELS, affine_scale, quantize_weight, symmetric_scale
from vitrm.calib.ranges import Range
from vitrm.calib.sites import ROLES, Site, run_watched
from vitrm.checkpoint import Checkpoint
from vitrm.model import ViTRM
from vitrm.system.files import atomic_path


@dataclass(frozen=True)
class StateError:
    """Signal-to-noise ratios in decibels after step 1, 2, …"""

    y: tuple[float, ...]
    z: tuple[float, ...]


def state_error(
    checkpoint: Checkpoint, calibration: Calibration, images: NDArray[np.float32], *, target: str, shared: bool
) -> StateError:
    """The error of the state over float32 images [n, 3, H, W], for `target` "cpu" or "tensorrt".

    `shared`: with scales that all steps share, as a loop has them; else each step's own.
    """
    exact, rounded = checkpoint.build(), checkpoint.build()
    assert isinstance(exact, ViTRM)
    assert isinstance(rounded, ViTRM)
    tensor = torch.from_numpy(images)
    pairs = zip(
        run_watched(exact, tensor, calibration.steps),
        run_watched(rounded, tensor, calibration.steps, Int8(rounded, calibration, target=target, shared=shared)),
        strict=True,
    )
    y, z = zip(*((_decibels(a.y, b.y), _decibels(a.z, b.z)) for a, b in pairs), strict=True)
    return StateError(y, z)


class Int8:
    """A look (vitrm.calib.sites.Look) under which a model computes with int8's rounding at the sites `at` (None: all)."""

    def __init__(self, model: ViTRM, calibration: Calibration, *, target: str, shared: bool) -> None:
        self.calibration, self.target, self.shared = calibration, target, shared
        self.at: frozenset[Site] | None = None
        self.layers = {f"block.{n}": m for n, m in model.block.named_modules() if isinstance(m, nn.Linear)}
        self.exact = {name: layer.weight.detach() for name, layer in self.layers.items()}
        self.rounded = {}
        for name, weight in self.exact.items():
            integers, scales = quantize_weight(weight.T.contiguous().numpy())
            self.rounded[name] = torch.from_numpy(integers * scales).T.contiguous()

    def __call__(self, site: Site, values: Tensor) -> Tensor | None:
        """Puts the layer's weight in place, and returns its rounded input."""
        rounding = self.at is None or site in self.at
        self.layers[site.layer].weight.data = (self.rounded if rounding else self.exact)[site.layer]
        if not rounding:
            return None
        whole = self.shared and site.step > 0
        extent = self.calibration.shared(site.role, site.layer) if whole else self.calibration.at(*site)
        return _rounded(values, extent, self.target)


def _rounded(values: Tensor, extent: Range, target: str) -> Tensor:
    """What int8 keeps of activations."""
    if target == "tensorrt":
        scale = float(symmetric_scale(extent))
        return torch.clamp(torch.round(values / scale), -LEVELS - 1, LEVELS) * scale
    affine, zero = affine_scale(extent)
    return (torch.clamp(torch.round(values / float(affine)) + int(zero), 0, 255) - int(zero)) * float(affine)


def _decibels(exact: Tensor, rounded: Tensor) -> float:
    noise = float((exact - rounded).double().square().sum())
    return 10 * math.log10(float(exact.double().square().sum()) / max(noise, 1e-30))


def draw(error: StateError, own: StateError, calibration: Calibration, path: str | os.PathLike[str]) -> None:
    """A picture, PNG: the state's signal-to-noise ratio and the ranges of each role, by step.

    `error` is with scales that all steps share, `own` with each step's own.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = range(1, calibration.steps + 1)
    for name, style, found in (("each step its own scales", "-", own), ("scales shared by all steps", "--", error)):
        left.plot(steps, found.y, f"C0{style}", marker="o", label=f"y, {name}")
        left.plot(steps, found.z, f"C1{style}", marker="o", label=f"z, {name}")
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
