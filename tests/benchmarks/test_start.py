"""Every benchmark starts: what it imports is where it looks for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
_OF_PACKAGES = ("__main__.py", "worker.py")  # run by their package's name
PROGRAMS = sorted(
    str(path)
    for path in BENCHMARKS.rglob("*.py")
    if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8") and path.name not in _OF_PACKAGES
)
# One process loads torch, and is forked for each program: its folder is where `python PROGRAM` would look first.
EACH = """
import os, runpy, sys
import torch
failed = []
for program in sys.argv[1:]:
    if (child := os.fork()) == 0:
        sys.path[0], sys.argv = os.path.dirname(program), [program, "--help"]
        runpy.run_path(program, run_name="__main__")
        os._exit(3)  # parsed no arguments
    failed += [program] * (os.waitpid(child, 0)[1] != 0)
sys.exit(f"failed: {failed}" if failed else 0)
"""


@pytest.mark.slow
def test_every_benchmark_explains_itself(tmp_path):
    assert len(PROGRAMS) > 10
    ended = subprocess.run([sys.executable, "-c", EACH, *PROGRAMS], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("usage:") == len(PROGRAMS)
