"""Graphs from fragments: nodes copied as often as the recursion needs them, weights stored once.

An `Assembly` collects nodes for one graph.  `apply` copies a fragment's nodes behind given inputs; its
weights become initializers of the outermost graph under their checkpoint names, where every copy, and a
loop body too, refers to them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import ArrayLike

from vitrm.export.graph.fragments import OPSET, Fragment

IR_VERSION = 9  # of opset 18 … 20's time: what JetPack 6 and older runtimes read


class Initializers:
    """The outermost graph's constants, each stored once."""

    def __init__(self) -> None:
        self.values: dict[str, ir.Value] = {}
        self._by_content: dict[tuple[int, tuple[int, ...], bytes], ir.Value] = {}

    def weight(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """The weight `name`; two fragments that both have it share it."""
        known = self.values.get(name)
        if known is None:
            known = self._add(name, tensor)
        elif known.const_value is not tensor:
            assert known.const_value is not None
            # A fragment traced twice must not give one name to two values: that would corrupt the model in silence.
            if not np.array_equal(known.const_value.numpy(), tensor.numpy()):
                raise ValueError(f"two fragments disagree on the weight {name}")
        return known

    def constant(self, tensor: ir.TensorProtocol) -> ir.Value:
        """A small constant, found again by its content."""
        array = tensor.numpy()
        key = (int(tensor.dtype), array.shape, array.tobytes())
        if key not in self._by_content:
            self._by_content[key] = self._add(f"const.{len(self._by_content)}", tensor)
        return self._by_content[key]

    def _add(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=name, shape=ir.Shape(tuple(tensor.shape.numpy())), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self.values[name] = value
        return value


class Assembly:
    """Nodes of one graph (the main one or a loop's body) under construction."""

    def __init__(self, initializers: Initializers | None = None) -> None:
        self.initializers = initializers or Initializers()
        self.nodes: list[ir.Node] = []
        self._names: set[str] = set()

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        """A graph input; a string in `shape` is a dynamic axis."""
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))

    def apply(self, fragment: Fragment, inputs: Sequence[ir.Value], scope: str) -> list[ir.Value]:
        """Copies `fragment` behind `inputs`; new nodes and values are named `scope/…`.  Returns its outputs."""
        if len(inputs) != len(fragment.inputs):
            raise ValueError(f"fragment {fragment.name} takes {len(fragment.inputs)} inputs, got {len(inputs)}")
        values: dict[ir.Value, ir.Value] = dict(zip(fragment.inputs, inputs, strict=True))
        for name, value in fragment.weights.items():
            assert value.const_value is not None
            values[value] = self.initializers.weight(name, value.const_value)
        for value in fragment.constants:
            assert value.const_value is not None
            values[value] = self.initializers.constant(value.const_value)
        for node in fragment.nodes:
            outputs = [ir.Value(shape=out.shape, type=out.type) for out in node.outputs]
            values.update(zip(node.outputs, outputs, strict=True))
            self._append(
                ir.Node(
                    node.domain,
                    node.op_type,
                    [None if v is None else values[v] for v in node.inputs],
                    node.attributes,
                    outputs=outputs,
                ),
                f"{scope}/{node.name}",
            )
        return [values[v] for v in fragment.outputs]

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        name: str,
        *,
        dtype: ir.DataType,
        shape: Sequence[int | str | ir.SymbolicDim] | None,
        attributes: Mapping[str, int | float | str | Sequence[int] | ir.Graph] | None = None,
    ) -> ir.Value:
        """One node with one output, both called `name`."""
        output = ir.Value(shape=None if shape is None else ir.Shape(shape), type=ir.TensorType(dtype))
        node = ir.node(op_type, inputs, attributes or {}, outputs=[output])
        self._append(node, name)
        return output

    def add(self, node: ir.Node, name: str) -> ir.Node:
        """A ready-made node; its outputs are named after it."""
        self._append(node, name)
        return node

    def constant(self, array: ArrayLike, dtype: type[np.generic]) -> ir.Value:
        """A shared constant."""
        return self.initializers.constant(ir.tensor(np.asarray(array, dtype)))

    def _append(self, node: ir.Node, name: str) -> None:
        if name in self._names:
            raise ValueError(f"two nodes are called {name}")
        self._names.add(name)
        node.name = name
        for i, output in enumerate(node.outputs):
            output.name = name if i == 0 else f"{name}:{i}"
        self.nodes.append(node)

    def model(
        self,
        inputs: Sequence[ir.Value],
        outputs: Mapping[str, ir.Value],
        graph_name: str,
        *,
        intermediate_shapes: bool = True,
    ) -> ir.Model:
        """The finished model, with `outputs` under their public names.

        Without `intermediate_shapes` the file leaves to its readers to infer types and shapes between the nodes: over
        thousands of nodes they would be several per cent of its size.
        """
        nodes = _all_nodes(self.nodes)
        used = {v for n in nodes for v in n.inputs if v is not None}
        named, opsets = self._named(outputs), _opsets(nodes)
        if not intermediate_shapes:
            for value in {v for node in self.nodes for v in node.outputs}.difference(named):
                value.shape = value.type = None
        graph = ir.Graph(
            inputs,
            named,
            nodes=self.nodes,
            initializers=[v for v in self.initializers.values.values() if v in used],
            opset_imports=opsets,
            name=graph_name,
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="vitrm")

    def body(self, inputs: Sequence[ir.Value], outputs: Mapping[str, ir.Value], graph_name: str) -> ir.Graph:
        """The finished body of a Loop; its weights stay with the outermost graph."""
        return ir.Graph(inputs, self._named(outputs), nodes=self.nodes, name=graph_name)

    def _named(self, outputs: Mapping[str, ir.Value]) -> list[ir.Value]:
        """The graph's outputs under these names.  A node's output takes the name itself: an Identity costs microseconds
        a step.  Only a value that serves twice, is an input or a constant needs one.
        """
        produced = {v for node in self.nodes for v in node.outputs}
        named: list[ir.Value] = []
        for name, v in outputs.items():
            if v in produced and v not in named:
                v.name = name
                named.append(v)
            else:
                shape = None if v.shape is None else tuple(v.shape)
                named.append(self.op("Identity", [v], name, dtype=v.dtype or ir.DataType.FLOAT, shape=shape))
        return named


def _opsets(nodes: Sequence[ir.Node]) -> dict[str, int]:
    """The opsets that the nodes need: quantizing float16 came with opset 19, which changes nothing else that is used here."""
    half = any(
        n.op_type == "QuantizeLinear" and n.inputs[0] and n.inputs[0].dtype == ir.DataType.FLOAT16 for n in nodes
    )
    return {"": 19 if half else OPSET, **{n.domain: 1 for n in nodes if n.domain}}


def _all_nodes(nodes: Sequence[ir.Node]) -> list[ir.Node]:
    """The nodes and those of their subgraphs."""
    every = []
    for node in nodes:
        every.append(node)
        for attribute in node.attributes.values():
            if isinstance(attribute, ir.Attr) and attribute.type == ir.AttributeType.GRAPH:
                every.extend(_all_nodes(list(attribute.as_graph())))
    return every
