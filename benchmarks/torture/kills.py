"""SIGKILL at seeded random times, and before chosen file operations; afterwards everything is whole or absent.

A child is killed from outside after a random time, or by itself: an audit hook (PEP 578) sees every open, rename, remove
and mkdir below the target, and the child dies before the one that was drawn.  Nothing of the product is replaced.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vitrm.runtime
from vitrm import checkpoint
from vitrm.calib.calibration import calibrate, load_calibration
from vitrm.data import load
from vitrm.errors import UserError
from vitrm.runtime.artifact.plan_sidecar import read_sidecar
from vitrm.runtime.halting.store_threshold import store_threshold
from vitrm.system.files import atomic_files
from vitrm.training.run_folder import state as training_state
from vitrm.training.run_folder.state import STATE_FILE

from . import children, subjects
from .children import Ended
from .findings import Finding, Part
from .oracle import unclean_line

TRAIN = (*subjects.RUN, "--limit-train", "256", "--batch-size", "32", "--save-every", "0")
EPOCHS = 8
SMALL = 0.1  # a share of a run below this takes seconds: what is dear stays out
_SMALL_SCENES = ("training", "export unrolled", "a threshold stored in a folder", "a plan and its side-car")
TIMES = ("seconds", "images_per_s")
_OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate", "shutil.rmtree")


def before_operation(folder: Path, number: int) -> Callable[[], None]:
    """Work for a child's start: it kills itself before its `number`-th file operation below `folder`."""
    inside = os.fspath(folder)
    done = 0

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal done
        if event in _OPERATIONS and any(
            isinstance(a, (str, bytes, os.PathLike)) and inside in os.fsdecode(a) for a in args[:2]
        ):
            done += 1
            if done == number:
                os.kill(os.getpid(), signal.SIGKILL)

    return lambda: sys.addaudithook(watch)


@dataclass
class Killer:
    """Draws how the next child dies."""

    dice: random.Random
    part: Part
    seconds: float = 1.0  # what the work takes undisturbed
    operations: int = 40  # and about how many file operations

    def kill(self, work: Callable[[], int | None], folder: Path) -> tuple[Ended, str]:
        """Runs `work` until it is killed, or has ended before that; how, in words."""
        if self.dice.random() < 0.6:
            number = self.dice.randrange(1, self.operations + 1)
            return children.run(
                work, before=before_operation(folder, number), timeout=300
            ), f"before file operation {number}"
        after = self.dice.uniform(0, self.seconds)
        child = children.start(work)
        time.sleep(after)
        child.kill()
        return child.wait(10), f"after {after:.2f} s"


def kills(
    part: Part, seed: int, share: float, work: Path, repeat: Callable[[str], str], progress: Callable[[str], None]
) -> None:
    """All scenes; what they find goes to `part`."""
    made = work / "subjects"
    scenes: list[tuple[str, int, Callable[..., int]]] = [
        ("training", 44, _training),
        ("export unrolled", 8, _export("unrolled.onnx", "--halt-threshold", "0.5")),
        ("export loop", 8, _export("loop.onnx", "--graph", "loop")),
        ("export stepwise", 8, _export("stepwise", "--graph", "stepwise")),
        ("export for Hugging Face", 6, _export("hf", "--hf")),
        ("adding to Triton's repository", 6, _triton),
        ("calibration", 10, _calibration),
        ("a threshold stored in a file", 10, _threshold("loop.onnx")),
        ("a threshold stored in a folder", 10, _threshold("stepwise")),
        ("a plan and its side-car", 10, _pair),
        ("reading while a writer is killed", 10, _reading),
        ("commands started anew", 4, _processes),
    ]
    if share < SMALL:
        scenes = [scene for scene in scenes if scene[0] in _SMALL_SCENES]
    by_scene = {}
    for name, count, scene in scenes:
        dice = random.Random(f"{seed}/kills/{name}")
        killer = Killer(dice, part)
        wanted = max(1, round(count * share))
        with tempfile.TemporaryDirectory(prefix="torture-kill-") as scratch:

            def found(kind: str, case: str, detail: str, name: str = name) -> None:
                # Kills are counted below: what they lead to is no case more.
                part.found(Finding("kills", name, kind, case, detail[:400], repeat("--part kills")), cases=0)

            killed = scene(
                killer, wanted, made, Path(scratch), found, lambda text, name=name: progress(f"{name}: {text}")
            )
        by_scene[name] = killed
        part.count("killed", killed)
        progress(f"{name}: {killed} kills")
    part.figures = {"kills": sum(by_scene.values()), "by scene": by_scene}


