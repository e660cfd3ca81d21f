"""A small part of `make torture`, and that what it looks for is found."""

from __future__ import annotations

import mmap
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from torture import oracle
from torture.damage.formats import Format
from torture.damage.mutations import Done
from torture.kills import before_operation
from torture.oracle import Violation, judge

from vitrm.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_small_part_of_everything_finds_nothing(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks"), "TMPDIR": str(tmp_path)}
    argv = [sys.executable, "-m", "torture", "--budget", "0.02", "--work", "work", "--record", "record.json"]
    ended = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert (tmp_path / "record.json").is_file()


# What a reader may do with a file, by the byte in it, and what that must be called.
_DEEDS = {
    "same": b"0",
    "damage": b"1",
    "refused": b"2",
    "message": b"3",
    "traceback": b"4",
    "crash": b"5",
    "hang": b"6",
    "memory": b"7",
    "contract": b"8",
}


def _read(scratch: Path) -> dict[str, np.ndarray]:
    deed = (scratch / "here" / "file").read_bytes()
    if deed == b"2":
        raise UserError("it is damaged: copy it again")
    if deed == b"3":
        raise UserError("it is damaged, " * 300)  # control characters, printing itself would make harmless
    if deed == b"4":
        raise KeyError("x")
    if deed == b"5":
        os.kill(os.getpid(), signal.SIGSEGV)
    if deed == b"6":
        os.mkfifo(scratch / "fifo")
        (scratch / "fifo").read_bytes()
    if deed == b"7":
        block = mmap.mmap(-1, 100 << 20)  # not from the heap, which may have as much to spare
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
        deed = b"0"
    if deed == b"8":
        raise Violation("contract", "written outside")
    return {"weights": np.frombuffer(deed, np.uint8)}


@pytest.mark.slow
@pytest.mark.parametrize("outcome", _DEEDS)
def test_the_oracle_tells_what_a_reader_did(outcome, tmp_path, monkeypatch):
    monkeypatch.setattr(oracle, "IDLE_LIMIT", 1.0)
    monkeypatch.setattr(oracle, "RSS_LIMIT", 50 << 20)

    def mutate(home: Path, rng: random.Random) -> Done:
        (home / "file").write_bytes(_DEEDS[outcome])
        return Done("a byte is another")

    (tmp_path / "file").write_bytes(b"0")
    fmt = Format("bytes", 2, ("file",), mutate, lambda home: _read(home.parent), sealed=("weights",))
    verdicts = list(judge(fmt, [0, 1], 0, tmp_path))
    # The second case is judged whatever the first did to its process.
    assert [v.outcome for v in verdicts] == [outcome, outcome]
    assert [v.index for v in verdicts] == [0, 1]


def test_what_must_be_refused_is_a_finding_when_it_is_not(tmp_path):
    (tmp_path / "file").write_bytes(b"0")
    fmt = Format("bytes", 1, ("file",), lambda home, rng: Done("moved", refuse=True), lambda home: _read(home.parent))
    assert [v.outcome for v in judge(fmt, [0], 0, tmp_path)] == ["contract"]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_child_dies_before_the_chosen_file_operation(number, tmp_path):
    from torture import children

    def work() -> int:
        for name in "abc":
            (tmp_path / name).write_text("x")
        return 0

    ended = children.run(work, before=before_operation(tmp_path, number))
    assert ended.signal == signal.SIGKILL
    assert [p.name for p in sorted(tmp_path.iterdir())] == list("abc")[: number - 1]
