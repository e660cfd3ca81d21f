"""The NVIDIA GPUs of this machine, as their driver lists them.  Needs no package: the driver's own library is asked."""

from __future__ import annotations

import ctypes
import ctypes.util
import re
import uuid
from dataclasses import dataclass

from vitrm.errors import UserError

_LIBRARIES = ("libcuda.so.1", "libcuda.so", "nvcuda.dll")
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


@dataclass(frozen=True)
class Gpu:
    """One GPU."""

    name: str  # "NVIDIA GeForce RTX 4090"
    sm: str  # its compute capability as "sm89"
    memory_bytes: int
    uuid: str = ""  # "GPU-…" as nvidia-smi and NVML have it, whose numbers are others than CUDA's; empty where unknown

    def __str__(self) -> str:
        return f"{self.name} ({self.sm})"


@dataclass(frozen=True)
class Gpus:
    """GPUs that the driver names, or why it names none."""

    found: tuple[Gpu, ...]
    driver: str | None  # the newest CUDA version that the driver serves, as "13.0"; None without a driver
    problem: str | None = None  # why there are none, as a phrase

    def at(self, device: str) -> Gpu:
        """The one that "cuda" (the first), "cuda:1" … names.  Raises `UserError` where there is none of that number."""
        index, count = gpu_index(device), len(self.found)
        if index < count:
            return self.found[index]
        there = f"there {'is' if count == 1 else 'are'} {count} GPU{'s' * (count > 1)} here: cuda:0 to cuda:{count - 1}"
        raise UserError(
            f"device {device} was asked for, but {there if count else self.problem}: name another, or use --device cpu"
        )


def gpu_index(device: str) -> int:
    """The number of the GPU that "cuda" (the first), "cuda:1" … names, as CUDA counts them.

    Raises `UserError` for a name that is none of those.
    """
    found = re.fullmatch(r"cuda(?::([0-9]{1,3}))?", device)
    if found is None:
        raise UserError(f"device is {device!r}, expected cpu, cuda, cuda:N or auto")
    return int(found[1] or 0)


def find_gpus() -> Gpus:
    """Asks the driver.  Never raises: no driver and no GPU are answers."""
    cuda = next((library for name in _LIBRARIES if (library := _load(name))), None)
    if cuda is None:
        return Gpus((), None, "no NVIDIA driver is installed")
    number = ctypes.c_int()
    driver = None
    if cuda.cuDriverGetVersion(ctypes.byref(number)) == 0 and number.value:
        driver = f"{number.value // 1000}.{number.value % 1000 // 10}"
    status = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(number))
    if status or not number.value:
        return Gpus((), driver, f"the NVIDIA driver sees no GPU{f' (CUDA error {status})' if status else ''}")
    return Gpus(tuple(_describe(cuda, i) for i in range(number.value)), driver)


def _load(name: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def _describe(cuda: ctypes.CDLL, index: int) -> Gpu:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    memory, name = ctypes.c_size_t(), ctypes.create_string_buffer(256)
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    return Gpu(name.value.decode(errors="replace"), f"sm{major.value}{minor.value}", memory.value, _uuid(cuda, device))


def _uuid(cuda: ctypes.CDLL, device: ctypes.c_int) -> str:
    raw = (ctypes.c_ubyte * 16)()
    ask = getattr(cuda, "cuDeviceGetUuid_v2", None) or getattr(cuda, "cuDeviceGetUuid", None)
    if ask is None or ask(ctypes.byref(raw), device):
        return ""
    return f"GPU-{uuid.UUID(bytes=bytes(raw))}"