Found = Callable[[str, str, str], None]


def leftovers(folder: Path) -> list[str]:
    """What nobody asked for: hidden files, temporary ones."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.name.startswith(".") or ".tmp" in p.name)


def age(folder: Path) -> None:
    """Makes what a kill left look minutes old: what has no lock yet may be another writer's that is just being made."""
    then = time.time() - 120
    for path in folder.rglob(".*"):
        with suppress(OSError):
            os.utime(path, (then, then), follow_symlinks=False)


def ends_well(ended: Ended, found: Found, case: str) -> bool:
    """Whether a command ended with 0; a finding if not."""
    if ended.code == 0 and not ended.tracebacks:
        return True
    kind = "hang" if ended.timed_out else "crash" if ended.signal else "traceback" if ended.tracebacks else "lost"
    found(kind, case, f"exit {ended.code}, signal {ended.signal}: {ended.stderr.strip().splitlines()[-1:]}")
    return False


def fingerprint(folder: Path) -> dict[str, Any]:
    """What must be equal in the end, bit for bit."""
    header = training_state.read_header(folder / STATE_FILE)
    _, tensors = training_state.read(folder / STATE_FILE, header["identity"])
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = checkpoint.load(folder)
    return {
        "weights": found.weights_id,
        "state": {k: v.numpy().tobytes() for k, v in tensors.items()},
        "metrics": [{k: v for k, v in line.items() if k not in TIMES} for line in metrics],
        "test_accuracy": found.training["test_accuracy"],
    }


def _training(killer: Killer, wanted: int, made: Path, folder: Path, found: Found, say: Callable[[str], None]) -> int:
    whole = folder / "whole"
    train = ("vitrm-train", *TRAIN, "--epochs", EPOCHS, "--out")
    undisturbed = children.run(children.command(*train, whole))
    if not ends_well(undisturbed, found, "the undisturbed run"):
        return 0
    expected = fingerprint(whole)
    killed, runs = 0, 0
    while killed < wanted:
        runs += 1
        here = folder / f"run{runs}"
        of_this, deaths = 0, []
        while killed < wanted and of_this < 11:
            resume = (here / STATE_FILE).exists()
            argv = ("vitrm-train", "--resume", "--save-every", "0", "--threads", "1", "--out") if resume else train
            # A third of the run each time, so that all kills together go through it several times.
            killer.seconds, killer.operations = undisturbed.seconds / 4, 25 if not resume else 120
            ended, how = killer.kill(children.command(*argv, here), here)
            if ended.signal != signal.SIGKILL:
                if ended.code:
                    found("lost", f"goes on after being killed {', '.join(deaths[-2:])}", ended.stderr.strip()[-300:])
                    shutil.rmtree(here, ignore_errors=True)
                break
            killed, of_this = killed + 1, of_this + 1
            deaths.append(how)
            _check_run(here, how, found)
            say(f"{killed} of {wanted}")
            if of_this == 5 and here.exists():
                here = here.rename(folder / f"moved{runs}")
        if not here.exists():
            continue
        age(here)
        last = children.run(children.command("vitrm-train", "--resume", "--threads", "1", "--out", here))
        if (here / STATE_FILE).exists() and ends_well(last, found, f"--resume after being killed {', '.join(deaths)}"):
            equal = fingerprint(here)
            different = [k for k in expected if equal[k] != expected[k]]
            if different:
                found("different", f"killed {', '.join(deaths)}", f"other {', '.join(different)} than undisturbed")
            if left := leftovers(here):
                found("lost", f"killed {', '.join(deaths)}", f"left behind: {left}")
    return killed


