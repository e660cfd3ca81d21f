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
from vitrm.runtime.halting.choose import THRESHOLDS, Trajectory, at_threshold

_BATCH = 100


def depth_curve(
    session: EagerSession,
    sample: Sample,
    depths: int,
    *,
    artifacts: Mapping[str, Predictions],
    steps: int,
    seconds: float = 40.0,
    progress: Callable[[float], None] | None = None,
) -> DepthCurve:
    """The curve of a recursive model over depths 1 … `depths`, on as many labelled images as fit into `seconds`.

    `artifacts` are answers to the whole sample; their points are taken on the same images as the curve.  What halting would have
    given at each threshold is of at most `steps` steps, on those images, too.
    """
    assert sample.labels is not None
    batch = affordable(_BATCH, sample.pixels.shape[-1], BATCH_MEBIBYTES)
    order, start = sample.order(), time.perf_counter()
    parts: list[Trajectory] = []
    seen = 0
    while seen < len(order) and (seen == 0 or time.perf_counter() - start < seconds):
        chosen = order[seen : seen + batch]
        logits, halt_prob = session.trajectory(to_floats(sample.pixels[chosen]), depths)
        parts.append(Trajectory(logits.argmax(2) == sample.labels[chosen], halt_prob))
        seen += len(chosen)
        if progress:
            progress(min(1.0, max(seen / len(order), (time.perf_counter() - start) / seconds)))
    subset = order[:seen]
    right, halt_prob = np.concatenate([p.right for p in parts], 1), np.concatenate([p.halt_prob for p in parts], 1)
    to_depth = Trajectory(right[:steps], halt_prob[:steps])
    points = []
    for name, predictions in artifacts.items():
        if predictions.steps_used is not None:
            share = float((predictions.top1 == sample.labels)[subset].mean())
            points.append((name, float(predictions.steps_used[subset].mean()), share))
    glimpses = session.metadata.glimpses
    return DepthCurve(
        run=session.metadata.run if glimpses == "none" else f"{session.metadata.run}, glimpses {glimpses}",
        glimpses=glimpses,
        accuracy=tuple(float(v) for v in right.mean(1)),
        halt_prob=tuple(float(v) for v in halt_prob.mean(1)),
        images=seen,
        total=len(sample),
        trained_depth=session.metadata.trained_depth,
        points=tuple(points),
        steps=steps,
        halting=tuple(at_threshold(to_depth, t) for t in (*sorted(THRESHOLDS), NEVER)) if steps > 1 else (),
    )
