"""Threads and forks on one session, and two commands on one target."""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import vitrm.runtime
from vitrm import checkpoint
from vitrm.calib.calibration import calibrate, load_calibration
from vitrm.data import load
from vitrm.errors import UserError
from vitrm.runtime.backends.eager import EagerSession
from vitrm.runtime.halting.store_threshold import store_threshold
from vitrm.runtime.session import Session

from . import children, subjects
from .children import Ended
from .disk import refused
from .findings import Finding, Part
from .kills import TRAIN, _answers, fingerprint, leftovers, same

THREADS = 8
ARTIFACTS = ("unrolled.onnx", "loop.onnx", "stepwise", "int8.onnx")
Found = Callable[[str, str, str, str], None]


def concurrency(
    part: Part, seed: int, share: float, work: Path, repeat: Callable[[str], str], progress: Callable[[str], None]
) -> None:
    """Every scene; what they find goes to `part`."""
    made = work / "subjects"
    dice = random.Random(f"{seed}/concurrency")

    def found(subject: str, kind: str, case: str, detail: str) -> None:
        part.found(Finding("concurrency", subject, kind, case, detail[:400], repeat("--part concurrency")))

    calls = 0
    for name in (*ARTIFACTS, "eager"):
        if name == "eager" or (made / name).exists():
            calls += _threads(part, made, name, max(4, round(40 * share)), found)
            progress(f"{THREADS} threads on {name}")
    for name in ARTIFACTS:
        if (made / name).exists():
            _forks(part, made, name, found)
            progress(f"forks of {name}")
    part.figures = {"threads": THREADS, "calls in threads": calls}
    rounds = max(1, round(5 * share))
    scenes = (_trains, _resumes, _exports, _additions, _calibrations, _thresholds)
    for scene in scenes if share >= 0.2 else scenes[3:]:
        for number in range(rounds):
            with tempfile.TemporaryDirectory(prefix="torture-crowd-") as scratch:
                scene(part, made, Path(scratch), dice, found)
            progress(f"{scene.__name__.strip('_')}: {number + 1} of {rounds}")


def _open(made: Path, name: str, threads: int = 1) -> Session:
    if name == "eager":
        return EagerSession(checkpoint.load(made / "run"), steps=subjects.STEPS, halt_threshold=0.5, threads=threads)
    return vitrm.runtime.open(made / name, threads=threads)


