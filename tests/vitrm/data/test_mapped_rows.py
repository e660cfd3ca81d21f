"""Rows of a mapped file: what an index gives, and that a batch is fetched from the disk at once."""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from vitrm.data.mapped_rows import MappedRows


def _made(folder: Path, count: int) -> tuple[NDArray[np.uint8], Path]:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3, 90, 90), dtype=np.uint8)
    np.save(folder / "pixels.npy", pixels)
    return pixels, folder / "pixels.npy"


def test_an_index_gives_what_it_gives_of_an_array(tmp_path: Path) -> None:
    pixels, path = _made(tmp_path, 20)
    order = np.random.default_rng(1).permutation(20)
    rows = MappedRows(np.load(path, mmap_mode="r"), order)
    for index in (0, -1, slice(3, 9), [1, 19], np.arange(20) % 2 == 0, []):
        np.testing.assert_array_equal(rows[index], pixels[order][index])
    np.testing.assert_array_equal(rows.take([4, 2])[1], pixels[order[2]])


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="only Linux says which pages of a file are in memory")
def test_rows_are_fetched_without_waiting_for_each(tmp_path: Path) -> None:
    pixels, path = _made(tmp_path, 200)
    offset, each = path.stat().st_size - pixels.nbytes, pixels[0].nbytes
    with path.open("rb") as file:

        def in_memory(row: int) -> bool:
            got = bytearray(each)
            try:
                return os.preadv(file.fileno(), [got], offset + row * each, os.RWF_NOWAIT) == each
            except BlockingIOError:
                return False

        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        chosen = [3, 77, 120, 199]
        try:
            dropped = not any(map(in_memory, chosen))
        except OSError as error:
            pytest.skip(f"this file system cannot say what is in memory: {error}")
        if not dropped:
            pytest.skip("this file system keeps its files in memory")
        MappedRows(np.load(path, mmap_mode="r"), np.arange(200)).fetch(chosen)
        began = time.monotonic()
        while not all(map(in_memory, chosen)):
            assert time.monotonic() - began < 60, "rows were not fetched"
            time.sleep(0.01)
        others = [
            row
            for row in range(0, 200, 10)
            if min(abs(row - other) for other in chosen) > 1 + 2 * mmap.PAGESIZE // each
        ]
        assert not all(map(in_memory, others)), "all of the file was read"
