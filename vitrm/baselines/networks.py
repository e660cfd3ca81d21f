"""The models ViTRM is compared with, under the same input contract: networks of convolutions, and two transformers.

Images are float [B, 3, H, W] in [0, 1], normalized inside.  There is no recursion, so no depth and no halting.
torchvision's implementations are taken where it has them (it takes a second to import, and only these need it).
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrm.baseline_configs import (
    AirbenchConfig,
    BaselineConfig,
    CCTConfig,
    CifarResNetConfig,
    ConvMixerConfig,
    MobileNetV2Config,
    ResNetConfig,
    ViTConfig,
)
from vitrm.baselines.airbench import Airbench
from vitrm.model import Layer, initialize

# The layers that know classes, in all kinds of models, by the beginning of their weights' names.
CLASSIFIERS = ("classifier.", "net.fc.", "net.head.", "net.classifier.")


class Baseline(nn.Module):
    """A network behind the normalization of its config; forward gives logits [B, classes]."""

    recursive = False
    mean: Tensor
    std: Tensor

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.tensor(config.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(3, 1, 1), persistent=False)
        self.net = _network(config)

    def forward(self, images: Tensor) -> Tensor:
        images = (images - self.mean) / self.std
        if not isinstance(self.net, ViT):
            images = images.contiguous(memory_format=torch.channels_last)  # convolutions train faster so on a CPU
        return self.net(images)


def _network(config: BaselineConfig) -> nn.Module:
    match config:
        case ResNetConfig():
            return _resnet(config)
        case CifarResNetConfig():
            return CifarResNet(config)
        case MobileNetV2Config():
            return MobileNetV2(config)
        case ConvMixerConfig():
            return ConvMixer(config)
        case AirbenchConfig():
            return Airbench(config)
        case ViTConfig():
            return ViT(config)
        case CCTConfig():
            return CCT(config)
    raise TypeError(f"{config.kind} has no network")


class Transformer(nn.Module):
    """A network whose `layers` are ViTRM's own, so that a comparison of the two compares recursion with depth and nothing
    else.  Their linear layers become int8.
    """

    layers: nn.ModuleList

    def through_layers(self, h: Tensor) -> Tensor:
        """Embedded tokens [B, tokens, D] → the same."""
        for layer in self.layers:
            assert isinstance(layer, Layer)
            h = layer.finish(h, layer.project(h))
        return h


def _layers(config: ViTConfig | CCTConfig) -> nn.ModuleList:
    return nn.ModuleList(
        Layer(dim=config.dim, heads=config.heads, ffn="gelu", hidden=config.mlp, dropout=config.dropout)
        for _ in range(config.layers)
    )


class ViT(Transformer):
    """Vision Transformer (Dosovitskiy et al., 2021): class token, learned positions, pre-norm layers, final LayerNorm."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        tokens = (config.image_size // config.patch_size) ** 2
        self.proj = nn.Conv2d(3, config.dim, config.patch_size, stride=config.patch_size)
        self.cls = nn.Parameter(torch.empty(1, 1, config.dim))
        self.pos = nn.Parameter(torch.empty(1, 1 + tokens, config.dim))
        self.layers = _layers(config)
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, config.classes)
        self.dropout = nn.Dropout(config.dropout)
        initialize(self, [self.cls, self.pos], std=0.02)
        nn.init.trunc_normal_(self.head.weight, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        h = self.proj(images).flatten(2).transpose(1, 2)  # [B, D, H/P, W/P] → [B, N, D]
        h = self.dropout(torch.cat([self.cls.expand(h.shape[0], -1, -1), h], 1) + self.pos)
        return self.head(self.norm(self.through_layers(h)[:, 0]))


class CCT(Transformer):
    """Compact Convolutional Transformer (Hassani et al., 2021): tokens from convolutions, no class token; the answer is read
    off a weighted mean of all tokens.
    """

    def __init__(self, config: CCTConfig) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairwise(config.conv_widths))
        self.pos = nn.Parameter(torch.empty(1, config.tokens, config.dim))
        self.layers = _layers(config)
        self.norm = nn.LayerNorm(config.dim)
        self.pool = nn.Linear(config.dim, 1)
        self.head = nn.Linear(config.dim, config.classes)
        self.dropout = nn.Dropout(config.dropout)
        initialize(self, [self.pos], std=0.2)
        for conv in self.convs:
            assert isinstance(conv, nn.Conv2d)
            nn.init.kaiming_normal_(conv.weight)
        nn.init.trunc_normal_(self.head.weight, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        for conv in self.convs:
            images = F.max_pool2d(F.relu(conv(images)), 3, stride=2, padding=1)
        h = self.dropout(images.flatten(2).transpose(1, 2) + self.pos)  # [B, D, H', W'] → [B, N, D]
        h = self.norm(self.through_layers(h))
        weights = self.pool(h).softmax(1)  # [B, N, 1]
        return self.head((weights * h).sum(1))


class GlobalAverage(nn.Module):
    """The mean of each channel, as torchvision's AdaptiveAvgPool2d(1): that is traced as a gather, and with torch 2.9 to no valid graph."""

    def forward(self, maps: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, 1, 1]."""
        return maps.mean((2, 3), keepdim=True)


def _resnet(config: ResNetConfig) -> nn.Module:
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


class BasicBlock(nn.Module):
    """Two convolutions beside a shortcut without weights: every stride-th value, and zeros for the channels that are new."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.stride, self.added = stride, after - before

    def forward(self, h: Tensor) -> Tensor:
        kept = h
        if self.added:
            kept = F.pad(h[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.added // 2, -(-self.added // 2)))
        return F.relu(kept + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(h))))))


