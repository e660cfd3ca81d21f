"""Image files as people see them: upright, all of their range, on white where transparent; like Pillow's own viewer road."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from vitrm.data.decoding import decode
from vitrm.errors import UserError

UPRIGHT = np.zeros((8, 12, 3), np.uint8)
UPRIGHT[:4, :6], UPRIGHT[:4, 6:], UPRIGHT[4:, :6] = (250, 20, 20), (20, 250, 20), (20, 20, 250)


# What a camera that is held so writes: the stored picture, for each value of the tag.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[::-1],
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: a.transpose(1, 0, 2)[:, ::-1],
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_a_photo_is_upright_whichever_way_it_was_stored(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"a.{suffix}"
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](UPRIGHT)))
    stored.save(
        file,
        exif=exif,
        **({"quality": 95, "subsampling": 0} if suffix == "jpg" else {}),
        **({"lossless": True} if suffix == "webp" else {}),
    )
    found = decode(file)
    assert found.shape == UPRIGHT.shape
    corners = [(1, 2), (1, 9), (6, 2), (6, 9)]
    for row, column in corners:
        np.testing.assert_allclose(found[row, column].astype(int), UPRIGHT[row, column], atol=30)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path, suffix):
    ramp = np.linspace(0, 65535, 512).astype(np.uint16).reshape(16, 32)
    Image.fromarray(ramp).save(tmp_path / f"a.{suffix}")
    found = decode(tmp_path / f"a.{suffix}")
    np.testing.assert_array_equal(found[:, :, 0], np.rint(ramp / 257).astype(np.uint8))
    assert (found == found[:, :, :1]).all()


@pytest.mark.parametrize(("dtype", "name"), [(np.float32, "floating-point numbers"), (np.int32, "32-bit integers")])
def test_what_has_no_agreed_range_is_refused_by_name(tmp_path, dtype, name):
    Image.fromarray(np.ones((4, 4), dtype)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=rf"a\.tif cannot be read as an image \(its pixels are {name}"):
        decode(tmp_path / "a.tif")


def _icon(mode: str) -> Image.Image:
    """A black square on a transparent ground, which is black too underneath."""
    alpha = np.zeros((8, 8), np.uint8)
    alpha[2:6, 2:6] = 255
    if mode == "LA":
        return Image.merge("LA", [Image.new("L", (8, 8)), Image.fromarray(alpha)])
    icon = Image.merge("RGBA", [Image.new("L", (8, 8))] * 3 + [Image.fromarray(alpha)])
    return icon.quantize(2) if mode == "P" else icon


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_on_white(tmp_path, mode):
    _icon(mode).save(tmp_path / "a.png")
    found = decode(tmp_path / "a.png").copy()
    assert (found[2:6, 2:6] == 0).all()
    found[2:6, 2:6] = 255
    assert (found == 255).all()


def test_half_transparent_is_half_as_strong(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 128)).save(tmp_path / "a.png")
    np.testing.assert_allclose(decode(tmp_path / "a.png")[0, 0].astype(int), [255, 127, 127], atol=1)


def test_a_color_that_stands_for_transparent_does_too(tmp_path):
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "a.png", transparency=(1, 2, 3))
    assert (decode(tmp_path / "a.png") == 255).all()


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "YCbCr", "P"])
def test_other_modes_become_the_colors_they_mean(tmp_path, mode):
    white = Image.new("RGB", (6, 6), "white").convert(mode)
    suffix = "jpg" if mode in ("CMYK", "YCbCr") else "png"
    white.save(tmp_path / f"a.{suffix}")
    assert (decode(tmp_path / f"a.{suffix}") >= 250).all()


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "avif"])
def test_what_browsers_save_is_read(tmp_path: Path, suffix):
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    Image.fromarray(UPRIGHT.repeat(4, 0).repeat(4, 1)).save(
        tmp_path / f"a.{suffix}", "AVIF" if suffix == "avif" else "JPEG"
    )
    np.testing.assert_allclose(decode(tmp_path / f"a.{suffix}")[4, 4].astype(int), UPRIGHT[0, 0], atol=30)
