"""What the steps look at in turn: the image, its mirror image, and both a little aside."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor, nn

SIDES = {"shift": (False,), "mirror": (False, True)}  # by the setting `glimpses`: whether a view is mirrored
MOVES = (0, 1, -1)  # down and right, in 32nds of the image's side
NAME = "glimpse"  # of the number of the next view, among what goes from step to step


class Glimpses(nn.Module):
    """The views of an image, in a fixed order: for "shift" three, as it is, down and right, up and left; for "mirror" each of these and its mirror image.

    A view is the image with its rows and columns in another order, those beyond its edge reflected at it.  So it costs two
    lookups, and any runtime has them.
    """

    rows: Tensor  # int64 [views, S]: which row of the image is each row of a view
    columns: Tensor

    def __init__(self, kind: str, size: int) -> None:
        """`size` is the side S of the images."""
        super().__init__()
        unit = max(1, size // 32)
        views = [(moved * unit, mirrored) for moved, mirrored in product(MOVES, SIDES[kind])]
        rows = torch.stack([_reflected(torch.arange(size) - moved, size) for moved, _ in views])
        columns = torch.stack(
            [row.flip(0) if mirrored else row for row, (_, mirrored) in zip(rows, views, strict=True)]
        )
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)

    def __len__(self) -> int:
        return len(self.rows)

    def forward(self, images: Tensor, number: Tensor) -> Tensor:
        """The views of images [B, 3, S, S] with these numbers: float [B, 1], from 0, of each image its own."""
        index = number[:, 0].long()
        rows, columns = self.rows[index], self.columns[index]
        images = images.gather(2, rows[:, None, :, None].expand(-1, 3, -1, images.shape[3]))
        return images.gather(3, columns[:, None, None, :].expand(-1, 3, images.shape[2], -1))

    def after(self, number: Tensor) -> Tensor:
        """The numbers of the next views, float [B, 1]: behind the last comes the first."""
        return torch.where(number + 1 < len(self), number + 1, torch.zeros_like(number))


def _reflected(index: Tensor, size: int) -> Tensor:
    """Indices beyond either edge, by less than `size`, reflected at it."""
    index = index.abs()
    return torch.where(index < size, index, 2 * (size - 1) - index).clamp(0, size - 1)
