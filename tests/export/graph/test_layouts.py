"""The assembled graph equals eager: every depth, batch and halting threshold, on real images, in ONNX Runtime."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import reference
import torch

from vitrm.export.graph.fragments import trace_vitrm
from vitrm.export.graph.layouts import Recursion, loop, unrolled
from vitrm.runtime.artifact.graph_names import (
    HALT_PROB,
    HALT_THRESHOLD,
    LOGITS,
    PIXELS,
    STEP_HALT_PROB,
    STEP_LOGITS,
    STEPS,
    STEPS_USED,
)
from vitrm.runtime.artifact.metadata import MAX_STEPS

pytestmark = pytest.mark.slow


def session(model: ir.Model) -> onnxruntime.InferenceSession:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def trajectory(model, digits):
    """Eager's heads after each of 16 steps on all validation digits: logits [16, n, 10], halt_prob [16, n]."""
    with torch.no_grad():
        return tuple(t.numpy() for t in model.trajectory(torch.from_numpy(digits), 16))


@pytest.mark.parametrize("steps", [1, 2, 3, 6, 16])
def test_unrolled_equals_eager(recursion, model, digits, steps):
    s = session(unrolled(recursion, steps))
    for batch in (1, 2, 33):
        logits, halt_prob, steps_used = s.run([LOGITS, HALT_PROB, STEPS_USED], {PIXELS: digits[:batch]})
        with torch.no_grad():
            eager = model(torch.from_numpy(digits[:batch]), steps)
        np.testing.assert_allclose(logits, eager.logits.numpy(), atol=1e-4)
        np.testing.assert_allclose(halt_prob, eager.halt_prob.numpy(), atol=1e-4)
        assert steps_used.tolist() == [steps] * batch
        assert logits.dtype == halt_prob.dtype == np.float32
        assert steps_used.dtype == np.int64


def test_every_step_is_an_output(recursion, model, digits):
    s = session(unrolled(recursion, 4, every_step=True))
    logits, steps, halts = s.run([LOGITS, STEP_LOGITS, STEP_HALT_PROB], {PIXELS: digits[:5]})
    with torch.no_grad():
        eager_logits, eager_halts = model.trajectory(torch.from_numpy(digits[:5]), 4)
    np.testing.assert_allclose(steps, eager_logits.numpy(), atol=1e-4)
    np.testing.assert_allclose(halts, eager_halts.numpy(), atol=1e-4)
    np.testing.assert_array_equal(logits, steps[-1])
    assert np.abs(np.diff(steps, axis=0)).max() > 1e-2, "steps should differ, or their order is not tested"


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
def test_baked_halting_equals_eager(recursion, model, digits, quantile):
    images = torch.from_numpy(digits[:33])
    with torch.no_grad():
        halts = model.trajectory(images, 6)[1]
        threshold = float(halts.quantile(quantile))
        eager = model(images, 6, threshold)
    logits, steps_used = session(unrolled(recursion, 6, threshold)).run([LOGITS, STEPS_USED], {PIXELS: digits[:33]})
    # Samples on the threshold itself are decided by rounding.
    clear = ((halts - threshold).abs() > 1e-5).all(0).numpy()
    assert clear.sum() > 25
    assert len(set(steps_used.tolist())) > 1
    np.testing.assert_array_equal(steps_used[clear], eager.steps_used.numpy()[clear])
    np.testing.assert_allclose(logits[clear], eager.logits.numpy()[clear], atol=1e-4)


