"""Test images for the page: some that the model is sure of at once, and some on which it needs its steps.

Those are a choice.  What the page's settings do with test images on the whole is counted on all that were tried.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitrm.data.images import to_floats
from vitrm.runtime.artifact.metadata import Metadata
from vitrm.runtime.bench.images import Sample, load_sample
from vitrm.runtime.stepping import SteppingSession

CONSIDERED = 512  # test images that are tried
_BATCH = 64
_THRESHOLDS = 100  # into which the page's slider divides 0 … 1


@dataclass(frozen=True)
class GalleryImage:
    """One test image."""

    pixels: NDArray[np.uint8]  # [3, size, size]
    label: int
    group: str  # easy or hard
    name: str  # for people: where it is from, and its class


@dataclass(frozen=True)
class Outcomes:
    """Steps taken and right answers over many test images, at every depth and threshold that the page can be set to."""

    images: int
    steps: NDArray[np.int64]  # [depths, thresholds]: all images' together, at depth 1, 2, … and threshold 0, 0.01, … 1
    right: NDArray[np.int64]  # [depths, thresholds]


@dataclass(frozen=True)
class PageGallery:
    """The images, or none."""

    images: tuple[GalleryImage, ...]
    note: str  # the images in a sentence, or why there are none
    first: int = 0  # place of the image that the page begins with
    outcomes: Outcomes | None = None  # of all images that were tried


def choose_gallery(
    session: SteppingSession,
    count: int,
    threshold: float,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    deepest: int | None = None,
) -> PageGallery:
    """Chooses `count` images from the test part of the data set that the artifact was trained on.

    Half are easy: right after one step, the surest ones, of as many classes as there are.  Half are hard: some that the
    first step gets wrong and a later one right, some that halt in between at `threshold`, some that do not halt.
    The page begins with one that halts in between, if there is one: there the steps can be watched.  `deepest` is the depth up
    to which outcomes are counted (default: the artifact's).  Where the data set is not at hand there are no images, and the
    note says so.
    """
    metadata = session.metadata
    if count == 0:
        return PageGallery((), "No test images were asked for.")
    sample = load_sample(metadata, session.name, data_dir=data_dir, limit=CONSIDERED)
    if sample.labels is None:
        name = metadata.data.get("name", "its data set")
        return PageGallery(
            (), f"No test images here: {name} was not at hand when the page was made. Choose pictures of your own."
        )
    steps = metadata.steps
    tops, halts = _trajectories(session, sample, max(steps, deepest or steps))
    easy, hard = choose(tops[:steps], halts[:steps], sample.labels, threshold, count)
    chosen = [_image(sample, i, group, metadata) for group, some in (("easy", easy), ("hard", hard)) for i in some]
    tried = f"{len(sample)} of {sample.total:,}" if len(sample) < sample.total else f"the {sample.total:,}"
    note = (
        f"The easy and hard ones are chosen, out of {tried} test images of {sample.name}: the surest after one step, and "
        "some that need more."
    )
    return PageGallery(
        tuple(chosen),
        note,
        first=beginning(halts[:steps, easy + hard], threshold),
        outcomes=count_outcomes(tops, halts, sample.labels),
    )


def beginning(halts: NDArray[np.float32], threshold: float) -> int:
    """Returns the place of the image that takes the most steps and still halts before the last: 0 where none does.

    Args:
        halts: [steps, n], halt_prob after each step.
        threshold: halt_prob beyond which an image halts.
    """
    halted = halts > threshold
    used = np.where(halted.any(0), halted.argmax(0), 0)  # [n], from 0
    between = np.where(used < len(halts) - 1, used, 0)
    return int(between.argmax()) if between.size else 0


def count_outcomes(tops: NDArray[np.int64], halts: NDArray[np.float32], labels: NDArray[np.int64]) -> Outcomes:
    """Counts steps and right answers of n images at each depth and threshold.

    Args:
        tops: [depths, n], the most probable class after each step.
        halts: [depths, n], halt_prob after each step.
        labels: [n].
    """
    depths, images = tops.shape
    right = tops == labels
    steps_taken = np.empty((depths, _THRESHOLDS + 1), np.int64)
    right_ones = np.empty_like(steps_taken)
    for place in range(_THRESHOLDS + 1):
        halted = halts > place / _THRESHOLDS
        first = np.where(halted.any(0), halted.argmax(0), depths - 1)
        for depth in range(depths):
            last = np.minimum(first, depth)
            steps_taken[depth, place] = (last + 1).sum()
            right_ones[depth, place] = right[last, np.arange(images)].sum()
    return Outcomes(images, steps_taken, right_ones)


def choose(
    tops: NDArray[np.int64], halts: NDArray[np.float32], labels: NDArray[np.int64], threshold: float, count: int
) -> tuple[list[int], list[int]]:
    """Positions of the easy and of the hard images, `count` in all where there are so many.

    Args:
        tops: [steps, n], the most probable class after each step.
        halts: [steps, n], halt_prob after each step.
        labels: [n].
        threshold: halt_prob beyond which an image halts.
        count: of both together.
    """
    steps = len(tops)
    halted = halts > threshold
    used = np.where(halted.any(0), halted.argmax(0), steps - 1)  # [n], from 0
    right = tops == labels
    mended = ~right[0] & right[used, np.arange(len(labels))]
    between = (used > 0) & (used < steps - 1)
    easy = _one_of_each(labels, np.argsort(-halts[0], kind="stable"), allowed=right[0] & (used == 0))[
        : (count + 1) // 2
    ]
    rest = np.lexsort((halts.max(0), -used))  # the most steps first, then the least sure
    some = count // 6
    order = [
        *_one_of_each(labels, rest, allowed=mended)[:some],
        *_one_of_each(used, rest, allowed=between & ~mended)[:some],
        *rest,
    ]
    hard = [i for i in dict.fromkeys(int(i) for i in order) if i not in easy][: count // 2]
    return easy, hard


def _one_of_each(kinds: NDArray[np.int64], order: NDArray[np.int64], allowed: NDArray[np.bool_]) -> list[int]:
    """The positions in `order` that are `allowed`: the first one of each kind, then the second one of each, and so on."""
    seen: dict[int, int] = {}
    ranked: list[tuple[int, int]] = []
    for i in order[allowed[order]]:
        kind = int(kinds[i])
        seen[kind] = seen.get(kind, -1) + 1
        ranked.append((seen[kind], int(i)))
    return [i for _, i in sorted(ranked, key=lambda one: one[0])]


def _trajectories(
    session: SteppingSession, sample: Sample, steps: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    tops = np.empty((steps, len(sample)), np.int64)
    halts = np.empty((steps, len(sample)), np.float32)
    for begin in range(0, len(sample), _BATCH):
        some = slice(begin, begin + _BATCH)
        state = session.start(to_floats(sample.pixels[some]))
        for step in range(steps):
            state.step()
            tops[step, some], halts[step, some] = state.logits.argmax(1), state.halt_prob
    return tops, halts


def _image(sample: Sample, i: int, group: str, metadata: Metadata) -> GalleryImage:
    assert sample.labels is not None
    label = int(sample.labels[i])
    return GalleryImage(
        pixels=sample.pixels[i],
        label=label,
        group=group,
        name=f"test image {int(sample.index[i])}, {_class_name(metadata.class_names, label)}",
    )


def _class_name(names: Sequence[str], label: int) -> str:
    return names[label] if label < len(names) else str(label)
