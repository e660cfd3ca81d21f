"""Folders as they are in the wild: named by anybody, copied from anywhere, with files that nobody meant to be there."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitrm.data import load
from vitrm.errors import UserError


def fill(folder: Path | bytes, count: int = 5, seed: int = 0, suffix: str = "png") -> None:
    os.makedirs(folder, exist_ok=True)
    for i in range(count):
        pixels = np.random.default_rng((seed, i)).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        with open(os.path.join(os.fsencode(folder), f"{i}.{suffix}".encode()), "wb") as file:
            Image.fromarray(pixels).save(file, "PNG")


def classes_in(folder: Path, count: int = 5, seed: int = 0) -> None:
    for i, name in enumerate(("cat", "dog")):
        fill(folder / name, count, seed + i)


@pytest.mark.parametrize(
    ("train", "test"), [("Training", "Testing"), ("TRAIN", "Test"), ("seg_train", "seg_test"), ("my-train", "my-test")]
)
def test_splits_are_known_by_any_usual_name(tmp_path, train, test):
    classes_in(tmp_path / train, 10)
    classes_in(tmp_path / test, 4, seed=10)
    for validation in (None, "Valid"):
        if validation:
            classes_in(tmp_path / validation, 3, seed=20)
        parts = {split: load(str(tmp_path), split, size=8) for split in ("train", "validation", "test")}
        assert {p.classes for p in parts.values()} == {("cat", "dog")}
        assert [len(p) for p in parts.values()] == ([20, 6, 8] if validation else [18, 2, 8])


def test_without_a_test_part_validation_is_reported_on_and_that_is_said(tmp_path):
    classes_in(tmp_path / "train", 10)
    classes_in(tmp_path / "val", 4, seed=10)
    parts = {split: load(str(tmp_path), split, size=8) for split in ("train", "validation", "test")}
    assert [len(p) for p in parts.values()] == [18, 2, 8]
    assert "the final accuracy is that on val" in parts["train"].notes[0]


def test_what_is_not_meant_for_people_is_passed_over(tmp_path):
    classes_in(tmp_path)
    before = load(str(tmp_path), "train", size=8)
    fill(tmp_path / "cat" / ".ipynb_checkpoints", 3, seed=50)
    fill(tmp_path / "__MACOSX" / "cat", 3, seed=60)
    fill(tmp_path / "dog" / "@eaDir", 3, seed=70)
    (tmp_path / "cat" / "._0.png").write_bytes(b"\0\5\26\7 not an image")
    (tmp_path / ".thumbnails").mkdir()
    after = load(str(tmp_path), "train", size=8)
    assert (after.id, after.classes, after.notes) == (before.id, before.classes, ())


def test_other_files_are_counted_and_named(tmp_path):
    classes_in(tmp_path)
    for name in ("a.txt", "b.txt", "c.xmp"):
        (tmp_path / "cat" / name).write_text("no image")
    (note,) = load(str(tmp_path), "train", size=8).notes
    assert "3 files that are no images it reads: 2 .txt, 1 .xmp passed over" in note


def test_linked_folders_are_read_once_and_never_round_in_a_circle(tmp_path):
    classes_in(tmp_path / "elsewhere")
    (tmp_path / "set").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).symlink_to(tmp_path / "elsewhere" / name)
    (tmp_path / "elsewhere" / "cat" / "again").symlink_to(tmp_path / "elsewhere" / "cat")
    assert len(load(str(tmp_path / "set"), "train", size=8)) + len(load(str(tmp_path / "set"), "test", size=8)) == 8


def test_a_level_too_high_names_the_right_folder(tmp_path):
    classes_in(tmp_path / "archive")
    with pytest.raises(UserError, match=r"holds only the folder 'archive', which has folders itself: name .*archive"):
        load(str(tmp_path), "train", size=8)


def test_parts_inside_of_classes_are_no_guess(tmp_path):
    for name in ("cat", "dog"):
        classes_in(tmp_path / name)
    with pytest.raises(UserError, match=r"every folder of .* holds the same folders \(cat, dog\)"):
        load(str(tmp_path), "train", size=8)


def test_two_folders_for_one_part_are_refused(tmp_path):
    for name in ("train", "Training", "test"):
        classes_in(tmp_path / name)
    with pytest.raises(UserError, match="two train folders, Training and train"):
        load(str(tmp_path), "train", size=8)


def test_folders_beside_the_parts_are_said_to_be_left_out(tmp_path):
    for name in ("train", "test", "unlabeled"):
        classes_in(tmp_path / name)
    assert "unlabeled beside test, train left out" in load(str(tmp_path), "train", size=8).notes[0]


def test_all_damaged_files_come_in_one_message_and_may_be_left_out(tmp_path):
    classes_in(tmp_path, 8)
    (tmp_path / "cat" / "0.png").write_bytes(b"")
    (tmp_path / "dog" / "7.png").write_text("<html>not found</html>")
    with pytest.raises(UserError, match=r"2 files of .*cat/0\.png cannot be read.*dog/7\.png cannot be read"):
        load(str(tmp_path), "train", size=8)
    parts = [load(str(tmp_path), split, size=8, skip_damaged=True) for split in ("train", "validation", "test")]
    assert sum(map(len, parts)) == 14
    assert "2 damaged files left out" in parts[0].notes[0]


def test_a_class_named_by_another_system_keeps_its_name(tmp_path):
    fill(os.fsencode(tmp_path) + b"/caf\xe9")
    fill(tmp_path / "bar", seed=1)
    images = load(str(tmp_path), "train", size=8)
    assert images.classes == ("bar", "café")
    assert "not named in UTF-8" in images.notes[0]
