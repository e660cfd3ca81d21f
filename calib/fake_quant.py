"""The fake quantizer: an eager ViTRM with the roundings of an int8 graph, in floating point."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrm.calib.int8_weights import quantize_weight
from vitrm.calib.quant_params import QuantParams, QuantTable
from vitrm.calib.sites import Site
from vitrm.model import ViTRM


@dataclass(frozen=True)
class FakeQuantizer:
    """An observer (vitrm.calib.sites.Observer) that computes linear layers from rounded inputs and weights.

    The model is only read: its own weights stay as they are.
    """

    table: QuantTable
    weights: Mapping[str, Tensor]  # rounded, [out, in], by layer
    biases: Mapping[str, Tensor | None]

    @classmethod
    def of(cls, model: ViTRM, table: QuantTable) -> FakeQuantizer:
        """Rounds the weights of a model's linear layers once."""
        layers = {f"block.{n}": m for n, m in model.block.named_modules() if isinstance(m, nn.Linear)}
        return cls(
            table,
            {name: rounded_weight(layer.weight.detach()) for name, layer in layers.items()},
            {name: layer.bias for name, layer in layers.items()},
        )

    def only(self, site: Site) -> FakeQuantizer:
        """A fake quantizer that rounds at one site alone."""
        return replace(self, table=self.table.only(site))

    def __call__(self, site: Site, values: Tensor) -> Tensor | None:
        """The layer's output from its rounded input and weight; None for a site in floating point."""
        if not self.table.quantizes(site):
            return None
        return F.linear(fake_quantize(values, self.table[site]), self.weights[site.layer], self.biases[site.layer])


def fake_quantize(values: Tensor, params: QuantParams) -> Tensor:
    """Rounds values to those that int8 represents; same shape and type."""
    scale, zero = float(params.scale), int(params.zero_point)
    integers = torch.clamp(torch.round(values / scale) + zero, params.lowest, params.highest)
    return (integers - zero) * scale


def rounded_weight(weight: Tensor) -> Tensor:
    """Rounds a weight [out, in] to one that int8 represents."""
    integers, scales = quantize_weight(weight.T.contiguous().numpy())
    return torch.from_numpy(integers * scales).T.contiguous()
