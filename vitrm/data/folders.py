"""Folders of images by class, as they are in the wild.

    ROOT/CLASS/…/image                  cut here into train, validation and test
    ROOT/{train,val,test}/CLASS/…       cut by its owner; names in any case, with the usual variants (Training, valid, seg_test …)

Passed over: hidden files and folders (`.ipynb_checkpoints`, a Mac's `._NAME`), `__MACOSX`, `@eaDir`, and files that are no
images; what is passed over beyond these is said in the images' `notes`.  Links to folders are followed, each folder once.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitrm.data.cache import decoded
from vitrm.data.decoding import HEIF_SUFFIXES, readable_suffixes
from vitrm.data.images import Images
from vitrm.data.mapped_rows import MappedRows
from vitrm.data.splits import part, train_or_validation
from vitrm.errors import UserError
from vitrm.preprocessing import Preprocessing

# A split's folder: one of these words, alone or at the end of a name like seg_train; in any case.
_SPLIT_NAMES = {
    "train": re.compile(r"(.*[_\-. ])?(train|training|trainset|train_set)"),
    "validation": re.compile(r"(.*[_\-. ])?(val|valid|validation|dev|eval)"),
    "test": re.compile(r"(.*[_\-. ])?(test|testing|testset|test_set)"),
}
_NOT_FOR_PEOPLE = {"__macosx", "@eadir", "$recycle.bin", "lost+found"}
_SHOWN = 5  # names of files in a message
SHARDS_HINT = "unpack them into class folders first; examples/unpack_shards.py does so for WebDataset shards, at the size that training needs"


@dataclass(frozen=True)
class Reading:
    """Settings of how the pictures of a folder are read."""

    preprocessing: Preprocessing
    skip_damaged: bool = False  # leave out files that cannot be decoded, and name them in the notes
    keep: bool = True  # decoded once, in the user's cache folder (vitrm.data.cache)


@dataclass
class _Found:
    """The files of one part, and what was passed over on the way."""

    files: list[tuple[Path, int]] = field(default_factory=list)  # with their labels
    others: Counter[str] = field(default_factory=Counter)  # files that are no images, by suffix


def read_folder(root: Path, split: str, how: Reading) -> Images:
    """The part `split` of the folder `root`, read as `how` says.

    Raises `UserError` for a folder that is not laid out as above, saying what is odd, and for damaged files, all in one.
    """
    own = _own_splits(root)
    if "train" not in own:
        _check_layout(root)
        return part(_read(root, root, root, split, how), split, test_fraction=0.2)
    classes_of = own["train"]
    notes = _left_beside(root, own)
    if "test" not in own:
        if "validation" not in own:
            raise UserError(
                f"{root} has a train folder but no test folder: add one, or leave out the train level to have the images split here"
            )
        # As most sets with train and val alone are meant: val is what results are reported on.
        own = {"train": classes_of, "test": own["validation"]}
        notes.append(
            f"{root} has no test folder: the final accuracy is that on {own['test'].name}, and a tenth of {classes_of.name} "
            "selects the weights"
        )
    of_part = own.get(split, classes_of)
    images = _read(root, of_part, classes_of, split, how)
    images = replace(images, notes=(*notes, *images.notes))
    return train_or_validation(images, split) if of_part == classes_of and "validation" not in own else images


def read_all(root: Path, of: Preprocessing, classes: Sequence[str], whose: str) -> Images:
    """All images of the folder `root`, preprocessed as `of` says, labelled by `classes`: the folder may have some of them only.

    Of a folder that its owner cut into parts it is the test part.  Raises `UserError` as `read_folder` does, and for a class
    that is none of `classes`, which the model `whose` was trained on.
    """
    own = _own_splits(root)
    of_part = own.get("test", own.get("validation", own.get("train", root)))
    if not own:
        _check_layout(root)
    folders = _folders(of_part)
    names, renamed = _printable([p.name for p in folders])
    strange = [name for name in names if name not in classes]
    if strange or not folders:
        those = f"classes that {whose} was not trained on ({_listed(strange)})" if strange else "no class folders"
        raise UserError(f"{of_part} has {those}: expected some of its {len(classes)} ({_listed(list(classes))})")
    found = _Found()
    for folder, name in zip(folders, names, strict=True):
        _collect(folder, classes.index(name), found)
    pixels, labels, notes = _images_of(root, of_part, found, Reading(of))
    notes = _absent(of_part, labels, classes) + notes
    split = "" if of_part in (root, own.get("train")) else "test"
    return Images(pixels, labels, tuple(classes), str(root), split, (*notes, *renamed), of).loaded()


def _own_splits(root: Path) -> dict[str, Path]:
    """The folders of the parts that the owner cut, by split.  Raises `UserError` where two are meant to be the same one."""
    found: dict[str, Path] = {}
    for folder in _folders(root):
        for split, pattern in _SPLIT_NAMES.items():
            if not pattern.fullmatch(folder.name.lower()) or not _folders(folder):  # a class may be called "train", too
                continue
            if split in found:
                raise UserError(
                    f"{root} has two {split} folders, {found[split].name} and {folder.name}: leave one there"
                )
            found[split] = folder
    return found if "train" in found else {}


def _check_layout(root: Path) -> None:
    """Raises `UserError` where `root`'s folders are no classes."""
    folders = _folders(root)
    inside = [{p.name for p in _folders(folder)} for folder in folders]
    for folder in folders:
        if _own_splits(folder):
            raise UserError(f"{root} holds {folder.name!r}, which has a train folder: name {folder}, a set of its own")
    if len(folders) == 1 and len(inside[0]) > 1:
        raise UserError(
            f"{root} holds only the folder {folders[0].name!r}, which has folders itself: name {folders[0]}"
        )
    if len(folders) > 1 and len(inside[0]) > 1 and all(names == inside[0] for names in inside):
        listed = ", ".join(sorted(inside[0])[:_SHOWN])
        raise UserError(
            f"every folder of {root} holds the same folders ({listed}): are they the classes, or parts of the set? "
            "Expected ROOT/CLASS/images, or ROOT/{train,val,test}/CLASS/images"
        )


