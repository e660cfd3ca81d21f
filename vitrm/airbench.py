"""A network after airbench (Jordan, 2024, "94% on CIFAR-10 in 3.29 seconds on a single GPU"): a teacher that a CPU can train.

    h = GELU(W images + b)            W: frozen, makes the 2 × 2 patches of the training images white
    h = group(h), three times         convolution, pooling to half the size, batch norm, GELU; convolution, batch norm, GELU
    logits = (W_c max(h)) / 9         the largest value of each channel

Convolutions begin as the identity as far as their channels go (dirac initialization): depth costs no signal at the start.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrm.baseline_configs import AirbenchConfig
from vitrm.model import ShiftBatchNorm
from vitrm.whitening import whitening_filters

LOGIT_SCALE = 1 / 9  # the logits of the untrained head are too large to start from


class Whitening(nn.Module):
    """A convolution of the whole image whose weight is not trained: a buffer, saved and exported with the model.

    As built it passes every pixel of a patch on, and its negative.  `whiten` replaces that by what makes the patches of
    the training images white: before the model's weights are averaged (`vitrm.training.ema`) or copied.
    """

    weight: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        directions = torch.eye(3 * size**2).view(-1, 3, size, size)
        self.register_buffer("weight", torch.cat([directions, -directions]))
        self.bias = nn.Parameter(torch.zeros(len(self.weight)))

    def whiten(self, images: Tensor) -> None:
        """Sets the weight for normalized images [n, 3, H, W]."""
        self.weight.copy_(whitening_filters(images, self.weight.shape[-1]))

    def forward(self, images: Tensor) -> Tensor:
        """Normalized images [B, 3, H, W] → [B, 2 · 3 · P², H − P + 1, W − P + 1]."""
        return F.conv2d(images, self.weight, self.bias)


class ConvGroup(nn.Module):
    """Two convolutions, with a pooling to half the size after the first; [B, before, H, W] → [B, after, H / 2, W / 2]."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1 = _dirac(nn.Conv2d(before, after, 3, padding=1, bias=False))
        self.norm1 = ShiftBatchNorm(after)
        self.conv2 = _dirac(nn.Conv2d(after, after, 3, padding=1, bias=False))
        self.norm2 = ShiftBatchNorm(after)

    def forward(self, h: Tensor) -> Tensor:
        h = self.conv1(h)
        # In training a quarter of the values is left to normalize.  Without training both orders give the same, as the
        # norm keeps the order of values.
        h = self.norm1(F.max_pool2d(h, 2)) if self.training else F.max_pool2d(self.norm1(h), 2)
        return F.gelu(self.norm2(self.conv2(F.gelu(h))))


class Airbench(nn.Module):
    """The network of this module's docstring, on normalized images [B, 3, H, W]; logits [B, classes]."""

    def __init__(self, config: AirbenchConfig) -> None:
        super().__init__()
        self.whitening = Whitening(config.whitening_size)
        self.groups = nn.ModuleList(ConvGroup(a, b) for a, b in pairwise(config.widths))
        self.head = nn.Linear(config.deep_width, config.classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        h = F.gelu(self.whitening(images))
        for group in self.groups:
            h = group(h)
        h = F.max_pool2d(h, h.shape[-1]).flatten(1)
        return self.head(h) * LOGIT_SCALE


def _dirac(conv: nn.Conv2d) -> nn.Conv2d:
    """Makes the first filters pass one channel each on, unchanged; the others stay random."""
    nn.init.dirac_(conv.weight[: conv.in_channels])
    return conv
