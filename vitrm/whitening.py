"""The filters that make small patches of images white: uncorrelated, and of unit variance in every direction."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NOISE = 5e-4  # variance that noise has in every direction


@torch.no_grad()
def whitening_filters(images: Tensor, size: int) -> Tensor:
    """The directions of `size` × `size` patches of normalized images [n, 3, H, W], each scaled to unit variance, and their
    negatives: float32 [2 · 3 · size², 3, size, size], the direction of the largest variance first.

    A direction in which the images do not differ at all, as gray ones do not in color, gets zeros: what it let through
    would be rounding errors, which batch norms then make as large as everything else.
    """
    patches = F.unfold(images, size).transpose(1, 2).reshape(-1, 3 * size**2).double()
    variances, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    scales = torch.where(variances > 1e-6 * variances[-1], (variances + NOISE).rsqrt(), 0.0)
    rows = (vectors * scales).T.flip(0)
    # An eigenvector's sign is anybody's: here its largest entry is positive, on every machine.
    rows = rows * rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()
    return torch.cat([rows, -rows]).float().view(-1, 3, size, size)
