"""The weights of a checkpoint for a model of another image size, patch size or classes: `--init`.

positions         resampled (bicubic) to the new grid of tokens, as is common for Vision Transformers
patch projection  resampled to the new patch size, and scaled so that an even area projects to the same token
classifier        begins anew for other classes
convolutions      kept where they are the same ones; a tokenizer with others begins anew
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrm.baselines.networks import CLASSIFIERS, Baseline
from vitrm.checkpoint import Checkpoint
from vitrm.config import to_dict
from vitrm.errors import UserError
from vitrm.fields import shown
from vitrm.model import ViTRM
from vitrm.tokens import FOLLOWING

_POSITIONS = ("pos", "net.pos")
_PATCHES = ("tokenizer.proj.weight", "net.proj.weight")
# Settings that may differ without a word: no weight depends on them.
_FREE = ("classes", "mean", "std", "dropout", "glimpses")


@dataclass(frozen=True)
class Transfer:
    """Weights that fit, and what was done to them, a sentence each."""

    weights: dict[str, Tensor]
    notes: tuple[str, ...]
    new_tokenizer: bool  # True where the tokenizer begins anew


def transfer(init: Checkpoint, model: ViTRM | Baseline, same_classes: bool) -> Transfer:
    """The weights of `init` for `model`.  Raises `UserError` where it is another model."""
    _check_same(init, model)
    fresh = model.state_dict()
    weights, notes = dict(init.weights), []
    new_tokenizer = False
    if not same_classes:
        for head in CLASSIFIERS:
            weights |= {k: v for k, v in fresh.items() if k.startswith(head)}
    own, theirs = model.config, init.model
    if getattr(own, "tokenizer", None) in ("conv", "whitened") and _tokenizer_shapes(fresh) != _tokenizer_shapes(
        weights
    ):
        weights = {k: v for k, v in weights.items() if not k.startswith("tokenizer.")}
        weights |= {k: v for k, v in fresh.items() if k.startswith("tokenizer.")}
        new_tokenizer = True
        notes.append(
            f"the tokenizer begins anew: for images of {own.image_size} pixels it has other convolutions than that of {init.source}, for "
            f"{theirs.image_size}"
        )
    for name in _PATCHES:
        if name in weights and name in fresh and weights[name].shape != fresh[name].shape:
            weights[name] = resample_patches(weights[name], fresh[name].shape[-1])
            notes.append(
                f"patches of {fresh[name].shape[-1]} pixels are projected by the weights for {init.weights[name].shape[-1]}, resampled"
            )
    for name in _POSITIONS:
        if name in weights and name in fresh and weights[name].shape != fresh[name].shape:
            before, after = weights[name].shape[1], fresh[name].shape[1]
            weights[name] = resample_positions(weights[name], after)
            notes.append(f"positions are resampled from {before} tokens to {after}")
    return Transfer(weights, tuple(notes), new_tokenizer)


def resample_positions(positions: Tensor, tokens: int) -> Tensor:
    """Position embeddings [1, N, D] of a square grid, with those of other tokens before it, for `tokens` tokens in all."""
    before = _ahead(positions.shape[1])
    assert before == _ahead(tokens), "a class token more or less"
    ahead, grid = positions[:, :before].float(), positions[:, before:].float()
    old, new = (round((n - before) ** 0.5) for n in (positions.shape[1], tokens))
    planes = grid.transpose(1, 2).unflatten(2, (old, old))  # [1, D, √N, √N]
    planes = F.interpolate(planes, (new, new), mode="bicubic", align_corners=False, antialias=new < old)
    return torch.cat([ahead, planes.flatten(2).transpose(1, 2)], 1)


def resample_patches(weight: Tensor, side: int) -> Tensor:
    """The projection [D, 3, P, P] of patches for patches of `side` pixels."""
    old = weight.shape[-1]
    resampled = F.interpolate(weight.float(), (side, side), mode="bicubic", align_corners=False, antialias=side < old)
    return resampled * (old / side) ** 2


def _ahead(tokens: int) -> int:
    """Tokens before those of a square grid: 1 where there is a class token."""
    return 0 if round(tokens**0.5) ** 2 == tokens else 1


def _tokenizer_shapes(weights: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {k: v.shape for k, v in weights.items() if k.startswith("tokenizer.")}


def _check_same(init: Checkpoint, model: ViTRM | Baseline) -> None:
    own, theirs = to_dict(model.config), to_dict(init.model)
    resized: tuple[str, ...] = ("image_size", *FOLLOWING)
    if own.get("token_mixer") == "mlp":
        resized = ()  # its weights are of a number of tokens
    differing = [
        f"{k} {shown(own.get(k))} against {shown(theirs.get(k))}"
        for k in own.keys() | theirs.keys()
        if own.get(k) != theirs.get(k) and k not in (*_FREE, *resized)
    ]
    if own["kind"] == "cct" and own.get("conv_layers") != theirs.get("conv_layers"):
        differing.append(f"conv_layers {own.get('conv_layers')} against {theirs.get('conv_layers')}")
    if differing:
        mlp = "; an mlp token mixer is of one number of tokens" if not resized else ""
        raise UserError(
            f"{init.source} is another model than asked for ({', '.join(sorted(differing))}{mlp}): leave out --model and its settings, "
            "which are then those of --init, or name its preset"
        )
