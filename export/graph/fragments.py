"""The model's functions as ONNX fragments, each traced once.

    embed(pixel_values) → embedded, y₀, z₀              once per image
    look(embedded, glimpse) → read, glimpse             eq. 1', once per step, where the model has glimpses; elsewhere read is embedded
    project_answer(y) → of_y                            layer 1's projection of an answer: once per answer, for all
    project_latents(z) → of_z                           that read it; of latents: once per latents
    latents(read, y, of_y, z, of_z) → z                 eq. 2
    answer(y, of_y, z, of_z) → y                        eq. 3
    heads(y) → logits, halt_prob                        eq. 4

`embedded`, `read`, `of_y` and `of_z` are as many tensors as the model says: attention projects q, k and v, for one.

Whatever layout is assembled from them, at whatever depth, the tracer's cost and the weights are paid
once.  A fragment's weights carry their names in the checkpoint (`block.0.q.weight`), its nodes the
module they came from (`block.0.q/MatMul`), so that a profile or a quantizer can tell sites apart.
"""

from __future__ import annotations

import json
import logging
import warnings
from ast import literal_eval
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from vitrm.baselines.networks import Baseline
from vitrm.layers import glimpses
from vitrm.model import ViTRM
from vitrm.runtime.artifact.graph_names import ANSWER, LATENTS

OPSET = 18  # JetPack 6's TensorRT takes up to 20; nothing here needs more than 18
# By name: a function of tensors, and example inputs.
Function = tuple[Callable[..., tuple[Tensor, ...]], Sequence[Tensor]]
Functions = Mapping[str, Function]

BATCH = "batch"  # the dynamic axis, everywhere
_TRACE_BATCH = 2  # a batch of 1 would be traced as a constant


@dataclass(frozen=True)
class Fragment:
    """A traced function: nodes in topological order between named inputs and outputs.

    `weights` are the initializers with a name in the checkpoint (transposed ones end in `.T`),
    `constants` the small unnamed ones.
    """

    name: str
    inputs: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]
    nodes: tuple[ir.Node, ...]
    weights: dict[str, ir.Value]
    constants: tuple[ir.Value, ...]


@dataclass(frozen=True)
class Fragments:
    """All fragments of a ViTRM."""

    embed: Fragment
    project_answer: Fragment
    project_latents: Fragment
    latents: Fragment
    answer: Fragment
    heads: Fragment
    look: Fragment | None  # of a model with glimpses
    embedded_names: tuple[str, ...]  # of the tensors that embed gives before y₀ and z₀
    projected_names: tuple[str, ...]  # of the tensors that a projection gives

    @property
    def state_names(self) -> tuple[str, ...]:
        """Of what goes from step to step: y, z, layer 1's projection of z, and with glimpses the number of the next view."""
        projected = (f"{LATENTS}_{name}" for name in self.projected_names)
        return ANSWER, LATENTS, *projected, *([glimpses.NAME] if self.look else [])


def trace_vitrm(model: ViTRM) -> Fragments:
    """Traces a ViTRM on the CPU; the batch stays dynamic."""
    size = model.config.image_size

    read, projected = len(model.read_names), len(model.projected_names)

    def embed(images: Tensor) -> tuple[Tensor, ...]:
        state = model.initial_state(images.shape[0])
        return *model.embed(images), *state.carried

    def look(images: Tensor, glimpse: Tensor) -> tuple[Tensor, ...]:
        found, after = model.look((images,), glimpse)
        return *found, after

    def latents(*tensors: Tensor) -> tuple[Tensor, ...]:
        found, (y, *of_y), (z, *of_z) = tensors[:read], tensors[read : -1 - projected], tensors[-1 - projected :]
        return (model.update_latents(found, y, tuple(of_y), z, tuple(of_z)),)

    def answer(*tensors: Tensor) -> tuple[Tensor, ...]:
        (y, *of_y), (z, *of_z) = tensors[: 1 + projected], tensors[1 + projected :]
        return (model.update_answer(y, tuple(of_y), z, tuple(of_z)),)

    def heads(y: Tensor) -> tuple[Tensor, ...]:
        # halt_prob stays a column: it decides over rows of logits.
        return model.classifier(y[:, 0]), model.halt(y[:, 0]).sigmoid()

    with torch.no_grad():
        images = torch.rand(_TRACE_BATCH, 3, size, size)
        state = model.initial_state(_TRACE_BATCH)
        y, z = state.y, state.z
        found = model.read(model.tokens(images))
        of_y, of_z = model.project_answer(y), model.project_latents(z)
    functions: dict[str, Function] = {
        "embed": (embed, [images]),
        "project_answer": (model.project_answer, [y]),
        "project_latents": (model.project_latents, [z]),
        "latents": (latents, [*found, y, *of_y, z, *of_z]),
        "answer": (answer, [y, *of_y, z, *of_z]),
        "heads": (heads, [y]),
    }
    if state.glimpse is not None:
        functions["look"] = (look, [images, state.glimpse])
    traced = trace(model, functions)
    return Fragments(
        look=traced.pop("look", None),
        **traced,
        embedded_names=model.embedded_names,
        projected_names=model.projected_names,
    )


