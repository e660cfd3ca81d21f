"""int8 files on a processor without VNNI, emulated by QEMU: what the static check promises, seen.

EPYC-Rome has AVX2, and neither VNNI nor AVX-512: there ONNX Runtime adds pairs of products in 16 bits.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import vitrm.runtime
from vitrm import checkpoint as checkpoints
from vitrm.data import load
from vitrm.export import export

QEMU = shutil.which("qemu-x86_64")
pytestmark = pytest.mark.skipif(QEMU is None, reason="needs qemu-x86_64 (Debian: qemu-user)")

ANSWER = """
import sys, numpy as np, onnxruntime
file, inputs, outputs = sys.argv[1:]
session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
np.save(outputs, session.run(None, {session.get_inputs()[0].name: np.load(inputs)})[0])
"""


def emulated(file: Path, inputs: np.ndarray, folder: Path) -> np.ndarray:
    """The first output of `file` for its first input, on the emulated processor."""
    np.save(folder / "inputs.npy", inputs)
    command = [QEMU, "-cpu", "EPYC-Rome", sys.executable, "-c", ANSWER, file, "inputs.npy", "outputs.npy"]
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    return np.load(folder / "outputs.npy")


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


@pytest.mark.parametrize(
    ("pair", "exact"), [((1, 127), True), ((127, 1), True), ((2, 127), False), ((127, 127), False)]
)
def test_two_weights_whose_sum_passes_128_saturate(pair, exact, tmp_path):
    """The limit that runtime.artifact.saturation_check draws, on both of its sides: 255 · 129 is above 2¹⁵ − 1."""
    weight = np.tile(np.array([pair], np.int8).T, (32, 8))
    rows = np.full((4, len(weight)), 255, np.uint8)
    found = emulated(product(weight, tmp_path / "product.onnx"), rows, tmp_path)
    assert (found == rows.astype(int) @ weight.astype(int)).all() == exact


def test_an_int8_file_gives_the_same_logits(run, tmp_path):
    """But for what float32 between the products rounds otherwise, which now and then moves a value to the next integer."""
    file = export(checkpoints.load(str(run)), tmp_path / "int8.onnx", steps=2, precision="int8").path
    images = load("digits", "test").floats()[:8]
    here = vitrm.runtime.open(file).infer(images).logits
    there = emulated(file, images, tmp_path)
    assert np.abs(here - there).max() < 0.02 * np.abs(here).max()
    assert (here.argmax(1) == there.argmax(1)).all()
