"""Power sensors of a machine: Jetson's rails, a CPU's energy counters, an NVIDIA GPU through NVML.

    sensor                  where                                             what it is
    Jetson INA3221/INA238   /sys/class/hwmon/hwmon*/{in,curr}N_input          voltage × current of a rail, now
    RAPL (Intel, AMD)       /sys/class/powercap/intel-rapl:*/energy_uj        energy since some moment, wraps around
    NVML                    nvidia-ml-py: total energy, else present power    energy of the whole board, else its power

The paths are looked for below a `root`, which is "/" on a machine.  A sensor that is not there, or not readable (RAPL is
root's alone on most systems), is a reason in words, never a zero.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from vitrm.runtime.system.gpus import find_gpus

ROOT = Path("/")
_RAIL_CHIPS = ("ina3221", "ina238")
_TOTALS = ("VDD_IN", "VIN", "POM_5V_IN")  # a rail that feeds all others of its board
# DRAM and always-on supplies of Jetson AGX Orin are made from the 5 V of VIN_SYS_5V0, which counts them already.
_DOWNSTREAM = ("VDDQ_VDD2_1V8AO",)
_JETSON_GPUS = ("gpu", "ga10b", "gv11b", "gp10b", "gm20b")  # in the names of devfreq devices


class SensorError(Exception):
    """A sensor that was found cannot be read any more; the message says which and why."""


class Sensor(ABC):
    """Something that measures power or energy."""

    scope: str  # what is measured, in words

    @abstractmethod
    def read(self) -> float:
        """Watts now of a gauge, joules so far of a counter.  Raises `SensorError`."""


class Gauge(Sensor):
    """Gives the present power, so it has to be sampled."""


class Counter(Sensor):
    """Counts energy by itself; two readings are enough."""

    wraps_at: float | None = None  # joules at which it starts over


class Rails(Gauge):
    """A Jetson's power monitors: the rail that feeds the module, else the sum of those that do together."""

    def __init__(self, rails: dict[str, tuple[Path, Path]]) -> None:
        """`rails`: name → the files of its voltage (mV) and current (mA)."""
        total = next((name for name in _TOTALS if name in rails), None)
        self._rails = {n: f for n, f in rails.items() if n == total or (total is None and n not in _DOWNSTREAM)}
        self.scope = f"Jetson rail{'s' * (len(self._rails) > 1)} {' + '.join(self._rails)}"

    def read(self) -> float:
        return sum(_number(volts) * _number(amperes) for volts, amperes in self._rails.values()) / 1e6

    @classmethod
    def find(cls, root: Path = ROOT) -> Rails | None:
        """The rails of this board; None where there are none."""
        rails = {}
        for chip in sorted((root / "sys/class/hwmon").glob("hwmon*")):
            if _text(chip / "name") not in _RAIL_CHIPS:
                continue
            for volts in sorted(chip.glob("in[0-9]_input")):
                number = volts.name[2]
                amperes = chip / f"curr{number}_input"
                # An INA238 has one rail, and its name may be that of the chip's node.
                name = _text(chip / f"in{number}_label") or _text(chip / "label")
                if name and name != "NC" and amperes.exists():
                    rails[name] = (volts, amperes)
        return cls(rails) if rails else None


class Rapl(Counter):
    """One energy counter of a CPU: a package, or its memory."""

    def __init__(self, zone: Path, name: str) -> None:
        self._file = zone / "energy_uj"
        self.scope = f"CPU {name}"
        limit = _text(zone / "max_energy_range_uj")
        self.wraps_at = float(limit) / 1e6 if limit else None

    def read(self) -> float:
        return _number(self._file) / 1e6

    @classmethod
    def find(cls, root: Path = ROOT) -> tuple[list[Rapl], str | None]:
        """The counters that together are the CPUs' (packages, and memory, which they do not hold), or why there are none."""
        folder = root / "sys/class/powercap"
        zones = [
            (zone, name)
            for zone in sorted(folder.glob("intel-rapl:*"))
            if re.match(r"package|dram", name := _text(zone / "name") or "")
        ]
        if not zones:
            return [], "this CPU shows no energy counters (no intel-rapl in /sys/class/powercap)"
        locked = [zone for zone, _ in zones if not os.access(zone / "energy_uj", os.R_OK)]
        if locked:
            return [], f"the CPU's energy counters are root's: sudo chmod a+r {locked[0].parent}/intel-rapl*/energy_uj"
        return [cls(zone, name) for zone, name in zones], None


class Nvml(Sensor):
    """An NVIDIA GPU's board.  `NvmlEnergy` where it counts energy (Volta and later), else `NvmlPower`."""

    def __init__(self, nvml: Any, handle: Any, name: str) -> None:
        self._nvml, self._handle = nvml, handle
        self.scope = f"GPU board {name} (NVML)"

    def _ask(self, question: Callable[..., float], *more: Any) -> float:
        try:
            return float(question(self._handle, *more))
        except self._nvml.NVMLError as error:
            raise SensorError(f"{self.scope}: {error}") from None

    def clocks(self) -> dict[str, float]:
        """MHz of the multiprocessors and the memory."""
        kinds = {"gpu": self._nvml.NVML_CLOCK_SM, "gpu_memory": self._nvml.NVML_CLOCK_MEM}
        return {name: self._ask(self._nvml.nvmlDeviceGetClockInfo, kind) for name, kind in kinds.items()}

    def limit(self) -> float | None:
        """The power that the board is limited to, watts; None where it has no limit."""
        try:
            return self._ask(self._nvml.nvmlDeviceGetEnforcedPowerLimit) / 1e3
        except SensorError:
            return None


