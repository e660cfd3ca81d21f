"""vitrm.model: equal to a plain transcription of the equations, values and gradients; halting per sample."""

from __future__ import annotations

import pytest
import reference
import torch
import torch.nn.functional as F

from vitrm.layers.whitening import Whitening
from vitrm.model import ViTRM

CONFIGS = {
    "gelu": {},
    "swiglu": {"ffn": "swiglu"},
    "two recursions a step": {"recursions": 2, "n": 1},
    "one layer": {"layers": 1},
    "three layers, conv tokenizer": {"layers": 3, "tokenizer": "conv", "conv_width": 8},
    "cross": {"mixing": "cross", "layers": 3},
    "cross, one layer": {"mixing": "cross", "layers": 1},
    "token MLP": {"token_mixer": "mlp", "layers": 3},
    "token MLP, cross": {"token_mixer": "mlp", "mixing": "cross", "mixer_hidden": 24},
    "whitened tokenizer": {"tokenizer": "whitened", "stage_widths": (8, 8, 8)},
    "glimpses": {"glimpses": "shift"},
    "mirrored glimpses, cross, whitened tokenizer": {
        "glimpses": "mirror",
        "mixing": "cross",
        "tokenizer": "whitened",
        "stage_widths": (8, 8, 8),
        "directions": 5,
    },
    "conv tokenizer with batch norm": {"tokenizer": "conv", "conv_width": 4, "conv_layers": 4, "conv_norm": True},
}


