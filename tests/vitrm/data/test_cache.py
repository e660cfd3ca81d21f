"""Pictures decoded once: the same pixels the second time, from files that were not opened again, unless they changed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitrm import data
from vitrm.data import cache
from vitrm.data.decoding import prepare
from vitrm.data.images import Images, normalization
from vitrm.data.mapped_rows import MappedRows
from vitrm.errors import UserError
from vitrm.preprocessing import Preprocessing
from vitrm.recipe import recipe
from vitrm.training.augmentation.augment import TrainingBatches

OF = Preprocessing.square(16)


@pytest.fixture(autouse=True)
def every_set_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cache, "LEAST_FILES", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are decoded from now on."""
    names: list[str] = []

    def noting(file: Path, of: Preprocessing) -> np.ndarray:
        names.append(f"{file.parent.name}/{file.name}")
        return prepare(file, of)

    monkeypatch.setattr(cache, "prepare", noting)
    return names


def read(root: Path, of: Preprocessing = OF, **more: object) -> dict[str, Images]:
    return {split: data.load(str(root), split, preprocessing=of, **more) for split in data.SPLITS}  # type: ignore[arg-type]


def same(one: dict[str, Images], other: dict[str, Images]) -> bool:
    return all(one[s].id == other[s].id for s in data.SPLITS)


def test_each_file_is_decoded_once_for_all_parts_and_runs(photos: Callable[..., Path], opened: list[str]) -> None:
    root = photos(20)
    plain = read(root, keep=False)
    assert len(opened) == 120, "without the cache: all files for each part"
    opened.clear()
    assert same(read(root), plain)
    assert len(opened) == len(set(opened)) == 40
    opened.clear()
    assert same(read(root), plain)
    other = read(root, Preprocessing.square(16, fit="squash"))
    assert not same(other, plain)
    assert len(opened) == 40, "another preprocessing is another entry"


def test_within_a_command_they_are_decoded_once_without_a_cache_too(
    photos: Callable[..., Path], opened: list[str]
) -> None:
    root = photos(20)
    with data.decoding_once():
        read(root, keep=False)
    assert len(opened) == 40


def test_what_changed_is_decoded_anew_and_nothing_else(photos: Callable[..., Path], opened: list[str]) -> None:
    root = photos(10)
    read(root)
    opened.clear()
    # The same size in bytes and the same time of change: an editor that restores it.
    before = os.stat(root / "cat" / "3.png")
    other = bytearray((root / "cat" / "3.png").read_bytes())
    Image.open(root / "dog" / "3.png").save(root / "new.png")
    other = (root / "new.png").read_bytes().ljust(len(other), b"\0")[: len(other)]
    (root / "new.png").unlink()
    (root / "cat" / "3.png").write_bytes(other)
    os.utime(root / "cat" / "3.png", ns=(before.st_atime_ns, before.st_mtime_ns))
    (root / "cat" / "5.png").unlink()
    shutil.copy(root / "dog" / "1.png", root / "dog" / "extra.png")
    found = read(root)
    assert sorted(opened) == ["cat/3.png", "dog/extra.png"]
    opened.clear()
    assert same(found, read(root, keep=False))
    opened.clear()
    (root / "dog" / "extra.png").unlink()
    read(root)
    assert opened == [], "of what is gone the rest stays"


def test_a_damaged_file_is_said_again_and_may_be_mended(photos: Callable[..., Path], opened: list[str]) -> None:
    root = photos(10)
    whole = (root / "cat" / "3.png").read_bytes()
    (root / "cat" / "3.png").write_bytes(b"\x89PNG" + whole[4:40])
    for _ in range(2):
        with pytest.raises(UserError, match=r"cat/3\.png cannot be read as an image"):
            read(root)
    assert len(opened) == 20
    skipped = read(root, skip_damaged=True)
    assert sum(map(len, skipped.values())) == 19
    (root / "cat" / "3.png").write_bytes(whole)
    assert same(read(root), read(root, keep=False))


@pytest.mark.parametrize("name", [cache.PIXELS_FILE, cache.INDEX_FILE])
@pytest.mark.parametrize("damage", [b"", b"\0" * 400, b"\x93NUMPY\x01\x00v\x00{'descr': '|O'}", None])
def test_a_damaged_entry_is_made_anew(photos: Callable[..., Path], name: str, damage: bytes | None) -> None:
    root = photos(10)
    plain = read(root)
    (entry,) = (p for p in cache.images_folder().iterdir() if p.is_dir())
    if damage is None:
        (entry / name).write_bytes((entry / name).read_bytes()[:-100])
    else:
        (entry / name).write_bytes(damage)
    assert same(read(root), plain)


def test_without_room_the_run_goes_on_and_says_so(
    photos: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = photos(10)
    plain = read(root, keep=False)
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as full:
        full.setattr(cache.shutil, "disk_usage", lambda place: usage(10, 10, 0))
        assert same(read(root), plain)
    assert "decoded pictures are not kept (they take 0 MB" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert same(read(root), plain)
    assert "decoded pictures are not kept" in capsys.readouterr().err

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    monkeypatch.setattr(cache.os, "posix_fallocate", full_disk)
    assert same(read(root), plain)
    assert "no space left on the disk" in capsys.readouterr().err
    assert not [p for p in cache.images_folder().rglob("*") if p.is_file()], "nothing half-written stays"


def test_two_processes_at_once_decode_them_once(photos: Callable[..., Path], tmp_path: Path) -> None:
    root = photos(60)
    code = (
        "import sys\nfrom pathlib import Path\nfrom vitrm import data\nfrom vitrm.data import cache\ncache.LEAST_FILES = 1\n"
        "real, n = cache.prepare, []\ncache.prepare = lambda file, of: n.append(1) or real(file, of)\n"
        f"print(data.load({str(root)!r}, 'train', size=16).id, len(n))"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    ended = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], ended
    ids, counts = zip(*(out.split() for out, _ in ended), strict=True)
    assert len(set(ids)) == 1
    assert sorted(map(int, counts)) == [0, 120]
    assert [p.suffix for p in cache.images_folder().iterdir()] == [""], "no lock is left"


def test_training_reads_batches_of_what_is_mapped(photos: Callable[..., Path]) -> None:
    root = photos(20)
    mapped, loaded = (data.load(str(root), "train", preprocessing=OF, in_memory=most) for most in (0, None))
    assert isinstance(mapped.pixels, MappedRows)
    assert isinstance(loaded.pixels, np.ndarray)
    assert mapped.id == loaded.id
    assert normalization(mapped) == normalization(loaded)
    np.testing.assert_array_equal(mapped.take(slice(3, 9)).take([0, 2]).floats(), loaded.floats([3, 5]))
    np.testing.assert_array_equal(np.asarray(mapped.pixels), loaded.pixels)
    chosen = recipe("fast", batch_size=8)
    one, other = (TrainingBatches(images, chosen, 1, 8, slice(0, 8)).draw(1, 0)[0] for images in (mapped, loaded))
    assert (one.images == other.images).all()
    assert (one.label == other.label).all()
