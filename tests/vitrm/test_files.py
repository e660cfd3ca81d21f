"""Folders that are either whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from vitrm.errors import UserError
from vitrm.files import atomic_folder


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
    """`rename` 0 fails before the exchange, 1 and 2 in its first and second renaming."""
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


def test_links_are_followed_and_files_refused(old, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(old)
    with atomic_folder(link) as new:
        (new / "b").write_text("new")
    assert link.is_symlink()
    assert [p.name for p in old.iterdir()] == ["b"]
    with pytest.raises(UserError, match="is a file: name a folder"), atomic_folder(old / "b"):
        pass
