"""FP16: a fragment's float32 tensors become float16, inside the graph.

The types stand in the graph itself (a strongly typed network), so the same file means the same on every
runtime, with no builder flags.  LayerNormalization keeps its float32 accumulation (`stash_type` 1).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from vitrm.errors import UserError
from vitrm.export.fragments import Fragment

MAX = float(np.finfo(np.float16).max)  # 65 504


def to_half(fragment: Fragment) -> Fragment:
    """Converts `fragment` in place: its float32 inputs, outputs, weights and constants are float16 afterwards.

    Raises `UserError` when a weight does not fit into float16's range.
    """
    weights = {name: _half_value(value, name) for name, value in fragment.weights.items()}
    constants = tuple(_half_value(value, value.name or "a constant") for value in fragment.constants)
    for value in (*fragment.inputs, *(out for node in fragment.nodes for out in node.outputs)):
        if value.dtype == ir.DataType.FLOAT:
            value.type = ir.TensorType(ir.DataType.FLOAT16)
    for node in fragment.nodes:
        to = node.attributes.get("to") if node.op_type == "Cast" else None
        if to is not None and to.as_int() == ir.DataType.FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT16)
    return replace(fragment, weights=weights, constants=constants)


def _half_value(value: ir.Value, name: str) -> ir.Value:
    assert value.const_value is not None
    if value.const_value.dtype != ir.DataType.FLOAT:
        return value
    array = value.const_value.numpy()
    largest = float(np.abs(array[np.isfinite(array)]).max(initial=0.0))
    if largest > MAX:
        raise UserError(f"weight {name} reaches {largest:.3g}, float16 ends at {MAX:.0f}: export without --fp16")
    tensor = ir.tensor(array.astype(np.float16), name=value.name)
    half = ir.Value(name=value.name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    value.replace_all_uses_with(half)
    return half
