"""Augmentation in batches, of a data set that lies in memory whole.

The training images are one uint8 tensor [n, 3, H, W] on the device; a batch is gathered, cropped,
flipped and distorted there, so there is no loader and no worker process.  Small numbers (offsets,
coins, λ) are drawn on the host by a NumPy generator that the caller seeds per batch: what happens
to a batch is a function of that seed alone, on every device.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitrm.recipe import Recipe

# RandAugment draws its operations once per call.  Per image that is 128 × 2 tiny tensor operations a
# batch, and their overhead outweighs the training step; per batch, all images would be rotated alike.
# Groups of 8 share a draw: 16 different draws in a batch of 128, at an eighth of the calls.
GROUP = 8


class Batch(NamedTuple):
    """What a training step sees."""

    images: Tensor  # float32 [B, 3, H, W] in [0, 1]
    target: Tensor  # float32 [B, classes], rows sum to 1: what the cross-entropy compares with
    label: Tensor  # int64 [B]: the un-mixed label, what the halting loss compares with


def augment(pixels: Tensor, label: Tensor, classes: int, recipe: Recipe, flip: bool, rng: np.random.Generator) -> Batch:
    """Augments a batch by `recipe`: pixels uint8 [B, 3, H, W], label int64 [B], both on one device."""
    if recipe.crop_padding:
        pixels = random_crop(pixels, recipe.crop_padding, rng)
    if flip:
        pixels = random_flip(pixels, rng)
    if recipe.randaugment_ops:
        pixels = rand_augment(pixels, recipe.randaugment_ops, recipe.randaugment_magnitude, rng)
    images = pixels.to(torch.float32) / 255
    target = F.one_hot(label, classes).to(torch.float32)
    images, target = mix(images, target, recipe.mixup_alpha, recipe.cutmix_alpha, rng)
    return Batch(images, target, label)


def random_crop(pixels: Tensor, padding: int, rng: np.random.Generator) -> Tensor:
    """Each image [3, H, W] moved by its own −padding … padding pixels in both directions; black comes in."""
    b, _, h, w = pixels.shape
    offsets = torch.from_numpy(rng.integers(0, 2 * padding + 1, (2, b))).to(pixels.device)
    padded = F.pad(pixels, (padding,) * 4)
    rows = offsets[0][:, None] + torch.arange(h, device=pixels.device)  # [B, H]
    columns = offsets[1][:, None] + torch.arange(w, device=pixels.device)  # [B, W]
    image = torch.arange(b, device=pixels.device)[:, None, None]
    # Index arrays on both sides of the channels' slice: the result is [B, H, W, 3].
    return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def random_flip(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Each image mirrored left to right with chance 1/2."""
    coins = torch.from_numpy(rng.random(len(pixels)) < 0.5).to(pixels.device)
    return torch.where(coins[:, None, None, None], pixels.flip(-1), pixels)


def rand_augment(pixels: Tensor, ops: int, magnitude: int, rng: np.random.Generator) -> Tensor:
    """torchvision's RandAugment on uint8 images, one draw of operations per `GROUP` images."""
    from torchvision.transforms import v2

    transform = v2.RandAugment(num_ops=ops, magnitude=magnitude)
    # torchvision draws from torch's global generator on the host; borrow it, seeded from ours.
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(int(rng.integers(2**63)))
        return torch.cat([transform(group) for group in pixels.split(GROUP)])


def mix(
    images: Tensor, target: Tensor, mixup_alpha: float, cutmix_alpha: float, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Mixes each image (and its target) with its neighbour in the batch, by Mixup or CutMix; α = 0 rules one out.

    Mixup: λ a + (1 − λ) b.  CutMix: a rectangle of b with the share 1 − λ of the area, pasted into a,
    and λ corrected for what the border cut off.  λ ~ Beta(α, α); with both, a coin decides per batch.
    """
    alphas = [("mixup", mixup_alpha), ("cutmix", cutmix_alpha)]
    choices = [(how, alpha) for how, alpha in alphas if alpha > 0]
    if not choices or len(images) < 2:
        return images, target
    how, alpha = choices[int(rng.integers(len(choices)))]
    share = float(rng.beta(alpha, alpha))
    partner = images.roll(1, 0)
    if how == "mixup":
        images = share * images + (1 - share) * partner
    else:
        top, bottom, left, right = _rectangle(images.shape[-2], images.shape[-1], 1 - share, rng)
        images = images.clone()
        images[..., top:bottom, left:right] = partner[..., top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (images.shape[-2] * images.shape[-1])
    return images, share * target + (1 - share) * target.roll(1, 0)


def _rectangle(height: int, width: int, area: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A rectangle (top, bottom, left, right) of about `area` of the image, its centre anywhere in it."""
    half_h, half_w = round(height * area**0.5 / 2), round(width * area**0.5 / 2)
    y, x = int(rng.integers(height)), int(rng.integers(width))
    return max(y - half_h, 0), min(y + half_h, height), max(x - half_w, 0), min(x + half_w, width)
