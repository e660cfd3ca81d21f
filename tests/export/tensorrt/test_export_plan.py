"""What is exported, real TensorRT builds: every graph and precision, without a GPU."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from small_models import SMALL, small

from vitrm import checkpoint as checkpoints
from vitrm.calib.calibration import calibrate
from vitrm.checkpoint import Checkpoint, build_model
from vitrm.config import preset
from vitrm.data import load
from vitrm.export import export, images
from vitrm.export.graph.layouts import unrolled
from vitrm.export.tensorrt.build import BuildResult, build_engine
from vitrm.export.tensorrt.options import PlanOptions
from vitrm.runtime.artifact.graph_names import PARTS
from vitrm.runtime.artifact.metadata import Metadata
from vitrm.runtime.artifact.plan_sidecar import read_sidecar, sidecar_path
from vitrm.runtime.halting.store_threshold import store_threshold

pytestmark = [pytest.mark.rtx, pytest.mark.slow]  # a plan takes a minute to build
OPTIONS = PlanOptions(gpus=("sm89",), profiles=((1, 4, 8),), flavour="rtx")


def test_every_graph_and_precision_builds(run, tmp_path):
    checkpoint = checkpoints.load(run)
    calibration = calibrate(checkpoint, 2)
    made = {}
    for precision in ("fp32", "fp16", "int8"):
        for graph in ("unrolled", "loop", "stepwise"):
            name = f"{graph}-{precision}" + ("" if graph == "stepwise" else ".onnx")
            int8 = {"target": "tensorrt", "calibration": calibration} if precision == "int8" else {}
            made[graph, precision] = export(
                checkpoint, tmp_path / name, steps=2, graph=graph, precision=precision, **int8
            ).path

    def build(source: Path) -> BuildResult:
        return build_engine(source, tmp_path / f"{source.stem}{'-plans' if source.is_dir() else '.plan'}", OPTIONS)

    with ThreadPoolExecutor(2) as pool:  # the builds are processes of their own
        built = dict(zip(made, pool.map(build, made.values()), strict=True))
    for (graph, precision), plan in built.items():
        names = [f"{part}.plan" for part in PARTS] if graph == "stepwise" else [plan.path.name]
        folder = plan.path if graph == "stepwise" else tmp_path
        assert list(plan.sidecars) == names
        for name in names:
            sidecar = read_sidecar(folder / name)
            assert sidecar == plan.sidecars[name]
            assert sidecar.metadata.graph == graph
            assert sidecar.metadata.precision == precision
            assert sidecar.metadata.weights_sha256 == checkpoint.weights_id
            assert sidecar.engine.gpus == ["sm89"]
            assert sidecar.engine.profiles == [[1, 4, 8]]
            assert sidecar.engine.bytes > (10_000 if "heads" in name else 100_000)
    # A threshold chosen later goes into all three side-cars, and the plans stay what they were.
    folder = built["stepwise", "fp16"].path
    metadata = store_threshold(folder, 0.7, 3, {"why": "a test"})
    assert {read_sidecar(folder / f"{part}.plan").metadata.halt_threshold for part in PARTS} == {0.7}
    assert metadata.steps == 3
    # What TensorRT builds is the recursion: more layers at the same depth than a step alone has.
    assert built["unrolled", "fp32"].layers > built["stepwise", "fp32"].layers


def test_halting_and_every_step_build_with_several_profiles(recursion, run, tmp_path):
    metadata = export(checkpoints.load(run), tmp_path / "plain.onnx", steps=1).metadata
    ir.save(unrolled(recursion, 2, 0.9, every_step=True), tmp_path / "halting.onnx")
    options = PlanOptions(gpus=("sm86", "sm89"), profiles=((1, 1, 1), (2, 8, 32)), flavour="rtx")
    built = build_engine(tmp_path / "halting.onnx", tmp_path / "halting.engine", options, metadata=metadata)
    assert built.engine.profiles == [[1, 1, 1], [2, 8, 32]]
    assert built.engine.gpus == ["sm86", "sm89"]


@pytest.mark.parametrize("name", ["resnet18", *(name for name in SMALL if name != "mobilenetv2-cifar")])
def test_baselines_in_int8_build(tmp_path, monkeypatch, name):
    few = load("digits", "train").take(slice(0, 64))
    monkeypatch.setattr(images, "calibration_images", lambda *_: (few, ""))
    torch.manual_seed(0)
    config = small(name) if name in SMALL else preset(name)
    net = Checkpoint(model=config, data={"name": "digits"}, weights=build_model(config).state_dict(), source="net")
    made = export(net, tmp_path / "net.plan", precision="int8", plan=OPTIONS)
    assert made.metadata.graph == "single"
    assert made.int8_weights
    assert read_sidecar(made.path).metadata.target == "tensorrt"


def test_a_plan_is_exported_in_one_go(run, tmp_path, digits):
    told: list[str] = []
    made = export(
        checkpoints.load(run),
        tmp_path / "engine.plan",
        steps=2,
        precision="fp16",
        images=digits[:16],
        plan=OPTIONS,
        progress=told.append,
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["engine.plan", "engine.plan.json"]
    values = json.loads(sidecar_path(made.path).read_text())
    engine = values.pop("engine")
    assert len(values.pop("sha256")) == 64
    assert Metadata.from_dict(values, "") == made.metadata
    assert engine["sha256"] == read_sidecar(made.path).engine.sha256
    assert engine["source"] == str(run)
    assert made.bytes == made.path.stat().st_size == engine["bytes"]
    assert np.isfinite(made.parity.logits)
    assert any(m.startswith("building the plan: Building engine") for m in told)
    assert told.index("verifying") < len(told) - 1  # the ONNX graph is verified before it is built
