"""Pictures in, labels out, by any session."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitrm.data import decoding
from vitrm.data.images import to_floats
from vitrm.errors import UserError
from vitrm.preprocessing import Preprocessing
from vitrm.runtime.session import Session


@dataclass(frozen=True)
class Prediction:
    """A model's answer for one picture."""

    path: Path
    labels: tuple[str, ...]  # the most probable classes, the first one first
    probabilities: tuple[float, ...]  # of `labels`, by softmax over all classes
    halt_prob: float | None = None  # the model's own chance of being right; None for a baseline
    steps_used: int | None = None  # None for a baseline
    error: str | None = None  # why the picture could not be read; there are no labels then

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        if self.error is not None:
            return {"path": str(self.path), "error": self.error}
        top = [{"label": a, "probability": round(p, 6)} for a, p in zip(self.labels, self.probabilities, strict=True)]
        return {"path": str(self.path), "top": top, "halt_prob": self.halt_prob, "steps_used": self.steps_used}


def prepare(path: str | os.PathLike[str], preprocessing: Preprocessing | int) -> NDArray[np.float32]:
    """One picture as a model takes it: float32 [3, height, width] in [0, 1].

    `preprocessing` is that of the artifact, `session.metadata.preprocessing`; a number is the side of the default one's square.
    Raises `UserError`, naming it, for a file that cannot be decoded.
    """
    of = Preprocessing.square(preprocessing) if isinstance(preprocessing, int) else preprocessing
    return to_floats(decoding.prepare(Path(path), of))


def predict(
    session: Session,
    paths: Iterable[str | os.PathLike[str]],
    *,
    top: int = 5,
    steps: int | None = None,
    halt_threshold: float | None = None,
    batch: int = 32,
) -> Iterator[Prediction]:
    """Classify pictures, in their order.

    Args:
        session: an open artifact.
        paths: picture files; one that cannot be decoded gives a prediction with an `error`, and the rest goes on.
        top: classes named per picture, at most.
        steps: the depth; None for the artifact's own.
        halt_threshold: as `Session.infer` has it; None for the artifact's own.
        batch: pictures computed at once.

    Raises:
        UserError: for a depth or threshold that the artifact cannot have.
    """
    of, names = session.metadata.preprocessing, session.metadata.class_names
    left = map(Path, paths)
    while chunk := list(islice(left, batch)):
        images: list[NDArray[np.float32]] = []
        failures: dict[int, str] = {}
        for i, path in enumerate(chunk):
            try:
                images.append(prepare(path, of))
            except UserError as error:
                failures[i] = str(error)
        result = session.infer(np.stack(images), steps=steps, halt_threshold=halt_threshold) if images else None
        row = 0
        for i, path in enumerate(chunk):
            if i in failures:
                yield Prediction(path, (), (), error=failures[i])
                continue
            assert result is not None
            probabilities = _softmax(result.logits[row])
            best = np.argsort(-probabilities, kind="stable")[:top]
            yield Prediction(
                path=path,
                labels=tuple(names[c] for c in best),
                probabilities=tuple(float(probabilities[c]) for c in best),
                halt_prob=None if result.halt_prob is None else float(result.halt_prob[row]),
                steps_used=None if result.steps_used is None else int(result.steps_used[row]),
            )
            row += 1


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    powers = np.exp(logits.astype(np.float64) - float(logits.max()))
    return powers / powers.sum()
