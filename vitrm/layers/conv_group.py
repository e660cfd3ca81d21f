"""Two convolutions that halve an image's sides, as airbench has them (Jordan, 2024): ready to learn from the first batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ShiftBatchNorm(nn.BatchNorm2d):
    """Batch norm with a learned bias and a scale of 1: what it passes on keeps its order, so it commutes with max-pooling."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        del self._parameters["weight"]
        self.register_buffer("weight", torch.ones(width), persistent=False)


class ConvGroup(nn.Module):
    """Two convolutions, with a pooling to half the size after the first; [B, before, H, W] → [B, after, H / 2, W / 2]."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1 = dirac(nn.Conv2d(before, after, 3, padding=1, bias=False))
        self.norm1 = ShiftBatchNorm(after)
        self.conv2 = dirac(nn.Conv2d(after, after, 3, padding=1, bias=False))
        self.norm2 = ShiftBatchNorm(after)

    def forward(self, h: Tensor) -> Tensor:
        h = self.conv1(h)
        # In training a quarter of the values is left to normalize.  Without training both orders give the same, as the
        # norm keeps the order of values.
        h = self.norm1(F.max_pool2d(h, 2)) if self.training else F.max_pool2d(self.norm1(h), 2)
        return F.gelu(self.norm2(self.conv2(F.gelu(h))))


def dirac(conv: nn.Conv2d) -> nn.Conv2d:
    """Makes the first filters pass one channel each on, unchanged; the others stay random."""
    nn.init.dirac_(conv.weight[: conv.in_channels].detach())
    return conv
