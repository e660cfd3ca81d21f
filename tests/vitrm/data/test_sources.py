"""Data sets: three disjoint parts, the same every time; what is not a data set is refused."""

from __future__ import annotations

import io
import os
import random
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hostile import little_memory, refused_or_read
from PIL import Image

from vitrm import data
from vitrm.data import decoding, limited
from vitrm.errors import UserError


def _keys(images: data.Images) -> set[bytes]:
    return {image.tobytes() for image in images.pixels}


def test_digits_are_cut_into_disjoint_stratified_parts(digits):
    parts = [digits.train, digits.validation, digits.test]
    assert [len(p) for p in parts] == [1295, 143, 359]
    keys = [_keys(p) for p in parts]
    assert [len(k) for k in keys] == [1295, 143, 359]  # no image twice, so disjoint means disjoint
    assert not keys[0] & keys[1]
    assert not keys[0] & keys[2]
    assert not keys[1] & keys[2]
    for part in parts:
        shares = np.bincount(part.labels, minlength=10) / len(part)
        assert np.allclose(shares, 0.1, atol=0.02)
    assert parts[0].pixels.shape[1:] == (3, 32, 32)


def test_digits_are_the_same_every_time(digits):
    assert data.load("digits", "test").id == digits.test.id
    assert data.load("digits", "train").id != digits.test.id


@pytest.mark.parametrize("size", [32, 427, 428, 640, 1024])
def test_crops_of_photographs_have_any_size(size):
    crops = data.photo_crops(9, size)
    assert crops.shape == (9, 3, size, size)
    assert len({crop.tobytes() for crop in crops}) == 9
    assert all(crop.std() > 10 for crop in crops)


def test_a_folder_is_cut_into_disjoint_parts(photos):
    root = str(photos())
    parts = [data.load(root, split, size=16) for split in data.SPLITS]
    keys = [_keys(p) for p in parts]
    assert sum(len(k) for k in keys) == len(keys[0] | keys[1] | keys[2]) == 40
    assert [len(p) for p in parts] == [28, 4, 8]
    assert parts[0].classes == ("cat", "dog")
    assert all(set(p.labels.tolist()) == {0, 1} for p in parts)
    assert parts[0].pixels.shape == (28, 3, 16, 16)


def test_a_folder_cut_by_its_owner_is_left_as_it_is(photos):
    root = photos(root="own/train").parent
    photos(4, root="own/test")
    parts = {split: data.load(str(root), split, size=16) for split in data.SPLITS}
    assert {k: len(v) for k, v in parts.items()} == {"train": 36, "validation": 4, "test": 8}
    assert not _keys(parts["train"]) & _keys(parts["validation"])


def test_a_train_folder_without_a_test_folder_is_refused(photos):
    root = photos(root="own/train").parent
    with pytest.raises(UserError, match="no test folder"):
        data.load(str(root), "test")


def test_a_folder_with_one_class_is_refused(photos):
    with pytest.raises(UserError, match="only the class 'cat': expected at least two folders"):
        data.load(str(photos(classes=("cat",))), "train")


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="no class folders"):
        data.load(str(tmp_path), "train")


def test_a_class_without_images_is_refused(photos):
    root = photos()
    (root / "emu").mkdir()
    with pytest.raises(UserError, match=r"class 'emu' .* has 0 images"):
        data.load(str(root), "train")


