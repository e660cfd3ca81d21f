"""The fake quantizer: an eager ViTRM with the roundings of an int8 graph, in floating point."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrm.calib.int8_weights import quantize_filters, quantize_weight
from vitrm.calib.quant_params import QuantParams, QuantTable
from vitrm.calib.sites import TOKENIZER, Site
from vitrm.model import ViTRM


@dataclass(frozen=True)
class FakeQuantizer:
    """An observer (vitrm.calib.sites.Observer) that computes linear layers and convolutions from rounded inputs and weights.

    A convolution's output is rounded, too.
    The model is only read: its own weights stay as they are.
    """

    table: QuantTable
    weights: Mapping[str, Tensor]  # rounded, [out, in] or [out, in, height, width], by layer
    layers: Mapping[str, nn.Linear | nn.Conv2d]

    @classmethod
    def of(cls, model: ViTRM, table: QuantTable) -> FakeQuantizer:
        """Rounds the weights of a model's layers once."""
        layers: dict[str, nn.Linear | nn.Conv2d] = {
            f"block.{n}": m for n, m in model.block.named_modules() if isinstance(m, nn.Linear)
        }
        layers |= {TOKENIZER + c.name: c.layer for c in model.tokenizer.convolutions()}
        return cls(table, {name: rounded_weight(layer.weight.detach()) for name, layer in layers.items()}, layers)

    def only(self, site: Site) -> FakeQuantizer:
        """A fake quantizer that rounds at one site alone; for a convolution at its input and its output."""
        params = {s: p for s, p in self.table.params.items() if s.of_input == site}
        return replace(self, table=replace(self.table, params=params))

    def __call__(self, site: Site, values: Tensor) -> Tensor | None:
        """The layer's output from its rounded input and weight; None for a site in floating point."""
        params = self.table.params.get(site)
        if params is None:
            return None
        values = fake_quantize(values, params)
        if site.is_output:
            return values
        layer, weight = self.layers[site.layer], self.weights[site.layer]
        if isinstance(layer, nn.Linear):
            return F.linear(values, weight, layer.bias)
        return F.conv2d(values, weight, layer.bias, layer.stride, layer.padding)


def fake_quantize(values: Tensor, params: QuantParams) -> Tensor:
    """Rounds values to those that int8 represents; same shape and type."""
    scale, zero = float(params.scale), int(params.zero_point)
    integers = torch.clamp(torch.round(values / scale) + zero, params.lowest, params.highest)
    return (integers - zero) * scale


def rounded_weight(weight: Tensor) -> Tensor:
    """Rounds a weight [out, in] or [out, in, height, width] to one that int8 represents."""
    if weight.dim() == 4:
        filters, scales = quantize_filters(weight.numpy())
        return torch.from_numpy(filters * scales.reshape(-1, 1, 1, 1))
    integers, scales = quantize_weight(weight.T.contiguous().numpy())
    return torch.from_numpy(integers * scales).T.contiguous()
