"""Weights in int8: symmetric, value ≈ scale · q with q ∈ −127 … 127 and a scale per output channel.

They obey one more rule, so that a file computes the same on every CPU.  x86 processors without VNNI multiply bytes with
`vpmaddubsw`: it adds the products of two neighboring rows, unsigned activation times signed weight, in 16 bits, and
saturates.  The sum of two weights of one sign in rows 2i and 2i + 1 is therefore held to 128: 255 · 128 < 2¹⁵.  The
alternatives cost more: unsigned weights run on a kernel without VNNI where there is VNNI, and 7-bit weights
(|q| ≤ 64, exact in any order of rows) have twice the rounding error.  Kernels of convolutions lay weights out in many ways, so
there any two of one sign are held to that sum.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

LEVELS = 127  # of a symmetric int8 number, on each side of 0
_PAIR = 127.5  # two weights that are added in 16 bits, before rounding: at most 128 after it


def quantize_weight(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric int8 of a weight [in, out], one scale per output channel [out]: weight ≈ integers · scales.

    The scale is the least at which every integer fits into int8, and every pair of rows into 16 bits (see above).
    """
    return _quantize(weight, largest_pair(weight))


def quantize_filters(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric int8 of a convolution's weight [out, in, height, width], one scale per output channel: weight ≈ integers · scales.

    The scale is the least at which every integer fits into int8, and any two of one sign into 16 bits (see above).
    """
    columns = weight.reshape(len(weight), -1).T
    ordered = np.sort(columns, 0)
    two = np.maximum(np.maximum(ordered[-2:], 0).sum(0), np.maximum(-ordered[:2], 0).sum(0))
    integers, scales = _quantize(columns, two)
    return np.ascontiguousarray(integers.T).reshape(weight.shape), scales


def _quantize(
    weight: NDArray[np.float32], largest_sums: NDArray[np.float32]
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Integers and scales of a weight [in, out] of which two values are added to `largest_sums` [out] at most."""
    scales = np.maximum(np.abs(weight).max(0) / LEVELS, largest_sums / _PAIR).astype(np.float32)
    scales[scales == 0] = 1.0  # a channel of zeros
    return np.clip(np.round(weight / scales), -LEVELS, LEVELS).astype(np.int8), scales


def largest_pair(weight: NDArray[Any]) -> NDArray[Any]:
    """The largest size, for each column of `weight` [in, out], that rows 2i and 2i + 1 reach together in one direction."""
    even = weight[: len(weight) // 2 * 2]
    up, down = (np.maximum(side, 0).reshape(-1, 2, weight.shape[1]).sum(1) for side in (even, -even))
    return np.maximum(up, down).max(0, initial=0)
