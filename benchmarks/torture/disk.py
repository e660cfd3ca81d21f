"""A full disk at every writer: one line, exit 2, the old files byte for byte, nothing left behind, and it works once there is room.

The disk is a tmpfs of its own where mounting is allowed; elsewhere a limit on file sizes stands in (RLIMIT_FSIZE), which
stops every large write but not a small one.
"""

from __future__ import annotations

import os
import resource
import select
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from vitrm import checkpoint
from vitrm.calib.calibration import calibrate
from vitrm.data import load
from vitrm.errors import run_command
from vitrm.runtime.halting.store_threshold import store_threshold

from . import children
from .children import Ended
from .findings import Finding, Part
from .kills import TRAIN, leftovers
from .oracle import unclean_line

SIZE = 24 << 20
LEVELS = (0.0, 0.05, 0.35, 0.7, 0.9)  # room left, as a share of what the writer needs
_FILLER = "filler"


@dataclass(frozen=True)
class Writer:
    """Something that writes into a folder."""

    name: str
    before: tuple[str, ...]  # subjects that lie there already
    work: Callable[[Path, Path], Callable[[], int | None]]  # (subjects, folder) → what writes


def _command(name: str, *words: str) -> Callable[[Path, Path], Callable[[], int | None]]:
    """A command; MADE and OUT in its words are the two folders."""

    def work(made: Path, out: Path) -> Callable[[], int | None]:
        return children.command(name, *(w.replace("MADE", str(made)).replace("OUT", str(out)) for w in words))

    return work


def _calls(do: Callable[[Path, Path], object]) -> Callable[[Path, Path], Callable[[], int | None]]:
    """A call of the library, ended as a command is."""
    return lambda made, out: lambda: run_command(lambda argv: do(made, out) and None, [])


def _calibrate(made: Path, out: Path) -> None:
    calibrate(checkpoint.load(made / "run"), 2, images=load("digits", "train").take(slice(0, 64))).save(
        out / "ranges.json"
    )


WRITERS = (
    Writer("vitrm-train", (), _command("vitrm-train", *TRAIN, "--epochs", "2", "--out", "OUT/new")),
    Writer("vitrm-export unrolled", ("unrolled.onnx",), _command("vitrm-export", "MADE/run", "--steps", "2", "-o", "OUT/unrolled.onnx")),
    Writer("vitrm-export loop", ("loop.onnx",), _command("vitrm-export", "MADE/run", "--graph", "loop", "--steps", "2", "-o", "OUT/loop.onnx")),
    Writer("vitrm-export stepwise", ("stepwise",), _command("vitrm-export", "MADE/run", "--graph", "stepwise", "--steps", "2", "-o", "OUT/stepwise")),
    Writer("vitrm-export --hf", ("hf",), _command("vitrm-export", "MADE/run", "--steps", "2", "--hf", "OUT/hf")),
    Writer("vitrm-export --triton", ("triton",), _command("vitrm-export", "MADE/unrolled.onnx", "--triton", "OUT/triton", "--triton-name", "model")),
    Writer("vitrm-export --triton, scratch there too", ("triton",), _command("vitrm-export", "MADE/run", "--steps", "3", "--halt-threshold", "0.5", "--triton", "OUT/triton", "--triton-name", "model")),
    Writer("a calibration", ("ranges.json",), _calls(_calibrate)),
    Writer("a threshold in a file", ("loop.onnx",), _calls(lambda made, out: store_threshold(out / "loop.onnx", 0.125, 2, {}))),
    Writer("a threshold in a folder", ("stepwise",), _calls(lambda made, out: store_threshold(out / "stepwise", 0.125, 2, {}))),
    Writer("vitrm-bench --json --report", (), _command("vitrm-bench", "MADE/unrolled.onnx", "--run", "MADE/run", "--batch", "1", "--limit", "8", "--seconds", "0.05", "--threads", "1", "--no-power", "--json", "OUT/b.json", "--report", "OUT/b.html")),
)  # fmt: skip


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mounts a tmpfs of `SIZE` at `folder`; whether that was allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "torture", folder], capture_output=True, check=False
    )
    try:
        yield done.returncode == 0
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", "--lazy", folder], check=True)