@pytest.mark.parametrize("content", [b"not an image", b"", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_an_unreadable_image_is_named(photos, content):
    root = photos()
    (root / "cat" / "0.png").write_bytes(content)
    with pytest.raises(UserError, match=r"cat/0\.png cannot be read as an image .*replace or remove it"):
        data.load(str(root), "train")


def test_a_truncated_image_is_named(photos):
    root = photos()
    whole = (root / "dog" / "3.png").read_bytes()
    (root / "dog" / "3.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"dog/3\.png cannot be read as an image"):
        data.load(str(root), "train")


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(UserError, match="unknown data set 'mnist': choose digits, cifar10, cifar100"):
        data.load("mnist", "train")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="a folder is needed"):
        data.load(str(tmp_path / "file"), "train")


def test_cifar_that_is_not_there_says_what_to_do(tmp_path):
    with pytest.raises(
        UserError, match=r"cifar10 is not in .*--data-dir DIR or VITRM_DATA, or let vitrm-train --download fetch it"
    ):
        data.load("cifar10", "train", data_dir=tmp_path)


def test_a_limited_part_is_the_same_every_time_and_in_range(digits):
    part = limited(digits.train, 100)
    assert part.id == limited(digits.train, 100).id
    assert _keys(part) <= _keys(digits.train)
    for count in (1, 0, -3, len(digits.train) + 1):
        with pytest.raises(UserError, match=f"limit_train is {count}"):
            limited(digits.train, count)


def test_normalization_of_a_folder_is_its_own(photos):
    images = data.load(str(photos()), "train", size=16)
    found = data.normalization(images)
    assert found.mean == pytest.approx(tuple(images.floats().mean((0, 2, 3))), abs=1e-3)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_parts_are_disjoint(name):
    place = Path(os.environ.get(data.DATA_DIR_VARIABLE) or "data")
    marker = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[name]
    if not (place / marker).is_dir():
        pytest.skip(f"{name} is not in {place} (set {data.DATA_DIR_VARIABLE})")
    parts = [data.load(name, split) for split in data.SPLITS]
    assert [len(p) for p in parts] == [45_000, 5_000, 10_000]
    # The cut is by image.  CIFAR-100 itself holds some images more than once, 10 of them in both of its own parts.
    twice = {"cifar10": (0, 0, 0), "cifar100": (3, 10, 0)}[name]
    train, validation, test = (_keys(p) for p in parts)
    assert (len(train & validation), len(train & test), len(validation & test)) == twice
    assert all(len(np.unique(p.labels)) == len(p.classes) for p in parts)
    found = parts[0].floats(slice(0, 20_000)).mean((0, 2, 3))
    assert found == pytest.approx(np.array(data.normalization(parts[0]).mean), abs=0.01)


def _png(width: int, height: int) -> bytes:
    """A black picture of that size, in black and white: a few kilobytes for gigapixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + (width + 7) // 8)) for _ in range(min(height, 20_000))) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


BOMBS = {
    "png": _png(14_000, 14_000),
    "bmp": b"BM" + struct.pack("<IIIIiiHHIIiiII", 10**6, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0),
    "ppm": b"P6 100000 100000 255\n" + bytes(100),
    "pgm": b"P5 " + b"9" * 5000 + b" 2 255\n",
    "gif": b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0) + b";",
}


@pytest.mark.parametrize("suffix", BOMBS)
def test_a_picture_of_gigapixels_is_named_and_not_decoded(photos, suffix):
    root = photos()
    (root / "cat" / f"bomb.{suffix}").write_bytes(BOMBS[suffix])
    with little_memory(128), refused_or_read(suffix, seconds=2) as said:
        data.load(str(root), "train", size=16)
    assert f"cat/bomb.{suffix} cannot be read as an image" in said[0]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_damaged_picture_raises_anything_else(photos, monkeypatch):
    """Cut, with a few bytes changed in its head, or anywhere; in every format."""
    root, dice = photos(4), random.Random(0)
    picture = Image.open(root / "cat" / "0.png").resize((40, 40))
    formats = {"png": "PNG", "jpg": "JPEG", "bmp": "BMP", "gif": "GIF", "webp": "WEBP", "tif": "TIFF", "ppm": "PPM"}
    # Damaged sizes below the limit are decoded, and take their time.
    monkeypatch.setattr(decoding, "MAX_PIXELS", 4_000_000)
    raised = Counter()
    for suffix, name in formats.items():
        packed = io.BytesIO()
        picture.save(packed, name, **({"compression": "tiff_lzw"} if name == "TIFF" else {}))
        whole = packed.getvalue()
        for i in range(120):
            damaged = bytearray(whole[: dice.randrange(8, len(whole))] if i % 3 == 0 else whole)
            for _ in range(0 if i % 3 == 0 else dice.randrange(1, 30)):
                damaged[dice.randrange(min(len(damaged), 200 if i % 3 == 1 else len(damaged)))] = dice.randrange(256)
            file = root / "cat" / f"damaged.{suffix}"
            file.write_bytes(damaged)
            with refused_or_read(f"{suffix} {i}") as said:
                assert decoding.decode(file).shape[2] == 3
            raised[suffix] += bool(said)
            assert all(str(file) in text for text in said)
    assert min(raised.values()) >= 10, raised


def test_no_program_is_started_for_a_picture(photos):
    """Pillow gives PostScript to Ghostscript, whatever the file is called."""
    root = photos()
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n"
    (root / "cat" / "0.png").write_bytes(postscript)
    with pytest.raises(UserError, match=r"cat/0\.png cannot be read as an image \(cannot identify"):
        data.load(str(root), "train")


def test_what_is_no_file_is_not_opened(photos):
    root = photos()
    os.mkfifo(root / "cat" / "pipe.png")
    with pytest.raises(UserError, match=r"pipe\.png is a FIFO"):
        data.load(str(root), "train")


def test_shards_are_refused_with_the_way_to_train_on_them(tmp_path):
    for name in ("a-0.tar", "a-1.tar"):
        (tmp_path / name).write_bytes(b"")
    for named in (tmp_path, tmp_path / "a-0.tar", tmp_path / "a-{0..1}.tar"):
        with pytest.raises(UserError, match=r"unpack them into class folders first; examples/unpack_shards\.py"):
            data.load(str(named), "train")


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b"])
def test_what_can_be_no_folder_is_no_data_set(name):
    with pytest.raises(UserError, match="unknown data set"):
        data.load(name, "train")


def test_more_than_the_memory_is_not_begun(monkeypatch):
    pages = {"SC_PHYS_PAGES": 1 << 20, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    with pytest.raises(
        UserError, match=r"1,797 images of digits at 4096 × 4096 pixels take 84 GiB, this machine has 4"
    ):
        data.load("digits", "train", size=4096)
