"""Real artifacts for the runtime's tests: small models exported once for all of them."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from small_models import STEPS, make_checkpoint, with_props

from vitrm import checkpoint as checkpoints
from vitrm.export import export


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artifacts")


@pytest.fixture(scope="session")
def run(folder: Path) -> Path:
    """A run folder of a tiny ViTRM."""
    checkpoints.save(folder / "run", make_checkpoint("tiny"))
    return folder / "run"


@pytest.fixture(scope="session")
def artifact(folder: Path, run: Path) -> Path:
    """The run exported with three steps."""
    return export(checkpoints.load(str(run)), folder / "tiny.onnx", steps=STEPS).path


@pytest.fixture(scope="session")
def halting(folder: Path, run: Path) -> Path:
    """The run exported with four steps, of which a sample takes as many as it needs."""
    return export(checkpoints.load(str(run)), folder / "halting.onnx", steps=4, halt_threshold=0.9).path


@pytest.fixture(scope="session")
def loop(folder: Path, run: Path) -> Path:
    """The run exported as a loop of four steps."""
    return export(checkpoints.load(str(run)), folder / "loop.onnx", steps=4, graph="loop").path


@pytest.fixture(scope="session")
def stepwise(folder: Path, run: Path) -> Path:
    """The run exported as three graphs, driven for four steps."""
    return export(checkpoints.load(str(run)), folder / "stepwise", steps=4, graph="stepwise").path


@pytest.fixture(scope="session")
def rough(folder: Path, artifact: Path) -> Path:
    """The artifact with noise on its weights, as a careless quantization leaves it: some answers change."""
    model = onnx.load(str(artifact))
    random = np.random.default_rng(0)
    for weight in model.graph.initializer:
        values = numpy_helper.to_array(weight)
        if values.dtype == np.float32 and values.size > 64:
            noisy = values * (1 + 0.02 * random.standard_normal(values.shape).astype(np.float32))
            weight.CopyFrom(numpy_helper.from_array(noisy.astype(np.float32), weight.name))
    onnx.save(model, str(folder / "rough.onnx"))
    with_props(folder / "rough.onnx", folder / "rough.onnx")
    return folder / "rough.onnx"


@pytest.fixture(scope="session")
def vit_run(folder: Path) -> Path:
    """A run folder of a very small ViT: another model kind, without recursion."""
    checkpoint = make_checkpoint("vit-small", dim=32, layers=1, heads=2, mlp=64, patch_size=8)
    checkpoints.save(folder / "vit-run", checkpoint)
    return folder / "vit-run"


@pytest.fixture(scope="session")
def vit(folder: Path, vit_run: Path) -> Path:
    """That ViT, exported."""
    return export(checkpoints.load(str(vit_run)), folder / "vit.onnx").path
