"""Latency of several cases, measured in one interleaved run.

A machine's clock, temperature and other load drift, and a figure taken now does not compare with one
taken a minute later.  So time is cut into rounds, in each round everything has one turn, in random
order, and a ratio is the median over rounds of the ratio *within* a round.

Times are from the host's arrays to the host's arrays (a GPU's copies included), with the garbage
collector off.  The GPU's own clock is read elsewhere: `Session.device_times` (CUDA events).
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Run = Callable[[], object]
ROUNDS = 10
_WARM_UP_RUNS = 3
# Worker threads of the previous turn spin for some milliseconds after their last job; wait for them to sleep,
# then bring caches and clock back up with runs that do not count.
_SETTLE_S = 0.005
_REHEARSE_S = 0.005


@dataclass(frozen=True)
class Latency:
    """Distribution of one case's times, milliseconds per run."""

    p50: float
    p90: float
    p99: float
    mean: float
    min: float
    max: float
    n: int  # timed runs


@dataclass(frozen=True)
class Timing:
    """Times of one case's turns."""

    rounds: tuple[NDArray[np.float64], ...]  # milliseconds of each run, by round
    warm_up: int  # runs before the first round

    @property
    def samples(self) -> NDArray[np.float64]:
        """Every timed run, milliseconds."""
        return np.concatenate(self.rounds)

    @property
    def latency(self) -> Latency:
        return summarize(self.samples)


@dataclass(frozen=True)
class Ratio:
    """Ratio of speeds, own to reference: the median over rounds, and the range of the middle 80 %."""

    median: float
    low: float
    high: float


def summarize(samples: NDArray[np.float64]) -> Latency:
    """Percentiles (linear between samples) and moments of times in milliseconds."""
    p50, p90, p99 = (float(v) for v in np.percentile(samples, [50, 90, 99]))
    return Latency(p50, p90, p99, float(samples.mean()), float(samples.min()), float(samples.max()), len(samples))


def speedup(reference: Timing, own: Timing, *, of_means: bool = False) -> Ratio:
    """Returns how many times as fast `own` is as `reference`, from rounds they ran side by side.

    A round's times are represented by their median, or with `of_means` by their mean: where some images halt and others do
    not, the median is the time of either kind, and the mean is what a hundred images take.
    """
    middle = np.mean if of_means else np.median
    ratios = [float(middle(r) / middle(o)) for r, o in zip(reference.rounds, own.rounds, strict=True)]
    low, median, high = (float(v) for v in np.percentile(ratios, [10, 50, 90]))
    return Ratio(median, low, high)


def interleave(
    cases: Mapping[str, Sequence[Run]],
    *,
    seconds: float,
    rounds: int = ROUNDS,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
    failed: Callable[[str, Exception], None] | None = None,
) -> dict[str, Timing]:
    """Measures every case for about `seconds`, and at least once in each of `rounds` rounds.

    A case is one function or several that it cycles through (the same work on other inputs).  `progress` is
    called with the fraction that is done, before each turn of a case and at the end.  `failed` is called with a case whose function raised, and what: the others go
    on without it, unless `failed` raises.  Without it, whatever a function raises ends the measurement.
    """
    if not cases:
        return {}
    warm_up: dict[str, tuple[int, float]] = {}
    turn_ns = int(seconds / rounds * 1e9)

    def give_up(name: str, error: Exception) -> None:
        if failed is None:
            raise error
        failed(name, error)

    for name, runs in cases.items():
        try:
            warm_up[name] = _warm_up(runs, seconds)
        except Exception as error:
            give_up(name, error)
    order = list(warm_up)
    slow = {name: took > _REHEARSE_S for name, (_, took) in warm_up.items()}
    taken: dict[str, list[NDArray[np.float64]]] = {name: [] for name in order}
    position = dict.fromkeys(order, 0)
    shuffle = random.Random(seed).shuffle
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            shuffle(order)
            now = tuple(order)
            for j, name in enumerate(now):
                if progress:  # before a turn, which may take a minute
                    progress((i + j / len(now)) / rounds)
                runs = cases[name]
                try:
                    _settle(runs[position[name] % len(runs)], rehearse=not slow[name])
                    samples, position[name] = _turn(runs, position[name], turn_ns)
                except Exception as error:
                    give_up(name, error)
                    order.remove(name)
                else:
                    taken[name].append(samples)
        if progress:
            progress(1.0)
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(taken[name]), warm_up[name][0]) for name in cases if name in order}


def _warm_up(runs: Sequence[Run], seconds: float) -> tuple[int, float]:
    """Runs untimed for a while; returns the number of runs and the shortest one's seconds."""
    end = time.perf_counter() + min(0.5, seconds / 4)
    count, shortest = 0, float("inf")
    while count < _WARM_UP_RUNS or time.perf_counter() < end:
        start = time.perf_counter()
        runs[count % len(runs)]()
        shortest = min(shortest, time.perf_counter() - start)
        count += 1
    return count, shortest


def _settle(run: Run, *, rehearse: bool) -> None:
    time.sleep(_SETTLE_S)
    end = time.perf_counter() + _REHEARSE_S
    while rehearse and time.perf_counter() < end:
        run()


def _turn(runs: Sequence[Run], position: int, turn_ns: int) -> tuple[NDArray[np.float64], int]:
    """Timed runs until `turn_ns` have passed, at least one; returns milliseconds, and where the cycle stands."""
    clock = time.perf_counter_ns
    marks = []
    end = clock() + turn_ns
    while True:
        run = runs[position % len(runs)]
        start = clock()
        run()
        stop = clock()
        marks.append(stop - start)
        position += 1
        if stop >= end:
            return np.asarray(marks, np.float64) / 1e6, position