class NvmlEnergy(Nvml, Counter):
    """Energy since the driver was loaded."""

    def read(self) -> float:
        return self._ask(self._nvml.nvmlDeviceGetTotalEnergyConsumption) / 1e3


class NvmlPower(Nvml, Gauge):
    """Power now; some boards give a mean of the last second."""

    def read(self) -> float:
        return self._ask(self._nvml.nvmlDeviceGetPowerUsage) / 1e3


def find_nvml(index: int = 0) -> tuple[NvmlEnergy | NvmlPower | None, str | None]:
    """The GPU that CUDA counts as number `index`, or why NVML does not say what it takes.

    NVML counts them in another order, and CUDA_VISIBLE_DEVICES means nothing to it: they are matched by UUID.
    """
    try:
        nvml = import_module("pynvml")
    except ImportError:
        return None, "the GPU's power needs NVML: pip install nvidia-ml-py"
    try:
        nvml.nvmlInit()
        handle = _nvml_handle(nvml, index)
        name = nvml.nvmlDeviceGetName(handle)
        name = name.decode() if isinstance(name, bytes) else str(name)
    except nvml.NVMLError as error:
        return None, f"NVML finds no NVIDIA GPU ({error})"
    reasons: list[str] = []
    for kind in (NvmlEnergy, NvmlPower):
        found = kind(nvml, handle, name)
        try:
            found.read()
        except SensorError as error:
            reasons.append(str(error))
        else:
            return found, None
    return None, reasons[-1]


def _nvml_handle(nvml: Any, index: int) -> Any:
    gpus = find_gpus().found
    if index < len(gpus) and gpus[index].uuid:
        try:
            return nvml.nvmlDeviceGetHandleByUUID(gpus[index].uuid)
        except nvml.NVMLError:  # a part of one
            return nvml.nvmlDeviceGetHandleByUUID(gpus[index].uuid.replace("GPU-", "MIG-"))
    return nvml.nvmlDeviceGetHandleByIndex(index)


def find_sensors(device_kind: str, root: Path = ROOT, index: int = 0) -> tuple[list[Sensor], str | None]:
    """The sensors that together measure what computes on a "cpu" or "cuda" device, or why there are none.

    `index`: which of the GPUs, as CUDA counts them.

    A Jetson's rails hold CPU, GPU and memory alike.
    """
    rails = Rails.find(root)
    if rails is not None:
        try:
            rails.read()
        except SensorError as error:
            return [], str(error)
        return [rails], None
    if device_kind == "cpu":
        counters, reason = Rapl.find(root)
        return list(counters), reason
    board, reason = find_nvml(index)
    return [board] if board else [], reason


class Clocks:
    """Clock rates, MHz."""

    def __init__(self, sensors: list[Sensor], root: Path = ROOT) -> None:
        self._boards = [s for s in sensors if isinstance(s, Nvml)]
        self._cpus = sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))
        self._cpuinfo = root / "proc/cpuinfo"
        self._gpus = [
            device / "cur_freq"
            for device in sorted((root / "sys/class/devfreq").glob("*"))
            if device.name.split(".")[-1] in _JETSON_GPUS
        ]

    def read(self) -> dict[str, float]:
        """cpu (mean over cores), gpu, gpu_memory: those that can be read."""
        found: dict[str, float] = {}
        try:
            cpus = [_number(file) / 1e3 for file in self._cpus] or _cpuinfo_clocks(self._cpuinfo)
            if cpus:
                found["cpu"] = sum(cpus) / len(cpus)
            if self._gpus:
                found["gpu"] = _number(self._gpus[0]) / 1e6
            for board in self._boards[:1]:
                found |= board.clocks()
        except SensorError:
            pass
        return found


def power_mode(root: Path = ROOT) -> str | None:
    """A Jetson's power mode as nvpmodel stores it, such as "0002"; None elsewhere."""
    found = re.search(r"pmode:(\d+)", _text(root / "var/lib/nvpmodel/status") or "")
    return found[1] if found else None


def _cpuinfo_clocks(file: Path) -> list[float]:
    return [float(v) for v in re.findall(r"^cpu MHz\s*:\s*([\d.]+)", _text(file) or "", re.MULTILINE)]


def _text(file: Path) -> str | None:
    """A file's content without its line end; None where it cannot be read."""
    try:
        return file.read_text().strip("\0 \n")
    except (OSError, UnicodeDecodeError):
        return None


def _number(file: Path) -> float:
    try:
        return float(file.read_text())
    except (OSError, ValueError) as error:
        raise SensorError(f"{file} cannot be read ({error})") from None
