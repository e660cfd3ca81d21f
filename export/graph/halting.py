"""Halting in the graph: per sample, whatever its batch mates do.

A sample whose halt_prob exceeds the threshold after a step keeps that step's logits and halt_prob, and
`steps_used` says which step it was.  What it keeps is all the memory this needs: its halt_prob stays above the
threshold, so whether it is still active can be read off at any time.
"""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir

from vitrm.export.graph.builder import Assembly
from vitrm.export.graph.fragments import BATCH
from vitrm.runtime.artifact.graph_names import HALT_PROB, LOGITS, STEPS_USED

FLOAT, INT64, BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL


class Answer(NamedTuple):
    """The heads' answer, and after how many steps.  Columns, so that one condition serves all three."""

    logits: ir.Value  # float32 [batch, classes]
    halt_prob: ir.Value  # float32 [batch, 1]
    steps_used: ir.Value  # int64 [batch, 1], or one number for all


def halted_samples(a: Assembly, halt_prob: ir.Value, threshold: ir.Value, scope: str) -> ir.Value:
    """bool [batch, 1]: halt_prob > threshold, so a NaN threshold never halts."""
    return a.op("Greater", [halt_prob, threshold], f"{scope}/halted", dtype=BOOL, shape=[BATCH, 1])


def keep(a: Assembly, halted: ir.Value, kept: Answer, fresh: Answer, classes: int, scope: str) -> Answer:
    """Selects the `kept` answer for halted samples, the `fresh` one for the others."""
    types = ((LOGITS, FLOAT, classes), (HALT_PROB, FLOAT, 1), (STEPS_USED, INT64, 1))
    return Answer(
        *(
            a.op("Where", [halted, old, new], f"{scope}/{name}", dtype=dtype, shape=[BATCH, width])
            for (name, dtype, width), old, new in zip(types, kept, fresh, strict=True)
        )
    )


def all_of(a: Assembly, flags: ir.Value, scope: str) -> ir.Value:
    """A bool scalar, true where all of bool [batch, 1] are."""
    numbers = a.op("Cast", [flags], f"{scope}/numbers", dtype=FLOAT, shape=[BATCH, 1], attributes={"to": FLOAT})
    smallest = a.op("ReduceMin", [numbers], f"{scope}/smallest", dtype=FLOAT, shape=[], attributes={"keepdims": 0})
    return a.op("Cast", [smallest], f"{scope}/all", dtype=BOOL, shape=[], attributes={"to": BOOL})
