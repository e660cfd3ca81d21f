"""The assembled graph equals eager: every depth, batch and halting threshold, on real images, in ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from vitrm.export.shapes import unrolled
from vitrm.runtime.metadata import HALT_PROB, LOGITS, PIXELS, STEP_HALT_PROB, STEP_LOGITS, STEPS_USED


def session(model: ir.Model) -> onnxruntime.InferenceSession:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


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
