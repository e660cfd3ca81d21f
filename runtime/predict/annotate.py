"""Copies of pictures and videos with the answer written on them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vitrm.errors import UserError, explain_os_error
from vitrm.runtime.predict.video import frame_rate, is_camera, is_video, load_opencv
from vitrm.system.files import atomic_path
from vitrm.system.terminal import neutral_line

if TYPE_CHECKING:
    from PIL import Image

    from vitrm.runtime.predict.predictions import Prediction

_WRITTEN = {".jpg", ".jpeg", ".png", ".webp"}  # kinds of files that are written as they came; others become PNG
_SHOWN = 3  # classes on a picture
_INK, _PAPER, _BAR = (255, 255, 255), (0, 0, 0, 150), (80, 170, 255)


def annotated(image: NDArray[np.uint8], prediction: Prediction) -> Image.Image:
    """A copy of `image`, RGB [H, W, 3], on which the best classes stand, with a bar each, and the steps."""
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.fromarray(image)
    small = min(picture.size)
    if small < 160:  # letters need pixels
        scale = -(-160 // small)
        picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    size = max(12, min(picture.size) // 24)
    font = ImageFont.load_default(size)
    lines = [
        (neutral_line(label), share)
        for label, share in zip(prediction.labels[:_SHOWN], prediction.probabilities[:_SHOWN], strict=True)
    ]
    used = prediction.steps_used
    foot = (
        "" if used is None else f"{used} step{'' if used == 1 else 's'}, sure {100 * (prediction.halt_prob or 0):.0f} %"
    )
    pad, high = size // 2, size + size // 2
    layer = Image.new("RGBA", picture.size)
    pen = ImageDraw.Draw(layer)
    width = min(picture.width, 14 * size)
    pen.rectangle((0, 0, width, pad + high * (len(lines) + bool(foot))), fill=_PAPER)
    for i, (label, share) in enumerate(lines):
        top, number = pad + i * high, f"{100 * share:.0f} %"
        room = width - 3 * pad - pen.textlength(number, font)
        pen.rectangle(
            (pad, top + size + 3, pad + (width - 2 * pad) * share, top + size + 3 + max(1, size // 8)), fill=_BAR
        )
        pen.text((pad, top), _fitting(label, room, pen, font), font=font, fill=_INK)
        pen.text((width - pad, top), number, font=font, fill=_INK, anchor="ra")
    pen.text((pad, pad + len(lines) * high), foot, font=font, fill=_INK)
    return Image.alpha_composite(picture.convert("RGBA"), layer).convert("RGB")


def _fitting(text: str, room: float, pen: Any, font: Any) -> str:
    if pen.textlength(text, font) <= room:
        return text
    while text and pen.textlength(text + "…", font) > room:
        text = text[:-1]
    return text + "…"


class Annotations:
    """A folder of annotated copies, which lie there as the originals do below the folder that they share."""

    def __init__(self, folder: Path, paths: Iterable[Path], rate: float | None = None) -> None:
        """`paths`: all that will be added.  `rate`: frames a second that are taken of videos, None for all.

        Raises `UserError` if a copy would replace its original, or the folder cannot be made.
        """
        self.folder, self.rate = folder, rate
        absolute = [Path(os.path.abspath(path)) for path in paths]
        root = Path(os.path.commonpath([path.parent for path in absolute])) if absolute else Path("/")
        self._targets = {path: folder / _named(path, path.relative_to(root)) for path in absolute}
        for path, target in self._targets.items():
            if target.exists() and target.samefile(path):
                raise UserError(f"--annotate {folder} would replace {path} by its copy: name another folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise explain_os_error(error, f"making {folder}") from None
        self._writer: Any = None
        self._video: Path | None = None

    def add(self, prediction: Prediction, image: NDArray[np.uint8]) -> None:
        """Writes the copy of a picture, or adds a frame to that of a video."""
        source = Path(os.path.abspath(prediction.path))
        target, picture = self._targets[source], annotated(image, prediction)
        target.parent.mkdir(parents=True, exist_ok=True)
        if prediction.seconds is None:
            kind = {".png": "PNG", ".webp": "WEBP"}.get(target.suffix.lower(), "JPEG")
            with atomic_path(target) as temporary:
                picture.save(temporary, format=kind, quality=92)
            return
        if self._video != target:
            self._end_video()
            self._begin_video(source, target, picture.size)
        self._writer.write(np.ascontiguousarray(np.asarray(picture)[..., ::-1]))

    def _begin_video(self, source: Path, target: Path, size: tuple[int, int]) -> None:
        cv2 = load_opencv()
        rate = self.rate or (25.0 if is_camera(source) else frame_rate(source))
        self._writer, self._video = cv2.VideoWriter(str(target), cv2.VideoWriter_fourcc(*"mp4v"), rate, size), target
        if not self._writer.isOpened():
            raise UserError(f"OpenCV cannot write {target}: choose a place you can write to")

    def _end_video(self) -> None:
        if self._writer is not None:
            self._writer.release()
        self._writer = self._video = None

    def __enter__(self) -> Annotations:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_video()


def _named(source: Path, below: Path) -> Path:
    """The copy's place below the folder, for a source that lies at `below`."""
    suffix = source.suffix.lower()
    if is_video(source):
        return below if suffix == ".mp4" else below.with_name(below.name + ".mp4")
    return below if suffix in _WRITTEN else below.with_name(below.name + ".png")
