"""What is exported, real TensorRT builds: every graph and precision, without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import onnx_ir as ir
import pytest
import torch

from vitrm import checkpoint as checkpoints
from vitrm.calib.calibration import calibrate
from vitrm.checkpoint import Checkpoint, build_model
from vitrm.config import preset
from vitrm.data import load
from vitrm.export import artefact, export
from vitrm.export.precision import half_fragments
from vitrm.export.shapes import loop, stepwise, unrolled

BUILD = Path(__file__).with_name("tensorrt_build.py")


@pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None, reason="needs TensorRT for RTX: pip install 'vitrm[tensorrt-rtx]'"
)
def test_every_graph_and_precision_builds(recursion, run, tmp_path, monkeypatch):
    f = recursion.fragments
    graphs = {}
    for precision, r in (("fp32", recursion), ("fp16", replace(recursion, fragments=half_fragments(f)))):
        graphs[f"unrolled-{precision}"] = unrolled(r, 2)
        graphs[f"halting-{precision}"] = unrolled(r, 2, 0.9, every_step=True)
        graphs[f"loop-{precision}"] = loop(r)
        graphs |= {f"stepwise-{part}-{precision}": model for part, model in stepwise(r).items()}
    calibration = calibrate(checkpoints.load(run), 2)
    for graph in ("unrolled", "loop"):
        path = tmp_path / f"{graph}-int8.onnx"
        settings = {"steps": 2, "graph": graph, "precision": "int8", "target": "tensorrt"}
        export(checkpoints.load(run), path, calibration=calibration, **settings)
        graphs[path.stem] = ir.load(path)
    settings = {"steps": 2, "graph": "stepwise", "precision": "int8", "target": "tensorrt"}
    made = export(checkpoints.load(run), tmp_path / "stepwise", calibration=calibration, **settings)
    graphs |= {f"stepwise-{file.stem}-int8": ir.load(file) for file in made.path.iterdir()}
    few = load("digits", "train").take(slice(0, 64))
    monkeypatch.setattr(artefact, "calibration_images", lambda *_: (few, ""))
    for name, config in (
        ("resnet-int8", preset("resnet18")),
        ("vit-int8", preset("vit-small", dim=64, layers=1, heads=2, mlp=64)),
    ):
        torch.manual_seed(0)
        net = Checkpoint(model=config, data={"name": "digits"}, weights=build_model(config).state_dict(), source=name)
        export(net, tmp_path / f"{name}.onnx", precision="int8", target="tensorrt")
        graphs[name] = ir.load(tmp_path / f"{name}.onnx")
    for name, model in graphs.items():
        ir.save(model, tmp_path / f"{name}.onnx")
    done = subprocess.run(
        [sys.executable, str(BUILD), *(str(tmp_path / f"{name}.onnx") for name in graphs)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    built = dict(zip(graphs, map(json.loads, done.stdout.splitlines()), strict=True))
    for name, result in built.items():
        assert result["bytes"] > (10_000 if "heads" in name else 100_000), (name, result["errors"])
        assert not result["errors"], (name, result["errors"])
