"""Interleaved measuring, with work whose true cost is known: it passes time on a clock of its own."""

from __future__ import annotations

import gc
import subprocess
import sys
import time

import numpy as np
import pytest

from vitrm.runtime.bench import latency
from vitrm.runtime.bench.latency import Timing, interleave, speedup, summarize
from vitrm.runtime.system.machine import CpuClock


class Clock:
    """Stands in for the module `time`: only work and sleep make its time pass, however busy the machine is."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def perf_counter_ns(self) -> int:
        return round(self.now * 1e9)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(latency, "time", made)
    return made


def test_percentiles() -> None:
    found = summarize(np.arange(1.0, 102.0))
    assert (found.p50, found.p90, found.p99) == (51, 91, 100)
    assert (found.min, found.max, found.mean, found.n) == (1, 101, 51, 101)
    single = summarize(np.array([2.5]))
    assert (single.p50, single.p99, single.n) == (2.5, 2.5, 1)


def test_every_thing_runs_in_every_round_in_changing_order(clock: Clock) -> None:
    calls: list[str] = []

    def work(name: str, seconds: float) -> None:
        calls.append(name)
        clock.sleep(seconds)

    timings = interleave(
        {"a": [lambda: work("a", 0.012)], "b": [lambda: work("b", 0.012)], "c": [lambda: work("c", 0.012)]},
        seconds=0.05,
        rounds=8,
    )
    assert {len(t.rounds) for t in timings.values()} == {8}
    assert all(len(r) == 1 for t in timings.values() for r in t.rounds)  # 12 ms fit once into a turn of 6 ms
    # 12 ms is slow enough to need no rehearsal, so that after the warm-up each turn is one call.
    turns = calls[sum(t.warm_up for t in timings.values()) :]
    orders = {tuple(turns[i : i + 3]) for i in range(0, 24, 3)}
    assert len(turns) == 24
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len(orders) > 1


def test_fast_things_get_their_time_and_cycle_through_inputs(clock: Clock) -> None:
    seen: list[int] = []
    runs = [lambda i=i: (seen.append(i), clock.sleep(0.0005)) for i in range(4)]
    timing = interleave({"a": runs}, seconds=0.2, rounds=5)["a"]
    assert timing.latency.n == pytest.approx(400, abs=5)
    assert timing.samples.sum() == pytest.approx(200, abs=3)  # milliseconds
    assert timing.latency.p50 == pytest.approx(0.5)
    assert all(seen.count(i) > 100 for i in range(4))


def test_ratio_survives_a_machine_that_slows_down(clock: Clock) -> None:
    def sleep(milliseconds: float) -> None:
        slowness = 1 + 6 * clock.now  # several times slower at the end than at the beginning
        clock.sleep(milliseconds * slowness / 1000)

    timings = interleave({"slow": [lambda: sleep(16)], "fast": [lambda: sleep(4)]}, seconds=0.3, rounds=10)
    ratio = speedup(timings["slow"], timings["fast"])
    spread = timings["slow"].samples.max() / timings["slow"].samples.min()
    assert spread > 2
    assert 3 < ratio.median < 5
    assert ratio.low <= ratio.median <= ratio.high


def test_ratio_is_within_rounds() -> None:
    # Round 2 ran on a machine ten times slower: pooled medians would mix the two.
    reference = Timing((np.array([2.0, 2.0]), np.array([20.0, 20.0])), 1)
    own = Timing((np.array([1.0, 1.0, 1.0, 1.0]), np.array([10.0])), 1)
    assert speedup(reference, own).median == 2


def test_collector_is_off_while_measuring_and_on_again() -> None:
    states = []
    assert gc.isenabled()
    interleave({"a": [lambda: (states.append(gc.isenabled()), time.sleep(0.001))]}, seconds=0.02, rounds=2)
    assert False in states
    assert gc.isenabled()

    def fail() -> None:
        if not gc.isenabled():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interleave({"a": [fail]}, seconds=0.02, rounds=2)
    assert gc.isenabled()


def test_progress_reaches_one() -> None:
    fractions: list[float] = []
    interleave({"a": [lambda: None]}, seconds=0.01, rounds=4, progress=fractions.append)
    assert fractions == [0, 0.25, 0.5, 0.75, 1]
    assert interleave({}, seconds=1) == {}


def test_other_processes_are_noticed() -> None:
    before = CpuClock.read()
    if before is None:
        pytest.skip("this system has no /proc/stat")
    busy = subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
    try:
        assert busy.stdout is not None
        busy.stdout.readline()  # it runs
        before = CpuClock.read()
        time.sleep(1)
        after = CpuClock.read()
    finally:
        busy.kill()
        busy.wait()
    assert before is not None
    assert after is not None
    assert 0.2 < after.others_since(before) <= after.cpus * 1.1
    # What this process itself uses is not held against the others.
    own = CpuClock(wall=before.wall + 1, machine=before.machine + 1, own=before.own + 1, cpus=before.cpus)
    assert own.others_since(before) == 0


def test_what_fails_in_the_midst_leaves_the_others(clock: Clock) -> None:
    calls = {"late": 0}

    def late() -> None:
        calls["late"] += 1
        clock.now += 0.001
        if calls["late"] > 40:
            raise RuntimeError("the device is lost")

    def at_once() -> None:
        raise MemoryError("no memory")

    def well() -> None:
        clock.now += 0.001

    failures: dict[str, Exception] = {}
    found = interleave(
        {"late": [late], "at once": [at_once], "well": [well]},
        seconds=0.1,
        rounds=5,
        failed=lambda name, error: failures.update({name: error}),
    )
    assert list(found) == ["well"]
    assert len(found["well"].rounds) == 5
    assert {name: str(error) for name, error in failures.items()} == {
        "late": "the device is lost",
        "at once": "no memory",
    }
    with pytest.raises(MemoryError):
        interleave({"at once": [at_once]}, seconds=0.1)
    assert gc.isenabled()
