"""A batch divided among the cores of a CPU.  A worker is a thread that computes its part of the batch on a core of its own.

One core that runs a whole small network on a part of the batch is faster than all cores that run each of its
operations together: operations of a tenth of a millisecond are not worth sharing, and what a core has just written
still lies in its cache.  So a batch is dealt out to the workers, each goes forward and backward through a replica of the
model, and their gradients are added in the order of the workers: the result does not depend on which one was ready first.

In bfloat16 a replica (vitrm.training.parallel.replica) does without autocast's cache of cast weights, whose lock, one for all
threads, can lock up the process together with Python's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch
from torch import Tensor

from vitrm.training.parallel.distributed import part_of

T = TypeVar("T")
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
