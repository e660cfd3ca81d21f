"""The NVIDIA GPUs of this machine, as their driver lists them.  Needs no package: the driver's own library is asked."""

from __future__ import annotations

import ctypes
import ctypes.util
from dataclasses import dataclass

_LIBRARIES = ("libcuda.so.1", "libcuda.so", "nvcuda.dll")
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


@dataclass(frozen=True)
class Gpu:
    """One GPU."""

    name: str  # "NVIDIA GeForce RTX 4090"
    sm: str  # its compute capability as "sm89"
    memory_bytes: int

    def __str__(self) -> str:
        return f"{self.name} ({self.sm})"


@dataclass(frozen=True)
class Gpus:
    """GPUs that the driver names, or why it names none."""

    found: tuple[Gpu, ...]
    driver: str | None  # the newest CUDA version that the driver serves, as "13.0"; None without a driver
    problem: str | None = None  # why there are none, as a phrase


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
    return Gpu(name.value.decode(errors="replace"), f"sm{major.value}{minor.value}", memory.value)
