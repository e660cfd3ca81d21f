"""The eager PyTorch model as one more backend, and `torch.compile` of it.

This is what an artifact is compared with, so it has the same checks and the same `Result`.  The only
module of the runtime that needs torch; it is imported when a comparison asks for it.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FunctionType, MethodType
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from vitrm.checkpoint import Checkpoint
from vitrm.config import ViTRMConfig, to_dict
from vitrm.errors import UserError
from vitrm.exact_float32 import exact_float32
from vitrm.model import ViTRM
from vitrm.model_limits import NEVER
from vitrm.runtime.artifact.metadata import Metadata
from vitrm.runtime.session import Result, Session
from vitrm.runtime.system import machine
from vitrm.runtime.system.gpus import gpu_index

PRECISIONS = ("fp32", "bf16", "autocast-bf16", "autocast-fp16")
_AUTOCAST = {"autocast-bf16": torch.bfloat16, "autocast-fp16": torch.float16}
_Depth = tuple[()] | tuple[int, float]  # what the model's forward takes beside the images


def describe(
    checkpoint: Checkpoint, *, steps: int = 1, halt_threshold: float = NEVER, precision: str = "fp32"
) -> Metadata:
    """Returns the description of a checkpoint's model as if it were an artifact of that depth and threshold."""
    recursive = isinstance(checkpoint.model, ViTRMConfig)
    return Metadata(
        model=to_dict(checkpoint.model),
        classes=list(checkpoint.data.get("classes", [])),
        data=checkpoint.data,
        preprocessing=checkpoint.preprocessing,
        graph="loop" if recursive else "single",
        steps=steps if recursive else 1,
        halt_threshold=halt_threshold,
        trained_depth=checkpoint.trained_depth if recursive else None,
        precision=precision,
        weights_sha256=checkpoint.weights_id,
        run=checkpoint.source,
    )


