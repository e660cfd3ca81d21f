"""A plan on the GPU: opened once, run through execution contexts that belong to one batch size each.

An execution context is bound to shapes and addresses, and a captured graph to its context: so every batch size that is
in use has a context of its own, and nothing is set anew between two runs.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from vitrm.errors import UserError, first_line
from vitrm.runtime.artifact.interface import check_tensors
from vitrm.runtime.artifact.plan_sidecar import STRIPPED, VERSION_COMPATIBLE, read_sidecar, read_weights, rebuild
from vitrm.runtime.backends.tensorrt.api import RTX, TensorRT, make_log
from vitrm.runtime.backends.tensorrt.check_machine import check_here
from vitrm.runtime.backends.tensorrt.compiled_kernels import JitSettings
from vitrm.runtime.backends.tensorrt.cuda import Cuda, CudaError, DeviceMemory, Stream
from vitrm.runtime.system.gpus import find_gpus, gpu_index

_DTYPES: dict[str, DTypeLike] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT64": np.int64,
    "INT32": np.int32,
    "BOOL": np.bool_,
}


@dataclass(frozen=True)
class PlanTensor:
    """An input or output of a plan."""

    name: str
    is_input: bool
    shape: tuple[int, ...]  # −1 for the batch
    dtype: np.dtype[Any]
    on_host: bool  # whether TensorRT reads it in the host's memory, as it does with what decides about shapes

    def at(self, batch: int) -> tuple[int, ...]:
        """Its shape at a batch size."""
        return tuple(batch if d == -1 else d for d in self.shape)


def choose_profile(profiles: Sequence[Sequence[int]], batch: int) -> tuple[int, int]:
    """The profile for `batch` images, the one with the smallest maximum, and how many images it is run with.

    Those are more than `batch` where no profile goes down to it.  Raises ValueError where none goes up to it.
    """
    able = [(high, max(low, batch), i) for i, (low, _, high) in enumerate(profiles) if high >= batch]
    if not able:
        raise ValueError(f"no profile takes {batch} images")
    _, padded, index = min(able, key=lambda a: (a[1], a[0]))
    return index, padded


class Plan:
    """A plan that has been checked and opened.  Threads may share it."""

    def __init__(self, path: Path, cuda: Cuda | None = None, device: str = "cuda") -> None:
        """Opens `path` on the GPU that `device` names.

        Raises `UserError`, before TensorRT sees the file, for a plan that is not whole or not for this machine.
        """
        self.path = path
        self.sidecar = read_sidecar(path)
        index, gpus = gpu_index(device), find_gpus()
        if gpus.found:
            gpus.at(device)  # there are others, but not this one
        self.api = check_here(self.sidecar, path, gpus, index)
        self.gpu = gpus.found[index]
        self.cuda = cuda or Cuda(index)
        self.cuda.use()
        self.profiles = self.sidecar.engine.profiles
        self.largest = max(high for _, _, high in self.profiles)
        trt, log = self.api.module, shared_log(self.api)
        before = len(log.errors)
        self._runtime = trt.Runtime(log)
        if VERSION_COMPATIBLE in self.sidecar.engine.flags:
            self._runtime.engine_host_code_allowed = True  # the plan brings its own runtime; its SHA-256 is right
        self.engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self.engine is None:
            said = " ".join((log.errors[before:] or ["no reason given"])[0].split())
            raise UserError(
                f"{self.api} could not open {path}: {said}; build it again: {rebuild(self.sidecar, path, self.sidecar.engine.gpus[0])}"
            )
        if self.stripped:
            self._refit(trt, log)
        self.tensors = {t.name: t for t in map(self._tensor, range(self.engine.num_io_tensors))}
        signatures = {name: (t.dtype.name, t.shape) for name, t in self.tensors.items()}
        check_tensors(str(path), self.sidecar.metadata, signatures)
        self._lock = threading.Lock()
        self._jit: JitSettings | None = None  # of TensorRT for RTX; contexts read it for as long as they live

    def _refit(self, trt: Any, log: Any) -> None:
        weights = read_weights(self.path, self.sidecar.metadata)
        refitter = trt.Refitter(self.engine, log)
        parser = trt.OnnxParserRefitter(refitter, log)
        if not parser.refit_from_file(str(weights)) or not refitter.refit_cuda_engine():
            said = parser.get_error(0).desc() if parser.num_errors else (log.errors or ["no reason given"])[-1]
            raise UserError(f"{self.path} did not take the weights of {weights}: {said}")

    def _tensor(self, index: int) -> PlanTensor:
        trt, engine = self.api.module, self.engine
        name = engine.get_tensor_name(index)
        kind = str(engine.get_tensor_dtype(name)).rsplit(".", 1)[-1]
        if kind not in _DTYPES:
            raise UserError(f"{self.path}: {name} is {kind}, expected one of {', '.join(_DTYPES)}: build it again")
        return PlanTensor(
            name=name,
            is_input=engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT,
            shape=tuple(engine.get_tensor_shape(name)),
            dtype=np.dtype(_DTYPES[kind]),
            on_host=engine.get_tensor_location(name) == trt.TensorLocation.HOST,
        )

    @property
    def inputs(self) -> set[str]:
        """Names of the tensors that it takes."""
        return {name for name, tensor in self.tensors.items() if tensor.is_input}

    @property
    def outputs(self) -> set[str]:
        """Names of the tensors that it gives."""
        return set(self.tensors) - self.inputs

    @property
    def stripped(self) -> bool:
        """True where the weights are in an ONNX file beside the plan."""
        return STRIPPED in self.sidecar.engine.flags

    @property
    def context_bytes(self) -> int:
        """Memory on the GPU that each context takes by itself, beside its inputs, outputs and scratch."""
        return 0 if self._shares_scratch else int(self.engine.device_memory_size_v2)

    @property
    def _shares_scratch(self) -> bool:
        # TensorRT for RTX finishes its kernels for the shapes at hand, and may need other memory for them than the plan says.
        return self.api.flavour != RTX

    def scratch_bytes(self, batch: int) -> int:
        """Memory on the GPU that a run of `batch` images works in.  Contexts that never run at once may share it."""
        index, _ = choose_profile(self.profiles, batch)
        return int(self.engine.get_device_memory_size_for_profile_v2(index)) if self._shares_scratch else 0

    def bind(self, batch: int, addresses: Mapping[str, int], stream: Stream, scratch: DeviceMemory) -> Context:
        """A context for `batch` images, which a profile must take as they are, on tensors at `addresses`.

        It works in `scratch`, at least `scratch_bytes(batch)`, which must outlive it.  What the host decides with
        (`PlanTensor.on_host`) must already have a value there.
        """
        index, padded = choose_profile(self.profiles, batch)
        if padded != batch:
            raise ValueError(f"profile {self.profiles[index]} takes no batch of {batch}")
        with self._lock:
            context = self._create_context()
        if context is None:
            raise CudaError(f"{self.path}: no memory on the GPU for a batch of {batch}")
        if not context.set_optimization_profile_async(index, stream.handle):
            raise UserError(f"{self.path}: {self.api} refused optimization profile {index}")
        for tensor in self.tensors.values():
            if not tensor.is_input:
                continue
            if -1 in tensor.shape and not context.set_input_shape(tensor.name, tensor.at(batch)):
                raise UserError(f"{self.path}: {self.api} refused {tensor.name} of shape {list(tensor.at(batch))}")
            self._place(context, tensor, addresses)
        try:
            missing = context.infer_shapes()
        except RuntimeError as error:  # shapes or values that contradict each other
            raise UserError(
                f"{self.path}: {self.api} refused the shapes of a batch of {batch}: {first_line(error)}"
            ) from None
        if missing:
            raise UserError(f"{self.path}: {self.api} does not know the shapes of {', '.join(missing)}")
        for tensor in self.tensors.values():
            if not tensor.is_input:
                self._place(context, tensor, addresses)
        if self._shares_scratch and scratch.size:
            context.set_device_memory(scratch.address, scratch.size)
        self.cuda.synchronize(stream)
        return Context(self, context, batch, scratch)

    def _place(self, context: Any, tensor: PlanTensor, addresses: Mapping[str, int]) -> None:
        if not context.set_tensor_address(tensor.name, addresses[tensor.name]):
            raise UserError(f"{self.path}: {self.api} refused the address of {tensor.name}")

    def _create_context(self) -> Any:
        if self.api.flavour != RTX:
            # Its own choice would be memory for the largest profile, in every context.
            strategy = self.api.module.ExecutionContextAllocationStrategy.USER_MANAGED
            return self.engine.create_execution_context(strategy)
        if self._jit is None:
            self._jit = JitSettings(self.api, self.engine, self.sidecar.engine.sha256)
        return self.engine.create_execution_context(self._jit.config)

    def keep_compiled(self) -> None:
        """Keeps what TensorRT for RTX has compiled for the shapes in use, so that the next process need not."""
        with self._lock:
            if self._jit is not None:
                self._jit.keep()


class Context:
    """An execution context, bound to its shapes and addresses.  One thread at a time."""

    def __init__(self, plan: Plan, context: Any, batch: int, scratch: DeviceMemory) -> None:
        self.plan, self.batch, self._context, self._scratch = plan, batch, context, scratch

    def enqueue(self, stream: Stream) -> None:
        """Puts one run into `stream`."""
        if not self._context.execute_async_v3(stream.handle):
            log = shared_log(self.plan.api)
            said = " ".join((log.errors or ["no reason given"])[-1].split())
            raise UserError(f"{self.plan.path} failed on a batch of {self.batch}: {said}")

    def capturable(self, stream: Stream) -> bool:
        """Asks TensorRT whether a run can be captured; True where it cannot say, as trying tells."""
        asked = getattr(self._context, "is_stream_capturable", None)
        return asked is None or bool(asked(stream.handle))


@cache
def shared_log(api: TensorRT) -> Any:
    """The log of this process: TensorRT keeps the first it is given, whatever comes later."""
    return make_log(api.module)
