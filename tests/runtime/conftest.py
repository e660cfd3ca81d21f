"""Real artefacts for the runtime's tests: a `tiny` ViTRM with random weights, exported once for all of them."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import onnx
import pytest
import torch

from vitrm import checkpoint as checkpoints
from vitrm import data as datasets
from vitrm.checkpoint import Checkpoint, build_model
from vitrm.config import preset, to_dict
from vitrm.model import ViTRM
from vitrm.runtime.metadata import HALT_PROB, LOGITS, PIXELS, STEPS_USED, Metadata

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
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(5)  # from the initial values, every image ends in nearly the same answer
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


class _Unrolled(torch.nn.Module):
    def __init__(self, model: torch.nn.Module, steps: int) -> None:
        super().__init__()
        self.model, self.steps = model, steps

    def forward(self, pixel_values: torch.Tensor) -> object:
        if not self.model.recursive:
            return self.model(pixel_values)
        return tuple(self.model(pixel_values, self.steps))


def export_stopgap(checkpoint: Checkpoint, path: Path, run: Path, steps: int = STEPS, **metadata: object) -> Path:
    model = checkpoint.build()
    recursive = model.recursive
    outputs = [LOGITS, HALT_PROB, STEPS_USED] if recursive else [LOGITS]
    program = torch.onnx.export(
        _Unrolled(model, steps).eval(),
        (torch.rand(2, 3, 32, 32),),
        input_names=[PIXELS],
        output_names=outputs,
        dynamic_shapes={"pixel_values": {0: "batch"}},
        opset_version=20,
        dynamo=True,
        verbose=False,
    )
    program.save(str(path))
    proto = onnx.load(str(path))
    described = Metadata(
        **{
            "model": to_dict(checkpoint.model),
            "classes": checkpoint.data["classes"],
            "data": checkpoint.data,
            "graph": "unrolled" if recursive else "single",
            "steps": steps if recursive else 1,
            "halt_threshold": 2.0,
            "precision": "fp32",
            "weights_sha256": checkpoint.weights_id,
            "run": str(run),
            **metadata,
        }
    )
    for key, value in described.to_props().items():
        proto.metadata_props.add(key=key, value=value)
    onnx.save(proto, str(path))
    return path


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
    return export_stopgap(checkpoints.load(run), folder / "tiny.onnx", run)
