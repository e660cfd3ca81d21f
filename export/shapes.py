"""The recursion as graphs: the same fragments, unrolled to a fixed depth, in an ONNX Loop, or one graph a step.

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
from vitrm.export.halting import BOOL, FLOAT, INT64, Answer, active_samples, any_of, keep
from vitrm.runtime.metadata import (
    EMBEDDED,
    HALT_PROB,
    HALT_THRESHOLD,
    LOGITS,
    MAX_STEPS,
    NEXT,
    PIXELS,
    STATE,
    STEP_HALT_PROB,
    STEP_LOGITS,
    STEPS,
    STEPS_USED,
)


@dataclass(frozen=True)
class Recursion:
    """What every shape does with the fragments."""

    config: ViTRMConfig
    fragments: Fragments  # float32, or the embedding and updates in float16 or int8 with float32 heads
    by_step: tuple[Fragments, ...] = ()  # those of step 1, 2, … where steps differ: int8 scales of their own

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
        self, a: Assembly, embedded: list[ir.Value], y: ir.Value, z: ir.Value, scope: str, number: int = 0
    ) -> tuple[ir.Value, ir.Value]:
        """One step: T recursions of n latent updates and an answer update.  `number` 1, 2, … takes that step's fragments."""
        f = self.by_step[number - 1] if number and self.by_step else self.fragments
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
    pixels = a.input(PIXELS, FLOAT, [BATCH, 3, image_size, image_size])
    dtype = fragment.outputs[0].dtype or ir.DataType.FLOAT
    (logits,) = a.apply(fragment, [_cast(a, pixels, dtype, "cast")], "net")
    return a.model([pixels], {LOGITS: _cast(a, logits, ir.DataType.FLOAT, "logits/cast")}, "vitrm_single")


def unrolled(recursion: Recursion, steps: int, halt_threshold: float = 2.0, every_step: bool = False) -> ir.Model:
    """`steps` copies of the step.  `every_step` adds the heads of every step as outputs.

    A `halt_threshold` below 1 is baked in; the graph still computes every step.
    """
    a = Assembly()
    classes = recursion.config.classes
    pixels = _pixels(a, recursion.config)
    *embedded, y, z = recursion.embed(a, pixels)
    halting = halt_threshold < 1
    first = a.constant([1 if halting else steps], np.int64)
    steps_used = a.op("Expand", [first, _batch(a, pixels)], "steps_at_least", dtype=INT64, shape=[BATCH])
    answer: Answer | None = None
    history: list[tuple[ir.Value, ir.Value]] = []
    for s in range(1, steps + 1):
        scope = f"step{s}"
        y, z = recursion.step(a, embedded, y, z, scope, s)
        if not (halting or every_step or s == steps):
            continue
        fresh = recursion.heads(a, y, scope)
        history.append(fresh)
        if halting and answer is not None:
            active = active_samples(a, answer.halt_prob, a.constant(halt_threshold, np.float32), scope)
            answer = keep(a, active, fresh, answer, classes, scope)
        else:
            answer = Answer(*fresh, steps_used)
    assert answer is not None
    outputs = {LOGITS: answer.logits, HALT_PROB: answer.halt_prob, STEPS_USED: answer.steps_used}
    if every_step:
        outputs[STEP_LOGITS] = _stack(a, [logits for logits, _ in history], [BATCH, classes], STEP_LOGITS)
        outputs[STEP_HALT_PROB] = _stack(a, [halt_prob for _, halt_prob in history], [BATCH], STEP_HALT_PROB)
    return a.model([pixels], outputs, "vitrm_unrolled")


def loop(recursion: Recursion) -> ir.Model:
    """One file for every depth: an ONNX Loop around the step, left early once every sample has halted.

    Further inputs are `steps` (int64 scalar; below 1 counts as 1, above MAX_STEPS as that) and `halt_threshold` (float32 scalar; 1 or more,
    or NaN, never halts).  `steps` is the trip limit, so the loop ends whatever the model says.
    """
    a = Assembly()
    classes = recursion.config.classes
    pixels = _pixels(a, recursion.config)
    steps = a.input(STEPS, INT64, [])
    threshold = a.input(HALT_THRESHOLD, FLOAT, [])
    *embedded, y, z = recursion.embed(a, pixels)
    batch = _batch(a, pixels)
    table = a.op(
        "Concat", [batch, a.constant([classes], np.int64)], "table", dtype=INT64, shape=[2], attributes={"axis": 0}
    )
    # −∞ exceeds no threshold, so every sample starts active.
    start = Answer(
        a.op("Expand", [a.constant([[0]], np.float32), table], "start/logits", dtype=FLOAT, shape=[BATCH, classes]),
        a.op("Expand", [a.constant([-np.inf], np.float32), batch], "start/halt_prob", dtype=FLOAT, shape=[BATCH]),
        a.op("Expand", [a.constant([0], np.int64), batch], "start/steps_used", dtype=INT64, shape=[BATCH]),
    )
    at_least = a.op("Max", [steps, a.constant(1, np.int64)], "trips/at_least", dtype=INT64, shape=[])
    trips = a.op("Min", [at_least, a.constant(MAX_STEPS, np.int64)], "trips", dtype=INT64, shape=[])
    carried = [y, z, *start]
    body = _body(recursion, Assembly(a.initialisers), embedded, carried, threshold)
    finals = [ir.Value(shape=v.shape, type=v.type) for v in carried]
    a.add(ir.node("Loop", [trips, a.constant(True, np.bool_), *carried], {"body": body}, outputs=finals), "loop")
    _, _, logits, halt_prob, steps_used = finals
    outputs = {LOGITS: logits, HALT_PROB: halt_prob, STEPS_USED: steps_used}
    return a.model([pixels, steps, threshold], outputs, "vitrm_loop")


