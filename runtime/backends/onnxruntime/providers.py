"""ONNX Runtime's execution providers: the one that was asked for, or an error that says what it lacks.

ONNX Runtime falls back: a session that was asked for a GPU and finds no driver, library or card runs on the CPU and says
so in a log at most, and `get_available_providers()` lists what a wheel was compiled with, not what works here.  So every
session is asked for its own list once it is open.

    provider       runs on                                  where it comes from
    cuda           CUDA and cuDNN kernels                   onnxruntime-gpu
    tensorrt       TensorRT 10 engines, built on opening    onnxruntime-gpu, and TensorRT's libraries
    tensorrt-rtx   TensorRT for RTX engines                 onnxruntime with the plugin onnxruntime-ep-nv-tensorrt-rtx, or
                                                            the older wheel onnxruntime-trt-rtx
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib import metadata as packages
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from vitrm.errors import UserError, first_line
from vitrm.runtime.artifact.onnx_file import OnnxFile
from vitrm.runtime.system import machine
from vitrm.runtime.system.gpus import gpu_index

CPU = "CPUExecutionProvider"
PROVIDERS = {
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}
_WHEELS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-trt-rtx")  # all own the import `onnxruntime`
_RTX_PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
_FATAL = 4  # ONNX Runtime's log level; whatever matters comes back as an exception
# Float32 products in float32: TF32, CUDA's default in ONNX Runtime, keeps 10 bits of them, and eager PyTorch does not use it.
_CUDA_OPTIONS = {"use_tf32": "0"}

_INSTALL = {
    "cuda": 'pip install "vitrm[gpu]" (after pip uninstall onnxruntime)',
    "tensorrt": 'pip install "vitrm[gpu]" (after pip uninstall onnxruntime) and TensorRT 10\'s libraries',
    "tensorrt-rtx": "pip install onnxruntime onnxruntime-ep-nv-tensorrt-rtx",
}
_MISSING = {
    "cuda": "no GPU, no driver, or CUDA and cuDNN of another version",
    "tensorrt": "no GPU, or no TensorRT 10: libnvinfer.so.10 must be on LD_LIBRARY_PATH",
    "tensorrt-rtx": "no RTX GPU that it supports, or no driver",
}


@dataclass(frozen=True)
class Running:
    """Provider, device and threads of an InferenceSession."""

    provider: str  # cpu, or a key of PROVIDERS
    threads: int  # CPU threads
    index: int = 0  # which of the GPUs, as CUDA counts them

    @property
    def device_kind(self) -> str:
        """cpu or cuda."""
        return "cpu" if self.provider == "cpu" else "cuda"

    @property
    def device(self) -> str:
        """In words."""
        return machine.cpu_name() if self.provider == "cpu" else machine.gpu_name(f"cuda:{self.index}")

    @property
    def backend(self) -> str:
        """Name of the backend in a bench."""
        return f"onnxruntime-{self.provider}"


def load_onnxruntime() -> ModuleType:
    """Imports onnxruntime.  Raises `UserError` when it is missing, or installed twice over."""
    wheels = {}
    for name in _WHEELS:
        try:
            wheels[name] = packages.version(name)
        except packages.PackageNotFoundError:
            continue
    if len(wheels) > 1:
        found = " and ".join(f"{n} {v}" for n, v in wheels.items())
        raise UserError(
            f"{found} are both installed and overwrite each other's files: run `pip uninstall -y "
            f'{" ".join(wheels)}`, then `pip install "vitrm[gpu]"` (or "vitrm[cpu]")'
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


def check_provider(device: str, provider: str | None) -> None:
    """Raises `UserError` for a provider that does not exist or that is no device's."""
    if provider is None:
        return
    if provider not in PROVIDERS:
        raise UserError(f"provider is {provider!r}, expected one of {', '.join(PROVIDERS)}")
    if not device.startswith("cuda"):
        raise UserError(f"provider {provider} is for a GPU, and device is {device!r}: name device cuda with it")


