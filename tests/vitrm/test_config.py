"""vitrm.config: parameter counts of the paper's tables, and refusal of what cannot be."""

from __future__ import annotations

import pytest
import torch

from vitrm.checkpoint import build_model
from vitrm.config import PRESETS, from_dict, preset, to_dict
from vitrm.errors import UserError


def parameters(name: str, classes: int) -> int:
    with torch.device("meta"):  # counted, not allocated
        return sum(p.numel() for p in build_model(preset(name, classes=classes)).parameters())


@pytest.mark.parametrize(("name", "classes", "expected"), [("paper", 10, 3_624_203), ("paper", 100, 3_658_853)])
def test_paper_has_exactly_the_published_parameters(name, classes, expected):
    assert parameters(name, classes) == expected


@pytest.mark.parametrize(
    ("name", "classes", "millions"),
    [
        ("vit-small", 10, 16.9),
        ("vit-base", 10, 85.1),
        ("vit-base", 100, 85.2),
        ("vit-large", 10, 302.4),
        ("resnet18", 10, 11.2),
        ("resnet18-cifar", 10, 11.2),
        ("resnet34", 10, 21.3),
        ("resnet50", 10, 23.5),
        ("resnet50", 100, 23.7),
    ],
)
def test_baselines_have_the_tables_parameters(name, classes, millions):
    # The paper truncates (85.15 → 85.1); a tenth of a million either way is the table's own precision.
    assert parameters(name, classes) / 1e6 == pytest.approx(millions, abs=0.075)


def test_paper_plus_stays_within_the_papers_size():
    assert 0.99 * 3_624_203 < parameters("paper+", 10) <= 3_624_203


def test_nano_is_an_edge_model():
    assert 0.8e6 <= parameters("nano", 10) <= 1.0e6


@pytest.mark.parametrize("name", PRESETS)
def test_configs_survive_json(name):
    assert from_dict(to_dict(PRESETS[name]), "test") == PRESETS[name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 65}, "dim 65 is not a multiple of heads 2"),
        ({"image_size": 30}, "image_size 30 is not a multiple"),
        ({"classes": 1}, "classes is 1, expected a whole number from 2 to"),
        ({"latents": 0}, "latents is 0"),
        ({"n": 1.5}, "n is 1.5"),
        ({"ffn": "relu"}, "expected 'gelu' or 'swiglu'"),
        ({"tokenizer": "fft"}, "expected 'patch' or 'conv'"),
        ({"dropout": 1.0}, "dropout"),
        ({"std": [0.1, 0.0, 0.1]}, r"std is \[0\.1, 0\.0, 0\.1\], expected three numbers, each in \[1e-06, 1e\+06\]"),
        ({"mean": 0.5}, "three numbers"),
        ({"conv_layers": 2, "tokenizer": "conv"}, "conv_layers is 2, expected at least 3"),
        ({"depth": 3}, "unknown key depth"),
    ],
)
def test_impossible_values_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        preset("tiny", **changes)


def test_unknown_presets_are_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"unknown model preset 'huge'.*paper.*nano"):
        preset("huge")
    with pytest.raises(UserError, match="model kind is 'mlp'"):
        from_dict({"kind": "mlp"}, "test")
