"""torch.compile while training: the same learning, and a run that goes on where it does not work."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F

from vitrm.augment import Batch
from vitrm.checkpoint import build_model
from vitrm.config import preset
from vitrm.execution import compile_learner
from vitrm.recipe import recipe
from vitrm.supervision import Learner

MODEL = preset("tiny", dim=16, heads=2, layers=1, latents=2, n=1, tokenizer="conv", conv_norm=True)


def _learner() -> Learner:
    torch.manual_seed(0)
    return Learner(build_model(MODEL), recipe("fast"), torch.device("cpu"), bf16=False)


def _batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 10, (8,), generator=generator)
    return Batch(torch.rand(8, 3, 32, 32, generator=generator), F.one_hot(label, 10).float(), label)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
def test_a_compiled_learner_learns_what_an_eager_one_does():
    said: list[str] = []
    eager, compiled = _learner(), _learner()
    assert compile_learner(compiled, 32, 8, said.append)
    assert not said
    for key, tensor in compiled.model.state_dict().items():
        assert torch.equal(tensor, eager.model.state_dict()[key]), f"the trial left a trace in {key}"
    for _ in range(2):
        a, b = eager.batch(_batch(), 1e-3), compiled.batch(_batch(), 1e-3)
        torch.testing.assert_close(torch.stack(a.losses), torch.stack(b.losses), atol=1e-4, rtol=1e-4)
    assert compiled.updates == 2


def test_without_a_compiler_training_goes_on_uncompiled(monkeypatch):
    from torch._inductor import config

    monkeypatch.setattr(config, "force_disable_caches", True)
    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    torch._dynamo.reset()
    said: list[str] = []
    learner = _learner()
    step = learner.step
    assert not compile_learner(learner, 32, 7, said.append)
    assert learner.step == step
    assert len(said) == 1
    assert said[0].startswith("torch.compile does not work here")
    assert learner.batch(_batch(), 1e-3).updates == 1
