"""Every benchmark starts: what it imports is where it looks for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
PROGRAMS = sorted(
    p.name for p in BENCHMARKS.glob("*.py") if 'if __name__ == "__main__"' in p.read_text(encoding="utf-8")
)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_benchmark_explains_itself(name, tmp_path):
    ended = subprocess.run(
        [sys.executable, str(BENCHMARKS / name), "--help"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "usage:" in ended.stdout
