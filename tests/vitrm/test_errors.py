"""What the surroundings refuse ends a command in one line; what may be our own mistake keeps its traceback."""

from __future__ import annotations

import errno
import os

import pytest

from vitrm.errors import first_line, run_command
from vitrm.export import cli as exporting
from vitrm.runtime.bench import cli as benching
from vitrm.training import cli as training

LONG = "a" * 300  # longer than any file system's names


@pytest.mark.parametrize(
    ("main", "argv"),
    [
        (benching.main, [f"{LONG}.onnx"]),
        (benching.main, [f"{LONG}/step.plan"]),
        (exporting.main, [LONG]),
        (exporting.main, ["nano-digits", "--steps", "1", "--calibration", LONG, "--int8", "-o", "a.onnx"]),
        (training.main, ["--data", LONG]),
        (training.main, ["--config", f"{LONG}.toml"]),
        (training.main, ["--data", "digits", "--model", "tiny", "--resume", "--out", LONG]),
    ],
)
def test_a_name_that_no_file_can_have_is_one_line(main, argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EROFS, errno.EIO])
def test_what_the_machine_refuses_is_one_line(number, capsys):
    def fail(argv: object) -> int:
        raise OSError(number, os.strerror(number), "somewhere")

    assert run_command(fail, []) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_file_that_should_have_been_there_is_a_bug():
    def fail(argv: object) -> int:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "template.html")

    with pytest.raises(FileNotFoundError):
        run_command(fail, [])


@pytest.mark.parametrize(
    ("error", "line", "named"),
    [
        (ValueError("\n  one \t line\nand more"), "one line", "ValueError: one line"),
        (ValueError(), "ValueError", "ValueError"),
        (ValueError(" \n "), "ValueError", "ValueError"),
        (ValueError("x" * 400), "x" * 299 + "…", "ValueError: " + "x" * 299 + "…"),
    ],
)
def test_any_exception_fits_into_one_line(error: Exception, line: str, named: str) -> None:
    assert first_line(error) == line
    assert first_line(error, named=True) == named
