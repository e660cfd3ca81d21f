"""The map between values and integers: within half a scale, 0 exact, and the same in a graph as in the simulation."""

from __future__ import annotations

import numpy as np
import pytest

from vitrm.calib.methods import Range
from vitrm.calib.quant_params import quant_params

RANGES = (Range(-3.0, 5.0), Range(0.0, 6.1), Range(-0.17, 9.0), Range(-0.17, 0.02), Range(0.0, 1e-6))


@pytest.mark.parametrize("values", RANGES)
@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_values_in_the_range_come_back_within_half_a_scale(values, target):
    params = quant_params(values, target)
    found = np.linspace(values.low, values.high, 1001)
    integers = np.clip(np.round(found / params.scale) + int(params.zero_point), params.lowest, params.highest)
    back = (integers - int(params.zero_point)) * params.scale
    # The zero point is a whole number, and TensorRT's scale is of float16: the ends may miss by as much.
    assert np.abs(back - found).max() <= 1.1 * params.scale
    inside = np.abs(found) < 0.99 * max(-values.low, values.high) if target == "tensorrt" else slice(5, -5)
    assert np.abs(back - found)[inside].max() <= 0.5001 * params.scale


@pytest.mark.parametrize("values", [*RANGES, Range(0.0, 9e18)])
def test_a_scale_for_tensorrt_is_one_of_float16(values):
    """Its graph has scales in float16: the fake quantizer must have the same, and none may become 0."""
    scale = quant_params(values, "tensorrt").scale
    assert np.float16(scale) == scale
    assert 0 < scale < np.inf
