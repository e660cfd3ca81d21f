"""FP16: a fragment's float32 tensors become float16, inside the graph.

The types stand in the graph itself (a strongly typed network), so the same file means the same on every
runtime, with no builder flags.  LayerNormalization keeps its float32 accumulation (`stash_type` 1).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from vitrm.calib.float16_headroom import FLOAT16_MAX
from vitrm.errors import UserError
from vitrm.export.graph.fragments import Fragment


def to_half(fragment: Fragment) -> Fragment:
    """A copy of `fragment` whose float32 inputs, outputs, weights and constants are float16.

    Raises `UserError` when a weight does not fit into float16's range.
    """
    values = {v: ir.Value(name=v.name, shape=v.shape, type=_half_type(v)) for v in fragment.inputs}
    for name, value in fragment.weights.items():
        values[value] = _half_constant(value, name)
    for value in fragment.constants:
        values[value] = _half_constant(value, value.name or "a constant")
    nodes = []
    for node in fragment.nodes:
        attributes = dict(node.attributes)
        if node.op_type == "Cast" and attributes["to"].as_int() == ir.DataType.FLOAT:
            attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT16)
        outputs = [ir.Value(name=v.name, shape=v.shape, type=_half_type(v)) for v in node.outputs]
        values.update(zip(node.outputs, outputs, strict=True))
        inputs = [None if v is None else values[v] for v in node.inputs]
        nodes.append(ir.Node(node.domain, node.op_type, inputs, attributes.values(), outputs=outputs, name=node.name))
    return Fragment(
        name=fragment.name,
        inputs=tuple(values[v] for v in fragment.inputs),
        outputs=tuple(values[v] for v in fragment.outputs),
        nodes=tuple(nodes),
        weights={name: values[v] for name, v in fragment.weights.items()},
        constants=tuple(values[v] for v in fragment.constants),
    )


def _half_type(value: ir.Value) -> ir.TypeProtocol | None:
    return ir.TensorType(ir.DataType.FLOAT16) if value.dtype == ir.DataType.FLOAT else value.type


def _half_constant(value: ir.Value, name: str) -> ir.Value:
    tensor = value.const_value
    assert tensor is not None
    if tensor.dtype == ir.DataType.FLOAT:
        array = tensor.numpy()
        largest = float(np.abs(array[np.isfinite(array)]).max(initial=0.0))
        if largest > FLOAT16_MAX:
            raise UserError(
                f"weight {name} reaches {largest:.3g}, float16 ends at {FLOAT16_MAX:.0f}: export in another precision"
            )
        tensor = ir.tensor(array.astype(np.float16), name=value.name)
    return ir.Value(name=value.name, shape=value.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
