"""Limits of a model's size, which is counted without building it.  Imports neither torch nor numpy."""

from __future__ import annotations

from typing import Protocol

from vitrm.errors import UserError

MAX_PARAMETERS = 1_000_000_000  # 4 GB of float32
MAX_ACTIVATION = 2**30  # values of the largest tensor that one image takes: 4 GiB of float32
MAX_LAYERS = 4096  # layers that one step, or a baseline, computes after each other
MAX_CLASSES = 100_000
MAX_IMAGE_SIZE = 4096
MAX_WIDTH = 65_536
NEVER = 2.0  # a halting threshold that no probability exceeds; every one from 1 on means the same
MAX_STEPS = 1024  # that a model is trained for or a loop runs: nobody should wait for a million steps by mistake


class Sized(Protocol):
    """A model's config, as far as its size goes."""

    @property
    def image_size(self) -> int:
        """Height and width of the input, pixels."""

    @property
    def parameters(self) -> int:
        """Trainable weights of the model."""

    @property
    def activation(self) -> int:
        """Values of the largest tensor that one image takes."""


def layer_parameters(dim: int, hidden: int, matrices: int) -> int:
    """Weights of a transformer layer whose feed-forward network has 2 matrices, or 3 with a gate."""
    norms, attention = 4 * dim, 4 * (dim**2 + dim)
    return norms + attention + matrices * dim * hidden + (matrices - 1) * hidden + dim


def layer_activation(rows: int, heads: int, d: int) -> int:
    """Values of the largest tensor in a transformer layer: its scores, or what is `d` wide."""
    return max(heads * rows**2, rows * d)


def check_multiple(name: str, value: int, of: str, factor: int) -> None:
    """Raises `UserError` unless the setting `name` is a multiple of the setting `of`."""
    if value % factor:
        raise UserError(f"{name} {value} is not a multiple of {of} {factor}")


def check_size(config: Sized) -> None:
    """Raises `UserError` for a model that would take more memory than any machine it is meant for has."""
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
