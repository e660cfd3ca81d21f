"""Energy of running one case over and over: watts, and joules an image.

Latency is measured in turns of a fraction of a second, too short for power: NVML counts in steps of up to 100 ms, boards
without a counter give the mean of a second, and clocks follow the load.  So where there are sensors, everything gets a
stretch of its own after the rounds, begun with a run-in that does not count.

What is read is the whole of what the sensor sees (board, module, packages), idle power included.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vitrm.runtime.system.power import ROOT, Clocks, Counter, Gauge, Nvml, Sensor, SensorError, find_sensors, power_mode

_PERIOD_S = 0.02  # between two samples of gauges and clocks
_RUN_IN_S = 1.0  # the longest mean that a gauge gives


@dataclass(frozen=True)
class Energy:
    """Power and energy that one case took."""

    watts: float  # mean
    joules_per_image: float
    clocks_mhz: dict[str, float]  # mean, of those that can be read: cpu, gpu, gpu_memory
    images: int  # run while it was measured
    scope: str  # what was measured, in words


class Meter:
    """Measures energy and clocks from `start` to `stop`."""

    def __init__(self, sensors: Sequence[Sensor], root: Path = ROOT) -> None:
        self.sensors = list(sensors)
        self.scope = " + ".join(s.scope for s in sensors)
        self._clocks = Clocks(self.sensors, root)
        self._gauges = [s for s in sensors if isinstance(s, Gauge)]
        self._counters = [s for s in sensors if isinstance(s, Counter)]
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure: SensorError | None = None

    def start(self) -> None:
        """Begins.  Raises `SensorError`."""
        self._samples: list[tuple[float, float]] = []  # (seconds, watts of all gauges)
        self._rates: list[dict[str, float]] = []
        self._failure = None
        self._ended.clear()
        self._sample()
        self._before = [c.read() for c in self._counters]
        self._began = time.perf_counter()
        self._thread = threading.Thread(target=self._keep_sampling, name="power", daemon=True)
        self._thread.start()

    def stop(self) -> tuple[float, float, dict[str, float]]:
        """Ends: joules, seconds, and mean clocks in MHz.  Raises `SensorError` where a sensor failed meanwhile."""
        seconds = time.perf_counter() - self._began
        joules = 0.0
        self._halt()
        for counter, before in zip(self._counters, self._before, strict=True):
            gone = counter.read() - before
            if gone < 0 and counter.wraps_at:
                gone += counter.wraps_at
            joules += gone
        if self._gauges:
            self._sample()
            if self._failure:
                raise self._failure
            joules += _mean_over_time(self._samples) * seconds
        names = self._rates[0] if self._rates else {}
        clocks = {n: sum(r[n] for r in self._rates if n in r) / sum(n in r for r in self._rates) for n in names}
        return joules, seconds, clocks

    def cancel(self) -> None:
        """Ends without a result."""
        self._halt()

    def _halt(self) -> None:
        self._ended.set()
        if self._thread:
            self._thread.join()
            self._thread = None

    def _keep_sampling(self) -> None:
        while not self._ended.wait(_PERIOD_S):
            try:
                self._sample()
            except SensorError as error:
                self._failure = error
                return

    def _sample(self) -> None:
        if self._gauges:
            watts = sum(g.read() for g in self._gauges)
            self._samples.append((time.perf_counter(), watts))
        self._rates.append(self._clocks.read())


def _mean_over_time(samples: Sequence[tuple[float, float]]) -> float:
    """The mean of values that were read at uneven times: each stands for the time around it."""
    if len(samples) < 2:
        return samples[0][1]
    area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(samples))
    return area / (samples[-1][0] - samples[0][0])


def measure(runs: Sequence[Callable[[], object]], batch: int, seconds: float, meter: Meter) -> Energy:
    """Runs `runs` in turn, each on `batch` images, for `seconds` after a run-in.  Raises `SensorError`."""
    count = 0

    def run_for(duration: float) -> None:
        nonlocal count
        end = time.perf_counter() + duration
        while True:
            runs[count % len(runs)]()
            count += 1
            if time.perf_counter() >= end:
                return

    run_for(min(_RUN_IN_S, seconds))
    count = 0
    meter.start()
    try:
        run_for(seconds)
    except BaseException:
        meter.cancel()
        raise
    joules, elapsed, clocks = meter.stop()
    return Energy(joules / elapsed, joules / (count * batch), clocks, count * batch, meter.scope)


def idle_watts(meter: Meter, seconds: float) -> float:
    """Mean power of `seconds` in which this process does nothing.  Raises `SensorError`."""
    meter.start()
    time.sleep(seconds)
    joules, elapsed, _ = meter.stop()
    return joules / elapsed


@dataclass
class Meters:
    """The meters of a machine, one for each kind of device, made when first asked for."""

    root: Path = ROOT
    notes: dict[str, str] = field(default_factory=dict)  # device kind → why nothing is measured there
    _made: dict[str, Meter | None] = field(default_factory=dict)
    _idle: dict[str, float] = field(default_factory=dict)

    def of(self, device_kind: str, index: int = 0) -> Meter | None:
        """The meter for "cpu" or GPU `index`; None, and a note, where there is no sensor.  A new one measures idle power first."""
        device = f"{device_kind}:{index}" if index else device_kind
        if device not in self._made:
            sensors, reason = find_sensors(device_kind, self.root, index)
            self._made[device] = meter = Meter(sensors, self.root) if sensors else None
            if meter:
                self._idle[meter.scope] = idle_watts(meter, _RUN_IN_S)
            elif reason:
                self.notes[device] = reason
        return self._made[device]

    def describe(self) -> dict[str, object]:
        """For a bench's JSON: idle_watts by what is measured, gpu_limit_watts, power_mode, and why something is not measured."""
        limits = [s.limit() for m in self._made.values() if m for s in m.sensors if isinstance(s, Nvml)]
        return {
            "idle_watts": dict(self._idle),
            "gpu_limit_watts": limits[0] if limits else None,
            "power_mode": power_mode(self.root),
            "not_measured": dict(self.notes),
        }
