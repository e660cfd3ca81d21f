"""The folder of a page, and what vitrm-export refuses of it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from html_page import Page
from PIL import Image
from small_models import make_checkpoint, small

import vitrm.runtime
from vitrm.baselines.networks import Baseline
from vitrm.checkpoint import Checkpoint
from vitrm.data import load
from vitrm.errors import UserError
from vitrm.export import cli
from vitrm.export.web.page import check_folder, write_page


@pytest.mark.slow
def test_what_is_in_the_folder(page):
    settings = json.loads((page.folder / "page.json").read_text())
    named = [settings["runtime"]["wasm"], *(image["file"] for image in settings["gallery"])]
    named += [file for model in settings["models"] for file in model["files"].values()]
    html = Page((page.folder / "index.html").read_text())
    named += [source for source in html.sources if not source.startswith("#")]
    for file in named:
        assert (page.folder / file).is_file(), file
    assert page.bytes == sum(file.stat().st_size for file in page.folder.rglob("*") if file.is_file())
    assert "Permission is hereby granted" in (page.folder / "onnxruntime" / "LICENSE").read_text()
    # Each model is a stepwise artifact as any other.
    for precision in ("fp32", "int8"):
        assert vitrm.runtime.open(page.folder / precision).metadata.precision == precision


@pytest.mark.slow
def test_the_gallery_holds_test_images_with_their_labels(page):
    settings = json.loads((page.folder / "page.json").read_text())
    digits = load("digits", "test")
    assert {image["group"] for image in settings["gallery"]} == {"easy", "hard"}
    for image in settings["gallery"]:
        number = int(image["name"].split(",")[0].removeprefix("test image "))
        pixels = np.asarray(Image.open(page.folder / image["file"])).transpose(2, 0, 1)
        np.testing.assert_array_equal(pixels, digits.pixels[number])
        assert image["label"] == digits.labels[number]


@pytest.mark.slow
def test_a_page_may_be_replaced_and_nothing_else(page, tmp_path):
    check_folder(page.folder)
    check_folder(tmp_path / "new")
    check_folder(tmp_path)
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(UserError, match=r"other things in it \(thesis.txt\)"):
        check_folder(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        check_folder(tmp_path / "thesis.txt")


def test_a_folder_of_graphs_is_no_page(tmp_path):
    (tmp_path / "fp32").mkdir()
    with pytest.raises(UserError, match="other things in it"):
        check_folder(tmp_path)


def test_without_the_runtime_no_folder_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="--download"):
        write_page(make_checkpoint("tiny"), tmp_path / "page")
    assert not (tmp_path / "page").exists()


def test_a_model_without_steps_is_refused(tmp_path):
    config = small("resnet20")
    checkpoint = Checkpoint(model=config, data={"name": "digits"}, weights=Baseline(config).state_dict())
    with pytest.raises(UserError, match="shows steps, and a cifar-resnet has none"):
        write_page(checkpoint, tmp_path / "page")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--web-images", "4"], "--web-images is for a page: add --web DIR"),
        (["--download"], "--download is for a page"),
        (["--web", "page", "-o", "a.onnx"], "--web DIR names the output"),
        (["--web", "page", "--hf", "hf"], "--web DIR names the output"),
        (["--web", "page", "--int8"], "--web writes float32 and int8"),
        (["--web", "page", "--graph", "loop"], "--web writes float32 and int8"),
        (["--web", "page", "--every-step"], "--every-step is not for --web"),
        (["--web", "page", "--plan"], "--plan is not for --web"),
        (["--web", "page", "--web-images", "500"], "images is 500, expected a whole number from 0 to 64"),
        (["--web", "page", "--steps", "65"], "steps is 65"),
        (["--web", "page", "--max-drop", "101"], "--max-drop is 101"),
        (["a.onnx", "--web", "page"], "--web was decided when a.onnx was exported"),
    ],
)
def test_options_that_do_not_fit_together(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
