"""A folder of three plans: the recursion driven from the host, its state on the GPU.

An executor holds room for one batch: what embed makes, and two sides for the state.  A step reads one side and writes the
other, and then they change roles: nothing is copied.  Samples lie in slots.  Those that go on are moved to the front, and a
step runs on a prefix: 1, 2, 4, … slots, whichever holds them all.  Where that takes in samples that have halted, these
compute for nothing.

A run of `infer` never asks for a halted sample again: one that goes on is copied over it.  A state that a caller drives
(`start`) may: there slots are exchanged, and after a step that took in halted samples the sides keep their roles, what the
others reached being copied back.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitrm.errors import UserError
from vitrm.runtime.artifact.graph_names import ANSWER, HALT_PROB, LOGITS, NEXT_SUFFIX, PARTS, PIXELS
from vitrm.runtime.artifact.interface import CarriedTensors
from vitrm.runtime.artifact.plan_sidecar import weights_path
from vitrm.runtime.backends.tensorrt.cuda import CudaGraph, DeviceMemory
from vitrm.runtime.backends.tensorrt.executor import ExecutorPool, capture_or_none
from vitrm.runtime.backends.tensorrt.plan import Context, Plan, choose_profile
from vitrm.runtime.backends.tensorrt.session import TensorRTBase, concatenate, describe_device, notes_on_plan
from vitrm.runtime.session import Result
from vitrm.runtime.stepping import Stepping, SteppingSession

_GRAPHS = 8  # of an executor, for the depths used last


def swaps(order: NDArray[np.int64], rows: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Returns the pairs of slots to exchange so that the samples `rows` lie in the first slots.

    `order` says which sample each slot holds, and is changed along.
    """
    goes_on = np.zeros(len(order), bool)
    goes_on[rows] = True
    front = goes_on[order]
    holes = np.flatnonzero(~front[: len(rows)])
    strays = len(rows) + np.flatnonzero(front[len(rows) :])
    pairs = [(int(a), int(b)) for a, b in zip(holes, strays, strict=True)]
    for a, b in pairs:
        order[a], order[b] = order[b], order[a]
    return pairs


