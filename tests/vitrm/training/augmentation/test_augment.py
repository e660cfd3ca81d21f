"""Augmentation: each image its own crop, targets that stay distributions, everything from one seed."""

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from torchvision.transforms import v2

from vitrm.data import photo_crops
from vitrm.recipe import recipe
from vitrm.training.augmentation.augment import (
    BatchRows,
    TrainingBatches,
    augment,
    balanced_order,
    members_of,
    mix,
    rand_augment,
    random_crop,
    random_flip,
)


def _rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_crop_moves_each_image_by_its_own_offset(digits):
    pixels = torch.from_numpy(digits.train.pixels[:64])
    cropped = random_crop(pixels, 4, _rng())
    assert cropped.shape == pixels.shape
    assert cropped.dtype == torch.uint8
    padded = torch.nn.functional.pad(pixels, (4, 4, 4, 4))
    rows, columns = _rng().integers(0, 9, (2, 64))
    for i in range(64):
        assert torch.equal(cropped[i], padded[i, :, rows[i] : rows[i] + 32, columns[i] : columns[i] + 32])
    assert len(set(zip(rows.tolist(), columns.tolist(), strict=True))) > 20


def test_flip_mirrors_some_images_and_not_others(digits):
    pixels = torch.from_numpy(digits.train.pixels[:64])
    flipped = random_flip(pixels, _rng())
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(flipped, pixels, strict=True)]
    same = [torch.equal(a, b) for a, b in zip(flipped, pixels, strict=True)]
    assert all(a or b for a, b in zip(mirrored, same, strict=True))
    assert 16 < sum(mirrored) < 48


def test_rand_augment_depends_on_its_seed_alone_and_draws_per_image(digits):
    pixels = torch.from_numpy(digits.train.pixels[:1]).expand(64, -1, -1, -1).contiguous()
    torch.manual_seed(1)
    one = rand_augment(pixels, 2, 9, _rng())
    torch.manual_seed(2)
    before = torch.get_rng_state()
    two = rand_augment(pixels, 2, 9, _rng())
    assert torch.equal(one, two)
    assert torch.equal(torch.get_rng_state(), before)
    assert len({image.numpy().tobytes() for image in one}) > 20
    # An image's operations do not depend on which others are computed along.
    part = rand_augment(pixels[5:9], 2, 9, _rng(), BatchRows(np.arange(5, 9), 64))
    assert torch.equal(part, one[5:9])


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.2, 0.0), (0.0, 1.0), (0.2, 1.0)])
def test_mixed_targets_sum_to_one_and_match_the_pixels(mixup, cutmix):
    # Image i is i / 8 everywhere, so its mean tells how much of which image is in it.
    values = torch.arange(8) / 8
    images = values[:, None, None, None].expand(8, 3, 32, 32).contiguous()
    target = torch.eye(8)
    shares = set()
    for seed in range(20):
        mixed, soft = mix(images, target, mixup, cutmix, _rng(seed))
        assert torch.allclose(soft.sum(1), torch.ones(8), atol=1e-6)
        assert (soft >= 0).all()
        assert torch.allclose(mixed.mean((1, 2, 3)), soft @ values, atol=1e-5)
        shares.add(round(float(soft[0, 0]), 4))
    assert len(shares) > 5


def test_both_mixes_are_used_about_equally():
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 8, 8).contiguous()
    # Mixup blends every pixel; CutMix leaves each pixel a whole number.
    cut = sum(bool((mix(images, torch.eye(4), 0.9, 0.9, _rng(s))[0] % 1 == 0).all()) for s in range(200))
    assert 70 < cut < 130


def test_halting_compares_with_the_label_that_mixing_leaves_alone(digits):
    pixels = torch.from_numpy(digits.train.pixels[:32])
    labels = torch.from_numpy(digits.train.labels[:32])
    batch = augment(pixels, labels, 10, recipe("paper", randaugment_ops=0), False, _rng(3))
    assert torch.equal(batch.label, labels)
    assert (batch.target.max(1).values < 1).any()
    assert batch.images.dtype == torch.float32
    assert 0 <= float(batch.images.min()) <= float(batch.images.max()) <= 1


def test_a_batch_is_a_function_of_its_seed(digits):
    pixels = torch.from_numpy(digits.train.pixels[:32])
    labels = torch.from_numpy(digits.train.labels[:32])
    one, two, other = (augment(pixels, labels, 10, recipe("paper"), True, _rng(s)) for s in (1, 1, 2))
    assert torch.equal(one.images, two.images)
    assert torch.equal(one.target, two.target)
    assert not torch.equal(one.images, other.images)


def _alike(ours: list[float], theirs: list[float]) -> None:
    """Two samples that may come from one distribution (Kolmogorov–Smirnov; seeded, so it always says the same)."""
    assert ks_2samp(ours, theirs).pvalue > 0.01


