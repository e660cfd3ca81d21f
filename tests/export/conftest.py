"""Traced fragments, made once: tracing takes seconds, assembling milliseconds."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch

from vitrm import checkpoint as checkpoints
from vitrm.checkpoint import Checkpoint
from vitrm.data import load
from vitrm.export import pipeline
from vitrm.export.graph.fragments import Fragments, trace_vitrm
from vitrm.export.graph.layouts import Recursion
from vitrm.model import ViTRM


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _trace_each_model_once():
    """Tests export the same few models again and again; a trace is a function of the model's config and weights alone."""
    traced: dict[tuple[object, str], Fragments] = {}

    def trace(model: ViTRM) -> Fragments:
        key = model.config, Checkpoint(model=model.config, data={}, weights=model.state_dict()).weights_id
        if key not in traced:
            traced[key] = trace_vitrm(model)
        return traced[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "trace_vitrm", trace)
        yield


@pytest.fixture(scope="session")
def model() -> ViTRM:
    return reference.shaken("tiny", recursions=2, n=1, ffn="swiglu", tokenizer="conv", conv_width=8)


@pytest.fixture(scope="session")
def recursion(model) -> Recursion:
    return Recursion(model.config, trace_vitrm(model))


@pytest.fixture(scope="session")
def digits() -> np.ndarray:
    """Real images, float32 [143, 3, 32, 32] in [0, 1]."""
    return load("digits", "validation").floats()


@pytest.fixture(scope="session")
def run(tmp_path_factory, model):
    """A run folder with `model` in it."""
    folder = tmp_path_factory.mktemp("runs") / "shaken"
    data = {"name": "digits", "classes": [str(i) for i in range(10)]}
    checkpoints.save(folder, Checkpoint(model=model.config, data=data, weights=model.state_dict()))
    return folder