def _check_run(folder: Path, how: str, found: Found) -> None:
    """Opens every file of a run folder."""
    try:
        if (folder / STATE_FILE).exists():
            header = training_state.read_header(folder / STATE_FILE)
            training_state.read(folder / STATE_FILE, header["identity"])
        if (folder / checkpoint.WEIGHTS_FILE).exists() and (folder / checkpoint.CONFIG_FILE).exists():
            checkpoint.load(folder).build()
        if (folder / "metrics.jsonl").exists():
            [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    except (UserError, ValueError) as error:
        found("lost", f"training killed {how}", str(error))


Scene = Callable[[Killer, int, Path, Path, Found, Callable[[str], None]], int]


def _answers(path: Path) -> list[np.ndarray]:
    if (path / "model.onnx").exists():
        path = path / "model.onnx"
    result = vitrm.runtime.open(path, threads=1).infer(subjects.images(16))
    return [a for a in (result.logits, result.halt_prob, result.steps_used) if a is not None]


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    """Whether two lists of arrays are equal, bit for bit."""
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def _disturbed(
    killer: Killer,
    wanted: int,
    target: Path,
    work: Callable[[], int | None],
    check: Callable[[], str],
    found: Found,
    say: Callable[[str], None],
) -> int:
    """Kills `work`, which writes `target`, again and again; `check` says what is wrong with it then."""
    children.run(work)
    first = children.run(work)
    ends_well(first, found, "undisturbed")
    if why := check():
        found("different", "undisturbed, done twice", why)
    killer.seconds, killer.operations = 1.05 * first.seconds, 24
    killed = tries = 0
    while killed < wanted and tries < 6 * wanted:
        tries += 1
        ended, how = killer.kill(work, target.parent)
        if ended.signal != signal.SIGKILL:
            ends_well(ended, found, f"not killed {how}")
            killer.operations = max(4, killer.operations - 2)
            continue
        killed += 1
        say(f"{killed} of {wanted}")
        try:
            if why := check():
                found("different", f"killed {how}", why)
        except (UserError, OSError, ValueError) as error:
            found("lost", f"killed {how}", f"{type(error).__name__}: {error}")
    age(target.parent)
    if ends_well(children.run(work), found, "after the kills") and (left := leftovers(target.parent)):
        found("lost", "after a whole run that followed the kills", f"left behind: {left}")
    return killed


def _export(name: str, *options: str) -> Scene:
    def scene(killer: Killer, wanted: int, made: Path, folder: Path, found: Found, say: Callable[[str], None]) -> int:
        target = folder / "out" / name
        target.parent.mkdir()
        where = (target,) if options[-1] == "--hf" else ("-o", target)
        work = children.command("vitrm-export", made / "run", "--steps", subjects.STEPS, *options, *where)
        expected = _answers(made / name)

        def check() -> str:
            if name == "hf" and (target / "config.json").exists():
                json.loads((target / "config.json").read_text())
            return (
                "" if same(_answers(target), expected) else "other answers than the file that was there, and its like"
            )

        return _disturbed(killer, wanted, target, work, check, found, say)

    return scene


def _triton(killer: Killer, wanted: int, made: Path, folder: Path, found: Found, say: Callable[[str], None]) -> int:
    repository = folder / "repository"
    work = children.command("vitrm-export", made / "unrolled.onnx", "--triton", repository, "--triton-name", "model")
    expected = _answers(made / "unrolled.onnx")

    def check() -> str:
        versions = [p for p in (repository / "model").iterdir() if p.is_dir() and not p.name.startswith(".")]
        broken = [p.name for p in versions if not same(_answers(p), expected)]
        return f"versions {broken} answer otherwise" if broken or not versions else ""

    return _disturbed(killer, wanted, repository / "model" / "x", work, check, found, say)


def _calibration(
    killer: Killer, wanted: int, made: Path, folder: Path, found: Found, say: Callable[[str], None]
) -> int:
    run = checkpoint.load(made / "run")
    part = load("digits", "train").take(slice(0, 64))
    target = folder / "ranges.json"
    expected = calibrate(run, 2, images=part)

    def work() -> int:
        torch.set_num_threads(1)
        calibrate(run, 2, images=part).save(target)
        return 0

    def check() -> str:
        return "" if load_calibration(target, run, 2) == expected else "other ranges"

    return _disturbed(killer, wanted, target, work, check, found, say)


def _threshold(name: str) -> Scene:
    def scene(killer: Killer, wanted: int, made: Path, folder: Path, found: Found, say: Callable[[str], None]) -> int:
        target = folder / "out" / name
        target.parent.mkdir()
        (shutil.copytree if (made / name).is_dir() else shutil.copy)(made / name, target)
        store_threshold(target, 0.25, 2, {"images": 1})
        old = _answers(target)
        store_threshold(target, 0.75, 3, {"images": 2})
        new = _answers(target)

        def work() -> int:
            for threshold, steps in ((0.25, 2), (0.75, 3)):
                store_threshold(target, threshold, steps, {"images": steps - 1})
            return 0

        def check() -> str:
            now = _answers(target)
            return "" if same(now, old) or same(now, new) else "neither the old threshold's answers nor the new one's"

        return _disturbed(killer, wanted, target, work, check, found, say)

    return scene


def _pair(killer: Killer, wanted: int, made: Path, folder: Path, found: Found, say: Callable[[str], None]) -> int:
    """Two files that get their names one after the other: a kill between may leave them unlike, which must then be said."""
    names = ["noise.plan", "noise.plan.json"]
    out = folder / "out"
    out.mkdir()
    for name in names:
        shutil.copy(made / name, out / name)
    other = folder / "other"
    shutil.copytree(out, other)
    values = json.loads((other / names[1]).read_text())
    data = b"x" * 3000
    (other / names[0]).write_bytes(data)
    values["engine"] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (other / names[1]).write_text(json.dumps(values))
    plans = {(out / names[0]).read_bytes(), data}

    def work() -> int:
        for source in (other, made):
            with atomic_files(out, names) as temporary:
                for name in names:
                    shutil.copy(source / name, temporary / name)
        return 0

    def check() -> str:
        try:
            read_sidecar(out / names[0])
        except UserError as error:
            fault = unclean_line(f"error: {error}")
            for name in names:  # as its owner would: build again
                shutil.copy(made / name, out / name)
            return fault
        return "" if (out / names[0]).read_bytes() in plans else "neither plan"

    return _disturbed(killer, wanted, out / names[0], work, check, found, say)


def _reading(killer: Killer, wanted: int, made: Path, folder: Path, found: Found, say: Callable[[str], None]) -> int:
    """A reader opens and asks again and again while a writer replaces the file, and is killed."""
    target = folder / "out" / "loop.onnx"
    target.parent.mkdir()
    shutil.copy(made / "loop.onnx", target)
    allowed = []
    for threshold, steps in ((0.25, 2), (0.75, 3)):
        store_threshold(target, threshold, steps, {})
        allowed.append(_answers(target))

    def write() -> int:
        while True:
            for threshold, steps in ((0.25, 2), (0.75, 3)):
                store_threshold(target, threshold, steps, {})

    for number in range(wanted):
        writer = children.start(write)
        end = time.monotonic() + killer.dice.uniform(0.2, 1.0)
        reads = 0
        while time.monotonic() < end or not reads:
            try:
                now = _answers(target)
            except UserError as error:
                found("lost", f"read {reads} while the file was replaced", str(error))
                break
            reads += 1
            if not any(same(now, a) for a in allowed):
                found("damage", f"read {reads} while the file was replaced", "answers of neither file")
        writer.kill()
        writer.wait(10)
        say(f"{number + 1} of {wanted}")
    age(target.parent)
    store_threshold(target, 0.25, 2, {})
    if left := leftovers(target.parent):
        found("lost", "after a writer was killed", f"left behind: {left}")
    return wanted


def _processes(killer: Killer, wanted: int, made: Path, folder: Path, found: Found, say: Callable[[str], None]) -> int:
    """Real processes, killed while they start, import and begin to write."""
    out = folder / "run"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    for number in range(wanted):
        argv = (
            ["--resume", "--out", str(out)]
            if (out / STATE_FILE).exists()
            else [*TRAIN, "--epochs", "2", "--out", str(out)]
        )
        process = subprocess.Popen(
            [sys.executable, "-m", "vitrm.training.cli", *argv],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        if number % 2:
            assert process.stdout is not None
            process.stdout.readline()
        time.sleep(killer.dice.uniform(0, 3.0 if number % 2 == 0 else 1.0))
        process.kill()
        _, error = process.communicate()
        if process.returncode not in (0, -signal.SIGKILL):
            found("lost", "a command started anew", error.decode()[-300:])
        _check_run(out, "as a process", found)
        say(f"{number + 1} of {wanted}")
    return wanted