def test_weights_are_stored_once_under_their_names(recursion, model):
    shallow, deep = unrolled(recursion, 1), unrolled(recursion, 16)
    stored = {k: v for k, v in deep.graph.initializers.items() if not k.startswith("const.")}
    assert set(stored) == {k for k in shallow.graph.initializers if not k.startswith("const.")}
    parameters = dict(model.named_parameters())
    assert {k.removesuffix(".T") for k in stored} - {"mean", "std"} == set(parameters)
    for name, value in stored.items():
        if name not in ("mean", "std"):
            parameter = parameters[name.removesuffix(".T")].detach().numpy()
            np.testing.assert_array_equal(value.const_value.numpy(), parameter.T if name.endswith(".T") else parameter)
    # A quantizer finds its weights as the constant right-hand side of a MatMul, never behind a Transpose.
    for node in deep.graph:
        if node.op_type == "Transpose":
            assert node.inputs[0].const_value is None
    assert sum(n.op_type == "MatMul" and n.inputs[1].name.endswith(".T") for n in deep.graph) > 16


def test_nodes_say_where_they_come_from(recursion):
    names = {n.name for n in unrolled(recursion, 2).graph}
    assert "step2/recursion1/latents1/block.1.ffn.up/MatMul" in names
    assert "step1/recursion2/project_latents1/block.0.q/MatMul" in names
    assert len(names) == len(list(unrolled(recursion, 2).graph))


@pytest.fixture(scope="module")
def loop_session(recursion):
    return session(loop(recursion))


def run_loop(s, images, steps, threshold):
    feeds = {PIXELS: images, STEPS: np.array(steps, np.int64), HALT_THRESHOLD: np.array(threshold, np.float32)}
    return s.run([LOGITS, HALT_PROB, STEPS_USED], feeds)


@pytest.mark.parametrize("threshold", [math.nan, math.inf, -math.inf, -1.0, 0.0, 1.0, 2.0])
@pytest.mark.parametrize("steps", [-(2**62), -1, 0, 2, 10**6])
def test_a_loop_ends_whatever_it_is_told(loop_session, trajectory, digits, steps, threshold):
    expected = min(max(steps, 1), MAX_STEPS) if not threshold < 1 else 1
    logits, _, steps_used = run_loop(loop_session, digits[:2], steps, threshold)
    assert steps_used.tolist() == [expected] * 2
    assert np.isfinite(logits).all()
    if expected <= 16:
        np.testing.assert_allclose(logits, trajectory[0][expected - 1, :2], atol=1e-4)
    logits, halt_prob, steps_used = run_loop(loop_session, digits[:0], steps, threshold)
    assert (logits.shape, halt_prob.shape, steps_used.shape) == ((0, 10), (0,), (0,))


def test_a_loop_is_as_small_as_one_step(recursion):
    nodes = sum(1 for _ in ir.traversal.RecursiveGraphIterator(loop(recursion).graph))
    assert nodes < sum(1 for _ in unrolled(recursion, 1).graph) + 40
    weights = {k for k in loop(recursion).graph.initializers if not k.startswith("const.")}
    assert weights == {k for k in unrolled(recursion, 1).graph.initializers if not k.startswith("const.")}


def test_a_trip_of_the_loop_computes_nothing_twice(recursion):
    body = next(node for node in loop(recursion).graph if node.op_type == "Loop").attributes["body"].as_graph()
    config = recursion.config
    products = [n.inputs[1].name for n in body if n.op_type == "MatMul" and n.inputs[1].const_value is not None]
    # Layer 1 projects each y and each z once, though two updates, of two steps even, read it.
    assert products.count("block.0.q.weight.T") == config.recursions * (1 + config.n)
    assert not [n.name for n in body if n.op_type == "Identity"], "outputs carry their names without a copy"


def test_onnxruntime_fuses_gelu(tmp_path):
    gelu = reference.shaken("tiny")
    ir.save(unrolled(Recursion(gelu.config, trace_vitrm(gelu)), 1), tmp_path / "in.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "out.onnx")
    onnxruntime.InferenceSession(str(tmp_path / "in.onnx"), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(str(tmp_path / "out.onnx")).graph.node]
    assert "Erf" not in kinds
    assert kinds.count("BiasGelu") == (gelu.config.n + 1) * gelu.config.layers
