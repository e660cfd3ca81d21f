"""How numbers become int8: the scales, for weights and for activations of either kind.

symmetric   value ≈ scale · q,            q ∈ −127 … 127      weights, and activations for TensorRT
affine      value ≈ scale · (q − zero),   q ∈ 0 … 255         activations for ONNX Runtime's CPU
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vitrm.calib.ranges import Range

LEVELS = 127  # of a symmetric int8 number, on each side of 0


def symmetric_scale(extent: Range) -> np.float32:
    """The scale of symmetric int8 for a range."""
    return np.float32(max(-extent.low, extent.high) / LEVELS)


def affine_scale(extent: Range) -> tuple[np.float32, np.uint8]:
    """The scale and the zero point of unsigned int8 for a range that includes 0."""
    scale = np.float32((extent.high - extent.low) / 255)
    return scale, np.uint8(np.clip(round(-extent.low / float(scale)), 0, 255))


def quantise_weight(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric int8 of a weight [in, out] with one scale per output channel: weight ≈ integers · scales."""
    scales = (np.abs(weight).max(0) / LEVELS).astype(np.float32)
    scales[scales == 0] = 1.0  # a channel of zeros
    return np.clip(np.round(weight / scales), -LEVELS, LEVELS).astype(np.int8), scales
