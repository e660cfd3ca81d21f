"""The images themselves: those an artifact and its eager model answer differently, or the least certain ones."""

from __future__ import annotations

from html import escape

import numpy as np
from numpy.typing import NDArray

from vitrm.runtime.bench.accuracy import NO_ANSWER, Predictions, least_certain
from vitrm.runtime.bench.report import png
from vitrm.runtime.bench.rows import CaseEvidence

_DIFFERING = 24  # images shown at most
_UNCERTAIN = 12


def gallery(subject: CaseEvidence, *, repeat: bool = False) -> str:
    """HTML: a sentence with the counts, and the images; with `repeat`, no images where nothing differs."""
    name = f"<b>{escape(subject.name)}</b>"
    count = len(subject.sample)
    compared = subject.comparison
    if compared is None or subject.reference is None:
        text = f"{name} has no eager model to compare with. The {_UNCERTAIN} images it is least certain about:"
        return _block(text, subject, least_certain(subject.predictions, _UNCERTAIN))
    differing = len(compared.disagreeing)
    if differing == 0:
        text = f"{name} and its eager model give the same answer on all {count:,} images."
        if repeat:
            return f"<p>{text}</p>"
        shown = least_certain(subject.reference, min(_UNCERTAIN, count))
        text += f" The {len(shown)} that the eager model is least certain about, where a difference would show first:"
        return _block(text, subject, shown)
    order = _worst_first(subject, compared.disagreeing)[:_DIFFERING]
    flips = ""
    if compared.gained is not None and compared.lost is not None:
        both = differing - compared.gained - compared.lost
        flips = f": {compared.lost} newly wrong, {compared.gained} newly right, {both} wrong either way"
    shown_part = "" if differing <= _DIFFERING else f" The first {_DIFFERING}:"
    text = f"{name} answers {differing:,} of {count:,} images differently from its eager model{flips}.{shown_part}"
    return _block(text, subject, order)


def _worst_first(subject: CaseEvidence, indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """Newly wrong, then newly right, then the rest; within each, the surest mistakes first."""
    sure = subject.predictions.probabilities.max(1)[indices]
    rank = np.full(len(indices), 2)
    if subject.sample.labels is not None and subject.reference is not None:
        labels = subject.sample.labels[indices]
        rank[subject.predictions.top1[indices] == labels] = 1
        rank[subject.reference.top1[indices] == labels] = 0
    return indices[np.lexsort((-sure, rank))]


def _block(text: str, subject: CaseEvidence, indices: NDArray[np.int64]) -> str:
    tiles = "".join(_tile(subject, int(i)) for i in indices)
    return f'<p>{text}</p><ul class="gallery">{tiles}</ul>'


def _tile(subject: CaseEvidence, i: int) -> str:
    sample = subject.sample
    label = None if sample.labels is None else int(sample.labels[i])
    truth = "" if label is None else _class(subject, label)
    number = int(sample.index[i])
    alt = f"{sample.split or sample.name} image {number}" + (f", a {truth}" if truth else "")
    lines = [f'<span class="truth">{escape(truth) or "unlabelled"}</span>']
    if subject.reference is not None:
        lines.append(_answer("eager", subject, subject.reference, i, label))
    lines.append(_answer("artifact", subject, subject.predictions, i, label))
    return (
        f'<li><img src="{png.data_uri(sample.pixels[i])}" alt="{escape(alt, quote=True)}" loading="lazy">'
        f"<div>{''.join(lines)}<span class=number>#{number}</span></div></li>"
    )


def _answer(who: str, subject: CaseEvidence, predictions: Predictions, i: int, label: int | None) -> str:
    top = int(predictions.top1[i])
    if top == NO_ANSWER:
        return f'<span class="wrong">{who}: not finite</span>'
    verdict = "" if label is None else "right" if top == label else "wrong"
    mark = {"right": "✓ ", "wrong": "✗ ", "": ""}[verdict]
    share = float(predictions.probabilities[i, top])
    return f'<span class="{verdict}">{mark}{who}: {escape(_class(subject, top))} ({share * 100:.0f} %)</span>'


def _class(subject: CaseEvidence, label: int) -> str:
    classes = subject.sample.classes or tuple(subject.metadata.classes)
    return classes[label] if label < len(classes) else str(label)
