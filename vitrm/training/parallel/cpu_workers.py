"""A batch divided among the cores of a CPU.  A worker is a thread that computes its part of the batch on a core of its own.

One core that runs a whole small network on a part of the batch is faster than all cores that run each of its
operations together: operations of a tenth of a millisecond are not worth sharing, and what a core has just written
still lies in its cache.  So a batch is dealt out to the workers, each goes forward and backward through a replica of the
model, and their gradients are added in the order of the workers: the result does not depend on which one was ready first.

In bfloat16 a replica's matrices are bfloat16 from the start, where autocast would cast them in each pass, and keep
the casts for all threads behind a lock that, together with Python's, can lock up the process.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from vitrm.training.parallel.distributed import part_of
from vitrm.training.parallel.sync_batch_norm import sync_batch_norms

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)
LEAST = 16  # images a worker is worth


def worthwhile(threads: int, images: int) -> int:
    """The number of workers that `threads` threads make for a batch of `images`: at least 1."""
    return max(1, min(threads, images // LEAST))


class Workers:
    """`count` workers of `threads` threads each."""

    def __init__(self, count: int, threads: int = 1) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count, "worker", torch.set_num_threads, (threads,))
        self._barrier = threading.Barrier(count)
        self._slots: list[list[Tensor | None]] = [[None] * count, [None] * count]
        self._own = threading.local()

    @property
    def main(self) -> bool:
        """True if the caller, in `map`, is the first worker."""
        return self._own.rank == 0

    def part(self, worker: int, images: int) -> slice:
        """A worker's part of `images`."""
        return part_of(images, worker, self.count)

    def map(self, work: Callable[[int], T]) -> list[T]:
        """Runs `work` in each worker 0 … count − 1, all at once, and gives the results.  Raises what the first of them raised, once all have ended."""
        futures = [self._pool.submit(self._run, work, worker) for worker in range(self.count)]
        try:
            wait(futures)
        except BaseException:
            self._barrier.abort()
            wait(futures)
            raise
        finally:
            if self._barrier.broken:
                self._barrier.reset()
        return _results(futures)

    def all_gather(self, value: Tensor) -> list[Tensor]:
        """In `map`, called by all workers: every worker's value, in their order."""
        # Two sets of slots by turns: whoever writes to one again has met all others in between, after they had read it.
        slots = self._slots[self._own.turn]
        self._own.turn = 1 - self._own.turn
        slots[self._own.rank] = value
        self._barrier.wait()
        return [other for other in slots if other is not None]

    def _run(self, work: Callable[[int], T], worker: int) -> T:
        self._own.rank, self._own.turn = worker, 0
        try:
            return work(worker)
        except BaseException:
            self._barrier.abort()  # nobody waits for this worker
            raise


def _results(futures: list[Future[T]]) -> list[T]:
    errors = [error for error in (future.exception() for future in futures) if error is not None]
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    if errors:
        raise errors[0]
    return [future.result() for future in futures]


class Gradients(NamedTuple):
    """The gradients of a model's parameters that are not frozen, float32."""

    all: Tensor  # one after another, 0 where there is none
    each: list[Tensor | None]  # views of it, in the order of the parameters; None: takes no part in the loss


class Replica(Generic[M]):
    """A worker's copy of a model: the same buffers, parameters of its own that `refresh` sets to the model's."""

    def __init__(self, model: M, workers: Workers, bf16: bool) -> None:
        self.model: M = copy.deepcopy(model).train()
        self._pairs: tuple[list[Tensor], list[Tensor]] = [], []  # copies in bfloat16, and what they are copies of
        for source, own in zip(model.modules(), self.model.modules(), strict=True):
            product = isinstance(source, (nn.Linear, nn.Conv2d))
            for name, parameter in source.named_parameters(recurse=False):
                data = parameter.detach()  # float32: the same memory, nothing to refresh
                if bf16 and product:
                    data = data.to(torch.bfloat16, copy=True)
                    self._pairs[0].append(data)
                    self._pairs[1].append(parameter.detach())
                setattr(own, name, nn.Parameter(data, requires_grad=parameter.requires_grad))
            for name, buffer in source.named_buffers(recurse=False):
                own._buffers[name] = buffer
        sync_batch_norms(self.model, workers)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        # One tensor, and its views: what is done to all gradients takes one operation, not one for each parameter.
        self._gradients = torch.zeros(sum(p.numel() for p in self.parameters))
        parts = self._gradients.split([p.numel() for p in self.parameters])
        self._views = [part.view_as(p) for part, p in zip(parts, self.parameters, strict=True)]

    def refresh(self) -> None:
        """Takes the model's weights over."""
        if self._pairs[0]:
            torch._foreach_copy_(*self._pairs)

    def gradients(self, loss: Tensor) -> Gradients:
        """The gradients of `loss`; they hold until the next call."""
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        there = [
            (view, gradient) for view, gradient in zip(self._views, gradients, strict=True) if gradient is not None
        ]
        if len(there) < len(gradients):
            self._gradients.zero_()
        torch._foreach_copy_([view for view, _ in there], [gradient for _, gradient in there])
        each = [view if gradient is not None else None for view, gradient in zip(self._views, gradients, strict=True)]
        return Gradients(self._gradients, each)
