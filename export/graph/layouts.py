"""The recursion as graphs: the same fragments, unrolled to a fixed depth, in an ONNX Loop, or one graph a step.

Halting is per sample: a sample whose halt_prob exceeds the threshold after a step keeps the logits and
halt_prob of that step, and `steps_used` says which one it was.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from vitrm.config import ViTRMConfig
from vitrm.export.graph.builder import Assembly
from vitrm.export.graph.fragments import BATCH, Fragment, Fragments
from vitrm.export.graph.halting import BOOL, FLOAT, INT64, Answer, all_of, halted_samples, keep
from vitrm.model_limits import MAX_STEPS, NEVER
from vitrm.runtime.artifact.graph_names import (
    HALT_PROB,
    HALT_THRESHOLD,
    LOGITS,
    NEXT_SUFFIX,
    PIXELS,
    STEP_HALT_PROB,
    STEP_LOGITS,
    STEPS,
    STEPS_USED,
)


@dataclass(frozen=True)
class Recursion:
    """The recursion over fragments, as every layout has it."""

    config: ViTRMConfig
    fragments: Fragments  # float32, or the embedding and updates in float16 or int8 with float32 heads
    by_step: tuple[Fragments, ...] = ()  # those of step 1, 2, … where steps differ: int8 scales of their own

    @property
    def dtype(self) -> ir.DataType:
        """The type of the recursion's state."""
        return self.fragments.latents.outputs[0].dtype or ir.DataType.FLOAT

    def embed(self, a: Assembly, pixels: ir.Value) -> tuple[list[ir.Value], list[ir.Value]]:
        """The tensors that steps read of the images; and the initial state: y₀, z₀ with its projection, and the number of the first view."""
        made = a.apply(self.fragments.embed, [_cast(a, pixels, self.dtype, "embed/cast")], "embed")
        of_images = len(self.fragments.embedded_names)
        embedded, (y, z, *glimpse) = made[:of_images], made[of_images:]
        of_z = a.apply(self.fragments.project_latents, [z], "embed/project_latents")
        return embedded, [y, z, *of_z, *glimpse]

    def heads(self, a: Assembly, y: ir.Value, scope: str) -> tuple[ir.Value, ir.Value]:
        """logits [batch, classes] and halt_prob [batch, 1] of y, in float32 at every precision: halting compares small
        differences.
        """
        logits, halt_prob = a.apply(
            self.fragments.heads, [_cast(a, y, ir.DataType.FLOAT, f"{scope}/heads/cast")], f"{scope}/heads"
        )
        return logits, halt_prob

    def step(
        self, a: Assembly, embedded: list[ir.Value], state: list[ir.Value], scope: str, number: int = 0
    ) -> list[ir.Value]:
        """One step: a look where the model has glimpses, then T recursions of n latent updates and an answer update.  `number` 1, 2, … takes that step's fragments."""
        f = self.by_step[number - 1] if number and self.by_step else self.fragments
        glimpse: list[ir.Value] = []
        if f.look is not None:
            *state, seen = state
            *embedded, after = a.apply(f.look, [*embedded, seen], f"{scope}/look")
            glimpse = [after]
        y, z, *of_z = state
        for t in range(self.config.recursions):
            inner = scope if self.config.recursions == 1 else f"{scope}/recursion{t + 1}"
            of_y = a.apply(f.project_answer, [y], f"{inner}/project_answer")
            for i in range(self.config.n):
                (z,) = a.apply(f.latents, [*embedded, y, *of_y, z, *of_z], f"{inner}/latents{i + 1}")
                of_z = a.apply(f.project_latents, [z], f"{inner}/project_latents{i + 1}")
            (y,) = a.apply(f.answer, [y, *of_y, z, *of_z], f"{inner}/answer")
        return [y, z, *of_z, *glimpse]


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


