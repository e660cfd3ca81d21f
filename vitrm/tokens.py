"""Settings of a model that follow its image size, so that the number of image tokens stays what a model of its kind is for.

A preset is made for 32 × 32 pixels.  Kept as it is, its patches would make 3,136 tokens of 224 × 224, and attention grow with
their square.  So a patch grows, by doubling where that divides the image, until there are `MAX_TOKENS` tokens at most; a tokenizer
that halves the image halves it more often, with fewer channels in the new, large maps.  Imports neither torch nor numpy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vitrm.baseline_configs import CCTConfig, ConvMixerConfig, ViTConfig
from vitrm.errors import UserError
from vitrm.fields import Whole
from vitrm.model_limits import MAX_IMAGE_SIZE

MAX_TOKENS = 256  # 16 × 16: what the presets make of 64 × 64 pixels, and common for 224 and 256
_MAX_MIXED = 1024  # of a ConvMixer, whose cost is linear in them
_LEAST_CONV = 8
FOLLOWING = ("patch_size", "conv_layers", "conv_width", "stage_widths")  # settings that may follow
_SIZES = Whole(1, MAX_IMAGE_SIZE)


def following(config: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that `config`, a preset, takes on with the image size in `changes`; those in `changes` themselves stay.

    Raises `UserError` for an image size that no patch divides as the model's tokenizer needs it.
    """
    try:
        size = _SIZES.accepted(changes.get("image_size"))
    except (ValueError, UserError):
        return {}  # not given, or no size: the config itself says what is wrong
    if isinstance(config, CCTConfig):
        return _halvings_of_cct(config, changes)
    if getattr(config, "patch_size", None) is None or any(name in changes for name in FOLLOWING):
        return {}
    tokenizer = changes.get("tokenizer", getattr(config, "tokenizer", "patch"))
    if isinstance(config, (ViTConfig, ConvMixerConfig)) or tokenizer == "patch":
        most = _MAX_MIXED if isinstance(config, ConvMixerConfig) else MAX_TOKENS
        return {"patch_size": _any_patch(config.patch_size, size, most)}
    patch = _halved_patch(config.patch_size, size, tokenizer)
    extra = patch.bit_length() - config.patch_size.bit_length()
    found: dict[str, Any] = {"patch_size": patch}
    if tokenizer == "whitened":
        widths = config.stage_widths
        small = max(2 * config.directions, widths[0] // 2)  # not fewer than come in
        found["stage_widths"] = (small,) * extra + widths if extra > 0 else widths[-extra:]
    elif extra > 0:
        if config.conv_layers is not None:
            found["conv_layers"] = config.conv_layers + extra
        found["conv_width"] = max(_LEAST_CONV, config.conv_width >> (extra + 1) // 2)
    return found


def _halvings_of_cct(config: CCTConfig, changes: Mapping[str, Any]) -> dict[str, Any]:
    if "conv_layers" in changes:
        return {}
    layers = config.conv_layers
    while (-(-changes["image_size"] // 2**layers)) ** 2 > MAX_TOKENS and layers < 8:
        layers += 1
    return {"conv_layers": layers}


def _any_patch(patch: int, size: int, most: int) -> int:
    """The side of a patch that divides the image: the preset's, doubled as often as needed, else the divisor next to that."""
    wanted = patch
    while (size // wanted) ** 2 > most:
        wanted *= 2
    if size % wanted == 0:
        return wanted
    divisors = [p for p in range(1, size + 1) if size % p == 0 and (size // p) ** 2 <= most]
    return min(divisors, key=lambda p: (max(p / wanted, wanted / p), p))


def _halved_patch(patch: int, size: int, tokenizer: str) -> int:
    """The same for a tokenizer that halves the image, so that the side is a power of 2.  Raises `UserError` where none fits."""
    wanted = patch
    while (size // wanted) ** 2 > MAX_TOKENS:
        wanted *= 2
    fitting = [p for p in (wanted, wanted // 2) if p > 1 and size % p == 0 and (size // p) ** 2 <= MAX_TOKENS]
    if fitting:
        return fitting[0]
    below, above = size // wanted * wanted, -(-size // wanted) * wanted
    raise UserError(
        f"image_size is {size}, expected a multiple of {wanted} with tokenizer {tokenizer!r}, which halves the image: try {above}"
        + (f" or {below}" if below else "")
    )
