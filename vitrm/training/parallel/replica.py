"""A copy of a model that learns in its place: the weights as forward and backward passes want them, made anew once per update.

In bfloat16 weights are bfloat16 from the start, where autocast would cast them in each pass.  A worker of a CPU
(vitrm.training.parallel.cpu_workers) has its matrices cast.  On a GPU, where each small operation costs a launch, all is cast
but batch norms, which compute in float32, and the matrices that a layer multiplies by at once are one.
"""

from __future__ import annotations

import copy
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from vitrm.model import Layer
from vitrm.training.parallel.cpu_workers import Workers
from vitrm.training.parallel.sync_batch_norm import sync_batch_norms

M = TypeVar("M", bound=nn.Module)


class Gradients(NamedTuple):
    """The gradients of a model's parameters that are not frozen, float32."""

    all: Tensor  # one after another, 0 where there is none
    each: list[Tensor | None]  # views of it, in the order of the parameters; None: takes no part in the loss


class Part(NamedTuple):
    """Tells where a replica has a parameter of the model: some rows of one of its own, times `scale`."""

    own: nn.Parameter
    rows: slice = slice(None)
    scale: float = 1.0

    def of(self, tensor: Tensor) -> Tensor:
        """The part in a tensor that is like `own`."""
        return tensor.detach()[self.rows]


class Replica(Generic[M]):
    """A copy of a model: the same buffers, parameters of its own that `refresh` sets to the model's."""

    def __init__(self, model: M, bf16: bool, workers: Workers | None = None) -> None:
        """`workers`: of a CPU, one of whom computes with it; None: all of a batch is computed at once, on a GPU."""
        self.model: M = copy.deepcopy(model).train()
        self._parts: dict[Tensor, Part] = {}
        copied: set[Tensor] = set()  # the others lie in the same memory: nothing to refresh
        modules = list(zip(model.modules(), self.model.modules(), strict=True))
        for source, own in modules:
            matrices = isinstance(source, (nn.Linear, nn.Conv2d))
            cast = bf16 and (matrices if workers else not isinstance(source, nn.BatchNorm2d))
            for name, parameter in source.named_parameters(recurse=False):
                data = parameter.detach()
                if cast:
                    data = data.to(torch.bfloat16, copy=True)
                    copied.add(parameter)
                setattr(own, name, nn.Parameter(data, requires_grad=parameter.requires_grad))
                self._parts[parameter] = Part(getattr(own, name))
            for name, buffer in source.named_buffers(recurse=False):
                own._buffers[name] = buffer
        if workers:
            sync_batch_norms(self.model, workers)
        else:
            for source, own in modules:
                if isinstance(source, Layer) and isinstance(own, Layer):
                    copied.update(self._merge(source, own))
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        # One tensor, and its views: what is done to all gradients takes one operation, not one for each parameter.
        self._learned = [p for p in model.parameters() if p.requires_grad]
        self._gradients = torch.zeros(sum(p.numel() for p in self._learned), device=self._learned[0].device)
        parts = self._gradients.split([p.numel() for p in self._learned])
        self._views = [part.view_as(p) for part, p in zip(parts, self._learned, strict=True)]
        self._pairs = (
            [part.of(part.own) for source, part in self._parts.items() if source in copied],
            [source.detach() for source in self._parts if source in copied],
        )
        scaled = [part for part in self._parts.values() if part.scale != 1]
        self._scaled = [part.of(part.own) for part in scaled], [part.scale for part in scaled]
        self.refresh()

    def _merge(self, source: Layer, own: Layer) -> list[Tensor]:
        """Gives `own` one matrix for what are several in `source`, and returns these."""
        found: list[Tensor] = []
        for names, merged in own.merge().items():
            for i, name in enumerate(names):
                layer: nn.Linear = getattr(source, name)
                rows = slice(i * layer.out_features, (i + 1) * layer.out_features)
                for parameter, of_own in ((layer.weight, merged.weight), (layer.bias, merged.bias)):
                    self._parts[parameter] = Part(of_own, rows, source.scale if name == "q" else 1.0)
                    found.append(parameter)
        return found

    def refresh(self) -> None:
        """Takes the model's weights over."""
        if self._pairs[0]:
            torch._foreach_copy_(*self._pairs)
        if self._scaled[0]:
            torch._foreach_mul_(*self._scaled)

    def gradients(self, loss: Tensor) -> Gradients:
        """The gradients of `loss`; they hold until the next call."""
        found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        of_own = dict(zip(self.parameters, found, strict=True))
        gradients: list[Tensor | None] = []
        for parameter in self._learned:
            part = self._parts[parameter]
            gradient = of_own[part.own]
            gradients.append(None if gradient is None else part.of(gradient))
        there = [
            (view, gradient) for view, gradient in zip(self._views, gradients, strict=True) if gradient is not None
        ]
        if len(there) < len(gradients):
            self._gradients.zero_()
        torch._foreach_copy_([view for view, _ in there], [gradient for _, gradient in there])
        each = [view if gradient is not None else None for view, gradient in zip(self._views, gradients, strict=True)]
        scales = [self._parts[parameter].scale for parameter in self._learned]
        scaled = [(view, scale) for view, scale in zip(each, scales, strict=True) if view is not None and scale != 1]
        if scaled:
            torch._foreach_mul_([view for view, _ in scaled], [scale for _, scale in scaled])
        return Gradients(self._gradients, each)