def trace_baseline(model: Baseline) -> Fragment:
    """Traces a whole baseline as one fragment, pixel_values → logits."""
    size = model.config.image_size

    def net(images: Tensor) -> tuple[Tensor, ...]:
        return (model(images),)

    return trace(model, {"net": (net, [torch.rand(_TRACE_BATCH, 3, size, size)])})["net"]


def trace(model: nn.Module, functions: Functions) -> dict[str, Fragment]:
    """Traces functions of `model`, given with example inputs that all have the batch first, in one run of torch's exporter.

    The exporter costs a second before it looks at the first operator, so the functions go in side by side, on
    inputs of their own, and the graph that comes out falls apart into theirs.
    """
    # A batch axis for each function: with one for all, the size of one's batch may be read off another's input.
    # From 2 on, as torch 2.9 does not trace some of them for a batch of 1 too: the graph is the same, and verification compares a batch of 1.
    axes = [
        torch.export.Dim(f"{BATCH}_{name}", min=2, max=1 << 16) for name, (_, args) in functions.items() for _ in args
    ]
    # Every input is its own contiguous tensor, as it will be when one fragment's output feeds another.
    inputs = [t.clone(memory_format=torch.contiguous_format) for _, args in functions.values() for t in args]
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            _SideBySide(model, functions).eval(),
            (tuple(inputs),),
            dynamo=True,
            dynamic_shapes=(tuple({0: axis} for axis in axes),),
            opset_version=OPSET,
            optimize=False,
            verbose=False,
        )
        assert program is not None
        graph = program.model.graph
        # Before the optimizer, which would fold them too, but lose the weights' names.
        fold_weight_transposes(graph)
        program.optimize()
        halve_gelu_last(graph)
    parameters = {f"model.{n}" for n, _ in (*model.named_parameters(), *model.named_buffers())}
    fragments: dict[str, Fragment] = {}
    inputs_left, outputs_left = list(graph.inputs), list(graph.outputs)
    for name, (function, args) in functions.items():
        count = len(function(*args))
        own_inputs, inputs_left = inputs_left[: len(args)], inputs_left[len(args) :]
        own_outputs, outputs_left = outputs_left[:count], outputs_left[count:]
        fragments[name] = _cut(name, graph, own_inputs, own_outputs, parameters)
    return fragments


def _cut(
    name: str, graph: ir.Graph, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], parameters: set[str]
) -> Fragment:
    """The part of `graph` that makes `outputs`."""
    wanted, stack = set[ir.Node](), [v.producer() for v in outputs]
    while stack:
        node = stack.pop()
        if node is not None and node not in wanted:
            wanted.add(node)
            stack.extend(v.producer() for v in node.inputs if v is not None)
    nodes = [node for node in graph if node in wanted]
    for own in (*inputs, *(out for node in nodes for out in node.outputs)):
        if own.shape is not None:
            own.shape = ir.Shape([BATCH if d == f"{BATCH}_{name}" else d for d in own.shape])
    taken: set[str] = set()
    weights: dict[str, ir.Value] = {}
    constants: dict[ir.Value, ir.Value] = {}  # the shared graph's → the fragment's own
    for node in nodes:
        node.name = _unique(f"{_site(node)}/{node.op_type}", taken)
        node.metadata_props.clear()
        node.doc_string = None
        for i, value in enumerate(node.inputs):
            if value is None or value.const_value is None or value.producer() is not None:
                continue
            if value not in constants:
                constants[value] = ir.Value(
                    name=value.name, shape=value.shape, type=value.type, const_value=value.const_value
                )
            node.replace_input_with(i, constants[value])
    for value in list(constants):
        if value.name is not None and value.name.removesuffix(".T") in parameters:
            weights[_own_name(value.name)] = constants.pop(value)
    return Fragment(name, tuple(inputs), tuple(outputs), tuple(nodes), weights, tuple(constants.values()))