def make(**changes: object) -> ViTRM:
    return reference.shaken("tiny", **changes)


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_equals_the_equations_at_every_step(changes):
    model, images = make(**changes), torch.rand(3, 3, 32, 32)
    steps = 7 if "glimpses" in changes else 3  # views come in turn, the first again in the end
    logits, halts = model.trajectory(images, steps)
    for s, (plain_logits, plain_halt) in enumerate(reference.run(model, images, steps)):
        torch.testing.assert_close(logits[s], plain_logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(halts[s], plain_halt, atol=1e-5, rtol=1e-5)
    assert logits.std(1).min() > 1e-3, "the images should matter, or equality says nothing"


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_gradients_equal_the_equations(changes):
    model, images = make(**changes).double(), torch.rand(2, 3, 32, 32, dtype=torch.float64)

    def gradients(outputs):
        loss = sum(logits.square().sum() + halt.sum() for logits, halt in outputs)
        return torch.autograd.grad(loss, list(model.parameters()))

    ours = gradients(zip(*model.trajectory(images, 2), strict=True))
    plain = gradients(reference.run(model, images, 2))
    for (name, _), a, b in zip(model.named_parameters(), ours, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
        assert b.abs().max() > 0, f"{name} takes no part in the loss"


def test_whitened_patches_are_white():
    """The first filters' answers to the images they come from: variance 1, no two alike; and their negatives."""
    whitening = make(**CONFIGS["whitened tokenizer"]).tokenizer.whitening
    # Neighbors alike, as in photos; of so much contrast that the noise which whitening allows for is nothing beside it.
    torch.manual_seed(0)
    images = 100 * F.avg_pool2d(torch.randn(200, 3, 35, 35), 4, stride=1)
    whitening.whiten(images)
    patches = F.conv2d(images, whitening.filters).transpose(0, 1).flatten(1)
    torch.testing.assert_close(patches[:12] @ patches[:12].T / patches.shape[1], torch.eye(12), atol=1e-2, rtol=0)
    torch.testing.assert_close(patches[12:], -patches[:12])


def test_fewer_directions_are_those_of_the_largest_variance():
    torch.manual_seed(0)
    contrast = torch.tensor([3.0, 2.0, 1.0]).view(3, 1, 1)  # red differs most, then green
    images = contrast * torch.randn(50, 3, 32, 32)
    every, few = (Whitening(2, count, padded=True) for count in (None, 5))
    for whitening in (every, few):
        whitening.whiten(images)
    torch.testing.assert_close(few.filters, torch.cat([every.filters[:5], every.filters[12:17]]))
    red, others = few.filters[:4, 0].abs().max(), few.filters[:4, 1:].abs().max()
    assert others < red / 5, "the first four directions are those of red"
    assert few(images).shape == (50, 10, 32, 32)


def test_colors_that_gray_images_lack_have_no_filter():
    whitening = make(**CONFIGS["whitened tokenizer"]).tokenizer.whitening
    gray = torch.randn(50, 1, 32, 32).expand(-1, 3, -1, -1)
    whitening.whiten(gray)
    assert [bool(f.any()) for f in whitening.filters[:12]] == [True] * 4 + [False] * 8


@pytest.mark.parametrize("conv_layers", [2, 3])
def test_a_convolutional_tokenizer_keeps_tokens_in_their_places(conv_layers):
    model = make(patch_size=4, tokenizer="conv", conv_width=4, conv_layers=conv_layers)
    images = torch.rand(2, 3, 32, 32)
    changed = images.clone()
    changed[:, :, 8:12, 12:16] = 1 - changed[:, :, 8:12, 12:16]  # the patch in row 2, column 3
    difference = (model.tokenizer(changed) - model.tokenizer(images)).abs().amax(2)[0]
    assert difference.shape == (64,)
    assert difference[8 * 2 + 3] > 0
    assert difference[63] == difference[7] == difference[56] == 0


@pytest.mark.parametrize("heads", [1, 4])
def test_attention_heads_matter(heads):
    # An implementation that ignored the head count would equal itself; the reference shows it does not here.
    model, images = make(heads=heads), torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(model(images, 1).logits, reference.run(model, images, 1)[0][0], atol=1e-5, rtol=1e-5)


def test_halting_freezes_a_sample_and_ignores_its_batch_mates():
    model, images = make(), torch.rand(16, 3, 32, 32)
    with torch.no_grad():
        logits, halts = model.trajectory(images, 6)
    # Between two values, so that rounding decides nothing; some samples then halt early, some late, some never.
    ordered = halts[:3].max(0).values.sort().values
    threshold = float((ordered[7] + ordered[8]) / 2)
    output = model(images, 6, threshold)
    for i in range(16):
        first = next((s for s in range(6) if halts[s, i] > threshold), 5)
        assert output.steps_used[i] == first + 1
        torch.testing.assert_close(output.logits[i], logits[first, i])
        torch.testing.assert_close(output.halt_prob[i], halts[first, i])
        alone = model(images[i : i + 1], 6, threshold)
        assert alone.steps_used[0] == output.steps_used[i]
        torch.testing.assert_close(alone.logits[0], output.logits[i], atol=1e-5, rtol=1e-5)
    assert len(output.steps_used.unique()) > 1


def test_never_halts_without_a_threshold_and_refuses_depth_zero():
    model, images = make(), torch.rand(2, 3, 32, 32)
    assert model(images, 4).steps_used.tolist() == [4, 4]
    with pytest.raises(ValueError, match="steps is 0"):
        model(images, 0)


def test_depth_changes_the_answer():
    model, images = make(), torch.rand(2, 3, 32, 32)
    assert (model(images, 1).logits - model(images, 2).logits).abs().max() > 1e-3


@pytest.mark.parametrize("size", [32, 64, 100])
def test_a_glimpse_is_the_image_moved_by_a_32nd_of_its_side(size):
    model, images = make(glimpses="mirror", image_size=size, patch_size=4), torch.rand(2, 3, size, size)
    unit = size // 32
    wide = F.pad(images, (unit,) * 4, mode="reflect")
    expected = [images, wide[:, :, : -2 * unit, : -2 * unit], wide[:, :, 2 * unit :, 2 * unit :]]
    number = torch.zeros(2, 1)
    for view in (view for moved in expected for view in (moved, moved.flip(3))):
        assert torch.equal(model.glimpses(images, number), view)
        number = model.glimpses.after(number)
    assert not number.any(), "behind the last view comes the first"


def test_each_sample_looks_at_its_own_view():
    """In a batch whose samples have come to different depths, as a host may put them together."""
    model, images = make(glimpses="mirror"), torch.rand(3, 3, 32, 32)
    numbers = torch.tensor([[4.0], [0.0], [1.0]])
    together = model.glimpses(images, numbers)
    for i in range(3):
        assert torch.equal(together[i : i + 1], model.glimpses(images[i : i + 1], numbers[i : i + 1]))
