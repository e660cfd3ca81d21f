"""Stage "quantize": traced fragments at another precision: float16, int8, or int8 with float16 around it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

from vitrm.calib.quant_params import QuantParams, QuantTable
from vitrm.calib.sites import NET, ROLES, Site
from vitrm.export.graph.fragments import Fragment, Fragments
from vitrm.export.precision.float16 import to_half
from vitrm.export.precision.int8_layers import convolutions, linear_layers, to_int8


def convert(
    traced: Fragment | Fragments, *, float16: bool, table: QuantTable | None, steps: int
) -> Fragment | tuple[Fragments, ...]:
    """Converts float32 fragments to the precision of an export.

    Args:
        traced: a baseline's one fragment, or those of a ViTRM.
        float16: whether tensors become float16, but for those that become int8.
        table: the scales of int8; None for another precision.
        steps: the depth, for which int8 needs fragments where each step has its own scales.

    Returns:
        A baseline's fragment; of a ViTRM the fragments of each step, or one set for all.
    """
    if isinstance(traced, Fragment):
        if table is not None:
            return int8_vit(traced, table)
        return to_half(traced) if float16 else traced
    if table is None:
        return (half_fragments(traced) if float16 else traced,)
    return tuple(int8_fragments(traced, table, step) for step in ([1] if table.shared else range(1, steps + 1)))


def half_fragments(traced: Fragments) -> Fragments:
    """float16 fragments; the heads stay float32."""
    halves: dict[str, Any] = {role: to_half(fragment) for role, fragment in _by_role(traced).items()}
    return replace(traced, **halves)


def int8_fragments(traced: Fragments, table: QuantTable, step: int = 1) -> Fragments:
    """int8 fragments with the scales of a step (of any step, where all share them).

    Around its matmuls int8 for TensorRT is float16.
    """
    fragments: dict[str, Any] = {}
    for role, fragment in _by_role(traced).items():
        of_role = partial(Site, 0 if role == "embed" else step, role)
        sites = [of_role(layer) for layer in linear_layers(fragment)]
        for site in map(of_role, convolutions(fragment)):
            sites += [site, site.of_output]
        fragments[role] = to_int8(fragment, _of_layers(sites, table), table.target)
    converted = replace(traced, **fragments)
    return half_fragments(converted) if table.target == "tensorrt" else converted


def _by_role(traced: Fragments) -> dict[str, Fragment]:
    """The fragments that have sites; a model without glimpses has no look."""
    return {role: fragment for role in ROLES if (fragment := getattr(traced, role)) is not None}


def int8_vit(traced: Fragment, table: QuantTable) -> Fragment:
    """A ViT or CCT with int8 layers; what is before and after them stays floating point.

    Around its matmuls int8 for TensorRT is float16.
    """
    sites = [Site(0, NET, layer) for layer in linear_layers(traced) if layer.startswith("net.layers.")]
    converted = to_int8(traced, _of_layers(sites, table), table.target)
    return to_half(converted) if table.target == "tensorrt" else converted


def _of_layers(sites: Iterable[Site], table: QuantTable) -> dict[str, QuantParams]:
    """The parameters of the sites that become int8, by their layers."""
    return {site.layer: table.params[site] for site in sites if site in table.params}
