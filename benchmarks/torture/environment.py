"""Hostile surroundings: locale, HOME, streams, permissions, descriptors, memory, umask, names.

A command must do its work, or say in one line why it cannot.  What it is asked for is written before anything is printed,
so that no broken stream costs a result.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from . import children, subjects
from .children import MIB, Ended
from .disk import contents, refused
from .findings import Finding, Part
from .kills import TRAIN, leftovers

EXPORT = ("vitrm-export", "MADE/run", "--steps", "2", "-o", "OUT/a.onnx")
BENCH = ("vitrm-bench", "MADE/unrolled.onnx", "--run", "MADE/run", "--batch", "1", "--limit", "8", "--seconds", "0.05",
         "--threads", "1", "--no-power", "--json", "OUT/b.json", "--report", "OUT/b.html")  # fmt: skip
TRAINING = ("vitrm-train", *TRAIN, "--epochs", "1", "--out", "OUT/run")
TRITON = ("vitrm-export", "MADE/run", "--steps", "2", "--triton", "OUT/triton")
COMMANDS = {"export": EXPORT, "bench": BENCH, "train": TRAINING, "triton": TRITON}
RESULTS = {
    "export": ("a.onnx",),
    "bench": ("b.json", "b.html"),
    "train": ("run/model.safetensors", "run/config.json"),
    "triton": ("triton",),
}


@dataclass(frozen=True)
class Act:
    """A command in some surroundings."""

    name: str
    command: str  # of COMMANDS
    before: Callable[[], object] = lambda: None
    environment: dict[str, str | None] = field(default_factory=dict)  # None: unset
    anew: bool = False  # needs a process of its own, as the interpreter reads these surroundings when it starts
    must: str = "work"  # "work", "refuse" or "either"
    quiet: bool = False  # output is lost, so only the files count


def _close(*descriptors: int) -> Callable[[], None]:
    def close() -> None:
        for descriptor in descriptors:
            os.close(descriptor)

    return close


def _to(path: str, *descriptors: int) -> Callable[[], None]:
    def redirect() -> None:
        opened = os.open(path, os.O_WRONLY)
        for descriptor in descriptors:
            os.dup2(opened, descriptor)

    return redirect


def _broken_pipe() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)


def _nowhere() -> None:
    folder = tempfile.mkdtemp()
    os.chdir(folder)
    os.rmdir(folder)


def _space(mib: int) -> Callable[[], None]:
    """Address space for so much more than the process has; of a new process, for so much in all."""
    return lambda: resource.setrlimit(resource.RLIMIT_AS, (children.address_space() + mib * MIB,) * 2)


def acts() -> list[Act]:
    """All of them."""
    found = []
    c_locale: dict[str, str | None] = {"LC_ALL": "C", "LANG": None, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for name in ("export", "bench", "train"):
        found += [
            Act("locale C, ASCII streams", name, environment={**c_locale, "PYTHONIOENCODING": "ascii"}, anew=True),
            Act("no HOME, nor a writable place for caches", name, environment={"HOME": None, "XDG_CACHE_HOME": "/nonexistent", "MPLCONFIGDIR": None}, anew=True),
            Act("standard input closed", name, _close(0)),
            Act("standard output closed", name, _close(1), anew=True, quiet=True),
            Act("standard error closed", name, _close(2), anew=True, quiet=True),
            Act("all three closed", name, _close(0, 1, 2), anew=True, quiet=True),
            Act("output to /dev/full", name, _to("/dev/full", 1), anew=True, must="either", quiet=True),
            Act("output and errors to /dev/full", name, _to("/dev/full", 1, 2), anew=True, must="either", quiet=True),
            Act("a pipe that nobody reads", name, _broken_pipe, anew=True, must="either", quiet=True),
            Act("umask 777", name, lambda: os.umask(0o777)),
            Act("umask 0", name, lambda: os.umask(0)),
            Act("a working folder that is gone", name, _nowhere, must="either"),
            Act("24 file descriptors", name, children.limit(resource.RLIMIT_NOFILE, 24), must="either"),
            Act("20 MiB of memory more", name, _space(20), must="either"),
            Act("120 MiB of memory more", name, _space(120), must="either"),
            Act("400 MiB of memory more", name, _space(400), must="either"),
            Act("small stacks", name, children.limit(resource.RLIMIT_STACK, 256 << 10), must="either"),
        ]  # fmt: skip
    found += [
        Act("TMPDIR missing", "triton", environment={"TMPDIR": "/nonexistent"}, anew=True),
        Act("TMPDIR missing", "export", environment={"TMPDIR": "/nonexistent"}, anew=True),
        Act("TERM and COLUMNS absurd", "bench", environment={"TERM": "\x1b", "COLUMNS": "-3", "LINES": "x"}, anew=True),
        Act("a GPU asked for that is not there", "export", environment={"CUDA_VISIBLE_DEVICES": "7"}, anew=True),
        Act("OMP_NUM_THREADS absurd", "export", environment={"OMP_NUM_THREADS": "x,-1"}, anew=True),
    ]
    return found


def environment(
    part: Part, seed: int, share: float, work: Path, repeat: Callable[[str], str], progress: Callable[[str], None]
) -> None:
    """Every act; what they find goes to `part`."""
    made = work / "subjects"
    chosen = acts()
    if share < 1:
        # A small run takes those that start in milliseconds.
        chosen = [a for a in chosen if not a.anew and a.command == "export"][: max(2, round(len(chosen) * share))]

    def found(act: str, kind: str, detail: str, name: str) -> None:
        part.found(Finding("environment", name, kind, act, detail[:400], repeat("--part environment")))

    for number, act in enumerate(chosen):
        with tempfile.TemporaryDirectory(prefix="torture-env-") as scratch:
            out = Path(scratch) / "out"
            out.mkdir()
            ended = _do(act, made, out)
            if fault := _fault(act, ended, out):
                found(act.name, *fault, act.command)
            else:
                part.count("same" if ended.code == 0 else "refused")
        progress(f"{number + 1} of {len(chosen)}: {act.command}, {act.name}")
    if share >= 1:
        for scene in (_read_only, _hang_up, _strange_names):
            scene(part, made, found)
            progress(scene.__name__.strip("_"))


def _words(command: str, made: Path, out: Path) -> list[str]:
    return [w.replace("MADE", str(made)).replace("OUT", str(out)) for w in COMMANDS[command]]


def _do(act: Act, made: Path, out: Path) -> Ended:
    words = _words(act.command, made, out)
    if not act.anew:
        return children.run(children.command(*words), before=act.before, timeout=300)
    environment = {**os.environ, **act.environment}
    return anew(words, {k: v for k, v in environment.items() if v is not None}, act.before)


def anew(words: list[str], environment: dict[str, str], before: Callable[[], object] = lambda: None) -> Ended:
    """A command in a process of its own."""
    module = {
        "vitrm-train": "vitrm.training.cli",
        "vitrm-export": "vitrm.export.cli",
        "vitrm-bench": "vitrm.runtime.bench.cli",
    }[words[0]]
    began = time.monotonic()
    with tempfile.TemporaryFile() as one, tempfile.TemporaryFile() as two:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *words[1:]], env=environment, stdin=subprocess.DEVNULL, stdout=one, stderr=two, preexec_fn=before
        )  # fmt: skip
        try:
            code, late = process.wait(300), False
        except subprocess.TimeoutExpired:
            process.kill()
            code, late = process.wait(), True
        texts = []
        for file in (one, two):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
    return Ended(code if code >= 0 else None, -code if code < 0 else None, late, *texts, time.monotonic() - began)


def _fault(act: Act, ended: Ended, out: Path) -> tuple[str, str] | None:
    """What is wrong with how a command ended, and what it left."""
    missing = [name for name in RESULTS[act.command] if not (out / name).exists()]
    said = " / ".join(ended.stderr.strip().splitlines()[-3:])
    if ended.timed_out:
        return "hang", "no end"
    if ended.signal:
        return "crash", f"signal {ended.signal}: {said}"
    if ended.tracebacks or "Exception ignored" in ended.stderr:
        return "traceback", said
    if left := leftovers(out):
        return "lost", f"left behind: {left}"
    if act.quiet:
        # Nobody hears what it says; what it was asked for must be there.
        return ("lost", f"exit {ended.code}, without {', '.join(missing)}: {said}") if missing else None
    if ended.code == 0:
        return ("lost", f"exit 0 without {', '.join(missing)}") if missing else None
    if act.must == "work":
        return "contract", f"exit {ended.code}: {said}"
    return refused(ended)


Found = Callable[[str, str, str, str], None]


def _read_only(part: Part, made: Path, found: Found) -> None:
    """A folder that cannot be written: a read-only bind mount where mounting is allowed, else permissions."""
    for name in COMMANDS:
        with tempfile.TemporaryDirectory(prefix="torture-env-") as scratch:
            out = Path(scratch) / "out"
            out.mkdir()
            mounted = subprocess.run(["mount", "--bind", out, out], capture_output=True, check=False).returncode == 0
            if mounted:
                subprocess.run(["mount", "-o", "remount,ro,bind", out], check=True)
            elif os.geteuid():
                out.chmod(0o555)
            else:
                part.skipped.append("a read-only folder: root ignores permissions, and mounting is not allowed")
                return
            try:
                ended = children.run(children.command(*_words(name, made, out)), timeout=300)
            finally:
                subprocess.run(["umount", out], check=True) if mounted else out.chmod(0o755)
            if fault := refused(ended):
                found("a read-only folder", *fault, name)
            else:
                part.count("refused")


def _hang_up(part: Part, made: Path, found: Found) -> None:
    """The terminal is gone (SIGHUP) or the machine shuts down (SIGTERM) in the midst of training: the state is saved."""
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
        with tempfile.TemporaryDirectory(prefix="torture-env-") as scratch:
            out = Path(scratch) / "run"
            words = ("vitrm-train", *subjects.RUN, "--epochs", "300", "--save-every", "3600", "--out", out)
            child = children.start(children.command(*words))
            end = time.monotonic() + 120
            while not (out / "metrics.jsonl").exists() and time.monotonic() < end:
                time.sleep(0.05)
            time.sleep(1.0)
            child.kill(number)
            ended = child.wait(60)
            name = signal.Signals(number).name
            if ended.signal or ended.tracebacks or "the state is saved" not in ended.stderr:
                found(name, "lost", f"exit {ended.code}, signal {ended.signal}: {ended.stderr.strip()[-200:]}", "train")
                continue
            again = children.start(children.command("vitrm-train", "--resume", "--out", out))
            time.sleep(3)
            again.kill(signal.SIGINT)
            ended = again.wait(60)
            if "goes on after" not in ended.stdout:
                found(f"--resume after {name}", "lost", f"{ended.stdout[-200:]} {ended.stderr[-200:]}", "train")
            else:
                part.count("same")


def _strange_names(part: Part, made: Path, found: Found) -> None:
    """Files and folders called what nobody would call them."""
    names = (
        "a\nb",
        "\x1b[2J",
        "[bold red]",
        os.fsdecode(b"\xff\xfe"),
        "é ü",
        "-o",
        "a" * 240,
        "a" * 300,
        "$(id)",
        "x;y",
        "'",
    )
    for name in names:
        with tempfile.TemporaryDirectory(prefix="torture-env-") as scratch:
            folder = Path(scratch)
            with contextlib.suppress(OSError):
                shutil.copytree(made / "run", folder / f"{name}run")
            before = contents(folder)
            here = str(folder) + "/"
            tries = {
                "export": ("vitrm-export", f"{here}{name}run", "--steps", "2", "-o", f"{here}{name}.onnx"),
                "bench": ("vitrm-bench", f"{here}{name}.onnx", "--run", f"{here}{name}run", "--batch", "1", "--limit", "8",
                          "--seconds", "0.05", "--threads", "1", "--no-power", "--json", f"{here}{name}.json"),
                "train": ("vitrm-train", "--resume", "--out", f"{here}{name}run"),
            }  # fmt: skip
            for command, words in tries.items():
                ended = children.run(children.command(*words), timeout=300)
                shown = repr(name if len(name) < 30 else f"{name[:3]}… × {len(name)}")
                if ended.code == 0 and not ended.tracebacks and "\x1b[2J" not in ended.stdout + ended.stderr:
                    part.count("same")
                elif "\x1b[2J" in ended.stdout + ended.stderr:
                    found(
                        f"called {shown}",
                        "message",
                        "its name reaches the terminal as it is, with its control codes",
                        command,
                    )
                elif fault := refused(ended):
                    found(f"called {shown}", *fault, command)
                else:
                    part.count("refused")
            after = contents(folder)
            if any(after.get(k) != v for k, v in before.items() if "metrics" not in k and "curve" not in k):
                found(f"called {name!r}", "lost", "a file of the run was changed", "export")
