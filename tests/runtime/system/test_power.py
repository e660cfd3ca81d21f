"""Sensors read from trees with the files that the kernels of real boards show, and what a bench makes of them."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from vitrm.runtime.bench.energy import Meter, Meters, measure
from vitrm.runtime.bench.report import table
from vitrm.runtime.bench.run import bench
from vitrm.runtime.system.power import (
    Clocks,
    Gauge,
    Nvml,
    Rails,
    Rapl,
    SensorError,
    find_nvml,
    find_sensors,
    power_mode,
)


def write(root: Path, files: dict[str, object]) -> Path:
    for name, value in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")
    return root


def chip(number: int, name: str, rails: dict[int, tuple[str, int, int]]) -> dict[str, object]:
    """A power monitor as hwmon shows it: name, voltage in mV and current in mA by channel."""
    files: dict[str, object] = {f"sys/class/hwmon/hwmon{number}/name": name}
    for channel, (label, volts, amperes) in rails.items():
        folder = f"sys/class/hwmon/hwmon{number}"
        files |= {f"{folder}/in{channel}_label": label, f"{folder}/in{channel}_input": volts}
        files[f"{folder}/curr{channel}_input"] = amperes
    return files


@pytest.fixture
def orin_nano(tmp_path: Path) -> Path:
    """Jetson Orin Nano, JetPack 6: one INA3221 at 1-0040, whose first rail feeds the module; in4 … in6 are shunts in µV."""
    rails = {1: ("VDD_IN", 5072, 960), 2: ("VDD_CPU_GPU_CV", 5072, 184), 3: ("VDD_SOC", 5064, 280)}
    folder = "sys/class/hwmon/hwmon1"
    shunts = {f"{folder}/in{i}_input": 4800 for i in (4, 5, 6)} | {f"{folder}/in7_label": "sum of shunt voltages"}
    others = {"sys/class/hwmon/hwmon0/name": "pwmfan", "sys/class/hwmon/hwmon0/pwm1": 120}
    clocks = {f"sys/devices/system/cpu/cpu{i}/cpufreq/scaling_cur_freq": mhz * 1000 for i, mhz in ((0, 1510), (1, 729))}
    gpu = {"sys/class/devfreq/17000000.gpu/cur_freq": 624750000, "sys/class/devfreq/15340000.vic/cur_freq": 115200000}
    mode = {"var/lib/nvpmodel/status": "pmode:0001 fmode:quiet"}
    return write(tmp_path, {**chip(1, "ina3221", rails), **shunts, **others, **clocks, **gpu, **mode})


@pytest.fixture
def agx_orin(tmp_path: Path) -> Path:
    """Jetson AGX Orin: two INA3221, no rail for all; the second chip's 1V8AO is made from the first one's 5 V."""
    first = {1: ("VDD_GPU_SOC", 5000, 630), 2: ("VDD_CPU_CV", 5000, 200), 3: ("VIN_SYS_5V0", 4968, 1000)}
    return write(
        tmp_path,
        {**chip(3, "ina3221", first), **chip(4, "ina3221", {1: ("NC", 0, 0), 2: ("VDDQ_VDD2_1V8AO", 4968, 80)})},
    )


@pytest.fixture
def server(tmp_path: Path) -> Path:
    """A server with two packages: RAPL shows cores within packages, memory beside them, and the platform around all."""
    files: dict[str, object] = {}
    zones = [
        ("intel-rapl:0", "package-0", 100_000_000),
        ("intel-rapl:0:0", "core", 60_000_000),
        ("intel-rapl:0:1", "dram", 20_000_000),
        ("intel-rapl:1", "package-1", 50_000_000),
        ("intel-rapl:2", "psys", 900_000_000),
        ("intel-rapl-mmio:0", "package-0", 100_000_000),
    ]
    for zone, name, energy in zones:
        folder = f"sys/class/powercap/{zone}"
        files |= {f"{folder}/name": name, f"{folder}/energy_uj": energy}
        files[f"{folder}/max_energy_range_uj"] = 262_143_328_850
    return write(tmp_path, files)


def test_the_rail_that_feeds_a_module(orin_nano: Path) -> None:
    rails = Rails.find(orin_nano)
    assert rails is not None
    assert rails.scope == "Jetson rail VDD_IN"
    assert rails.read() == pytest.approx(5.072 * 0.960)
    for kind in ("cpu", "cuda"):
        sensors, reason = find_sensors(kind, orin_nano)
        assert [type(s) for s in sensors] == [Rails]
        assert reason is None
    assert Clocks([], orin_nano).read() == {"cpu": 1119.5, "gpu": 624.75}
    assert power_mode(orin_nano) == "0001"


def test_rails_without_a_total_are_summed_once(agx_orin: Path) -> None:
    rails = Rails.find(agx_orin)
    assert rails is not None
    assert rails.scope == "Jetson rails VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0"
    assert rails.read() == pytest.approx(3.15 + 1.0 + 4.968)


def test_a_monitor_with_one_channel(tmp_path: Path) -> None:
    folder = "sys/class/hwmon/hwmon5"
    names = {f"{folder}/name": "ina238", f"{folder}/label": "VIN"}
    values = {f"{folder}/in0_input": 1, f"{folder}/in1_input": 20000, f"{folder}/curr1_input": 1500}
    rails = Rails.find(write(tmp_path, {**names, **values, **chip(4, "ina3221", {1: ("VDD_GPU", 9000, 500)})}))
    assert rails is not None
    assert (rails.scope, rails.read()) == ("Jetson rail VIN", pytest.approx(30.0))


def test_packages_and_memory_are_counted_once(server: Path) -> None:
    counters, reason = Rapl.find(server)
    assert reason is None
    assert [c.scope for c in counters] == ["CPU package-0", "CPU dram", "CPU package-1"]
    assert sum(c.read() for c in counters) == 170.0
    assert counters[0].wraps_at == pytest.approx(262143.32885)


def test_what_cannot_be_read_is_a_reason(server: Path, tmp_path: Path) -> None:
    (server / "sys/class/powercap/intel-rapl:1/energy_uj").unlink()
    sensors, reason = find_sensors("cpu", server)
    assert sensors == []
    assert reason is not None
    assert "sudo chmod a+r" in reason
    sensors, reason = find_sensors("cpu", tmp_path / "empty")
    assert sensors == []
    assert reason is not None
    assert "no energy counters" in reason


def test_nvml_without_a_gpu_is_a_reason() -> None:
    pytest.importorskip("pynvml", reason="needs nvidia-ml-py: pip install nvidia-ml-py")
    board, reason = find_nvml()
    if board:
        pytest.skip("this machine has an NVIDIA GPU")
    assert reason is not None
    assert reason.startswith("NVML finds no NVIDIA GPU (")


def test_nvml_of_a_gpu() -> None:
    board, reason = find_nvml()
    if board is None:
        pytest.skip(f"needs an NVIDIA GPU: {reason}")
    assert isinstance(board, Nvml)
    first = board.read()
    time.sleep(0.3)
    assert board.read() >= (first if "Energy" in type(board).__name__ else 0) > 0
    assert board.clocks()["gpu"] > 0


def test_nvml_that_is_not_installed_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert find_nvml() == (None, "the GPU's power needs NVML: pip install nvidia-ml-py")


def test_a_counter_is_read_before_and_after(server: Path) -> None:
    energy = server / "sys/class/powercap/intel-rapl:0/energy_uj"

    def run() -> None:
        time.sleep(0.01)
        energy.write_text(str(int(energy.read_text()) + 300_000))

    began = time.perf_counter()
    found = measure([run], 8, 0.3, Meter(find_sensors("cpu", server)[0], server))
    took = time.perf_counter() - began
    assert found.joules_per_image == pytest.approx(0.3 / 8)
    assert found.images % 8 == 0
    assert 0.3 <= found.joules_per_image * found.images / found.watts <= took
    assert found.scope == "CPU package-0 + CPU dram + CPU package-1"


def test_a_counter_that_starts_over(server: Path) -> None:
    energy = server / "sys/class/powercap/intel-rapl:0/energy_uj"
    meter = Meter(find_sensors("cpu", server)[0], server)
    energy.write_text(str(262_143_328_850 - 1_000_000))
    meter.start()
    energy.write_text("2000000")
    joules, _, _ = meter.stop()
    assert joules == pytest.approx(3.0)


class UpAndDown(Gauge):
    """Shows 5 and 15 watts in turn: 10 on average between any two readings, whenever they are taken."""

    scope = "a gauge"

    def __init__(self) -> None:
        self.readings = 0

    def read(self) -> float:
        self.readings += 1
        return (5.0, 15.0)[self.readings % 2]


def test_a_gauge_is_sampled_meanwhile(orin_nano: Path) -> None:
    meter = Meter(find_sensors("cpu", orin_nano)[0], orin_nano)
    found = measure([lambda: time.sleep(0.005)], 4, 0.3, meter)
    assert found.watts == pytest.approx(5.072 * 0.960)
    assert found.clocks_mhz == {"cpu": 1119.5, "gpu": pytest.approx(624.75)}
    gauge = UpAndDown()

    def until_sampled() -> None:
        before = gauge.readings
        while gauge.readings == before and meter._thread is not None:
            time.sleep(0.002)

    meter = Meter([gauge], orin_nano)
    assert measure([until_sampled], 1, 0.1, meter).watts == pytest.approx(10)
    assert gauge.readings > 2, "not at the beginning and the end alone"


def test_a_sensor_that_fails_meanwhile(orin_nano: Path) -> None:
    current = orin_nano / "sys/class/hwmon/hwmon1/curr1_input"
    meter = Meter(find_sensors("cpu", orin_nano)[0], orin_nano)
    meter.start()
    current.unlink()
    time.sleep(0.1)
    with pytest.raises(SensorError, match="curr1_input cannot be read"):
        meter.stop()


def test_a_run_that_fails_ends_the_sampling(orin_nano: Path) -> None:
    meter = Meter(find_sensors("cpu", orin_nano)[0], orin_nano)
    calls = iter([None] * 3)
    with pytest.raises(StopIteration):
        measure([lambda: next(calls)], 1, 0.3, meter)
    assert meter._thread is None


@pytest.mark.slow
def test_bench_reports_energy_where_there_are_sensors(artifact: Path, orin_nano: Path) -> None:
    result = bench([artifact], data="digits", batches=(2,), seconds=0.2, threads=1, limit=40, root=orin_nano)
    watts = 5.072 * 0.960
    for row in result.rows:
        assert row.watts == pytest.approx(watts)
        assert row.power_scope == "Jetson rail VDD_IN"
        assert row.clocks_mhz is not None
        assert row.clocks_mhz["gpu"] == pytest.approx(624.75)
        assert row.images_per_s is not None
        assert row.joules_per_image is not None
        # Not the same runs: a busy machine may be several times as slow in one of the two stretches.
        assert 0.02 < row.joules_per_image / (watts / row.images_per_s) < 50
        assert row.accuracy
        assert row.joules_per_correct_image == pytest.approx((row.joules_per_image or 0) / row.accuracy)
    assert result.power["idle_watts"] == {"Jetson rail VDD_IN": pytest.approx(watts)}
    assert result.power["power_mode"] == "0001"
    assert [name for name, _ in table.columns(result)].index("mJ/image") > 0
    assert "power: Jetson rail VDD_IN, everything on it, 4.87 W of it when idle" in table.footer(result)
    json.dumps(result.to_dict(), allow_nan=False)


@pytest.mark.slow
def test_bench_without_sensors_says_so(artifact: Path, tmp_path: Path) -> None:
    result = bench([artifact], batches=(1,), seconds=0.05, threads=1, limit=10, eager=False, root=tmp_path)
    values = result.to_dict()
    assert values["rows"][0]["watts"] is None
    assert values["rows"][0]["joules_per_image"] is None
    assert [name for name, _ in table.columns(result)] == [name for name, _ in table.COLUMNS]
    (line,) = [line for line in table.footer(result) if line.startswith("power")]
    assert line.startswith("power of cpu rows not measured: this CPU shows no energy counters")
    off = bench([artifact], batches=(1,), seconds=0.05, threads=1, limit=10, eager=False, root=tmp_path, power=False)
    assert not [line for line in table.footer(off) if line.startswith("power")]


@pytest.mark.slow
def test_a_sensor_that_fails_costs_a_row_its_energy_alone(
    artifact: Path, orin_nano: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = Meters.of

    def of_then_lost(self: Meters, kind: str, index: int) -> Meter | None:
        meter = of(self, kind, index)
        (orin_nano / "sys/class/hwmon/hwmon1/curr1_input").unlink(missing_ok=True)
        return meter

    monkeypatch.setattr(Meters, "of", of_then_lost)
    result = bench([artifact], batches=(1,), seconds=0.05, threads=1, limit=10, eager=False, root=orin_nano)
    (row,) = result.rows
    assert row.ok
    assert row.latency_ms is not None
    assert row.watts is None
    assert any("power was not measured" in note for note in row.notes)
