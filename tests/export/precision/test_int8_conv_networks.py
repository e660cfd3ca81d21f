"""INT8 networks of convolutions: every convolution becomes int8, is rounded where a target wants it, and answers as before."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from small_models import SMALL, small

import vitrm.runtime
from vitrm.checkpoint import Checkpoint, build_model
from vitrm.config import preset
from vitrm.data import load
from vitrm.errors import UserError
from vitrm.export import export
from vitrm.export import images as export_images
from vitrm.runtime.artifact.saturation_check import integer_products

pytestmark = pytest.mark.slow


@torch.no_grad()
def _normalize(model: torch.nn.Module, images: np.ndarray) -> None:
    """Gives batch norms the statistics of `images`: without, little of a signal is left after some GELUs."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    model.train()(torch.from_numpy(images))


@pytest.mark.parametrize(
    ("name", "target", "convolutions"),
    [
        ("resnet18", "cpu", 20),
        ("resnet18", "tensorrt", 20),
        ("resnet20", "tensorrt", 7),  # made small, like those below
        ("mobilenetv2-cifar", "cpu", 52),
        ("convmixer-256-8", "tensorrt", 5),
        ("airbench", "cpu", 7),  # the whitening too
    ],
)
def test_a_network_of_convolutions_in_int8(name, target, convolutions, tmp_path, monkeypatch):
    few = load("digits", "train").take(slice(0, 64))
    monkeypatch.setattr(export_images, "calibration_images", lambda *_: (few, ""))
    torch.manual_seed(0)
    config = small(name) if name in SMALL else preset(name)
    model = build_model(config)
    if name == "airbench":
        _normalize(model, few.floats())
    net = Checkpoint(model=config, data={"name": "digits"}, weights=model.state_dict(), source="net")
    exported = export(net, tmp_path / "a.onnx", precision="int8", target=target)
    assert exported.int8_weights == convolutions
    assert (exported.metadata.precision, exported.metadata.target) == ("int8", target)
    graph = onnx.load(exported.path).graph
    assert len(integer_products(graph).exact) == convolutions
    sources = {out: node.op_type for node in graph.node for out in node.output}
    activations = [node for node in graph.node if node.op_type in ("Relu", "Clip")]
    assert "DequantizeLinear" not in {sources[node.input[0]] for node in activations}, "rounded before it is cut off"
    assert not [n for n in graph.initializer if n.data_type == onnx.TensorProto.INT32], "TensorRT refuses them"
    with pytest.raises(UserError, match="is calibrated anew: leave it out"):
        export(net, tmp_path / "c.onnx", precision="int8", calibration=tmp_path / "ranges.json")
    if name == "mobilenetv2-cifar":
        return  # untrained it answers all images alike, up to rounding
    whole = export(net, tmp_path / "b.onnx")
    assert name in SMALL or exported.bytes < 0.3 * whole.bytes
    images = load("digits", "test").floats(slice(0, 64))
    exact, found = (vitrm.runtime.open(one.path).infer(images).logits for one in (whole, exported))
    # Untrained, so images differ little: what tells them apart must still exceed the noise.
    assert (found - exact).std() < 0.5 * (exact - exact.mean(0)).std()
