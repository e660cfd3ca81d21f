"""vitrm.config: parameter counts of the paper's tables, and refusal of what cannot be."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vitrm.baseline_configs import (
    AirbenchConfig,
    CCTConfig,
    CifarResNetConfig,
    ConvMixerConfig,
    MobileNetV2Config,
    ResNetConfig,
    ViTConfig,
)
from vitrm.checkpoint import build_model
from vitrm.config import PRESETS, ModelConfig, ViTRMConfig, from_dict, preset, to_dict
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
        ("resnet20", 10, 0.27),
        ("convmixer-256-8", 10, 0.59),
        ("cct-7-3x1", 10, 3.76),
        ("mobilenetv2-cifar", 10, 2.24),
        ("airbench", 10, 4.6),
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
        ({"image_size": 30, "patch_size": 8}, "image_size 30 is not a multiple"),
        ({"classes": 1}, "classes is 1, expected a whole number from 2 to"),
        ({"latents": 0}, "latents is 0"),
        ({"n": 1.5}, "n is 1.5"),
        ({"ffn": "relu"}, "expected 'gelu' or 'swiglu'"),
        ({"tokenizer": "fft"}, "expected 'patch', 'conv' or 'whitened'"),
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


ODD: list[ModelConfig] = [
    ViTRMConfig(ffn="swiglu", dim=60, heads=5, latents=7, layers=2, classes=3, image_size=48, patch_size=6),
    ViTRMConfig(tokenizer="conv", patch_size=8, conv_width=5, conv_layers=5, conv_norm=True, ffn_hidden=11),
    ViTRMConfig(tokenizer="conv", patch_size=2, conv_width=9),
    ViTConfig(dim=40, heads=2, mlp=7, layers=3, patch_size=16, classes=2),
    ResNetConfig(depth=50, stem="cifar", classes=33),
    CifarResNetConfig(depth=8, image_size=7, classes=4),
    MobileNetV2Config(width=0.3, image_size=17),
    MobileNetV2Config(width=1.2, classes=3, image_size=1),
    ConvMixerConfig(dim=6, layers=2, kernel=7, patch_size=4, classes=2),
    AirbenchConfig(width=5, deep_width=3, image_size=9),
    AirbenchConfig(width=8, deep_width=64, image_size=22),
    CCTConfig(dim=20, layers=2, heads=2, mlp=24, conv_layers=3, image_size=29),
]


@pytest.mark.parametrize("config", [*PRESETS.values(), *ODD])
def test_parameters_are_counted_without_the_model(config):
    with torch.device("meta"):
        assert config.parameters == sum(p.numel() for p in build_model(config).parameters())


@pytest.mark.slow
@pytest.mark.parametrize("config", [c for c in (*PRESETS.values(), *ODD) if c.parameters < 25e6])
def test_activations_are_counted_without_the_model(config):
    """At least the largest tensor that one image takes, and not twice that."""
    model = build_model(config).eval()
    with LargestTensor() as largest, torch.no_grad():
        images = torch.zeros(1, 3, config.image_size, config.image_size)
        model(images, 1) if model.recursive else model(images)
    assert largest.values <= config.activation <= 2 * largest.values


class LargestTensor(TorchDispatchMode):
    """Notes the most values that an operator run inside gives."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        if isinstance(outputs, torch.Tensor) and outputs.dim() >= 3:
            self.values = max(self.values, outputs.numel())
        return outputs


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("resnet20", {"depth": 21}, r"depth is 21, expected 6 n \+ 2"),
        ("airbench", {"image_size": 8}, "image_size is 8, expected a whole number from 9"),
        ("convmixer-256-8", {"image_size": 33, "patch_size": 2}, "image_size 33 is not a multiple of patch_size 2"),
        ("convmixer-256-8", {"kernel": 4}, "kernel is 4, expected 5, 3, 7 or 9"),
        ("cct-7-3x1", {"heads": 3}, "dim 256 is not a multiple of heads 3"),
        ("airbench", {"latents": 3}, "unknown key latents for an airbench"),
    ],
)
def test_what_a_baseline_cannot_be_is_refused(name, changes, message):
    with pytest.raises(UserError, match=message):
        preset(name, **changes)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("nano", {"dim": 60_000, "heads": 1}, "parameters, at most 1,000,000,000 are allowed"),
        ("vit-large", {"layers": 1000}, "parameters, at most"),
        (
            "nano",
            {"image_size": 4096, "patch_size": 4},
            "one image of 4096 pixels would fill a tensor of [0-9,]+ values",
        ),
        ("paper", {"image_size": 2048, "patch_size": 4}, "a larger patch_size"),
        ("tiny", {"n": 1000, "layers": 10}, "a step would compute 10,010 layers"),
        ("tiny", {"recursions": 1024, "n": 1024}, "layers after each other"),
    ],
)
def test_what_no_machine_could_hold_is_refused(name, changes, message):
    with pytest.raises(UserError, match=message):
        preset(name, **changes)


def test_unknown_presets_are_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"unknown model preset 'huge'.*paper.*nano"):
        preset("huge")
    with pytest.raises(UserError, match="model kind is 'mlp'"):
        from_dict({"kind": "mlp"}, "test")