def _left_beside(root: Path, own: dict[str, Path]) -> list[str]:
    others = [p.name for p in _folders(root) if p not in own.values()]
    return [f"{root}: {_listed(others)} beside {_listed([p.name for p in own.values()])} left out"] if others else []


def _read(root: Path, of_part: Path, classes_of: Path, split: str, how: Reading) -> Images:
    folders = _folders(classes_of)
    names = [p.name for p in folders]
    if len(names) < 2:
        those = f"only the class {names[0]!r}" if names else "no class folders"
        if not names and (shards := [p.name for p in classes_of.glob("*.tar*")]):
            raise UserError(f"{classes_of} holds {len(shards)} archives ({_listed(sorted(shards))}): {SHARDS_HINT}")
        raise UserError(f"{classes_of} has {those}: expected at least two folders, one per class, with images in them")
    extra = sorted({p.name for p in _folders(of_part)} - set(names))
    if extra:
        raise UserError(f"{of_part} has classes that {classes_of} has not: {_listed(extra)}")
    found = _Found()
    for label, name in enumerate(names):
        count = _collect(of_part / name, label, found)
        if of_part == classes_of and count < 3:
            raise UserError(
                f"class {name!r} in {of_part} has {count} images{_unread(found)}: add some, or remove the class folder"
            )
    pixels, labels, notes = _images_of(root, of_part, found, how)
    notes = _absent(of_part, labels, names) + notes
    classes, renamed = _printable(names)
    return Images(pixels, labels, classes, str(root), split, (*notes, *renamed), how.preprocessing)


def _images_of(
    root: Path, of_part: Path, found: _Found, how: Reading
) -> tuple[NDArray[np.uint8], NDArray[np.int64], list[str]]:
    """Decodes what was found; returns pixels, labels and notes.  Raises `UserError` for no images, and for damaged ones."""
    if not found.files:
        raise UserError(f"{of_part} has no images{_unread(found)}: add some, or remove the folder")
    files = [file for file, _ in found.files]
    made = decoded(files, of_part, how.preprocessing, keep=how.keep)
    damaged = [made.damaged[i] for i in sorted(made.damaged)]
    if damaged and not how.skip_damaged:
        raise UserError(
            damaged[0]
            if len(damaged) == 1
            else f"{len(damaged)} files of {of_part} (vitrm-train --skip-damaged goes on without): {_first(damaged)}"
        )
    notes = [f"{len(damaged)} damaged files left out: {_first(damaged)}"] if damaged else []
    if found.others:
        notes.append(f"{of_part}: {_others(found)} passed over")
    labels = np.asarray([label for _, label in found.files], np.int64)
    if not damaged:
        return made.pixels, labels, notes
    whole = np.array([i not in made.damaged for i in range(len(files))])
    pixels: Any = made.pixels.take(whole) if isinstance(made.pixels, MappedRows) else made.pixels[whole]
    return pixels, labels[whole], notes


def _absent(of_part: Path, labels: NDArray[np.int64], classes: Sequence[str]) -> list[str]:
    """Says which classes have no images, where some have none."""
    absent = [name for label, name in enumerate(classes) if not (labels == label).any()]
    return (
        [f"{of_part} has no images of {_listed(absent)}: figures on it say nothing about these classes"]
        if absent
        else []
    )


def _collect(folder: Path, label: int, found: _Found) -> int:
    """Adds what is in the folder of a class; returns how many images that is."""
    suffixes, before = readable_suffixes(), len(found.files)
    for file in files_below(folder):
        suffix = file.suffix.lower()
        if suffix in suffixes:
            found.files.append((file, label))
        else:
            found.others[suffix or "no ending"] += 1
    return len(found.files) - before


def files_below(folder: Path) -> list[Path]:
    """The files below `folder`, in order, without what is not meant for people; links to folders are followed."""
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:  # a link to where it stands in
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if _for_people(name))
        found += (Path(place, name) for name in files if _for_people(name))
    return sorted(found)


def _folders(place: Path) -> list[Path]:
    if not place.is_dir():
        return []
    with os.scandir(
        place
    ) as entries:  # which tells folders from the thousands of files beside them without a look at each
        return sorted(place / entry.name for entry in entries if _for_people(entry.name) and entry.is_dir())


def _for_people(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in _NOT_FOR_PEOPLE


def _printable(names: list[str]) -> tuple[tuple[str, ...], list[str]]:
    """Class names as text; those whose bytes are not UTF-8 as the Windows code page has them, with a note."""
    texts, notes = [], []
    for name in names:
        raw = os.fsencode(name)
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            text = raw.decode("cp1252", "replace")
            notes.append(f"the class folder {raw!r} is not named in UTF-8: read as {text!r}")
        texts.append(text)
    return tuple(texts), notes


def _unread(found: _Found) -> str:
    return f" that can be read, and {_others(found)}" if found.others else ""


def _others(found: _Found) -> str:
    listed = ", ".join(f"{count} {suffix}" for suffix, count in found.others.most_common(_SHOWN))
    heif = " (.heic and .heif need pip install pillow-heif)" if set(found.others) & HEIF_SUFFIXES else ""
    return f"{sum(found.others.values())} files that are no images it reads: {listed}{heif}"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _first(messages: list[str]) -> str:
    more = f"; and {len(messages) - _SHOWN} more" if len(messages) > _SHOWN else ""
    return "; ".join(messages[:_SHOWN]) + more
