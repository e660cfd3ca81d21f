"""Everything that runs the model, as engines: what each needs, about how long it takes, and how it is opened.

An engine is opened in a process of its own (`gpu_record.worker`): it may crash, hang or lose the GPU there.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitrm.checkpoint import Checkpoint
from vitrm.errors import UserError, first_line
from vitrm.runtime.artifact.graph_names import LOGITS, PARTS, PIXELS
from vitrm.runtime.session import Result, Session, open_session
from vitrm.runtime.system.gpus import find_gpus, gpu_index

GRAPHS = ("unrolled", "loop", "stepwise")
PRECISIONS = ("fp32", "fp16", "int8")
REFERENCE = "eager PyTorch"
_TESTS = Path(__file__).resolve().parents[2] / "tests"


@dataclass(frozen=True)
class Job:
    """What an engine is opened with."""

    run: str | None
    steps: int
    device: str  # cpu, cuda, cuda:1 …
    threads: int
    batches: tuple[int, ...]  # all of the record's: plans are built for them
    work: Path  # folder of exported files
    data_dir: str | None


@dataclass(frozen=True)
class Engine:
    """One way to run the model."""

    name: str
    kind: str  # as in vitrm.runtime.bench.rows
    open: Callable[[Checkpoint, Job, Callable[[str], None]], Session]  # tells the stages it comes to
    missing: Callable[[Job], str | None]  # why it cannot run here, found out without opening it
    once_s: float = 0.0  # about, on a machine with a GPU: an export or a build, the first time
    batch_s: float = 0.0  # about, for each batch size: compiling


def engines(graphs: tuple[str, ...], precisions: tuple[str, ...]) -> list[Engine]:
    """All of them, in the order in which they are measured: the quick ones first."""
    return [*_pytorch(), *_exported(graphs, precisions), *_trtexec(graphs, precisions), *_compilers()]


# PyTorch -----------------------------------------------------------------------------------------


def _eager(name: str, kind: str, **how: Any) -> Engine:
    def open_it(checkpoint: Checkpoint, job: Job, stage: Callable[[str], None]) -> Session:
        from vitrm.runtime.backends.eager import EagerSession

        return EagerSession(checkpoint, steps=job.steps, device=job.device, threads=job.threads, **how)

    graph = bool(how.get("cuda_graph"))
    compiled = how.get("compile")
    seconds = 150.0 if isinstance(compiled, str) else 60.0 if compiled else 2.0 if graph else 0.0
    return Engine(name, kind, open_it, _no_gpu if graph else _no_torch_gpu, batch_s=seconds)


def _pytorch() -> list[Engine]:
    return [
        _eager(REFERENCE, "eager"),  # float32, TF32 off
        Engine("plain equations", "peer", _open_plain, _not_a_recursion),
        _eager("eager PyTorch, bfloat16", "eager-bf16", precision="bf16"),
        _eager("eager PyTorch, bfloat16 autocast", "peer", precision="autocast-bf16"),
        _eager("eager PyTorch, float16 autocast", "peer", precision="autocast-fp16"),
        _eager("eager PyTorch, CUDA graph", "peer", cuda_graph=True),
        _eager("eager PyTorch, CUDA graph, bfloat16", "peer", cuda_graph=True, precision="bf16"),
    ]


def _compilers() -> list[Engine]:
    compiled = [
        _eager(f"torch.compile{f' {mode}' if isinstance(mode, str) else ''}{', bfloat16' * half}", f"compiled{'-bf16' * half}",
               compile=mode, precision="bf16" if half else "fp32")
        for mode, half in product((True, "max-autotune"), (False, True))
    ]  # fmt: skip
    return [
        *compiled,
        Engine("AOTInductor", "peer", _open_aot, _no_torch_gpu, batch_s=90.0),
        Engine("Torch-TensorRT", "peer", _open_torch_tensorrt, _no_torch_tensorrt, batch_s=60.0),
    ]


def _open_plain(checkpoint: Checkpoint, job: Job, stage: Callable[[str], None]) -> Session:
    """The paper's equations, written plainly (tests/reference.py)."""
    import torch

    sys.path.insert(0, str(_TESTS))
    import reference

    def make(model: Any, pixels: Any, depth: Any) -> Callable[..., object]:
        def forward(pixels: torch.Tensor, steps: int, halt_threshold: float) -> object:
            logits, halt_prob = reference.run(model, pixels, steps)[-1]
            return logits, halt_prob, torch.full((len(pixels),), steps)

        return forward

    return _made(checkpoint, job, "plain", make)


