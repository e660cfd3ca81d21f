"""A replica learns what its model would, for any form of the block."""

from __future__ import annotations

import pytest
import torch
from small_learners import make_batch, make_learner

from vitrm.config import preset

FORMS = {
    "joint": preset("tiny", dim=16, heads=2, layers=2, latents=2, n=1, dropout=0.0),
    "one layer": preset("tiny", dim=16, heads=2, layers=1, latents=2, n=1, dropout=0.0),
    "cross": preset("tiny", dim=16, heads=2, layers=2, latents=2, n=1, dropout=0.0, mixing="cross"),
    "mlp": preset("tiny", dim=16, heads=2, layers=2, latents=2, n=1, dropout=0.0, token_mixer="mlp", ffn="swiglu"),
    "baseline": preset("vit-small", dim=16, layers=1, heads=2, mlp=16, dropout=0.0),
}


@pytest.mark.parametrize("config", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_a_replica_learns_what_its_model_would(config, bf16):
    plain, replicated = (make_learner(config, bf16=bf16, replicated=each) for each in (False, True))
    for learner in (plain, replicated):
        with torch.no_grad():
            for parameter in learner.model.parameters():  # what is zero at the start would hide what is left out
                parameter.add_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
    for update in range(2):
        results = [learner.train_step(make_batch(), 1e-3) for learner in (plain, replicated)]
        tolerance = (0.05 if bf16 else 1e-5) * (1 + update)
        a, b = (torch.stack(result.losses) for result in results)
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
        if update:
            continue  # AdamW's first steps are of one size, even where a gradient is nothing but rounding
        for (name, one), two in zip(plain.model.named_parameters(), replicated.model.parameters(), strict=True):
            assert (one.grad is None) == (two.grad is None), name
            if one.grad is not None:
                scale = max(float(one.grad.norm()), 1e-2)
                assert float((one.grad - two.grad).norm()) < (0.1 if bf16 else 1e-4) * scale, name


def test_what_is_multiplied_at_once_lies_together():
    learner = make_learner(FORMS["joint"], replicated=True)
    first, last = learner.replicas[0].model.block
    names = {name for name, _ in learner.replicas[0].model.named_parameters() if name.startswith("block")}
    assert set(first.merged) == {("q", "k", "v")}
    assert set(last.merged) == {("q",), ("k", "v")}  # of the last layer only rows that are kept have a query
    assert not any(".q." in name or ".k." in name for name in names)
    own = learner.model.block[0]
    assert torch.equal(first.merged["q", "k", "v"].weight[:16], own.q.weight * own.scale)
    assert torch.equal(first.merged["q", "k", "v"].bias[32:], own.v.bias)
