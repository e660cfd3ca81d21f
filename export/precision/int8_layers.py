"""INT8: a fragment's matmuls of activations with weights, and for a CPU its convolutions where asked for, work on int8 numbers.

Weights are symmetric with a scale per output channel.  Everything else stays floating point: biases, softmax, the
matmuls inside attention, LayerNorm, the residual stream, the heads, GELU.  Two targets want two graphs:

    tensorrt   h → QuantizeLinear → DequantizeLinear → MatMul ← DequantizeLinear ← int8 weight
               signed activations without a zero point, standard operators: what TensorRT fuses (OpenVINO too)
    cpu        h → QuantizeLinear (unsigned, with a zero point) → MatMulIntegerToFloat (with scales and bias)
               the one integer GEMM that ONNX Runtime's CPU provider runs at full speed

A convolution for a CPU becomes QLinearConv, whose bias is int32 and whose output is uint8; a max-pooling that follows takes
that as it is, a quarter of it becomes float again.  For TensorRT they stay float16: too many answers would be others.

TensorRT takes no zero point p.  Values that have one all the same, as those behind GELU do, which are hardly negative, are
shifted before: with c = −s p for the scale s,

    h ≈ s (q − p),    q = QuantizeLinear(h − c),    W h + b ≈ W (s q) + (b + c W 1)

Activation scales are constants, those of a `QuantTable`, so a sample's answer does not depend on its batch mates, as it
would with scales taken from each batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from vitrm.calib.int8_weights import quantize_filters, quantize_weight
from vitrm.calib.quant_params import QuantParams
from vitrm.calib.sites import OUTPUT
from vitrm.export.graph.fragments import Fragment, only_user

_CONTRIB = "com.microsoft"
_WEIGHT, _FILTERS = ".weight.T", ".weight"

_Quantized = tuple[ir.Value, ir.Value, ir.Value]  # integers, scale, zero point
_INT8, _UINT8, _FLOAT = ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.FLOAT


def linear_layers(fragment: Fragment) -> list[str]:
    """The layers whose matmul with their weight `to_int8` can replace, e.g. "block.1.ffn.up"."""
    return [name.removesuffix(_WEIGHT) for name in fragment.weights if name.endswith(_WEIGHT)]


def convolutions(fragment: Fragment) -> list[str]:
    """The layers whose convolution `to_int8` can replace, e.g. "tokenizer.groups.0.conv1"."""
    names = {value: name for name, value in fragment.weights.items()}
    weights = [node.inputs[1] for node in fragment.nodes if node.op_type == "Conv"]
    return [_layer(names[w]) for w in weights if w in names]


def _layer(weight: str) -> str:
    """The layer that has the weight of this name."""
    return weight.removesuffix(_WEIGHT).removesuffix(_FILTERS)


def to_int8(fragment: Fragment, params: Mapping[str, QuantParams], target: str) -> Fragment:
    """Copies the float32 `fragment` with int8 matmuls and convolutions.

    Args:
        fragment: a traced function.
        params: scale and zero point of a layer's input, for each layer that becomes int8, and with `OUTPUT` behind its name
            those of a convolution's output; the others stay as they are.
        target: "cpu" or "tensorrt", the form of what is int8.

    Raises:
        ValueError: if a layer's weight is used otherwise than in one matmul or convolution.
    """
    rewriting = _Rewriting(fragment, params, target)
    for node in fragment.nodes:
        rewriting.copy(node)
    left = [name for name in rewriting.weights if _layer(name) in params]
    if left:
        raise ValueError(f"fragment {fragment.name}: {', '.join(left)} did not become int8")
    return rewriting.result()


class _Rewriting:
    """The copy under construction."""

    def __init__(self, fragment: Fragment, params: Mapping[str, QuantParams], target: str) -> None:
        self.fragment, self.params, self.target = fragment, params, target
        self.values = {v: ir.Value(name=v.name, shape=v.shape, type=v.type) for v in fragment.inputs}
        self.names = {value: name for name, value in fragment.weights.items()}
        self.weights: dict[str, ir.Value] = {}
        self.constants: list[ir.Value] = list(fragment.constants)
        self.values.update({v: v for v in fragment.constants})
        self.nodes: list[ir.Node] = []
        self.quantized: dict[ir.Value, _Quantized] = {}  # several layers may read one
        self.dequantized: dict[ir.Value, ir.Value] = {}
        self.skipped: set[ir.Node] = set()
        self.taken = {n.name for n in fragment.nodes}

    def copy(self, node: ir.Node) -> None:
        """Copies a node, or puts what replaces it."""
        if node in self.skipped:
            return
        weight = node.inputs[1] if node.op_type in ("MatMul", "Conv") else None
        layer = _layer(self.names.get(weight, "")) if weight is not None else ""
        if layer not in self.params:
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
        quantized = self._quantized(source, layer)
        if node.op_type == "Conv":
            self._integer_conv(node, quantized, weight, layer)
        elif self.target == "cpu":
            self._integer_matmul(node, quantized, weight, layer)
        else:
            self._dequantized_matmul(node, source, quantized, weight, layer)

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

    # The two forms of a matmul ---------------------------------------------------------------------

    def _dequantized_matmul(
        self, node: ir.Node, source: ir.Value, quantized: _Quantized, weight: ir.Value, layer: str
    ) -> None:
        if source not in self.dequantized:
            self.dequantized[source] = self._node(
                "DequantizeLinear", [*quantized], f"{layer}/dequantize", _FLOAT, source.shape
            )
        integers, scales = self._int8_weight(weight, layer)
        restored = self._node(
            "DequantizeLinear", [integers, scales], f"{layer}/weight", _FLOAT, weight.shape, {"axis": 1}
        )
        self._matmul(node, "MatMul", [self.dequantized[source], restored], "")
        if self.params[layer].zero_point != 0:
            self._give_back_shift(node, layer, integers, scales)

    def _give_back_shift(self, node: ir.Node, layer: str, integers: ir.Value, scales: ir.Value) -> None:
        """Adds c W 1, what the shift took from each output of a layer, with its bias."""
        assert integers.const_value is not None
        assert scales.const_value is not None
        sums = integers.const_value.numpy().sum(0, dtype=np.int64) * scales.const_value.numpy().astype(np.float64)
        given: NDArray[np.float32] = (_shift(self.params[layer]) * sums).astype(np.float32)
        add, bias = self._bias(node, layer)
        if bias is not None:
            assert bias.const_value is not None
            given = given + bias.const_value.numpy()
        old, product = (add or node).outputs[0], self.values[node.outputs[0]]
        inputs = [product, self._constant(given)]
        self.values[old] = self._node("Add", inputs, f"{layer}/unshifted", _FLOAT, old.shape)

    def _integer_matmul(self, node: ir.Node, quantized: _Quantized, weight: ir.Value, layer: str) -> None:
        q, scale, zero_point = quantized
        integers, scales = self._int8_weight(weight, layer)
        inputs = [q, integers, scale, scales, zero_point]
        add, bias = self._bias(node, layer)
        # The operator adds the bias too.
        rest = [] if bias is None else [None, self.value(bias)]
        self._matmul(node, "MatMulIntegerToFloat", [*inputs, *rest], _CONTRIB, replaces=add)

    def _bias(self, node: ir.Node, layer: str) -> tuple[ir.Node | None, ir.Value | None]:
        """The node behind a matmul that adds the layer's bias, which is not copied then, and the bias; None where there is none."""
        add = only_user(node)
        if add is not None and add.op_type == "Add":
            bias = next((v for v in add.inputs if v is not None and self.names.get(v) == f"{layer}.bias"), None)
            if bias is not None:
                self.skipped.add(add)
                return add, bias
        return None, None

    def _matmul(
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

    # A convolution ---------------------------------------------------------------------------------

    def _integer_conv(self, node: ir.Node, quantized: _Quantized, weight: ir.Value, layer: str) -> None:
        q, scale, zero_point = quantized
        integers, scales = self._int8_filters(weight, layer)
        given = self.params[layer + OUTPUT]
        out_scale, out_zero_point = self._constant(given.scale), self._constant(given.zero_point)
        inputs = [q, scale, zero_point, integers, scales, self._constant(np.int8(0)), out_scale, out_zero_point]
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            inputs.append(self._int32_bias(node.inputs[2], self.params[layer].scale, scales))
        old = node.outputs[0]
        name = f"{layer}/quantized"
        integer = self._node("QLinearConv", inputs, name, _UINT8, old.shape, dict(node.attributes))
        pooling = only_user(node)
        if pooling is not None and pooling.op_type == "MaxPool":  # the order of values is that of their integers
            self.skipped.add(pooling)
            old = pooling.outputs[0]
            integer = self._node("MaxPool", [integer], f"{layer}/pooled", _UINT8, old.shape, dict(pooling.attributes))
        inputs = [integer, out_scale, out_zero_point]
        restored = self._node("DequantizeLinear", inputs, f"{layer}/dequantize", _FLOAT, old.shape)
        if not (gelu := _gelu_of(old)):
            self.values[old] = restored
            return
        # ONNX Runtime fuses GELU's five nodes into this one by itself, but not behind a DequantizeLinear: it copies that for each user.
        self.skipped.update(gelu)
        old = gelu[-1].outputs[0]
        output = self.values[old] = ir.Value(name=old.name, shape=old.shape, type=old.type)
        self.nodes.append(ir.Node(_CONTRIB, "Gelu", [restored], outputs=[output], name=f"{layer}/Gelu"))

    # Parts -----------------------------------------------------------------------------------------

    def _quantized(self, source: ir.Value, layer: str) -> _Quantized:
        """Activations as integers, with their scale and zero point; made once for all layers that read them."""
        if source not in self.quantized:
            params, values = self.params[layer], self.value(source)
            zero = params.zero_point
            if self.target == "tensorrt" and zero:
                offset = self._constant(np.float32(_shift(params)))
                values, zero = self._node("Sub", [values, offset], f"{layer}/shift", _FLOAT, source.shape), np.int8(0)
            scale, zero_point = self._constant(params.scale), self._constant(zero)
            dtype = _UINT8 if params.dtype == np.uint8 else _INT8
            inputs = [values, scale, zero_point]
            q = self._node("QuantizeLinear", inputs, f"{layer}/quantize", dtype, source.shape)
            self.quantized[source] = q, scale, zero_point
        return self.quantized[source]

    def _int8_weight(self, weight: ir.Value, layer: str) -> tuple[ir.Value, ir.Value]:
        """The weight [in, out] as int8 and its scales [out]; stored once, whoever uses them."""
        names = f"{layer}{_WEIGHT}.int8", f"{layer}{_WEIGHT}.scale"
        if names[0] in self.weights:
            return self.weights[names[0]], self.weights[names[1]]
        assert weight.const_value is not None
        integers, scales = quantize_weight(weight.const_value.numpy())
        return self._stored(names[0], integers), self._stored(names[1], scales)

    def _int8_filters(self, weight: ir.Value, layer: str) -> tuple[ir.Value, ir.Value]:
        """The weight [out, in, height, width] as int8 and its scales [out]."""
        assert weight.const_value is not None
        integers, scales = quantize_filters(weight.const_value.numpy())
        return self._stored(f"{layer}{_FILTERS}.int8", integers), self._stored(f"{layer}{_FILTERS}.scale", scales)

    def _stored(self, name: str, array: NDArray[Any]) -> ir.Value:
        value = self.weights[name] = _initializer(name, array)
        return value

    def _int32_bias(self, bias: ir.Value, scale: np.float32, scales: ir.Value) -> ir.Value:
        """A bias [out] in units of the integer sums."""
        assert bias.const_value is not None
        assert scales.const_value is not None
        units = np.float64(scale) * scales.const_value.numpy()
        return self._constant(np.round(bias.const_value.numpy() / units).astype(np.int32))

    def _constant(self, number: np.float32 | np.int8 | np.uint8 | NDArray[np.int32] | NDArray[np.float32]) -> ir.Value:
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


def _shift(params: QuantParams) -> float:
    """c: what is taken from values before they become integers without a zero point."""
    return -float(params.scale) * int(params.zero_point)


def _gelu_of(x: ir.Value) -> list[ir.Node]:
    """The nodes of (x · (1 + erf(x/√2))) · ½, where nothing else reads x; else none."""
    users = {use.node.op_type: use.node for use in x.uses()}
    if len(x.uses()) != 2 or users.keys() != {"Div", "Mul"}:
        return []
    found = [users["Div"]]
    for op_type in ("Erf", "Add", "Mul", "Mul"):
        following = only_user(found[-1])
        if following is None or following.op_type != op_type:
            return []
        found.append(following)
    return found if found[3] is users["Mul"] else []


def _initializer(name: str, array: NDArray[Any]) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
