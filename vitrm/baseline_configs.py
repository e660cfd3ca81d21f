"""The models ViTRM is compared with, as data: one frozen dataclass per kind, and their presets.

Imports neither torch nor numpy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, NamedTuple

from vitrm.errors import UserError
from vitrm.fields import check, choice, real, side, three, whole
from vitrm.model_limits import (
    MAX_CLASSES,
    MAX_IMAGE_SIZE,
    MAX_WIDTH,
    check_multiple,
    check_size,
    layer_activation,
    layer_parameters,
)


@dataclass(frozen=True, kw_only=True)
class BaselineConfig(ABC):
    """Settings that all baselines have."""

    kind: ClassVar[str]
    convolutional: ClassVar[bool]  # int8 is for its convolutions, not for the linear layers of a transformer

    classes: int = whole(10, 2, MAX_CLASSES, "number of classes")
    image_size: int = side(32, 1, MAX_IMAGE_SIZE, "height and width that images are brought to")
    mean: tuple[float, float, float] = three((0.5, 0.5, 0.5), -1000, 1000, "mean of the [0, 1] input, per channel")
    std: tuple[float, float, float] = three((0.5, 0.5, 0.5), 1e-6, 1e6, "its standard deviation, per channel")

    def __post_init__(self) -> None:
        check(self)
        check_size(self)

    @property
    @abstractmethod
    def parameters(self) -> int:
        """Trainable weights of the model, counted without building it."""

    @property
    @abstractmethod
    def activation(self) -> int:
        """Values of the largest tensor that one image takes."""


@dataclass(frozen=True, kw_only=True)
class ResNetConfig(BaselineConfig):
    """A torchvision ResNet (He et al., 2016), unchanged but for its number of classes and, if asked for, its stem."""

    kind: ClassVar[str] = "resnet"
    convolutional: ClassVar[bool] = True

    depth: int = choice(18, 34, 50, help="layers")
    stem: str = choice(
        "imagenet",
        "cifar",
        help="first convolution: 7 × 7 of stride 2 and a pooling, or (cifar) 3 × 3 of stride 1 and none",
    )

    @property
    def parameters(self) -> int:
        """Trainable weights of the model, counted without building it."""
        body, width = {18: (11_176_512, 512), 34: (21_284_672, 512), 50: (23_508_032, 2048)}[self.depth]
        first = 3 * 64 * (3**2 - 7**2) if self.stem == "cifar" else 0  # its first convolution is the smaller one
        return body + first + self.classes * (width + 1)

    @property
    def activation(self) -> int:
        """Values of the largest tensor that one image takes."""
        size = self.image_size if self.stem == "cifar" else (self.image_size + 1) // 2
        # A ResNet-50 widens to 256 channels: where the image is not pooled, at once.
        return size**2 * (256 if self.depth == 50 and self.stem == "cifar" else 64)


@dataclass(frozen=True, kw_only=True)
class CifarResNetConfig(BaselineConfig):
    """The ResNet that He et al. (2016, section 4.2) made for 32 × 32 images: 6 n + 2 layers, 16 to 64 channels.

    Its shortcuts have no weights (their option A).
    """

    kind: ClassVar[str] = "cifar-resnet"
    convolutional: ClassVar[bool] = True
    widths: ClassVar[tuple[int, ...]] = (16, 32, 64)  # of the three stages

    depth: int = whole(20, 8, 1202, "layers, 6 n + 2")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth % 6 != 2:
            raise UserError(f"depth is {self.depth}, expected 6 n + 2: 20, 32, 44, 56 or 110 in the paper")

    @property
    def blocks(self) -> int:
        """n: blocks of two convolutions in each stage."""
        return self.depth // 6

    @property
    def parameters(self) -> int:
        """Trainable weights of the model, counted without building it."""
        first = self.widths[0]
        count = 27 * first + 2 * first + (self.widths[-1] + 1) * self.classes
        for before, width in pairwise((first, *self.widths)):
            count += 9 * before * width + 9 * width**2 * (2 * self.blocks - 1) + 4 * width * self.blocks
        return count

    @property
    def activation(self) -> int:
        """Values of the largest tensor that one image takes."""
        return self.widths[0] * self.image_size**2


class InvertedResidual(NamedTuple):
    """A block of MobileNetV2: a pointwise, a depthwise and a pointwise convolution."""

    before: int  # channels
    expanded: int  # channels inside; as many as before: the first convolution is left out
    after: int
    stride: int


@dataclass(frozen=True, kw_only=True)
class MobileNetV2Config(BaselineConfig):
    """torchvision's MobileNetV2 (Sandler et al., 2018) with fewer strides: 32 × 32 images end as maps of 4 × 4, not 1 × 1."""

    kind: ClassVar[str] = "mobilenetv2"
    convolutional: ClassVar[bool] = True
    # Expansion, channels, blocks, stride of the first block: the paper's table 2 but for the second stage's stride.
    stages: ClassVar[tuple[tuple[int, int, int, int], ...]] = (
        (1, 16, 1, 1),
        (6, 24, 2, 1),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )

    width: float = real(1.0, 0.1, 8, "factor of all channels")
    dropout: float = real(0.2, 0, 1, "dropout before the classifier", below=True, unit="P")

    @property
    def _blocks(self) -> Iterator[InvertedResidual]:
        before = _eights(32 * self.width)
        for expansion, channels, blocks, stride in self.stages:
            for i in range(blocks):
                after = _eights(channels * self.width)
                yield InvertedResidual(before, expansion * before, after, stride if i == 0 else 1)
                before = after

    @property
    def parameters(self) -> int:
        """Trainable weights of the model, counted without building it."""
        first, last, features = _eights(32 * self.width), _eights(320 * self.width), _eights(1280 * max(1, self.width))
        count = (27 + 2) * first + (last + 2) * features + (features + 1) * self.classes
        for block in self._blocks:
            count += (9 + 2) * block.expanded + (block.expanded + 2) * block.after
            if block.expanded != block.before:
                count += (block.before + 2) * block.expanded
        return count

    @property
    def activation(self) -> int:
        """Values of the largest tensor that one image takes."""
        size, largest = self.image_size, 3 * self.image_size**2
        for block in self._blocks:
            largest = max(largest, block.expanded * size**2)
            size = -(-size // block.stride)
        return max(largest, _eights(1280 * max(1, self.width)) * size**2)


def _eights(channels: float) -> int:
    """The multiple of 8 next to `channels`, not below 90 % of it: MobileNet's rounding."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


@dataclass(frozen=True, kw_only=True)
class ConvMixerConfig(BaselineConfig):
    """ConvMixer (Trockman & Kolter, 2022): patches, then depthwise and pointwise convolutions at one size."""

    kind: ClassVar[str] = "convmixer"
    convolutional: ClassVar[bool] = True

    patch_size: int = whole(2, 1, MAX_IMAGE_SIZE, "side of a patch", unit="pixels")
    dim: int = whole(256, 1, MAX_WIDTH, "channels", unit="D")
    layers: int = whole(8, 1, 1024, "layers")
    kernel: int = choice(5, 3, 7, 9, help="side of the depthwise convolutions")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_multiple("image_size", self.image_size, "patch_size", self.patch_size)

    @property
    def parameters(self) -> int:
        """Trainable weights of the model, counted without building it."""
        d = self.dim
        patches = 3 * self.patch_size**2 * d + 3 * d
        layer = self.kernel**2 * d + 3 * d + d**2 + 3 * d
        return patches + self.layers * layer + (d + 1) * self.classes

    @property
    def activation(self) -> int:
        """Values of the largest tensor that one image takes."""
        return max(3 * self.image_size**2, self.dim * (self.image_size // self.patch_size) ** 2)


@dataclass(frozen=True, kw_only=True)
class AirbenchConfig(BaselineConfig):
    """A network after airbench95 (Jordan, 2024), which learns CIFAR-10 in few epochs: whitening, then three groups of two
    convolutions.
    """

    kind: ClassVar[str] = "airbench"
    convolutional: ClassVar[bool] = True
    whitening_size: ClassVar[int] = 2  # pixels: the side of the patches that are whitened

    # Halved three times.
    image_size: int = side(32, 9, MAX_IMAGE_SIZE, "height and width that images are brought to")
    width: int = whole(128, 1, MAX_WIDTH, "channels of the first group")
    deep_width: int = whole(384, 1, MAX_WIDTH, "channels of the second and third group")

    @property
    def whitened(self) -> int:
        """Channels of the whitening: every direction of a patch, and its negative."""
        return 2 * 3 * self.whitening_size**2

    @property
    def widths(self) -> tuple[int, int, int, int]:
        """Channels before, between and after the groups."""
        return self.whitened, self.width, self.deep_width, self.deep_width

    @property
    def parameters(self) -> int:
        """Trainable weights of the model, counted without building it; the whitening's are not trained, but for its bias."""
        groups = sum(9 * (a * b + b**2) + 2 * b for a, b in pairwise(self.widths))
        return self.whitened + groups + self.deep_width * self.classes

    @property
    def activation(self) -> int:
        """Values of the largest tensor that one image takes."""
        size = self.image_size - self.whitening_size + 1
        return max(3 * self.image_size**2, max(self.whitened, self.width) * size**2, self.deep_width * (size // 2) ** 2)


@dataclass(frozen=True, kw_only=True)
class ViTConfig(BaselineConfig):
    """A Vision Transformer (Dosovitskiy et al., 2021), sized for small images."""

    kind: ClassVar[str] = "vit"
    convolutional: ClassVar[bool] = False

    patch_size: int = whole(4, 1, MAX_IMAGE_SIZE, "side of a patch", unit="pixels")
    dim: int = whole(512, 1, MAX_WIDTH, "token width D", unit="D")
    layers: int = whole(8, 1, 1024, "layers")
    heads: int = whole(8, 1, 1024, "attention heads")
    mlp: int = whole(1024, 1, 4 * MAX_WIDTH, "width of the inner layer of the feed-forward network")
    dropout: float = real(0.1, 0, 1, "dropout on embeddings and on each sublayer's output", below=True, unit="P")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_multiple("dim", self.dim, "heads", self.heads)
        check_multiple("image_size", self.image_size, "patch_size", self.patch_size)

    @property
    def _rows(self) -> int:
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def parameters(self) -> int:
        """Trainable weights of the model, counted without building it."""
        d = self.dim
        tokenizer = 3 * self.patch_size**2 * d + d
        block = self.layers * layer_parameters(d, self.mlp, matrices=2)
        return tokenizer + (1 + self._rows) * d + block + 2 * d + self.classes * (d + 1)

    @property
    def activation(self) -> int:
        """Values of the largest tensor that one image takes."""
        return max(3 * self.image_size**2, layer_activation(self._rows, self.heads, max(self.dim, self.mlp)))


@dataclass(frozen=True, kw_only=True)
class CCTConfig(BaselineConfig):
    """A Compact Convolutional Transformer (Hassani et al., 2021).  The defaults are CCT-7/3×1.

    Its layers are ViTRM's own.  Other than there, queries, keys and values have biases, and dropout stands for the
    dropout of attention and the stochastic depth, both of 0.1.
    """

    kind: ClassVar[str] = "cct"
    convolutional: ClassVar[bool] = False

    conv_layers: int = whole(1, 1, 8, "convolutions of 3 × 3, each followed by a pooling that halves the image")
    dim: int = whole(256, 1, MAX_WIDTH, "token width D", unit="D")
    layers: int = whole(7, 1, 1024, "layers")
    heads: int = whole(4, 1, 1024, "attention heads")
    mlp: int = whole(512, 1, 4 * MAX_WIDTH, "width of the inner layer of the feed-forward network")
    dropout: float = real(0.1, 0, 1, "dropout on embeddings and on each sublayer's output", below=True, unit="P")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_multiple("dim", self.dim, "heads", self.heads)

    @property
    def conv_widths(self) -> list[int]:
        """Channels before, between and after the convolutions."""
        return [3, *[64] * (self.conv_layers - 1), self.dim]

    @property
    def tokens(self) -> int:
        """Image tokens; there is no other."""
        return (-(-self.image_size // 2**self.conv_layers)) ** 2

    @property
    def parameters(self) -> int:
        """Trainable weights of the model, counted without building it."""
        d = self.dim
        tokenizer = sum(9 * a * b for a, b in pairwise(self.conv_widths))
        block = self.layers * layer_parameters(d, self.mlp, matrices=2)
        pooling = d + 1
        return tokenizer + self.tokens * d + block + 2 * d + pooling + self.classes * (d + 1)

    @property
    def activation(self) -> int:
        """Values of the largest tensor that one image takes."""
        convolved = [
            width * (-(-self.image_size // 2**halved)) ** 2 for halved, width in enumerate(self.conv_widths[1:])
        ]
        return max(
            3 * self.image_size**2,
            *convolved,
            layer_activation(self.tokens, self.heads, max(self.dim, self.mlp)),
        )


BASELINES: tuple[type[BaselineConfig], ...] = (
    ResNetConfig,
    CifarResNetConfig,
    MobileNetV2Config,
    ConvMixerConfig,
    AirbenchConfig,
    ViTConfig,
    CCTConfig,
)
CONVOLUTIONAL = frozenset(c.kind for c in BASELINES if c.convolutional)  # kinds whose convolutions become int8

BASELINE_PRESETS: dict[str, BaselineConfig] = {
    "resnet18": ResNetConfig(depth=18),
    "resnet18-cifar": ResNetConfig(depth=18, stem="cifar"),
    "resnet34": ResNetConfig(depth=34),
    "resnet50": ResNetConfig(depth=50),
    "resnet20": CifarResNetConfig(depth=20),
    "mobilenetv2-cifar": MobileNetV2Config(),
    "convmixer-256-8": ConvMixerConfig(),
    "airbench": AirbenchConfig(),
    "vit-small": ViTConfig(),
    "vit-base": ViTConfig(dim=768, layers=12, heads=12, mlp=3072),
    "vit-large": ViTConfig(dim=1024, layers=24, heads=16, mlp=4096),
    "cct-7-3x1": CCTConfig(),
}
