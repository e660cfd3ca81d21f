"""Integer sums that could saturate on some CPU are seen in the graph, whatever this CPU makes of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_models import with_props

from vitrm.runtime.artifact.saturation_check import integer_products
from vitrm.runtime.backends.onnxruntime.session import SATURATES
from vitrm.runtime.session import open_session
from vitrm.runtime.system import machine

pytestmark = pytest.mark.slow

SAFE = np.tile(np.array([[1, -128], [127, 127], [127, 1], [1, 127]], np.int8), (16, 1))  # 2i and 2i + 1: at most 128
UNSAFE = np.tile(np.array([[2, 1], [127, 1]], np.int8), (32, 1))


def graph(nodes: Sequence[onnx.NodeProto], inputs: dict[str, int], **constants: np.ndarray) -> onnx.GraphProto:
    values = [helper.make_tensor_value_info(name, kind, None) for name, kind in inputs.items()]
    stored = [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()]
    return helper.make_graph(nodes, "g", values, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], stored)


def to_float(weight: np.ndarray) -> onnx.GraphProto:
    """ONNX Runtime's integer product, as vitrm-export writes it for a CPU."""
    node = helper.make_node("MatMulIntegerToFloat", ["a", "w", "as", "ws", "az"], ["y"], domain="com.microsoft")
    one = np.float32(1)
    return graph([node], {"a": TensorProto.UINT8}, w=weight, **{"as": one, "ws": one, "az": np.uint8(0)})


def dequantized(op_type: str, weight: np.ndarray, **attributes: int) -> onnx.GraphProto:
    """A product between QuantizeLinear and DequantizeLinear."""
    nodes = [
        helper.make_node("QuantizeLinear", ["a", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "s"], ["v"]),
        helper.make_node(op_type, ["d", "v"], ["y"], **attributes),
    ]
    return graph(nodes, {"a": TensorProto.FLOAT}, w=weight, s=np.float32(1), z=np.int8(0))


@pytest.mark.parametrize(
    ("found", "saturates"),
    [
        (to_float(SAFE), False),
        (to_float(UNSAFE), True),
        (to_float((UNSAFE.astype(int) + 128).astype(np.uint8)), False),  # unsigned weights are widened
        (dequantized("MatMul", SAFE), False),
        (dequantized("MatMul", UNSAFE), True),
        (dequantized("Gemm", np.ascontiguousarray(UNSAFE.T), transB=1), True),
        (dequantized("Gemm", np.ascontiguousarray(SAFE.T), transB=1), False),
        # A convolution's weights lie in another order on every backend: any two of a channel count.
        (dequantized("Conv", np.array([64, 1, 1, 64], np.int8).reshape(1, 4, 1, 1)), False),
        (dequantized("Conv", np.array([65, 1, 1, 64], np.int8).reshape(1, 4, 1, 1)), True),
        (dequantized("Conv", np.array([-65, 1, 1, -64], np.int8).reshape(1, 4, 1, 1)), True),
    ],
)
def test_what_could_saturate(found, saturates):
    products = integer_products(found)
    assert (products.saturating, products.exact) == (({"w"}, set()) if saturates else (set(), {"w"}))


def test_weights_that_only_store_floats_are_no_integer_products():
    nodes = [helper.make_node("DequantizeLinear", ["w", "s"], ["v"]), helper.make_node("MatMul", ["a", "v"], ["y"])]
    products = integer_products(graph(nodes, {"a": TensorProto.FLOAT}, w=UNSAFE, s=np.float32(1)))
    assert not products.saturating
    assert not products.exact


def test_bodies_are_looked_into():
    inner = to_float(UNSAFE)
    weight = inner.initializer[0]
    body = helper.make_graph(list(inner.node), "body", list(inner.input), list(inner.output))
    outer = helper.make_graph([helper.make_node("Loop", ["n", "c"], ["y"], body=body)], "g", [], [], [weight])
    assert integer_products(outer).saturating == {"w"}


@pytest.mark.parametrize("rows", [1, 2, 7, 64])
@pytest.mark.parametrize("columns", [1, 16, 37, 384])
def test_what_counts_as_exact_is_exact_on_this_cpu(rows, columns):
    """At the very limit, for the shapes that kernels treat differently."""
    weight = np.tile(SAFE, (3, (columns + 1) // 2))[:, :columns]
    weight = np.concatenate([weight, weight[:3]])  # no multiple of four rows
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(to_float(weight), opset_imports=opsets, ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    some = np.random.default_rng(0).integers(0, 256, (rows, len(weight)))
    for pixels in (np.full((rows, len(weight)), 255), some):
        (sums,) = session.run(None, {"a": pixels.astype(np.uint8)})
        np.testing.assert_array_equal(sums, pixels @ weight.astype(int))


def test_an_int8_file_from_before_the_rule_has_a_note_where_it_matters(artifact, tmp_path, monkeypatch):
    old = with_props(artifact, tmp_path / "old.onnx", precision='"int8"', target='"cpu"', exact_sums=None)
    new = with_props(artifact, tmp_path / "new.onnx", precision='"int8"', target='"cpu"', exact_sums="true")
    for features, noted in ((("avx2",), True), (("avx2", "avx_vnni"), False), (("avx512f", "avx512_vnni"), False)):
        monkeypatch.setattr(machine, "cpu_features", lambda f=features: f)
        monkeypatch.setattr(machine.platform, "machine", lambda: "x86_64")
        assert (SATURATES in open_session(old).notes) == noted
        assert SATURATES not in open_session(new).notes
    monkeypatch.setattr(machine.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(machine, "cpu_features", lambda: ("asimd",))
    assert SATURATES not in open_session(old).notes