def disk(
    part: Part, seed: int, share: float, work: Path, repeat: Callable[[str], str], progress: Callable[[str], None]
) -> None:
    """Every writer at every level; what they find goes to `part`."""
    made = work / "subjects"
    levels = LEVELS if share >= 1 else LEVELS[2:3]
    writers = WRITERS if share >= 0.2 else WRITERS[:1] + WRITERS[7:10]
    with tempfile.TemporaryDirectory(prefix="torture-disk-") as scratch:
        for writer in writers:
            for number, level in enumerate(levels):
                place = Path(scratch) / f"{writers.index(writer)}-{number}"
                with small_disk(place) as mounted:
                    part.figures["disk"] = "a tmpfs" if mounted else "RLIMIT_FSIZE"
                    outcome, detail = _one(writer, level, made, place, mounted, number == 2)
                if outcome in ("refused", "same"):
                    part.count(outcome)
                else:
                    part.found(
                        Finding(
                            "disk", writer.name, outcome, f"room for {level:.0%}", detail[:400], repeat("--part disk")
                        )
                    )
                progress(f"{writer.name}, room for {level:.0%}: {outcome}")


def _one(writer: Writer, level: float, made: Path, disk: Path, mounted: bool, again: bool) -> tuple[str, str]:
    out = disk / "out"
    _lay(writer, made, out)
    scratch = str(disk)

    def before() -> None:
        tempfile.tempdir = scratch if "scratch" in writer.name else None
        if not mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(level * 100_000) + 1,) * 2)

    if mounted:
        needed = _peak(writer, made, out, disk, before)
        shutil.rmtree(out)
        _lay(writer, made, out)
        _fill(disk, int(level * needed))
    old = contents(out)
    ended = children.run(writer.work(made, out), before=before, timeout=300)
    new = contents(out)
    if ended.code == 0:
        return "same", ""  # it found room enough
    if fault := refused(ended):
        return fault
    if changed := [k for k in old if new.get(k) != old[k]]:
        return "lost", f"changed or gone: {changed[:5]}"
    if left := leftovers(out):
        return "lost", f"left behind: {left}"
    if again:
        (disk / _FILLER).unlink(missing_ok=True)
        words = "--resume" if writer.name == "vitrm-train" and (out / "new" / "state.safetensors").exists() else ""
        work = (
            children.command("vitrm-train", "--resume", "--threads", "1", "--out", out / "new")
            if words
            else writer.work(made, out)
        )
        ended = children.run(work, timeout=300)
        if ended.code:
            return (
                "lost",
                f"with room again, {words or 'the same command'} ends with {ended.code}: {ended.stderr.strip()[-300:]}",
            )
    return "refused", ""


def _lay(writer: Writer, made: Path, out: Path) -> None:
    out.mkdir()
    for name in writer.before:
        (shutil.copytree if (made / name).is_dir() else shutil.copy)(made / name, out / name)


def _peak(writer: Writer, made: Path, out: Path, disk: Path, before: Callable[[], None]) -> int:
    """Bytes that the writer takes at most beyond what is there, by trying with ever less room."""
    start = _used(disk)
    child = children.start(writer.work(made, out), before)
    peak = start
    while not select.select([child.pipe], [], [], 0.01)[0]:
        peak = max(peak, _used(disk))
    child.wait(10)
    return max(peak, _used(disk)) - start


def _used(disk: Path) -> int:
    found = os.statvfs(disk)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def _fill(disk: Path, room: int) -> None:
    """Fills the disk but for `room` bytes."""
    with open(disk / _FILLER, "wb") as file:
        size = max(0, SIZE - _used(disk) - room)
        with suppress(OSError):
            os.posix_fallocate(file.fileno(), 0, size) if size else None


def contents(folder: Path) -> dict[str, bytes]:
    """All files below `folder`."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(ended: Ended) -> tuple[str, str] | None:
    """None for a command that refused in one line, with exit 2; else what it did, and with which words."""
    if ended.timed_out:
        return "hang", "no end"
    if ended.signal:
        return "crash", f"signal {ended.signal}: {ended.stderr.strip()[-300:]}"
    if ended.tracebacks:
        return "traceback", " / ".join(ended.stderr.strip().splitlines()[-3:])
    if ended.code != 2:
        return "contract", f"exit {ended.code}: {ended.stderr.strip()[-300:]}"
    lines = ended.stderr.splitlines(keepends=True)
    if len(lines) != 1 or (fault := unclean_line(lines[0])):
        return "message", f"{len(lines)} lines: {ended.stderr.strip()[-300:]}" if len(lines) != 1 else fault
    return None
