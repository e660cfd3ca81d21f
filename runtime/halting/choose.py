"""Choice of a halting threshold: how far a model's halt_prob can be trusted, and the threshold that follows.

halt_prob is the model's own chance of being right after a step.  A sweep runs images to full depth, keeps
what every step said, and can then tell for any threshold what halting would have answered, and after how many
steps.  The threshold is chosen on the validation part; the test part is for saying how that turned out.

The choice allows for chance.  The cheapest threshold that holds on n images is the luckiest one: with nano-cifar10, 5,000
images and 0.3 points to give up, it lost 0.18 points there and 0.65 on the test images.  So thresholds are tested from the
highest down, each with an exact test at 5 %, up to the first one that fails (a fixed sequence: Maurer, Hothorn & Lehmacher, 1995;
Angelopoulos et al., 2021).  A threshold that exceeds the budget is then chosen in at most 5 % of cases, however many there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from vitrm.data import affordable
from vitrm.data.images import to_floats
from vitrm.errors import UserError
from vitrm.model_limits import NEVER
from vitrm.runtime.bench.accuracy import BATCH_MEBIBYTES
from vitrm.runtime.bench.images import Sample
from vitrm.runtime.halting.paired_test import LEVEL, drop_bound, images_needed, p_value
from vitrm.runtime.session import Session
from vitrm.runtime.stepping import SteppingSession

BINS = 15
DEFAULT_BUDGET = 0.003  # of accuracy that may be given up, in [0, 1], where nobody names one
# Fine enough that the next one changes little; near 1 the interesting ones lie closer together.
THRESHOLDS = (*(i / 100 for i in range(5, 100)), 0.995, 0.998, 0.999)


@dataclass(frozen=True)
class Trajectory:
    """A model's answers after every step: S steps, N images."""

    right: NDArray[np.bool_]  # [S, N]: whether the answer is the label
    halt_prob: NDArray[np.float32]  # [S, N]


@dataclass(frozen=True, kw_only=True)
class HaltingPoint:
    """Accuracy and steps at one threshold."""

    threshold: float
    accuracy: float  # in [0, 1]
    mean_steps: float
    halted_first: float  # share of images that halt after their first step, in [0, 1]
    lost: int  # images: right at full depth, wrong when halted
    gained: int  # images: wrong at full depth, right when halted


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """Stated chances against what came true, in `BINS` bins of equal width over [0, 1].

    ECE = Σ_b (n_b / N) · |mean stated chance in b − share that came true in b|  (Guo et al., 2017)
    """

    count: tuple[int, ...]  # images per bin
    stated: tuple[float, ...]  # mean stated chance per bin; 0 where it is empty
    true: tuple[float, ...]  # share that came true per bin; 0 where it is empty
    ece: float  # in [0, 1]


@dataclass(frozen=True, kw_only=True)
class HaltingChoice:
    """The outcome of a sweep over the validation part."""

    name: str  # of the artifact
    data: str
    images: int
    steps: int  # full depth
    budget: float  # accuracy that may be given up, in [0, 1]
    full: HaltingPoint  # without halting
    chosen: HaltingPoint
    drop_bound: float  # accuracy that the chosen threshold gives up at most, with 95 % confidence, in [0, 1]
    points: tuple[HaltingPoint, ...]
    by_depth: tuple[float, ...]  # accuracy after 1, 2, … steps
    reliability: Reliability  # of every step's halt_prob

    def evidence(self) -> dict[str, str | int | float]:
        """Returns what an artifact keeps of this beside the threshold."""
        return {
            "data": self.data,
            "split": "validation",
            "images": self.images,
            "steps": self.steps,
            "max_drop": self.budget,
            "accuracy": self.chosen.accuracy,
            "accuracy_without": self.full.accuracy,
            "mean_steps": self.chosen.mean_steps,
            "lost": self.chosen.lost,
            "gained": self.chosen.gained,
            "drop_bound": self.drop_bound,
            "ece": self.reliability.ece,
        }


def run_every_step(
    session: Session, sample: Sample, steps: int, *, batch: int = 100, progress: Callable[[float], None] | None = None
) -> Trajectory:
    """Runs a loop or stepwise artifact on labelled images and notes every step's answer.

    A loop is run once for each depth, as it says only its last answer.  Raises `UserError` for an artifact whose
    depth is built in, or images without labels.
    """
    if not session.takes_depth:
        raise UserError(
            f"{session.name} has its depth and threshold built in: choose a threshold on a loop or stepwise artifact "
            "(vitrm-export --graph stepwise), then bake it in with vitrm-export --halt-threshold"
        )
    if sample.labels is None:
        raise UserError(f"choosing a threshold needs labelled images: {sample.note or sample.name}")
    batch = affordable(batch, sample.pixels.shape[-1], BATCH_MEBIBYTES)
    right, halts = [], []
    for start in range(0, len(sample), batch):
        images = to_floats(sample.pixels[start : start + batch])
        labels = sample.labels[start : start + batch]
        answers = []
        if isinstance(session, SteppingSession):
            state = session.start(images)
            for _ in range(steps):
                state.step()
                answers.append(state.result)
        else:
            answers = [session.infer(images, steps=s, halt_threshold=NEVER) for s in range(1, steps + 1)]
        right.append(np.stack([a.logits.argmax(1) == labels for a in answers]))
        halts.append(np.stack([a.halt_prob for a in answers if a.halt_prob is not None]))
        if progress:
            progress(min(1.0, (start + batch) / len(sample)))
    return Trajectory(np.concatenate(right, 1), np.concatenate(halts, 1))


