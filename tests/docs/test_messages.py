"""Every message that the code prints as an error is in the documentation."""

from __future__ import annotations

import re
from pathlib import Path

import messages

from vitrm.training.run_folder.access import __file__ as access


def test_the_page_is_what_the_script_writes() -> None:
    assert messages.PAGE.read_text() == messages.markdown(), "make messages"


def test_a_message_is_read_from_the_source() -> None:
    found = messages.messages()
    assert (
        "… already holds a run: continue it with --resume, or name another folder with --out"
        in found["vitrm/training/run_folder/access.py"]
    )
    source = Path(access).read_text()
    assert source.count("raise UserError(") == len(found["vitrm/training/run_folder/access.py"])


def test_what_troubles_quotes_is_said_somewhere() -> None:
    """A message in docs/troubles.md that the code does not print any more helps nobody."""
    text = (messages.ROOT / "docs" / "troubles.md").read_text()
    said = " ".join(p.read_text() for room in messages.ROOMS for p in sorted((messages.ROOT / room).rglob("*.py")))
    said = re.sub(r'"\s*\n\s*f?"', "", said)  # a text over several lines
    quoted = [code for code in re.findall(r"`([^`\n]+)`", text) if len(code) > 24]
    elsewhere = ("ERROR: No matching distribution", "No module named", "pip install", "sudo apt")
    missing = []
    for quote in quoted:
        if quote.startswith(elsewhere) or quote.startswith("--"):
            continue
        longest = max(re.split(r"…|\d+|cifar10|data", quote), key=len).strip(" :,.()")
        if longest not in said:
            missing.append(quote)
    assert not missing
