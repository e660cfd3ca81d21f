"""ONNX Runtime, on the CPU or a CUDA device.

The artefact's metadata comes from the session itself, so that no `onnx` package is needed.  A session
that was asked for CUDA and did not get it is an error: ONNX Runtime itself would carry on with the CPU.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata as packages
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitrm.errors import UserError
from vitrm.runtime import machine
from vitrm.runtime.metadata import HALT_PROB, HALT_THRESHOLD, LOGITS, PIXELS, STEPS, STEPS_USED, Metadata
from vitrm.runtime.session import Result, Session

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"
FP16_ON_CPU = (
    "FP16 on ONNX Runtime's CPU provider is computed in float32: the file is smaller, not faster, and no preview of a "
    "GPU's FP16"
)
INT8_FOR_TENSORRT = "made for TensorRT: ONNX Runtime runs its int8 products slower than float32 ones; vitrm-export --int8 --target cpu is for here"
_FATAL = 4  # ONNX Runtime's log level; whatever matters comes back as an exception


def load_onnxruntime() -> ModuleType:
    """Imports onnxruntime.  Raises `UserError` when it is missing, or installed twice over."""
    wheels = {}
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            wheels[name] = packages.version(name)
        except packages.PackageNotFoundError:
            continue
    if len(wheels) > 1:
        found = " and ".join(f"{n} {v}" for n, v in wheels.items())
        raise UserError(
            f"{found} are both installed and overwrite each other's files: run `pip uninstall -y onnxruntime "
            'onnxruntime-gpu`, then `pip install "vitrm[gpu]"` (or "vitrm[cpu]")'
        )
    try:
        import onnxruntime
    except ImportError as error:
        if wheels:
            raise UserError(f"onnxruntime is installed but does not import ({error}): install it again") from None
        raise UserError(
            'an .onnx file needs ONNX Runtime, which is not installed: pip install "vitrm[cpu]", or "vitrm[gpu]" for CUDA'
        ) from None
    return onnxruntime


class OnnxRuntimeSession(Session):
    """An .onnx file in ONNX Runtime."""

    def __init__(self, path: Path, *, device: str = "cpu", threads: int | None = None) -> None:
        """Opens `path`; see `vitrm.runtime.open`."""
        ort = load_onnxruntime()
        self.path = path
        self._session = create(ort, path, device, threads)
        self.metadata = Metadata.from_props(self._session.get_modelmeta().custom_metadata_map, str(path))
        self.device_kind, self.device, self.threads = describe_device(self._session, threads)
        self.backend = f"onnxruntime-{self.device_kind}"
        self.size_bytes = _stored_bytes(path)
        inputs = {i.name for i in self._session.get_inputs()}
        outputs = {o.name for o in self._session.get_outputs()}
        self._takes_depth = STEPS in inputs
        self._outputs = [n for n in (LOGITS, HALT_PROB, STEPS_USED) if n in outputs]
        needed = {LOGITS, HALT_PROB, STEPS_USED} if self.metadata.recursive else {LOGITS}
        if PIXELS not in inputs or not needed <= outputs or inputs - {PIXELS, STEPS, HALT_THRESHOLD}:
            raise UserError(
                f"{path}: inputs {sorted(inputs)} and outputs {sorted(outputs)} are not those of a vitrm "
                f"{self.metadata.graph} graph ({PIXELS} → {', '.join(sorted(needed))}): export it again"
            )
        self.notes = notes_on(self.metadata, self.device_kind)

    @property
    def takes_depth(self) -> bool:
        return self._takes_depth

    def _runner(
        self, images: NDArray[np.float32], steps: int | None, halt_threshold: float | None
    ) -> Callable[[], Result]:
        feeds: dict[str, Any] = {PIXELS: images}
        if self._takes_depth:
            threshold = self.metadata.halt_threshold if halt_threshold is None else halt_threshold
            feeds[STEPS] = np.asarray(self.metadata.steps if steps is None else steps, np.int64)
            feeds[HALT_THRESHOLD] = np.asarray(threshold, np.float32)
        session, names, where = self._session, self._outputs, self.name

        def run() -> Result:
            try:
                outputs = dict(zip(names, session.run(names, feeds), strict=True))
            except Exception as error:  # ONNX Runtime's exceptions share no base class
                raise UserError(f"{where} failed on a batch of {len(images)}: {first_line(error)}") from error
            return Result(outputs[LOGITS], outputs.get(HALT_PROB), outputs.get(STEPS_USED))

        return run


def notes_on(metadata: Metadata, device_kind: str) -> tuple[str, ...]:
    """What a reader of an artefact's figures should know where it runs on something that it is not made for."""
    if device_kind == "cpu" and metadata.precision == "fp16":
        return (FP16_ON_CPU,)
    if metadata.target == "tensorrt":
        return (INT8_FOR_TENSORRT,)
    if metadata.target == "cpu" and device_kind != "cpu":
        return ("made for a CPU: its integer products run there alone; vitrm-export --fp16 is for GPUs",)
    return ()


