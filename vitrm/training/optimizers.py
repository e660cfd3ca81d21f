"""The optimizers of a training run, and their learning rate: AdamW for all weights, or Muon for the matrices among them and AdamW for the rest.

Weight decay acts as vitrm.recipe says.  Each group's learning rate is `lr_share` of the run's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vitrm.baselines.networks import CLASSIFIERS
from vitrm.recipe import Recipe
from vitrm.training.parallel.cpu_workers import Workers

# A level rather than a slope, or a table of classes: not what Muon is for, whatever their shape.
_EMBEDDINGS = ("pos", "y0", "z0", "cls", "up_y")
_HEADS = (*CLASSIFIERS, "halt.")
# Newton–Schulz with these coefficients (Jordan, 2024) brings singular values near 1 in five steps: into about [0.7, 1.2].
_NEWTON_SCHULZ, _ROUNDS = (3.4445, -4.7750, 2.0315), 5


def make_optimizers(model: nn.Module, recipe: Recipe, workers: Workers | None = None) -> list[torch.optim.Optimizer]:
    """The optimizers for `model`, each parameter that is not frozen in one of them; `workers` divide Muon's matrices among them."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = [p for n, p in named if recipe.optimizer == "muon" and is_matrix(n, p)]
    taken = set(map(id, matrices))
    rest = [(n, p) for n, p in named if id(p) not in taken]
    decayed = [p for n, p in rest if recipe.decay_all or not _is_level(n, p)]
    plain = [p for n, p in rest if not recipe.decay_all and _is_level(n, p)]
    groups = [
        {"params": params, "weight_decay": decay, "lr_share": 1.0}
        for params, decay in ((decayed, recipe.weight_decay), (plain, 0.0))
        if params
    ]
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=recipe.lr, betas=(recipe.beta1, recipe.beta2), fused=True)
    ]
    if matrices:
        group = {"params": matrices, "lr_share": recipe.muon_lr / recipe.lr}
        made.append(
            Muon(
                [group],
                lr=recipe.muon_lr,
                momentum=recipe.muon_momentum,
                weight_decay=recipe.weight_decay,
                workers=workers,
            )
        )
    return made


def learning_rate(recipe: Recipe, progress: float) -> float:
    """AdamW's after the share `progress` ∈ [0, 1] of the batches: linear warm-up, then as the recipe's `schedule` says."""
    if progress < recipe.warmup:
        return recipe.lr * progress / recipe.warmup
    done = min((progress - recipe.warmup) / (1 - recipe.warmup), 1.0)
    height = 1 - done if recipe.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return recipe.final_lr + (recipe.lr - recipe.final_lr) * height


def is_matrix(name: str, parameter: Tensor) -> bool:
    """True for a parameter that Muon is for: weights of hidden linear layers and convolutions."""
    return parameter.ndim >= 2 and not _is_level(name, parameter) and not name.startswith(_HEADS)


def _is_level(name: str, parameter: Tensor) -> bool:
    return parameter.ndim < 2 or name.rpartition(".")[2] in _EMBEDDINGS


class Muon(torch.optim.Optimizer):
    """Muon: momentum, orthogonalized (Jordan, 2024), for matrices and convolution filters taken as [out, in · h · w].

        B ← μ B + G,   O ≈ U Vᵀ of the singular value decomposition U S Vᵀ of G + μ B,   W ← W − lr · (√(max(1, rows / columns)) O + decay · W)

    torch.optim.Muon computes O in bfloat16, which a CPU without bfloat16 instructions does twenty times as slowly as this
    in float32 (a Zen 3, one thread: 0.85 against 0.045 s an update of `nano`), and takes no filters.

    `workers` update the matrices at once, each a part of them: what comes out is the same.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        workers: Workers | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._workers = workers

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        due = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for parameter, _ in due:
            if not self.state[parameter]:
                zeros = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
                self.state[parameter]["momentum_buffer"] = zeros
        if self._workers is None:
            self._update(due)
        else:
            parts = _dealt(due, self._workers.count)
            self._workers.map(lambda worker: self._update(parts[worker]))

    @torch.no_grad()
    def _update(self, due: list[tuple[Tensor, dict[str, Any]]]) -> None:
        for parameter, group in due:
            gradient, buffer = parameter.grad, self.state[parameter]["momentum_buffer"]
            assert gradient is not None
            buffer.mul_(group["momentum"]).add_(gradient)
            ahead = gradient.add(buffer, alpha=group["momentum"])
            rows = ahead.reshape(len(ahead), -1)
            update = orthogonalized(rows).view(parameter.shape)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update, alpha=-group["lr"] * max(1.0, rows.shape[0] / rows.shape[1]) ** 0.5)


def _dealt(due: list[tuple[Tensor, dict[str, Any]]], hands: int) -> list[list[tuple[Tensor, dict[str, Any]]]]:
    """Deals parameters out so that each hand has about as much to multiply: the dearest first, to whoever has least."""

    def price(parameter: Tensor) -> int:
        rows = len(parameter)
        return parameter.numel() * min(rows, parameter.numel() // rows)

    parts: list[list[tuple[Tensor, dict[str, Any]]]] = [[] for _ in range(hands)]
    totals = [0] * hands
    for item in sorted(due, key=lambda item: -price(item[0])):
        least = totals.index(min(totals))
        parts[least].append(item)
        totals[least] += price(item[0])
    return parts


def orthogonalized(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal rows or columns, roughly: [m, n] → [m, n], in float32 (bfloat16 on CUDA).

    Each round is X ← P X with P = a + b G + c G² and G = X Xᵀ.  As every P is a polynomial in the first G, a CPU computes
    their product Q, and G by G ← P G P, from [m, m] alone, and X ← Q X once: of a filter's [144, 1296] a third of the work.
    In bfloat16 that would lose the small singular values.
    """
    a, b, c = _NEWTON_SCHULZ
    x = matrix.bfloat16() if matrix.is_cuda else matrix.float()
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    x = x / (x.norm() + 1e-7)
    if matrix.is_cuda or x.shape[1] < 1.5 * x.shape[0]:
        for _ in range(_ROUNDS):
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    else:
        gram = x @ x.T
        product = p = _factor(gram)
        for _ in range(_ROUNDS - 1):
            gram = p @ gram @ p
            p = _factor(gram)
            product = p @ product
        x = product @ x
    return (x.T if tall else x).to(matrix.dtype)


def _factor(gram: Tensor) -> Tensor:
    """P = a + b G + c G², for G [m, m]."""
    a, b, c = _NEWTON_SCHULZ
    p = torch.addmm(gram, gram, gram, beta=b, alpha=c)
    p.diagonal().add_(a)
    return p
