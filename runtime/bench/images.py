"""The images an artifact is measured on: its own data set's test part, or photographs where that is not at hand."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitrm import data as datasets
from vitrm.data.images import to_floats
from vitrm.errors import UserError
from vitrm.runtime.artifact.metadata import Metadata

PHOTO_CROPS = 256  # images to compare on without a data set
_MEBIBYTES = 1024  # of photographs, as float32
_ORDER_SEED = 7  # of the order in which images are drawn, the same in every run


@dataclass(frozen=True)
class Sample:
    """Images, with labels where they have some."""

    pixels: NDArray[np.uint8]  # [n, 3, H, W]
    labels: NDArray[np.int64] | None  # [n]
    index: NDArray[np.int64]  # [n]: positions in the whole part
    classes: tuple[str, ...]  # names, by label
    name: str  # of the data set
    split: str  # "test", or "" for images that belong to none, such as all of a folder
    total: int  # images in the whole part
    note: str | None = (
        None  # why these are not the artifact's own test images, and what to do; or what is odd about them
    )

    def __len__(self) -> int:
        return len(self.pixels)

    def order(self) -> NDArray[np.int64]:
        """All positions in a fixed random order: a data set may be sorted by class, a part of it should not be."""
        return np.random.default_rng(_ORDER_SEED).permutation(len(self))

    def batch(self, size: int, number: int) -> NDArray[np.float32]:
        """The `number`-th batch of `size` images in that order, starting over at the end: float32 [size, 3, H, W]."""
        positions = self.order()[(np.arange(size) + size * number) % len(self)]
        return to_floats(self.pixels[positions])


def load_sample(
    metadata: Metadata,
    where: str,
    *,
    data: str | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    split: str = "test",
    whole: bool = False,
) -> Sample:
    """The `split` images of `data` (default: the data set named in `metadata`), at most `limit` of them.

    With `whole`, of a folder that the artifact was not trained on all images, of whichever of its classes.
    Without `data`, a data set that is not there is replaced by photographs, and the sample's note says so.
    Raises `UserError` if `data` cannot be loaded or has other classes than the artifact `where` knows.
    """
    name = data or metadata.data.get("name")
    try:
        if not isinstance(name, str):
            raise UserError(f"{where} does not say what it was trained on: name a data set with --data")
        if whole and os.path.isdir(name) and name not in datasets.DATASETS and not _same_folder(name, metadata):
            images = _new_folder(Path(name), metadata, where)
        else:
            images = datasets.load(name, split, data_dir=data_dir, preprocessing=metadata.preprocessing)
            images = _in_order(images, metadata, where)
    except (UserError, ImportError) as error:
        if data is not None:
            if isinstance(error, UserError):
                raise
            raise UserError(f"data set {data} needs a package that is not installed ({error})") from None
        return _photographs(metadata, str(error), limit)
    sample = Sample(
        pixels=images.pixels,
        labels=images.labels,
        index=np.arange(len(images)),
        classes=images.classes,
        name=images.name,
        split=images.split,
        total=len(images),
        note="; ".join(images.notes) or None,
    )
    if limit is not None and limit < len(sample):
        chosen = np.sort(sample.order()[:limit])
        sample = replace(sample, pixels=images.pixels[chosen], labels=images.labels[chosen], index=chosen)
    return sample


def _same_folder(name: str, metadata: Metadata) -> bool:
    """Tells whether `name` is the folder that the artifact was trained on."""
    trained = metadata.data.get("name")
    return isinstance(trained, str) and os.path.realpath(trained) == os.path.realpath(name)


def _new_folder(folder: Path, metadata: Metadata, where: str) -> datasets.Images:
    """All images of a folder; of one that the artifact was trained on elsewhere, before it moved, the test part alone."""
    images = datasets.read_all(folder, metadata.preprocessing, metadata.class_names, where)
    if images.split or metadata.data.get("train_id") != datasets.part(images, "train", 0.2).id:
        return images
    note = f"{folder} holds the images that it was trained on: accuracy is that on the test part"
    images = datasets.part(images, "test", 0.2)
    return replace(images, notes=(*images.notes, note))


def _in_order(images: datasets.Images, metadata: Metadata, where: str) -> datasets.Images:
    """The images with the artifact's labels.  Raises `UserError` where the data set has other classes."""
    _check_classes(images, metadata, where)
    if not metadata.classes or images.classes == tuple(metadata.classes):
        return images
    labels = np.array([metadata.classes.index(name) for name in images.classes])[images.labels]
    return replace(images, labels=labels, classes=tuple(metadata.classes))


def _check_classes(images: datasets.Images, metadata: Metadata, where: str) -> None:
    known = tuple(metadata.class_names)
    if len(images.classes) != len(known) or (metadata.classes and set(images.classes) != set(known)):
        raise UserError(
            f"data set {images.name} has {len(images.classes)} classes ({_few(images.classes)}), but {where} was trained on "
            f"{len(known)} ({_few(known)}): name the data set it was trained on"
        )


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")


def _photographs(metadata: Metadata, reason: str, limit: int | None) -> Sample:
    size = metadata.image_size
    count = datasets.affordable(min(PHOTO_CROPS, limit or PHOTO_CROPS), size, _MEBIBYTES)
    try:
        pixels = datasets.photo_crops(count, size)
        name = "photo crops"
    except ImportError:
        # Latency does not depend on what the pixels show; agreement on noise still says whether two graphs compute the same.
        pixels = np.random.default_rng(_ORDER_SEED).integers(0, 256, (count, 3, size, size), np.uint8)
        name = "noise"
    return Sample(
        pixels=pixels,
        labels=None,
        index=np.arange(count),
        classes=tuple(metadata.classes),
        name=name,
        split="",
        total=count,
        note=f"no accuracy: {reason}; agreement is measured on {count} unlabelled images ({name})",
    )
