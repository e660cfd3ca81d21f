"""Executors: what one inference at a time needs to run a plan, and a pool of them.

Each inference has an executor to itself: an execution context, a stream, pinned buffers on the host and buffers on the GPU,
all of one batch size.  A thread takes an executor and gives it back, so threads share a session without waiting.  What an
executor does is captured as a CUDA graph where that is possible, and is then one call.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from vitrm.errors import UserError
from vitrm.model_limits import NEVER
from vitrm.runtime.artifact.graph_names import HALT_THRESHOLD, STEPS, STEPS_USED
from vitrm.runtime.backends.tensorrt.cuda import Cuda, CudaError, CudaGraph, DeviceMemory, PinnedArray, Stream
from vitrm.runtime.backends.tensorrt.plan import Context, Plan, PlanTensor

_IDLE_SIZES = 4  # batch sizes whose executors are kept; each of them holds memory on the GPU


class Executor(Protocol):
    """The context and buffers that one inference at a time works with."""

    batch: int

    @property
    def device_bytes(self) -> int: ...


E = TypeVar("E", bound=Executor)


class ExecutorPool(Generic[E]):
    """Executors by batch size, made when there is no idle one and kept for the next inference."""

    def __init__(self, make: Callable[[int], E], keep: int = _IDLE_SIZES) -> None:
        self._make, self._keep = make, keep
        self._idle: OrderedDict[int, list[E]] = OrderedDict()  # the batch size used last is last
        self._all: weakref.WeakSet[E] = weakref.WeakSet()
        self._lock = threading.RLock()  # a finalizer may give an executor back in the midst of it

    def take(self, batch: int) -> E:
        """An executor that nobody else has, until it is given back."""
        with self._lock:
            idle = self._idle.get(batch)
            if idle:
                return idle.pop()
        made = self._make(batch)
        with self._lock:
            self._all.add(made)
        return made

    def give_back(self, executor: E) -> None:
        """Keeps the executor for the next who asks for its batch size, and lets those of the size unused for longest go.

        As many are kept of a size as were in use at once: to make one anew takes longer than most inferences.
        """
        with self._lock:
            self._idle.setdefault(executor.batch, []).append(executor)
            self._idle.move_to_end(executor.batch)
            while len(self._idle) > self._keep:
                self._idle.popitem(last=False)

    @contextmanager
    def borrow(self, batch: int) -> Iterator[E]:
        """Lends an executor for one inference.  One whose inference failed is not used again."""
        executor = self.take(batch)
        yield executor
        self.give_back(executor)

    @property
    def device_bytes(self) -> int:
        """Memory on the GPU that all of them take."""
        with self._lock:
            return sum(executor.device_bytes for executor in self._all)


class Port:
    """An input or output of an executor: its pinned array, and the place on the GPU it is copied to or from."""

    def __init__(self, cuda: Cuda, tensor: PlanTensor, batch: int) -> None:
        self.name = tensor.name
        self.host: PinnedArray = cuda.pinned(tensor.at(batch), tensor.dtype)
        self.device: DeviceMemory | None = None if tensor.on_host else cuda.allocate(self.host.size)

    @property
    def address(self) -> int:
        """Address that TensorRT reads or writes."""
        return self.host.address if self.device is None else self.device.address

    def upload(self, cuda: Cuda, stream: Stream) -> None:
        if self.device is not None:
            cuda.copy(self.device.address, self.host.address, self.host.size, stream)

    def download(self, cuda: Cuda, stream: Stream) -> None:
        if self.device is not None:
            cuda.copy(self.host.address, self.device.address, self.host.size, stream)


class PlanExecutor:
    """Runs one plan at one batch size: copies in, runs, copies out."""

    def __init__(self, plan: Plan, batch: int, cuda_graphs: bool) -> None:
        self.plan, self.batch, self.cuda = plan, batch, plan.cuda
        self.stream = self.cuda.stream()
        self.inputs = {t.name: Port(self.cuda, t, batch) for t in plan.tensors.values() if t.is_input}
        self.outputs = {t.name: Port(self.cuda, t, batch) for t in plan.tensors.values() if not t.is_input}
        if STEPS in self.inputs:
            self.inputs[STEPS].host.array[...] = 1
        ports = {**self.inputs, **self.outputs}
        scratch = self.cuda.allocate(plan.scratch_bytes(batch))
        self.context: Context = plan.bind(batch, {n: p.address for n, p in ports.items()}, self.stream, scratch)
        self.device_bytes = plan.context_bytes + scratch.size + sum(p.device.size for p in ports.values() if p.device)
        self.graph: CudaGraph | None = None
        self.why_no_graph = "not asked for"
        if cuda_graphs:
            self._capture()
        plan.keep_compiled()

    def run(self) -> None:
        """One run from what the inputs' arrays hold to the outputs' arrays, on any thread."""
        self.cuda.use()
        if self.graph is not None:
            self.cuda.launch(self.graph, self.stream)
        else:
            self._enqueue()
        self.cuda.synchronize(self.stream)

    def _enqueue(self) -> None:
        for port in self.inputs.values():
            port.upload(self.cuda, self.stream)
        self.context.enqueue(self.stream)
        for port in self.outputs.values():
            port.download(self.cuda, self.stream)

    def _capture(self) -> None:
        """Captures a run, and goes without where that does not work, or not for every depth."""
        if any(port.device is None for port in self.inputs.values()):
            self.why_no_graph = "TensorRT reads the depth in the host's memory, a graph would keep the first"
            return
        self.run()  # what TensorRT does once for new shapes is not to be in the graph
        if not self.context.capturable(self.stream):
            self.why_no_graph = "TensorRT says that it cannot be captured"
            return
        try:
            self.graph = self.cuda.capture(self.stream, self._enqueue)
            self.why_no_graph = "" if self._keeps_depth() else "captured, the loop does not heed depth and threshold"
        except UserError as error:
            self.why_no_graph = str(error)
        if self.why_no_graph:
            self.graph = None

    def _keeps_depth(self) -> bool:
        """Tells whether the graph of a loop still decides at each run how long it goes on.  A fixed depth has nothing to decide."""
        if STEPS not in self.inputs:
            return True
        used = self.outputs[STEPS_USED].host.array
        for steps, threshold, expected in ((3, NEVER, 3), (2, -1.0, 1), (1, NEVER, 1), (5, NEVER, 5)):
            self.inputs[STEPS].host.array[...] = steps
            self.inputs[HALT_THRESHOLD].host.array[...] = threshold
            self.run()
            if not (used == expected).all():
                return False
        return True

    def device_times(self, runs: int) -> NDArray[np.float64]:
        """Milliseconds on the GPU's clock of each of `runs` runs, without the copies."""
        graph: CudaGraph | None = None
        if self.graph is not None:
            graph = self.cuda.capture(self.stream, lambda: self.context.enqueue(self.stream))

        def work() -> None:
            if graph is not None:
                self.cuda.launch(graph, self.stream)
            else:
                self.context.enqueue(self.stream)

        return self.cuda.times(self.stream, work, runs)


def capture_or_none(cuda: Cuda, stream: Stream, contexts: list[Context], work: Callable[[], None]) -> CudaGraph | None:
    """Captures `work` as a graph; None where CUDA or TensorRT cannot capture it."""
    if not all(context.capturable(stream) for context in contexts):
        return None
    try:
        return cuda.capture(stream, work)
    except CudaError:
        return None