def _open_aot(checkpoint: Checkpoint, job: Job, stage: Callable[[str], None]) -> Session:
    """torch.export, and Inductor ahead of time: a package that needs no Python to run."""
    import torch

    def make(model: Any, pixels: Any, depth: Any) -> Callable[..., object]:
        with torch.inference_mode(False), torch.no_grad():
            program = torch.export.export(_at_depth(model, depth), (pixels.clone(),))
            file = job.work / f"aot-{len(pixels)}-{os.getpid()}.pt2"
            try:
                made = torch._inductor.aoti_compile_and_package(program, package_path=str(file))
                loaded = torch._inductor.aoti_load_package(made)
            finally:
                file.unlink(missing_ok=True)  # it is loaded whole
        return lambda pixels, *_: loaded(pixels)

    return _made(checkpoint, job, "aotinductor", make)


def _open_torch_tensorrt(checkpoint: Checkpoint, job: Job, stage: Callable[[str], None]) -> Session:
    import torch
    import torch_tensorrt

    def make(model: Any, pixels: Any, depth: Any) -> Callable[..., object]:
        with torch.inference_mode(False), torch.no_grad():
            made = torch_tensorrt.compile(_at_depth(model, depth), ir="dynamo", inputs=[pixels.clone()])
        return lambda pixels, *_: made(pixels)

    return _made(checkpoint, job, "torch-tensorrt", make)


def _made(
    checkpoint: Checkpoint, job: Job, backend: str, make: Callable[[Any, Any, Any], Callable[..., object]]
) -> Session:
    """An eager session that runs what `make` gives for each batch size."""
    from vitrm.runtime.backends.eager import EagerSession

    class MadeSession(EagerSession):
        prefers_one_batch = True

        def _make(self, pixels: Any, depth: Any) -> Callable[..., object]:
            return make(self.model, pixels, depth)

    session = MadeSession(checkpoint, steps=job.steps, device=job.device, threads=job.threads)
    session.prefers_one_batch = True
    session.backend = f"{backend}-{session.device_kind}"
    return session


def _at_depth(model: Any, depth: Any) -> Any:
    """The model as a module that takes images alone."""
    import torch

    class AtDepth(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixels: torch.Tensor) -> object:
            output = self.model(pixels, *depth)
            return tuple(output) if isinstance(output, tuple) else output

    return AtDepth().eval()


# Exported files ----------------------------------------------------------------------------------


def _exported(graphs: tuple[str, ...], precisions: tuple[str, ...]) -> Iterator[Engine]:
    for precision, graph in product(precisions, graphs):
        yield Engine(
            f"{graph}-{precision}.onnx", "artifact", _opener(graph, precision, "onnx"), _no_provider, once_s=20.0
        )
    for precision, graph in product(precisions, graphs):
        name = f"{graph}-{precision}.plan"
        yield Engine(name, "artifact", _opener(graph, precision, "plan"), _no_plans, once_s=90.0, batch_s=2.0)
    if "unrolled" in graphs:
        for precision in precisions:
            name = f"unrolled-{precision}.onnx, CUDA graph"
            yield Engine(name, "peer", _opener("unrolled", precision, "graph"), _no_cuda_provider, once_s=20.0)


def _opener(graph: str, precision: str, what: str) -> Callable[[Checkpoint, Job, Callable[[str], None]], Session]:
    def open_it(checkpoint: Checkpoint, job: Job, stage: Callable[[str], None]) -> Session:
        onnx = onnx_file(checkpoint, job, graph, precision, stage)
        if what == "graph":
            return OnnxRuntimeGraphSession(onnx, job)
        if what == "onnx":
            return open_session(onnx, device=job.device, threads=job.threads)
        return open_session(plan_file(onnx, job, graph, precision, stage), device=job.device, threads=job.threads)

    return open_it


def onnx_file(checkpoint: Checkpoint, job: Job, graph: str, precision: str, stage: Callable[[str], None]) -> Path:
    """The exported file or folder; exported now where it is not there yet."""
    from vitrm.export import export

    path = job.work / (f"{graph}-{precision}" + ("" if graph == "stepwise" else ".onnx"))
    if not _whole(path):
        stage(f"exporting {path.name}")
        # On a CPU int8 has a graph of its own, which is no plan.
        target = "cpu" if job.device == "cpu" else "tensorrt"
        export(
            checkpoint, path, steps=job.steps, graph=graph, precision=precision, target=target, data_dir=job.data_dir
        )
    return path


