"""CUDA as far as a plan needs it, through NVIDIA's own bindings: memory, one stream at a time, captured graphs, clocks.

Everything allocated is freed with the Python object that holds it.
"""

from __future__ import annotations

import ctypes
import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from vitrm.errors import UserError


class CudaError(UserError):
    """A call of CUDA's that failed: no memory left, no device, or a fault of an earlier one."""


class Cuda:
    """The runtime API on one GPU.  Raises `UserError` when the bindings are missing, `CudaError` when a call fails."""

    def __init__(self, index: int = 0) -> None:
        """`index`: which GPU, as CUDA counts them."""
        try:
            from cuda.bindings import runtime
        except ImportError:
            raise UserError(
                "running a TensorRT plan needs CUDA's Python bindings, which are not installed: pip install cuda-bindings (of "
                "the CUDA version that the driver serves)"
            ) from None
        self._api: Any = runtime
        self.index = index
        self.batches_copies = hasattr(runtime, "cudaMemcpyBatchAsync")  # from CUDA 12.8 on, in bindings and driver

    def use(self) -> None:
        """Makes the GPU this thread's, for what follows: every thread has one of its own, and others may have changed it."""
        self._call(f"choosing GPU {self.index}", self._api.cudaSetDevice(self.index))

    def _call(self, doing: str, result: tuple[Any, ...]) -> Any:
        """Returns what a call gave beside its status.  Raises `CudaError`."""
        status, *values = result
        if int(status):
            _, text = self._api.cudaGetErrorString(status)
            self._api.cudaGetLastError()  # the next call must not be blamed for this one
            reason = text.decode() if isinstance(text, bytes) else str(text)
            raise CudaError(f"CUDA failed while {doing}: {reason} ({int(status)})")
        return values[0] if len(values) == 1 else tuple(values)

    # Memory ------------------------------------------------------------------------------------

    def allocate(self, size: int) -> DeviceMemory:
        """`size` bytes on the GPU, not initialized."""
        self.use()
        address = self._call(f"allocating {size} bytes on the GPU", self._api.cudaMalloc(max(size, 1)))
        return DeviceMemory(int(address), size, self._api.cudaFree)

    def pinned(self, shape: Sequence[int], dtype: DTypeLike) -> PinnedArray:
        """An array of zeros in memory of the host that the GPU copies from and to directly."""
        size = max(1, int(np.prod(shape)) * np.dtype(dtype).itemsize)
        address = self._call(f"allocating {size} bytes of pinned memory", self._api.cudaHostAlloc(size, 0))
        return PinnedArray(int(address), size, shape, dtype, self._api.cudaFreeHost)

    def copy(self, target: int, source: int, size: int, stream: Stream) -> None:
        """Copies `size` bytes in the order of `stream`; addresses are of either memory."""
        kind = self._api.cudaMemcpyKind.cudaMemcpyDefault
        self._call("copying", self._api.cudaMemcpyAsync(target, source, size, kind, stream.handle))

    def copy_all(self, copies: list[tuple[int, int, int]], stream: Stream) -> None:
        """Copies (target, source, bytes) in the order of `stream`, all at once: none reads or writes what another one writes.

        One call, where CUDA can do that.
        """
        if self.batches_copies and len(copies) > 1:
            targets, sources, sizes = map(list, zip(*copies, strict=True))
            how = self._api.cudaMemcpyAttributes()
            how.srcAccessOrder = self._api.cudaMemcpySrcAccessOrder.cudaMemcpySrcAccessOrderStream
            status, *_ = self._api.cudaMemcpyBatchAsync(
                targets, sources, sizes, len(copies), [how], [0], 1, stream.handle
            )
            if not int(status):
                return
            # Bindings newer than the driver, for one.  Where the reason is a fault of before, the copies below fail, too.
            self._api.cudaGetLastError()
            self.batches_copies = False
        for target, source, size in copies:
            self.copy(target, source, size, stream)

    # Streams -----------------------------------------------------------------------------------

    def stream(self) -> Stream:
        """A stream of its own, which does not wait for the default one."""
        self.use()
        handle = self._call("creating a stream", self._api.cudaStreamCreateWithFlags(1))
        return Stream(address_of(handle), self._api.cudaStreamDestroy)

    def synchronize(self, stream: Stream) -> None:
        """Waits until the stream has done everything."""
        self._call("running the plan", self._api.cudaStreamSynchronize(stream.handle))

    def capture(self, stream: Stream, work: Callable[[], None]) -> CudaGraph:
        """Captures what `work` puts into `stream`, as a graph to launch again and again with the same addresses.

        Raises `CudaError`, with the stream as usable as before, for work that cannot be captured.
        """
        mode = self._api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        failure: Exception | None = None
        with _no_garbage_collection():
            self._call("beginning a capture", self._api.cudaStreamBeginCapture(stream.handle, mode))
            try:
                work()
            except Exception as error:  # the capture has to end whatever came of it
                failure = error
            status, graph = self._api.cudaStreamEndCapture(stream.handle)
        if failure is not None or int(status):
            self._api.cudaGetLastError()
            if not int(status):
                self._api.cudaGraphDestroy(graph)
            raise CudaError(f"CUDA could not capture the work as a graph ({failure or status})")
        try:
            executable = self._call("instantiating a graph", self._api.cudaGraphInstantiate(graph, 0))
        finally:
            self._api.cudaGraphDestroy(graph)
        return CudaGraph(executable, self._api.cudaGraphExecDestroy)

    def launch(self, graph: CudaGraph, stream: Stream) -> None:
        """Puts a captured graph into `stream`."""
        self._call("launching a graph", self._api.cudaGraphLaunch(graph.handle, stream.handle))

    def times(self, stream: Stream, work: Callable[[], None], runs: int) -> NDArray[np.float64]:
        """Milliseconds that each of `runs` runs of `work` takes on the GPU's own clock."""
        taken = []
        start, stop = (self._call("creating an event", self._api.cudaEventCreate()) for _ in range(2))
        try:
            for _ in range(runs):
                self._call("recording an event", self._api.cudaEventRecord(start, stream.handle))
                work()
                self._call("recording an event", self._api.cudaEventRecord(stop, stream.handle))
                self._call("running the plan", self._api.cudaEventSynchronize(stop))
                taken.append(self._call("reading an event", self._api.cudaEventElapsedTime(start, stop)))
        finally:
            for event in (start, stop):
                self._api.cudaEventDestroy(event)
        return np.asarray(taken, np.float64)


