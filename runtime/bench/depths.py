"""Accuracy and halting probability after each step of the recursion, from one eager run to the deepest.

Where the curve is flat, an artifact with fewer steps answers as well and costs less.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np

from vitrm.data import affordable
from vitrm.data.images import to_floats
from vitrm.model_limits import NEVER
from vitrm.runtime.backends.eager import EagerSession
from vitrm.runtime.bench.accuracy import BATCH_MEBIBYTES, Predictions
from vitrm.runtime.bench.images import Sample
from vitrm.runtime.bench.rows import DepthCurve
from vitrm.runtime.halting.choose import THRESHOLDS, HaltingPoint, Trajectory, at_threshold

_BATCH = 100


def depth_curves(
    session: EagerSession,
    sample: Sample,
    depths: int,
    *,
    artifacts: Mapping[str, Predictions],
    steps: int,
    seconds: float = 40.0,
    progress: Callable[[float], None] | None = None,
) -> tuple[DepthCurve, DepthCurve | None]:
    """Two curves of a recursive model: over depths 1 … `depths`, and what halting at each threshold gives in at most `steps` steps.

    The first is of as many labelled images as fit into `seconds`.  Where that is not all of them, the second, which needs fewer steps
    and stands beside figures of all images, goes on with as many more as fit into three times that.  It is None where one step is all
    there is.  `artifacts` are answers to the whole sample; their points are taken on the same images as each curve.
    """
    assert sample.labels is not None
    said = progress or (lambda fraction: None)
    deep = _trajectory(session, sample, depths, seconds, lambda f: said(f / 2))
    if steps < 2:
        return _curve(session, sample, deep, artifacts, steps), None
    shallow = Trajectory(deep.right[:steps], deep.halt_prob[:steps])
    if (seen := deep.right.shape[1]) < len(sample):
        more = _trajectory(session, sample, steps, 3 * seconds, lambda f: said(0.5 + f / 2), seen)
        shallow = Trajectory(
            np.concatenate([shallow.right, more.right], 1), np.concatenate([shallow.halt_prob, more.halt_prob], 1)
        )
    points = tuple(at_threshold(shallow, t) for t in (*sorted(THRESHOLDS), NEVER))
    return _curve(session, sample, deep, artifacts, steps), _curve(session, sample, shallow, artifacts, steps, points)


def _trajectory(
    session: EagerSession,
    sample: Sample,
    depths: int,
    seconds: float,
    progress: Callable[[float], None],
    begin: int = 0,
) -> Trajectory:
    """Answers after every step to the images from place `begin` of the sample's order on, as many as fit into `seconds`."""
    assert sample.labels is not None
    batch = affordable(_BATCH, sample.pixels.shape[-1], BATCH_MEBIBYTES)
    order, start = sample.order(), time.perf_counter()
    parts: list[Trajectory] = []
    seen = begin
    while seen < len(order) and (seen == begin or time.perf_counter() - start < seconds):
        chosen = order[seen : seen + batch]
        logits, halt_prob = session.trajectory(to_floats(sample.pixels[chosen]), depths)
        parts.append(Trajectory(logits.argmax(2) == sample.labels[chosen], halt_prob))
        seen += len(chosen)
        progress(min(1.0, max(seen / len(order), (time.perf_counter() - start) / seconds)))
    return Trajectory(np.concatenate([p.right for p in parts], 1), np.concatenate([p.halt_prob for p in parts], 1))


def _curve(
    session: EagerSession,
    sample: Sample,
    found: Trajectory,
    artifacts: Mapping[str, Predictions],
    steps: int,
    halting: tuple[HaltingPoint, ...] = (),
) -> DepthCurve:
    """Makes a curve of answers after every step, with the artifacts' points on its images."""
    images, glimpses = found.right.shape[1], session.metadata.glimpses
    subset = sample.order()[:images]
    points = []
    for name, predictions in artifacts.items():
        if predictions.steps_used is not None:
            share = float((predictions.top1 == sample.labels)[subset].mean())
            points.append((name, float(predictions.steps_used[subset].mean()), share))
    return DepthCurve(
        run=session.metadata.run if glimpses == "none" else f"{session.metadata.run}, glimpses {glimpses}",
        glimpses=glimpses,
        accuracy=tuple(float(v) for v in found.right.mean(1)),
        halt_prob=tuple(float(v) for v in found.halt_prob.mean(1)),
        images=images,
        total=len(sample),
        trained_depth=session.metadata.trained_depth,
        points=tuple(points),
        steps=steps,
        halting=halting,
    )