def plan_file(onnx: Path, job: Job, graph: str, precision: str, stage: Callable[[str], None]) -> Path:
    """The plan or folder of plans; built now where it is not there yet."""
    from vitrm.export.tensorrt.build import build_engine

    path = job.work / (f"{graph}-{precision}-plan" if graph == "stepwise" else f"{graph}-{precision}.plan")
    if not _whole(path):
        stage(f"building {path.name}")
        build_engine(onnx, path, plan_options(job))
    return path


def plan_options(job: Job) -> Any:
    """One image alone, a few, many: each profile is tuned for its own batch size."""
    from vitrm.export.tensorrt.options import PlanOptions

    top = max(job.batches)
    profiles = [(1, 1, 1), (2, min(32, top), min(64, top)), (65, 256, top)]
    return PlanOptions(profiles=tuple((a, min(b, c), c) for a, b, c in profiles if a <= c))


def _whole(path: Path) -> bool:
    """Whether the artifact is there: they are written whole or not at all."""
    return path.is_file() or any(all((path / f"{part}{s}").exists() for part in PARTS) for s in (".onnx", ".plan"))


class OnnxRuntimeGraphSession(Session):
    """An unrolled file in ONNX Runtime's CUDA provider, its runs captured as a CUDA graph for each batch size."""

    def __init__(self, path: Path, job: Job) -> None:
        from vitrm.runtime.artifact.onnx_file import inspect
        from vitrm.runtime.system import machine

        file = inspect(path)
        self.path, self.metadata, self.size_bytes = path, file.metadata, file.size_bytes
        self.device_kind, self.device_index, self.threads = "cuda", gpu_index(job.device), job.threads
        self.device, self.backend = machine.gpu_name(job.device), "onnxruntime-cuda-graph"
        self.prefers_one_batch = True
        self._bound: dict[int, tuple[Any, Any, Any, dict[str, Any]]] = {}

    @property
    def takes_depth(self) -> bool:
        return False

    def _bind(self, images: NDArray[np.float32]) -> tuple[Any, Any, Any, dict[str, Any]]:
        import onnxruntime as ort

        batch = len(images)
        if batch not in self._bound:
            # A session for each batch size: one keeps a graph for each annotation id, and the arena of the largest.
            options = {"enable_cuda_graph": "1", "use_tf32": "0", "device_id": str(self.device_index)}
            session = ort.InferenceSession(str(self.path), providers=[("CUDAExecutionProvider", options)])
            if "CUDAExecutionProvider" not in session.get_providers():
                raise UserError("ONNX Runtime could not start its CUDA provider")
            place = ("cuda", self.device_index)
            pixels = ort.OrtValue.ortvalue_from_numpy(images, *place)
            outputs = {
                o.name: ort.OrtValue.ortvalue_from_shape_and_type(
                    [batch, *o.shape[1:]], np.int64 if "int64" in o.type else np.float32, *place
                )
                for o in session.get_outputs()
            }
            binding = session.io_binding()
            binding.bind_ortvalue_input(PIXELS, pixels)
            for name, value in outputs.items():
                binding.bind_ortvalue_output(name, value)
            self._bound[batch] = session, binding, pixels, outputs
        return self._bound[batch]

    def _runner(self, images: NDArray[np.float32], steps: int, halt_threshold: float) -> Callable[[], Result]:
        session, binding, pixels, outputs = self._bind(images)

        def run() -> Result:
            pixels.update_inplace(images)
            session.run_with_iobinding(binding)
            found = {name: value.numpy() for name, value in outputs.items()}
            return Result(found[LOGITS], found.get("halt_prob"), found.get("steps_used"))

        return run


# trtexec -----------------------------------------------------------------------------------------


def _trtexec(graphs: tuple[str, ...], precisions: tuple[str, ...]) -> Iterator[Engine]:
    if "unrolled" in graphs:
        for precision in precisions:
            yield Engine(f"unrolled-{precision}.onnx by trtexec", "trtexec", _not_a_session, _no_trtexec, 20.0, 60.0)


