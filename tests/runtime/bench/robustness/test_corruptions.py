"""The corruptions as functions: the same every time, worse with severity, right at the points where the truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from vitrm.data import photo_crops
from vitrm.runtime.bench.robustness.corruptions import CORRUPTIONS, SEVERITIES, Corruption, corrupt

each = pytest.mark.parametrize("corruption", CORRUPTIONS, ids=lambda c: c.name)
NAMED = {c.name: c for c in CORRUPTIONS}


def flat(value: int, size: int = 32, count: int = 1) -> np.ndarray:
    return np.full((count, 3, size, size), value, np.uint8)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.sqrt(((one.astype(np.float64) - other) ** 2).mean()))


def test_all_four_kinds_are_there_under_names_of_their_own() -> None:
    assert len(NAMED) == len(CORRUPTIONS) == 13
    assert {c.group for c in CORRUPTIONS} == {"noise", "blur", "weather", "digital"}


@pytest.mark.slow
@each
def test_an_image_is_corrupted_the_same_way_in_any_company(corruption: Corruption) -> None:
    photos = photo_crops(40, 160)  # more than are worked on at once
    whole = corrupt(photos, corruption, 3, seed=5)
    np.testing.assert_array_equal(corrupt(photos, corruption, 3, seed=5), whole)
    some = np.array([38, 3])
    np.testing.assert_array_equal(corrupt(photos[some], corruption, 3, seed=5, positions=some), whole[some])
    drawn = corruption.group == "noise" or corruption.name in ("motion_blur", "fog", "snow", "elastic_transform")
    assert (corrupt(photos[:4], corruption, 3, seed=6) != whole[:4]).any() == drawn, "another seed"
    twins = corrupt(np.repeat(photos[:1], 2, 0), corruption, 3)
    assert (twins[0] != twins[1]).any() == drawn, "another image"


@pytest.mark.slow
@each
@pytest.mark.parametrize("size", [32, 96])
def test_each_severity_is_farther_from_the_original(corruption: Corruption, size: int) -> None:
    photos = photo_crops(64, size)
    kept = photos.copy()
    distances = [distance(corrupt(photos, corruption, severity), photos) for severity in SEVERITIES]
    assert distances == sorted(distances)
    assert distances[0] > 1
    assert distances[-1] > 1.2 * distances[0]
    np.testing.assert_array_equal(photos, kept)


@each
@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (9, 9), (33, 47), (70, 31)])
def test_any_size(corruption: Corruption, shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, *shape), np.uint8)
    for severity in SEVERITIES:
        made = corrupt(pixels, corruption, severity)
        assert (made.shape, made.dtype) == (pixels.shape, np.uint8)
    assert corrupt(pixels[:0], corruption, 1).shape == (0, 3, *shape)


def test_what_cannot_be_corrupted_is_refused() -> None:
    noise = CORRUPTIONS[0]
    for wrong in (np.zeros((1, 3, 8, 8), np.float32), np.zeros((3, 8, 8), np.uint8), np.zeros((1, 8, 8, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"expected uint8 \[n, 3, H, W\]"):
            corrupt(wrong, noise, 1)
    with pytest.raises(ValueError, match="expected 1 to 5"):
        corrupt(flat(0), noise, 6)


def test_noise_has_the_amount_it_says() -> None:
    gray = flat(128, 64, 8)
    for name, expected in (("gaussian_noise", 0.08), ("shot_noise", np.sqrt(128 / 255 / 100))):
        made = corrupt(gray, NAMED[name], 3) / 255
        assert made.mean() == pytest.approx(128 / 255, abs=2e-3)
        assert made.std() == pytest.approx(expected, rel=0.03)
    made = corrupt(gray, NAMED["impulse_noise"], 5)
    assert (made == 0).mean() == pytest.approx(0.035, abs=3e-3)
    assert (made == 255).mean() == pytest.approx(0.035, abs=3e-3)
    assert ((made == 128) | (made == 0) | (made == 255)).all()


@pytest.mark.parametrize("size", [32, 224])
def test_blurs_spread_a_point_as_far_as_they_say(size: int) -> None:
    """A point's energy stays; how far it lies from the point grows with the image."""
    point = flat(0, size + 1)
    middle = size // 2
    width = size // 32
    point[..., middle - width : middle + width + 1, middle - width : middle + width + 1] = 255
    for name, severity in (("defocus_blur", 5), ("motion_blur", 3)):
        made = corrupt(point, NAMED[name], severity)[0, 0].astype(np.float64)
        total, before = made.sum(), point[0, 0].sum(dtype=np.float64)
        assert total == pytest.approx(before, rel=0.02)
        y, x = np.mgrid[: size + 1, : size + 1] - middle
        center = (made * y).sum() / total, (made * x).sum() / total
        if name == "defocus_blur":
            spread = (made * x**2).sum() / total - (point[0, 0] * x**2).sum(dtype=np.float64) / before
            assert np.sqrt(spread) == pytest.approx(0.82 * (size + 1) / 32, rel=0.05)
            assert center == pytest.approx((0, 0), abs=0.01 * width)
        else:
            # Half a Gaussian: its mean is √(2 / π) of its standard deviation away, to the right.
            assert np.hypot(*center) == pytest.approx(2 * np.sqrt(2 / np.pi) * (size + 1) / 32, rel=0.2)
            assert center[1] > abs(center[0]) * 0.99


def test_what_has_no_detail_loses_none() -> None:
    gray = flat(90)
    for name in ("defocus_blur", "motion_blur", "zoom_blur", "contrast", "elastic_transform", "pixelate"):
        np.testing.assert_array_equal(corrupt(gray, NAMED[name], 5), gray, err_msg=name)


def test_light_and_contrast_by_hand() -> None:
    color = flat(0)
    color[:, 0], color[:, 1] = 102, 51  # value 0.4
    bright = corrupt(color, NAMED["brightness"], 4)[0, :, 0, 0]
    assert bright.tolist() == [153, 76, 0], "value 0.6 at the same hue and saturation"
    assert (corrupt(flat(0), NAMED["brightness"], 4) == 51).all()
    assert (corrupt(flat(250), NAMED["brightness"], 5) == 255).all()
    halves = flat(50)
    halves[..., 16:] = 150
    assert np.unique(corrupt(halves, NAMED["contrast"], 2)).tolist() == [75, 125]


def test_a_zoom_keeps_the_middle_and_drags_the_rim() -> None:
    photos = photo_crops(16, 33)
    changed = np.abs(corrupt(photos, NAMED["zoom_blur"], 3).astype(int) - photos).mean((0, 1))
    assert changed[16, 16] <= 1
    assert changed[[0, -1]].mean() > 4 * changed[14:19, 14:19].mean()


def test_coarse_pixels_are_blocks() -> None:
    photo = photo_crops(1, 224)
    made = corrupt(photo, NAMED["pixelate"], 5)[0]
    assert (made[:, :, 1:] == made[:, :, :-1]).all((0, 1)).sum() > 150, "most columns repeat their neighbor"
