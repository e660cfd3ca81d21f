"""Scales and zero points of activations in int8: one table, which the fake quantizer and the exported graph both read.

    target     integers             value ≈ scale · (q − zero point)
    tensorrt   int8, −128 … 127     zero point 0 (symmetric), but where values lie mostly on one side of 0, as GELU's do:
                                    there symmetric integers would leave nearly half of their levels unused
    cpu        uint8, 0 … 255

A site that is not in the table stays floating point.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vitrm.calib.calibration import Calibration
from vitrm.calib.float16_headroom import FLOAT16_MAX
from vitrm.calib.int8_weights import LEVELS
from vitrm.calib.methods import Range
from vitrm.calib.sites import Site
from vitrm.errors import UserError

# Of float16: a scale of 0 would divide by it; values beyond the other end are float16's own trouble, which its headroom tells.
_SMALLEST = 2.0**-24
_LOPSIDED = 0.75  # a range is, whose own 256 levels are closer than this times the symmetric ones


class QuantParams(NamedTuple):
    """The map between a site's values and their integers: value ≈ scale · (q − zero_point)."""

    scale: np.float32
    zero_point: np.int8 | np.uint8

    @property
    def dtype(self) -> np.dtype[np.int8] | np.dtype[np.uint8]:
        """The type of the integers."""
        return self.zero_point.dtype

    @property
    def lowest(self) -> int:
        """The lowest integer."""
        return int(np.iinfo(self.dtype).min)

    @property
    def highest(self) -> int:
        """The highest integer."""
        return int(np.iinfo(self.dtype).max)


def quant_params(values: Range, target: str) -> QuantParams:
    """Scale and zero point for a range of values that includes 0; `target` is "cpu" or "tensorrt".

    A graph for TensorRT has its scales in float16: they are rounded to it here, so that the simulation has the same.
    """
    own = (values.high - values.low) / 255
    if target != "tensorrt":
        scale = np.float32(own)
        return QuantParams(scale, np.uint8(np.clip(round(-values.low / float(scale)), 0, 255)))
    symmetric = max(-values.low, values.high) / LEVELS
    lopsided = own < _LOPSIDED * symmetric and 128 * own < FLOAT16_MAX
    scale = np.float32(np.float16(np.clip(own if lopsided else symmetric, _SMALLEST, FLOAT16_MAX)))
    zero_point = round(-values.low / float(scale)) - 128 if lopsided else 0
    return QuantParams(scale, np.int8(np.clip(zero_point, -128, 127)))


@dataclass(frozen=True)
class QuantTable:
    """The `QuantParams` of every site that becomes int8."""

    params: Mapping[Site, QuantParams]
    target: str  # "cpu" or "tensorrt"
    shared: bool  # whether all steps have the same


def quant_table(calibration: Calibration, target: str, *, shared: bool, convolutions: bool = False) -> QuantTable:
    """Computes the parameters of every site of a calibration that int8 is for, once for all that read them.

    Args:
        calibration: the activations' ranges.
        target: "cpu" (uint8) or "tensorrt" (int8).
        shared: whether all steps share the widest of their ranges, as a `loop` and a `stepwise` must; else each step has
            its own.
        convolutions: whether int8 is for the tokenizer's convolutions, too.

    Raises:
        UserError: for `convolutions` and a calibration that was made before they had ranges.
    """
    if convolutions and not any(site.of_tokenizer for site in calibration.ranges):
        raise UserError("the calibration has no ranges of convolutions, as older ones do not: calibrate again")
    sites = [site for site in calibration.ranges if convolutions or not site.of_tokenizer]
    if not shared:
        return QuantTable({site: quant_params(calibration.ranges[site], target) for site in sites}, target, shared)
    widest = {
        (role, layer): quant_params(calibration.shared(role, layer), target)
        for role, layer in {(site.role, site.layer) for site in sites}
    }
    return QuantTable({site: widest[site.role, site.layer] for site in sites}, target, shared)
