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
class Judged:
    """A line under an image, colored by whether what it says is right."""

    verdict: str  # right or wrong; empty without a label
    text: str


@dataclass(frozen=True)
class Tile:
    """One image, the answers to it, and a line that says who is wrong."""

    image: str  # a data: address
    alt: str
    truth: str  # its class; empty without a label
    verdict: Judged | None  # None without a label
    answers: tuple[Judged, ...]
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
        flips = (
            f": {compared.lost:,} newly wrong (only eager is right), {compared.gained:,} newly right (only eager is wrong), "
            f"{both:,} both wrong (with different answers)"
        )
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
            galleries.append(_gallery(case, f"{wrong}. {_wrong_too(case, labels)}{which}", new))
    return galleries


def _wrong_too(case: CaseEvidence, labels: NDArray[np.int64]) -> str:
    """Says on how many of an artifact's mistakes its eager model is wrong too; empty without one."""
    if case.reference is None:
        return ""
    wrong = case.predictions.top1 != labels
    count, both = int(wrong.sum()), int((wrong & (case.reference.top1 != labels)).sum())
    how_many = "all" if both == count else "none" if both == 0 else f"{both:,}"
    return f"On {how_many} of them its eager model is wrong too. "


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
    return Tile(
        image=png_address(sample.pixels[i]),
        alt=f"{sample.split or sample.name} image {number}" + (f", a {truth}" if truth else ""),
        truth=truth,
        verdict=None if label is None else _verdict(case, i, label),
        answers=_answers(case, i, label),
        number=number,
    )


def _verdict(case: CaseEvidence, i: int, label: int) -> Judged:
    """Says who is wrong: that a mistake is the model's own is not to be taken for one of the export."""
    right = bool(case.predictions.top1[i] == label)
    mark, verdict = ("✓", "right") if right else ("✗", "wrong")
    if case.reference is None:
        return Judged(verdict, f"{mark} {verdict}")
    if (case.reference.top1[i] == label) == right:
        return Judged(
            verdict,
            f"{mark}\u00a0both\u00a0{verdict}" + (f": {_top(case, case.predictions, i)}" if _same(case, i) else ""),
        )
    return Judged(verdict, f"{mark} newly {verdict}")


def _answers(case: CaseEvidence, i: int, label: int | None) -> tuple[Judged, ...]:
    """Returns a line for each answer; one for both where the line above has the answer already."""
    if case.reference is None:
        return (_answer("", case, case.predictions, i, label),)
    both = (("eager", case.reference), ("artifact", case.predictions))
    if label is not None and _same(case, i):
        shares = [_share(predictions, i) for _, predictions in both]
        if len(set(shares)) == 1:
            return (Judged("", f"both {shares[0]}"),)
        return (Judged("", ", ".join(f"{who}\u00a0{share}" for (who, _), share in zip(both, shares, strict=True))),)
    return tuple(_answer(f"{who}: ", case, predictions, i, label) for who, predictions in both)


def _same(case: CaseEvidence, i: int) -> bool:
    """Returns whether eager model and artifact give the same answer to an image."""
    top = case.predictions.top1[i]
    return case.reference is not None and bool(top != NO_ANSWER and top == case.reference.top1[i])


def _answer(who: str, case: CaseEvidence, predictions: Predictions, i: int, label: int | None) -> Judged:
    top = int(predictions.top1[i])
    verdict = "" if label is None else "right" if top == label else "wrong"
    mark = {"right": "✓ ", "wrong": "✗ ", "": ""}[verdict]
    share = "" if top == NO_ANSWER else f" ({_share(predictions, i)})"
    return Judged(verdict, f"{mark}{who}{_top(case, predictions, i)}{share}")


def _top(case: CaseEvidence, predictions: Predictions, i: int) -> str:
    top = int(predictions.top1[i])
    return "not finite" if top == NO_ANSWER else _class(case, top)


def _share(predictions: Predictions, i: int) -> str:
    return f"{float(predictions.probabilities[i].max()) * 100:.0f} %"


def _class(case: CaseEvidence, label: int) -> str:
    classes = case.sample.classes or tuple(case.metadata.classes)
    return classes[label] if label < len(classes) else str(label)


def png_address(pixels: NDArray[np.uint8]) -> str:
    """Returns an RGB image, uint8 [3, H, W], as a `data:` address, for a page that must stand alone."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
