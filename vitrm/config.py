"""Models as data: one frozen dataclass per kind, and the named presets.

Imports neither torch nor numpy, so that a device without them can still read a checkpoint's config.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from vitrm.baseline_configs import BASELINE_PRESETS, BASELINES, BaselineConfig
from vitrm.errors import UserError
from vitrm.fields import (
    check,
    choice,
    declared,
    did_you_mean,
    flag,
    from_values,
    real,
    shown,
    side,
    three,
    whole,
    whole_or_none,
    wholes,
)
from vitrm.model_limits import (
    MAX_CLASSES,
    MAX_IMAGE_SIZE,
    MAX_LAYERS,
    MAX_WIDTH,
    check_multiple,
    check_size,
    layer_parameters,
)
from vitrm.tokens import following

WHITENED = 12  # directions of 2 × 2 pixels that differ: 4 pixels of 3 colors


@dataclass(frozen=True, kw_only=True)
class ViTRMConfig:
    """A Vision Tiny Recursion Model.  The defaults are the paper's (3 624 203 parameters with 10 classes)."""

    kind: ClassVar[str] = "vitrm"

    classes: int = whole(10, 2, MAX_CLASSES, "number of classes")
    image_size: int = side(32, 1, MAX_IMAGE_SIZE, "height and width that images are brought to")
    patch_size: int = whole(
        4, 1, MAX_IMAGE_SIZE, "side P of a patch: an image gives (image_size / P)² tokens", unit="pixels"
    )
    tokenizer: str = choice(
        "patch",
        "conv",
        "whitened",
        help="patch: linear projection of P × P patches (the paper); conv: convolutions down to the same grid; whitened: "
        "convolutions behind fixed filters that whiten 2 × 2 pixels",
    )
    conv_width: int = whole(
        64,
        1,
        MAX_WIDTH,
        "conv tokenizer: channels after the first convolution; they double with each further inner one",
        unit="channels",
    )
    conv_layers: int | None = whole_or_none(
        1, 32, "conv tokenizer: convolutions; none: as many as halvings from the image to its grid of tokens"
    )
    conv_norm: bool = flag(False, "conv tokenizer: batch norm after each convolution")
    stage_widths: tuple[int, ...] = wholes(
        (48, 144),
        1,
        MAX_WIDTH,
        "whitened tokenizer: channels of each stage of two convolutions, the first of which halves the image",
    )
    directions: int = whole(
        WHITENED,
        1,
        WHITENED,
        "whitened tokenizer: directions of 2 × 2 pixels that it sees, those of the largest variance; each gives two channels, "
        "itself and its negative",
    )
    dim: int = whole(384, 1, MAX_WIDTH, "token width D", unit="D")
    mixing: str = choice(
        "joint",
        "cross",
        help="joint: a layer updates image tokens, answer and latents (the paper's eq. 2); cross: it reads image tokens only",
    )
    glimpses: str = choice(
        "none",
        "shift",
        "mirror",
        help="what a step looks at. none: image tokens that are computed once; shift: the image, then moved a little down and "
        "right, then up and left, in turn; mirror: each of these and its mirror image",
    )
    token_mixer: str = choice("attention", "mlp", help="how a layer mixes tokens; mlp: an MLP over the token axis")
    mixer_hidden: int | None = whole_or_none(
        1, 4 * MAX_WIDTH, "mlp token mixer: width of its inner layer; none: twice the tokens"
    )
    heads: int = whole(6, 1, 1024, "attention heads")
    layers: int = whole(3, 1, 1024, "layers k of the one shared block")
    ffn: str = choice("gelu", "swiglu", help="feed-forward network: gelu (the paper's text) or swiglu (its code)")
    ffn_hidden: int | None = whole_or_none(
        1,
        4 * MAX_WIDTH,
        "width of its inner layer; none: 2 D for gelu, 4 D / 3 for swiglu, so both have 4 D² weights a layer",
    )
    latents: int = whole(64, 1, MAX_WIDTH, "latent tokens K", unit="K")
    n: int = whole(3, 1, 1024, "latent updates (eq. 2) per recursion")
    recursions: int = whole(1, 1, 1024, "recursions (eqs. 2 and 3) per step", unit="T")
    dropout: float = real(
        0.1, 0, 1, "dropout on embeddings and on each sublayer's output, while training", below=True, unit="P"
    )
    mean: tuple[float, float, float] = three((0.5, 0.5, 0.5), -1000, 1000, "mean of the [0, 1] input, per channel")
    std: tuple[float, float, float] = three((0.5, 0.5, 0.5), 1e-6, 1e6, "its standard deviation, per channel")

    def __post_init__(self) -> None:
        check(self)
        check_multiple("dim", self.dim, "heads", self.heads)
        check_multiple("image_size", self.image_size, "patch_size", self.patch_size)
        if self.tokenizer == "conv":
            self._check_convolutions()
        if self.tokenizer == "whitened" and self.patch_size != 1 << len(self.stage_widths):
            raise UserError(
                f"tokenizer 'whitened' halves the image once per stage: {len(self.stage_widths)} stage_widths give one token "
                f"per {1 << len(self.stage_widths)} pixels in each direction, patch_size is {self.patch_size}"
            )
        check_size(self)
        if self.depth > MAX_LAYERS:
            raise UserError(
                f"a step would compute {self.depth:,} layers after each other (recursions × (n + 1) × layers), at most "
                f"{MAX_LAYERS:,} are allowed"
            )

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
            return [2 * self.directions, *(w for w in self.stage_widths for _ in range(2)), self.dim]
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
            tokenizer = 2 * self.directions + sum(9 * a * b + b for a, b in pairwise(self.conv_widths))
        block = self.layers * layer_parameters(d, self.hidden, matrices=2 if self.ffn == "gelu" else 3)
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
        return [
            (self.image_size, 2 * self.directions),
            *((self.image_size >> (i + 1) // 2, w) for i, w in enumerate(widths)),
        ]


ModelConfig = ViTRMConfig | BaselineConfig
KINDS: dict[str, type[ViTRMConfig] | type[BaselineConfig]] = {ViTRMConfig.kind: ViTRMConfig} | {
    c.kind: c for c in BASELINES
}

# Beyond the paper: a tokenizer that sees, and image tokens that are read and not updated; a step costs a quarter of nano's.
_NANO_V2 = ViTRMConfig(
    dim=128,
    heads=4,
    ffn_hidden=320,
    latents=16,
    n=1,
    tokenizer="whitened",
    stage_widths=(48, 144),
    mixing="cross",
    dropout=0.0,
)

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
    "nano-v2": _NANO_V2,
    # nano-v2 at the paper's size: three stages see more and leave 16 tokens, so that a step costs little.
    "small-v2": dataclasses.replace(
        _NANO_V2, patch_size=8, dim=192, heads=6, ffn_hidden=512, stage_widths=(64, 256, 256)
    ),
    # For a processor, one picture at a time: most of nano-v2's time goes into its widest map and into many small layers, so
    # it sees two thirds of the directions there, has a third stage in place of tokens, and one layer in place of three.
    "nano-v3": dataclasses.replace(_NANO_V2, patch_size=8, stage_widths=(48, 112, 168), directions=8, layers=1),
    # For tests and first looks: seconds to train, the same code paths.
    "tiny": ViTRMConfig(dim=64, heads=2, latents=8, n=2, layers=2, patch_size=8, dropout=0.0),
    **BASELINE_PRESETS,
}


def preset(name: str, **changes: Any) -> ModelConfig:
    """The preset called `name`, with fields replaced by `changes`.

    With another image size the patch size, and the convolutions of a tokenizer, follow it where `changes` say nothing of them
    (vitrm.tokens).  Raises `UserError` for an unknown preset, an unknown field or an impossible value.
    """
    if name not in PRESETS:
        raise UserError(
            f"unknown model preset {shown(name)}: choose one of {', '.join(PRESETS)}{did_you_mean(name, PRESETS)}"
        )
    config = PRESETS[name]
    return from_dict({**to_dict(config), **following(config, changes), **changes}, f"model preset {name}")


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
    return from_values(KINDS[kind], values, where, with_article(kind), _other_kinds)


def _other_kinds(name: str) -> str:
    """The kinds of models that have a setting of this name, for a message about one that has not."""
    kinds = [kind for kind, config in KINDS.items() if name in declared(config)]
    return f": it is a setting of {', '.join(kinds)}" if kinds else ""


def with_article(kind: str) -> str:
    """The kind of a model, for a message."""
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
