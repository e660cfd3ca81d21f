"""RandAugment in batches: each operation is torchvision's, drawn as torchvision draws, and nothing waits for the device."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2

from vitrm.data import photo_crops
from vitrm.recipe import recipe
from vitrm.training import upload
from vitrm.training.augmentation import rand_augment
from vitrm.training.augmentation.augment import augment
from vitrm.training.augmentation.rand_augment import OPERATIONS, apply_operations, draw_operations, signed_magnitude


@pytest.fixture(scope="module")
def photos() -> torch.Tensor:
    photos = torch.from_numpy(photo_crops(12))
    photos[0], photos[1, 0], photos[2], photos[3, :, :5] = 7, 255, 0, 0  # of one value, or nearly
    return photos


def test_the_operations_are_torchvisions() -> None:
    assert set(OPERATIONS) == set(v2.RandAugment._AUGMENTATION_SPACE)


@pytest.mark.parametrize("magnitude", [0, 9, 30])
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_torchvisions_pixel_by_pixel(photos: torch.Tensor, name: str, magnitude: int) -> None:
    theirs = v2.RandAugment(magnitude=magnitude)
    for negative, sign in enumerate((1, -1)):
        ours = apply_operations(photos, np.full((1, len(photos)), 2 * OPERATIONS.index(name) + negative), magnitude)
        factor = signed_magnitude(name, magnitude, sign, 32, 32)
        expected = theirs._apply_image_or_video_transform(
            photos, name, factor, interpolation=theirs.interpolation, fill=theirs._fill
        )
        assert torch.equal(ours, expected)


def test_images_keep_their_places_and_rounds_their_order(photos: torch.Tensor) -> None:
    drawn = draw_operations(3, len(photos), np.random.default_rng(0))
    together = apply_operations(photos, drawn, 9)
    for i, image in enumerate(photos):
        alone = image[None]
        for code in drawn[:, i]:
            alone = apply_operations(alone, np.full((1, 1), code), 9)
        assert torch.equal(together[i], alone[0])


def test_every_operation_and_sign_is_drawn_equally_often() -> None:
    drawn = draw_operations(2, 14_000, np.random.default_rng(0))
    assert drawn.shape == (2, 14_000)
    for round_ in drawn:
        assert chisquare(np.bincount(round_, minlength=2 * len(OPERATIONS))).pvalue > 0.01
    # The two of an image have nothing to do with each other.
    pairs = np.bincount(drawn[0] // 2 * len(OPERATIONS) + drawn[1] // 2, minlength=len(OPERATIONS) ** 2)
    assert chisquare(pairs).pvalue > 0.01


def test_images_that_are_not_square(photos: torch.Tensor) -> None:
    wide = photos[..., :20, :]
    theirs = v2.RandAugment(magnitude=9)
    for name in ("Rotate", "TranslateX", "TranslateY", "ShearX"):
        ours = apply_operations(wide, np.full((1, len(wide)), 2 * OPERATIONS.index(name)), 9)
        factor = signed_magnitude(name, 9, 1, 20, 32)
        assert torch.equal(
            ours,
            theirs._apply_image_or_video_transform(
                wide, name, factor, interpolation=v2.InterpolationMode.NEAREST, fill={}
            ),
        )


class Waits(TorchDispatchMode):
    """Lists what makes the host wait for the GPU: a value read, a size that depends on values, a copy that is not queued."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.uploads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = str(function)
        output = function(*args, **kwargs)
        if any(part in name for part in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item")):
            self.found.append(name)
        if "_to_copy" in name and args[0].device != output.device:
            self.uploads += 1
            if not kwargs.get("non_blocking") or output.device.type == "cpu":
                self.found.append(f"{name} {args[0].device} → {output.device}")
        return output


@pytest.mark.parametrize("name", ["paper", "paper+", "anytime"])
def test_a_batch_is_augmented_without_waiting_for_the_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "pinned", lambda tensor: tensor)  # there is none without a GPU
    drawn = np.arange(2 * len(OPERATIONS))[None]
    apply_operations(
        torch.zeros(len(drawn[0]), 3, 32, 32, dtype=torch.uint8), drawn, 9
    )  # what is made on the host once
    waits = Waits()
    with FakeTensorMode():
        try:
            torch.zeros(1).to("cuda")
        except RuntimeError as error:  # torch 2.9 asks the driver even for a tensor without data
            pytest.skip(f"torch {torch.__version__} has no fake GPU without a driver: {str(error).splitlines()[0]}")
    try:
        with FakeTensorMode():
            pixels = torch.zeros(64, 3, 32, 32, dtype=torch.uint8, device="cuda")
            label = torch.zeros(64, dtype=torch.int64, device="cuda")
            for seed in range(3):
                if seed == 1:  # the first batch sends the tables
                    waits.__enter__()
                batch = augment(
                    pixels, label, 10, recipe(name, cutout=4, crop_padding=4), True, np.random.default_rng(seed)
                )
            waits.__exit__(None, None, None)
    finally:
        rand_augment._tables.cache_clear()  # they are no tensors
    assert batch.images.device.type == "cuda"
    assert batch.images.shape == (64, 3, 32, 32)
    assert waits.uploads > 0
    assert waits.found == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", ["paper", "paper+", "anytime"])
def test_a_batch_is_the_same_on_a_gpu(name: str) -> None:
    pixels, label = torch.from_numpy(photo_crops(64)), torch.arange(64) % 10
    settings = recipe(name, cutout=4, crop_padding=4)
    on_gpu = pixels.cuda(), label.cuda()
    for seed in range(3):
        expected = augment(pixels, label, 10, settings, True, np.random.default_rng(seed))
        torch.cuda.set_sync_debug_mode("error" if seed else "default")  # the first batch sends the tables
        try:
            found = augment(*on_gpu, 10, settings, True, np.random.default_rng(seed))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.allclose(found.images.cpu(), expected.images, atol=1e-6)
        assert torch.allclose(found.target.cpu(), expected.target, atol=1e-6)
