"""The list of what only a GPU can show."""

from __future__ import annotations

import re
from pathlib import Path

import gpu_checklist
import pytest

from vitrm.errors import UserError
from vitrm.runtime.system.gpus import Gpus

ROOT = Path(__file__).resolve().parents[2]


def test_the_document_is_what_the_script_prints() -> None:
    assert (ROOT / "docs" / "deploy" / "gpu-checklist.md").read_text() == gpu_checklist.markdown()


def test_what_the_commands_name_is_there() -> None:
    for check in gpu_checklist.CHECKS:
        for path in re.findall(r"(?:tests|benchmarks)/[\w/.]+", check.command):
            assert (ROOT / path).exists(), check.name
        for path in re.findall(r"`((?:runtime|export|vitrm)/[\w/.]+)`", check.otherwise):
            assert (ROOT / path).exists(), check.name


def test_a_check_is_ticked_or_says_what_it_means(capsys: pytest.CaptureFixture[str]) -> None:
    good = gpu_checklist.Check("good", "echo well", "well", "never", 1)
    bad = gpu_checklist.Check("bad", "echo broken; exit 3", "well", "look there", 1)
    slow = gpu_checklist.Check("slow", "sleep 60", "soon", "it hangs", 0.002)
    two = gpu_checklist.Check("two", "exit 1", "both", "never", 1, gpus=2)
    assert [gpu_checklist.run(check, 1) for check in (good, bad, slow, two)] == [0, 1, 1, 0]
    out = capsys.readouterr().out
    assert "[x] good (0 s, exit 0)" in out
    assert "[ ] bad" in out
    assert "else: look there" in out
    assert "[ ] slow" in out
    assert "[-] two: needs 2 GPUs, here is 1" in out


def test_without_a_gpu_it_is_a_list(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu_checklist, "find_gpus", lambda: Gpus((), None, "no NVIDIA driver is installed"))
    assert gpu_checklist.main([]) == 0
    assert capsys.readouterr().out.count("[ ] ") == len(gpu_checklist.CHECKS)
    with pytest.raises(UserError, match="no NVIDIA driver is installed, so there is nothing to run"):
        gpu_checklist.main(["--run"])
