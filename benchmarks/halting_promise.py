"""How often the choice of a halting threshold breaks its promise: simulated, as the truth of real images is not known.

    python benchmarks/halting_promise.py [--draws 2000] [--json FILE]

Images are drawn from a population of which everything is known: half of its images are sure (halt_prob above 0.5 after one
step), the other half is not.  Halting among the sure ones gives up a twentieth more than the budget; halting more of the others changes many
answers and gives up no more.  So every threshold below 0.5 exceeds the budget, by next to nothing, and there are many of them
to be lucky with.  Each draw of n images chooses a threshold; it is broken where the chosen one exceeds the budget in the population.

Beside vitrm.runtime.halting.choose stands what it did before: the threshold with the fewest steps whose loss plus 1.645 standard
errors is within the budget.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from record import made

from vitrm.errors import UserError
from vitrm.runtime.bench.images import Sample
from vitrm.runtime.halting.choose import THRESHOLDS, Trajectory, at_threshold, check_enough, choose
from vitrm.system.files import write_json

IMAGES = (24, 44, 143, 1000)
BUDGETS = (0.003, 0.02, 0.05, 0.15)
CHANGED = 0.04  # share of the unsure images whose answer halting loses; as many are gained
EXCESS = 1.05  # what halting among the sure ones gives up, in budgets
EDGE = 0.5  # thresholds up to it exceed the budget


class Population(NamedTuple):
    """Images without end, of a model with two steps and a `budget` that halting among the sure ones just exceeds."""

    budget: float

    def draw(self, count: int, rng: np.random.Generator) -> Trajectory:
        """Draws `count` images."""
        sure = rng.random(count).astype(np.float32)
        coin = rng.random(count)
        loses = np.where(sure > EDGE, coin < 2 * EXCESS * self.budget, coin < CHANGED)
        gains = (sure <= EDGE) & (coin > 1 - CHANGED)
        right = np.stack([~loses & (gains | (coin < 0.9)), loses | ~gains & (coin < 0.9)])
        return Trajectory(right, np.stack([sure, sure]))


def sample_of(count: int) -> Sample:
    """Stands for the images, of which the choice reads the name."""
    return Sample(
        pixels=np.zeros((count, 3, 1, 1), np.uint8), labels=np.zeros(count, np.int64), index=np.arange(count), classes=("a",),
        name="simulated", split="validation", total=count,
    )  # fmt: skip


def before(trajectory: Trajectory, budget: float) -> float:
    """Chooses a threshold as this project did before."""
    points = [at_threshold(trajectory, t) for t in (*THRESHOLDS, 1.0)]
    count = trajectory.right.shape[1]
    kept = []
    for point in points:
        share, drop = (point.lost + point.gained) / count, (point.lost - point.gained) / count
        if drop + 1.645 * np.sqrt((share - drop**2) / count) <= budget + 1e-12:
            kept.append(point)
    return min(kept, key=lambda p: (p.mean_steps, -p.accuracy, -p.threshold)).threshold


def broken(count: int, budget: float, draws: int) -> tuple[float, float | None, NDArray[np.float64] | None]:
    """Returns the shares of draws in which the choice before and the one now exceed the budget, and the steps now; None: refused."""
    rng = np.random.default_rng((count, round(budget * 1e6)))
    was, now, steps = 0, 0, []
    try:
        check_enough(count, "simulated", budget)
        refused = False
    except UserError:
        refused = True
    for _ in range(draws):
        trajectory = Population(budget).draw(count, rng)
        was += before(trajectory, budget) <= EDGE
        if not refused:
            choice = choose("simulated", sample_of(count), trajectory, budget)
            now += choice.chosen.threshold <= EDGE
            steps.append(choice.chosen.mean_steps)
    return was / draws, None if refused else now / draws, None if refused else np.array(steps)


def main() -> None:
    """Prints the table, and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    rows = []
    print(f"{'images':>7} {'budget':>7} {'before':>8} {'now':>8} {'steps':>6}")
    for count in IMAGES:
        for budget in BUDGETS:
            was, now, steps = broken(count, budget, args.draws)
            mean = None if steps is None else round(float(steps.mean()), 3)
            rows.append({"images": count, "budget": budget, "before": was, "now": now, "mean_steps": mean})
            told = "refused" if now is None else f"{100 * now:.1f} %"
            print(f"{count:>7} {100 * budget:>7g} {100 * was:>6.1f} % {told:>8} {mean if mean else '–':>6}", flush=True)
    if args.json:
        record = made(
            "halting thresholds chosen on simulated images: how often one exceeds the budget",
            ("vitrm", "numpy", "scipy"),
        )
        write_json(args.json, {**record, "draws": args.draws, "changed": CHANGED, "excess": EXCESS, "rows": rows})


if __name__ == "__main__":
    main()
