"""Every command block of README.md and docs/ runs, or says why it does not; no page names an option that does not exist."""

from __future__ import annotations

import glob
import io
import re
import shlex
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from figures import ROOT, pages
from PIL import Image

from vitrm.data import photo_crops

COMMANDS = {
    "vitrm-train": "vitrm.training.cli",
    "vitrm-export": "vitrm.export.cli",
    "vitrm-bench": "vitrm.runtime.bench.cli",
    "vitrm-predict": "vitrm.runtime.predict.cli",
}
# What makes a command of a page cheap, and not another one: the last of two equal flags counts.
CHEAPER = {
    "vitrm-train": ["--model", "tiny", "--epochs", "1", "--batch-size", "8", "--limit-train", "24", "--threads", "1"],
    "vitrm-bench": ["--seconds", "0.02", "--limit", "8", "--threads", "1"],
}
_BLOCK = re.compile(r"(<!--(?:(?!-->).)*-->\n)?^( *)```(\w+)\n(.*?)^\2```$", re.MULTILINE | re.DOTALL)
_PAGE_REASON = re.compile(r"<!-- no block of this page is run: \S.* -->")
_REASON = re.compile(r"<!-- not run: \S.* -->")


def blocks(page: Path) -> list[tuple[str, str, bool]]:
    """The language and text of each command block of a page, and whether it is to be run."""
    text = page.read_text()
    none = bool(_PAGE_REASON.search(text))
    return [
        (found[3], found[4], not none and not _REASON.fullmatch((found[1] or "").strip()))
        for found in _BLOCK.finditer(text)
        if found[3] in ("sh", "python")
    ]


def commands(text: str) -> list[list[str]]:
    """The commands of a shell block, split into words, without comments."""
    return [words for line in text.replace("\\\n", " ").splitlines() if (words := shlex.split(line, comments=True))]


@cache
def options_of(command: str) -> set[str]:
    """The flags that a command's --help names."""
    out = io.StringIO()
    module = import_module(COMMANDS[command])
    with redirect_stdout(out), pytest.raises(SystemExit):
        module.main(["--help"])
    return set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", out.getvalue()))


NAMES = [str(page.relative_to(ROOT)) for page in pages()]
RUN = [name for name in NAMES if any(run for _, _, run in blocks(ROOT / name))]


@pytest.mark.parametrize("name", NAMES)
def test_a_block_runs_here_or_says_why_not(name: str) -> None:
    text = (ROOT / name).read_text()
    fences = re.findall(r"^ *```(\w*)$", text, re.MULTILINE)
    assert all(fences[::2]), "a fence without a language is neither text nor a command"
    assert set(fences[::2]) <= {"sh", "python", "text", "toml"}
    if not _PAGE_REASON.search(text):
        outside = _BLOCK.sub("", text)
        assert not re.search(r"\n\n {4,}(?:vitrm-|pip |python |make )", outside), (
            "a command in an indented block: use a fence"
        )
    for language, block, run in blocks(ROOT / name):
        for words in commands(block) if language == "sh" and run else ():
            assert command_of(words), f"{shlex.join(words)} is no command of vitrm: mark the block <!-- not run: … -->"


@pytest.mark.parametrize("name", NAMES)
def test_options_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    shell = [words for language, block, _ in blocks(ROOT / name) if language == "sh" for words in commands(block)]
    inline = [shlex.split(code) for code in re.findall(r"`(vitrm-(?:train|export|bench|predict) [^`\n]+)`", text)]
    for words in shell + inline:
        command = command_of(words)
        if command:
            flags = {re.sub(r"=.*", "", w) for w in words if re.match(r"--?[a-z]", w) and w != "-m"}
            assert flags <= options_of(command), f"{name}: {shlex.join(words)}"


def command_of(words: list[str]) -> str:
    """The command of vitrm that a line calls, or nothing."""
    return next((c for c in COMMANDS if words[: len(c.split())] == c.split()), "")


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with photos of three classes, some new ones, and nothing else, in which commands are run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VITRM_DATA", str(tmp_path / "nowhere"))
    crops = iter(photo_crops(3 * 18, 48).transpose(0, 2, 3, 1) // 2)  # as photos vary, for int8's ranges
    for number, label in enumerate(("bird", "cat", "dog")):
        for folder, count in (("photos", 14), ("labelled", 4)):
            (tmp_path / folder / label).mkdir(parents=True)
            for i in range(count):
                pixels = next(crops)[:40].copy()
                pixels[:, :, number] += 120
                Image.fromarray(pixels).save(tmp_path / folder / label / f"{i}.jpg")
    (tmp_path / "new").mkdir()
    Image.fromarray(pixels).save(tmp_path / "new" / "a.jpg")
    Image.fromarray(pixels).save(tmp_path / "a.jpg")
    return tmp_path


def run(words: list[str]) -> None:
    """Runs a command of vitrm in this process, cheaply; fails unless it succeeds."""
    command = command_of(words)
    arguments = words[len(command.split()) :]
    if ">" in arguments:
        arguments, _, target = arguments[: arguments.index(">")], *arguments[arguments.index(">") :]
    else:
        target = ""
    out, errors = io.StringIO(), io.StringIO()
    paths = [path for word in arguments for path in (sorted(glob.glob(word)) if "*" in word else [word])]
    if not ("--resume" in paths or "--help" in paths):
        cheaper = CHEAPER.get(command, [])
        if "nano-v3-cifar10" in paths and command == "vitrm-train":
            # A tiny model from random weights stands for it: three updates leave its own too noisy for int8, whose export is refused.
            at = paths.index("--init")
            paths = [*paths[:at], *paths[at + 2 :]]
        paths += cheaper[2:] if "--init" in paths else cheaper  # the model is the other run's then
    with redirect_stdout(out), redirect_stderr(errors):
        status = import_module(COMMANDS[command]).main(paths)
    assert status == 0, f"{shlex.join(words)}: {errors.getvalue()[-600:]}"
    if target:
        Path(target).write_text(out.getvalue())
        assert out.getvalue()


@pytest.mark.pages
@pytest.mark.parametrize("name", RUN)
def test_a_page_runs_from_top_to_bottom(name: str, desk: Path) -> None:
    page = [block for block in blocks(ROOT / name) if block[2]]
    if "runs/mine" in str(page) and "--out runs/mine" not in str(page):
        run(["vitrm-train", "--data", "digits", "--out", "runs/mine"])
    images = np.random.default_rng(0).random((4, 3, 32, 32), dtype=np.float32)
    space: dict[str, object] = {"images": images}
    for language, text, _ in page:
        if language == "python":
            with redirect_stdout(io.StringIO()):
                exec(compile(text, name, "exec"), space)
        else:
            for words in commands(text):
                run(words)
