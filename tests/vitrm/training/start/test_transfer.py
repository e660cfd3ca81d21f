"""Weights of one image size for another: what they meant, they mean."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vitrm.checkpoint import Checkpoint, build_model
from vitrm.config import ModelConfig, preset
from vitrm.errors import UserError
from vitrm.training.start.transfer import resample_patches, resample_positions, transfer

SMALL = {"dim": 16, "heads": 2, "layers": 1}


def of(config: ModelConfig) -> Checkpoint:
    torch.manual_seed(0)
    return Checkpoint(model=config, data={}, weights=build_model(config).state_dict(), source="runs/a")


def test_positions_keep_their_place_in_the_image() -> None:
    x, y = torch.meshgrid(torch.linspace(0.5, 7.5, 8), torch.linspace(0.5, 7.5, 8), indexing="xy")
    plane = torch.stack([x, y], -1).reshape(1, 64, 2) / 8  # the center of each token, as a share of the image
    twice = resample_positions(plane, 256).reshape(16, 16, 2)
    centers = (torch.arange(16) + 0.5) / 16
    torch.testing.assert_close(twice[8, 3:13, 0], centers[3:13], atol=0.01, rtol=0)
    torch.testing.assert_close(twice[3:13, 8, 1], centers[3:13], atol=0.01, rtol=0)
    torch.testing.assert_close(resample_positions(plane, 64), plane)
    with_class = torch.cat([torch.full((1, 1, 2), 9.0), plane], 1)
    there = resample_positions(with_class, 257)
    assert there.shape == (1, 257, 2)
    assert (there[:, 0] == 9).all()


def test_an_even_patch_projects_to_the_same_token() -> None:
    # Smooth, as learned filters are: of noise, a smaller patch cannot keep all.
    rough = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    weight = torch.nn.functional.interpolate(rough, size=8, mode="bilinear")
    even = torch.tensor([0.2, 0.5, 0.9])
    for side in (4, 16):
        tokens = torch.einsum("dcij,c->d", resample_patches(weight, side), even)
        torch.testing.assert_close(tokens, torch.einsum("dcij,c->d", weight, even), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "before", "after", "said"),
    [
        ("tiny", 32, 64, "positions are resampled from 16 tokens to 64"),
        ("tiny", 32, 224, "patches of 16 pixels are projected by the weights for 8, resampled"),
        ("nano", 32, 64, "positions are resampled from 64 tokens to 256"),
        ("nano", 32, 224, "the tokenizer begins anew: for images of 224 pixels it has other convolutions"),
        ("vit-small", 32, 224, "positions are resampled from 65 tokens to 197"),
        ("resnet18", 32, 224, None),
    ],
)
def test_a_model_goes_on_at_another_image_size(name: str, before: int, after: int, said: str | None) -> None:
    small = {**SMALL, "latents": 2} if name in ("tiny", "nano") else SMALL if name == "vit-small" else {}
    init = of(preset(name, image_size=before, **small))
    model = build_model(preset(name, image_size=after, **small))
    found = transfer(init, model, same_classes=True)
    model.load_state_dict(found.weights)
    assert any(said in note for note in found.notes) if said else not found.notes
    kept = (
        "block.0.q.weight" if name in ("tiny", "nano") else "net.fc.weight" if name == "resnet18" else "net.head.weight"
    )
    assert torch.equal(found.weights[kept], init.weights[kept])
    assert found.new_tokenizer == ("anew" in (said or ""))


def test_another_model_is_refused_with_a_way_out() -> None:
    config = preset("tiny", **SMALL)
    with pytest.raises(UserError, match=r"another model than asked for \(latents 3 against 8\): leave out --model"):
        transfer(of(config), build_model(replace(config, latents=3)), same_classes=True)
    mlp = preset("tiny", token_mixer="mlp", **SMALL)
    with pytest.raises(UserError, match="an mlp token mixer is of one number of tokens"):
        transfer(of(mlp), build_model(replace(mlp, image_size=64)), same_classes=True)
