"""What a command does when nobody reads it any more: its results are on disk, and its exit code says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# A command like ours: an argument parser, lines before, between and after the work, and a file that it writes.
COMMAND = """
import argparse, contextlib, os, sys
from vitrm.errors import UserError, run_command
from vitrm.system.files import write_text

def command(argv):
    parser = argparse.ArgumentParser(description="two → three × four…")
    parser.add_argument("file")
    args = parser.parse_args(argv)
    print("begun →", args.file, flush=True)
    opened = open(args.file + ".log", "w")  # gets the number of a stream that was closed
    write_text(args.file, "result")
    for number, text in ((1, b"C output"), (2, b"C errors\\n")):
        with contextlib.suppress(OSError):
            os.write(number, text)
    assert os.path.getsize(args.file + ".log") == 0, "output of a library in the command's own file"
    print("done: 3 × 4 ± 1 µm, Δ ≤ 5 \\udcff", "x" * 100_000)
    if args.file.endswith("bad"):
        raise UserError("no → way")

sys.exit(run_command(command, sys.argv[1:]))
"""


def run(file: Path, *, redirect: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    script = file.with_name("command.py")
    script.write_text(COMMAND)
    line = f"{sys.executable} {script} {file} {redirect}"
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("redirect", "code", "says"),
    [
        ("| head -c 0", 141, ""),
        ("| head -n 1 >/dev/null", 141, ""),
        ("> /dev/full", 2, "error: standard output could not be written (No space left on device)"),
        ("2> /dev/full", 0, ""),
        ("2>&1 | head -c 0", 141, ""),
        (">&-", 0, ""),
        ("2>&-", 0, ""),
        (">&- 2>&- <&-", 0, ""),
    ],
)
def test_output_that_goes_nowhere_costs_no_result(tmp_path, redirect, code, says, unbuffered):
    ended = run(tmp_path / "out", redirect=redirect, PYTHONUNBUFFERED=unbuffered)
    assert (tmp_path / "out").read_text() == "result"
    assert ended.returncode == code, ended.stderr
    told = ended.stderr.replace("C errors\n", "")
    assert told.count("\n") == bool(says)
    assert says in told


def test_a_commands_own_error_comes_before_that_of_its_output(tmp_path):
    ended = run(tmp_path / "bad", redirect="> /dev/full")
    assert ended.returncode == 2
    assert ended.stderr.endswith("error: no → way\n")
    assert run(tmp_path / "bad", redirect="| head -c 0").returncode == 2
    (tmp_path / "help").mkdir()
    assert run(tmp_path / "help", redirect="--help > /dev/full").returncode == 2
    assert run(tmp_path / "help", redirect="--help | head -c 0").returncode in (0, 141)  # as head is slow or quick


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_our_characters_gets_others(tmp_path, encoding):
    ended = run(tmp_path / "bad", LC_ALL="C", PYTHONIOENCODING=encoding)
    assert ended.returncode == 2
    assert "begun -> " in ended.stdout
    assert ("done: 3 x 4 +- 1 um, delta <= 5 \\xff" in ended.stdout) == (encoding == "ascii")
    assert ended.stderr.endswith("error: no -> way\n")
    ended = run(tmp_path / "bad", redirect="--help", LC_ALL="C", PYTHONIOENCODING=encoding)
    assert "two -> three" in ended.stdout


def test_a_full_pipe_that_does_not_block_is_waited_for(tmp_path):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    script = tmp_path / "command.py"
    script.write_text(COMMAND)
    with subprocess.Popen([sys.executable, str(script), str(tmp_path / "out")], stdout=writer) as process:
        os.close(writer)
        with open(reader, "rb") as pipe:
            said = pipe.read()
    assert process.returncode == 0
    assert said.endswith(b"x" * 100_000 + b"\n")
