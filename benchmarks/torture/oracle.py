"""Judges what the product makes of an input: the same answers, a refusal in one line, or a finding.

Cases run in a forked worker, one after the other: a crash, a hang or a burst of memory costs one case and not the run.
Time is the worker's CPU time, so that a busy machine makes no hangs; one that sleeps (waits for a FIFO) without using any
is given a few seconds.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitrm.errors import UserError, run_command

from .children import MIB, address_space

if TYPE_CHECKING:
    from .formats import Format
    from .mutations import Done

CPU_LIMIT = 20.0  # seconds of CPU time for one input
IDLE_LIMIT = 12.0  # seconds asleep without using any
RSS_LIMIT = 600 * MIB  # more than before the case
SPACE = 2 << 30  # address space beyond what the worker has when it starts
_TICK = os.sysconf("SC_CLK_TCK")

Answers = Mapping[str, Any]


class Violation(Exception):
    """An input was accepted that must not be, or something was written that must not be: (kind, what)."""


@dataclass(frozen=True)
class Verdict:
    """What one case came to."""

    index: int
    outcome: str  # of findings.GOOD and findings.KINDS
    mutation: str
    detail: str = ""
    cpu: float = 0.0  # seconds
    grown: int = 0  # bytes of resident memory at the peak, beyond what was there


def judge(fmt: Format, indices: list[int], seed: int, subjects: Path) -> Iterator[Verdict]:
    """Verdicts over the cases `indices` of a format, in order."""
    left = list(indices)
    while left:
        reading, writing = os.pipe()
        sys.stdout.flush()
        pid = os.fork()
        if not pid:
            os.close(reading)
            _work(fmt, left, seed, subjects, writing)
        os.close(writing)
        done = 0
        for verdict in _watch(pid, reading, left):
            done += 1
            yield verdict
        left = left[done:]


def _watch(pid: int, reading: int, indices: list[int]) -> Iterator[Verdict]:
    """What the worker says; a last verdict for the case that it did not survive."""
    buffer, current, mutation, remade = b"", -1, "", False
    cpu = last = _cpu(pid)
    awake = time.monotonic()  # when it last used CPU time, or wanted to
    hung = ""
    while True:
        ready, _, _ = select.select([reading], [], [], 0.5)
        if ready:
            block = os.read(reading, 1 << 16)
            if not block:
                break
            buffer += block
            *lines, buffer = buffer.split(b"\n")
            for line in lines:
                said = json.loads(line)
                if "outcome" in said:
                    yield Verdict(**said)
                    current = -1
                else:
                    current, mutation, remade = said["index"], said["mutation"], said["remade"]
                    cpu, awake = _cpu(pid), time.monotonic()
        now = _cpu(pid)
        if now != last or _state(pid) != "S":
            last, awake = now, time.monotonic()
        used, asleep = now - cpu, time.monotonic() - awake
        if current >= 0 and (used > CPU_LIMIT or asleep > IDLE_LIMIT):
            hung = f"{used:.0f} s of CPU time, " + (
                f"then asleep for {asleep:.0f} s" if asleep > IDLE_LIMIT else "and no end"
            )
            os.kill(pid, signal.SIGKILL)
            current_hung = current
            break
    _, status = os.waitpid(pid, 0)
    os.close(reading)
    if hung:
        yield Verdict(current_hung, "hang", mutation, hung)
    elif current >= 0:
        how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"
        yield Verdict(current, "backend" if remade else "crash", mutation, f"the process ended by {how}")
    elif os.WIFSIGNALED(status) or os.WEXITSTATUS(status):
        raise RuntimeError(f"the worker ended between cases with status {status}")


def _stat(pid: int) -> list[str]:
    """What the system says of a process, from its state on."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return ["X", *["0"] * 40]


def _state(pid: int) -> str:
    return _stat(pid)[0]


def _cpu(pid: int) -> float:
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / _TICK


def _work(fmt: Format, indices: list[int], seed: int, subjects: Path, writing: int) -> None:
    """The worker: never returns."""
    code, own = 1, 2
    try:
        faulthandler.disable()  # a crash is reported, not shown
        own, null = os.dup(2), os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        sys.stdout = sys.stderr = io.StringIO()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        whole = _answers(fmt, subjects, None)
        resource.setrlimit(resource.RLIMIT_AS, (address_space() + SPACE,) * 2)
        for index in indices:
            os.write(writing, (json.dumps(_case(fmt, index, seed, subjects, whole, writing)) + "\n").encode())
        code = 0
    except BaseException:
        os.write(own, traceback.format_exc().encode())  # the torture's own fault
    finally:
        os._exit(code)


