"""Folders that are either whole or not there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vitrm import files
from vitrm.errors import UserError
from vitrm.files import atomic_folder, write_text


@pytest.fixture
def old(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").write_text("old")
    return folder


def test_a_folder_takes_the_place_of_another(old, tmp_path):
    with atomic_folder(old) as new:
        (new / "b").write_text("new")
        assert (old / "a").read_text() == "old"
    assert [p.name for p in old.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
@pytest.mark.parametrize("rename", [0, 1, 2])
def test_whatever_happens_one_of_the_two_is_there(old, tmp_path, monkeypatch, error, rename):
    """`rename` 0 fails before the exchange, 1 and 2 in its first and second renaming, where the system cannot swap."""
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    real, calls = Path.rename, []

    def fail(self, target):
        calls.append(self)
        if len(calls) == rename:
            raise error
        return real(self, target)

    monkeypatch.setattr(Path, "rename", fail)

    def exchange() -> None:
        with atomic_folder(old) as new:
            (new / "b").write_text("new")
            if not rename:
                raise error

    with pytest.raises(UserError if error is OSError else error):
        exchange()
    assert [p.name for p in old.iterdir()] == ["a"]
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_names_are_swapped_in_one_step_where_the_system_can(old, monkeypatch):
    monkeypatch.setattr(Path, "rename", lambda self, target: pytest.fail("the old folder need not step aside"))
    with atomic_folder(old) as new:
        (new / "b").write_text("new")
    assert [p.name for p in old.iterdir()] == ["b"]


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    code = (
        "import os, sys; from vitrm.files import atomic_path, atomic_folder\n"
        "with atomic_path(sys.argv[1]) as a, atomic_folder(sys.argv[2]) as b:\n"
        "    (b / 'x').write_text('x'); print('ready', flush=True); sys.stdin.read()"
    )
    file, folder = tmp_path / "file.txt", tmp_path / "folder"
    argv = [sys.executable, "-c", code, str(file), str(folder)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        assert len(list(tmp_path.glob(".*.part*"))) == 2
        write_text(file, "mine")
        assert len(list(tmp_path.glob(".*.part*"))) == 2
        process.kill()
    assert len(list(tmp_path.glob(".*.part*"))) == 2
    write_text(file, "mine again")
    with atomic_folder(folder) as new:
        (new / "y").write_text("y")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file.txt", "folder"]


def test_links_are_followed_and_files_refused(old, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(old)
    with atomic_folder(link) as new:
        (new / "b").write_text("new")
    assert link.is_symlink()
    assert [p.name for p in old.iterdir()] == ["b"]
    with pytest.raises(UserError, match="is a file: name a folder"), atomic_folder(old / "b"):
        pass