def at_threshold(trajectory: Trajectory, threshold: float) -> HaltingPoint:
    """Returns what halting once halt_prob > `threshold` would have given."""
    halted = trajectory.halt_prob > threshold
    last = np.where(halted.any(0), halted.argmax(0), len(halted) - 1)
    right = trajectory.right[last, np.arange(len(last))]
    full = trajectory.right[-1]
    return HaltingPoint(
        threshold=threshold,
        accuracy=float(right.mean()),
        mean_steps=float(last.mean()) + 1,
        halted_first=float(halted[0].mean()),
        lost=int((full & ~right).sum()),
        gained=int((right & ~full).sum()),
    )


def check_enough(images: int, data: str, budget: float) -> None:
    """Raises `UserError` where no threshold could be shown to keep `budget` on so few `images` of `data`, not even one that loses nothing."""
    try:
        import scipy  # noqa: F401
    except ImportError:
        raise UserError("choosing a halting threshold needs SciPy: pip install scipy") from None
    if budget <= 0:
        raise UserError(
            "halting that gives up 0 points cannot be shown on any number of images: name more (--max-drop 0.3)"
        )
    needed = images_needed(budget)
    if images >= needed:
        return
    shown = math.ceil(1000 * (1 - LEVEL ** (1 / images))) / 10  # points
    while shown < 100 and images_needed(shown / 100) > images:
        shown = round(shown + 0.1, 1)
    possible = f"; on {images} --max-drop {shown:g} is the least that can be shown" if shown < 100 else ""
    raise UserError(
        f"{images} validation images of {data} are too few to choose a halting threshold: to show that one gives up at most "
        f"{budget * 100:g} points of accuracy takes {needed:,} of them, even if not one answer changes{possible}"
    )


def choose(
    name: str, sample: Sample, trajectory: Trajectory, budget: float, thresholds: Sequence[float] = THRESHOLDS
) -> HaltingChoice:
    """Chooses the threshold with the fewest mean steps that loses at most `budget` of full depth's accuracy.

    The budget is in (0, 1), and it is kept with 95 % confidence.  Raises `UserError` for too few images to say so.

    Of equally cheap ones the most accurate, then the highest; never halting (1) where none keeps the budget.
    """
    images = trajectory.right.shape[1]
    check_enough(images, sample.name, budget)
    full = at_threshold(trajectory, 1.0)
    points = tuple(at_threshold(trajectory, t) for t in sorted(thresholds))
    kept = [full, *takewhile(lambda p: p_value(p.lost, p.gained, images, budget) <= LEVEL, reversed(points))]
    chosen = min(kept, key=lambda p: (p.mean_steps, -p.accuracy, -p.threshold))
    return HaltingChoice(
        name=name,
        data=sample.name,
        images=images,
        steps=len(trajectory.right),
        budget=budget,
        full=full,
        chosen=chosen,
        drop_bound=drop_bound(chosen.lost, chosen.gained, images) if chosen is not full else 0.0,
        points=points,
        by_depth=tuple(float(v) for v in trajectory.right.mean(1)),
        reliability=reliability(trajectory.halt_prob.ravel(), trajectory.right.ravel()),
    )


def reliability(stated: NDArray[np.float32], came_true: NDArray[np.bool_]) -> Reliability:
    """Compares stated chances [N] in [0, 1] with what came true [N].  Raises ValueError for none."""
    if not len(stated):
        raise ValueError("no stated chances to compare")
    bins = np.clip((stated.astype(np.float64) * BINS).astype(np.int64), 0, BINS - 1)
    count = np.bincount(bins, minlength=BINS)
    some = np.maximum(count, 1)
    chance = np.bincount(bins, stated.astype(np.float64), BINS) / some
    share = np.bincount(bins, came_true.astype(np.float64), BINS) / some
    return Reliability(
        count=tuple(int(v) for v in count),
        stated=tuple(float(v) for v in chance),
        true=tuple(float(v) for v in share),
        ece=float((count / len(stated) * np.abs(chance - share)).sum()),
    )
