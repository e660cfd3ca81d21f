"""A model's tokens stay few at any image size."""

from __future__ import annotations

import pytest
import torch

from vitrm.checkpoint import build_model
from vitrm.config import PRESETS, ViTRMConfig, preset
from vitrm.errors import UserError
from vitrm.tokens import FOLLOWING, MAX_TOKENS


@pytest.mark.parametrize("name", [name for name, config in PRESETS.items() if isinstance(config, ViTRMConfig)])
def test_every_size_that_halves_well_makes_few_tokens(name: str) -> None:
    for size in (32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 512):
        config = preset(name, image_size=size)
        assert isinstance(config, ViTRMConfig)
        assert 64 // 4 <= config.tokens <= MAX_TOKENS, size
        assert config.parameters < 1.4 * PRESETS[name].parameters or config.tokenizer == "patch"
    assert preset(name, image_size=32) == PRESETS[name]


@pytest.mark.parametrize("name", ["nano", "nano-v2", "nano-v3", "paper+", "vit-small", "cct-7-3x1", "convmixer-256-8"])
def test_it_computes_at_224(name: str) -> None:
    config = preset(name, image_size=224)
    with torch.device("meta"):
        model = build_model(config)
        images = torch.empty(2, 3, 224, 224)
        logits = model.classifier(model.tokenizer(images)[:, 0]) if model.recursive else None
    assert logits is None or logits.shape == (2, 10)
    assert config.parameters == sum(p.numel() for p in model.parameters())


def test_what_is_given_stays() -> None:
    given = preset("nano-v2", image_size=128, patch_size=4)
    assert (given.patch_size, given.stage_widths) == (4, (48, 144))
    followed = preset("nano-v2", image_size=224)
    assert (followed.patch_size, followed.stage_widths, followed.tokens) == (16, (24, 24, 48, 144), 196)
    assert set(FOLLOWING) <= {*vars(followed)}


def test_a_size_that_cannot_be_halved_names_its_neighbors() -> None:
    with pytest.raises(UserError, match=r"image_size is 100, expected a multiple of 8 .* try 104 or 96"):
        preset("nano", image_size=100)
    assert preset("paper", image_size=100).patch_size == 10