def runs_of(pairs: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Joins pairs of slots (a, b), (a + 1, b + 1), … into (a, b, how many)."""
    joined: list[tuple[int, int, int]] = []
    for a, b in pairs:
        if joined and (a, b) == (joined[-1][0] + joined[-1][2], joined[-1][1] + joined[-1][2]):
            joined[-1] = (*joined[-1][:2], joined[-1][2] + 1)
        else:
            joined.append((a, b, 1))
    return joined


def prefix(rows: int, capacity: int, profiles: list[list[int]]) -> int:
    """Returns how many slots a step of `rows` samples runs on: the next power of two, as far as the executor and the plan go."""
    wanted = min(1 << (rows - 1).bit_length(), capacity)
    return choose_profile(profiles, wanted)[1]


def prefixes(capacity: int, profiles: list[list[int]]) -> set[int]:
    """Returns every number of slots that a step may run on."""
    return {prefix(rows, capacity, profiles) for rows in range(1, capacity + 1)}


class StepwiseExecutor:
    """Room for one batch, and the contexts that work in it."""

    def __init__(self, plans: dict[str, Plan], carried: CarriedTensors, batch: int, cuda_graphs: bool) -> None:
        self.plans, self.carried, self.batch, self._cuda_graphs = plans, carried, batch, cuda_graphs
        self.cuda = plans["step"].cuda
        self.stream = self.cuda.stream()
        tensors = {t.name: t for plan in plans.values() for t in plan.tensors.values()}
        self.row_bytes = {n: int(np.prod(t.at(1))) * t.dtype.itemsize for n, t in tensors.items()}
        self.device = {n: self.cuda.allocate(size * batch) for n, size in self.row_bytes.items()}
        self._spare: DeviceMemory | None = None  # for exchanges
        self.side = np.zeros(batch, np.int64)  # of the state, for each slot: 1 is where the first step writes
        self.pixels = self.cuda.pinned(tensors[PIXELS].at(batch), np.float32)
        self.logits = self.cuda.pinned(tensors[LOGITS].at(batch), np.float32)
        self.halt_prob = self.cuda.pinned(tensors[HALT_PROB].at(batch), np.float32)
        # The contexts take turns on one stream, so they share what they work in.
        sizes = {"embed": {batch}, "step": prefixes(batch, plans["step"].profiles)}
        sizes["heads"] = sizes["step"]
        needed = max(plans[part].scratch_bytes(rows) for part, of in sizes.items() for rows in of)
        self._scratch = self.cuda.allocate(needed)
        self._contexts: dict[tuple[str, int, bool], Context] = {}
        self._graphs: dict[tuple[str, int], CudaGraph | None] = {}

    @property
    def device_bytes(self) -> int:
        """Memory on the GPU: the buffers and the contexts so far."""
        contexts = sum(self.plans[part].context_bytes for part, _, _ in self._contexts)
        spare = self._spare.size if self._spare else 0
        return contexts + self._scratch.size + spare + sum(m.size for m in self.device.values())

    def embed(self, images: NDArray[np.float32]) -> None:
        """Puts the images into the first slots, embedded and at depth 0."""
        self.cuda.use()
        self._fill(images)
        self._run("embed", self.batch, self._embed)
        self.side[:] = 0

    def step(self, count: int, rows: int, *, keep: bool) -> None:
        """One step on `rows` slots, of which the first `count` count; their answers are in `logits` and `halt_prob` then.

        The other slots keep their state only if `keep`.
        """
        self.cuda.use()
        side = int(2 * self.side[:count].sum() > count)
        # Those on the other side would be overwritten, whether they go on or not.
        wanted = rows if keep else count
        self._bring(np.flatnonzero(self.side[:wanted] != side), side)
        self._run(f"step from {side}", rows, lambda: self._step(rows, bool(side)))
        if count == rows or not keep:
            self.side[:rows] = 1 - side
        else:
            self._copy_state(np.arange(count), to=side)
        for name, host in ((LOGITS, self.logits), (HALT_PROB, self.halt_prob)):
            self.cuda.copy(host.address, self.device[name].address, self.row_bytes[name] * count, self.stream)
        self.cuda.synchronize(self.stream)

    def move(self, pairs: list[tuple[int, int]]) -> None:
        """Copies the second slot of each pair over the first."""
        self.cuda.use()
        here, there = np.asarray(pairs, np.int64).reshape(-1, 2).T
        self.cuda.copy_all(
            [
                (start + a * size, start + b * size, length * size)
                for a, b, length in self._runs(here, there)
                for start, size in self._moved(int(self.side[b]))
            ],
            self.stream,
        )
        self.side[here] = self.side[there]

    def swap(self, pairs: list[tuple[int, int]]) -> None:
        """Exchanges the slots of each pair."""
        if not pairs:
            return
        self.cuda.use()
        here, there = np.asarray(pairs, np.int64).T
        differ = self.side[here] != self.side[there]
        for side in (0, 1):
            self._bring(np.sort(there[differ & (self.side[here] == side)]), side)
        if self._spare is None:  # no more pairs are exchanged at once
            size = sum(self.row_bytes[name] for name in (*self.carried.embedded, *self.carried.state))
            self._spare = self.cuda.allocate(size * max(1, self.batch // 2))
        rounds: list[list[tuple[int, int, int]]] = [[], [], []]
        spare = self._spare.address
        for a, b, length in self._runs(here, there):
            for start, size in self._moved(int(self.side[a])):
                one, other = start + a * size, start + b * size
                for copies, (target, source) in zip(rounds, ((spare, one), (one, other), (other, spare)), strict=True):
                    copies.append((target, source, length * size))
                spare += length * size
        for copies in rounds:
            self.cuda.copy_all(copies, self.stream)

    def _runs(self, here: NDArray[np.int64], there: NDArray[np.int64]) -> list[tuple[int, int, int]]:
        """Pairs of slots joined to runs, each of one side."""
        return [
            run
            for side in (0, 1)
            for run in runs_of([(int(a), int(b)) for a, b in zip(here, there, strict=True) if self.side[b] == side])
        ]

    def _moved(self, side: int) -> list[tuple[int, int]]:
        """The address and the bytes a slot of all that moves with a sample whose state is on a side."""
        names = [(name, self.device[name].address) for name in self.carried.embedded]
        names += [(name, self._place(name, side)) for name in self.carried.state]
        return [(address, self.row_bytes[name]) for name, address in names]

    def _bring(self, slots: NDArray[np.int64], side: int) -> None:
        """Copies the state of `slots` (ascending), which is on the other side, to `side`."""
        self._copy_state(slots, to=side)
        self.side[slots] = side

    def _copy_state(self, slots: NDArray[np.int64], to: int) -> None:
        """Copies the state of `slots` (ascending) from the other side."""
        self.cuda.copy_all(
            [
                (self._place(name, to) + start * size, self._place(name, 1 - to) + start * size, length * size)
                for start, _, length in runs_of([(int(slot), int(slot)) for slot in slots])
                for name, size in ((name, self.row_bytes[name]) for name in self.carried.state)
            ],
            self.stream,
        )

    def _place(self, name: str, side: int) -> int:
        """The address of a tensor of the state on a side."""
        return self.device[name + NEXT_SUFFIX if side else name].address

    def run_whole(self, images: NDArray[np.float32], steps: int) -> None:
        """Runs from images to the answer after `steps` steps, halting none: with a graph, one call."""
        self.cuda.use()
        self._fill(images)
        self._run("whole", steps, lambda: self._whole(steps))
        self.cuda.synchronize(self.stream)

    def device_times(self, steps: int, runs: int) -> NDArray[np.float64]:
        """Milliseconds on the GPU's clock of `runs` whole runs on what lies in the slots, without copies to the host."""

        def work() -> None:
            self._context("embed", self.batch).enqueue(self.stream)
            self._steps(steps)

        work()
        graph = (
            capture_or_none(self.cuda, self.stream, list(self._contexts.values()), work) if self._cuda_graphs else None
        )
        return self.cuda.times(
            self.stream, work if graph is None else lambda: self.cuda.launch(graph, self.stream), runs
        )

    def _fill(self, images: NDArray[np.float32]) -> None:
        self.pixels.array[: len(images)] = images
        self.pixels.array[len(images) :] = images[-1]

    def _run(self, what: str, size: int, work: Callable[[], None]) -> None:
        """Does `work`, as a graph from the second time on where it can be captured."""
        key = (what, size)
        if key not in self._graphs:
            work()  # what TensorRT does once for new shapes is not to be in the graph
            self._graphs[key] = None
            if self._cuda_graphs:
                # The captured run is not executed: the work above was this call's.
                contexts = list(self._contexts.values())
                self._graphs[key] = capture_or_none(self.cuda, self.stream, contexts, work)
            for plan in self.plans.values():
                plan.keep_compiled()
            depths = [k for k in self._graphs if k[0] == "whole"]
            if len(depths) > _GRAPHS:
                del self._graphs[depths[0]]
            return
        graph = self._graphs[key]
        if graph is None:
            work()
        else:
            self.cuda.launch(graph, self.stream)

    def _embed(self) -> None:
        self.cuda.copy(self.device[PIXELS].address, self.pixels.address, self.pixels.size, self.stream)
        self._context("embed", self.batch).enqueue(self.stream)

    def _step(self, rows: int, turned: bool) -> None:
        self._context("step", rows, turned).enqueue(self.stream)
        self._context("heads", rows, turned).enqueue(self.stream)

    def _whole(self, steps: int) -> None:
        self._embed()
        self._steps(steps)
        for name, host in ((LOGITS, self.logits), (HALT_PROB, self.halt_prob)):
            self.cuda.copy(host.address, self.device[name].address, host.size, self.stream)

    def _steps(self, steps: int) -> None:
        """All of the batch, all steps: each reads the state where the one before wrote it, so none is copied."""
        for i in range(steps):
            self._context("step", self.batch, turned=bool(i % 2)).enqueue(self.stream)
        self._context("heads", self.batch, turned=steps % 2 == 0).enqueue(self.stream)

    def _context(self, part: str, rows: int, turned: bool = False) -> Context:
        """The context of a part on the first `rows` slots; `turned`: the state is read where the next one lies, and the reverse."""
        key = (part, rows, turned)
        if key not in self._contexts:
            plan = self.plans[part]
            places = {name: self.device[name].address for name in self.device}
            if turned:
                for name in self.carried.state:
                    other = name + NEXT_SUFFIX
                    places[name], places[other] = places[other], places[name]
            addresses = {name: places[name] for name in plan.tensors}
            if part == "heads":
                # A step's answer is read where the step wrote it.
                addresses[ANSWER] = places[ANSWER + NEXT_SUFFIX]
            self._contexts[key] = plan.bind(rows, addresses, self.stream, self._scratch)
        return self._contexts[key]


class DeviceStepping(Stepping):
    """A batch whose state is on the GPU."""

    def __init__(self, session: TensorRTStepwiseSession, images: NDArray[np.float32], *, keep: bool = True) -> None:
        """`keep`: samples that have halted may go on later."""
        super().__init__(len(images), session.metadata.model["classes"])
        self._keep = keep
        executors = session.executors
        self._profiles = session.profiles
        self._executor = executors.take(choose_profile(session.profiles, len(images))[1])
        weakref.finalize(self, executors.give_back, self._executor)
        self._order = np.arange(len(images))
        self._executor.embed(images)

    def _advance(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        count = len(rows)
        pairs = swaps(self._order, rows)
        (self._executor.swap if self._keep else self._executor.move)(pairs)
        self._executor.step(count, prefix(count, self._executor.batch, self._profiles), keep=self._keep)
        ascending = np.argsort(self._order[:count])
        return self._executor.logits.array[ascending], self._executor.halt_prob.array[ascending]


class TensorRTStepwiseSession(TensorRTBase, SteppingSession):
    """A folder of embed.plan, step.plan and heads.plan."""

    def __init__(
        self, path: Path, *, device: str = "cuda", threads: int | None = None, cuda_graphs: bool = True
    ) -> None:
        """Opens the folder `path`; see `vitrm.runtime.open`.  `cuda_graphs` False never captures."""
        missing = [f"{part}.plan" for part in PARTS if not (path / f"{part}.plan").is_file()]
        if missing:
            raise UserError(f"{path} lacks {', '.join(missing)}: copy the whole folder, or build it again")
        self.path = path
        first = Plan(path / "step.plan", device=device)
        plans = {
            part: first if part == "step" else Plan(path / f"{part}.plan", first.cuda, device=device) for part in PARTS
        }
        self.metadata = first.sidecar.metadata
        for part, plan in plans.items():
            if plan.sidecar.metadata != self.metadata or plan.profiles != first.profiles:
                raise UserError(
                    f"{path / part}.plan and {path / 'step'}.plan are not of one export: build the folder again"
                )
        self.plans = plans
        self.largest, self.profiles = first.largest, first.profiles
        self.threads = threads or 1
        self.backend, self.device_kind, self.device = describe_device(first)
        self.device_index = first.cuda.index
        self.size_bytes = sum(
            p.path.stat().st_size + (weights_path(p.path).stat().st_size if p.stripped else 0) for p in plans.values()
        )
        carried = CarriedTensors.between(path, {part: (plan.inputs, plan.outputs) for part, plan in plans.items()})
        self.executors = ExecutorPool(lambda batch: StepwiseExecutor(plans, carried, batch, cuda_graphs))
        self.notes = notes_on_plan(first.sidecar, self.device)

    @property
    def device_bytes(self) -> int:
        return sum(plan.sidecar.engine.bytes for plan in self.plans.values()) + self.executors.device_bytes

    def _begin(self, images: NDArray[np.float32]) -> DeviceStepping:
        if len(images) > self.largest:
            raise UserError(
                f"{self.name} takes at most {self.largest} images in one state, got {len(images)}: start several, or build "
                f"it again with --batch 1,{self.largest},{len(images)}"
            )
        return DeviceStepping(self, images)

    def _runner(self, images: NDArray[np.float32], steps: int, halt_threshold: float) -> Callable[[], Result]:
        pieces = self._pieces(len(images))
        halts = halt_threshold < 1

        def run() -> Result:
            found = [
                self._halting(images[part], steps, halt_threshold)
                if halts
                else self._whole(images[part], padded, steps)
                for part, padded in pieces
            ]
            return found[0] if len(found) == 1 else concatenate(found)

        return run

    def _halting(self, images: NDArray[np.float32], steps: int, halt_threshold: float) -> Result:
        state = DeviceStepping(self, images, keep=False)
        for _ in range(steps):
            if not state.step(halt_threshold):
                break
        return state.result

    def _whole(self, images: NDArray[np.float32], padded: int, steps: int) -> Result:
        count = len(images)
        with self.executors.borrow(padded) as executor:
            executor.run_whole(images, steps)
            logits, halt_prob = executor.logits.array[:count].copy(), executor.halt_prob.array[:count].copy()
        return Result(logits, halt_prob, np.full(count, steps, np.int64))

    def device_times(self, images: NDArray[np.float32], runs: int) -> NDArray[np.float64] | None:
        pieces = self._pieces(len(images))
        if len(pieces) > 1 or self.metadata.halt_threshold < 1:
            return None
        with self.executors.borrow(pieces[0][1]) as executor:
            executor.embed(images)
            return executor.device_times(self.metadata.steps, runs)
