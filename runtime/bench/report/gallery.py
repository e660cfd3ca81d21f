"""Gallery of the page: the images that an artifact and its eager model answer differently, or the least certain ones."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitrm.classification.confusion import surest_mistakes
from vitrm.runtime.bench.accuracy import NO_ANSWER, Predictions, least_certain
from vitrm.runtime.bench.rows import CaseEvidence

_DIFFERING = 24  # images shown at most
_UNCERTAIN = 6
_MISTAKEN = 12


@dataclass(frozen=True)
class ShownAnswer:
    """One model's answer to one image."""

    verdict: str  # right or wrong; empty without a label
    text: str


@dataclass(frozen=True)
class Tile:
    """One image and the answers to it."""

    image: str  # a data: address
    alt: str
    truth: str  # its class; empty without a label
    answers: tuple[ShownAnswer, ...]
    number: int  # its position in the data set


@dataclass(frozen=True)
class Gallery:
    """A sentence about an artifact, and the images it speaks of."""

    name: str  # of the artifact, with which the sentence begins
    text: str
    tiles: tuple[Tile, ...] = ()


def gallery(case: CaseEvidence, *, repeat: bool = False) -> Gallery:
    """Chooses the images that say most about an artifact; with `repeat`, none where nothing differs."""
    count = len(case.sample)
    compared = case.comparison
    if compared is None or case.reference is None:
        text = f"has no eager model to compare with. The {_UNCERTAIN} images it is least certain about:"
        return _gallery(case, text, least_certain(case.predictions, _UNCERTAIN))
    differing = len(compared.disagreeing)
    if differing == 0:
        text = f"and its eager model give the same answer on all {count:,} images."
        if repeat:
            return _gallery(case, text)
        shown = least_certain(case.reference, min(_UNCERTAIN, count))
        text += f" The {len(shown)} that the eager model is least certain about, where a difference would show first:"
        return _gallery(case, text, shown)
    flips = ""
    if compared.gained is not None and compared.lost is not None:
        both = differing - compared.gained - compared.lost
        flips = f": {compared.lost} newly wrong, {compared.gained} newly right, {both} wrong either way"
    part = "" if differing <= _DIFFERING else f" The first {_DIFFERING}:"
    text = f"answers {differing:,} of {count:,} images differently from its eager model{flips}.{part}"
    return _gallery(case, text, _worst_first(case, compared.disagreeing)[:_DIFFERING])


def mistakes(cases: Sequence[CaseEvidence]) -> list[Gallery]:
    """Chooses the wrong answers that each artifact is surest of; none without labels, or without mistakes.

    Of artifacts that give the same answers to the same images, only the first one's; of others, what was not shown before.
    """
    galleries: list[Gallery] = []
    shown: list[CaseEvidence] = []
    seen: set[tuple[int, int, int]] = set()  # sample, image, answer
    for case in cases:
        labels, answers = case.sample.labels, case.predictions
        if labels is None:
            continue
        worst = surest_mistakes(labels, answers.top1, answers.probabilities.max(1), _MISTAKEN)
        if not len(worst):
            continue
        wrong = f"is wrong on {int((answers.top1 != labels).sum()):,} of {len(case.sample):,} images"
        alike = next((c for c in shown if c.sample is case.sample and _same_answers(c, case)), None)
        if alike:
            galleries.append(_gallery(case, f"{wrong}: it gives the same answers as {alike.name}."))
        else:
            shown.append(case)
            new = [i for i in worst if (id(case.sample), int(i), int(answers.top1[i])) not in seen]
            seen |= {(id(case.sample), int(i), int(answers.top1[i])) for i in worst}
            which = f"The {len(worst)} it is surest of" + _not_above(len(worst), len(new))
            galleries.append(_gallery(case, f"{wrong}. {which}", new))
    return galleries


def _not_above(worst: int, new: int) -> str:
    """Says which of the surest mistakes are shown, the others being those of artifacts before."""
    if new == worst:
        return ":"
    return (
        " are all among those above, with the same answer."
        if not new
        else f", without {worst - new} that are above with the same answer:"
    )


def _same_answers(one: CaseEvidence, other: CaseEvidence) -> bool:
    return bool((one.predictions.top1 == other.predictions.top1).all())


def _gallery(case: CaseEvidence, text: str, indices: Iterable[np.int64] = ()) -> Gallery:
    return Gallery(case.name, text, tuple(_tile(case, int(i)) for i in indices))


def _worst_first(case: CaseEvidence, indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """Orders images: newly wrong, then newly right, then the rest; within each, the surest mistakes first."""
    sure = case.predictions.probabilities.max(1)[indices]
    rank = np.full(len(indices), 2)
    if case.sample.labels is not None and case.reference is not None:
        labels = case.sample.labels[indices]
        rank[case.predictions.top1[indices] == labels] = 1
        rank[case.reference.top1[indices] == labels] = 0
    return indices[np.lexsort((-sure, rank))]


def _tile(case: CaseEvidence, i: int) -> Tile:
    sample = case.sample
    label = None if sample.labels is None else int(sample.labels[i])
    truth = "" if label is None else _class(case, label)
    number = int(sample.index[i])
    answers = [] if case.reference is None else [_answer("eager", case, case.reference, i, label)]
    return Tile(
        image=png_address(sample.pixels[i]),
        alt=f"{sample.split or sample.name} image {number}" + (f", a {truth}" if truth else ""),
        truth=truth,
        answers=(*answers, _answer("artifact", case, case.predictions, i, label)),
        number=number,
    )


def _answer(who: str, case: CaseEvidence, predictions: Predictions, i: int, label: int | None) -> ShownAnswer:
    top = int(predictions.top1[i])
    if top == NO_ANSWER:
        return ShownAnswer("wrong", f"{who}: not finite")
    verdict = "" if label is None else "right" if top == label else "wrong"
    mark = {"right": "✓ ", "wrong": "✗ ", "": ""}[verdict]
    share = float(predictions.probabilities[i, top])
    return ShownAnswer(verdict, f"{mark}{who}: {_class(case, top)} ({share * 100:.0f} %)")


def _class(case: CaseEvidence, label: int) -> str:
    classes = case.sample.classes or tuple(case.metadata.classes)
    return classes[label] if label < len(classes) else str(label)


def png_address(pixels: NDArray[np.uint8]) -> str:
    """Returns an RGB image, uint8 [3, H, W], as a `data:` address, for a page that must stand alone."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
