"""One picture file gives the same pixel_values everywhere: 200 odd pictures, read by everything that reads pictures.

The reference is spelled out here with Pillow alone, as a client that only knows the artifact's JSON would.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import PIL
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps, features
from sklearn.datasets import load_sample_images

from vitrm import data
from vitrm.config import preset, to_dict
from vitrm.errors import UserError
from vitrm.export.targets import huggingface, triton
from vitrm.preprocessing import FITS, Preprocessing
from vitrm.runtime.artifact.metadata import Metadata
from vitrm.runtime.bench.images import load_sample
from vitrm.runtime.predict import prepare

SIZE = 32
LEVEL = 1 / 255 + 1e-6
# Older ones resize every picture across first, this project as Pillow 13 does: with a pass' rounding up to 25 levels apart.
SAME_ORDER = int(PIL.__version__.split(".")[0]) >= 13
SHAPES = [(40, 33), (33, 40), (32, 32), (20, 31), (97, 64), (64, 97), (11, 70), (120, 90), (50, 49), (15, 64), (1, 1)]
STRIPS = [(4000, 8), (8, 4000)]


def _saved(folder: Path, name: str, picture: Image.Image, **more: object) -> None:
    picture.save(folder / name, **more)


def _odd(folder: Path, number: int, picture: Image.Image) -> None:
    """Saves a picture in every odd way, as files that begin with its number."""
    alpha = Image.linear_gradient("L").resize(picture.size)
    seen = picture.copy()
    seen.putalpha(alpha)
    sixteen = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 1 + number % 8
    of = f"{number:02}"
    _saved(folder, f"{of}-exif.jpg", picture, exif=exif, quality=95)
    _saved(folder, f"{of}-exif.png", picture, exif=exif)
    exif[0x0112] = 8 - number % 8
    _saved(folder, f"{of}-exif.tif", picture, exif=exif)
    _saved(folder, f"{of}-cmyk.jpg", picture.convert("CMYK"))
    _saved(folder, f"{of}-gray.jpeg", picture.convert("L"))
    _saved(folder, f"{of}-one-bit.png", picture.convert("1"))
    _saved(folder, f"{of}-palette.gif", picture.convert("P"))
    _saved(folder, f"{of}-palette.png", picture.quantize(16))
    _saved(folder, f"{of}-plain.bmp", picture)
    _saved(folder, f"{of}-plain.webp", picture, lossless=True)
    _saved(folder, f"{of}-plain.ppm", picture)
    _saved(folder, f"{of}-transparent-la.png", seen.convert("LA"))
    _saved(folder, f"{of}-transparent-p.png", seen.quantize(16))
    _saved(folder, f"{of}-transparent.png", seen)
    _saved(folder, f"{of}-transparent.webp", seen, lossless=True)
    _saved(folder, f"{of}-sixteen.png", sixteen)
    _saved(folder, f"{of}-sixteen.tif", sixteen)
    if features.check("avif"):
        _saved(folder, f"{of}-plain.avif", picture)
    if number < 8:
        exif[0x0112] = 1 + number
        _saved(folder, f"{of}-turned.jfif", picture, format="JPEG", exif=exif)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of three parts that all hold the same odd pictures as one class, and a square as another."""
    root = tmp_path_factory.mktemp("odd")
    for part in ("train", "val", "test"):
        for name in ("odd", "square"):
            (root / part / name).mkdir(parents=True)
    photo = Image.fromarray(load_sample_images().images[0])
    for number, shape in enumerate(SHAPES):
        _odd(root / "train" / "odd", number, photo.resize(shape))
    for number, shape in enumerate(STRIPS):
        for suffix in ("jpg", "png"):
            photo.resize(shape).save(root / "train" / "odd" / f"strip-{number}.{suffix}")
    for i in range(3):
        photo.resize((SIZE + i, SIZE + i)).save(root / "train" / "square" / f"{i}.png")
    for file in (root / "train").rglob("*.*"):
        for part in ("val", "test"):
            os.link(file, root / part / file.relative_to(root / "train"))
    return root


def _files(root: Path) -> list[Path]:
    return sorted((root / "test" / "odd").iterdir())


def _metadata(of: Preprocessing) -> Metadata:
    return Metadata(
        model=to_dict(preset("tiny", classes=2, image_size=SIZE)),
        classes=["odd", "square"],
        data={"name": "elsewhere"},
        preprocessing=of,
        graph="loop",
        steps=2,
        halt_threshold=2.0,
        precision="fp32",
        weights_sha256="0" * 64,
        run="mine",
    )


