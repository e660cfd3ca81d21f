"""Augmentation in batches, of a data set that lies in memory whole, or is mapped into it.

The training images are one uint8 tensor [n, 3, H, W] on the device, unless they are more than memory is for; a batch is gathered, cropped,
flipped and distorted there, so there is no loader and no worker process.  Small numbers (offsets,
coins, λ) are drawn on the host by a NumPy generator that the caller seeds per batch: what happens
to a batch is a function of that seed alone, on every device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vitrm.data import Images, MappedRows
from vitrm.recipe import Recipe
from vitrm.training.upload import upload

# In several processes each computes a part of the batch: what is random is drawn for the whole of it, by all of them
# alike, and applied to the part.


class Batch(NamedTuple):
    """The images and targets of a training step."""

    images: Tensor  # float32 [B, 3, H, W] in [0, 1]
    target: Tensor  # float32 [B, classes]: what the cross-entropy compares with; rows sum to 1, or to the weight of their class
    label: Tensor  # int64 [B]: the un-mixed label, what the halting loss compares with


class BatchRows(NamedTuple):
    """Numbers of some images in their batch."""

    rows: NDArray[np.int64]  # their numbers in the batch
    size: int  # images in the whole batch

    @classmethod
    def all(cls, size: int) -> BatchRows:
        return cls(np.arange(size), size)


class TrainingBatches:
    """The training batches of a run: batch i of epoch e is a function of (seed, e, i) alone.

    In several processes each draws all of a batch, and computes its `part`.
    """

    def __init__(self, images: Images, recipe: Recipe, seed: int, batch_size: int, part: slice) -> None:
        self.recipe, self.seed, self.batch_size, self.part = recipe, seed, batch_size, part
        self.classes = len(images.classes)
        # Of a set larger than memory a batch is read when it is drawn.
        self._mapped: Any = images.pixels if isinstance(images.pixels, MappedRows) else None
        self._pixels = torch.from_numpy(images.pixels) if self._mapped is None else torch.empty(0)
        self._labels = torch.from_numpy(images.labels)
        self._flip = recipe.flips(images.name)
        self._members = members_of(images.labels) if recipe.balance == "sampling" else []
        self._weights = (
            torch.from_numpy(class_weights(images.labels, self.classes)) if recipe.balance == "loss" else None
        )
        # In the first epoch, where epochs alternate.
        self._mirrored = np.random.default_rng(seed).random(len(images)) < 0.5
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def move_to(self, device: torch.device) -> None:
        """Moves the images to where batches are made."""
        self._pixels, self._labels = self._pixels.to(device), self._labels.to(device)
        if self._weights is not None:
            self._weights = self._weights.to(device)

    def draw(self, epoch: int, i: int) -> tuple[Batch, np.random.Generator]:
        """Batch `i` of an epoch, and the generator for whatever else is random in it."""
        if epoch != self._epoch:
            # The third number keeps the streams apart: NumPy takes (seed, epoch) and (seed, epoch, 0) for the same.
            of_epoch = np.random.default_rng((self.seed, epoch, 0))
            if self.recipe.balance == "sampling":
                self._order = balanced_order(self._members, len(self._labels), of_epoch)
            else:
                self._order = of_epoch.permutation(len(self._labels))
            self._epoch = epoch
        rng = np.random.default_rng((self.seed, epoch, 1 + i))
        rows = self._order[i * self.batch_size : (i + 1) * self.batch_size]
        index = upload(rows, self._pixels.device)
        flip = self._mirrored[rows] ^ bool(epoch % 2) if self.recipe.flip == "alternate" else self._flip
        pixels = self._pixels[index] if self._mapped is None else upload(self._mapped[rows], self._pixels.device)
        labels = self._labels[index]
        return augment(pixels, labels, self.classes, self.recipe, flip, rng, self.part, self._weights), rng


def members_of(labels: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """The indices of each class's images, for classes that have some."""
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def class_weights(labels: NDArray[np.int64], classes: int) -> NDArray[np.float32]:
    """The weight of each class that makes all that have images count the same, float32 [classes]; their mean over the images is 1."""
    counts = np.bincount(labels, minlength=classes)
    there = counts > 0
    return np.where(there, len(labels) / (there.sum() * np.maximum(counts, 1)), 0).astype(np.float32)