class CifarResNet(nn.Module):
    """He et al.'s ResNet for CIFAR-10 (2016, section 4.2); torchvision has those for ImageNet only."""

    def __init__(self, config: CifarResNetConfig) -> None:
        super().__init__()
        first, *_, last = config.widths
        self.conv = nn.Conv2d(3, first, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(first)
        widths = [first, *(width for width in config.widths for _ in range(config.blocks))]
        self.blocks = nn.ModuleList(BasicBlock(a, b, 1 if a == b else 2) for a, b in pairwise(widths))
        self.head = nn.Linear(last, config.classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        h = F.relu(self.norm(self.conv(images)))
        for block in self.blocks:
            h = block(h)
        return self.head(h.mean((2, 3)))


class MobileNetV2(nn.Module):
    """torchvision's features and classifier, with the strides of the config."""

    def __init__(self, config: MobileNetV2Config) -> None:
        super().__init__()
        from torchvision import models

        net = models.MobileNetV2(
            num_classes=config.classes,
            width_mult=config.width,
            inverted_residual_setting=[list(stage) for stage in config.stages],
            dropout=config.dropout,
        )
        self.features, self.classifier = net.features, net.classifier
        first = self.features[0][0]
        first.stride = (1, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).mean((2, 3)))


class Mixer(nn.Module):
    """One layer of ConvMixer: within each channel, beside a shortcut; then across channels."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.norm1 = nn.BatchNorm2d(dim)
        self.pointwise = nn.Conv2d(dim, dim, 1)
        self.norm2 = nn.BatchNorm2d(dim)

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.norm1(F.gelu(self.depthwise(h)))
        return self.norm2(F.gelu(self.pointwise(h)))


class ConvMixer(nn.Module):
    """ConvMixer (Trockman & Kolter, 2022): batch norm follows GELU, not the convolution."""

    def __init__(self, config: ConvMixerConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.dim, config.patch_size, stride=config.patch_size)
        self.norm = nn.BatchNorm2d(config.dim)
        self.layers = nn.Sequential(*(Mixer(config.dim, config.kernel) for _ in range(config.layers)))
        self.head = nn.Linear(config.dim, config.classes)

    def forward(self, images: Tensor) -> Tensor:
        h = self.layers(self.norm(F.gelu(self.proj(images))))
        return self.head(h.mean((2, 3)))
