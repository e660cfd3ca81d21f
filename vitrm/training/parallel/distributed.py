"""Training in several processes at once, as `torchrun` starts them: on many GPUs, many hosts, or the cores of a CPU.

(On one CPU, a single process shares its batches between the cores faster by itself: vitrm.training.parallel.cpu_workers.)

    torchrun --nproc-per-node 2 -m vitrm.training.cli --data cifar10 --model nano --out runs/two
    torchrun --nproc-per-node 2 -m -- vitrm.training.cli --n 2     (without the --, torchrun takes --n for one of its own)

What is learned does not depend on the number of processes: --batch-size is the whole batch, all processes draw the
same order and the same augmentation and each computes its part of the batch, gradients (DistributedDataParallel) and
batch norm's statistics are those of the whole batch.  So a run may be resumed by another number of processes.  Sums
are taken in another order, which is rounding; only dropout draws other masks.

Decisions (save now, stop, end a batch's supervision early) are made by all processes together: a process that decided
by its own clock would leave the others waiting in a collective operation for ever.  They travel by gloo, on the host,
so that on GPUs nothing waits for the device.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vitrm.errors import UserError, first_line
from vitrm.training.parallel.sync_batch_norm import sync_batch_norms, sync_batch_norms_on_gpus

T = TypeVar("T")
_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets
_LOST = ("gloo", "nccl", "connection", "timed out", "peer")  # in the messages of an operation that lost its partner


def part_of(count: int, rank: int, size: int) -> slice:
    """The part of `count` things that rank `rank` of `size` has: contiguous, sizes differ by one at most."""
    return slice(rank * count // size, (rank + 1) * count // size)


class World:
    """The processes of a run.  This one: a process alone, for which every operation is the identity."""

    rank = 0  # of this process; 0 writes and speaks
    size = 1  # processes

    @property
    def main(self) -> bool:
        """True in the process that writes files and reports."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """This process's part of `count` things."""
        return part_of(count, self.rank, self.size)

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, True if it is set in any process."""
        return list(flags)

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        return values

    def broadcast(self, make: Callable[[], T]) -> T:
        """Calls `make` in rank 0 and gives its value in every process; a `UserError` that it raises is raised in all."""
        return make()

    def all_gather(self, value: T) -> list[T]:
        """Every process's value, in the order of their ranks."""
        return [value]

    def parallel(self, model: nn.Module, unused: bool) -> Callable[[Callable[[], T]], T]:
        """Gives a function that runs a forward pass so that its backward pass gives the gradients of the whole batch.

        Batch norms of `model` are synchronized, too.  `unused`: some parameters may take no part in a pass.
        """
        return lambda compute: compute()

    def close(self) -> None:
        """Leaves the group, after the last operation."""


class TorchrunWorld(World):
    """The processes that torchrun started."""

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        import torch.distributed as dist

        self.rank, self.size, self.device = rank, size, device
        store, _, _ = next(iter(dist.rendezvous("env://")))
        # torchrun keeps one store over restarts (pytorch#135712): with the keys of those before, a process would wait
        # for addresses at which nobody is any more.
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        self._host: Any = dist.new_group(backend="gloo")

    def any(self, *flags: bool) -> list[bool]:
        values = torch.tensor(flags, dtype=torch.uint8)
        self._reduce(values, maximum=True)
        return [bool(v) for v in values]

    def all_reduce(self, values: Tensor) -> Tensor:
        summed = values.detach().cpu().clone()
        self._reduce(summed, maximum=False)
        return summed.to(values.device)

    def broadcast(self, make: Callable[[], T]) -> T:
        import torch.distributed as dist

        outcome: list[Any] = [None, None]  # the value, or what is wrong
        if self.main:
            try:
                outcome[0] = make()
            except UserError as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self._host)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def all_gather(self, value: T) -> list[T]:
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._host)
        return values

    def parallel(self, model: nn.Module, unused: bool) -> Callable[[Callable[[], T]], T]:
        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel

        group: Any = dist.new_group()
        if self.device.type == "cuda":
            sync_batch_norms_on_gpus(model, group)
        else:
            sync_batch_norms(model, _Group(group))
        with warnings.catch_warnings():
            # torch has begun to rename an argument whose new name older versions do not know.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            # Buffers are batch norm's statistics, alike everywhere already.
            return DistributedDataParallel(_Through(model), broadcast_buffers=False, find_unused_parameters=unused)

    def close(self) -> None:
        import torch.distributed as dist

        self.any(False)  # nobody leaves while another still needs an answer
        dist.destroy_process_group()

    def _reduce(self, values: Tensor, *, maximum: bool) -> None:
        import torch.distributed as dist

        dist.all_reduce(values, dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM, group=self._host)


class _Group:
    """Exchanges tensors between the processes of `group`."""

    def __init__(self, group: Any) -> None:
        self.group = group

    main = True  # every process has running statistics of its own

    def all_gather(self, value: Tensor) -> list[Tensor]:
        """`value` [n] of every process."""
        import torch.distributed as dist

        values = [torch.empty_like(value) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(values, value, group=self.group)
        return values


class _Through(nn.Module):
    """Runs what it is given: DistributedDataParallel watches one forward pass, whatever that computes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[], T]) -> T:
        return compute()


@contextmanager
def losses_explained(world: World) -> Iterator[None]:
    """A context in which an operation that fails because another process has ended raises a `UserError` that says so."""
    try:
        yield
    except RuntimeError as error:
        if world.size > 1 and any(word in str(error).lower() for word in _LOST):
            raise UserError(
                "another process of this run has ended: its own message says why; the state saved last is kept, "
                "start torchrun again with --resume"
            ) from error
        raise


def launched() -> bool:
    """True if torchrun started this process as one of several."""
    return all(name in os.environ for name in _ENVIRONMENT) and int(os.environ["WORLD_SIZE"]) > 1


def restarted() -> bool:
    """True if torchrun started the processes anew (--max-restarts) after one had failed."""
    return launched() and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def first_on_host() -> bool:
    """True if this process is the first of several on this host."""
    return launched() and os.environ.get("LOCAL_RANK", "0") == "0"


def own_device(name: str) -> str:
    """The device of this process where `name` was asked for: with several processes on a host, each has a GPU of its own."""
    if not launched() or name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return name
    local, beside = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if name not in ("auto", "cuda"):
        if beside > 1:
            raise UserError(f"device {name} cannot serve {beside} processes: ask for cuda, each takes a GPU of its own")
        return name
    if torch.cuda.is_available() and beside > torch.cuda.device_count():
        raise UserError(
            f"torchrun started {beside} processes here, but there are {torch.cuda.device_count()} CUDA GPUs: "
            "start as many processes as GPUs, or use --device cpu"
        )
    return f"cuda:{local}"


def join(device: torch.device) -> World:
    """This process's world: the one that torchrun made, else a process alone.  Raises `UserError` if it cannot be joined."""
    if not launched():
        return World()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        return TorchrunWorld(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), device)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(f"the other processes cannot be reached at {where} ({first_line(error)})") from None
