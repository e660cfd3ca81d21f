"""Cutting a data set into parts: stratified, and by the data set alone, never by a run's seed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vitrm.data.images import Images
from vitrm.errors import UserError

SPLITS = ("train", "validation", "test")
_CUT_SEED = 20260319  # of every stratified cut; changing it would leak test images between versions


@dataclass(frozen=True)
class Splits:
    """The three parts of a data set, of one image size."""

    train: Images
    validation: Images
    test: Images


def limited(images: Images, count: int) -> Images:
    """`count` of `images`, drawn from all classes: the same ones every time.  Raises `UserError` for too few or many."""
    if not 2 <= count <= len(images):
        raise UserError(f"limit_train is {count}, expected 2 … {len(images)}, the number of training images")
    return images.take(np.sort(np.random.default_rng(0).permutation(len(images))[:count]))


def stratified(labels: NDArray[np.int64], fraction: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices (rest, cut), in order, where `cut` takes `fraction` of every class, and at least one image of it."""
    random = np.random.default_rng(_CUT_SEED)
    cut = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        cut[random.permutation(members)[: max(1, round(fraction * len(members)))]] = True
    return np.flatnonzero(~cut), np.flatnonzero(cut)


def part(images: Images, split: str, test_fraction: float) -> Images:
    """Cuts a data set without a test part of its own."""
    rest, test = stratified(images.labels, test_fraction)
    if split == "test":
        return replace(images.take(test), split=split)
    return train_or_validation(images.take(rest), split)


def train_or_validation(images: Images, split: str) -> Images:
    """Cuts a tenth of each class off for validation; gives it, or the rest for `split` "train"."""
    train, validation = stratified(images.labels, 0.1)
    return replace(images.take(train if split == "train" else validation), split=split)
