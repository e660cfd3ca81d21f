"""Images by class, as arrays: digits (built in), CIFAR-10, CIFAR-100, or any folder of class folders.

Every data set comes in three parts: train, validation and test.  The test part is the data set's own
where it has one, else cut off first; validation is cut from what remains.  Both cuts are stratified
and depend on the data set alone, never on a run's seed, so that no run has trained on another's
test images.  Training and selection must not touch `test`.

Torch-free at import; torchvision is loaded for CIFAR only.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitrm.errors import UserError, first_line
from vitrm.fields import shown
from vitrm.system.files import check_regular

DATASETS = ("digits", "cifar10", "cifar100")
SPLITS = ("train", "validation", "test")
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
# What those names may hold. Pillow knows others, some of which start programs: an EPS, whatever it is called, Ghostscript.
_FORMATS = ("PNG", "JPEG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM")
MAX_PIXELS = 178_956_970  # of an image; Pillow's own limit, half a gigabyte as RGB
DATA_DIR_VARIABLE = "VITRM_DATA"
_CUT_SEED = 20260319  # of every stratified cut; changing it would leak test images between versions


@dataclass(frozen=True)
class Normalization:
    """Per-channel mean and standard deviation of the training images, in [0, 1] units."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class Images:
    """A part of a data set."""

    pixels: NDArray[np.uint8]  # [n, 3, H, W]
    labels: NDArray[np.int64]  # [n]
    classes: tuple[str, ...]  # names, by label
    name: str  # of the data set: digits, cifar10, cifar100 or a folder's path
    split: str  # train, validation or test

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, index: Any) -> Images:
        """The images at `index` (a slice, an index array or a mask)."""
        return replace(self, pixels=self.pixels[index], labels=self.labels[index])

    def floats(self, index: Any = slice(None)) -> NDArray[np.float32]:
        """Pixels as the models take them: float32 [n, 3, H, W] in [0, 1]."""
        return self.pixels[index].astype(np.float32) / np.float32(255)

    @property
    def id(self) -> str:
        """SHA-256 of the pixels and labels: which images these are, in which order."""
        digest = hashlib.sha256(np.ascontiguousarray(self.pixels).data)
        digest.update(np.ascontiguousarray(self.labels).data)
        return digest.hexdigest()


