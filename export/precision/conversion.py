"""Traced fragments at another precision: float16, int8, or int8 with float16 around it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vitrm.calib.calibration import Calibration
from vitrm.calib.ranges import Range
from vitrm.calib.sites import NET, ROLES, Site
from vitrm.export.graph.fragments import Fragment, Fragments
from vitrm.export.precision.float16 import to_half
from vitrm.export.precision.int8_linear import to_int8


def half_fragments(traced: Fragments) -> Fragments:
    """float16 fragments; the heads stay float32."""
    made: dict[str, Any] = {role: to_half(getattr(traced, role)) for role in ROLES}
    return replace(traced, **made)


def int8_fragments(
    traced: Fragments, calibration: Calibration, target: str, step: int | None, floats: frozenset[Site]
) -> Fragments:
    """int8 fragments with the ranges of one step, or (None) those that all steps share; the sites `floats` stay as they are.

    Around its products int8 for TensorRT is float16.
    """

    def made(role: str) -> Fragment:
        def range_of(layer: str) -> Range | None:
            # Where steps share a graph, a layer is kept at all of them: that of step 1 says so.
            if Site(0 if role == "embed" else step or 1, role, layer) in floats:
                return None
            if role == "embed":
                return calibration.at(0, role, layer)
            return calibration.shared(role, layer) if step is None else calibration.at(step, role, layer)

        return to_int8(getattr(traced, role), range_of, target)

    fragments: dict[str, Any] = {role: made(role) for role in ROLES}
    found = replace(traced, **fragments)
    return half_fragments(found) if target == "tensorrt" else found


def int8_vit(traced: Fragment, calibration: Calibration, target: str) -> Fragment:
    """A ViT or CCT with int8 layers; what is before and after them stays as it is.  Around its products int8 for TensorRT is float16."""

    def range_of(layer: str) -> Range | None:
        return calibration.at(0, NET, layer) if layer.startswith("net.layers.") else None

    found = to_int8(traced, range_of, target)
    return to_half(found) if target == "tensorrt" else found
