"""The recursion as a graph: the same fragments, unrolled to a fixed depth.

Halting is per sample: a sample whose halt_prob exceeds the threshold after a step keeps the logits and
halt_prob of that step, and `steps_used` says which one it was.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from vitrm.config import ViTRMConfig
from vitrm.export.assembly import Assembly
from vitrm.export.fragments import BATCH, Fragment, Fragments
from vitrm.runtime.metadata import HALT_PROB, LOGITS, PIXELS, STEP_HALT_PROB, STEP_LOGITS, STEPS_USED


@dataclass(frozen=True)
class Recursion:
    """What every shape does with the fragments."""

    config: ViTRMConfig
    fragments: Fragments  # float32, or the embedding and updates in float16 with float32 heads

    @property
    def dtype(self) -> ir.DataType:
        """The type of the recursion's state."""
        return self.fragments.latents.outputs[0].dtype or ir.DataType.FLOAT

    def embed(self, a: Assembly, pixels: ir.Value) -> list[ir.Value]:
        """x, its layer-1 projection q, k, v, and the initial state y₀, z₀."""
        return a.apply(self.fragments.embed, [_cast(a, pixels, self.dtype, "embed/cast")], "embed")

    def heads(self, a: Assembly, y: ir.Value, scope: str) -> tuple[ir.Value, ir.Value]:
        """logits and halt_prob of the answer y, in float32 at every precision: halting compares small differences."""
        logits, halt_prob = a.apply(
            self.fragments.heads, [_cast(a, y, ir.DataType.FLOAT, f"{scope}/heads/cast")], f"{scope}/heads"
        )
        return logits, halt_prob

    def step(
        self, a: Assembly, embedded: list[ir.Value], y: ir.Value, z: ir.Value, scope: str
    ) -> tuple[ir.Value, ir.Value]:
        """One step: T recursions of n latent updates and an answer update."""
        f = self.fragments
        for t in range(self.config.recursions):
            inner = scope if self.config.recursions == 1 else f"{scope}/recursion{t + 1}"
            of_y = a.apply(f.project, [y], f"{inner}/project")
            for i in range(self.config.n):
                (z,) = a.apply(f.latents, [*embedded, y, *of_y, z], f"{inner}/latents{i + 1}")
            (y,) = a.apply(f.answer, [y, *of_y, z], f"{inner}/answer")
        return y, z


def _cast(a: Assembly, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
    if value.dtype == dtype:
        return value
    return a.op(
        "Cast",
        [value],
        name,
        dtype=dtype,
        shape=None if value.shape is None else tuple(value.shape),
        attributes={"to": dtype},
    )


def single(fragment: Fragment, image_size: int) -> ir.Model:
    """A baseline: one pass, logits only."""
    a = Assembly()
    pixels = a.input(PIXELS, ir.DataType.FLOAT, [BATCH, 3, image_size, image_size])
    dtype = fragment.outputs[0].dtype or ir.DataType.FLOAT
    (logits,) = a.apply(fragment, [_cast(a, pixels, dtype, "cast")], "net")
    return a.model([pixels], {LOGITS: _cast(a, logits, ir.DataType.FLOAT, "logits/cast")}, "vitrm_single")


def unrolled(recursion: Recursion, steps: int, halt_threshold: float = 2.0, every_step: bool = False) -> ir.Model:
    """`steps` copies of the step.  `every_step` adds the heads of every step as outputs.

    A `halt_threshold` below 1 is baked in; the graph still computes every step.
    """
    a = Assembly()
    size, classes = recursion.config.image_size, recursion.config.classes
    pixels = a.input(PIXELS, ir.DataType.FLOAT, [BATCH, 3, size, size])
    *embedded, y, z = recursion.embed(a, pixels)
    batch = a.op("Shape", [pixels], "batch", dtype=ir.DataType.INT64, shape=[1], attributes={"start": 0, "end": 1})
    halting = halt_threshold < 1
    kept: tuple[ir.Value, ir.Value] | None = None
    active: ir.Value | None = None  # None: every sample
    steps_used = a.op(
        "Expand",
        [a.constant([steps if not halting else 1], np.int64), batch],
        "steps_at_least",
        dtype=ir.DataType.INT64,
        shape=[BATCH],
    )
    history: list[tuple[ir.Value, ir.Value]] = []
    for s in range(1, steps + 1):
        scope = f"step{s}"
        y, z = recursion.step(a, embedded, y, z, scope)
        last = s == steps
        if not (halting or every_step or last):
            continue
        logits, halt_prob = recursion.heads(a, y, scope)
        history.append((logits, halt_prob))
        if kept is not None and active is not None:
            column = a.op(
                "Unsqueeze",
                [active, a.constant([1], np.int64)],
                f"{scope}/active_column",
                dtype=ir.DataType.BOOL,
                shape=[BATCH, 1],
            )
            logits = a.op(
                "Where", [column, logits, kept[0]], f"{scope}/logits", dtype=ir.DataType.FLOAT, shape=[BATCH, classes]
            )
            halt_prob = a.op(
                "Where", [active, halt_prob, kept[1]], f"{scope}/halt_prob", dtype=ir.DataType.FLOAT, shape=[BATCH]
            )
            one = a.op(
                "Cast",
                [active],
                f"{scope}/one",
                dtype=ir.DataType.INT64,
                shape=[BATCH],
                attributes={"to": ir.DataType.INT64},
            )
            steps_used = a.op("Add", [steps_used, one], f"{scope}/steps_used", dtype=ir.DataType.INT64, shape=[BATCH])
        kept = logits, halt_prob
        if halting and not last:
            halted = a.op(
                "Greater",
                [halt_prob, a.constant(halt_threshold, np.float32)],
                f"{scope}/halted",
                dtype=ir.DataType.BOOL,
                shape=[BATCH],
            )
            # A halted sample's kept halt_prob stays above the threshold, so this needs no memory of its own.
            active = a.op("Not", [halted], f"{scope}/active", dtype=ir.DataType.BOOL, shape=[BATCH])
    assert kept is not None
    outputs = {LOGITS: kept[0], HALT_PROB: kept[1], STEPS_USED: steps_used}
    if every_step:
        shapes: list[tuple[str, int, list[int | str]]] = [
            (STEP_LOGITS, 0, [steps, BATCH, classes]),
            (STEP_HALT_PROB, 1, [steps, BATCH]),
        ]
        for name, i, shape in shapes:
            axis = a.constant([0], np.int64)
            rows = [
                a.op("Unsqueeze", [h[i], axis], f"{name}/{s}", dtype=ir.DataType.FLOAT, shape=[1, *shape[1:]])
                for s, h in enumerate(history, start=1)
            ]
            outputs[name] = a.op(
                "Concat", rows, f"{name}/all", dtype=ir.DataType.FLOAT, shape=shape, attributes={"axis": 0}
            )
    return a.model([pixels], outputs, "vitrm_unrolled")
