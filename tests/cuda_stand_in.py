"""Stands in for CUDA and TensorRT: the memory of a GPU that is the host's, streams that work only when they are waited for,
and plans whose runs are ONNX Runtime's.

What it proves: that our code copies within bounds, waits before it reads, captures what it launches, shares what it may, and
then gives the answers of the graph.  What it cannot: that CUDA and TensorRT take the calls.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

from vitrm.runtime.artifact.onnx_file import inspect
from vitrm.runtime.backends.tensorrt.plan import Plan, PlanTensor, choose_profile

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


class Memory:
    """A block of the host's; what nobody wrote is NaN."""

    def __init__(self, cuda: StandInCuda, size: int) -> None:
        self.bytes = np.full(max(size, 1), 0xFF, np.uint8)
        self.address, self.size = self.bytes.ctypes.data, size
        cuda.blocks[self.address] = len(self.bytes)


class Pinned(Memory):
    def __init__(self, cuda: StandInCuda, shape: Any, dtype: Any) -> None:
        super().__init__(cuda, int(np.prod(shape)) * np.dtype(dtype).itemsize)
        self.array = self.bytes[: self.size].view(dtype).reshape(shape)
        self.array.fill(0)


class StandInStream:
    handle = 1

    def __init__(self) -> None:
        self.queue: list[Callable[[], None]] = []


class StandInCuda:
    """The interface of `vitrm.runtime.backends.tensorrt.cuda.Cuda`."""

    index = 0

    def __init__(self) -> None:
        self.blocks: dict[int, int] = {}  # they live as long as this does
        self._kept: list[Memory] = []
        self.copied: list[int] = []  # bytes of each copy that was put into a stream or a graph
        self.batches: list[int] = []  # copies of each batch of them
        self.launches = 0
        self._lock = threading.Lock()

    def use(self) -> None:
        pass

    def _keep(self, memory: Memory) -> Any:
        with self._lock:
            self._kept.append(memory)
        return memory

    def allocate(self, size: int) -> Any:
        return self._keep(Memory(self, size))

    def pinned(self, shape: Any, dtype: Any) -> Any:
        return self._keep(Pinned(self, shape, dtype))

    def check(self, address: int, size: int) -> None:
        """Fails for what is not within one block."""
        with self._lock:
            assert any(start <= address and address + size <= start + held for start, held in self.blocks.items())

    def copy(self, target: int, source: int, size: int, stream: StandInStream) -> None:
        self.check(target, size)
        self.check(source, size)
        assert not (target < source + size and source < target + size), "they overlap"
        self.copied.append(size)
        stream.queue.append(lambda: ctypes.memmove(target, source, size) and None)

    def copy_all(self, copies: list[tuple[int, int, int]], stream: StandInStream) -> None:
        if copies:
            self.batches.append(len(copies))
        written = sorted((target, target + size) for target, _, size in copies)
        for (_, end), (start, _) in itertools.pairwise(written):
            assert end <= start, "two are written to one place"
        for _, source, size in copies:
            assert not any(start < source + size and source < end for start, end in written), "one is read and written"
        for target, source, size in reversed(copies):  # in any order
            self.copy(target, source, size, stream)

    def stream(self) -> Any:
        return StandInStream()

    def synchronize(self, stream: StandInStream) -> None:
        work, stream.queue = stream.queue, []
        for job in work:
            job()

    def capture(self, stream: StandInStream, work: Callable[[], None]) -> list[Callable[[], None]]:
        before, stream.queue = stream.queue, []
        work()
        captured, stream.queue = stream.queue, before
        return captured

    def launch(self, graph: list[Callable[[], None]], stream: StandInStream) -> None:
        self.launches += 1
        stream.queue += graph


class StandInContext:
    """An execution context whose run is ONNX Runtime's, on what lies at its addresses when the stream comes to it."""

    def __init__(self, plan: StandInPlan, batch: int, addresses: Mapping[str, int], scratch: Any) -> None:
        self.plan, self.batch, self.scratch, self.addresses = plan, batch, scratch, dict(addresses)
        for tensor in plan.tensors.values():
            plan.cuda.check(self.addresses[tensor.name], self._array(tensor).nbytes)

    def _array(self, tensor: PlanTensor) -> np.ndarray:
        shape = tensor.at(self.batch)
        size = int(np.prod(shape)) * tensor.dtype.itemsize
        memory = (ctypes.c_ubyte * size).from_address(self.addresses[tensor.name])
        return np.frombuffer(memory, tensor.dtype).reshape(shape)

    def enqueue(self, stream: StandInStream) -> None:
        stream.queue.append(self._run)

    def _run(self) -> None:
        tensors = self.plan.tensors.values()
        feeds = {t.name: self._array(t).copy() for t in tensors if t.is_input}
        outputs = [t for t in tensors if not t.is_input]
        found = self.plan.session.run([t.name for t in outputs], feeds)
        for tensor, value in zip(outputs, found, strict=True):
            self._array(tensor)[...] = value

    def capturable(self, stream: StandInStream) -> bool:
        return True


class StandInPlan:
    """The interface of `vitrm.runtime.backends.tensorrt.plan.Plan`, for an ONNX file that is called a plan."""

    stripped = False
    context_bytes = 0

    def __init__(self, path: Path, cuda: StandInCuda | None = None, device: str = "cuda") -> None:
        self.path, self.cuda, self.profiles = path, cuda or StandInCuda(), [[1, 1, 1], [2, 4, 8]]
        data = path.read_bytes()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        given = [(t, True) for t in self.session.get_inputs()] + [(t, False) for t in self.session.get_outputs()]
        self.tensors = {t.name: self._tensor(t, is_input) for t, is_input in given}
        engine = SimpleNamespace(bytes=len(data), gpu_name=None, profiles=self.profiles)
        self.sidecar = SimpleNamespace(metadata=inspect(path).metadata, engine=engine, notes=())
        self.api, self.gpu = SimpleNamespace(flavour="full"), SimpleNamespace(name="a stand-in")
        self.largest = 8
        self.contexts: list[StandInContext] = []

    def _tensor(self, tensor: Any, is_input: bool) -> PlanTensor:
        shape = tuple(d if isinstance(d, int) else -1 for d in tensor.shape)
        return PlanTensor(tensor.name, is_input, shape, np.dtype(_TYPES[tensor.type]), on_host=False)

    inputs, outputs = Plan.inputs, Plan.outputs

    def scratch_bytes(self, batch: int) -> int:
        return 1000 * self.profiles[choose_profile(self.profiles, batch)[0]][2]

    def bind(self, batch: int, addresses: Mapping[str, int], stream: StandInStream, scratch: Any) -> StandInContext:
        assert choose_profile(self.profiles, batch)[1] == batch, "no profile takes it as it is"
        assert scratch.size >= self.scratch_bytes(batch), "the profile needs more"
        context = StandInContext(self, batch, addresses, scratch)
        self.contexts.append(context)
        return context

    def keep_compiled(self) -> None:
        pass
