"""A sample's answer never depends on who else is in the batch: its steps and logits against those it has alone.

Images go through every backend alone once, then in random company at random thresholds.  Kernels may round differently at
another batch size: a halt_prob within EDGE of the threshold may fall on either side.  Such edges are counted apart and left
out; everything else must halt at the very same step.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import vitrm.runtime
from vitrm import checkpoint
from vitrm.data import load
from vitrm.runtime.backends.eager import EagerSession
from vitrm.runtime.session import Session

from .findings import Finding, Part

DECISIONS = 1_200_000
STEPS = 4
EDGE = 1e-5
SLACK = 1e-4  # of logits, relative to the largest


def halting(
    part: Part, seed: int, share: float, work: Path, repeat: Callable[[str], str], progress: Callable[[str], None]
) -> None:
    """Decisions by the hundred thousand; wrong ones go to `part`."""
    made = work / "subjects"
    images = np.concatenate([load("digits", split).floats() for split in ("test", "validation")])
    images = images[: max(60, round(len(images) * share))]
    run = checkpoint.load(made / "run")
    threshold = vitrm.runtime.open(made / "unrolled.onnx").metadata.halt_threshold
    sessions: dict[str, Session] = {
        "eager": EagerSession(run, steps=STEPS, threads=1),
        "loop": vitrm.runtime.open(made / "loop.onnx", threads=1),
        "stepwise": vitrm.runtime.open(made / "stepwise", threads=1),
        "unrolled": vitrm.runtime.open(made / "unrolled.onnx", threads=1),
    }
    wanted = max(2000, round(DECISIONS * share)) // len(sessions)
    by_backend = {}
    trajectories: dict[str, _Trajectory] = {}
    for name, session in sessions.items():
        rng = np.random.default_rng((seed, len(name)))
        baked = None if session.takes_depth else threshold
        alone = trajectories[name] = _alone(session, images, progress, name)
        # A threshold that is built in shows its last halt_prob only; the loop of the same weights shows all of them.
        near_baked = trajectories["loop"].at(threshold, np.arange(len(images)))[2] if baked is not None else None
        decisions = edges = wrong = largest = 0
        spread: set[int] = set()
        while decisions < wanted:
            size = int(rng.choice((1, 2, 3, 5, 8, 17, 64, 130, 256)))
            rows = rng.integers(len(images), size=size)  # with repetition: twins must agree, too
            tau = baked if baked is not None else float(np.quantile(alone.halt_prob, rng.uniform(0.02, 0.98)))
            result = session.infer(
                images[rows],
                halt_threshold=None if baked is not None else tau,
                steps=None if baked is not None else STEPS,
            )
            assert result.steps_used is not None
            if near_baked is not None:
                used, logits, near = alone.steps_used[rows], alone.logits[-1][rows], near_baked[rows]
            else:
                used, logits, near = alone.at(tau, rows)
            off = (result.steps_used != used) & ~near
            error = np.abs(result.logits - logits).max(1) / np.abs(alone.logits).max()
            off |= (error > SLACK) & ~near
            largest = max(largest, float(error[~near].max(initial=0.0)))
            decisions, edges = decisions + size, edges + int(near.sum())
            spread.update(result.steps_used.tolist())
            if off.any():
                wrong += int(off.sum())
                i = int(np.flatnonzero(off)[0])
                detail = f"image {rows[i]} in a batch of {size} at threshold {tau:.6f}: {result.steps_used[i]} steps, alone {used[i]}; logits off by {error[i]:.1e}"
                part.found(
                    Finding("halting", name, "different", "in company", detail, repeat("--part halting")),
                    int(off.sum()),
                )
            progress(f"{name}: {decisions} of {wanted}")
        part.count("same", decisions - wrong - edges)
        if edges:
            part.count("edge", edges)
        by_backend[name] = {
            "decisions": decisions, "edges": edges, "wrong": wrong, "depths met": sorted(spread),
            "largest logit difference": float(f"{largest:.2g}"),
        }  # fmt: skip
    part.figures = {"edge": EDGE, "backends": by_backend, "decisions": sum(b["decisions"] for b in by_backend.values())}  # type: ignore[misc]


class _Trajectory:
    """What every image gets alone: after each step where depth can be chosen, else in the end."""

    def __init__(
        self, logits: NDArray[np.float32], halt_prob: NDArray[np.float32], steps_used: NDArray[np.int64]
    ) -> None:
        self.logits = logits  # [S, N, classes]
        self.halt_prob = halt_prob  # [S, N]
        self.steps_used = steps_used  # [N], at the end

    def at(
        self, tau: float, rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.bool_]]:
        """Steps, logits, and whether a decision on the way was an edge, at a threshold."""
        p = self.halt_prob[:, rows]
        halted = p > np.float32(tau)
        last = np.where(halted.any(0), halted.argmax(0), len(p) - 1)
        on_the_way = np.arange(len(p))[:, None] <= last
        near = ((np.abs(p - tau) < EDGE) & on_the_way).any(0)
        return last + 1, self.logits[last, rows], near


def _alone(session: Session, images: NDArray[np.float32], progress: Callable[[str], None], name: str) -> _Trajectory:
    """One image at a time."""
    logits, halts, used = [], [], []
    for i in range(len(images)):
        one = images[i : i + 1]
        if session.takes_depth:
            results = [session.infer(one, steps=s, halt_threshold=2.0) for s in range(1, STEPS + 1)]
        else:
            results = [session.infer(one)]
        logits.append([r.logits[0] for r in results])
        halts.append([r.halt_prob[0] for r in results])  # type: ignore[index]
        used.append(results[-1].steps_used[0])  # type: ignore[index]
        progress(f"{name}: {i + 1} of {len(images)} alone")
    return _Trajectory(np.asarray(logits).transpose(1, 0, 2), np.asarray(halts).T, np.asarray(used))
