"""Pictures decoded once: by all cores, into a file that is mapped into memory, in the user's cache folder.

    ~/.cache/vitrm/images/KEY/pixels.npy     uint8 [n, 3, height, width]
    ~/.cache/vitrm/images/KEY/index.npz      of each row: the file's name, size and times, and why it could not be decoded

The key is of the folder, the preprocessing and Pillow's version.  A file whose size or times are others than in the index is
decoded anew, the rest is copied; an entry appears whole or not at all.  Of two processes the second waits for the first one's.
Small sets (`LEAST_FILES`, `LEAST_BYTES`) are not kept: they decode in a second.  Where the disk is full or may not be written
to, pictures are decoded into memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from vitrm.data.decoding import prepare
from vitrm.data.images import check_fits
from vitrm.data.mapped_rows import MappedRows
from vitrm.errors import UserError
from vitrm.preprocessing import Preprocessing
from vitrm.system.cache import cache_folder
from vitrm.system.files import atomic_folder
from vitrm.system.locks import lock
from vitrm.system.terminal import say

FORMAT = 1
LEAST_FILES, LEAST_BYTES = 500, 32 << 20  # a set of fewer files and of fewer bytes is not kept
PIXELS_FILE, INDEX_FILE = "pixels.npy", "index.npz"
_AT_ONCE = 256  # files handed to the workers together
_COPIED = 64 << 20  # bytes of rows copied at a time
_SPARE = 1 << 30  # bytes of the disk that are left free
_FIRST_WORD, _NEXT_WORD = 3.0, 30.0  # seconds
_WAIT = 86_400.0  # seconds for another process that decodes the same pictures
_kept: dict[Any, Decoded] | None = None  # within `decoding_once`


@dataclass(frozen=True)
class Decoded:
    """The pictures of some files, in their order; those of damaged ones are zeros."""

    pixels: NDArray[np.uint8]  # [n, 3, height, width]; or MappedRows, as in `Images`
    damaged: dict[int, str]  # position → why


@dataclass(frozen=True)
class _Index:
    """The index of an entry: what its rows are."""

    names: list[str]  # relative to the folder
    stats: NDArray[np.int64]  # [n, 3]: size, and the times of the last change of content and of the file, in ns
    damaged: dict[int, str]


@contextmanager
def decoding_once() -> Iterator[None]:
    """A context in which what was decoded into memory is kept for those who ask for the same again."""
    global _kept
    before, _kept = _kept, {}
    try:
        yield
    finally:
        _kept = before


def images_folder() -> Path:
    """The folder of all entries, made or not."""
    return cache_folder() / "images"


def decoded(files: Sequence[Path], folder: Path, of: Preprocessing, *, keep: bool = True) -> Decoded:
    """The pictures in `files`, which lie below `folder`; with `keep`, from the cache and into it.

    Raises `UserError` where there is room neither on the disk nor in memory.
    """
    index = _Index([os.path.relpath(file, folder) for file in files], _stats(files), {})
    key = (str(folder), of, tuple(index.names), index.stats.tobytes())
    if _kept is not None and key in _kept:
        return _kept[key]
    large = len(files) >= LEAST_FILES or int(index.stats[:, 0].sum()) >= LEAST_BYTES
    if keep and large:
        entry = images_folder() / _key(folder, of)
        found = _read(entry, index, of)
        if found is not None:
            return found
        try:
            return _build(entry, files, index, folder, of)
        except _NoRoomError as error:
            say(f"note: decoded pictures are not kept ({error}): every run decodes them anew", error=True)
    check_fits(len(files), of.size, str(folder))
    pixels = np.zeros((len(files), 3, *of.size), np.uint8)
    made = Decoded(pixels, _decode_into(pixels, files, range(len(files)), of, folder))
    if _kept is not None:
        _kept[key] = made
    return made


class _NoRoomError(Exception):
    """The cache cannot be written."""


def _key(folder: Path, of: Preprocessing) -> str:
    import PIL

    what = [FORMAT, os.path.realpath(folder), of.to_dict(), PIL.__version__]
    return hashlib.sha256(json.dumps(what).encode(errors="surrogateescape")).hexdigest()[:32]


def _stats(files: Sequence[Path]) -> NDArray[np.int64]:
    found = np.zeros((len(files), 3), np.int64)
    for i, file in enumerate(files):
        with suppress(OSError):  # gone, or no right: decoding says so
            s = os.stat(file)
            found[i] = s.st_size, s.st_mtime_ns, s.st_ctime_ns
    return found


def _read(entry: Path, wanted: _Index, of: Preprocessing) -> Decoded | None:
    """The `wanted` rows of an entry; None where one is missing, or of another state of its file."""
    opened = _open(entry, of)
    if opened is None:
        return None
    rows = _matching(opened[1], wanted)
    if (rows < 0).any():
        return None
    pixels, index = opened
    with suppress(OSError):
        os.utime(entry)  # used, for whoever clears the cache by age
    damaged = {i: index.damaged[int(row)] for i, row in enumerate(rows) if int(row) in index.damaged}
    return Decoded(cast("NDArray[np.uint8]", MappedRows(pixels, rows)), damaged)


def _open(entry: Path, of: Preprocessing) -> tuple[NDArray[np.uint8], _Index] | None:
    """The pixels, mapped, and the index of an entry; None where there is none, or none that is whole."""
    try:
        pixels = np.load(entry / PIXELS_FILE, mmap_mode="r", allow_pickle=False)
        with np.load(entry / INDEX_FILE, allow_pickle=False) as kept:
            names = kept["names"].tobytes().decode("utf-8", "surrogateescape").split("\0")
            stats = kept["stats"]
            damaged = {int(i): str(why) for i, why in json.loads(kept["damaged"].tobytes()).items()}
    except (OSError, ValueError, KeyError, EOFError, AttributeError):
        return None
    except Exception:  # zipfile's and numpy's own errors for a damaged file
        return None
    fits = pixels.shape == (len(names), 3, *of.size) and stats.shape == (len(names), 3)
    return (pixels, _Index(names, stats, damaged)) if fits and pixels.dtype == np.uint8 else None


def _matching(have: _Index, wanted: _Index) -> NDArray[np.int64]:
    """The row in `have` of each file of `wanted`; −1 where there is none of the same size and times."""
    if have.names == wanted.names:
        return np.where((have.stats == wanted.stats).all(1), np.arange(len(have.names)), -1)
    at = {name: row for row, name in enumerate(have.names)}
    rows = np.array([at.get(name, -1) for name in wanted.names], np.int64)
    same = (have.stats[rows] == wanted.stats).all(1)
    return np.where((rows >= 0) & same, rows, -1)


def _build(entry: Path, files: Sequence[Path], index: _Index, folder: Path, of: Preprocessing) -> Decoded:
    """Decodes what the entry lacks into a new one, which takes its place.  Raises `_NoRoomError`."""
    needed = len(files) * 3 * of.size[0] * of.size[1]
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(entry.parent).free
    except OSError as error:
        raise _NoRoomError(f"{entry.parent}: {error.strerror}") from None
    if needed + _SPARE > free:
        raise _NoRoomError(
            f"they take {_size(needed)}, {entry.parent} has {_size(free)} free; $XDG_CACHE_HOME names another place"
        )
    with _alone(entry, folder):
        found = _read(entry, index, of)  # another process may have made it meanwhile
        if found is not None:
            return found
        began = time.monotonic()
        try:
            with atomic_folder(entry) as temporary:
                made = _fill(temporary, entry, files, index, folder, of)
        except UserError as error:  # a full disk, a right that is missing
            raise _NoRoomError(str(error)) from None
        found = _read(entry, made, of)
        if found is None:
            raise _NoRoomError(f"{entry} cannot be read back")
        seconds = time.monotonic() - began
        say(f"decoded pictures of {folder} are kept in {entry} ({_size(needed)}, {seconds:.0f} s)", error=True)
        return found


@contextmanager
def _alone(entry: Path, folder: Path) -> Iterator[None]:
    """A context in which no other process makes this entry."""
    file, what = entry.with_name(f".{entry.name}.decoding.lock"), f"the cache of {folder}"
    way_out = "wait for it, or train with --no-cache"
    with ExitStack() as held:
        try:
            held.enter_context(lock(file, what, way_out, wait=_FIRST_WORD))
        except UserError:
            say(f"another process decodes the pictures of {folder}: waiting", error=True)
            held.enter_context(lock(file, what, way_out, wait=_WAIT))
        yield


def _fill(
    temporary: Path, entry: Path, files: Sequence[Path], index: _Index, folder: Path, of: Preprocessing
) -> _Index:
    """Writes a new entry to `temporary`, with what the old one has; returns its index."""
    path = temporary / PIXELS_FILE
    shape = (len(files), 3, *of.size)
    pixels = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    with open(path, "rb+") as file:  # of a full disk a map learns by a signal that ends the process
        os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    old = _open(entry, of)
    rows = np.full(len(files), -1) if old is None else _matching(old[1], index)
    damaged = {}
    if old is not None:
        kept = np.flatnonzero(rows >= 0)
        each = max(1, _COPIED // (3 * of.size[0] * of.size[1]))
        for some in (kept[i : i + each] for i in range(0, len(kept), each)):
            pixels[some] = old[0][rows[some]]
        damaged = {int(i): old[1].damaged[int(rows[i])] for i in kept if int(rows[i]) in old[1].damaged}
    damaged |= _decode_into(pixels, files, np.flatnonzero(rows < 0).tolist(), of, folder)
    pixels.flush()
    made = replace(index, damaged=damaged)
    names = "\0".join(made.names).encode("utf-8", "surrogateescape")
    np.savez(
        temporary / INDEX_FILE,
        names=np.frombuffer(names, np.uint8),
        stats=made.stats,
        damaged=np.frombuffer(json.dumps(damaged).encode(), np.uint8),
    )
    return made


def _decode_into(
    pixels: NDArray[np.uint8], files: Sequence[Path], positions: Sequence[int], of: Preprocessing, folder: Path
) -> dict[int, str]:
    """Decodes the files at `positions` into their rows, by all cores, and says how far it is; returns why some could not be."""

    def one(i: int) -> NDArray[np.uint8] | str:
        try:
            return prepare(files[i], of)
        except UserError as error:
            return str(error)

    damaged: dict[int, str] = {}
    began = told = time.monotonic()
    # Pillow decodes and resizes without Python's lock.
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "decoder") as pool:
        for start in range(0, len(positions), _AT_ONCE):
            some = positions[start : start + _AT_ONCE]
            for i, result in zip(some, pool.map(one, some), strict=True):
                if isinstance(result, str):
                    damaged[i] = result
                else:
                    pixels[i] = result
            now, done = time.monotonic(), start + len(some)
            if done < len(positions) and now - told > (_FIRST_WORD if told == began else _NEXT_WORD):
                told = now
                rate = done / (now - began)
                left = (len(positions) - done) / rate
                say(
                    f"decoding {folder}: {done:,} of {len(positions):,} pictures, {rate:.0f} a second, {left:.0f} s left",
                    error=True,
                )
    return damaged


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
