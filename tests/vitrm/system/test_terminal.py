"""What is printed does nothing to the terminal, whoever named it."""

from __future__ import annotations

import sys
import time

import pytest
from rich.table import Table
from rich.text import Text

from vitrm.errors import UserError, run_command
from vitrm.system.terminal import console, neutral, neutral_line, say, sparingly
from vitrm.training.cli import main

HOSTILE = "cat\x1b]0;owned\x07[red]\x9b2J\rdog\u202e\u2066\udcff[/none]"
SHOWN = "cat\\x1b]0;owned\\x07[red]\\x9b2J\\rdog\\u202e\\u2066\\udcff[/none]"


def test_controls_are_shown_and_the_rest_is_kept() -> None:
    assert neutral(HOSTILE) == SHOWN
    kept = "tab\tnewline\nmodèle 猫 × ✗ 👩‍🚀 \\x1b"
    assert neutral(kept) == kept
    assert neutral(SHOWN) == SHOWN
    assert neutral_line("a\nerror: b") == "a\\nerror: b"


@pytest.mark.parametrize("error", [False, True])
def test_lines_and_consoles_are_neutral(error: bool, capsys: pytest.CaptureFixture[str]) -> None:
    say(HOSTILE, error=error)
    screen = console(error=error, width=120)
    screen.print(HOSTILE)
    table = Table(HOSTILE, title=HOSTILE)
    table.add_row(Text(HOSTILE))
    screen.print(table)
    with screen.status(Text(HOSTILE)):
        pass
    out, err = capsys.readouterr()
    text = err if error else out
    assert (out if error else err) == ""
    assert text.startswith(f"{SHOWN}\n")
    assert text.count("cat\\x1b]0;owned") == 5  # rich itself drops bells and carriage returns
    assert text.count("[red]") == 5
    assert not set(text) & set("\x1b\x07\x9b\r\u202e\u2066\udcff")


def test_colors_of_our_own_stay(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    console(width=80).print(HOSTILE, style="red")
    out = capsys.readouterr().out
    assert out.startswith("\x1b[31m")
    assert out.count("\x1b") == 2
    assert "cat\\x1b]0;owned[red]" in out


def test_an_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(argv: object) -> int:
        raise UserError(f"{HOSTILE}\nnext: rm -rf runs")

    def stopped(argv: object) -> int:
        raise KeyboardInterrupt(f"{HOSTILE}\nsaved")

    assert run_command(fails, []) == 2
    assert capsys.readouterr().err == f"error: {SHOWN}\\nnext: rm -rf runs\n"
    assert run_command(stopped, []) == 130
    assert capsys.readouterr().err == f"interrupted: {SHOWN}\\nsaved\n"


def test_training_quotes_what_it_was_given(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.toml").write_text('[recipe]\n"\\u001b]0;owned\\u0007[red]" = 1\n')
    for words in (
        ["--config", str(tmp_path / "run.toml")],
        ["--data", HOSTILE],
        ["--teacher", HOSTILE.strip("\udcff")],
    ):
        assert main([*words, "--out", str(tmp_path / "out")]) == 2
        out, err = capsys.readouterr()
        assert err.count("\n") == 1
        assert "[red]" in err
        assert not set(out + err) & set("\x1b\x07\x9b\r\u202e")


def test_long_work_shows_up_in_a_log_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    with sparingly(60) as take:
        take("over before it is due")
    said: list[str] = []
    with sparingly(0.01) as take:
        for text in ("first", "second\x1b"):
            take(text)
            for _ in range(500):
                time.sleep(0.01)
                said += capsys.readouterr().err.splitlines()
                if neutral(text) in said:
                    break
    assert said == ["first", "second\\x1b"]  # each once