def _body(
    recursion: Recursion, b: Assembly, embedded: list[ir.Value], carried: list[ir.Value], threshold: ir.Value
) -> ir.Graph:
    """One step of all samples, of which the active ones take the answer."""
    names = ("y", "z", LOGITS, HALT_PROB, STEPS_USED)
    trip, go = b.input("body/trip", INT64, []), b.input("body/go", BOOL, [])
    inputs = [ir.Value(name=f"body/{n}", shape=v.shape, type=v.type) for n, v in zip(names, carried, strict=True)]
    y, z, *kept = inputs
    active = active_samples(b, kept[1], threshold, "body/before")
    y, z = recursion.step(b, embedded, y, z, "body/step")
    answer = keep(b, active, recursion.heads(b, y, "body/step"), Answer(*kept), recursion.config.classes, "body/keep")
    go_on = any_of(b, active_samples(b, answer.halt_prob, threshold, "body/after"), "body/go_on")
    results = {"body/out/go": go_on, **{f"body/out/{n}": v for n, v in zip(names, (y, z, *answer), strict=True)}}
    return b.body([trip, go, *inputs], results, "vitrm_step")


def stepwise(recursion: Recursion) -> dict[str, ir.Model]:
    """Three graphs for a host that drives the recursion itself (see vitrm.runtime.metadata.PARTS): between two steps
    it may drop samples, or keep a state to go on from later.

    Each graph carries the weights it uses; layer 1's projection is in two of them.
    """

    def inputs(a: Assembly, names: tuple[str, ...]) -> list[ir.Value]:
        like = dict(zip((*EMBEDDED, *STATE), recursion.fragments.embed.outputs, strict=True))
        return [a.input(n, recursion.dtype, _dimensions(like[n])) for n in names]

    embed = Assembly()
    pixels = _pixels(embed, recursion.config)
    outputs = dict(zip((*EMBEDDED, *STATE), recursion.embed(embed, pixels), strict=True))
    step = Assembly()
    *embedded, y, z = given = inputs(step, (*EMBEDDED, *STATE))
    after = recursion.step(step, embedded, y, z, "step")
    heads = Assembly()
    (answer,) = inputs(heads, STATE[:1])
    return {
        "embed": embed.model([pixels], outputs, "vitrm_embed"),
        "step": step.model(given, dict(zip(NEXT, after, strict=True)), "vitrm_step"),
        "heads": heads.model(
            [answer],
            dict(zip((LOGITS, HALT_PROB), recursion.heads(heads, answer, "heads"), strict=True)),
            "vitrm_heads",
        ),
    }


def _dimensions(value: ir.Value) -> list[int | str]:
    assert value.shape is not None
    return [d if isinstance(d, int) else BATCH for d in value.shape]


def _pixels(a: Assembly, config: ViTRMConfig) -> ir.Value:
    return a.input(PIXELS, FLOAT, [BATCH, 3, config.image_size, config.image_size])


def _batch(a: Assembly, pixels: ir.Value) -> ir.Value:
    """The batch size, int64 [1]."""
    return a.op("Shape", [pixels], "batch", dtype=INT64, shape=[1], attributes={"start": 0, "end": 1})


def _stack(a: Assembly, values: list[ir.Value], shape: list[int | str], name: str) -> ir.Value:
    """float32 values of one `shape` as rows of one."""
    axis = a.constant([0], np.int64)
    rows = [
        a.op("Unsqueeze", [v, axis], f"{name}/{s}", dtype=FLOAT, shape=[1, *shape]) for s, v in enumerate(values, 1)
    ]
    return a.op("Concat", rows, f"{name}/all", dtype=FLOAT, shape=[len(rows), *shape], attributes={"axis": 0})
