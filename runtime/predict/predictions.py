"""Pictures in, labels out, by any session."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitrm.data import decoding
from vitrm.data.images import to_floats
from vitrm.errors import UserError
from vitrm.preprocessing import Preprocessing
from vitrm.runtime.predict.video import frames, is_camera, is_video
from vitrm.runtime.session import Session

BATCH = 32


@dataclass(frozen=True)
class Prediction:
    """A model's answer for one picture."""

    path: Path
    labels: tuple[str, ...]  # the most probable classes, the first one first
    probabilities: tuple[float, ...]  # of `labels`, by softmax over all classes
    halt_prob: float | None = None  # the model's own chance of being right; None for a baseline
    steps_used: int | None = None  # None for a baseline
    seconds: float | None = None  # of a video's frame, since its beginning
    error: str | None = None  # why the picture could not be read; there are no labels then

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        if self.error is not None:
            return {"path": str(self.path), "error": self.error}
        top = [{"label": a, "probability": round(p, 6)} for a, p in zip(self.labels, self.probabilities, strict=True)]
        when = {} if self.seconds is None else {"seconds": round(self.seconds, 3)}
        return {"path": str(self.path), **when, "top": top, "halt_prob": self.halt_prob, "steps_used": self.steps_used}


def prepare(path: str | os.PathLike[str], preprocessing: Preprocessing | int) -> NDArray[np.float32]:
    """One picture as a model takes it: float32 [3, height, width] in [0, 1].

    `preprocessing` is that of the artifact, `session.metadata.preprocessing`; a number is the side of the default one's square.
    Raises `UserError`, naming it, for a file that cannot be decoded.
    """
    of = Preprocessing.square(preprocessing) if isinstance(preprocessing, int) else preprocessing
    return Picture(Path(path)).prepared(of)


def predict(
    session: Session,
    paths: Iterable[str | os.PathLike[str]],
    *,
    top: int = 5,
    steps: int | None = None,
    halt_threshold: float | None = None,
    batch: int | None = None,
    rate: float | None = None,
) -> Iterator[Prediction]:
    """Classifies pictures, in their order; of a video each frame.

    Args:
        session: an open artifact.
        paths: picture and video files, and cameras' device files; one that cannot be read gives a prediction with an
            `error`, and the rest goes on.
        top: classes named per picture, at most.
        steps: the depth; None for the artifact's own.
        halt_threshold: as `Session.infer` has it; None for the artifact's own.
        batch: pictures computed at once; None for what pays (see `best_batch`).  A camera's frames are computed as they come.
        rate: frames of a second of video, at most; None for all.

    Raises:
        UserError: for a depth or threshold that the artifact cannot have.
    """
    for prediction, _ in predict_with_pictures(
        session, paths, top=top, steps=steps, halt_threshold=halt_threshold, batch=batch, rate=rate
    ):
        yield prediction


def predict_with_pictures(
    session: Session,
    paths: Iterable[str | os.PathLike[str]],
    *,
    top: int,
    steps: int | None,
    halt_threshold: float | None,
    batch: int | None,
    rate: float | None,
) -> Iterator[tuple[Prediction, Picture]]:
    """As `predict`; each prediction with the picture that it is of."""
    of, names = session.metadata.preprocessing, session.metadata.class_names
    batch = best_batch(session, halt_threshold) if batch is None else batch
    for chunk in _batches(_pictures(map(Path, paths), rate), batch):
        images: list[NDArray[np.float32]] = []
        failures: dict[int, str] = {}
        for i, picture in enumerate(chunk):
            try:
                images.append(picture.prepared(of))
            except UserError as error:
                failures[i] = str(error)
        result = session.infer(np.stack(images), steps=steps, halt_threshold=halt_threshold) if images else None
        row = 0
        for i, picture in enumerate(chunk):
            if i in failures:
                yield Prediction(picture.path, (), (), error=failures[i]), picture
                continue
            assert result is not None
            probabilities = _softmax(result.logits[row])
            best = np.argsort(-probabilities, kind="stable")[:top]
            yield (
                Prediction(
                    path=picture.path,
                    labels=tuple(names[c] for c in best),
                    probabilities=tuple(float(probabilities[c]) for c in best),
                    halt_prob=None if result.halt_prob is None else float(result.halt_prob[row]),
                    steps_used=None if result.steps_used is None else int(result.steps_used[row]),
                    seconds=picture.seconds,
                ),
                picture,
            )
            row += 1


def best_batch(session: Session, halt_threshold: float | None = None) -> int:
    """Pictures that are best computed at once.

    A loop goes on until all of its batch have halted: on a CPU, where a batch is hardly faster than its pictures one by one, that
    costs more than it brings.  From a stepwise folder's batch they leave as they halt.
    """
    own = session.metadata
    threshold = own.halt_threshold if halt_threshold is None else halt_threshold
    alone = own.graph == "loop" and threshold < 1 and session.device_kind == "cpu"
    return 1 if alone else BATCH


@dataclass(frozen=True)
class Picture:
    """A picture file, a frame of a video, or why a video could not be read."""

    path: Path
    frame: NDArray[np.uint8] | None = None  # RGB [H, W, 3]; None: of the file
    seconds: float | None = None  # of a frame
    error: UserError | None = None

    def pixels(self) -> NDArray[np.uint8]:
        """RGB [H, W, 3], upright.  Raises `UserError` for what cannot be read."""
        if self.error is not None:
            raise self.error
        return decoding.decode(self.path) if self.frame is None else self.frame

    def prepared(self, of: Preprocessing) -> NDArray[np.float32]:
        """As a model takes it: float32 [3, height, width] in [0, 1].  Raises `UserError` for what cannot be read."""
        if self.error is None and self.frame is None:
            return to_floats(decoding.prepare(self.path, of))
        return to_floats(decoding.fit(self.pixels(), of))


def _pictures(paths: Iterable[Path], rate: float | None) -> Iterator[Picture]:
    for path in paths:
        if not is_video(path):
            yield Picture(path)
            continue
        try:
            for frame in frames(path, rate):
                yield Picture(path, frame.pixels, frame.seconds)
        except UserError as error:
            yield Picture(path, error=error)


def _batches(pictures: Iterable[Picture], batch: int) -> Iterator[list[Picture]]:
    """Pictures to be computed at once; a camera's frame waits for no other."""
    chunk: list[Picture] = []
    for picture in pictures:
        chunk.append(picture)
        if len(chunk) == batch or (picture.frame is not None and is_camera(picture.path)):
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    powers = np.exp(logits.astype(np.float64) - float(logits.max()))
    return powers / powers.sum()
