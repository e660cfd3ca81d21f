"""The machine of a measurement: cores, processor, versions, and how busy it was."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from vitrm.runtime.system.gpus import find_gpus, gpu_index

_EXACT = {"avx_vnni", "avx512_vnni", "amx_int8"}  # add four products of bytes in 32 bits
_FEATURES = ("avx2", "avx512f", *sorted(_EXACT), "avx512_bf16", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve")


def physical_cores() -> int:
    """Physical cores this process may use: of its CPU affinity, without hyper-threads, within a container's quota."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = set()
    for cpu in usable:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text().strip())
        except OSError:
            cores.add(str(cpu))
    count = len(cores)
    quota = _cgroup_quota()
    if quota is not None:
        count = min(count, max(1, int(quota)))
    return max(1, count)


def _cgroup_quota() -> float | None:
    """CPUs granted to this container, or None without a limit."""
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if limit == "max" else float(limit) / float(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def cpu_name() -> str:
    """The processor's or board's own name."""
    try:  # an ARM board says who it is in the device tree; its cpuinfo has no name
        return Path("/proc/device-tree/model").read_text().strip("\0 \n")
    except (OSError, UnicodeDecodeError):
        pass
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.split(":", 1)[1].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cpu_features() -> tuple[str, ...]:
    """The instruction sets that decide how fast, and how, this CPU multiplies matrices; empty where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ()
    # x86 calls the line "flags", ARM "Features".
    line = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    flags = set(line.partition(":")[2].split())
    return tuple(name for name in _FEATURES if name in flags)


def saturates_integer_sums() -> bool:
    """Tells whether integer products that are not made for it may saturate here: on x86 without VNNI (vitrm.runtime.artifact.saturation_check)."""
    return platform.machine().lower() in ("x86_64", "amd64", "i686") and not _EXACT.intersection(cpu_features())


def gpu_name(device: str = "cuda") -> str:
    """The name of the GPU that "cuda", "cuda:1" … is, as its driver gives it."""
    found, index = find_gpus().found, gpu_index(device)
    return found[index].name if index < len(found) else "CUDA device"


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Python's version and those of the `packages` that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def system() -> str:
    """Operating system and architecture."""
    return f"{platform.system()} {platform.release()} {platform.machine()}" if sys.platform != "darwin" else "macOS"


@dataclass(frozen=True)
class CpuClock:
    """CPU time used so far; two readings tell how busy the rest of the machine was between them."""

    wall: float  # seconds
    machine: float  # CPU seconds of every process, and of what the host took away
    own: float  # CPU seconds of this process
    cpus: int  # logical CPUs that `machine` counts

    @classmethod
    def read(cls) -> CpuClock | None:
        """A reading, or None where the system does not count."""
        try:
            lines = Path("/proc/stat").read_text().splitlines()
            user, nice, system, _, _, irq, softirq, steal = (int(v) for v in lines[0].split()[1:9])
            cpus = sum(1 for line in lines if line.startswith("cpu")) - 1
            used = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError):
            return None
        return cls(time.perf_counter(), used, time.process_time(), cpus)

    def others_since(self, earlier: CpuClock) -> float:
        """CPUs that other processes kept busy, on average, since an `earlier` reading."""
        elapsed = max(self.wall - earlier.wall, 1e-9)
        return max(0.0, (self.machine - earlier.machine) - (self.own - earlier.own)) / elapsed
