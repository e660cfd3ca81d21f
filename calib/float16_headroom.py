"""The distance of activations from float16's limit, step by step.

A recursion adds to its state at every step, so what fits at one depth may overflow at another, and ONNX
Runtime's CPU provider computes float16 graphs in float32, where no overflow shows.  So the eager model
runs in float32 and every tensor that any operator produces is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vitrm.baselines.networks import Baseline
from vitrm.model import ViTRM

FLOAT16_MAX = 65504.0
_BATCH = 16  # all activations of a large image's tokens take memory


@dataclass(frozen=True)
class Headroom:
    """The largest activations met."""

    largest: tuple[float, ...]  # max |activation| in the embedding, then in each step with its heads
    operators: tuple[str, ...]  # the operator that produced each

    @property
    def factor(self) -> float:
        """float16's limit divided by the largest activation: at least 1 where nothing overflows."""
        return FLOAT16_MAX / max(max(self.largest), 1e-30)

    @property
    def where(self) -> str:
        """The place of the largest activation, in words."""
        worst = max(range(len(self.largest)), key=lambda i: self.largest[i])
        stage = "the embedding" if worst == 0 else f"step {worst}"
        return f"{self.largest[worst]:.4g} in {stage} ({self.operators[worst]})"


def float16_headroom(model: ViTRM | Baseline, images: Tensor, steps: int) -> Headroom:
    """Runs `model` on images [B, 3, H, W] in [0, 1] for `steps` steps (1 for a baseline) and notes the largest |activation|."""
    parts = [_of_batch(model, part, steps) for part in images.split(_BATCH)]
    worst = [max(stage, key=lambda f: f[0]) for stage in zip(*parts, strict=True)]
    return Headroom(tuple(value for value, _ in worst), tuple(operator for _, operator in worst))


def _of_batch(model: ViTRM | Baseline, images: Tensor, steps: int) -> list[tuple[float, str]]:
    """The largest |activation| in the embedding (of a baseline: anywhere), then in each step, with its operator."""
    largest: list[tuple[float, str]] = []

    @contextmanager
    def stage() -> Iterator[None]:
        with _Largest() as watch:
            yield
        largest.append((watch.value, watch.operator))

    with torch.no_grad():
        if isinstance(model, Baseline):
            with stage():
                model(images)
            return largest
        with stage():
            embedded = model.embed(images)
        state = model.initial_state(len(images))
        for _ in range(steps):
            with stage():
                state = model.step(embedded, state)
                model.heads(state.y)
    return largest


class _Largest(TorchDispatchMode):
    """Notes the largest finite-or-not |value| among the outputs of all operators run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.value = 0.0
        self.operator = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for tensor in outputs if isinstance(outputs, (tuple, list)) else (outputs,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel():
                value = float(tensor.abs().max())
                if value > self.value:
                    self.value, self.operator = value, str(func).removeprefix("aten.").split(".")[0]
        return outputs
