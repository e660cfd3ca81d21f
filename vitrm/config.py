"""What a model is, as data: one frozen dataclass per kind, and the named presets.

Imports neither torch nor numpy, so that a device without them can still read a checkpoint's config.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from vitrm.errors import UserError
from vitrm.fields import check, choice, flag, from_values, real, shown, three, whole, whole_or_none, wholes

MAX_PARAMETERS = 1_000_000_000  # 4 GB of float32
MAX_ACTIVATION = 2**30  # values of the largest tensor that one image takes: 4 GiB of float32
MAX_LAYERS = 4096  # layers that one step, or a baseline, computes after each other
MAX_CLASSES = 100_000
MAX_IMAGE_SIZE = 4096
_MAX_WIDTH = 65_536
WHITENED = 24  # filters of the tokenizer "whitened": the 12 directions of 2 × 2 pixels, and their negatives


def _layer_parameters(dim: int, hidden: int, matrices: int) -> int:
    """Weights of a transformer layer whose feed-forward network has 2 matrices, or 3 with a gate."""
    norms, attention = 4 * dim, 4 * (dim**2 + dim)
    return norms + attention + matrices * dim * hidden + (matrices - 1) * hidden + dim


def _attention(rows: int, heads: int, d: int) -> int:
    """Values of the largest tensor in a transformer layer: its scores, or what is `d` wide."""
    return max(heads * rows**2, rows * d)


def _check_multiples(dim: int, heads: int, image_size: int, patch_size: int) -> None:
    if dim % heads:
        raise UserError(f"dim {dim} is not a multiple of heads {heads}")
    if image_size % patch_size:
        raise UserError(f"image_size {image_size} is not a multiple of patch_size {patch_size}")


def _check_size(config: ViTRMConfig | ResNetConfig | ViTConfig) -> None:
    """Raises `UserError` for a model that would take more memory or time than any machine it is meant for has."""
    if config.parameters > MAX_PARAMETERS:
        raise UserError(
            f"the model would have {config.parameters:,} parameters, at most {MAX_PARAMETERS:,} are allowed: make it "
            "narrower or shallower"
        )
    if config.activation > MAX_ACTIVATION:
        raise UserError(
            f"one image of {config.image_size} pixels would fill a tensor of {config.activation:,} values, at most "
            f"{MAX_ACTIVATION:,} are allowed: lower image_size, or give the model fewer tokens (a larger patch_size)"
        )
    if isinstance(config, ViTRMConfig) and config.depth > MAX_LAYERS:
        raise UserError(
            f"a step would compute {config.depth:,} layers after each other (recursions × (n + 1) × layers), at most "
            f"{MAX_LAYERS:,} are allowed"
        )


@dataclass(frozen=True, kw_only=True)
class ViTRMConfig:
    """A Vision Tiny Recursion Model.  The defaults are the paper's (3 624 203 parameters with 10 classes)."""

    kind: ClassVar[str] = "vitrm"

    classes: int = whole(10, 2, MAX_CLASSES)  # number of classes
    image_size: int = whole(32, 1, MAX_IMAGE_SIZE)  # height and width of the input, pixels
    patch_size: int = whole(4, 1, MAX_IMAGE_SIZE)  # P: an image gives N = (image_size / P)² tokens
    # "patch": linear projection of P × P patches (the paper); "conv": convolutions down to the same grid; "whitened":
    # convolutions behind fixed filters that whiten 2 × 2 pixels
    tokenizer: str = choice("patch", "conv", "whitened")
    # "conv": channels after the first convolution; they double with each further inner one
    conv_width: int = whole(64, 1, _MAX_WIDTH)
    # "conv": convolutions; None: as many as halvings from the image to its grid of tokens
    conv_layers: int | None = whole_or_none(1, 32)
    conv_norm: bool = flag(False)  # "conv": batch norm after each convolution
    # "whitened": channels of each stage of two convolutions, the first of which halves the image
    stage_widths: tuple[int, ...] = wholes((48, 144), 1, _MAX_WIDTH)
    dim: int = whole(384, 1, _MAX_WIDTH)  # D: token width
    # "joint": a layer updates image tokens, answer and latents (the paper's eq. 2); "cross": it reads image tokens only
    mixing: str = choice("joint", "cross")
    token_mixer: str = choice("attention", "mlp")  # how a layer mixes tokens; "mlp": an MLP over the token axis
    # "mlp": width of its inner layer; None: twice the tokens, N + 1 + K
    mixer_hidden: int | None = whole_or_none(1, 4 * _MAX_WIDTH)
    heads: int = whole(6, 1, 1024)  # attention heads
    layers: int = whole(3, 1, 1024)  # k: layers of the one shared block
    ffn: str = choice("gelu", "swiglu")  # "gelu" (the paper's text) or "swiglu" (its code)
    # None: 2 D for GELU, 4 D / 3 for SwiGLU, so both have 4 D² weights a layer
    ffn_hidden: int | None = whole_or_none(1, 4 * _MAX_WIDTH)
    latents: int = whole(64, 1, _MAX_WIDTH)  # K: latent tokens z
    n: int = whole(3, 1, 1024)  # latent updates (eq. 2) per recursion
    recursions: int = whole(1, 1, 1024)  # T: recursions (eqs. 2–3) per step
    # on embeddings and on each sublayer's output, while training
    dropout: float = real(0.1, 0, 1, below=True)
    mean: tuple[float, float, float] = three((0.5, 0.5, 0.5), -1000, 1000)  # of the [0, 1] input, per channel
    std: tuple[float, float, float] = three((0.5, 0.5, 0.5), 1e-6, 1e6)

    def __post_init__(self) -> None:
        check(self)
        _check_multiples(self.dim, self.heads, self.image_size, self.patch_size)
        if self.tokenizer == "conv":
            self._check_convolutions()
        if self.tokenizer == "whitened" and self.patch_size != 1 << len(self.stage_widths):
            raise UserError(
                f"tokenizer 'whitened' halves the image once per stage: {len(self.stage_widths)} stage_widths give one token "
                f"per {1 << len(self.stage_widths)} pixels in each direction, patch_size is {self.patch_size}"
            )
        _check_size(self)

    def _check_convolutions(self) -> None:
        halvings = self.patch_size.bit_length() - 1
        if self.patch_size != 1 << max(halvings, 1):
            raise UserError(
                f"tokenizer 'conv' halves the image step by step: patch_size {self.patch_size} is not a power of 2"
            )
        if self.conv_layers is not None and self.conv_layers < halvings:
            raise UserError(
                f"conv_layers is {self.conv_layers}, expected at least {halvings}: the image is halved after each of the "
                f"first ones, down to one token per {self.patch_size} × {self.patch_size} pixels"
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

    @property
    def mixed(self) -> int:
        """Width of the inner layer of an MLP over tokens."""
        return self.mixer_hidden if self.mixer_hidden is not None else 2 * (self.tokens + 1 + self.latents)

    @property
    def conv_widths(self) -> list[int]:
        """Channels before, between and after the convolutions that a tokenizer learns."""
        if self.tokenizer == "whitened":
            return [WHITENED, *(w for w in self.stage_widths for _ in range(2)), self.dim]
        layers = self.conv_layers or self.patch_size.bit_length() - 1
        return [3, *(self.conv_width << i for i in range(layers - 1)), self.dim]

    @property
    def parameters(self) -> int:
        """Trainable weights of the model, counted without building it."""
        d = self.dim
        if self.tokenizer == "patch":
            tokenizer = 3 * self.patch_size**2 * d + d
        elif self.tokenizer == "conv":
            tokenizer = sum(9 * a * b + b * (2 if self.conv_norm else 1) for a, b in pairwise(self.conv_widths))
        else:
            tokenizer = WHITENED + sum(9 * a * b + b for a, b in pairwise(self.conv_widths))
        block = self.layers * _layer_parameters(d, self.hidden, matrices=2 if self.ffn == "gelu" else 3)
        if self.token_mixer == "mlp":
            attention = 4 * (d**2 + d)
            rows = self.tokens + 1 + self.latents
            block += self.layers * (rows * self.mixed + self.mixed + (1 + self.latents) * (self.mixed + 1) - attention)
            if self.mixing == "joint":  # the last layer's image tokens are nobody's
                block += (self.layers - 1) * self.tokens * (self.mixed + 1)
        return tokenizer + (self.tokens + 1 + self.latents) * d + block + (self.classes + 1) * (d + 1)

    @property
    def depth(self) -> int:
        """Layers that one step computes after each other."""
        return self.recursions * (self.n + 1) * self.layers

    @property
    def activation(self) -> int:
        """Values of the largest tensor that one image takes."""
        rows = self.tokens + 1 + self.latents
        updated = rows if self.mixing == "joint" else 1 + self.latents
        mixing = self.dim * self.mixed if self.token_mixer == "mlp" else self.heads * updated * rows
        return max(
            3 * self.image_size**2,
            mixing,
            rows * max(self.dim, self.hidden),
            0 if self.tokenizer == "patch" else max(size**2 * width for size, width in self._maps),
        )

    @property
    def _maps(self) -> list[tuple[int, int]]:
        """Side and channels of what each convolution of a tokenizer gives."""
        widths, halvings = self.conv_widths[1:], self.patch_size.bit_length() - 1
        if self.tokenizer == "conv":
            return [(self.image_size >> min(i, halvings), width) for i, width in enumerate(widths)]
        return [(self.image_size, WHITENED), *((self.image_size >> (i + 1) // 2, w) for i, w in enumerate(widths))]


@dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """A torchvision ResNet (He et al., 2016), unchanged but for its number of classes and, if asked for, its stem."""

    kind: ClassVar[str] = "resnet"

    depth: int = choice(18, 34, 50)
    stem: str = choice("imagenet", "cifar")  # 7 × 7, stride 2, and a pooling; or "cifar": 3 × 3, stride 1, none
    classes: int = whole(10, 2, MAX_CLASSES)
    image_size: int = whole(32, 1, MAX_IMAGE_SIZE)
    mean: tuple[float, float, float] = three((0.5, 0.5, 0.5), -1000, 1000)
    std: tuple[float, float, float] = three((0.5, 0.5, 0.5), 1e-6, 1e6)

    def __post_init__(self) -> None:
        check(self)
        _check_size(self)

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
class ViTConfig:
    """A Vision Transformer (Dosovitskiy et al., 2021), sized for small images."""

    kind: ClassVar[str] = "vit"

    classes: int = whole(10, 2, MAX_CLASSES)
    image_size: int = whole(32, 1, MAX_IMAGE_SIZE)
    patch_size: int = whole(4, 1, MAX_IMAGE_SIZE)
    dim: int = whole(512, 1, _MAX_WIDTH)
    layers: int = whole(8, 1, 1024)
    heads: int = whole(8, 1, 1024)
    mlp: int = whole(1024, 1, 4 * _MAX_WIDTH)  # hidden width of the feed-forward network
    dropout: float = real(0.1, 0, 1, below=True)
    mean: tuple[float, float, float] = three((0.5, 0.5, 0.5), -1000, 1000)
    std: tuple[float, float, float] = three((0.5, 0.5, 0.5), 1e-6, 1e6)

    def __post_init__(self) -> None:
        check(self)
        _check_multiples(self.dim, self.heads, self.image_size, self.patch_size)
        _check_size(self)

    @property
    def _rows(self) -> int:
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def parameters(self) -> int:
        """Trainable weights of the model, counted without building it."""
        d = self.dim
        tokenizer = 3 * self.patch_size**2 * d + d
        block = self.layers * _layer_parameters(d, self.mlp, matrices=2)
        return tokenizer + (1 + self._rows) * d + block + 2 * d + self.classes * (d + 1)

    @property
    def activation(self) -> int:
        """Values of the largest tensor that one image takes."""
        return max(3 * self.image_size**2, _attention(self._rows, self.heads, max(self.dim, self.mlp)))


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
    # Beyond the paper: a tokenizer that sees, and image tokens that are read and not updated; a step costs a quarter of nano's.
    "nano-v2": ViTRMConfig(
        dim=128,
        heads=4,
        ffn_hidden=320,
        latents=16,
        n=1,
        tokenizer="whitened",
        stage_widths=(48, 144),
        mixing="cross",
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
        raise UserError(f"unknown model preset {shown(name)}: choose one of {', '.join(PRESETS)}")
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
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(f"{where}: model kind is {shown(kind)}, expected one of {', '.join(KINDS)}")
    return from_values(KINDS[kind], values, where, f"a {kind}")