def address_of(handle: Any) -> int:
    """The address behind a handle of the bindings, which TensorRT takes as a number."""
    try:
        from cuda.bindings.utils import get_cuda_native_handle
    except ImportError:  # before 12.9.1
        return int(handle)
    return handle if isinstance(handle, int) else int(get_cuda_native_handle(handle))


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Keeps the collector from freeing memory of the GPU meanwhile, which would end the capture of this thread."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


class DeviceMemory:
    """Bytes on the GPU."""

    def __init__(self, address: int, size: int, free: Callable[[int], object]) -> None:
        self.address, self.size = address, size
        weakref.finalize(self, free, address)


class PinnedArray:
    """An array in pinned memory; `array` must not outlive it."""

    def __init__(
        self, address: int, size: int, shape: Sequence[int], dtype: DTypeLike, free: Callable[[int], object]
    ) -> None:
        self.address, self.size = address, size
        memory = memoryview((ctypes.c_byte * size).from_address(address)).cast("B")
        self.array: NDArray[Any] = np.frombuffer(memory, dtype, count=int(np.prod(shape))).reshape(shape)
        self.array.fill(0)
        weakref.finalize(self, free, address)


class Stream:
    """An order in which work is done."""

    def __init__(self, handle: int, destroy: Callable[[int], object]) -> None:
        self.handle = handle
        weakref.finalize(self, destroy, handle)


class CudaGraph:
    """Work that was captured from a stream, to launch again."""

    def __init__(self, handle: Any, destroy: Callable[[Any], object]) -> None:
        self.handle = handle
        weakref.finalize(self, destroy, handle)
