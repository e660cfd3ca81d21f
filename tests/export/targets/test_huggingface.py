"""The exported folder in Hugging Face's own libraries."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

import vitrm.runtime
from vitrm.data import load
from vitrm.data.decoding import fit_square
from vitrm.export import cli

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "nano"
    assert cli.main(["nano-digits", "--steps", "2", "--hf", str(folder)]) == 0
    return folder


def test_optimum_and_the_pipeline_run_it(folder):
    optimum = pytest.importorskip("optimum.onnxruntime", reason="needs optimum: pip install 'vitrm[optimum]'")
    from transformers import AutoImageProcessor, pipeline

    digits = load("digits", "test").take(slice(0, 12))
    pictures = [Image.fromarray(pixels.transpose(1, 2, 0)) for pixels in digits.pixels]
    model = optimum.ORTModelForImageClassification.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder, use_fast=False)
    inputs = processor(pictures, return_tensors="np")
    np.testing.assert_allclose(inputs["pixel_values"], digits.floats(), atol=1e-6)
    own = vitrm.runtime.open(folder / "model.onnx").infer(digits.floats())
    np.testing.assert_allclose(model(**inputs).logits, own.logits, atol=1e-4)
    found = pipeline("image-classification", model=model, image_processor=processor)(pictures, top_k=1)
    assert [answer[0]["label"] for answer in found] == [digits.classes[i] for i in own.logits.argmax(1)]


@pytest.mark.parametrize("shape", [(427, 640), (640, 427), (90, 160), (33, 32), (20, 31), (400, 7), (7, 400), (2, 3)])
def test_photos_of_any_shape_are_prepared_as_for_training(folder, shape):
    """The same pixels to the last bit; Pillow resamples both."""
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'vitrm[optimum]'")
    photo = Image.fromarray(load_sample_images().images[0]).resize(shape[::-1])
    processor = transformers.AutoImageProcessor.from_pretrained(folder, use_fast=False)
    pixels = processor([photo], return_tensors="np", input_data_format="channels_last")["pixel_values"][0]
    np.testing.assert_allclose(pixels, fit_square(np.asarray(photo), 32) / 255, atol=1e-6)


def test_what_the_folder_cannot_be(folder, tmp_path, capsys):
    for extra in (["--graph", "loop"], ["-o", str(tmp_path / "a.onnx")]):
        assert cli.main(["nano-digits", "--hf", str(tmp_path / "x"), *extra]) == 2
        assert "optimum feeds images alone" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert cli.main(["nano-digits", "--hf", str(tmp_path / "file")]) == 2
    assert "is a file: name a folder" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