def describe_device(session: Any, threads: int | None) -> tuple[str, str, int]:
    """Where an InferenceSession ended up: cpu or cuda, the device in words, and the CPU threads it uses."""
    kind = "cuda" if CUDA in session.get_providers() else "cpu"
    return kind, machine.gpu_name() if kind == "cuda" else machine.cpu_name(), threads or machine.physical_cores()


def create(ort: ModuleType, path: Path, device: str, threads: int | None) -> Any:
    """The InferenceSession on the device that was asked for; None threads: every physical core."""
    available = ort.get_available_providers()
    if device == "cuda" and CUDA not in available:
        raise UserError(
            f"device cuda was asked for, but this onnxruntime ({ort.__version__}) is built for "
            f'{", ".join(p.removesuffix("ExecutionProvider") for p in available)}: pip install "vitrm[gpu]" (after '
            "pip uninstall onnxruntime), or use --device cpu"
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or machine.physical_cores()
    options.inter_op_num_threads = 1
    options.log_severity_level = _FATAL
    # Idle workers of one session would otherwise spin on the cores that the next one is measured on.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    wants_cuda = device == "cuda" or (device == "auto" and CUDA in available)
    try:
        with _quiet(wants_cuda):
            session = ort.InferenceSession(os.fspath(path), options, providers=[CUDA, CPU] if wants_cuda else [CPU])
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise _explain(ort, path, error) from None
    if device == "cuda" and CUDA not in session.get_providers():
        raise UserError(
            "device cuda was asked for, but ONNX Runtime could not start its CUDA provider (no GPU, no driver, or CUDA "
            "and cuDNN of another version) and would have used the CPU: check nvidia-smi, or use --device cpu"
        )
    return session


def _explain(ort: ModuleType, path: Path, error: Exception) -> UserError:
    kind = type(error).__name__
    if not os.access(path, os.R_OK):
        return UserError(f"{path} may not be read: check its permissions")
    size = path.stat().st_size
    if kind in ("InvalidProtobuf", "InvalidGraph", "NoSuchFile") or (kind == "Fail" and "ModelProto" in str(error)):
        return UserError(
            f"{path} ({size} bytes) is not a whole ONNX file ({first_line(error)}): it may be truncated; copy or "
            "export it again"
        )
    return UserError(f"onnxruntime {ort.__version__} cannot load {path}: {first_line(error)}")


def first_line(error: Exception) -> str:
    """The first line of an exception's message, shortened."""
    text = " ".join((str(error).strip().splitlines() or [type(error).__name__])[0].split())
    return text if len(text) <= 300 else text[:297] + "…"


def _stored_bytes(path: Path) -> int:
    """The file's size, with its external weights where it has some."""
    beside = [path.with_name(path.name + suffix) for suffix in (".data", "_data")]
    return path.stat().st_size + sum(p.stat().st_size for p in beside if p.is_file())


@contextmanager
def _quiet(active: bool) -> Iterator[None]:
    """Silences file descriptors 1 and 2: a provider that fails to load writes there from C++, whatever the log level."""
    if not active:
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 1)
        os.dup2(null, 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, original in zip((1, 2), saved, strict=True):
            os.dup2(original, descriptor)
            os.close(original)
        os.close(null)
