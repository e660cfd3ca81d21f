"""Checks of an ONNX graph for TensorRT, before TensorRT sees it.

TensorRT's parser takes some graphs that its builder refuses much later, in words of its own, and a few that it computes
otherwise than ONNX says: those above all must not get through.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from vitrm.errors import UserError, first_line

_TYPES = onnx.TensorProto.DataType
_FOR_CPU = "export it with vitrm-export --int8 --target tensorrt"
# Operators of other runtimes' int8, which TensorRT has none of.
_OTHERS_INT8 = {
    "QLinearMatMul",
    "QLinearConv",
    "MatMulInteger",
    "ConvInteger",
    "DynamicQuantizeLinear",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
    "QGemm",
    "QAttention",
}


def check_graph(path: Path) -> None:
    """Checks the graph at `path`, which `vitrm.runtime.artifact.onnx_file.inspect` has let through, for TensorRT.

    Raises `UserError` for a file that is not valid ONNX, and for everything that TensorRT is known to refuse late, to
    crash on or to compute otherwise.
    """
    try:
        model = onnx.load(str(path))
    except Exception as error:  # protobuf's exceptions
        raise UserError(f"{path} is not a whole ONNX file ({first_line(error)}): export it again") from None
    problems = list(dict.fromkeys(_problems(model)))
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise UserError(f"{path} is not for TensorRT: {'; '.join(problems[:3])}{more}")
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # onnx's ValidationError and InferenceError share no base class
        raise UserError(f"{path} is not valid ONNX: {first_line(error)}") from None


def _problems(model: onnx.ModelProto) -> Iterator[str]:
    try:
        model = onnx.shape_inference.infer_shapes(model)
    except Exception:  # the checker says what is wrong
        return
    constants = {i.name: i for i in model.graph.initializer}
    yield from _graph_problems(model.graph, constants, {})


def _graph_problems(
    graph: onnx.GraphProto, constants: dict[str, onnx.TensorProto], types: dict[str, int]
) -> Iterator[str]:
    constants = constants | {i.name: i for i in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
    values = (*graph.input, *graph.value_info, *graph.output)
    types = types | {v.name: v.type.tensor_type.elem_type for v in values}
    types |= {name: tensor.data_type for name, tensor in constants.items()}
    for node in graph.node:
        name = node.name or node.output[0]
        if node.op_type == "Attention" and node.domain in ("", "ai.onnx"):
            yield (
                f"{name} is an Attention operator, which TensorRT's builder refuses or crashes on: write it as "
                "MatMul, Softmax, MatMul, which TensorRT fuses"
            )
        elif node.op_type in _OTHERS_INT8:
            yield f"{name} is a {node.op_type}, int8 of another runtime: {_FOR_CPU}"
        elif node.domain not in ("", "ai.onnx"):
            yield f"{name} is a {node.op_type} of {node.domain}, which is not a standard operator"
        elif node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            yield from _quantization_problems(node, name, constants, types)
        subgraphs = {a.name: a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH}
        if node.op_type == "Loop":
            yield from _loop_problems(name, subgraphs["body"])
        if node.op_type == "If":
            yield from _branch_problems(name, subgraphs["then_branch"], subgraphs["else_branch"])
        for subgraph in subgraphs.values():
            yield from _graph_problems(subgraph, constants, types)


def _quantization_problems(
    node: onnx.NodeProto, name: str, constants: dict[str, onnx.TensorProto], types: dict[str, int]
) -> Iterator[str]:
    source, scale = node.input[0], node.input[1]
    quantizes = node.op_type == "QuantizeLinear"
    zero = node.input[2] if len(node.input) > 2 and node.input[2] else None
    told = next((a.i for a in node.attribute if a.name == "output_dtype"), 0)
    # Without a zero point or an output_dtype, ONNX quantizes to uint8.
    integers = (types.get(zero, 0) if zero else told or _TYPES.UINT8) if quantizes else types.get(source, 0)
    if integers == _TYPES.UINT8:
        yield (
            f"{name} is uint8, which TensorRT computes otherwise than ONNX after a mere warning: quantize to int8 with zero "
            f"point 0 ({_FOR_CPU})"
        )
    elif integers == _TYPES.INT32:
        yield (
            f"{name} dequantizes int32 (a bias, as quantize_static writes it), which TensorRT has not: leave biases in "
            "floating point"
        )
    if zero and zero not in constants:
        yield f"{name} has a zero point that is computed, TensorRT takes 0 alone"
    elif zero and np.any(numpy_helper.to_array(constants[zero])):
        yield f"{name} has a zero point other than 0, TensorRT takes symmetric int8 alone: {_FOR_CPU}"
    floats = {types.get(source if quantizes else node.output[0], 0), types.get(scale, 0)} - {0}
    if len(floats) > 1:
        yield (
            f"{name} has a scale of another type than its tensor ("
            + ", ".join(sorted(_TYPES.Name(t).lower() for t in floats))
            + "), which TensorRT takes and ONNX forbids: give both one type"
        )


def _loop_problems(name: str, body: onnx.GraphProto) -> Iterator[str]:
    # Inputs: trip, condition, carried.  Outputs: condition, carried, scans.
    for before, after in zip(body.input[2:], body.output[1:], strict=False):
        first, second = _shape(before), _shape(after)
        if first is None or second is None:
            continue
        fixed = zip(first, second, strict=False)
        if len(first) != len(second) or any(a != b for a, b in fixed if isinstance(a, int) and isinstance(b, int)):
            yield (
                f"{name} carries {before.name} of shape {list(first)} and gives it back as {list(second)}: what a Loop "
                "carries must keep its shape in TensorRT"
            )


def _branch_problems(name: str, then: onnx.GraphProto, otherwise: onnx.GraphProto) -> Iterator[str]:
    for a, b in zip(then.output, otherwise.output, strict=False):
        first, second = _shape(a), _shape(b)
        if first is not None and second is not None and len(first) != len(second):
            yield (
                f"{name} gives {len(first)} axes in one branch and {len(second)} in the other: both branches of an If "
                "must give the same in TensorRT"
            )


def _shape(value: onnx.ValueInfoProto) -> tuple[int | str | None, ...] | None:
    """Fixed axes as numbers, others as names or None; None without a known rank."""
    if not value.type.tensor_type.HasField("shape"):
        return None
    return tuple(
        d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in value.type.tensor_type.shape.dim
    )
