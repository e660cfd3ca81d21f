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
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vitrm.calib.calibration import Calibration
from vitrm.calib.fake_quant import FakeQuantizer
from vitrm.calib.quant_params import QuantTable
from vitrm.calib.sites import IN_WORDS, ROLES, Site, Start, run_observed
from vitrm.checkpoint import Checkpoint
from vitrm.model import State, ViTRM
from vitrm.system.files import write_json
from vitrm.system.picture import DIM, INK, LINE, NEUTRAL, ORANGE, PANEL, heat_colors, picture

_NAMES = "0, 1, 2 …: layer of the block; q, k, v, out: attention; ffn: feed-forward; hatched: does not run then"
SENSITIVITY_IMAGES = 32  # noise is a mean over images × classes: a few images rank sites


@dataclass(frozen=True)
class Sensitivity:
    """The noise of each site."""

    model: str  # its name
    noise: dict[Site, float]
    changed: dict[Site, int]  # images whose answer, the most likely class, int8 at that site alone changes
    work: dict[Site, int]  # multiply-adds per image, which int8 makes faster
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
                "model": self.model,
                "target": self.target,
                "scales": "shared by all steps" if self.shared else "each step its own",
                "calibration": self.calibration_id,
                "images": self.images,
                "noise": {str(site): value for site, value in sorted(self.noise.items())},
                "changed_answers": {str(site): self.changed[site] for site in sorted(self.noise)},
                "multiply_adds": {str(site): self.work[site] for site in sorted(self.noise)},
            },
        )
        self._draw(Path(path).with_suffix(".png"))

    def _draw(self, path: Path) -> None:
        # By role, each under its heading, and within it as they are computed, which is the order in which they were measured.
        layers = dict.fromkeys((ROLES.index(s.role), s.layer) for s in self.noise)
        rows = sorted(
            [*layers, *dict.fromkeys((role, "") for role, _ in layers)], key=lambda row: (row[0], row[1] != "")
        )
        steps = sorted({s.step for s in self.noise})
        table, work = np.full((len(rows), len(steps)), np.nan), np.zeros(len(rows))
        for site, value in self.noise.items():
            row = rows.index((ROLES.index(site.role), site.layer))
            table[row, steps.index(site.step)] = max(value, 1e-12)
            work[row] += self.work[site]
        title = f"{self.model}: harm of int8, one linear layer at a time"
        with picture(path, 6.6 + 0.42 * len(steps), 2.67 + 0.21 * len(rows), title) as figure:
            worst = max(self.noise, key=lambda site: self.noise[site])
            top = figure.subfigures(2, 1, height_ratios=[0.92, 1.7 + 0.21 * len(rows)])
            verdict = _verdict(worst, self.noise[worst], self._cost(worst), self.shared)
            top[0].text(0.01, 0.97, f"{self._answers()}\n{verdict}", va="top", fontsize=9)
            top[0].text(0.01, 0.03, _NAMES, va="bottom", fontsize=8, color=DIM)
            cells, bars = top[1].subplots(1, 2, sharey=True, width_ratios=[0.42 * len(steps) + 0.6, 1.5])
            _draw_noise(top[1], cells, table, steps)
            _frame(cells, steps.index(worst.step), rows.index((ROLES.index(worst.role), worst.layer)))
            _draw_work(bars, work)
            names = [_short(layer) or IN_WORDS[ROLES[role]] for role, layer in rows]
            cells.set_yticks(range(len(rows)), names, fontsize=8)
            for place, (_, layer) in enumerate(rows):
                if not layer:
                    cells.get_yticklabels()[place].set(fontweight="bold", color=INK)
                    cells.axhspan(place - 0.5, place + 0.5, facecolor=PANEL, edgecolor=PANEL, zorder=2)

    def _cost(self, site: Site) -> float:
        """Returns the share of the work that is no longer in int8 once a site is not: where steps share a graph, its layer's at all steps."""
        kept = next(sites for sites, _ in self.ranked() if site in sites)
        return sum(self.work[s] for s in kept) / sum(self.work.values())

    def _answers(self) -> str:
        """Says in words how many images the site that changes most answers gives another answer."""
        most = max(self.changed.values())
        if not most:
            return f"No linear layer alone changes the answer to any of the {self.images} images."
        return f"No linear layer alone changes more than {most} of the {self.images} answers."