def _answers(fmt: Format, subjects: Path, mutate: Callable[[Path], None] | None) -> Answers:
    with tempfile.TemporaryDirectory(prefix="torture-") as scratch:
        folder = Path(scratch)
        fmt.prepare(subjects, folder)
        return fmt.read(folder)


def _case(fmt: Format, index: int, seed: int, subjects: Path, whole: Answers, writing: int) -> dict[str, Any]:
    """One case, as the fields of its verdict."""
    scratch = Path(tempfile.mkdtemp(prefix="torture-"))
    mutation = "?"
    try:
        fmt.prepare(subjects, scratch)
        done = fmt.mutate(scratch, random.Random(f"{seed}/{fmt.name}/{index}"))
        mutation, remade = done.what[:200], done.resealed and fmt.name.startswith(("onnx", "stepwise"))
        os.write(writing, (json.dumps({"index": index, "mutation": mutation, "remade": remade}) + "\n").encode())
        before, cpu = _reset_peak(), time.process_time()
        outcome, detail = _outcome(fmt, scratch, whole, done)
        used, grown = time.process_time() - cpu, _peak() - before
        if outcome in ("same", "altered", "refused") and grown > RSS_LIMIT:
            outcome, detail = "memory", f"{grown // MIB} MiB more, then {outcome} {detail}"
    finally:
        # Folders may have been closed to us, and what is in them be anything.
        shutil.rmtree(scratch, ignore_errors=True)
    return {
        "index": index,
        "outcome": outcome,
        "mutation": mutation,
        "detail": detail.replace(str(scratch), "…")[:500],
        "cpu": round(used, 3),
        "grown": grown,
    }


def _outcome(fmt: Format, scratch: Path, whole: Answers, done: Done) -> tuple[str, str]:
    try:
        found = fmt.read(scratch)
    except UserError as error:
        fault = unclean(error)
        return ("message", fault) if fault else ("refused", str(error))
    except Violation as error:
        return error.args[0], error.args[1]
    except MemoryError as error:
        return "memory", f"MemoryError: {error} at {_where(error)}"
    except BaseException as error:
        return "traceback", f"{type(error).__name__} at {_where(error)}: {' '.join(str(error).split())[:200]}"
    changed = [k for k in whole if k not in found or not _equal(whole[k], found[k])]
    if done.refuse:
        return "contract", "accepted"
    if not changed:
        return "same", ""
    sealed = [k for k in changed if k in fmt.sealed and not done.resealed]
    return ("damage", f"accepted with other {', '.join(sealed)}") if sealed else ("altered", ", ".join(changed))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and one.dtype == other.dtype and np.array_equal(one, other, equal_nan=True)
    return bool(one == other)


def unclean(error: UserError) -> str:
    """Why the line that a command prints for `error` is not one clean line; empty if it is."""

    def fail(argv: object) -> int:
        raise error

    before = signal.getsignal(signal.SIGTERM)
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        code = run_command(fail, [])
    signal.signal(signal.SIGTERM, before)
    return unclean_line(printed.getvalue()) if code == 2 else f"exit {code}"


def unclean_line(text: str) -> str:
    """Why `text` is not one printable line of bearable length; empty if it is."""
    line = text.removesuffix("\n")
    if control := re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]", line):
        return f"control character {control[0]!r} in: {line[:200]!r}"
    if len(line) > 3000:
        return f"{len(line)} characters: {line[:120]!r}…"
    return "" if line.startswith("error") else f"not an error line: {line[:200]!r}"


def _where(error: BaseException) -> str:
    """The innermost place in the product, and the innermost of all."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if re.search(r"/(vitrm|export|runtime|calib)/\w+\.py$", f.filename)]
    places = dict.fromkeys(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in (*own[-1:], *frames[-1:]))
    return " > ".join(places)


def _reset_peak() -> int:
    """Starts the count of the resident set's peak anew; bytes resident now."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return _peak()


def _peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0
