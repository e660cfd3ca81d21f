"""INT8: a fragment's products of activations with weights become products of int8 numbers.

Weights are symmetric with a scale per output channel.  Everything else stays floating point: biases, softmax, the
products inside attention, LayerNorm, the residual stream, the heads.  Two targets want two graphs:

    tensorrt   h → QuantizeLinear → DequantizeLinear → MatMul ← DequantizeLinear ← int8 weight
               symmetric signed activations, standard operators: what TensorRT fuses (OpenVINO too)
    cpu        h → QuantizeLinear (unsigned, with a zero point) → MatMulIntegerToFloat (with scales and bias)
               the one integer product that ONNX Runtime's CPU provider runs at full speed

Activation scales are constants from a calibration, so a sample's answer does not depend on its batch mates, as it
would with scales taken from each batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from vitrm.calib.quantize import affine_scale, quantize_weight, symmetric_scale
from vitrm.calib.ranges import Range
from vitrm.export.graph.fragments import Fragment

TARGETS = ("cpu", "tensorrt")
CONTRIB = "com.microsoft"
_WEIGHT = ".weight.T"

INT8, UINT8, FLOAT = ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.FLOAT


def linear_layers(fragment: Fragment) -> list[str]:
    """The layers whose products with their weights `to_int8` replaces, e.g. "block.1.ffn.up"."""
    return [name.removesuffix(_WEIGHT) for name in fragment.weights if name.endswith(_WEIGHT)]


def to_int8(fragment: Fragment, range_of: Callable[[str], Range | None], target: str) -> Fragment:
    """A copy of the float32 `fragment` with int8 products; `range_of` gives the range of a layer's input, or None for a
    layer that stays as it is.

    Raises ValueError if a weight is used otherwise than in one product.
    """
    rewriting = _Rewriting(fragment, range_of, target)
    for node in fragment.nodes:
        rewriting.copy(node)
    left = [n for n in rewriting.weights if n.endswith(_WEIGHT) and n.removesuffix(_WEIGHT) not in rewriting.floats]
    if left:
        raise ValueError(f"fragment {fragment.name}: {', '.join(left)} did not become int8")
    return rewriting.result()


class _Rewriting:
    """The copy under construction."""

    def __init__(self, fragment: Fragment, range_of: Callable[[str], Range | None], target: str) -> None:
        self.fragment, self.target = fragment, target
        self.ranges = {layer: range_of(layer) for layer in linear_layers(fragment)}
        self.floats = {layer for layer, extent in self.ranges.items() if extent is None}
        self.values = {v: ir.Value(name=v.name, shape=v.shape, type=v.type) for v in fragment.inputs}
        self.names = {value: name for name, value in fragment.weights.items()}
        self.weights: dict[str, ir.Value] = {}
        self.constants: list[ir.Value] = list(fragment.constants)
        self.values.update({v: v for v in fragment.constants})
        self.nodes: list[ir.Node] = []
        self.quantized: dict[ir.Value, tuple[ir.Value, ...]] = {}  # of activations: several layers may read one
        self.skipped: set[ir.Node] = set()
        self.taken = {n.name for n in fragment.nodes}

    def copy(self, node: ir.Node) -> None:
        """Copies a node, or puts what replaces it."""
        if node in self.skipped:
            return
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        name = self.names.get(weight) if weight is not None else None
        extent = self.ranges.get(name.removesuffix(_WEIGHT)) if name else None
        if extent is None:
            outputs = [ir.Value(name=v.name, shape=v.shape, type=v.type) for v in node.outputs]
            inputs = [None if v is None else self.value(v) for v in node.inputs]
            self.values.update(zip(node.outputs, outputs, strict=True))
            self.nodes.append(
                ir.Node(node.domain, node.op_type, inputs, node.attributes.values(), outputs=outputs, name=node.name)
            )
            return
        source = node.inputs[0]
        assert source is not None
        assert weight is not None
        assert name is not None
        layer = name.removesuffix(_WEIGHT)
        if self.target == "cpu":
            self._integer_product(node, source, weight, name, layer, extent)
        else:
            self._dequantized_product(node, source, weight, name, layer, extent)

    def value(self, value: ir.Value) -> ir.Value:
        """The copy's value for one of the original's."""
        if value not in self.values:
            name = self.names[value]
            self.weights[name] = self.values[value] = value
        return self.values[value]

    def result(self) -> Fragment:
        """The finished copy."""
        f = self.fragment
        return Fragment(
            name=f.name,
            inputs=tuple(self.values[v] for v in f.inputs),
            outputs=tuple(self.values[v] for v in f.outputs),
            nodes=tuple(self.nodes),
            weights=self.weights,
            constants=tuple(self.constants),
        )

    # The two forms of a product --------------------------------------------------------------------

    def _dequantized_product(
        self, node: ir.Node, source: ir.Value, weight: ir.Value, name: str, layer: str, extent: Range
    ) -> None:
        if source not in self.quantized:
            scale = self._constant(symmetric_scale(extent))
            zero = self._constant(np.int8(0))
            shape = source.shape
            q = self._node("QuantizeLinear", [self.value(source), scale, zero], f"{layer}/quantize", INT8, shape)
            self.quantized[source] = (
                self._node("DequantizeLinear", [q, scale, zero], f"{layer}/dequantize", FLOAT, shape),
            )
        integers, scales = self._int8_weight(weight, name)
        restored = self._node(
            "DequantizeLinear", [integers, scales], f"{layer}/weight", FLOAT, weight.shape, {"axis": 1}
        )
        self._product(node, "MatMul", [*self.quantized[source], restored], "")

    def _integer_product(
        self, node: ir.Node, source: ir.Value, weight: ir.Value, name: str, layer: str, extent: Range
    ) -> None:
        if source not in self.quantized:
            scale, zero = affine_scale(extent)
            a_scale, a_zero = self._constant(scale), self._constant(zero)
            q = self._node(
                "QuantizeLinear", [self.value(source), a_scale, a_zero], f"{layer}/quantize", UINT8, source.shape
            )
            self.quantized[source] = q, a_scale, a_zero
        q, a_scale, a_zero = self.quantized[source]
        integers, scales = self._int8_weight(weight, name)
        inputs = [q, integers, a_scale, scales, a_zero]
        # The operator adds the bias too.
        add = next(iter(node.outputs[0].uses()), (None, 0))[0] if len(node.outputs[0].uses()) == 1 else None
        bias = None
        if add is not None and add.op_type == "Add":
            bias = next((v for v in add.inputs if v is not None and self.names.get(v) == f"{layer}.bias"), None)
        if bias is None or add is None:
            self._product(node, "MatMulIntegerToFloat", inputs, CONTRIB)
            return
        self.skipped.add(add)
        self._product(node, "MatMulIntegerToFloat", [*inputs, None, self.value(bias)], CONTRIB, replaces=add)

    def _product(
        self,
        node: ir.Node,
        op_type: str,
        inputs: list[ir.Value | None] | list[ir.Value],
        domain: str,
        replaces: ir.Node | None = None,
    ) -> None:
        old = (replaces or node).outputs[0]
        output = ir.Value(name=old.name, shape=old.shape, type=old.type)
        self.values[old] = output
        assert node.name is not None
        name = node.name.replace("/MatMul", f"/{op_type}")
        self.nodes.append(ir.Node(domain, op_type, inputs, outputs=[output], name=name))

    # Parts -----------------------------------------------------------------------------------------

    def _int8_weight(self, weight: ir.Value, name: str) -> tuple[ir.Value, ir.Value]:
        """The weight [in, out] as int8 and its scales [out]; stored once, whoever uses them."""
        stored = f"{name}.int8", f"{name}.scale"
        if stored[0] not in self.weights:
            assert weight.const_value is not None
            integers, scales = quantize_weight(weight.const_value.numpy())
            self.weights[stored[0]] = _initializer(stored[0], integers)
            self.weights[stored[1]] = _initializer(stored[1], scales)
        return self.weights[stored[0]], self.weights[stored[1]]

    def _constant(self, number: np.float32 | np.int8 | np.uint8) -> ir.Value:
        array: NDArray[Any] = np.asarray(number)
        value = _initializer(f"scale.{len(self.constants)}", array)
        self.constants.append(value)
        return value

    def _node(
        self,
        op_type: str,
        inputs: list[ir.Value],
        name: str,
        dtype: ir.DataType,
        shape: ir.Shape | None,
        attributes: dict[str, Any] | None = None,
    ) -> ir.Value:
        output = ir.Value(name=name, shape=shape, type=ir.TensorType(dtype))
        unique, i = name, 1
        while unique in self.taken:
            unique, i = f"{name}.{i}", i + 1
        self.taken.add(unique)
        node = ir.node(op_type, inputs, attributes or {}, outputs=[output], name=unique)
        self.nodes.append(node)
        return output


def _initializer(name: str, array: NDArray[Any]) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
