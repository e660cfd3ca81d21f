"""Frames of a video file or a camera, by OpenCV.

OpenCV and not PyAV: its wheel reads cameras (Video4Linux), which PyAV's does not; it turns the videos of phones upright;
and a Jetson brings its own.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitrm.errors import UserError

VIDEO_SUFFIXES = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".mts", ".m2ts", ".3gp"}
CAMERAS = "/dev/video"
_LOST = 0.9  # of the frames that a file declares; with fewer it is damaged, though the count is an estimate
_PATIENCE = 10.0  # seconds that a camera may take for a frame


@dataclass(frozen=True)
class Frame:
    """A picture of a video."""

    pixels: NDArray[np.uint8]  # RGB [H, W, 3]
    seconds: float  # since the video's, or the camera's, beginning


def is_camera(path: Path) -> bool:
    """True for a camera's device file."""
    try:
        return str(path).startswith(CAMERAS) and stat.S_ISCHR(os.stat(path).st_mode)
    except OSError:
        return False


def is_video(path: Path) -> bool:
    """True for what is read frame by frame: a file named like a video, or a camera."""
    return path.suffix.lower() in VIDEO_SUFFIXES or is_camera(path)


def camera(name: str) -> Path:
    """The device file of the source "camera" (the first one) or "camera:N".  Raises `UserError` where there is none."""
    number = name.partition(":")[2] or "0"
    device = Path(f"{CAMERAS}{number}")
    if is_camera(device):
        return device
    found = sorted(str(path) for path in Path("/dev").glob("video*"))
    there = f"there are {', '.join(found)}" if found else f"no {CAMERAS}N is there"
    raise UserError(f"{name} would be {device}, which is no camera ({there}): connect it, or name a video file")


def load_opencv() -> Any:
    """The module cv2.  Raises `UserError` where it is not installed."""
    try:
        import cv2
    except ImportError:
        raise UserError(
            "videos and cameras are read by OpenCV, which is not installed: pip install 'vitrm[video]'"
        ) from None
    return cv2


def frames(path: Path, rate: float | None = None) -> Iterator[Frame]:
    """The frames of a video file, or of a camera for as long as it gives any.

    `rate`: frames a second, at most; of the others none is decoded into pixels.  A camera's frame is the newest there is.
    Raises `UserError` for what cannot be read, and at the end of a file that lacks frames.
    """
    cv2 = load_opencv()
    live = is_camera(path)
    if not live and not path.is_file():
        raise UserError(f"{path} is not a file: name a video")
    quiet = cv2.setLogLevel(0) if hasattr(cv2, "setLogLevel") else None  # ours is the message
    try:
        capture = cv2.VideoCapture(str(path))
        try:
            if not capture.isOpened():
                raise UserError(f"{path} cannot be read as a video: replace it, or convert it to H.264 in an .mp4")
            source = _newest(cv2, capture, path) if live else _in_order(cv2, capture, path)
            yield from _thinned(source, rate)
        finally:
            capture.release()
    finally:
        if quiet is not None:
            cv2.setLogLevel(quiet)


def frame_rate(path: Path) -> float:
    """Frames a second of a video file; 25 where it does not say."""
    cv2 = load_opencv()
    capture = cv2.VideoCapture(str(path))
    try:
        return float(capture.get(cv2.CAP_PROP_FPS)) or 25.0
    finally:
        capture.release()


class _Undecoded:
    """A frame that has been grabbed; `pixels` decodes it."""

    def __init__(self, cv2: Any, capture: Any, seconds: float) -> None:
        self.cv2, self.capture, self.seconds = cv2, capture, seconds

    def pixels(self) -> NDArray[np.uint8] | None:
        there, image = self.capture.retrieve()
        return self.cv2.cvtColor(image, self.cv2.COLOR_BGR2RGB) if there else None


class _Decoded:
    """A frame that a camera's thread has decoded."""

    def __init__(self, image: NDArray[np.uint8], seconds: float) -> None:
        self.image, self.seconds = image, seconds

    def pixels(self) -> NDArray[np.uint8]:
        return self.image


def _thinned(source: Iterator[_Undecoded | _Decoded], rate: float | None) -> Iterator[Frame]:
    due = 0.0
    for frame in source:
        if rate is not None and frame.seconds < due - 1e-6:
            continue
        pixels = frame.pixels()
        if pixels is None:
            continue
        yield Frame(pixels, frame.seconds)
        if rate is not None:
            due = max(due + 1 / rate, frame.seconds)  # a late frame does not make the following ones hurry


def _in_order(cv2: Any, capture: Any, path: Path) -> Iterator[_Undecoded]:
    declared = capture.get(cv2.CAP_PROP_FRAME_COUNT)
    every = 1 / (capture.get(cv2.CAP_PROP_FPS) or 25.0)
    count = 0
    while capture.grab():
        yield _Undecoded(cv2, capture, count * every)
        count += 1
    if count < _LOST * declared or not count:
        raise UserError(f"{path} ends after {count} of {max(declared, 0):.0f} frames: it is damaged, replace it")


def _newest(cv2: Any, capture: Any, path: Path) -> Iterator[_Decoded]:
    """Yields what a thread has read last: a slow model skips frames instead of falling behind."""
    import time

    ready, stopped = threading.Condition(), threading.Event()
    newest: list[_Decoded] = []
    began = time.monotonic()

    def read() -> None:
        while not stopped.is_set():
            there, image = capture.read()
            with ready:
                if not there:
                    stopped.set()
                else:
                    newest[:] = [_Decoded(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), time.monotonic() - began)]
                ready.notify()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        while True:
            with ready:
                if not ready.wait_for(lambda: newest or stopped.is_set(), _PATIENCE) or not newest:
                    raise UserError(
                        f"{path} gives no more frames: look at its cable, and whether another program has it"
                    )
                frame = newest.pop()
            yield frame
    finally:
        stopped.set()
        reader.join(_PATIENCE)
