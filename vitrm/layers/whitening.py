"""The convolution that makes small patches of images white: uncorrelated, and of unit variance in every direction."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NOISE = 5e-4  # variance that noise has in every direction


@torch.no_grad()
def whitening_filters(images: Tensor, size: int, count: int | None = None) -> Tensor:
    """The directions of `size` × `size` patches of normalized images [n, 3, H, W], each scaled to unit variance, and their
    negatives: float32 [2 · 3 · size², 3, size, size], the direction of the largest variance first.  With `count` the
    directions of the smallest variance are left out: [2 · count, 3, size, size].

    A direction in which the images do not differ at all, as gray ones do not in color, gets zeros: what it let through
    would be rounding errors, which batch norms then make as large as everything else.
    """
    patches = F.unfold(images, size).transpose(1, 2).reshape(-1, 3 * size**2).double()
    variances, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    scales = torch.where(variances > 1e-6 * variances[-1], (variances + NOISE).rsqrt(), 0.0)
    rows = (vectors * scales).T.flip(0)
    # An eigenvector's sign is anybody's: here its largest entry is positive, on every machine.
    rows = rows * rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()
    rows = rows[:count]
    return torch.cat([rows, -rows]).float().view(-1, 3, size, size)


class Whitening(nn.Module):
    """A convolution of the whole image whose weight is not trained: a buffer, saved and exported with the model.

    As built it passes every pixel of a patch on, and its negative.  `whiten` replaces that by what makes the patches of
    the training images white: before the model's weights are averaged (`vitrm.training.ema`) or copied.

    `directions` is how many of a patch's 3 P² directions pass, those of the largest variance; None: all.

    `padded` keeps the image's size, for patches of 2 × 2: their filters fill a corner of 3 × 3 ones, which a common
    convolution with a padding of 1 takes.
    """

    weight: Tensor

    def __init__(self, size: int, directions: int | None = None, *, padded: bool = False) -> None:
        super().__init__()
        assert size == 2 or not padded, "only 2 × 2 patches can keep the image's size"
        self.size = size
        self.padding = 1 if padded else 0
        pixels = torch.eye(3 * size**2).view(-1, 3, size, size)[:directions]
        self.register_buffer("weight", torch.zeros(2 * len(pixels), 3, size + self.padding, size + self.padding))
        self.filters.copy_(torch.cat([pixels, -pixels]))
        self.bias = nn.Parameter(torch.zeros(len(self.weight)))

    @property
    def filters(self) -> Tensor:
        """[2 · directions, 3, size, size]: the weight without its zeros, a view."""
        return self.weight[:, :, : self.size, : self.size]

    def whiten(self, images: Tensor) -> None:
        """Sets the weight for normalized images [n, 3, H, W]."""
        self.filters.copy_(whitening_filters(images, self.size, len(self.weight) // 2))

    def forward(self, images: Tensor) -> Tensor:
        """Normalized images [B, 3, H, W] → [B, 2 · directions, H, W] if padded, else [B, 2 · directions, H − P + 1, W − P + 1]."""
        return F.conv2d(images, self.weight, self.bias, padding=self.padding)
