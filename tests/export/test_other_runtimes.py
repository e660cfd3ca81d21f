"""Other runtimes than ONNX Runtime take the graphs, the loop included, and give the same answers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from small_models import clear_threshold

from vitrm.export.graph.layouts import loop, unrolled
from vitrm.runtime.artifact.graph_names import HALT_PROB, HALT_THRESHOLD, LOGITS, PIXELS, STEPS, STEPS_USED

pytestmark = pytest.mark.slow

STEP_LIMIT = 4


@pytest.fixture(scope="module")
def threshold(model, digits) -> float:
    """Between two halting probabilities, so that about half of the samples halt early."""
    with torch.no_grad():
        return clear_threshold(model.trajectory(torch.from_numpy(digits[:5]), STEP_LIMIT)[1])


@pytest.fixture(scope="module")
def expected(model, digits, threshold):
    with torch.no_grad():
        return model(torch.from_numpy(digits[:5]), STEP_LIMIT, threshold)


def feeds(digits, threshold):
    depth = {STEPS: np.array(STEP_LIMIT, np.int64), HALT_THRESHOLD: np.array(threshold, np.float32)}
    return {PIXELS: digits[:5], **depth}


def check(results, expected):
    logits, halt_prob, steps_used = results
    assert len(set(expected.steps_used.tolist())) > 1, "all samples stop together, so halting is not tested"
    np.testing.assert_array_equal(steps_used, expected.steps_used.numpy())
    np.testing.assert_allclose(logits, expected.logits.numpy(), atol=1e-4)
    np.testing.assert_allclose(halt_prob, expected.halt_prob.numpy(), atol=1e-4)


@pytest.mark.parametrize("graph", ["unrolled", "loop"])
def test_the_reference_evaluator(recursion, digits, threshold, expected, graph):
    model = loop(recursion) if graph == "loop" else unrolled(recursion, STEP_LIMIT, threshold)
    given = feeds(digits, threshold) if graph == "loop" else {PIXELS: digits[:5]}
    evaluator = ReferenceEvaluator(ir.to_proto(model))
    check(evaluator.run([LOGITS, HALT_PROB, STEPS_USED], given), expected)


@pytest.mark.parametrize("graph", ["unrolled", "loop"])
def test_openvino(recursion, digits, threshold, expected, graph, tmp_path):
    openvino = pytest.importorskip("openvino", reason="needs OpenVINO: pip install openvino")
    model = loop(recursion) if graph == "loop" else unrolled(recursion, STEP_LIMIT, threshold)
    given = feeds(digits, threshold) if graph == "loop" else {PIXELS: digits[:5]}
    ir.save(model, tmp_path / "model.onnx")
    core = openvino.Core()
    # On processors with bfloat16 it would compute in that.
    compiled = core.compile_model(str(tmp_path / "model.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    results = compiled(given)
    check([results[name] for name in (LOGITS, HALT_PROB, STEPS_USED)], expected)