def _not_a_session(checkpoint: Checkpoint, job: Job, stage: Callable[[str], None]) -> Session:
    raise AssertionError("trtexec measures by itself")


def run_trtexec(onnx: Path, batch: int, size: int, seconds: float, index: int) -> dict[str, Any]:
    """The figures of NVIDIA's own tool on the file: fields of a row.  Raises `UserError` with what it said last."""
    shape = f"{PIXELS}:{batch}x3x{size}x{size}"
    words = ["trtexec", f"--onnx={onnx}", "--stronglyTyped", "--noTF32", "--useCudaGraph", f"--device={index}"]
    words += [f"--minShapes={shape}", f"--optShapes={shape}", f"--maxShapes={shape}", f"--shapes={shape}"]
    done = subprocess.run([*words, f"--duration={seconds:g}"], capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if "[E]" in line] or ["it said nothing"]
        raise UserError(f"trtexec failed: {said[0][:300]}")
    return {
        "latency_ms": read_trtexec(done.stdout, "Latency"),
        "device_ms": read_trtexec(done.stdout, "GPU Compute Time"),
    }


def read_trtexec(text: str, what: str) -> dict[str, Any]:
    """Times in milliseconds out of trtexec's summary line `what`.  Raises `UserError` where there is none."""
    line = next((line for line in text.splitlines() if re.search(rf"\b{what}: min = ", line)), None)
    if line is None:
        raise UserError(f"trtexec printed no line {what!r}: its output has changed")
    found = {name: float(value) for name, value in re.findall(r"([\w()%]+) = ([\d.]+) ms", line)}
    names = {"p50": "median", "p90": "percentile(90%)", "p99": "percentile(99%)"}
    names |= {"mean": "mean", "min": "min", "max": "max"}
    return {own: found[theirs] for own, theirs in names.items() if theirs in found}


# What is missing ---------------------------------------------------------------------------------


def _no_gpu(job: Job) -> str | None:
    if job.device == "cpu":
        return "runs on a GPU, this record is of a CPU"
    return _no_torch_gpu(job)


def _no_torch_gpu(job: Job) -> str | None:
    import torch

    if job.device == "cpu" or torch.cuda.is_available():
        return None
    gpus = find_gpus()
    return (
        gpus.problem or f"torch {torch.__version__} sees none of the {len(gpus.found)} GPUs: check the driver's version"
    )


def _not_a_recursion(job: Job) -> str | None:
    if not (_TESTS / "reference.py").exists():
        return "the equations are in tests/reference.py, which is not here"
    return _no_torch_gpu(job)


def _no_torch_tensorrt(job: Job) -> str | None:
    if reason := _no_gpu(job):
        return reason
    return None if importlib.util.find_spec("torch_tensorrt") else "not installed: pip install torch-tensorrt"


@cache
def _providers() -> tuple[str, ...]:
    from vitrm.runtime.backends.onnxruntime.providers import load_onnxruntime

    return tuple(load_onnxruntime().get_available_providers())


def _no_provider(job: Job) -> str | None:
    try:
        providers = _providers()
    except UserError as error:
        return str(error)
    if job.device == "cpu":
        return None
    if "CUDAExecutionProvider" not in providers:
        return 'this onnxruntime is built for the CPU: pip install "vitrm[gpu]" (after pip uninstall onnxruntime)'
    return find_gpus().problem


def _no_cuda_provider(job: Job) -> str | None:
    return "runs on a GPU, this record is of a CPU" if job.device == "cpu" else _no_provider(job)


def _no_plans(job: Job) -> str | None:
    if job.device == "cpu":
        return "a plan runs on a GPU, this record is of a CPU"
    from vitrm.export.tensorrt.toolchain import toolchain

    try:
        tools = toolchain(plan_options(job))
    except UserError as error:
        return str(error)
    except Exception as error:  # its libraries fail in ways of their own
        return first_line(error, named=True)
    if not tools.runs_here:
        return f"{tools.api} builds it, but no GPU that runs it is here"
    return None if importlib.util.find_spec("cuda") else "not installed: pip install cuda-bindings"


def _no_trtexec(job: Job) -> str | None:
    if job.device == "cpu":
        return "runs on a GPU, this record is of a CPU"
    return find_gpus().problem or (
        None if shutil.which("trtexec") else "trtexec is not on the PATH: it comes with TensorRT"
    )
