"""What a session says of an artifact that runs on something it is not made for."""

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_models import with_props

from vitrm.runtime.backends.onnxruntime.session import CUTS_FLOAT16, cuts_float16
from vitrm.runtime.session import open_session

pytestmark = pytest.mark.slow


def test_an_onnxruntime_that_cuts_float16_off_is_told_by_its_version():
    """Found by computing: 2.9 / 1 is quantized to 3, or to 2."""
    scale, zero = np.float16(1), np.int8(0)
    graph = helper.make_graph(
        [helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, [None])],
        [helper.make_tensor_value_info("y", TensorProto.INT8, [None])],
        [numpy_helper.from_array(np.asarray(scale), "scale"), numpy_helper.from_array(np.asarray(zero), "zero")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.array([2.9, -2.9], np.float16)})
    assert found.tolist() == ([2, -2] if cuts_float16(onnxruntime.__version__) else [3, -3])


@pytest.mark.parametrize(
    ("version", "cuts"), [("1.22.0", True), ("1.29.3", True), ("1.30.0", False), ("2.0.0rc1", False)]
)
def test_versions_are_compared_as_numbers(version, cuts):
    assert cuts_float16(version) == cuts


def test_the_note_is_there_where_it_matters(artifact, tmp_path, monkeypatch):
    file = with_props(artifact, tmp_path / "a.onnx", precision='"int8"', target='"tensorrt"')
    for version, noted in (("1.29.0", True), ("1.31.0", False)):
        monkeypatch.setattr(onnxruntime, "__version__", version)
        assert (CUTS_FLOAT16 in open_session(file).notes) == noted