class EagerSession(Session):
    """A checkpoint's model in PyTorch, in one of `PRECISIONS`; float32 is float32 on a GPU too, never TF32."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        steps: int = 1,
        halt_threshold: float = NEVER,
        device: str = "cpu",
        threads: int | None = None,
        compile: bool | str = False,
        precision: str = "fp32",
        cuda_graph: bool = False,
    ) -> None:
        """`steps` and `halt_threshold` are the defaults of `infer`; `device` is "cpu", "cuda", "cuda:1" … or "auto".

        `compile` True or one of torch.compile's modes compiles it.  `precision` bf16 gives weights and activations that type,
        as what a user without an export would try; the autocast ones leave the weights in float32.  `cuda_graph` captures each
        batch size and depth as a graph.  Raises `UserError` for a device that is not there.
        """
        self._place = _device(device)
        self.device_kind = self._place.type
        self.device_index = self._place.index or 0
        on_gpu = self.device_kind == "cuda"
        if cuda_graph and not on_gpu:
            raise UserError("a CUDA graph needs a GPU: leave it out, or use --device cuda")
        if precision not in PRECISIONS:
            raise UserError(f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")
        self.device = torch.cuda.get_device_name(self._place) if on_gpu else machine.cpu_name()
        self.backend = f"{'torch.compile' if compile else 'pytorch'}-{self.device_kind}"
        self.threads = threads or machine.physical_cores()
        self.path = None
        stored = 2 if precision == "bf16" else 4
        self.size_bytes = sum(t.numel() * min(stored, t.element_size()) for t in checkpoint.weights.values())
        self._dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self._autocast = _AUTOCAST.get(precision)
        self.model = checkpoint.build().to(self._place, self._dtype)
        self.metadata = describe(checkpoint, steps=steps, halt_threshold=halt_threshold, precision=precision)
        self._compile, self._cuda_graph = compile, cuda_graph
        self.prefers_one_batch = bool(compile) or cuda_graph
        self._forwards: dict[tuple[int, _Depth], Callable[..., object]] = {}  # by batch size and depth
        self._graphs: dict[int, int] = {}  # that were compiled, by batch size

    @property
    def takes_depth(self) -> bool:
        return self.metadata.recursive

    def compiled_graphs(self, batch: int) -> int | None:
        return self._graphs.get(batch)

    def release_memory(self) -> None:
        if self.device_kind == "cuda":
            with suppress(RuntimeError):  # of a device that is lost
                torch.cuda.empty_cache()

    def _runner(self, images: NDArray[np.float32], steps: int, halt_threshold: float) -> Callable[[], Result]:
        depth = self._arguments(steps, halt_threshold)

        def run() -> Result:
            if (
                torch.get_num_threads() != self.threads
            ):  # a setting of the whole process, so another may have changed it
                torch.set_num_threads(self.threads)
            with self._computing():
                output = self._call(torch.from_numpy(images).to(self._place).to(self._dtype), depth)
                if isinstance(output, torch.Tensor):
                    return Result(output.float().cpu().numpy(), None, None)
                logits, halt_prob, steps_used = (t.cpu() for t in output)  # type: ignore[attr-defined]
            return Result(logits.float().numpy(), halt_prob.float().numpy(), steps_used.numpy())

        return run

    def device_times(self, images: NDArray[np.float32], runs: int) -> NDArray[np.float64] | None:
        if self.device_kind != "cuda":
            return None
        depth = self._arguments(self.metadata.steps, self.metadata.halt_threshold)
        taken = []
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The pixels too are made in here: compiled code is for tensors of inference mode, or for others.
        with self._computing():
            pixels = torch.from_numpy(images).to(self._place, self._dtype)
            for _ in range(runs):
                start.record()
                self._call(pixels, depth)
                stop.record()
                stop.synchronize()
                taken.append(start.elapsed_time(stop))
        return np.asarray(taken, np.float64)

    def trajectory(self, images: NDArray[np.float32], steps: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The answers after every step: logits [steps, B, classes] and halt_prob [steps, B].

        Raises `UserError` for a baseline, which has no steps.
        """
        if not isinstance(self.model, ViTRM):
            raise UserError(f"{self.name} is a {self.metadata.model['kind']}: it has no steps")
        self._check_images(images)
        with self._computing():
            logits, halt_prob = self.model.trajectory(torch.from_numpy(images).to(self._place, self._dtype), steps)
        return logits.float().cpu().numpy(), halt_prob.float().cpu().numpy()

    # How it computes ---------------------------------------------------------------------------

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """The settings of a run: no gradients, this device, this precision."""
        with ExitStack() as settings:
            settings.enter_context(torch.inference_mode())
            settings.enter_context(exact_float32())
            if self.device_kind == "cuda":
                settings.enter_context(torch.cuda.device(self._place))
            if self._autocast is not None:
                settings.enter_context(torch.autocast(self.device_kind, self._autocast))
            yield

    def _arguments(self, steps: int, halt_threshold: float) -> _Depth:
        return (steps, halt_threshold) if self.metadata.recursive else ()

    def _call(self, pixels: torch.Tensor, depth: _Depth) -> object:
        """The model's answer to pixels on the device, from what was made for their number and this depth."""
        if not self.prefers_one_batch:
            return self.model(pixels, *depth)
        key = len(pixels), depth
        if key not in self._forwards:
            self._forwards[key] = self._make(pixels, depth)
        if not self._compile:
            return self._forwards[key](pixels, *depth)
        before = _frames_seen()
        with _no_silent_eager():
            output = self._forwards[key](pixels, *depth)
        # Halting asks the tensors whether to go on, and what follows is compiled when it is first met.
        if _frames_seen() != before and not (depth and depth[1] < 1):
            raise UserError(
                f"torch.compile compiled again in the midst of batch {len(pixels)}: its figures would be of both codes"
            )
        return output

    def _make(self, pixels: torch.Tensor, depth: _Depth) -> Callable[..., object]:
        """Returns what runs batches like `pixels` to that depth."""
        made = self._compiled(pixels, depth) if self._compile else self.model
        return self._captured(made, pixels, depth) if self._cuda_graph else made

    def _compiled(self, pixels: torch.Tensor, depth: _Depth) -> Callable[..., object]:
        """The model compiled for this batch size and depth, and called once.

        Raises `UserError` where nothing was compiled: torch.compile then runs the model as it is, and says so in a log at most.
        """
        # It looks for a CUDA toolkit even when it compiles for a CPU, and reports what it did not find.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        view, forward_of_all = copy.copy(self.model), cast(FunctionType, type(self.model).forward)
        # Dynamo compiles a function for at most 8 kinds of arguments, whichever model it belongs to, and from then on runs it
        # uncompiled.  A code object of its own has a count of its own.
        view.forward = MethodType(_own_code(forward_of_all, f"forward_{len(pixels)}"), view)  # type: ignore[method-assign]
        # A graph for each batch size: those with a symbolic size are slower.
        mode = self._compile if isinstance(self._compile, str) else None
        forward: Callable[..., object] = torch.compile(view.forward, dynamic=False, mode=mode)
        before = _graphs_made()
        with _no_silent_eager():
            forward(pixels, *depth)
        made = _graphs_made() - before
        if not made:
            raise UserError(
                f"torch.compile compiled nothing at batch {len(pixels)}: the row would be of the eager model"
            )
        self._graphs[len(pixels)] = max(made, self._graphs.get(len(pixels), 0))
        return forward

    def _captured(self, forward: Callable[..., object], pixels: torch.Tensor, depth: _Depth) -> Callable[..., object]:
        """The model's run at this batch size and depth as a CUDA graph."""
        if depth and depth[1] < 1:
            raise UserError("a CUDA graph cannot end early: leave halting out")
        static = pixels.clone()
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # what is chosen and allocated at the first runs is not to be in the graph
            for _ in range(3):
                forward(static, *depth)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = forward(static, *depth)

        def replay(pixels: torch.Tensor, *_: float) -> object:
            static.copy_(pixels)
            graph.replay()
            return output

        return replay


def _device(name: str) -> torch.device:
    """The device of that name.  Raises `UserError` for one that is not there."""
    has_cuda = torch.cuda.is_available()
    if name == "cpu" or (name == "auto" and not has_cuda):
        return torch.device("cpu")
    index = 0 if name == "auto" else gpu_index(name)
    if not has_cuda:
        raise UserError(
            f"device {name} was asked for, but torch {torch.__version__} sees no CUDA device: use --device cpu"
        )
    if index >= torch.cuda.device_count():
        raise UserError(f"device {name} was asked for, but torch sees {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", index)


def _own_code(function: FunctionType, name: str) -> FunctionType:
    """The same function with a code object of its own, called `name`."""
    code = function.__code__.replace(co_name=name)
    own = FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
    own.__kwdefaults__ = function.__kwdefaults__
    return own


@contextmanager
def _no_silent_eager() -> Iterator[None]:
    """Makes Dynamo raise where it would give up compiling and run the function as it is."""
    from torch._dynamo import config  # it takes a second to import, which only a compiled row is worth

    name = "fail_on_recompile_limit_hit"
    before = getattr(config, name)
    setattr(config, name, True)
    try:
        yield
    finally:
        setattr(config, name, before)


def _graphs_made() -> int:
    """Graphs that Dynamo has made in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def _frames_seen() -> int:
    """Calls that Dynamo has looked at in this process, to compile them or to leave them as they are."""
    from torch._dynamo.utils import counters

    return int(counters["frames"]["total"])