def unrolled(recursion: Recursion, steps: int, halt_threshold: float = NEVER, every_step: bool = False) -> ir.Model:
    """`steps` copies of the step.  `every_step` adds the heads of every step as outputs.

    A `halt_threshold` below 1 is baked in; the graph still computes every step.
    """
    a = Assembly()
    classes = recursion.config.classes
    pixels = _pixels(a, recursion.config)
    embedded, state = recursion.embed(a, pixels)
    halting = halt_threshold < 1
    history: list[tuple[ir.Value, ir.Value]] = []
    for s in range(1, steps + 1):
        state = recursion.step(a, embedded, state, f"step{s}", s)
        if halting or every_step or s == steps:
            history.append(recursion.heads(a, state[0], f"step{s}"))
    used = _fill(a, a.constant([[1 if halting else steps]], np.int64), _batch(a, pixels), 1, "steps_at_least")
    answer = Answer(*history[0 if halting else -1], used)
    if halting:
        threshold = a.constant(halt_threshold, np.float32)
        for s, fresh in enumerate(history[1:], 2):
            halted = halted_samples(a, answer.halt_prob, threshold, f"step{s}")
            number = a.constant([[s]], np.int64)
            answer = keep(a, halted, answer, Answer(*fresh, number), classes, f"step{s}")
    outputs = _outputs(a, answer)
    if every_step:
        columns = _stack(a, [halt_prob for _, halt_prob in history], [BATCH, 1], STEP_HALT_PROB)
        outputs[STEP_LOGITS] = _stack(a, [logits for logits, _ in history], [BATCH, classes], STEP_LOGITS)
        outputs[STEP_HALT_PROB] = _row(a, columns, f"{STEP_HALT_PROB}/rows", [len(history), BATCH])
    return a.model([pixels], outputs, "vitrm_unrolled", intermediate_shapes=False)


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
    embedded, state = recursion.embed(a, pixels)
    batch = _batch(a, pixels)
    # −∞ exceeds no threshold, so every sample starts active.
    start = Answer(
        _fill(a, a.constant([[0]], np.float32), batch, classes, "start/logits"),
        _fill(a, a.constant([[-np.inf]], np.float32), batch, 1, "start/halt_prob"),
        _fill(a, a.constant([[0]], np.int64), batch, 1, "start/trip"),
    )
    at_least = a.op("Max", [steps, a.constant(1, np.int64)], "trips/at_least", dtype=INT64, shape=[])
    trips = a.op("Min", [at_least, a.constant(MAX_STEPS, np.int64)], "trips", dtype=INT64, shape=[])
    carried = [*state, *start]
    body = _body(recursion, Assembly(a.initializers), embedded, carried, threshold)
    finals = [ir.Value(shape=v.shape, type=v.type) for v in carried]
    a.add(ir.node("Loop", [trips, a.constant(True, np.bool_), *carried], {"body": body}, outputs=finals), "loop")
    logits, halt_prob, trip = finals[len(state) :]
    # The loop counts its trips from 0.
    used = a.op("Add", [trip, a.constant([[1]], np.int64)], "steps_used/column", dtype=INT64, shape=[BATCH, 1])
    outputs = _outputs(a, Answer(logits, halt_prob, used))
    return a.model([pixels, steps, threshold], outputs, "vitrm_loop")


def _body(
    recursion: Recursion, b: Assembly, embedded: list[ir.Value], carried: list[ir.Value], threshold: ir.Value
) -> ir.Graph:
    """One step of all samples, of which the active ones take the answer."""
    of_state = recursion.fragments.state_names
    names = (*of_state, LOGITS, HALT_PROB, STEPS_USED)
    trip, go = b.input("body/trip", INT64, []), b.input("body/go", BOOL, [])
    inputs = [ir.Value(name=f"body/{n}", shape=v.shape, type=v.type) for n, v in zip(names, carried, strict=True)]
    state, kept = inputs[: len(of_state)], Answer(*inputs[len(of_state) :])
    halted = halted_samples(b, kept.halt_prob, threshold, "body/before")
    state = recursion.step(b, embedded, state, "body/step")
    fresh = Answer(*recursion.heads(b, state[0], "body/step"), trip)
    answer = keep(b, halted, kept, fresh, recursion.config.classes, "body/keep")
    done = all_of(b, halted_samples(b, answer.halt_prob, threshold, "body/after"), "body/done")
    go_on = b.op("Not", [done], "body/go_on", dtype=BOOL, shape=[])
    results = {"body/out/go": go_on, **{f"body/out/{n}": v for n, v in zip(names, (*state, *answer), strict=True)}}
    return b.body([trip, go, *inputs], results, "vitrm_step")


