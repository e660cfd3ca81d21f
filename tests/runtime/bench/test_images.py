"""The images of a bench: of a new folder all, of whichever classes; of the folder trained on the test part alone."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vitrm.runtime
from vitrm import data
from vitrm.errors import UserError
from vitrm.runtime.artifact.metadata import Metadata
from vitrm.runtime.bench.cli import main
from vitrm.runtime.bench.images import load_sample

pytestmark = pytest.mark.slow


@pytest.fixture
def metadata(artifact: Path) -> Metadata:
    return vitrm.runtime.open(artifact).metadata


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """Digits as files: eight threes and five eights."""
    test = data.load("digits", "test")
    for label, count in ((3, 8), (8, 5)):
        (tmp_path / "new" / str(label)).mkdir(parents=True)
        for i in np.flatnonzero(test.labels == label)[:count]:
            Image.fromarray(test.pixels[i].transpose(1, 2, 0)).save(tmp_path / "new" / str(label) / f"{i:04}.png")
    return tmp_path / "new"


def test_a_new_folder_is_measured_whole_with_the_artifacts_labels(metadata: Metadata, fresh: Path) -> None:
    found = load_sample(metadata, "a.onnx", data=str(fresh), whole=True)
    assert found.labels is not None
    assert found.labels.tolist() == [3] * 8 + [8] * 5
    assert found.classes == tuple("0123456789")
    assert (len(found), found.total, found.split) == (13, 13, "")
    test = data.load("digits", "test")
    np.testing.assert_array_equal(found.pixels[0], test.pixels[np.flatnonzero(test.labels == 3)[0]])
    assert found.note is not None
    assert "has no images of 0, 1, 2, 4, 5 and 3 more" in found.note
    assert len(load_sample(metadata, "a.onnx", data=str(fresh), whole=True, limit=4)) == 4
    with pytest.raises(UserError, match=r"new has 2 classes \(3, 8\), but a.onnx was trained on 10"):
        load_sample(metadata, "a.onnx", data=str(fresh), split="validation")


def test_one_class_alone_will_do_and_one_image_of_it(metadata: Metadata, fresh: Path) -> None:
    shutil.rmtree(fresh / "8")
    for file in sorted((fresh / "3").iterdir())[1:]:
        file.unlink()
    assert len(load_sample(metadata, "a.onnx", data=str(fresh), whole=True)) == 1
    (fresh / "three").mkdir()
    with pytest.raises(
        UserError, match=r"classes that a.onnx was not trained on \(three\): expected some of its 10 \(0, 1,"
    ):
        load_sample(metadata, "a.onnx", data=str(fresh), whole=True)
    shutil.rmtree(fresh)
    fresh.mkdir()
    with pytest.raises(UserError, match="new has no class folders"):
        load_sample(metadata, "a.onnx", data=str(fresh), whole=True)


def test_of_a_folder_with_parts_the_test_part_is_measured(metadata: Metadata, fresh: Path) -> None:
    os.makedirs(fresh.parent / "cut" / "Test")
    for name in ("3", "8"):
        shutil.copytree(fresh / name, fresh.parent / "cut" / "train" / name)
    shutil.move(fresh / "8", fresh.parent / "cut" / "Test" / "8")
    found = load_sample(metadata, "a.onnx", data=str(fresh.parent / "cut"), whole=True)
    assert found.labels is not None
    assert found.labels.tolist() == [8] * 5
    assert found.split == "test"


def test_of_the_folder_trained_on_the_test_part_is_measured_wherever_it_is(metadata: Metadata, fresh: Path) -> None:
    train = data.load(str(fresh), "train", size=metadata.image_size)
    of_folder = replace(
        metadata,
        classes=["3", "8"],
        model={**metadata.model, "classes": 2},
        data={"name": str(fresh), "train_id": train.id},
    )
    test = data.load(str(fresh), "test", size=metadata.image_size)
    here = load_sample(of_folder, "a.onnx", data=f"{fresh}/../new", whole=True)
    np.testing.assert_array_equal(here.pixels, test.pixels)
    moved = fresh.rename(fresh.parent / "moved")
    there = load_sample(of_folder, "a.onnx", data=str(moved), whole=True)
    np.testing.assert_array_equal(there.pixels, test.pixels)
    assert there.note is not None
    assert "holds the images that it was trained on" in there.note
    # Another picture, another set.
    shutil.copy(moved / "3" / sorted(os.listdir(moved / "3"))[0], moved / "3" / "new.png")
    assert len(load_sample(of_folder, "a.onnx", data=str(moved), whole=True)) == 14


def test_classes_in_another_order_keep_their_meaning(metadata: Metadata) -> None:
    turned = replace(metadata, classes=list("9876543210"))
    digits = data.load("digits", "test")
    found = load_sample(turned, "a.onnx")
    assert found.labels is not None
    assert [found.classes[i] for i in found.labels] == [digits.classes[i] for i in digits.labels]


def test_the_bench_says_how_each_class_of_a_new_folder_fares(
    artifact: Path, fresh: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--no-eager", "--batch", "1", "--seconds", "0.05", "--threads", "1", "--json", str(tmp_path / "b.json")]
    assert main([str(artifact), "--data", str(fresh), *flags]) == 0
    out = capsys.readouterr().out
    assert f"accuracy: on all 13 images of {fresh}" in out
    read = json.loads((tmp_path / "b.json").read_text())
    (found,) = read["by_class"]
    assert [c["images"] for c in found["classes"]] == [0, 0, 0, 8, 0, 0, 0, 0, 5, 0]
    assert found["classes"][0]["recall"] is None
    right = sum(found["confusion"][i][i] for i in range(10))
    assert read["rows"][0]["accuracy"] == pytest.approx(right / 13)
    line = next(line for line in out.splitlines() if line.split()[:2] == ["3", "8"])
    assert f"{100 * found['classes'][3]['recall']:.1f} %" in line
