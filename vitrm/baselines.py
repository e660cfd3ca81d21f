"""The models ViTRM is compared with: torchvision's ResNet and VisionTransformer, with our input contract.

Images are float [B, 3, H, W] in [0, 1], normalised inside.  There is no recursion, so no depth and no halting.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitrm.config import ResNetConfig, ViTConfig


class Baseline(nn.Module):
    """A torchvision network behind the normalisation of its config; forward gives logits [B, classes]."""

    recursive = False
    mean: Tensor
    std: Tensor

    def __init__(self, config: ResNetConfig | ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.tensor(config.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(3, 1, 1), persistent=False)
        self.net = _network(config)

    def forward(self, images: Tensor) -> Tensor:
        return self.net((images - self.mean) / self.std)


def _network(config: ResNetConfig | ViTConfig) -> nn.Module:
    # torchvision is heavy and only the baselines and data sets need it.
    from torchvision import models

    if isinstance(config, ResNetConfig):
        build = {18: models.resnet18, 34: models.resnet34, 50: models.resnet50}[config.depth]
        return build(weights=None, num_classes=config.classes)
    net = models.VisionTransformer(
        image_size=config.image_size,
        patch_size=config.patch_size,
        num_layers=config.layers,
        num_heads=config.heads,
        hidden_dim=config.dim,
        mlp_dim=config.mlp,
        dropout=config.dropout,
        num_classes=config.classes,
    )
    # torchvision starts the head at zero, which gives the first training step no gradient below it.
    nn.init.trunc_normal_(net.heads.head.weight, std=0.02)
    return net
