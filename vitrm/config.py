"""What a model is, as data: one frozen dataclass per kind, and the named presets.

Imports neither torch nor numpy, so that a device without them can still read a checkpoint's config.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from vitrm.errors import UserError


def _check_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{name} is {value!r}, expected a whole number of at least 1")


def _check_common(config: Any) -> None:
    _check_positive(config, "classes", "image_size")
    if config.classes < 2:
        raise UserError(f"classes is {config.classes}, expected at least 2")
    if not all(s > 0 for s in config.std):
        raise UserError(f"std is {config.std}, expected positive numbers")
    dropout = getattr(config, "dropout", 0.0)
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise UserError(f"dropout is {dropout!r}, expected 0 <= dropout < 1")


@dataclass(frozen=True, kw_only=True)
class ViTRMConfig:
    """A Vision Tiny Recursion Model.  The defaults are the paper's (3 624 203 parameters with 10 classes)."""

    kind: ClassVar[str] = "vitrm"

    classes: int = 10  # number of classes
    image_size: int = 32  # height and width of the input, pixels
    patch_size: int = 4  # P: an image gives N = (image_size / P)² tokens
    tokenizer: str = (
        "patch"  # "patch": linear projection of P × P patches (the paper); "conv": convolutions down to the same grid
    )
    conv_width: int = 64  # "conv": channels after the first convolution; they double with each further inner one
    conv_layers: int | None = (
        None  # "conv": convolutions; None: as many as halvings from the image to its grid of tokens
    )
    conv_norm: bool = False  # "conv": batch norm after each convolution
    dim: int = 384  # D: token width
    heads: int = 6  # attention heads
    layers: int = 3  # k: layers of the one shared block
    ffn: str = "gelu"  # "gelu" (the paper's text) or "swiglu" (its code)
    ffn_hidden: int | None = None  # None: 2 D for GELU, 4 D / 3 for SwiGLU, so both have 4 D² weights a layer
    latents: int = 64  # K: latent tokens z
    n: int = 3  # latent updates (eq. 2) per recursion
    recursions: int = 1  # T: recursions (eqs. 2–3) per step
    dropout: float = 0.1  # on embeddings and on each sublayer's output, while training
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # of the [0, 1] input, per channel
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        _check_common(self)
        _check_positive(self, "patch_size", "dim", "heads", "layers", "latents", "n", "recursions", "conv_width")
        if self.ffn_hidden is not None:
            _check_positive(self, "ffn_hidden")
        if self.dim % self.heads:
            raise UserError(f"dim {self.dim} is not a multiple of heads {self.heads}")
        if self.image_size % self.patch_size:
            raise UserError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.ffn not in ("gelu", "swiglu"):
            raise UserError(f"ffn is {self.ffn!r}, expected 'gelu' or 'swiglu'")
        if self.tokenizer not in ("patch", "conv"):
            raise UserError(f"tokenizer is {self.tokenizer!r}, expected 'patch' or 'conv'")
        if self.tokenizer == "conv" and (self.patch_size < 2 or self.patch_size & (self.patch_size - 1)):
            raise UserError(
                f"tokenizer 'conv' halves the image step by step: patch_size {self.patch_size} is not a power of 2"
            )
        if self.conv_layers is not None:
            _check_positive(self, "conv_layers")
            if self.conv_layers < self.patch_size.bit_length() - 1:
                raise UserError(
                    f"conv_layers is {self.conv_layers}, expected at least {self.patch_size.bit_length() - 1}: the image is "
                    f"halved after each of the first ones, down to one token per {self.patch_size} × {self.patch_size} pixels"
                )

    @property
    def tokens(self) -> int:
        """N: image tokens."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def hidden(self) -> int:
        """Width of the feed-forward network's inner layer."""
        if self.ffn_hidden is not None:
            return self.ffn_hidden
        return 2 * self.dim if self.ffn == "gelu" else 4 * self.dim // 3


@dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """A torchvision ResNet (He et al., 2016), unchanged but for its number of classes and, if asked for, its stem."""

    kind: ClassVar[str] = "resnet"

    depth: int = 18  # 18, 34 or 50
    stem: str = "imagenet"  # 7 × 7, stride 2, and a pooling; or "cifar": 3 × 3, stride 1, none
    classes: int = 10
    image_size: int = 32
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        _check_common(self)
        if self.depth not in (18, 34, 50):
            raise UserError(f"ResNet depth is {self.depth}, expected 18, 34 or 50")
        if self.stem not in ("imagenet", "cifar"):
            raise UserError(f"ResNet stem is {self.stem!r}, expected 'imagenet' or 'cifar'")


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """A Vision Transformer (Dosovitskiy et al., 2021), sized for small images."""

    kind: ClassVar[str] = "vit"

    classes: int = 10
    image_size: int = 32
    patch_size: int = 4
    dim: int = 512
    layers: int = 8
    heads: int = 8
    mlp: int = 1024  # hidden width of the feed-forward network
    dropout: float = 0.1
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        _check_common(self)
        _check_positive(self, "patch_size", "dim", "layers", "heads", "mlp")
        if self.dim % self.heads or self.image_size % self.patch_size:
            raise UserError(
                f"ViT: dim {self.dim} / heads {self.heads} or image {self.image_size} / patch {self.patch_size} is no whole number"
            )


ModelConfig = ViTRMConfig | ResNetConfig | ViTConfig
KINDS: dict[str, type[ViTRMConfig] | type[ResNetConfig] | type[ViTConfig]] = {
    c.kind: c for c in (ViTRMConfig, ResNetConfig, ViTConfig)
}

PRESETS: dict[str, ModelConfig] = {
    "paper": ViTRMConfig(),
    "paper-swiglu": ViTRMConfig(ffn="swiglu"),
    # The paper's size and cost with nano's tokenizer; what that weighs is taken from the feed-forward networks.
    "paper+": ViTRMConfig(tokenizer="conv", conv_width=32, conv_layers=3, conv_norm=True, ffn_hidden=664),
    # For an edge device: half the width, 16 latents and one latent update; a step costs about a twentieth of the paper's.
    "nano": ViTRMConfig(
        dim=192,
        heads=3,
        ffn_hidden=336,
        latents=16,
        n=1,
        tokenizer="conv",
        conv_width=32,
        conv_layers=3,
        conv_norm=True,
        dropout=0.0,
    ),
    # For tests and first looks: seconds to train, the same code paths.
    "tiny": ViTRMConfig(dim=64, heads=2, latents=8, n=2, layers=2, patch_size=8, dropout=0.0),
    "resnet18": ResNetConfig(depth=18),
    "resnet18-cifar": ResNetConfig(depth=18, stem="cifar"),
    "resnet34": ResNetConfig(depth=34),
    "resnet50": ResNetConfig(depth=50),
    "vit-small": ViTConfig(),
    "vit-base": ViTConfig(dim=768, layers=12, heads=12, mlp=3072),
    "vit-large": ViTConfig(dim=1024, layers=24, heads=16, mlp=4096),
}


def preset(name: str, **changes: Any) -> ModelConfig:
    """The preset called `name`, with fields replaced by `changes`.

    Raises `UserError` for an unknown preset, an unknown field or an impossible value.
    """
    if name not in PRESETS:
        raise UserError(f"unknown model preset {name!r}: choose one of {', '.join(PRESETS)}")
    config = PRESETS[name]
    return from_dict({**to_dict(config), **changes}, f"model preset {name}")


def to_dict(config: ModelConfig) -> dict[str, Any]:
    """The config as JSON-ready values, with its `kind`."""
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}
    return {"kind": config.kind, **values}


def from_dict(values: Mapping[str, Any], where: str) -> ModelConfig:
    """The inverse of `to_dict`; `where` names the source in the `UserError` raised for anything unexpected."""
    values = dict(values)
    kind = values.pop("kind", None)
    if kind not in KINDS:
        raise UserError(f"{where}: model kind is {kind!r}, expected one of {', '.join(KINDS)}")
    fields = {f.name: f for f in dataclasses.fields(KINDS[kind])}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise UserError(f"{where}: unknown key {', '.join(unknown)} for a {kind}; known are {', '.join(fields)}")
    for name in ("mean", "std"):
        value = values.get(name, (0.5, 0.5, 0.5))
        if (
            not isinstance(value, (list, tuple))
            or len(value) != 3
            or not all(isinstance(v, (int, float)) for v in value)
        ):
            raise UserError(f"{where}: {name} is {value!r}, expected three numbers")
        values[name] = tuple(float(v) for v in value)
    return KINDS[kind](**values)
