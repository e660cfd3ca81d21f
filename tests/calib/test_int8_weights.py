"""int8 of weights: as close as the scale allows, and never more than 16 bits can add up."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vitrm.calib.int8_weights import LEVELS, largest_pair, quantize_filters, quantize_weight
from vitrm.calib.methods import Range
from vitrm.calib.quant_params import quant_params

weights = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 9), st.integers(1, 5)),
    elements=st.floats(-4, 4, width=32, allow_subnormal=False),
)


@given(weights)
@settings(max_examples=300, deadline=None)
def test_no_two_products_of_neighboring_rows_overflow_16_bits(weight):
    integers, scales = quantize_weight(weight)
    assert integers.dtype == np.int8
    assert np.abs(integers.astype(int)).max() <= LEVELS
    assert 255 * largest_pair(integers.astype(int)).max() < 2**15
    # Rounding is to the nearest, and a channel's scale no coarser than 7 bits would need.
    assert (np.abs(weight - integers * scales) <= scales * 0.5001).all()
    assert (scales <= np.where(np.abs(weight).max(0) > 0, np.abs(weight).max(0) / 63.7, 1)).all()


@given(hnp.arrays(np.float32, (3, 2, 2, 2), elements=st.floats(-4, 4, width=32, allow_subnormal=False)))
@settings(max_examples=300, deadline=None)
def test_no_two_products_of_a_filter_overflow_16_bits_wherever_they_lie(weight):
    integers, scales = quantize_filters(weight)
    assert integers.dtype == np.int8
    channels = np.sort(integers.astype(int).reshape(3, -1), 1)
    assert 255 * max(channels[:, -2:].sum(1).max(), -channels[:, :2].sum(1).min()) < 2**15
    assert (np.abs(weight - integers * scales[:, None, None, None]) <= scales[:, None, None, None] * 0.5001).all()
    largest = np.abs(weight).reshape(3, -1).max(1)
    assert (scales <= np.where(largest > 0, largest / 63.4, 1)).all(), "no coarser than 7 bits"


def test_a_channel_without_large_neighbors_keeps_all_eight_bits():
    weight = np.array(
        [[1.0], [-0.99], [0.5], [0.1], [-0.9]], np.float32
    )  # opposite signs never add up; the last is alone
    integers, scales = quantize_weight(weight)
    assert integers[0, 0] == LEVELS
    assert scales == pytest.approx(1 / LEVELS)


def test_no_level_is_wasted_on_signs_that_do_not_occur():
    lopsided, balanced = Range(-0.1, 1.9), Range(-1.0, 1.0)
    unsigned, signed = quant_params(lopsided, "cpu"), quant_params(lopsided, "tensorrt")
    assert unsigned == (pytest.approx(2 / 255), 13)
    assert (unsigned.dtype, unsigned.lowest, unsigned.highest) == (np.uint8, 0, 255)
    assert signed == (pytest.approx(2 / 255, rel=2**-11), 13 - 128)
    assert (signed.dtype, signed.lowest, signed.highest) == (np.int8, -128, 127)
    assert quant_params(balanced, "tensorrt").zero_point == 0
    assert quant_params(balanced, "cpu").scale == pytest.approx(quant_params(balanced, "tensorrt").scale, rel=0.01)


def test_the_largest_pair_is_that_of_rows_2i_and_2i_plus_1():
    weight = np.array([[1, -5], [127, -6], [127, 100], [1, -3], [120, 120]])
    np.testing.assert_array_equal(largest_pair(weight), [128, 100])
