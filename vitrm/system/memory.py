"""Running out of memory, said in one line that names the way out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vitrm.errors import UserError

# torch has a type of its own for CUDA's memory alone; on a CPU, and from the libraries below, it is a RuntimeError.
_SAID = re.compile(
    r"DefaultCPUAllocator|not enough memory|can't allocate memory|cannot allocate memory|out of memory|bad_alloc"
    r"|could not create a memory|ALLOC_FAILED|Resource temporarily unavailable"  # of a thread's stack
    r"|failed to map segment",  # of a library that is loaded only now
    re.IGNORECASE,
)
_SIZE = re.compile(r"allocate (\d+) bytes|allocate ([\d.]+ [KMGT]i?B)")


class OutOfMemory(UserError):
    """Memory did not suffice."""


@contextmanager
def shortage_explained(way_out: Callable[[], str]) -> Iterator[None]:
    """A context in which running out of memory raises `OutOfMemory`, which ends with the `way_out`."""
    try:
        yield
    except (MemoryError, RuntimeError, ImportError) as error:
        if not isinstance(error, MemoryError) and not _SAID.search(str(error)):
            raise
        size = _SIZE.search(str(error))
        asked = "" if size is None else f" ({size[2] or f'{int(size[1]) / 1e6:.0f} MB'} more were asked for)"
        raise OutOfMemory(f"out of memory{asked}: {way_out()}") from error
