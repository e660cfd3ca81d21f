"""int8 files through ONNX Runtime's kernels for AVX2, on any x86-64 processor: what the static check promises, seen.

These kernels add pairs of products in 16 bits.  `benchmarks/as_avx2` has ONNX Runtime choose them.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_models import make_checkpoint

import vitrm.runtime
from vitrm import checkpoint as checkpoints
from vitrm.data import load
from vitrm.export import export

AS_AVX2 = Path(__file__).parents[3] / "benchmarks" / "as_avx2"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 processor"),
    pytest.mark.skipif(
        not (shutil.which("gcc") and shutil.which("objdump")), reason="needs gcc and objdump (binutils)"
    ),
]

ANSWER = """
import sys, numpy as np, onnxruntime
for folder in sys.argv[1:]:
    session = onnxruntime.InferenceSession(f"{folder}/model.onnx", providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: np.load(f"{folder}/inputs.npy")}
    np.save(f"{folder}/outputs.npy", session.run(None, inputs)[0])
"""
PAIRS = {
    (1, 127): True,
    (127, 1): True,
    (2, 127): False,
    (127, 127): False,
}  # two weights: is their sum exact in 16 bits?


def product(weight: np.ndarray, path: Path) -> Path:
    """A file with one integer product, as vitrm-export writes it for a CPU."""
    node = helper.make_node("MatMulIntegerToFloat", ["a", "w", "as", "ws", "az"], ["y"], domain="com.microsoft")
    constants = {"w": weight, "as": np.float32(1), "ws": np.float32(1), "az": np.uint8(0)}
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("a", TensorProto.UINT8, ["rows", len(weight)])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return path


@pytest.fixture(scope="module")
def folders(run, tmp_path_factory):
    """A folder for each pair of weights and one for a model: the file, its inputs, and its outputs on AVX2."""
    found = {}
    for pair in PAIRS:
        found[pair] = tmp_path_factory.mktemp("pair")
        weight = np.tile(np.array([pair], np.int8).T, (32, 8))
        product(weight, found[pair] / "model.onnx")
        np.save(found[pair] / "inputs.npy", np.full((4, len(weight)), 255, np.uint8))
    convolutions = make_checkpoint("tiny", tokenizer="whitened", stage_widths=(8, 8, 8), mixing="cross", n=1)
    for name, model in (("model", checkpoints.load(str(run))), ("convolutions", convolutions)):
        found[name] = tmp_path_factory.mktemp(name)
        images = load("digits", "test").floats()[:8]
        settings = {"steps": 2, "precision": "int8", "int8_convolutions": name == "convolutions", "images": images}
        export(model, found[name] / "model.onnx", **settings)
        np.save(found[name] / "inputs.npy", images)
    command = [sys.executable, AS_AVX2, sys.executable, "-c", ANSWER, *found.values()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return found


@pytest.mark.parametrize(("pair", "exact"), PAIRS.items())
def test_two_weights_whose_sum_passes_128_saturate(pair, exact, folders):
    """The limit that runtime.artifact.saturation_check draws, on both of its sides: 255 · 129 is above 2¹⁵ − 1."""
    rows = np.load(folders[pair] / "inputs.npy").astype(int)
    weight = np.tile(np.array([pair]).T, (32, 8))
    assert (np.load(folders[pair] / "outputs.npy") == rows @ weight).all() == exact


@pytest.mark.parametrize("name", ["model", "convolutions"])
def test_an_int8_file_gives_the_same_logits(name, folders):
    """But for what float32 between the products rounds otherwise, which now and then moves a value to the next integer."""
    file = folders[name] / "model.onnx"
    here = vitrm.runtime.open(file).infer(np.load(file.with_name("inputs.npy"))).logits
    there = np.load(file.with_name("outputs.npy"))
    assert np.abs(here - there).max() < 0.02 * np.abs(here).max()
    assert (here.argmax(1) == there.argmax(1)).all()