def _threads(part: Part, made: Path, name: str, each: int, found: Found) -> int:
    session = _open(made, name)
    batches = [subjects.images(48)[i : i + 1 + i % 5] for i in range(each)]
    expected = [session.infer(b) for b in batches]
    wrong: list[str] = []
    barrier = threading.Barrier(THREADS)

    def work(number: int) -> None:
        order = np.random.default_rng(number).integers(len(batches), size=each)
        barrier.wait()
        try:
            for i in order:
                now = session.infer(batches[i])
                if not np.array_equal(now.logits, expected[i].logits) or not np.array_equal(
                    now.steps_used, expected[i].steps_used
                ):
                    wrong.append(f"thread {number}, batch {i}: other answers than alone")
        except Exception as error:
            wrong.append(f"thread {number}: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    if any(thread.is_alive() for thread in threads):
        wrong.append("a thread does not end")
    if wrong:
        found(name, "different", f"{THREADS} threads on one session", wrong[0])
    else:
        part.count("same")
    return THREADS * each


def _forks(part: Part, made: Path, name: str, found: Found) -> None:
    """Both sides of a fork go on with a session that was opened, and used, before it."""
    images = subjects.images(5)

    def work() -> int:
        session = _open(made, name, threads=2)
        expected = session.infer(images)
        pid = os.fork()
        code = 0 if np.array_equal(session.infer(images).logits, expected.logits) else 3
        if not pid:
            os._exit(code)
        _, status = os.waitpid(pid, 0)
        return code or os.waitstatus_to_exitcode(status)

    ended = children.run(work, timeout=60)
    if ended.code == 0:
        part.count("same")
    else:
        kind = "hang" if ended.timed_out else "different" if ended.code == 3 else "crash"
        found(
            name,
            kind,
            "used on both sides of a fork",
            f"exit {ended.code}, signal {ended.signal} {ended.stderr[-200:]}",
        )


def _one_each(ended: list[Ended], subject: str, case: str, found: Found, exactly: int | None = None) -> bool:
    """Whether every command ended well or refused in one line, and at least (or exactly) so many well."""
    good = True
    for one in ended:
        if (one.code or one.tracebacks or one.signal) and (fault := refused(one)):
            found(subject, fault[0], case, fault[1])
            good = False
    well = sum(one.code == 0 for one in ended)
    if (exactly is not None and well != exactly) or not well:
        said = "; ".join(one.stderr.strip()[-150:] for one in ended if one.code)
        found(subject, "lost", case, f"{well} of {len(ended)} ended well, expected {exactly or 'at least 1'}: {said}")
        good = False
    return good


def _gate(target: Path, processes: int) -> Callable[[], None]:
    """Work for a child's start: its first temporary file for `target` waits until all `processes` have come as far.

    So they meet where races are.  One that is turned away before never comes: the others wait two seconds at most.
    """
    arrived = target.parent / "arrived"
    arrived.mkdir(exist_ok=True)
    waited = False

    def watch(event: str, args: tuple[object, ...]) -> None:
        nonlocal waited
        if event == "tempfile.mkstemp" and not waited and str(target) in str(args[0]):
            waited = True
            (arrived / str(os.getpid())).touch()
            end = time.monotonic() + 2
            while len(list(arrived.iterdir())) < processes and time.monotonic() < end:
                time.sleep(0.01)

    return lambda: sys.addaudithook(watch)


def _trains(part: Part, made: Path, folder: Path, dice: random.Random, found: Found) -> None:
    """Two trainings into one folder: one trains, the other is told so; the run is as if it had been alone."""
    argv = ("vitrm-train", *TRAIN, "--epochs", "4", "--out")
    children.run(children.command(*argv, folder / "alone"))
    work = children.command(*argv, folder / "run")
    ended = children.together([work] * 2, before=_gate(folder / "run", 2))
    if _one_each(ended, "vitrm-train", "two into one folder", found, exactly=1):
        if fingerprint(folder / "run") != fingerprint(folder / "alone"):
            found("vitrm-train", "different", "two into one folder", "the run is not as it would have been alone")
        else:
            part.count("same")


def _resumes(part: Part, made: Path, folder: Path, dice: random.Random, found: Found) -> None:
    """Two --resume of one run that was stopped, beside someone who reads it."""
    run = folder / "run"
    argv = ("vitrm-train", *TRAIN, "--epochs", "4", "--out")
    children.run(children.command(*argv, folder / "alone"))
    child = children.start(children.command(*argv, run))
    child.wait(1.5 + dice.random())
    if not (run / "state.safetensors").exists():
        return
    resume = children.command("vitrm-train", "--resume", "--threads", "1", "--save-every", "0", "--out", run)
    ended = children.together([resume] * 2, before=_gate(run, 2))
    # Where the first has finished before the second looks, both end well.
    if _one_each(ended, "vitrm-train --resume", "twice at once", found):
        if fingerprint(run) != fingerprint(folder / "alone"):
            found("vitrm-train --resume", "different", "twice at once", "the run is not as it would have been alone")
        else:
            part.count("same")


def _exports(part: Part, made: Path, folder: Path, dice: random.Random, found: Found) -> None:
    """Two exports, of different depth, to one file, and to one folder: it is the one or the other."""
    for name, more in (("a.onnx", ()), ("a", ("--graph", "stepwise"))):
        works = [
            children.command("vitrm-export", made / "run", "--steps", s, *more, "-o", folder / name) for s in (2, 3)
        ]
        if not _one_each(children.together(works), "vitrm-export", f"two to one {'folder' if more else 'file'}", found):
            continue
        session = vitrm.runtime.open(folder / name)
        m = session.metadata
        alone = children.run(
            children.command("vitrm-export", made / "run", "--steps", m.steps, *more, "-o", folder / f"alone-{name}")
        )
        left = leftovers(folder)
        if alone.code or not same(_answers(folder / name), _answers(folder / f"alone-{name}")):
            found("vitrm-export", "different", "two at once", "the file answers otherwise than one exported alone")
        elif left:
            found("vitrm-export", "lost", "two at once", f"left behind: {left}")
        else:
            part.count("same")


def _additions(part: Part, made: Path, folder: Path, dice: random.Random, found: Found) -> None:
    """Three additions to one model of a repository, which is there or not: as many versions as ended well, all whole."""
    for there in (False, True):
        repository = folder / f"repository-{there}"
        add = children.command("vitrm-export", made / "unrolled.onnx", "--triton", repository, "--triton-name", "model")
        if there:
            children.run(add)
        ended = children.together([add] * 3)
        if not _one_each(ended, "vitrm-export --triton", "three at once", found):
            continue
        versions = sorted(p.name for p in (repository / "model").iterdir() if p.is_dir())
        expected = sum(one.code == 0 for one in ended) + there
        broken = [v for v in versions if not (repository / "model" / v / "model.onnx").is_file()]
        if len(versions) != expected or broken or leftovers(repository):
            found(
                "vitrm-export --triton",
                "lost",
                "three at once",
                f"versions {versions} (broken {broken}), expected {expected}; {leftovers(repository)}",
            )
        else:
            part.count("same")


def _calibrations(part: Part, made: Path, folder: Path, dice: random.Random, found: Found) -> None:
    """Two calibrations, of different depth, into one file."""
    run, some = checkpoint.load(made / "run"), load("digits", "train").take(slice(0, 64))

    def work(steps: int) -> Callable[[], int]:
        def do() -> int:
            calibrate(run, steps, images=some).save(folder / "ranges.json")
            return 0

        return do

    children.together([work(2), work(3)])
    for steps in (2, 3):
        try:
            load_calibration(folder / "ranges.json", run, steps)
        except UserError:
            continue
        part.count("same")
        return
    found("calibration", "lost", "two into one file", "it is neither")


def _thresholds(part: Part, made: Path, folder: Path, dice: random.Random, found: Found) -> None:
    """Four processes that store thresholds in one artifact, ten times each."""
    for name in ("loop.onnx", "stepwise"):
        (shutil.copytree if (made / name).is_dir() else shutil.copy)(made / name, folder / name)

        def work(number: int, name: str = name) -> Callable[[], int]:
            def do() -> int:
                for _ in range(10):
                    store_threshold(folder / name, 0.1 * number, number, {})
                return 0

            return do

        ended = children.together([work(n) for n in range(1, 5)])
        bad = [e.stderr.strip().splitlines()[-1] for e in ended if e.code]
        m = vitrm.runtime.open(folder / name).metadata
        if bad or abs(m.halt_threshold - 0.1 * m.steps) > 1e-9 or leftovers(folder):
            found(
                "a threshold stored",
                "lost",
                f"four at once in {name}",
                f"{bad} {m.halt_threshold} {m.steps} {leftovers(folder)}",
            )
        else:
            part.count("same")