def _verdict(site: Site, noise: float, cost: float, shared: bool) -> str:
    """Returns in words where int8 harms most, how much that is, and what it costs to have none there."""
    at = f" at step {site.step}" if site.step else ""
    place = f"Most, framed: {IN_WORDS[site.role]}, {_short(site.layer)}{at}."
    harm = f"There the squared error of the final logits is {_share(noise)} of their variance."
    steps = " at all steps" if shared else " at that step"
    where = f"it in floating point{steps if site.step else ''}"
    return f"{place}\n{harm}\nKeeping {where} costs {_share(cost)} of the work in int8."


def _share(noise: float) -> str:
    """Returns a share as a percentage, or as one part of so many where it is small."""
    return f"{100 * noise:.1f} %" if noise >= 0.001 else f"1 part in {float(f'{1 / max(noise, 1e-12):.1g}'):,.0f}"


def _short(layer: str) -> str:
    return layer.removeprefix("block.")


def _frame(axes: Any, column: int, row: int) -> None:
    """Draws a frame around a cell."""
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=ORANGE, linewidth=2, zorder=3))


def _draw_noise(figure: Any, axes: Any, table: NDArray[np.float64], steps: Sequence[int]) -> None:
    from matplotlib.colors import LogNorm

    most = float(np.nanmax(table))  # what is a millionth of it harms nobody, and would take half of the colors
    least = float(np.nanmin(table))
    norm = LogNorm(max(least, most / 1e6), most, clip=True)
    drawn = axes.imshow(table, aspect="auto", norm=norm, cmap=heat_colors(), interpolation="nearest")
    axes.grid(visible=False)
    axes.patch.set(hatch="////", edgecolor=LINE)  # where a layer does not run: no color of the scale
    axes.tick_params(length=0)
    axes.set_xticks(range(len(steps)), [str(step) if step else "once" for step in steps])
    axes.set_xlabel("step (once: per image)" if 0 in steps else "step")
    axes.set_title("Harm, by step", pad=8)
    label = "squared error of the final logits / their variance"
    below = "min" if least < most / 1e6 else "neither"
    figure.colorbar(drawn, ax=axes, location="bottom", label=label, aspect=30, pad=0.02, extend=below)


def _draw_work(axes: Any, work: NDArray[np.float64]) -> None:
    """Draws what keeping a row in floating point costs: its share of the multiply-adds that int8 makes faster."""
    shares = 100 * work / work.sum()
    axes.barh(range(len(work)), shares, color=NEUTRAL, height=0.7)
    axes.grid(visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("share of\nmultiply-adds, %")
    axes.set_title("Work, all steps", pad=8)
    axes.set_xlim(0, max(shares) * 1.12)
    axes.xaxis.get_major_locator().set_params(nbins=3)


@torch.no_grad()
def sensitivity(
    checkpoint: Checkpoint,
    calibration: Calibration,
    table: QuantTable,
    images: NDArray[np.float32],
    *,
    progress: Callable[[float], None] = lambda done: None,
) -> Sensitivity:
    """Measures every site of `calibration` that int8 is for, whose scales are those of `table`, on float32 images [n, 3, H, W]."""
    model = checkpoint.build()
    assert isinstance(model, ViTRM)
    tensor, steps = torch.from_numpy(images), calibration.steps
    quantizer, work = FakeQuantizer.of(model, table), {}

    def count(site: Site, values: torch.Tensor) -> None:
        if site in table.params and not site.is_output:
            weight = quantizer.weights[site.layer]
            work[site] = values[0].numel() // weight.shape[1] * weight.numel()

    states = run_observed(model, tensor, steps, count)
    embedded = model.embed(tensor)

    def logits(states: Sequence[State]) -> NDArray[np.float64]:
        return model.heads(states[-1].y)[0].double().numpy()

    exact = logits(states)
    variance = float(np.square(exact - exact.mean(0)).sum())
    noise, changed = {}, {}
    for done, site in enumerate(work, 1):
        start = Start(site.step - 1, embedded, states[site.step - 2]) if site.step > 1 else None
        rounded = logits(run_observed(model, tensor, steps, quantizer.only(site), start))
        noise[site] = float(np.square(rounded - exact).sum()) / max(variance, 1e-30)
        changed[site] = int((rounded.argmax(1) != exact.argmax(1)).sum())
        progress(done / len(work))
    name = Path(checkpoint.source or "model").name
    return Sensitivity(name, noise, changed, work, table.target, table.shared, calibration.id, len(images))
