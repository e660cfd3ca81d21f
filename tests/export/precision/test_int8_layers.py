"""INT8 graphs: equal to the eager model with the same roundings, in every shape, for both targets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from int8_by_hand import rounded, simulated
from small_models import skip_if_float16_is_cut, small

import vitrm.runtime
from vitrm import checkpoint as checkpoints
from vitrm.calib.calibration import Calibration, calibrate, load_calibration
from vitrm.calib.int8_weights import quantize_weight
from vitrm.calib.methods import Range
from vitrm.calib.quant_params import quant_table
from vitrm.calib.sites import Site
from vitrm.checkpoint import Checkpoint, build_model
from vitrm.config import preset
from vitrm.data import load
from vitrm.errors import UserError
from vitrm.export import cli, export
from vitrm.export.graph import layouts
from vitrm.export.graph.fragments import trace_vitrm
from vitrm.export.precision import scales
from vitrm.export.precision.conversion import int8_fragments
from vitrm.export.verify import check_integer_sums
from vitrm.runtime.artifact.metadata import Metadata
from vitrm.runtime.artifact.saturation_check import integer_products

pytestmark = pytest.mark.slow

STEPS = 3
# Random models, drawn otherwise by every version of torch, come near the limit of verification, which is for trained ones: the
# worst of a few images is better than that of 64.
FEW = slice(0, 12)


@pytest.fixture(scope="module")
def checkpoint(run):
    return checkpoints.load(run)


@pytest.fixture(scope="module")
def calibration(checkpoint) -> Calibration:
    return calibrate(checkpoint, STEPS)


@pytest.fixture(scope="module")
def made(checkpoint, calibration, tmp_path_factory):
    """Every graph for every target, exported."""
    folder = tmp_path_factory.mktemp("int8")
    return {
        (graph, target): export(
            checkpoint,
            folder / (f"{graph}-{target}" + ("" if graph == "stepwise" else ".onnx")),
            steps=STEPS,
            graph=graph,
            precision="int8",
            target=target,
            calibration=calibration,
            images=load("digits", "validation").floats(FEW),
        )
        for graph in ("unrolled", "loop", "stepwise")
        for target in ("cpu", "tensorrt")
    }


@pytest.mark.parametrize("graph", ["unrolled", "loop", "stepwise"])
def test_the_cpu_graph_rounds_where_it_should_and_nowhere_else(made, checkpoint, calibration, model, digits, graph):
    result = vitrm.runtime.open(made[graph, "cpu"].path).infer(digits[:40])
    expected = simulated(checkpoint, calibration, digits[:40], "cpu", shared=graph != "unrolled")
    with torch.no_grad():
        exact = model(torch.from_numpy(digits[:40]), STEPS).logits.numpy()
    rounding = np.abs(expected - exact)
    assert rounding.max() > 1e-2, "int8 must leave a trace"
    # A value on the edge between two integers may fall either way, and then moves what follows: most images must be exact.
    difference = np.abs(result.logits - expected).max(1)
    assert np.median(difference) < 0.1 * rounding.max(1).mean()
    assert difference.max() < rounding.max()


@pytest.mark.parametrize("graph", ["unrolled", "loop", "stepwise"])
def test_the_tensorrt_graph_does_too_with_float16_around(made, checkpoint, calibration, digits, model, graph):
    skip_if_float16_is_cut("tensorrt")
    result = vitrm.runtime.open(made[graph, "tensorrt"].path).infer(digits[:40])
    expected = simulated(checkpoint, calibration, digits[:40], "tensorrt", shared=graph != "unrolled")
    with torch.no_grad():
        exact = model(torch.from_numpy(digits[:40]), STEPS).logits.numpy()
    # What float16 rounds comes on top, as far as fp16 files may differ.
    assert np.abs(result.logits - expected).mean() < np.abs(expected - exact).mean() + 0.02 * np.abs(exact).max()
    assert (result.logits.argmax(1) == exact.argmax(1)).mean() > 0.9


@pytest.mark.parametrize("graph", ["unrolled", "loop", "stepwise"])
@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_exactly_the_linear_weights_are_int8_each_stored_once(made, model, graph, target):
    found = made[graph, target]
    expected = {f"block.{n}.weight.T.int8" for n, m in model.block.named_modules() if isinstance(m, torch.nn.Linear)}
    assert found.int8_weights == len(expected)
    for path in sorted(found.path.iterdir()) if graph == "stepwise" else [found.path]:
        proto = onnx.load(path)
        onnx.checker.check_model(proto, full_check=True)
        stored = [i.name for i in proto.graph.initializer]
        assert len(stored) == len(set(stored))
        integers = {i.name for i in proto.graph.initializer if i.data_type == onnx.TensorProto.INT8 and i.dims}
        wanted = {"heads.onnx": set()}.get(path.name, expected)
        if path.name == "embed.onnx":
            wanted = {f"block.0.{part}.weight.T.int8" for part in "qkv"}
        assert integers == wanted
        assert not any(name.endswith("weight.T") and name.startswith("block") for name in stored)
        types = {n.op_type for n in ir.traversal.RecursiveGraphIterator(ir.from_proto(proto).graph)}
        if path.name == "heads.onnx":
            continue
        assert ("MatMulIntegerToFloat" in types) == (target == "cpu")
        assert ("DequantizeLinear" in types) == (target == "tensorrt")
        if target == "tensorrt":
            assert not {"MatMulInteger", "DynamicQuantizeLinear"} & types
            unsigned = [i.name for i in proto.graph.initializer if i.data_type == onnx.TensorProto.UINT8]
            assert not unsigned, "TensorRT takes no unsigned or asymmetric activations"
            assert not [i.name for i in proto.graph.initializer if i.data_type == onnx.TensorProto.INT32]


def test_for_tensorrt_what_lies_on_one_side_of_0_is_shifted_as_it_takes_no_zero_point(
    checkpoint, calibration, model, digits, tmp_path
):
    skip_if_float16_is_cut("tensorrt")
    ranges = {
        s: Range(r.low, 3 * max(-r.low, r.high)) if "down" in s.layer else r for s, r in calibration.ranges.items()
    }
    lopsided = replace(calibration, ranges=ranges)
    settings = {
        "steps": STEPS,
        "precision": "int8",
        "target": "tensorrt",
        "images": load("digits", "validation").floats(FEW),
    }
    path = export(checkpoint, tmp_path / "a.onnx", calibration=lopsided, **settings).path

    graph = onnx.load(path).graph
    numbers = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    quantizers = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert not any(numbers[node.input[2]] for node in quantizers)
    shifted = {node.name for node in quantizers if makers[node.input[0]].op_type == "Sub"}
    assert shifted == {node.name for node in quantizers if "down" in node.name}

    expected = simulated(checkpoint, lopsided, digits[:40], "tensorrt", shared=False)
    with torch.no_grad():
        exact = model(torch.from_numpy(digits[:40]), STEPS).logits.numpy()
    found = vitrm.runtime.open(path).infer(digits[:40]).logits
    assert np.abs(found - expected).mean() < np.abs(expected - exact).mean() + 0.02 * np.abs(exact).max()


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_the_papers_model_in_int8_takes_less_than_three_tenths(paper, target, tmp_path):
    """At 6 steps; a Q/DQ node or scale per use must not eat what int8 saves."""
    checkpoint, traced, calibration = paper
    config = checkpoint.model

    def size(model: ir.Model) -> int:
        ir.save(model, tmp_path / "a.onnx")
        return (tmp_path / "a.onnx").stat().st_size

    own, common = (quant_table(calibration, target, shared=shared) for shared in (False, True))
    by_step = tuple(int8_fragments(traced, own, step) for step in range(1, 7))
    shared = int8_fragments(traced, common)
    unrolled = layouts.unrolled(layouts.Recursion(config, by_step[0], by_step), 6)
    assert size(unrolled) <= 0.30 * size(layouts.unrolled(layouts.Recursion(config, traced), 6))
    loop = layouts.loop(layouts.Recursion(config, shared))
    assert size(loop) <= 0.30 * size(layouts.loop(layouts.Recursion(config, traced)))


def test_no_integer_sum_can_saturate_on_any_cpu(made, tmp_path):
    """Seen in the graph, so that it fails on a CPU that computes it right, too."""
    for (graph, _), found in made.items():
        assert found.metadata.exact_sums
        for path in sorted(found.path.iterdir()) if graph == "stepwise" else [found.path]:
            products = integer_products(onnx.load(path).graph)
            assert not products.saturating, path
            assert products.exact or path.name == "heads.onnx"
    broken = onnx.load(made["loop", "cpu"].path)
    weight = next(i for i in broken.graph.initializer if i.name.endswith("weight.T.int8"))
    weight.raw_data = bytes([127]) * len(weight.raw_data)
    onnx.save(broken, tmp_path / "a.onnx")
    with pytest.raises(ValueError, match="1 of 14 int8 weights can saturate on a CPU without VNNI"):
        check_integer_sums(tmp_path / "a.onnx")


@pytest.fixture(scope="module")
def paper():
    config = preset("paper")
    checkpoint = Checkpoint(model=config, data={"name": "digits"}, weights=build_model(config).state_dict())
    few = calibrate(checkpoint, 6, images=load("digits", "train").take(slice(0, 4)), method="minmax")
    return checkpoint, trace_vitrm(checkpoint.build()), few


def test_each_step_has_its_own_scales_when_unrolled(made):
    def scales(path) -> set[bytes]:
        proto = onnx.load(path)
        weights = {i.name: i for i in proto.graph.initializer}
        nodes = [n for n in proto.graph.node if n.op_type == "QuantizeLinear" and "answer/block.1.ffn.down" in n.name]
        assert len(nodes) == 2 * STEPS  # two recursions a step
        return {weights[n.input[1]].raw_data for n in nodes}

    assert len(scales(made["unrolled", "cpu"].path)) == STEPS


def test_an_answer_does_not_depend_on_its_batch_mates(made, digits):
    for graph in ("unrolled", "loop", "stepwise"):
        session = vitrm.runtime.open(made[graph, "cpu"].path)
        together = session.infer(digits[:33])
        for i in (0, 20):
            alone = session.infer(digits[i : i + 1])
            np.testing.assert_allclose(alone.logits[0], together.logits[i], atol=1e-4)


def test_it_says_what_it_was_made_for(made, calibration, digits):
    for (graph, target), found in made.items():
        session = vitrm.runtime.open(found.path)
        assert session.metadata.target == target
        assert session.metadata.precision == "int8"
        assert session.metadata.calibration_id == calibration.id
        assert bool(session.notes) == (target == "tensorrt"), graph
    assert isinstance(Metadata.from_dict(session.metadata.to_dict(), "a"), Metadata)


def test_a_calibration_file_is_written_then_read_then_refused(run, tmp_path, capsys):
    file, out = tmp_path / "c.json", str(tmp_path / "a.onnx")
    arguments = [str(run), "--int8", "--calibration", str(file), "-o", out]
    assert cli.main([*arguments, "--steps", "2"]) == 0
    first = capsys.readouterr().out
    assert "int8     for cpu; activations calibrated on 512 training images of digits at 2 steps" in first
    assert "signal to noise: y " in first
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    written = file.read_bytes()
    assert cli.main([*arguments, "--steps", "2"]) == 0
    assert file.read_bytes() == written
    assert cli.main([*arguments, "--steps", "3"]) == 2
    assert "was made for 2 steps, asked for are 3" in capsys.readouterr().err
    assert cli.main([str(run), "--calibration", str(file), "-o", out]) == 2
    assert "add --int8" in capsys.readouterr().err
    assert cli.main([str(run), "--target", "tensorrt", "--fp16", "-o", out]) == 2
    assert "--target is for int8" in capsys.readouterr().err


def test_of_two_exports_that_calibrate_into_one_file_the_first_one_counts(
    checkpoint, calibration, tmp_path, monkeypatch
):
    """Between its looking for the file and its writing it, another export has written it."""
    file = tmp_path / "c.json"
    kept = replace(calibration, method="minmax")

    def meanwhile(*args, **options):
        found = calibrate(*args, **options)
        kept.save(file)
        return found

    monkeypatch.setattr(scales, "calibrate", meanwhile)
    settings = {"precision": "int8", "target": "tensorrt", "calibration": file}
    made = export(checkpoint, tmp_path / "a.onnx", steps=calibration.steps, **settings)
    assert made.calibration == kept
    assert made.metadata.calibration_id == kept.id
    assert load_calibration(file, checkpoint, calibration.steps) == kept
    file.unlink()
    with pytest.raises(UserError, match=f"was made for {calibration.steps} steps, asked for are 1"):
        export(checkpoint, tmp_path / "b.onnx", steps=1, **settings)
    assert load_calibration(file, checkpoint, calibration.steps) == kept
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "c.json"]


def test_a_request_is_checked_before_minutes_of_calibration(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(scales, "calibrate", None)
    for path, message in ((tmp_path / "a.txt", "ending in"), (tmp_path, "is a folder|ending in")):
        with pytest.raises(UserError, match=message):
            export(checkpoint, path, precision="int8", calibration=tmp_path / "c.json")
    assert not list(tmp_path.iterdir())


def transformer(name: str) -> Checkpoint:
    """A ViT or CCT of two layers in which every weight matters."""
    torch.manual_seed(0)
    config = small(name)
    weights = {k: v + 0.05 * torch.randn(v.shape) for k, v in build_model(config).state_dict().items()}
    return Checkpoint(model=config, data={"name": "digits"}, weights=weights, source=name)


@pytest.mark.parametrize(("name", "target"), [("vit-small", "cpu"), ("vit-small", "tensorrt"), ("cct-7-3x1", "cpu")])
def test_a_transformer_in_int8_is_the_eager_model_with_the_same_roundings(name, target, tmp_path):
    net = transformer(name)
    found = calibrate(net, 1)
    exported = export(net, tmp_path / "a.onnx", precision="int8", target=target, calibration=found)
    layers = [f"net.layers.{i}.{n}" for i in (0, 1) for n in ("q", "k", "v", "out", "ffn.up", "ffn.down")]
    assert exported.int8_weights == len(layers) == len(found.ranges)
    assert exported.state_error is None
    session = vitrm.runtime.open(exported.path)
    images = load("digits", "test").floats(slice(0, 40))

    model = net.build()
    modules = dict(model.named_modules())
    for layer in layers:
        extent, module = found.ranges[Site(0, "net", layer)], modules[layer]
        integers, scales = quantize_weight(module.weight.detach().T.contiguous().numpy())
        module.weight.data = torch.from_numpy(integers * scales).T.contiguous()
        module.register_forward_pre_hook(lambda _, x, e=extent: (rounded(x[0], *e, target),))
    with torch.no_grad():
        expected = model(torch.from_numpy(images)).numpy()
        exact = net.build()(torch.from_numpy(images)).numpy()
    logits = session.infer(images).logits
    error = np.abs(exact - expected).max()
    assert error > 1e-3 * np.abs(exact).max(), "int8 rounds something"
    # A value on the border between two integers may be rounded either way.
    assert np.abs(logits - expected).max() < (0.3 if target == "cpu" else 1.2) * error


def test_what_only_a_recursion_has_is_refused_for_a_vit(tmp_path):
    vit = transformer("vit-small")
    for more in ({"max_drop": 0.5}, {"sensitivity_file": tmp_path / "s.json"}):
        with pytest.raises(UserError, match="--max-drop and --sensitivity are for ViTRMs, this is a vit"):
            export(vit, tmp_path / "a.onnx", precision="int8", **more)
    assert not list(tmp_path.iterdir())


def test_unknown_targets_and_stale_calibrations_are_refused(checkpoint, tmp_path):
    with pytest.raises(UserError, match="target is 'npu'"):
        export(checkpoint, tmp_path / "a.onnx", precision="int8", target="npu")
    stale = replace(calibrate(checkpoint, 1), steps=5)
    with pytest.raises(UserError, match="the calibration given"):
        export(checkpoint, tmp_path / "a.onnx", precision="int8", calibration=stale, steps=1)
    assert not list(tmp_path.iterdir())
