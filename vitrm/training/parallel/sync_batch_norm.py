"""Batch norm over a batch of which each process (vitrm.training.parallel.distributed), or each worker on a CPU
(vitrm.training.parallel.cpu_workers), has a part.

Each normalizes its part by the statistics of the whole batch, so that what is learned does not depend on how many they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Exchange(Protocol):
    """Ranks or workers that have a part each of a batch.  All of them call `all_gather` equally often, in the same order."""

    @property
    def main(self) -> bool:
        """True in the one that keeps the running statistics."""

    def all_gather(self, value: Tensor) -> list[Tensor]:
        """Everyone's value, in one order for all; none of them is to be written to."""


def sync_batch_norms(model: nn.Module, exchange: Exchange) -> None:
    """Gives the batch norms of `model` the statistics of the whole batch; parameters and buffers stay the same tensors."""
    _replace(model, lambda norm: CpuSyncBatchNorm(norm, exchange))


def sync_batch_norms_on_gpus(model: nn.Module, group: Any) -> None:
    """Gives the batch norms of `model` the statistics of the whole batch with torch's own module, on GPUs.

    `group` is a process group.

    torch.nn.SyncBatchNorm.convert_sync_batchnorm does not know a scale that is a buffer.
    """

    def sync(norm: nn.BatchNorm2d) -> nn.Module:
        new = nn.SyncBatchNorm(
            norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, process_group=group
        )
        _take_over(new, norm)
        return new

    _replace(model, sync)


def _replace(model: nn.Module, make: Callable[[nn.BatchNorm2d], nn.Module]) -> None:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, make(child))


def _take_over(new: nn.Module, norm: nn.BatchNorm2d) -> None:
    """Gives `new` the tensors and the mode of `norm`; a scale that is fixed stays a buffer."""
    if not isinstance(norm.weight, nn.Parameter):
        del new._parameters["weight"]
        new.register_buffer("weight", norm.weight, persistent=False)
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        setattr(new, name, getattr(norm, name))
    new.train(norm.training)


class CpuSyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over all parts of a batch, on a CPU; it takes `norm`'s tensors over."""

    def __init__(self, norm: nn.BatchNorm2d, exchange: Exchange) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        _take_over(self, norm)
        self.exchange = exchange

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] of any float type, the same out; B may differ between the parts."""
        if not self.training:
            return super().forward(x)
        out, mean, variance, count = _NormalizeWholeBatch.apply(x, self.weight, self.bias, self.eps, self.exchange)
        if self.exchange.main:
            self._track(mean, variance * count / (count - 1))
        return out

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)


class _NormalizeWholeBatch(torch.autograd.Function):
    """The normalization, the batch's mean and (biased) variance [C] and its count, each of all parts.

    Two exchanges, one each way.  What remains is torch's own batch norm with given statistics, twice.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, exchange: Exchange
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # The results are of the running statistics' type: with these, unused, float32 for a bfloat16 x too.
        unused = torch.zeros(2, x.shape[1])
        mean, variance = torch.batch_norm_update_stats(x, unused[0], unused[1], 0.0)
        own = torch.cat([mean, variance, x.new_tensor([x.numel() / x.shape[1]], dtype=torch.float32)])
        # Means and variances are joined (Chan et al., 1979): E[x²] − E[x]² would lose digits where the mean is large.
        means, variances, counts = torch.stack(exchange.all_gather(own)).split([len(mean), len(mean), 1], 1)
        count = counts.sum()
        shares = counts / count
        mean = (shares * means).sum(0)
        variance = (shares * (variances + (means - mean).square())).sum(0)
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.eps, ctx.exchange = eps, exchange
        ctx.mark_non_differentiable(mean, variance, count)
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps), mean, variance, count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight, mean, variance, count = ctx.saved_tensors
        given_statistics = (x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True])
        of_x, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(gradient, *given_statistics)
        # Σ g x̂ and Σ g of all parts: their means are what the statistics' own dependence on x takes off.
        sums = torch.stack(ctx.exchange.all_gather(torch.stack([of_weight, of_bias]).float())).sum(0)
        slope, level = -sums / count * weight * (variance + ctx.eps).rsqrt()
        return of_x + F.batch_norm(x, mean, variance, slope, level, eps=ctx.eps), of_weight, of_bias, None, None
