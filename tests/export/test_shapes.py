"""The assembled graph equals eager: every depth, batch and halting threshold, on real images, in ONNX Runtime."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vitrm.export.shapes import loop, unrolled
from vitrm.runtime.metadata import (
    HALT_PROB,
    HALT_THRESHOLD,
    LOGITS,
    PIXELS,
    STEP_HALT_PROB,
    STEP_LOGITS,
    STEPS,
    STEPS_USED,
)


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
    # A quantiser finds its weights as the constant right-hand side of a MatMul, never behind a Transpose.
    for node in deep.graph:
        if node.op_type == "Transpose":
            assert node.inputs[0].const_value is None
    assert sum(n.op_type == "MatMul" and n.inputs[1].name.endswith(".T") for n in deep.graph) > 16


def test_nodes_say_where_they_come_from(recursion):
    names = {n.name for n in unrolled(recursion, 2).graph}
    assert "step2/recursion1/latents1/block.1.ffn.up/MatMul" in names
    assert "step1/recursion2/answer/block.0.q/MatMul" in names
    assert len(names) == len(list(unrolled(recursion, 2).graph))


@pytest.fixture(scope="module")
def loop_session(recursion):
    return session(loop(recursion))


def run_loop(s, images, steps, threshold):
    feeds = {PIXELS: images, STEPS: np.array(steps, np.int64), HALT_THRESHOLD: np.array(threshold, np.float32)}
    return s.run([LOGITS, HALT_PROB, STEPS_USED], feeds)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.sampled_from([1, 2, 3, 6, 16]),
    threshold=st.one_of(st.floats(0, 1, width=32), st.sampled_from([-math.inf, -1.0, 2.0, math.inf, math.nan])),
    batch=st.sampled_from([1, 2, 5, 33]),
    seed=st.integers(0, 1000),
)
def test_loop_equals_eager(loop_session, trajectory, digits, steps, threshold, batch, seed):
    rows = np.random.default_rng(seed).permutation(len(digits))[:batch]
    logits, halt_prob, steps_used = run_loop(loop_session, digits[rows], steps, threshold)
    all_logits, halts = (t[:steps, rows] for t in trajectory)
    halted = halts > threshold
    expected = np.where(halted.any(0), halted.argmax(0), steps - 1) + 1
    clear = ~(np.abs(halts - threshold) <= 1e-5).any(0)  # on the threshold itself, rounding decides
    np.testing.assert_array_equal(steps_used[clear], expected[clear])
    columns = np.arange(batch)
    np.testing.assert_allclose(logits, all_logits[steps_used - 1, columns], atol=1e-4)
    np.testing.assert_allclose(halt_prob, halts[steps_used - 1, columns], atol=1e-4)


@pytest.mark.parametrize("steps", [0, -1, -(2**62)])
def test_a_loop_runs_at_least_one_step(loop_session, trajectory, digits, steps):
    logits, _, steps_used = run_loop(loop_session, digits[:3], steps, 2.0)
    assert steps_used.tolist() == [1, 1, 1]
    np.testing.assert_allclose(logits, trajectory[0][0, :3], atol=1e-4)


def test_a_million_steps_end_with_the_last_halt(loop_session, digits):
    # All samples halt after the first step, so the trip limit is not what ends the loop.
    assert run_loop(loop_session, digits[:3], 10**6, -1.0)[2].tolist() == [1, 1, 1]


def test_a_sample_does_not_depend_on_its_batch_mates(loop_session, trajectory, digits):
    threshold = float(np.quantile(trajectory[1][:6].max(0), 0.5))  # half of the samples halt at some step
    together = run_loop(loop_session, digits, 6, threshold)
    assert len(set(together[2].tolist())) > 1
    for i in (0, 17, 100):
        alone = run_loop(loop_session, digits[i : i + 1], 6, threshold)
        assert alone[2][0] == together[2][i]
        np.testing.assert_allclose(alone[0][0], together[0][i], atol=1e-5)


def test_a_loop_is_as_small_as_one_step(recursion):
    nodes = sum(1 for _ in ir.traversal.RecursiveGraphIterator(loop(recursion).graph))
    assert nodes < sum(1 for _ in unrolled(recursion, 1).graph) + 40
    weights = {k for k in loop(recursion).graph.initializers if not k.startswith("const.")}
    assert weights == {k for k in unrolled(recursion, 1).graph.initializers if not k.startswith("const.")}
