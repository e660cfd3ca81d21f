"""Real artefacts for the runtime's tests: small models exported once for all of them."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from vitrm import checkpoint as checkpoints
from vitrm import data as datasets
from vitrm.checkpoint import Checkpoint, build_model
from vitrm.config import preset
from vitrm.export import export
from vitrm.model import ViTRM

STEPS = 3


def make_checkpoint(name: str, seed: int = 0, **changes: object) -> Checkpoint:
    """A model with random layers; a ViTRM's heads are fitted to digits by least squares, so that it is mostly right."""
    torch.manual_seed(seed)
    config = preset(name, **changes)
    model = build_model(config).eval()
    if isinstance(model, ViTRM):
        _fit_heads(model)
    data = {"name": "digits", "classes": [str(i) for i in range(config.classes)]}
    return Checkpoint(model=config, data=data, weights=model.state_dict(), source="test")


@torch.no_grad()
def _fit_heads(model: ViTRM) -> None:
    images = datasets.load("digits", "train")
    embedded = model.embed(torch.from_numpy(images.floats()))
    state = model.initial_state(len(images))
    for _ in range(STEPS):
        state = model.step(embedded, state)
    y = state.y[:, 0]
    features = torch.cat([y, torch.ones(len(y), 1)], 1)
    labels = torch.from_numpy(images.labels)
    targets = 8 * torch.nn.functional.one_hot(labels, model.config.classes).float()
    solution = torch.linalg.lstsq(features, targets).solution
    model.classifier.weight.copy_(solution[:-1].T)
    model.classifier.bias.copy_(solution[-1])
    right = (model.classifier(y).argmax(1) == labels).float()[:, None]
    solution = torch.linalg.lstsq(features, 4 * right - 2).solution
    model.halt.weight.copy_(solution[:-1].T)
    model.halt.bias.copy_(solution[-1])


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artefacts")


@pytest.fixture(scope="session")
def run(folder: Path) -> Path:
    """A run folder of a tiny ViTRM."""
    checkpoints.save(folder / "run", make_checkpoint("tiny"))
    return folder / "run"


@pytest.fixture(scope="session")
def artefact(folder: Path, run: Path) -> Path:
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
def rough(folder: Path, artefact: Path) -> Path:
    """The artefact with noise on its weights, as a careless quantisation leaves it: some answers change."""
    model = onnx.load(str(artefact))
    random = np.random.default_rng(0)
    for weight in model.graph.initializer:
        values = numpy_helper.to_array(weight)
        if values.dtype == np.float32 and values.size > 64:
            noisy = values * (1 + 0.02 * random.standard_normal(values.shape).astype(np.float32))
            weight.CopyFrom(numpy_helper.from_array(noisy.astype(np.float32), weight.name))
    onnx.save(model, str(folder / "rough.onnx"))
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


def with_props(source: Path, target: Path, /, **changes: str | None) -> Path:
    """A copy of an ONNX file with other metadata_props (None removes one)."""
    model = onnx.load(str(source))
    kept = {p.key: p.value for p in model.metadata_props} | {f"vitrm.{k}": v for k, v in changes.items()}
    del model.metadata_props[:]
    for key, value in kept.items():
        if value is not None:
            model.metadata_props.add(key=key, value=value)
    onnx.save(model, str(target))
    return target
