"""Which pictures are meant: files, folders, glob patterns, videos, cameras, standard input."""

from __future__ import annotations

import glob
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vitrm.data.decoding import readable_suffixes
from vitrm.data.folders import files_below
from vitrm.errors import UserError
from vitrm.runtime.predict.video import VIDEO_SUFFIXES, camera
from vitrm.system.terminal import neutral_line, say

STANDARD_INPUT = "-"
_CAMERA = re.compile(r"camera(:\d+)?")


@contextmanager
def pictures(sources: Sequence[str]) -> Iterator[list[Path]]:
    """The picture files that `sources` name, each once, in order; of a folder those below it, hidden ones left out.

    A video is one of them where it is named itself, or by a pattern; "camera" and "camera:N" are a camera's device file;
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
        return _below(source)
    if _CAMERA.fullmatch(source) and not os.path.exists(source):
        return [camera(source)]
    if os.path.exists(source):
        return [Path(source)]
    if glob.has_magic(source):
        files = [Path(name) for name in sorted(glob.glob(source, recursive=True)) if os.path.isfile(name)]
        if files:
            return files
        raise UserError(f"no file is called like {source}: look at the pattern, and quote it")
    raise UserError(
        f"{source} does not exist: name a picture, a video, a folder, a pattern like 'photos/*.jpg', camera, or - for "
        "standard input"
    )


def _below(folder: str) -> list[Path]:
    """The pictures below a folder; videos there are not meant by its name, which is said."""
    suffixes, everything = readable_suffixes(), files_below(Path(folder))
    files = [file for file in everything if file.suffix.lower() in suffixes]
    videos = sum(file.suffix.lower() in VIDEO_SUFFIXES for file in everything)
    if not files:
        where = f"; its videos ({videos}) are read where they are named, as in '{folder}/*.mp4'" if videos else ""
        raise UserError(f"{folder} holds no pictures: expected files ending in {', '.join(sorted(suffixes))}{where}")
    if videos:
        say(
            neutral_line(
                f"note: {folder} holds {videos} videos, which are passed over: name them, as in '{folder}/*.mp4'"
            ),
            error=True,
        )
    return files


def _received(scratch: Path) -> Path:
    if sys.stdin.isatty():
        raise UserError(
            "- reads a picture from standard input, which is a terminal: pipe one in, as in `cat a.jpg | …`"
        )
    file = scratch / "standard input"
    with open(file, "wb") as target:
        shutil.copyfileobj(sys.stdin.buffer, target)
    return file
