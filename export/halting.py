"""Halting in the graph: per sample, whatever its batch mates do.

A sample whose halt_prob exceeds the threshold after a step keeps that step's logits and halt_prob, and
`steps_used` says which step it was.  What it keeps is all the memory this needs: its halt_prob stays above the
threshold, so whether it is still active can be read off at any time.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from vitrm.export.assembly import Assembly
from vitrm.export.fragments import BATCH

FLOAT, INT64, BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL


class Answer(NamedTuple):
    """What the heads say, and after how many steps."""

    logits: ir.Value  # float32 [batch, classes]
    halt_prob: ir.Value  # float32 [batch]
    steps_used: ir.Value  # int64 [batch]


def active_samples(a: Assembly, halt_prob: ir.Value, threshold: ir.Value, scope: str) -> ir.Value:
    """bool [batch]: not (halt_prob > threshold), so a NaN threshold never halts."""
    halted = a.op("Greater", [halt_prob, threshold], f"{scope}/halted", dtype=BOOL, shape=[BATCH])
    return a.op("Not", [halted], f"{scope}/active", dtype=BOOL, shape=[BATCH])


def keep(
    a: Assembly, active: ir.Value, fresh: tuple[ir.Value, ir.Value], kept: Answer, classes: int, scope: str
) -> Answer:
    """`fresh` logits and halt_prob for the active samples, with one more step used; what was `kept` for the others."""
    axis = a.constant([1], np.int64)
    column = a.op("Unsqueeze", [active, axis], f"{scope}/active_column", dtype=BOOL, shape=[BATCH, 1])
    one = a.op("Cast", [active], f"{scope}/one", dtype=INT64, shape=[BATCH], attributes={"to": INT64})
    return Answer(
        a.op("Where", [column, fresh[0], kept.logits], f"{scope}/logits", dtype=FLOAT, shape=[BATCH, classes]),
        a.op("Where", [active, fresh[1], kept.halt_prob], f"{scope}/halt_prob", dtype=FLOAT, shape=[BATCH]),
        a.op("Add", [kept.steps_used, one], f"{scope}/steps_used", dtype=INT64, shape=[BATCH]),
    )


def any_of(a: Assembly, flags: ir.Value, scope: str) -> ir.Value:
    """bool scalar: whether any of bool [batch] is true."""
    numbers = a.op("Cast", [flags], f"{scope}/numbers", dtype=FLOAT, shape=[BATCH], attributes={"to": FLOAT})
    largest = a.op("ReduceMax", [numbers], f"{scope}/largest", dtype=FLOAT, shape=[], attributes={"keepdims": 0})
    return a.op("Cast", [largest], f"{scope}/any", dtype=BOOL, shape=[], attributes={"to": BOOL})
