"""Could an integer product of an ONNX graph saturate on some CPU?

x86 processors without VNNI multiply bytes with `vpmaddubsw`: it adds two neighboring products, unsigned activation times
signed weight, in 16 bits.  Two weights of one sign that exceed 128 together can overflow there, as 255 · 129 > 2¹⁵ − 1,
and the answer is another than on a processor with VNNI.

Matrices pair rows 2i and 2i + 1, in every kernel that was looked at.  Convolutions are laid out in many ways, so any two
weights of an output channel count as a pair.  Products of unsigned weights are exact in ONNX Runtime, which widens them.

Needs the package `onnx`; whether *this* processor saturates is vitrm.runtime.system.machine's to say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

LARGEST_PAIR = (2**15 - 1) // 255  # 128
# Operators that multiply integers → the input that is the weight.
_INTEGER = {"MatMulInteger": 1, "MatMulIntegerToFloat": 1, "DynamicQuantizeMatMul": 1, "ConvInteger": 1}
_INTEGER |= {"QLinearMatMul": 3, "QLinearConv": 3, "QGemm": 3}
_DEQUANTIZED = {"MatMul", "Gemm", "Conv"}  # integer products where both inputs come from a DequantizeLinear


@dataclass
class IntegerProducts:
    """The int8 weights of a graph's integer products."""

    exact: set[str] = field(default_factory=set)  # names of those whose sums fit everywhere
    saturating: set[str] = field(default_factory=set)  # of those whose sums may not

    def __str__(self) -> str:
        total = len(self.exact) + len(self.saturating)
        return f"{len(self.saturating)} of {total} int8 weights can saturate on a CPU without VNNI"


def integer_products(graph: Any) -> IntegerProducts:
    """Looks at every integer product with a constant weight in an `onnx.GraphProto` and the bodies in it."""
    found = IntegerProducts()
    for name, weight, op_type, transposed in _weights(graph, {}, {}):
        if weight.dtype != np.int8:
            found.exact.add(name)
            continue
        pair = _largest_of_any_two(weight) if "Conv" in op_type else _largest_of_rows(weight, transposed)
        (found.saturating if pair > LARGEST_PAIR else found.exact).add(name)
    return found


def _weights(
    graph: Any, constants: Mapping[str, Any], producers: Mapping[str, Any]
) -> Iterator[tuple[str, NDArray[Any], str, bool]]:
    """Name, value, operator, and whether rows are columns, of the weights; bodies see what is around them."""
    import onnx

    constants = {**constants, **{i.name: i for i in graph.initializer}}
    producers = {**producers, **{out: node for node in graph.node for out in node.output}}
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _weights(attribute.g, constants, producers)
        name = None
        if node.op_type in _INTEGER and len(node.input) > _INTEGER[node.op_type]:
            name = node.input[_INTEGER[node.op_type]]
        elif node.op_type in _DEQUANTIZED:
            sources = [producers[i] for i in node.input[:2] if i in producers]
            if [s.op_type for s in sources] == ["DequantizeLinear", "DequantizeLinear"]:
                name = sources[1].input[0]
        if name not in constants or constants[name].data_type not in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8):
            continue
        transposed = any(a.name == "transB" and a.i for a in node.attribute)
        yield name, onnx.numpy_helper.to_array(constants[name]), node.op_type, transposed


def _largest_of_rows(weight: NDArray[np.int8], transposed: bool) -> int:
    """The largest size that two neighboring rows of [..., in, out] reach together with one sign."""
    rows = np.moveaxis(weight.astype(np.int64), -1 if transposed else -2, 0)
    even = rows[: len(rows) // 2 * 2]
    sides = (np.maximum(side, 0).reshape(-1, 2, *rows.shape[1:]).sum(1) for side in (even, -even))
    return int(max((side.max(initial=0) for side in sides), default=0))


def _largest_of_any_two(weight: NDArray[np.int8]) -> int:
    """The largest size that two weights of one output channel [out, ...] reach together with one sign."""
    channels = weight.astype(np.int64).reshape(len(weight), -1)
    if channels.shape[1] < 2:
        return 0
    ordered = np.sort(channels, 1)
    return int(max(np.maximum(ordered[:, -2:], 0).sum(1).max(), np.maximum(-ordered[:, :2], 0).sum(1).max()))
