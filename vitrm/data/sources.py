"""Where images come from: digits (built in), CIFAR-10, CIFAR-100, or any folder of class folders.

Every data set comes in three parts: train, validation and test.  The test part is the data set's own
where it has one, else cut off first; validation is cut from what remains.  Training and selection must not touch `test`.

Torch-free at import; torchvision is loaded for CIFAR only.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitrm.data.decoding import fit, fit_square
from vitrm.data.folders import SHARDS_HINT, Reading, read_folder
from vitrm.data.images import Images, check_fits
from vitrm.data.splits import SPLITS, part, train_or_validation
from vitrm.errors import UserError
from vitrm.fields import did_you_mean, shown
from vitrm.preprocessing import Preprocessing

DATASETS = ("digits", "cifar10", "cifar100")
DATA_DIR_VARIABLE = "VITRM_DATA"
_CROP_SEED = 20260319


def load(
    name: str,
    split: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    size: int = 32,
    preprocessing: Preprocessing | None = None,
    download: bool = False,
    skip_damaged: bool = False,
    keep: bool = True,
    in_memory: int | None = None,
) -> Images:
    """The part `split` of data set `name`, brought to the model's size by `preprocessing`; None: by the default one, to `size` × `size` pixels.

    `name` is digits, cifar10, cifar100 or the path of a folder of class folders.  `data_dir` is where
    CIFAR's files are (default: the environment's VITRM_DATA, else `data`); with `download` torchvision
    fetches them there.  With `skip_damaged`, files of a folder that cannot be decoded are left out, and named in the
    images' `notes`; with `keep`, decoded pictures are kept in the user's cache folder for the next time.  A part of more
    bytes than `in_memory` is read from there when it is asked for (`MappedRows`); None: all of it is in memory.  Raises `UserError` if it is not there, damaged or not a data set.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {SPLITS}")
    check_known(name)
    of = preprocessing or Preprocessing.square(size)
    if name == "digits":
        return _digits(split, of)
    if name in ("cifar10", "cifar100"):
        return _cifar(name, split, _data_dir(data_dir), of, download)
    return read_folder(Path(name), split, Reading(of, skip_damaged, keep)).loaded(at_most=in_memory)


def check_known(name: str) -> None:
    """Raises `UserError` unless `name` is a data set's name or the path of a folder."""
    # os.path answers False where Path raises: for a name that is too long, or holds a NUL.
    if name in DATASETS or os.path.isdir(name):
        return
    hint = f"; {SHARDS_HINT}" if re.search(r"\.tar(\.\w+)?$", name) else ""
    if os.path.exists(name) and not hint:
        hint = "; there is a file of that name, but a folder is needed (one picture: vitrm-predict ARTIFACT FILE)"
    raise UserError(
        f"unknown data set {shown(name)}: choose {', '.join(DATASETS)} or the path of a folder of images by class"
        f"{hint or did_you_mean(name, DATASETS)}"
    )


def load_of_run(
    recorded: str, split: str, *, data_dir: str | os.PathLike[str] | None, preprocessing: Preprocessing
) -> Images:
    """The part `split` of the data set that a run recorded.

    `data_dir` is where the set is now: CIFAR's files, or a folder of images that has moved since.  Raises `UserError` as `load` does.
    """
    if recorded in DATASETS or data_dir is None:
        if os.path.isabs(recorded) and not os.path.lexists(recorded):
            raise UserError(
                f"the folder {shown(recorded)} is not there: if it has moved, name where it is now with --data-dir DIR"
            )
        return load(recorded, split, data_dir=data_dir, preprocessing=preprocessing)
    if not os.path.isdir(data_dir):
        raise UserError(f"--data-dir {os.fspath(data_dir)} is no folder: name the one that {shown(recorded)} is now")
    return load(os.fspath(data_dir), split, preprocessing=preprocessing)


def photo_crops(count: int, size: int = 32) -> NDArray[np.uint8]:
    """Natural images that need no download: crops of scikit-learn's two sample photographs, uint8 [count, 3, size, size].

    For parity checks of a model whose data set is not at hand; they have no labels.  The photographs have 427 × 640 pixels:
    larger crops are enlarged from a part of them.
    """
    from sklearn.datasets import load_sample_images

    photos = load_sample_images().images
    random = np.random.default_rng(_CROP_SEED)
    crops = np.empty((count, 3, size, size), np.uint8)
    for i in range(count):
        photo = photos[i % len(photos)]
        longest = min(photo.shape[:2])
        side = int(random.integers(size if size <= longest else longest // 2, longest + 1))
        top, left = (int(random.integers(0, extent - side + 1)) for extent in photo.shape[:2])
        crops[i] = fit_square(photo[top : top + side, left : left + side], size)
    return crops


def _data_dir(data_dir: str | os.PathLike[str] | None) -> Path:
    return Path(data_dir or os.environ.get(DATA_DIR_VARIABLE) or "data")


def _digits(split: str, of: Preprocessing) -> Images:
    from sklearn.datasets import load_digits

    digits = load_digits()
    check_fits(len(digits.images), of.size, "digits")
    gray = (digits.images * (255 / 16)).round().astype(np.uint8)  # 8 × 8, 0 … 16
    rgb = np.stack([fit(np.repeat(g[:, :, None], 3, 2), of) for g in gray])
    images = Images(
        rgb, digits.target.astype(np.int64), tuple(str(i) for i in range(10)), "digits", split, preprocessing=of
    )
    return part(images, split, test_fraction=0.2)


def _cifar(name: str, split: str, data_dir: Path, of: Preprocessing, download: bool) -> Images:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise UserError(
            f"{name} is read through torchvision, which does not import here ({error}): pip install torch torchvision"
        ) from None
    dataset = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    way_out = (
        f"put torchvision's copy ({dataset.base_folder}) there, name its parent with --data-dir DIR or {DATA_DIR_VARIABLE}, "
        "or let vitrm-train --download fetch it"
    )
    try:
        raw = dataset(str(data_dir), train=split != "test", download=download)
    except RuntimeError:
        raise UserError(f"{name} is not in {data_dir} (or its files are damaged): {way_out}") from None
    except OSError as error:
        raise UserError(f"{name} could not be downloaded to {data_dir} ({error}): {way_out}") from None
    pixels = raw.data.transpose(0, 3, 1, 2)
    if of.size != pixels.shape[2:]:
        check_fits(len(pixels), of.size, name)
        pixels = np.stack([fit(image, of) for image in raw.data])
    labels = np.asarray(raw.targets, np.int64)
    images = Images(np.ascontiguousarray(pixels), labels, tuple(raw.classes), name, split, preprocessing=of)
    return images if split == "test" else train_or_validation(images, split)