# The training sets' own statistics, over all training pixels (CIFAR-100 differs from CIFAR-10).
NORMALISATION = {
    "cifar10": Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Normalization((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


def load(
    name: str, split: str, *, data_dir: str | os.PathLike[str] | None = None, size: int = 32, download: bool = False
) -> Images:
    """The part `split` of data set `name`, at `size` × `size` pixels.

    `name` is digits, cifar10, cifar100 or the path of a folder of class folders.  `data_dir` is where
    CIFAR's files are (default: the environment's VITRM_DATA, else `data`); with `download` torchvision
    fetches them there.  Raises `UserError` if it is not there, damaged or not a data set.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {SPLITS}")
    if name == "digits":
        return _digits(split, size)
    if name in ("cifar10", "cifar100"):
        return _cifar(name, split, _data_dir(data_dir), size, download)
    # os.path answers False where Path raises: for a name that is too long, or holds a NUL.
    if os.path.isdir(name):
        return _folder(Path(name), split, size)
    hint = "; there is a file of that name, but a folder is needed" if os.path.exists(name) else ""
    raise UserError(
        f"unknown data set {shown(name)}: choose {', '.join(DATASETS)} or the path of a folder of images by class{hint}"
    )


def normalization(images: Images) -> Normalization:
    """The mean and standard deviation that a model trained on `images` should normalize with."""
    if images.name in NORMALISATION:
        return NORMALISATION[images.name]
    x = images.floats(slice(0, 10_000))
    mean, std = x.mean((0, 2, 3), dtype=np.float64), x.std((0, 2, 3), dtype=np.float64)
    r, g, b = (round(float(v), 4) for v in mean)
    sr, sg, sb = (max(round(float(v), 4), 1e-3) for v in std)
    return Normalization((r, g, b), (sr, sg, sb))


def photo_crops(count: int, size: int = 32) -> NDArray[np.uint8]:
    """Natural images that need no download: crops of scikit-learn's two sample photographs, uint8 [count, 3, size, size].

    For parity checks of a model whose data set is not at hand; they have no labels.  The photographs have 427 × 640 pixels:
    larger crops are enlarged from a part of them.
    """
    from sklearn.datasets import load_sample_images

    photos = load_sample_images().images
    random = np.random.default_rng(_CUT_SEED)
    crops = np.empty((count, 3, size, size), np.uint8)
    for i in range(count):
        photo = photos[i % len(photos)]
        longest = min(photo.shape[:2])
        side = int(random.integers(size if size <= longest else longest // 2, longest + 1))
        top, left = (int(random.integers(0, extent - side + 1)) for extent in photo.shape[:2])
        crops[i] = _resize(photo[top : top + side, left : left + side], size)
    return crops


def affordable(count: int, size: int, mebibytes: int, *, least: int = 1) -> int:
    """`count`, or as many images of `size` × `size` pixels as fit into `mebibytes` as float32, but no fewer than `least`."""
    return max(least, min(count, (mebibytes << 20) // (12 * size * size)))


def _data_dir(data_dir: str | os.PathLike[str] | None) -> Path:
    return Path(data_dir or os.environ.get(DATA_DIR_VARIABLE) or "data")


def _stratified(labels: NDArray[np.int64], fraction: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices (rest, cut), in order, where `cut` takes `fraction` of every class, and at least one image of it."""
    random = np.random.default_rng(_CUT_SEED)
    cut = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        cut[random.permutation(members)[: max(1, round(fraction * len(members)))]] = True
    return np.flatnonzero(~cut), np.flatnonzero(cut)


def _part(images: Images, split: str, test_fraction: float) -> Images:
    """Cuts a data set without a test part of its own."""
    rest, test = _stratified(images.labels, test_fraction)
    if split == "test":
        return replace(images.take(test), split=split)
    return _train_or_validation(images.take(rest), split)


def _train_or_validation(images: Images, split: str) -> Images:
    train, validation = _stratified(images.labels, 0.1)
    return replace(images.take(train if split == "train" else validation), split=split)


def _digits(split: str, size: int) -> Images:
    from sklearn.datasets import load_digits

    digits = load_digits()
    _check_fits(len(digits.images), size, "digits")
    gray = (digits.images * (255 / 16)).round().astype(np.uint8)  # 8 × 8, 0 … 16
    rgb = np.stack([_resize(np.repeat(g[:, :, None], 3, 2), size) for g in gray])
    images = Images(rgb, digits.target.astype(np.int64), tuple(str(i) for i in range(10)), "digits", split)
    return _part(images, split, test_fraction=0.2)


def _cifar(name: str, split: str, data_dir: Path, size: int, download: bool) -> Images:
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
    if size != pixels.shape[-1]:
        _check_fits(len(pixels), size, name)
        pixels = np.stack([_resize(image, size) for image in raw.data])
    images = Images(np.ascontiguousarray(pixels), np.asarray(raw.targets, np.int64), tuple(raw.classes), name, split)
    return images if split == "test" else _train_or_validation(images, split)


def _folder(root: Path, split: str, size: int) -> Images:
    """ROOT/CLASS/image, cut by us; or ROOT/{train,val,test}/CLASS/image, cut by its owner."""
    own = {
        "train": next((root / n for n in ("train", "training") if (root / n).is_dir()), None),
        "validation": next((root / n for n in ("val", "valid", "validation") if (root / n).is_dir()), None),
        "test": root / "test" if (root / "test").is_dir() else None,
    }
    if own["train"] is None:
        return _part(_read_folder(root, root, root, split, size), split, test_fraction=0.2)
    classes_of = own["train"]
    part = own[split]
    if part is not None:
        images = _read_folder(root, part, classes_of, split, size)
        return _train_or_validation(images, split) if split == "train" and own["validation"] is None else images
    if split == "validation":
        return _train_or_validation(_read_folder(root, classes_of, classes_of, split, size), split)
    raise UserError(
        f"{root} has a train folder but no test folder: add one, or leave out the train level to have the images split here"
    )


def _read_folder(root: Path, part: Path, classes_of: Path, split: str, size: int) -> Images:
    classes = tuple(sorted(p.name for p in classes_of.iterdir() if p.is_dir() and not p.name.startswith(".")))
    if len(classes) < 2:
        found = f"only the class {classes[0]!r}" if classes else "no class folders"
        raise UserError(f"{classes_of} has {found}: expected at least two folders, one per class, with images in them")
    extra = sorted(
        p.name for p in part.iterdir() if p.is_dir() and not p.name.startswith(".") and p.name not in classes
    )
    if extra:
        raise UserError(f"{part} has classes that {classes_of} has not: {', '.join(extra[:5])}")
    pixels: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = sorted(p for p in (part / name).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if len(files) < (3 if part == classes_of else 1):
            raise UserError(f"class {name!r} in {part} has {len(files)} images: add some, or remove the class folder")
        _check_fits(len(pixels) + len(files), size, str(root))
        for file in files:
            pixels.append(_resize(_decoded(file), size))
            labels.append(label)
    return Images(np.stack(pixels), np.asarray(labels, np.int64), classes, str(root), split)


def _decoded(file: Path) -> NDArray[np.uint8]:
    """The pixels [H, W, 3] of an image file.  Raises `UserError`, naming it, whatever is wrong with it."""
    from PIL import Image

    check_regular(file, "image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit follows
            image = Image.open(file, formats=_FORMATS)
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"it has {image.width} × {image.height} pixels, at most {MAX_PIXELS:,} are decoded")
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # decoders raise anything for a damaged file: IndexError, struct.error, MemoryError, …
        why = first_line(error)
        raise UserError(f"{file} cannot be read as an image ({why}): replace or remove it") from None


def _check_fits(count: int, size: int, name: str) -> None:
    """Raises `UserError` if `count` images of `size` × `size` pixels are more than this machine's memory."""
    needed, memory = 3 * count * size**2, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise UserError(
            f"{count:,} images of {name} at {size} × {size} pixels take {needed / 2**30:,.0f} GiB, this machine has "
            f"{memory / 2**30:,.0f}: lower the image size, or use fewer images"
        )


def _resize(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """An RGB image [H, W, 3] as [3, size, size]: shorter side to `size`, then the center."""
    from PIL import Image

    height, width = image.shape[:2]
    if (height, width) != (size, size):
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = Image.fromarray(np.ascontiguousarray(image[top : top + side, left : left + side]))
        image = np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))
    return np.ascontiguousarray(image.transpose(2, 0, 1))