@pytest.mark.parametrize(("how", "alpha"), [("mixup", 0.2), ("mixup", 1.0), ("cutmix", 1.0)])
def test_mixing_is_distributed_as_torchvisions(how, alpha):
    images, label, target = torch.zeros(4, 3, 32, 32), torch.arange(4), torch.eye(4)
    images[0] = 1  # how much of image 0 is left in it, in pixels
    theirs = (v2.MixUp if how == "mixup" else v2.CutMix)(alpha=alpha, num_classes=4)
    samples: dict[str, list[float]] = {"ours": [], "our pixels": [], "theirs": []}
    torch.manual_seed(0)
    for seed in range(600):
        mixed, soft = mix(images, target, *((alpha, 0.0) if how == "mixup" else (0.0, alpha)), _rng(seed))
        samples["ours"].append(float(soft[0, 0]))
        samples["our pixels"].append(float(mixed[0].mean()))
        samples["theirs"].append(float(theirs(images, label)[1][0, 0]))
    _alike(samples["ours"], samples["theirs"])
    _alike(samples["our pixels"], samples["theirs"])


def test_crops_are_distributed_as_torchvisions():
    ramp = torch.arange(1, 33, dtype=torch.uint8)
    image = torch.stack([ramp.expand(32, 32), ramp[:, None].expand(32, 32), torch.full((32, 32), 255)])
    ours = random_crop(image.expand(800, -1, -1, -1).contiguous(), 4, _rng())
    torch.manual_seed(0)
    theirs = torch.stack([v2.RandomCrop(32, padding=4)(image) for _ in range(800)])
    for channel in (0, 1):
        # The value in the middle says by how much the image was moved.
        _alike(ours[:, channel, 16, 16].tolist(), theirs[:, channel, 16, 16].tolist())
    _alike(ours[:, 2].float().mean((1, 2)).tolist(), theirs[:, 2].float().mean((1, 2)).tolist())


def test_rand_augment_is_distributed_as_torchvisions():
    photo = torch.from_numpy(photo_crops(1))
    count = 250
    ours = rand_augment(photo.expand(count, -1, -1, -1).contiguous(), 2, 9, _rng()).float()
    torch.manual_seed(0)
    theirs = torch.cat([v2.RandAugment(num_ops=2, magnitude=9)(photo) for _ in range(count)]).float()
    for statistic in (
        lambda x: x.mean((1, 2, 3)),
        lambda x: x.std((1, 2, 3)),
        lambda x: (x - photo).abs().mean((1, 2, 3)),
    ):
        _alike(statistic(ours).tolist(), statistic(theirs).tolist())


def _unequal(digits, counts):
    """So many images of the first digits, each."""
    rows = [np.flatnonzero(digits.train.labels == label)[:count] for label, count in enumerate(counts)]
    return digits.train.take(np.concatenate(rows))


def test_balanced_sampling_draws_all_classes_equally_often(digits):
    images = _unequal(digits, (100, 6, 23))
    members = members_of(images.labels)
    np.testing.assert_array_equal(np.concatenate(members), np.arange(129))
    order = balanced_order(members, 129, _rng())
    assert order.tolist() == balanced_order(members, 129, _rng()).tolist()
    np.testing.assert_array_equal(np.bincount(images.labels[order]), [43, 43, 43])
    times = np.bincount(order, minlength=129)
    assert times[:100].max() == 1, "of a large class none twice"
    assert set(times[100:106]) == {7, 8}, "of a small one all equally often"
    assert len(set(images.labels[order[:20]])) == 3, "mixed"
    batches = TrainingBatches(images, recipe("fast", balance="sampling"), 0, 43, slice(0, 43))
    drawn = np.concatenate([batches.draw(0, i)[0].label for i in range(3)])
    np.testing.assert_array_equal(np.bincount(drawn, minlength=10), [43, 43, 43] + [0] * 7)


def test_a_balanced_loss_is_torchs_with_weights(digits):
    images = _unequal(digits, (100, 6, 23))
    batches = TrainingBatches(images, recipe("fast", balance="loss", cutout=0), 0, 129, slice(0, 129))
    batch, _ = batches.draw(0, 0)
    weights = torch.tensor([129 / (3 * n) for n in (100, 6, 23)] + [0.0] * 7)
    assert float(weights[batch.label].mean()) == pytest.approx(1)
    logits = torch.randn(129, 10, generator=torch.Generator().manual_seed(0))
    sums = torch.nn.functional.cross_entropy(logits, batch.label, weights, reduction="sum") / 129
    assert float(torch.nn.functional.cross_entropy(logits, batch.target)) == pytest.approx(float(sums), rel=1e-5)
    # Mixed images carry the weights of both.
    mixed = TrainingBatches(images, recipe("fast", balance="loss", mixup_alpha=1.0), 0, 129, slice(0, 129))
    target = mixed.draw(0, 0)[0].target
    assert float(target.sum()) == pytest.approx(129, rel=1e-4)
    assert ((target > 0).sum(1) == 2).any()
