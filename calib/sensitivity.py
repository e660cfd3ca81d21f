"""Sensitivity of a model to int8: the error that each site alone adds to the final logits.

For every site, the eager model runs with int8's rounding (of the layer's input and weight) there and nowhere else.  Its
noise is Σ (logit − exact logit)² / Σ (exact logit − its class's mean)² over images and classes, after the last step.
Noises of different sites nearly add up, so they rank what to keep in floating point.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from vitrm.calib.calibration import Calibration
from vitrm.calib.fake_quant import FakeQuantizer
from vitrm.calib.quant_params import QuantTable
from vitrm.calib.sites import ROLES, Site, Start, run_observed
from vitrm.checkpoint import Checkpoint
from vitrm.model import State, ViTRM
from vitrm.system.files import atomic_path, write_json

SENSITIVITY_IMAGES = 32  # noise is a mean over images × classes: a few images rank sites


@dataclass(frozen=True)
class Sensitivity:
    """The noise of each site."""

    noise: dict[Site, float]
    target: str
    shared: bool  # whether scales, and so decisions, are shared by all steps
    calibration_id: str
    images: int

    def ranked(self) -> list[tuple[tuple[Site, ...], float]]:
        """Lists what can be kept in floating point, most harmful first, with its noise.

        Single sites; where steps share their graph, a layer and role at all steps.
        """
        units: dict[tuple[int, str, str], list[Site]] = {}
        for site in sorted(self.noise):
            step = min(site.step, 1) if self.shared else site.step
            units.setdefault((step, site.role, site.layer), []).append(site)
        noises = [(tuple(sites), sum(self.noise[s] for s in sites)) for sites in units.values()]
        return sorted(noises, key=lambda unit: -unit[1])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON to `path`, and a picture, PNG, beside it."""
        write_json(
            path,
            {
                "what": "error of the final logits, relative to their variance, from int8 at one site alone",
                "target": self.target,
                "scales": "shared by all steps" if self.shared else "each step its own",
                "calibration": self.calibration_id,
                "images": self.images,
                "noise": {str(site): value for site, value in sorted(self.noise.items())},
            },
        )
        self._draw(Path(path).with_suffix(".png"))

    def _draw(self, path: Path) -> None:
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure

        rows = sorted({(ROLES.index(s.role), s.layer) for s in self.noise})
        steps = sorted({s.step for s in self.noise})
        table = np.full((len(rows), len(steps)), np.nan)
        for site, value in self.noise.items():
            table[rows.index((ROLES.index(site.role), site.layer)), steps.index(site.step)] = max(value, 1e-12)
        figure = Figure(figsize=(3.5 + 0.45 * len(steps), 1.2 + 0.19 * len(rows)), layout="constrained")
        axes = figure.subplots()
        drawn = axes.imshow(table, aspect="auto", norm=LogNorm(), cmap="magma_r", interpolation="nearest")
        axes.set_yticks(range(len(rows)), [f"{ROLES[role]}  {layer}" for role, layer in rows], fontsize=7)
        axes.set_xticks(range(len(steps)), [str(step) if step else "embed" for step in steps], fontsize=7)
        axes.set(xlabel="step", title="int8 at one site alone")
        figure.colorbar(drawn, label="error of the final logits / their variance")
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120)


@torch.no_grad()
def sensitivity(
    checkpoint: Checkpoint,
    calibration: Calibration,
    table: QuantTable,
    images: NDArray[np.float32],
    *,
    progress: Callable[[float], None] = lambda done: None,
) -> Sensitivity:
    """Measures every site of `calibration`, whose scales are those of `table`, on float32 images [n, 3, H, W]."""
    model = checkpoint.build()
    assert isinstance(model, ViTRM)
    tensor, steps = torch.from_numpy(images), calibration.steps
    states = run_observed(model, tensor, steps)
    embedded = model.embed(tensor)

    def logits(states: Sequence[State]) -> NDArray[np.float64]:
        return model.heads(states[-1].y)[0].double().numpy()

    exact = logits(states)
    variance = float(np.square(exact - exact.mean(0)).sum())
    quantizer = FakeQuantizer.of(model, table)
    noise = {}
    for done, site in enumerate(calibration.ranges, 1):
        start = Start(site.step - 1, embedded, states[site.step - 2]) if site.step > 1 else None
        rounded = run_observed(model, tensor, steps, quantizer.only(site), start)
        noise[site] = float(np.square(logits(rounded) - exact).sum()) / max(variance, 1e-30)
        progress(done / len(calibration.ranges))
    return Sensitivity(noise, table.target, table.shared, calibration.id, len(images))
