"""The models ViTRM is compared with, under the same input contract: ResNet (torchvision's) and ViT.

Images are float [B, 3, H, W] in [0, 1], normalised inside.  There is no recursion, so no depth and no halting.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitrm.config import ResNetConfig, ViTConfig
from vitrm.model import Layer, initialise


class Baseline(nn.Module):
    """A network behind the normalisation of its config; forward gives logits [B, classes]."""

    recursive = False
    mean: Tensor
    std: Tensor

    def __init__(self, config: ResNetConfig | ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.tensor(config.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(3, 1, 1), persistent=False)
        self.net = _resnet(config) if isinstance(config, ResNetConfig) else ViT(config)

    def forward(self, images: Tensor) -> Tensor:
        images = (images - self.mean) / self.std
        if self.config.kind == "resnet":
            images = images.contiguous(memory_format=torch.channels_last)  # convolutions train faster so on a CPU
        return self.net(images)


class ViT(nn.Module):
    """Vision Transformer (Dosovitskiy et al., 2021): class token, learned positions, pre-norm layers, final LayerNorm.

    Its layers are ViTRM's own, so that a comparison of the two compares recursion with depth and nothing else.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        tokens = (config.image_size // config.patch_size) ** 2
        self.proj = nn.Conv2d(3, config.dim, config.patch_size, stride=config.patch_size)
        self.cls = nn.Parameter(torch.empty(1, 1, config.dim))
        self.pos = nn.Parameter(torch.empty(1, 1 + tokens, config.dim))
        self.layers = nn.ModuleList(
            Layer(dim=config.dim, heads=config.heads, ffn="gelu", hidden=config.mlp, dropout=config.dropout)
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, config.classes)
        self.dropout = nn.Dropout(config.dropout)
        initialise(self, [self.cls, self.pos], std=0.02)
        nn.init.trunc_normal_(self.head.weight, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        h = self.proj(images).flatten(2).transpose(1, 2)  # [B, D, H/P, W/P] → [B, N, D]
        h = self.dropout(torch.cat([self.cls.expand(h.shape[0], -1, -1), h], 1) + self.pos)
        for layer in self.layers:
            assert isinstance(layer, Layer)
            h = layer.finish(h, layer.project(h))
        return self.head(self.norm(h[:, 0]))


class GlobalAverage(nn.Module):
    """What torchvision's AdaptiveAvgPool2d(1) computes; that is traced as a gather, and with torch 2.9 to no valid graph."""

    def forward(self, maps: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, 1, 1]."""
        return maps.mean((2, 3), keepdim=True)


def _resnet(config: ResNetConfig) -> nn.Module:
    # torchvision takes a second to import, and only ResNets and CIFAR need it.
    from torchvision import models

    build = {18: models.resnet18, 34: models.resnet34, 50: models.resnet50}[config.depth]
    net = build(weights=None, num_classes=config.classes)
    net.avgpool = GlobalAverage()
    if config.stem == "cifar":
        # As He et al. (2016, section 4.2) begin on 32 × 32 images: torchvision's stem leaves 8 × 8 of them at once.
        net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity()
    return net
