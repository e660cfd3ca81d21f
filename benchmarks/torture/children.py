"""Work in a forked child: everything is imported already, so a command starts in milliseconds and can be killed for free.

A child ends as a command does: a returned code, 1 with a traceback for an exception, or a signal.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import IO

MIB = 1 << 20
# What commands load while they run, besides themselves.
_WARM = (
    "vitrm.training.cli",
    "vitrm.export.cli",
    "vitrm.runtime.bench.cli",
    "vitrm.runtime.bench.run",
    "vitrm.runtime.bench.report.page",
    "vitrm.export.targets.triton",
    "vitrm.training.loop",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "matplotlib.figure",
    "sklearn.datasets",
)


@dataclass(frozen=True)
class Ended:
    """How a child ended."""

    code: int | None  # None where a signal ended it
    signal: int | None
    timed_out: bool
    stdout: str
    stderr: str
    seconds: float

    @property
    def tracebacks(self) -> bool:
        return "Traceback (most recent call last)" in self.stderr


def warm() -> None:
    """Imports what the commands import, and lets a model be traced once: a trace is a function of the model alone."""
    for module in _WARM:
        import_module(module)
    import torch

    from vitrm.checkpoint import Checkpoint
    from vitrm.export import pipeline
    from vitrm.export.graph.fragments import Fragments
    from vitrm.model import ViTRM

    torch.set_num_threads(1)
    if hasattr(pipeline.trace_vitrm, "traced"):
        return
    real, traced = pipeline.trace_vitrm, {}

    def trace(model: ViTRM) -> Fragments:
        key = Checkpoint(model=model.config, data={}, weights=model.state_dict()).weights_id
        if key not in traced:
            traced[key] = real(model)
        return traced[key]

    trace.traced = traced  # type: ignore[attr-defined]
    pipeline.trace_vitrm = trace


def trace(run: Path) -> None:
    """Traces a run's model here, so that no child has to."""
    from vitrm import checkpoint
    from vitrm.export import pipeline

    pipeline.trace_vitrm(checkpoint.load(run).build())  # type: ignore[arg-type]


def command(*argv: object) -> Callable[[], int]:
    """vitrm-train, vitrm-export or vitrm-bench, its words after it, as work for a child."""
    name, *words = map(str, argv)

    def work() -> int:
        import vitrm.export.cli
        import vitrm.runtime.bench.cli
        import vitrm.training.cli

        mains = {
            "vitrm-train": vitrm.training.cli.main,
            "vitrm-export": vitrm.export.cli.main,
            "vitrm-bench": vitrm.runtime.bench.cli.main,
        }
        sys.argv = [name, *words]
        return mains[name](words)

    return work


@dataclass
class Child:
    """A child on its way; `wait` ends it."""

    pid: int
    began: float
    out: IO[bytes]
    err: IO[bytes]
    pipe: int  # readable once the child has ended

    def wait(self, timeout: float) -> Ended:
        """Waits; after `timeout` seconds kills it."""
        ready, _, _ = select.select([self.pipe], [], [], timeout)
        if not ready:
            self.kill()
        _, status = os.waitpid(self.pid, 0)
        os.close(self.pipe)
        texts = []
        for file in (self.out, self.err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
            file.close()
        killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
        return Ended(code, killed, not ready, *texts, time.monotonic() - self.began)

    def kill(self, how: int = signal.SIGKILL) -> None:
        os.kill(self.pid, how)


def start(work: Callable[[], int | None], before: Callable[[], object] | None = None) -> Child:
    """Forks; the child runs `before`, then `work`, with its output in files."""
    out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115  closed by `Child.wait`
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        os.close(writing)
        return Child(pid, time.monotonic(), out, err, reading)
    code = 1
    try:
        os.close(reading)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)  # nohup's children ignore the latter
        if before:
            before()
        code = work() or 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def run(
    work: Callable[[], int | None],
    *,
    timeout: float = 120.0,
    before: Callable[[], object] | None = None,
) -> Ended:
    """Runs `work` in a child to its end."""
    return start(work, before).wait(timeout)


def together(
    works: Sequence[Callable[[], int | None]], *, timeout: float = 120.0, before: Callable[[], None] | None = None
) -> list[Ended]:
    """Runs all `works` at once, each in a child."""
    return [child.wait(timeout) for child in [start(work, before) for work in works]]


def limit(what: int, value: int) -> Callable[[], None]:
    """Sets a resource limit, as work for `before`."""
    return lambda: resource.setrlimit(what, (value, resource.getrlimit(what)[1]))


def address_space() -> int:
    """Bytes of this process's address space."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