def stepwise(recursion: Recursion) -> dict[str, ir.Model]:
    """Three graphs for a host that drives the recursion itself (see vitrm.runtime.artifact.graph_names): between two steps
    it may drop samples, or keep a state to go on from later.

    Each graph carries the weights it uses; layer 1's projection is in two of them.
    """
    embed = Assembly()
    pixels = _pixels(embed, recursion.config)
    embedded, state = recursion.embed(embed, pixels)
    of_images, of_state = recursion.fragments.embedded_names, recursion.fragments.state_names
    outputs = dict(zip((*of_images, *of_state), (*embedded, *state), strict=True))
    dimensions = {name: _dimensions(value) for name, value in outputs.items()}

    def inputs(a: Assembly, names: tuple[str, ...]) -> list[ir.Value]:
        return [a.input(name, recursion.dtype, dimensions[name]) for name in names]

    step = Assembly()
    fixed, before = inputs(step, of_images), inputs(step, of_state)
    after = recursion.step(step, fixed, before, "step")
    heads = Assembly()
    (answer,) = inputs(heads, of_state[:1])
    logits, halt_prob = recursion.heads(heads, answer, "heads")
    return {
        "embed": embed.model([pixels], outputs, "vitrm_embed"),
        "step": step.model(
            [*fixed, *before],
            {name + NEXT_SUFFIX: value for name, value in zip(of_state, after, strict=True)},
            "vitrm_step",
        ),
        "heads": heads.model(
            [answer],
            {LOGITS: logits, HALT_PROB: _row(heads, halt_prob, "halt_prob/row", [BATCH])},
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


def _outputs(a: Assembly, answer: Answer) -> dict[str, ir.Value]:
    """An answer under its public names: logits [batch, classes], halt_prob [batch], steps_used [batch]."""
    return {
        LOGITS: answer.logits,
        HALT_PROB: _row(a, answer.halt_prob, f"{HALT_PROB}/row", [BATCH]),
        STEPS_USED: _row(a, answer.steps_used, f"{STEPS_USED}/row", [BATCH]),
    }


def _fill(a: Assembly, value: ir.Value, batch: ir.Value, width: int, name: str) -> ir.Value:
    """The one number `value` [1, 1] as [batch, width]."""
    table = [batch, a.constant([width], np.int64)]
    shape = a.op("Concat", table, f"{name}/shape", dtype=INT64, shape=[2], attributes={"axis": 0})
    return a.op("Expand", [value, shape], name, dtype=value.dtype or FLOAT, shape=[BATCH, width])


def _row(a: Assembly, column: ir.Value, name: str, shape: list[int | str]) -> ir.Value:
    """`column` without its last axis, of length 1."""
    axis = a.constant([-1], np.int64)
    return a.op("Squeeze", [column, axis], name, dtype=column.dtype or FLOAT, shape=shape)


def _stack(a: Assembly, values: list[ir.Value], shape: list[int | str], name: str) -> ir.Value:
    """float32 values of one `shape` as rows of one."""
    axis = a.constant([0], np.int64)
    rows = [
        a.op("Unsqueeze", [v, axis], f"{name}/{s}", dtype=FLOAT, shape=[1, *shape]) for s, v in enumerate(values, 1)
    ]
    return a.op("Concat", rows, f"{name}/all", dtype=FLOAT, shape=[len(rows), *shape], attributes={"axis": 0})