def balanced_order(members: list[NDArray[np.int64]], count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """`count` images in random order, equally many of each class (to within one); `members` are the images of each.

    None of a class comes again before all of it have come.
    """
    quotas = np.full(len(members), count // len(members))
    quotas[rng.permutation(len(members))[: count % len(members)]] += 1
    drawn = [
        np.concatenate([rng.permutation(rows) for _ in range(-(-quota // len(rows)))] or [rows[:0]])[:quota]
        for rows, quota in zip(members, quotas, strict=True)
    ]
    return rng.permutation(np.concatenate(drawn))


def augment(
    pixels: Tensor,
    label: Tensor,
    classes: int,
    recipe: Recipe,
    flip: bool | NDArray[np.bool_],
    rng: np.random.Generator,
    part: slice | None = None,
    weights: Tensor | None = None,
) -> Batch:
    """Augments a batch by `recipe`: pixels uint8 [B, 3, H, W], label int64 [B], both on one device.

    `flip`: whether images are mirrored with chance 1/2; or which ones are.
    With `part`, a slice of at least one image, only those images of the batch are computed, as they are in the whole.
    `weights`, float32 [classes], multiply the targets of each class's images: cross-entropy then weighs them so.
    """
    rows = np.arange(len(pixels))
    whole = part is None or len(rows[part]) == len(rows)
    if not whole:
        rows = rows[part]
        label_part = label[part]
        if recipe.mixup_alpha > 0 or recipe.cutmix_alpha > 0:
            rows = np.concatenate([[(rows[0] - 1) % len(pixels)], rows])  # whom the first one is mixed with
    of = BatchRows(rows, len(pixels))
    if not whole:
        index = upload(rows, pixels.device)
        pixels, label = pixels[index], label[index]
    if recipe.crop_padding:
        pixels = random_crop(pixels, recipe.crop_padding, rng, of, reflect=recipe.crop_fill == "reflect")
    if not isinstance(flip, bool):
        pixels = mirror(pixels, flip[of.rows])
    elif flip:
        pixels = random_flip(pixels, rng, of)
    if recipe.randaugment_ops:
        pixels = rand_augment(pixels, recipe.randaugment_ops, recipe.randaugment_magnitude, rng, of)
    if recipe.cutout:
        pixels = cutout(pixels, recipe.cutout, rng, of)
    images = pixels.to(torch.float32) / 255
    target = F.one_hot(label, classes).to(torch.float32)
    if recipe.label_smoothing:
        target = target * (1 - recipe.label_smoothing) + recipe.label_smoothing / classes
    if weights is not None:
        target = target * weights[label][:, None]
    images, target = mix(images, target, recipe.mixup_alpha, recipe.cutmix_alpha, rng, led=not whole)
    return Batch(images, target, label if whole else label_part)


def random_crop(
    pixels: Tensor, padding: int, rng: np.random.Generator, of: BatchRows | None = None, *, reflect: bool = False
) -> Tensor:
    """Each image [3, H, W] moved by its own −padding … padding pixels in both directions; black comes in, or its reflection."""
    b, _, h, w = pixels.shape
    rows, size = of or BatchRows.all(b)
    offsets = upload(rng.integers(0, 2 * padding + 1, (2, size))[:, rows], pixels.device)
    if reflect:  # not written for uint8 in torch 2.9: an index that runs back and forth is
        rows_, columns = (upload(np.pad(np.arange(n), padding, "reflect"), pixels.device) for n in (h, w))
        padded = pixels[:, :, rows_[:, None], columns]
    else:
        padded = F.pad(pixels, (padding,) * 4)
    top = offsets[0][:, None] + torch.arange(h, device=pixels.device)  # [B, H]
    left = offsets[1][:, None] + torch.arange(w, device=pixels.device)  # [B, W]
    image = torch.arange(b, device=pixels.device)[:, None, None]
    # Index arrays on both sides of the channels' slice: the result is [B, H, W, 3].
    return padded[image, :, top[:, :, None], left[:, None, :]].permute(0, 3, 1, 2).contiguous()


def random_flip(pixels: Tensor, rng: np.random.Generator, of: BatchRows | None = None) -> Tensor:
    """Each image mirrored left to right with chance 1/2."""
    rows, size = of or BatchRows.all(len(pixels))
    return mirror(pixels, (rng.random(size) < 0.5)[rows])


def mirror(pixels: Tensor, which: NDArray[np.bool_]) -> Tensor:
    """The images that `which` [B] names mirrored left to right."""
    coins = upload(which, pixels.device)
    return torch.where(coins[:, None, None, None], pixels.flip(-1), pixels)


def cutout(pixels: Tensor, side: int, rng: np.random.Generator, of: BatchRows | None = None) -> Tensor:
    """Each image with a gray square of `side` pixels, its center anywhere in it (DeVries & Taylor, 2017)."""
    b, _, h, w = pixels.shape
    rows, size = of or BatchRows.all(b)
    centers = upload(rng.integers(0, (h, w), (size, 2))[rows], pixels.device)
    top, left = (centers - side // 2).split(1, 1)  # [B, 1] each
    y, x = torch.arange(h, device=pixels.device), torch.arange(w, device=pixels.device)
    inside = ((y >= top) & (y < top + side))[:, None, :, None] & ((x >= left) & (x < left + side))[:, None, None, :]
    return pixels.masked_fill(inside, 128)


def rand_augment(
    pixels: Tensor, ops: int, magnitude: int, rng: np.random.Generator, of: BatchRows | None = None
) -> Tensor:
    """torchvision's RandAugment on uint8 images, each with operations of its own."""
    # torchvision takes a tenth of a second to import, and most recipes do without.
    from vitrm.training.augmentation.rand_augment import apply_operations, draw_operations

    rows, size = of or BatchRows.all(len(pixels))
    return apply_operations(pixels, draw_operations(ops, size, rng)[:, rows], magnitude)


def mix(
    images: Tensor,
    target: Tensor,
    mixup_alpha: float,
    cutmix_alpha: float,
    rng: np.random.Generator,
    *,
    led: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mixes each image (and its target) with its neighbor in the batch, by Mixup or CutMix; α = 0 rules one out.

    Mixup: λ a + (1 − λ) b.  CutMix: a rectangle of b with the share 1 − λ of the area, pasted into a,
    and λ corrected for what the border cut off.  λ ~ Beta(α, α); with both, a coin decides per batch.
    The neighbor is the image before, the last one's of a whole batch for the first.  `led`: this is a part of a
    batch, and its first image is there as the second one's neighbor only; it is not in the result.
    """
    alphas = [("mixup", mixup_alpha), ("cutmix", cutmix_alpha)]
    choices = [(how, alpha) for how, alpha in alphas if alpha > 0]
    if not choices or len(images) < 2:
        return images, target
    how, alpha = choices[int(rng.integers(len(choices)))]
    share = float(rng.beta(alpha, alpha))
    partner, partner_target = images.roll(1, 0), target.roll(1, 0)
    if led:
        images, partner, target, partner_target = images[1:], partner[1:], target[1:], partner_target[1:]
    if how == "mixup":
        images = share * images + (1 - share) * partner
    else:
        top, bottom, left, right = _rectangle(images.shape[-2], images.shape[-1], 1 - share, rng)
        images = images.clone()
        images[..., top:bottom, left:right] = partner[..., top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (images.shape[-2] * images.shape[-1])
    return images, share * target + (1 - share) * partner_target


def _rectangle(height: int, width: int, area: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A rectangle (top, bottom, left, right) of about `area` of the image, its center anywhere in it."""
    half_h, half_w = round(height * area**0.5 / 2), round(width * area**0.5 / 2)
    y, x = int(rng.integers(height)), int(rng.integers(width))
    return max(y - half_h, 0), min(y + half_h, height), max(x - half_w, 0), min(x + half_w, width)