def _by_hand(file: Path, said: dict) -> NDArray[np.float32]:
    """What the JSON says, done with Pillow alone."""
    with Image.open(file) as opened:
        picture = ImageOps.exif_transpose(opened) if said["orientation"] == "exif" else opened.copy()
    if picture.mode in ("I", "I;16"):
        picture = Image.fromarray(np.round(np.asarray(picture.convert("I")) / 257).astype(np.uint8))
    if picture.mode in ("RGBA", "LA") or "transparency" in picture.info:
        top = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", top.size, (*said["background"], 255)), top)
    picture = picture.convert("RGB")
    height, width = said["size"]
    by = Image.Resampling[said["resampling"].upper()]
    if said["fit"] == "letterbox":
        side = max(picture.size)
        square = Image.new("RGB", (side, side), tuple(said["padding"]))
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        picture = square.resize((width, height), by)
    elif said["fit"] == "squash":
        picture = picture.resize((width, height), by)
    else:
        shorter = min(picture.size)
        picture = picture.resize(tuple(width * side // shorter for side in picture.size), by)
        left, top = (picture.width - width) // 2, (picture.height - height) // 2
        picture = picture.crop((left, top, left + width, top + height))
    return np.asarray(picture).transpose(2, 0, 1).astype(np.float32) / 255


@pytest.mark.parametrize("fit", FITS)
def test_training_predict_bench_and_triton_read_the_same_pixels(odd: Path, fit: str) -> None:
    of = Preprocessing.square(SIZE, fit=fit)
    files, metadata = _files(odd), _metadata(of)
    assert len(files) >= 199  # and AVIF, where Pillow reads it
    trained = data.load(str(odd), "train", preprocessing=of)
    benched = load_sample(metadata, "a.onnx", data=str(odd), whole=True)
    pbtxt = triton.config_text("mine", metadata, backend="onnxruntime")
    (quoted,) = re.findall(r'key: "vitrm_preprocessing" value \{ string_value: "(.*)" \}', pbtxt)
    served = json.loads(re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), quoted))
    assert Preprocessing.recorded(served, SIZE, "config.pbtxt") == of
    np.testing.assert_array_equal(trained.pixels, benched.pixels)
    for i, file in enumerate(files):
        predicted = prepare(file, metadata.preprocessing)
        assert (trained.classes[trained.labels[i]], predicted.dtype) == ("odd", np.float32)
        np.testing.assert_array_equal(trained.floats(i), predicted, err_msg=file.name)
        if SAME_ORDER:
            np.testing.assert_allclose(_by_hand(file, served), predicted, rtol=0, atol=LEVEL, err_msg=file.name)


@pytest.mark.parametrize("fit", FITS)
def test_transformers_prepares_the_same_pixels_or_says_which_it_cannot(odd: Path, fit: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'vitrm[optimum]'")
    metadata = _metadata(Preprocessing.square(SIZE, fit=fit))
    huggingface.write_configs(tmp_path, metadata)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, use_fast=False)
    assert processor.vitrm["preprocessing"] == metadata.preprocessing.to_dict()
    named = " ".join(processor.vitrm["differences"])
    cannot = {"sixteen": "16-bit gray", "transparent": "transparency"}
    for file in _files(odd):
        picture = transformers.image_utils.load_image(str(file))
        (found,) = processor([picture], return_tensors="np", input_data_format="channels_last")["pixel_values"]
        difference = np.abs(found - prepare(file, metadata.preprocessing)).max()
        why = next((text for kind, text in cannot.items() if kind in file.name), None)
        if why is None:
            assert difference <= LEVEL, file.name
        else:
            assert why in named


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("fit", FITS)
def test_a_jpeg_is_reduced_while_it_is_decoded_to_nearly_the_same_pixels(tmp_path: Path, fit: str, side: int) -> None:
    """Turned, and of a size that no factor divides."""
    photo = Image.fromarray(load_sample_images().images[1]).resize((1501, 1003))
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(tmp_path / "a.jpg", quality=92, exif=exif)
    of = Preprocessing.square(side, fit=fit)
    reduced = prepare(tmp_path / "a.jpg", of)
    whole = prepare(tmp_path / "a.jpg", replace(of, jpeg_reduction=0))
    difference = np.abs(reduced - whole) * 255
    assert 0 < difference.mean() < 0.5
    assert difference.max() < 12


def test_orientation_and_colors_are_followed(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    picture = Image.new("RGBA", (8, 4), (0, 0, 0, 0))
    picture.paste((250, 0, 0, 255), (0, 0, 4, 4))
    picture.save(tmp_path / "a.png", exif=exif)
    of = Preprocessing.square(8, fit="letterbox", orientation="stored", background=(0, 0, 250), padding=(1, 2, 3))
    found = np.round(prepare(tmp_path / "a.png", of) * 255).astype(int)
    assert found[:, 0, 0].tolist() == [1, 2, 3]
    assert found[:, 4, 0].tolist() == [250, 0, 0]
    assert found[:, 4, 7].tolist() == [0, 0, 250]
    upright = np.round(prepare(tmp_path / "a.png", replace(of, orientation="exif")) * 255).astype(int)
    assert upright[:, 4, 7].tolist() == [250, 0, 0]


def test_a_later_version_of_a_served_model_has_the_same_preprocessing(tmp_path: Path) -> None:
    def interface(of: Preprocessing) -> str | None:
        return triton._interface_of(triton.config_text("mine", _metadata(of), backend="onnxruntime"))

    crop = interface(Preprocessing.square(SIZE))
    assert crop == interface(Preprocessing.unrecorded(SIZE))
    assert len({crop, *(interface(Preprocessing.square(SIZE, fit=fit)) for fit in FITS)}) == len(FITS)


def test_height_and_width_are_refused_with_what_to_do() -> None:
    with pytest.raises(UserError, match=r"image_size is \[64, 128\], expected one number.*--fit letterbox"):
        preset("nano", image_size=[64, 128])
