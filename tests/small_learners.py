"""A small learner and a batch for it, the same every time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from vitrm.checkpoint import build_model
from vitrm.config import ModelConfig
from vitrm.recipe import recipe
from vitrm.training.augmentation.augment import Batch
from vitrm.training.parallel.cpu_workers import Workers
from vitrm.training.supervision import Learner
from vitrm.training.teachers.distillation import Teacher


def make_learner(
    config: ModelConfig,
    *,
    bf16: bool = False,
    workers: Workers | None = None,
    teacher: Teacher | None = None,
    replicated: bool | None = None,
    **changes: Any,
) -> Learner:
    """A learner of `config` on the CPU, by the recipe `fast` with `changes`."""
    torch.manual_seed(0)
    model = build_model(config)
    chosen, cpu = recipe("fast", **changes), torch.device("cpu")
    return Learner(model, chosen, cpu, bf16, teacher=teacher, workers=workers, replicated=replicated)


def make_batch() -> Batch:
    """Eight images of noise with labels."""
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 10, (8,), generator=generator)
    return Batch(torch.rand(8, 3, 32, 32, generator=generator), F.one_hot(label, 10).float(), label)
