"""Images that stay in a file: a set may be larger than the memory."""

from __future__ import annotations

import mmap
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray


class MappedRows:
    """Images [n, 3, H, W] in a file that is mapped into memory: chosen ones are read when they are asked for, as arrays."""

    def __init__(self, mapped: NDArray[np.uint8], rows: NDArray[np.int64]) -> None:
        self._mapped, self._rows = mapped, rows
        self.shape: tuple[int, ...] = (len(rows), *mapped.shape[1:])
        self.dtype, self.ndim = mapped.dtype, mapped.ndim
        self.nbytes = int(np.prod(self.shape, dtype=np.int64))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> NDArray[np.uint8]:
        self.fetch(index)
        # A plain array: of a slice of the map a view would keep the file's pages.
        return np.array(self._mapped[self._rows[index]])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[np.uint8]:
        return self[:] if dtype is None else self[:].astype(dtype)

    def take(self, index: Any) -> MappedRows:
        """Those at `index` (a slice, an index array or a mask); none is read."""
        return MappedRows(self._mapped, self._rows[index])

    def fetch(self, index: Any) -> None:
        """Has the system read the rows at `index` from the disk, all at once; does not wait for it.

        Copying alone waits for one page after the other, which takes some twenty times as long for rows in any order.
        """
        mapped = self._mapped
        if not (
            isinstance(mapped, np.memmap) and isinstance(mapped.base, mmap.mmap) and hasattr(mmap, "MADV_WILLNEED")
        ):
            return
        start = mapped.offset % mmap.ALLOCATIONGRANULARITY  # of the first row, in the map
        each = mapped[:1].nbytes
        for row in np.atleast_1d(self._rows[index]).tolist():
            first = (start + row * each) // mmap.PAGESIZE * mmap.PAGESIZE
            with suppress(OSError):  # only advice: copying reads what was not fetched
                mapped.base.madvise(mmap.MADV_WILLNEED, first, start + (row + 1) * each - first)
