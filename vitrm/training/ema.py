"""The exponential moving average of the weights: the weights that are evaluated and saved.

    shadow ← d · shadow + (1 − d) · weight,     d = min(decay, (1 + t) / (10 + t)) at update t = 0, 1, …

The warm-up of d lets a run of a few hundred updates forget its random start: with d = 0.999 from the
beginning, a third of it would still be there after 1000 updates.
"""

from __future__ import annotations

import copy

import torch
from torch import nn


def decay_at(update: int, decay: float) -> float:
    """d at update `update` (0 is the first)."""
    return min(decay, (1 + update) / (10 + update))


class EMA:
    """A copy of a model (`.model`, in eval mode, without gradients) that follows it."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._source: nn.Module | None = None

    @torch.no_grad()
    def update(self, source: nn.Module, update: int) -> None:
        """Moves towards `source`; whole-number buffers (batch counts) are copied."""
        if source is not self._source:  # the tensors stay the same: looking them up takes longer than averaging them
            own, new = self.model.state_dict(), source.state_dict()
            pairs = [(own[name], new[name]) for name in own]
            self._floats = [pair for pair in pairs if pair[0].is_floating_point()]
            self._counts = [pair for pair in pairs if not pair[0].is_floating_point()]
            self._source = source
        shadow, weights = map(list, zip(*self._floats, strict=True))
        torch._foreach_lerp_(shadow, weights, 1 - decay_at(update, self.decay))
        for mine, count in self._counts:
            mine.copy_(count)