def fold_weight_transposes(graph: ir.Graph) -> None:
    """Replaces Transpose(weight) by the transposed weight, named `weight.T`.

    torch writes a Linear as MatMul(h, Transpose(W)).  Quantizers look for a MatMul with a constant
    on its right and pass over this one in silence.
    """
    for node in list(graph):
        source = node.inputs[0] if node.op_type == "Transpose" else None
        if source is None or source.name is None or source.name not in graph.initializers:
            continue
        assert source.const_value is not None
        permutation = node.attributes["perm"].as_ints()
        array = np.ascontiguousarray(np.transpose(source.const_value.numpy(), permutation))
        folded = graph.initializers.get(f"{source.name}.T")
        if folded is None:
            tensor = ir.tensor(array, name=f"{source.name}.T")
            folded = ir.Value(
                name=tensor.name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            graph.register_initializer(folded)
        node.outputs[0].replace_all_uses_with(folded)
        graph.remove(node, safe=True)
        if not source.uses():
            del graph.initializers[source.name]


def halve_gelu_last(graph: ir.Graph) -> None:
    """Rewrites x · (½ · (1 + erf(x/√2))) as (x · (1 + erf(x/√2))) · ½.

    The same number, but for overflow far outside of GELU's range: halving is exact.  ONNX Runtime fuses the second
    form into one kernel, bias included, and runs torch's, the first, as five.
    """
    for erf in [node for node in graph if node.op_type == "Erf"]:
        add = only_user(erf)
        half = only_user(add) if add is not None and add.op_type == "Add" else None
        last = only_user(half) if half is not None and half.op_type == "Mul" else None
        if add is None or half is None or last is None or last.op_type != "Mul":
            continue
        by = next(v for v in half.inputs if v is not add.outputs[0])
        x = next(v for v in last.inputs if v is not half.outputs[0])
        if by is None or by.const_value is None or x is None:
            continue
        half.replace_input_with(0, x)
        half.replace_input_with(1, add.outputs[0])
        last.replace_input_with(0, half.outputs[0])
        last.replace_input_with(1, by)
        half.outputs[0].shape = x.shape


def only_user(node: ir.Node) -> ir.Node | None:
    """The one node that reads the first output of `node`; None where there are several, or none."""
    users = [use.node for use in node.outputs[0].uses()]
    return users[0] if len(users) == 1 else None


def _site(node: ir.Node) -> str:
    """The module a node was traced from, e.g. `block.0.ffn.up`."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]")
    try:
        names = literal_eval(scopes)
    except (ValueError, SyntaxError):
        names = json.loads(scopes)
    inner = [
        _own_name(n) for n in names[:-1] if not n.startswith("_")
    ]  # torch marks unknown origins with an underscore
    return next((n for n in reversed(inner) if n), "model")


def _own_name(name: str) -> str:
    return name.removeprefix("model").removeprefix(".")


def _unique(name: str, taken: set[str]) -> str:
    candidate, i = name, 1
    while candidate in taken:
        candidate, i = f"{name}.{i}", i + 1
    taken.add(candidate)
    return candidate


@contextmanager
def _quiet() -> Iterator[None]:
    """Torch's exporter warns of things that are as they should be here (shared batch names, unset metadata)."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


class _SideBySide(nn.Module):
    """Functions of one model, each on its own inputs, as one module."""

    def __init__(self, model: nn.Module, functions: Functions) -> None:
        super().__init__()
        self.model = model
        self.functions = list(functions.values())

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        outputs: list[Tensor] = []
        at = 0
        for function, args in self.functions:
            outputs.extend(function(*inputs[at : at + len(args)]))
            at += len(args)
        return tuple(outputs)