def create(
    ort: ModuleType, file: OnnxFile, device: str, threads: int | None, provider: str | None = None
) -> tuple[Any, Running]:
    """An InferenceSession of `file` on the device and provider asked for, and what it runs on; None threads: every physical core.

    Without `provider`, device "cuda" is CUDA, and "auto" is CUDA where it works.
    Raises `UserError` where ONNX Runtime would fall back to something else.
    """
    check_provider(device, provider)
    threads = threads or machine.physical_cores()
    index = gpu_index(device) if device.startswith("cuda") else 0
    wanted = provider or ("cpu" if device == "cpu" else "cuda")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _FATAL
    # Idle workers of one session would otherwise spin on the cores that the next one is measured on.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if wanted == "cpu" or (device == "auto" and PROVIDERS["cuda"] not in ort.get_available_providers()):
        return _open(ort, file.path, options, {"providers": [CPU]}), Running("cpu", threads)
    with _quiet():
        how = _how(ort, file.metadata.precision, options, wanted, index)
        session = _open(ort, file.path, options, how)
    if PROVIDERS[wanted] in session.get_providers():
        return session, Running(wanted, threads, index)
    if device == "auto":
        return session, Running("cpu", threads)
    raise UserError(
        f"{_asked(wanted)}, but ONNX Runtime could not start its {_short(PROVIDERS[wanted])} provider ({_MISSING[wanted]}) and "
        f"would have used {_short(session.get_providers()[0])}: check nvidia-smi, or use --device cpu"
    )


def _how(ort: ModuleType, precision: str, options: Any, wanted: str, index: int = 0) -> dict[str, Any]:
    """Arguments of InferenceSession for the provider `wanted` on GPU `index`; raises `UserError` where this installation has
    none.
    """
    available = ort.get_available_providers()
    gpu = {"device_id": str(index)}
    cuda: tuple[str, dict[str, str]] = (PROVIDERS["cuda"], {**_CUDA_OPTIONS, **gpu})
    if wanted == "tensorrt-rtx" and PROVIDERS[wanted] not in available and find_spec(_RTX_PLUGIN):
        devices = _rtx_devices(ort)
        if not devices:
            raise UserError(
                f"{_asked(wanted)}, but its plugin finds no GPU here ({_MISSING[wanted]}): check nvidia-smi, or use --device cpu"
            )
        # A plugin lists devices of its own, of which one is chosen; it has no option for a number.
        if index >= len(devices):
            raise UserError(f"device cuda:{index} was asked for, but {wanted}'s plugin finds {len(devices)} GPUs")
        options.add_provider_for_devices([devices[index]], {})
        return {}
    if PROVIDERS[wanted] not in available:
        raise UserError(
            f"{_asked(wanted)}, but this onnxruntime ({ort.__version__}) is built for "
            f"{', '.join(map(_short, available))}: {_INSTALL[wanted]}, or use --device cpu"
        )
    if wanted == "tensorrt":
        # TensorRT's provider computes in float32 unless told, whatever types the graph has.
        flags = {"trt_fp16_enable": str(precision != "fp32"), "trt_int8_enable": str(precision == "int8"), **gpu}
        return {"providers": [(PROVIDERS["tensorrt"], flags), cuda, CPU]}
    return {"providers": [cuda if wanted == "cuda" else (PROVIDERS[wanted], gpu), CPU]}


def _rtx_devices(ort: ModuleType) -> list[Any]:
    """The GPUs that the plugin for TensorRT for RTX finds; raises `UserError` where it does not load."""
    plugin = import_module(_RTX_PLUGIN)
    name = plugin.get_ep_name()
    try:
        if not any(d.ep_name == name for d in ort.get_ep_devices()):
            ort.register_execution_provider_library(name, plugin.get_library_path())
        return [d for d in ort.get_ep_devices() if d.ep_name == name]
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        mend = (
            "install NVIDIA's driver"
            if "libcuda.so" in str(error)
            else "install onnxruntime-ep-nv-tensorrt-rtx and onnxruntime of versions made for each other"
        )
        raise UserError(
            f"{_asked('tensorrt-rtx')}, but its plugin does not load ({first_line(error)}): {mend}, or use --device cpu"
        ) from None


def _open(ort: ModuleType, path: Path, options: Any, how: dict[str, Any]) -> Any:
    try:
        return ort.InferenceSession(os.fspath(path), options, **how)
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise _explain(ort, path, error) from None


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


def _asked(wanted: str) -> str:
    return "device cuda was asked for" if wanted == "cuda" else f"provider {wanted} was asked for"


def _short(provider: str) -> str:
    return provider.removesuffix("ExecutionProvider")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences file descriptors 1 and 2: a provider that fails to load writes there from C++, whatever the log level."""
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
