"""A network after airbench (Jordan, 2024, "94% on CIFAR-10 in 3.29 seconds on a single GPU"): a teacher that a CPU can train.

    h = GELU(W images + b)            W: frozen, makes the 2 × 2 patches of the training images white
    h = group(h), three times         convolution, pooling to half the size, batch norm, GELU; convolution, batch norm, GELU
    logits = (W_c max(h)) / 9         the largest value of each channel

Convolutions begin as the identity as far as their channels go (dirac initialization): depth costs no signal at the start.
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from vitrm.baseline_configs import AirbenchConfig
from vitrm.layers.conv_group import ConvGroup
from vitrm.layers.whitening import Whitening

LOGIT_SCALE = 1 / 9  # the logits of the untrained head are too large to start from


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
