"""int8 of a tokenizer's convolutions: rounds where it should, costs no more nodes than it must, and is refused where it is for nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from int8_by_hand import simulated
from small_models import make_checkpoint

import vitrm.runtime
from vitrm.calib.calibration import calibrate
from vitrm.data import load
from vitrm.errors import UserError
from vitrm.export import cli, export
from vitrm.runtime.artifact.saturation_check import integer_products

pytestmark = pytest.mark.slow

STEPS = 2
FEW = slice(0, 12)  # random models come near the limit of verification, which is for trained ones
TOKENIZERS = {
    "conv": {"tokenizer": "conv", "conv_width": 8},
    "whitened": {"tokenizer": "whitened", "stage_widths": (8, 8, 8), "mixing": "cross", "n": 1},
}
INT8 = {  # what becomes int8, and what stands behind each up to the next one
    "conv": {"convs.1": ["QLinearConv", "DequantizeLinear"], "convs.2": ["QLinearConv", "DequantizeLinear"]},
    "whitened": {
        "groups.0.conv2": ["QLinearConv", "DequantizeLinear", "Gelu"],
        "groups.1.conv1": ["QLinearConv", "MaxPool", "DequantizeLinear", "Gelu"],
        "groups.1.conv2": ["QLinearConv", "DequantizeLinear", "Gelu"],
        "groups.2.conv1": ["QLinearConv", "MaxPool", "DequantizeLinear", "Gelu"],
        "groups.2.conv2": ["QLinearConv", "DequantizeLinear", "Gelu"],
        "conv": ["QLinearConv", "DequantizeLinear", "Gelu"],
    },
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def checkpoint(tokenizer):
    return make_checkpoint("tiny", **TOKENIZERS[tokenizer])


@pytest.fixture(scope="module")
def calibration(checkpoint):
    return calibrate(checkpoint, STEPS, images=load("digits", "train").take(slice(0, 70)))


@pytest.fixture(scope="module")
def made(checkpoint, calibration, tmp_path_factory):
    """A file for each way in which scales are shared, each verified."""
    folder = tmp_path_factory.mktemp("convolutions")
    images = load("digits", "validation").floats(FEW)
    settings = {
        "steps": STEPS,
        "precision": "int8",
        "int8_convolutions": True,
        "calibration": calibration,
        "images": images,
    }
    return {
        graph: export(checkpoint, folder / f"{graph}.onnx", graph=graph, **settings) for graph in ("unrolled", "loop")
    }


@pytest.mark.parametrize("graph", ["unrolled", "loop"])
def test_it_rounds_where_it_should_and_nowhere_else(made, checkpoint, calibration, graph):
    images = load("digits", "validation").floats(slice(0, 40))
    found = vitrm.runtime.open(made[graph].path).infer(images).logits
    shared = graph != "unrolled"
    expected, linear = (
        simulated(checkpoint, calibration, images, "cpu", shared, convolutions) for convolutions in (True, False)
    )
    with torch.no_grad():
        exact = checkpoint.build()(torch.from_numpy(images), STEPS).logits.numpy()
    # A value on the edge between two integers may fall either way, and then moves what follows: most images must be exact.
    difference = np.abs(found - expected).max(1)
    assert np.median(difference) < 0.15 * np.abs(expected - exact).max(1).mean()
    assert np.median(difference) < 0.3 * np.median(np.abs(found - linear).max(1)), "convolutions must leave a trace"


def test_exactly_these_are_int8_and_what_is_between_them_stays_integer_or_is_one_node(made, tokenizer):
    graph = onnx.load(made["unrolled"].path).graph
    weights = {i.name: i for i in graph.initializer}
    readers = {name: node for node in graph.node for name in node.input}
    chains = {}
    for node in graph.node:
        if node.op_type != "QLinearConv":
            continue
        name = node.input[3]
        assert weights[name].data_type == onnx.TensorProto.INT8
        chain = [node.op_type]
        while chain[-1] != ("Gelu" if tokenizer == "whitened" else "DequantizeLinear"):
            node = readers[node.output[0]]
            chain.append(node.op_type)
        chains[name.removeprefix("tokenizer.").removesuffix(".weight.int8")] = chain
    assert chains == INT8[tokenizer]
    assert not integer_products(graph).saturating


def test_it_is_smaller_and_its_answers_are_the_same_alone_and_in_a_batch(made, checkpoint, calibration, tmp_path):
    images = load("digits", "validation").floats(FEW)
    linear = export(
        checkpoint, tmp_path / "a.onnx", steps=STEPS, precision="int8", calibration=calibration, images=images
    )
    assert made["unrolled"].int8_weights > linear.int8_weights
    assert made["unrolled"].bytes < linear.bytes
    session = vitrm.runtime.open(made["unrolled"].path)
    alone = [session.infer(images[i : i + 1]).logits[0] for i in range(len(images))]
    np.testing.assert_allclose(session.infer(images).logits, alone, atol=1e-4)


def test_a_calibration_of_before_convolutions_had_ranges_serves_linear_layers_alone(checkpoint, calibration, tmp_path):
    older = replace(calibration, ranges={s: r for s, r in calibration.ranges.items() if not s.of_tokenizer})
    settings = {
        "steps": STEPS,
        "precision": "int8",
        "calibration": older,
        "images": load("digits", "validation").floats(FEW),
    }
    with pytest.raises(UserError, match="no ranges of convolutions, as older ones do not: calibrate again"):
        export(checkpoint, tmp_path / "a.onnx", int8_convolutions=True, **settings)
    assert export(checkpoint, tmp_path / "b.onnx", **settings).path.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nano-digits", "--int8-convolutions"], "--int8-convolutions is for int8: add --int8"),
        (
            ["nano-digits", "--int8", "--target", "tensorrt", "--int8-convolutions"],
            "is for int8 on a CPU, this is int8 for tensorrt",
        ),
    ],
)
def test_it_is_refused_where_it_is_for_nothing(arguments, message, tmp_path, capsys):
    assert cli.main([*arguments, "-o", str(tmp_path / "a.onnx")]) == 2
    assert message in capsys.readouterr().err


def test_it_is_refused_for_a_tokenizer_without(tmp_path):
    with pytest.raises(UserError, match="is for a tokenizer of several convolutions, test has none"):
        export(make_checkpoint("tiny"), tmp_path / "a.onnx", precision="int8", int8_convolutions=True)
    assert not list(tmp_path.iterdir())
