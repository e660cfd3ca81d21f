"""Which pictures are meant: files, folders, glob patterns, standard input."""

from __future__ import annotations

import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vitrm.data.decoding import readable_suffixes
from vitrm.data.folders import files_below
from vitrm.errors import UserError

STANDARD_INPUT = "-"


@contextmanager
def pictures(sources: Sequence[str]) -> Iterator[list[Path]]:
    """The picture files that `sources` name, each once, in order; of a folder those below it, hidden ones left out.

    "-" is a picture on standard input, kept in a temporary file while the context lasts.
    Raises `UserError` for a source that is not there, or names no picture.
    """
    with tempfile.TemporaryDirectory(prefix="vitrm-predict-") as scratch:
        found: dict[Path, None] = {}
        for source in sources:
            found.update(dict.fromkeys(_of(source, Path(scratch))))
        yield list(found)


def _of(source: str, scratch: Path) -> list[Path]:
    if source == STANDARD_INPUT:
        return [_received(scratch)]
    if os.path.isdir(source):
        suffixes = readable_suffixes()
        files = [file for file in files_below(Path(source)) if file.suffix.lower() in suffixes]
        if not files:
            raise UserError(f"{source} holds no pictures: expected files ending in {', '.join(sorted(suffixes))}")
        return files
    if os.path.exists(source):
        return [Path(source)]
    if glob.has_magic(source):
        files = [Path(name) for name in sorted(glob.glob(source, recursive=True)) if os.path.isfile(name)]
        if files:
            return files
        raise UserError(f"no file is called like {source}: look at the pattern, and quote it")
    raise UserError(
        f"{source} does not exist: name a picture, a folder, a pattern like 'photos/*.jpg', or - for standard input"
    )


def _received(scratch: Path) -> Path:
    if sys.stdin.isatty():
        raise UserError(
            "- reads a picture from standard input, which is a terminal: pipe one in, as in `cat a.jpg | …`"
        )
    file = scratch / "standard input"
    with open(file, "wb") as target:
        shutil.copyfileobj(sys.stdin.buffer, target)
    return file
