"""The memory of a training step, told beforehand."""

from __future__ import annotations

import pytest
import torch

from vitrm.config import preset
from vitrm.errors import UserError
from vitrm.recipe import recipe
from vitrm.training.augmentation.augment import Batch
from vitrm.training.parallel.distributed import World
from vitrm.training.start import memory
from vitrm.training.supervision import Learner

CPU = torch.device("cpu")


@pytest.mark.parametrize("supervision", ["joint", "sequential"])
def test_it_is_what_a_step_keeps(supervision: str) -> None:
    config = preset("tiny", image_size=64, dropout=0.1)
    chosen = recipe("fast", supervision=supervision, n_sup=2, free_steps=0)
    torch.manual_seed(0)
    learner = Learner(memory.checkpoint.build_model(config), chosen, CPU, False, World(), None, None)
    batch = Batch(torch.rand(4, 3, 64, 64), torch.eye(10)[:4], torch.arange(4))
    kept: dict[int, torch.Tensor] = {}
    own = {p.data_ptr() for p in (*learner.model.parameters(), *learner.model.buffers())}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
    ):
        learner.to_train_mode()
        learner.compute(learner.functions[0], (batch, None, None))
    held = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in own) / 4
    assert memory.bytes_per_image(config, chosen) == pytest.approx(held, rel=0.1)


def test_a_batch_beyond_what_is_free_is_refused_with_one_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    config, chosen = preset("tiny", image_size=64), recipe("fast")
    each = memory.bytes_per_image(config, chosen)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 100 * each)
    memory.check_batch(config, chosen, 100, CPU, False, 1)
    with pytest.raises(
        UserError, match=r"a batch of 101 images of 64 × 64 pixels needs about .* --batch-size 100 fits"
    ):
        memory.check_batch(config, chosen, 101, CPU, False, 1)
    assert memory.fitting_batch(config, chosen, CPU, False, 2) == 200
    monkeypatch.setattr(memory, "free_bytes", lambda device: each - 1)
    with pytest.raises(UserError, match="not even one does: choose a smaller model"):
        memory.check_batch(config, chosen, 8, CPU, False, 1)


def test_free_memory_is_known_here() -> None:
    free = memory.free_bytes(CPU)
    assert free is not None
    assert 1 << 20 < free < 1 << 45
