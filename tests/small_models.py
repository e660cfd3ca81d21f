"""Small models that mostly answer right, and artifacts with altered metadata, for the tests of what reads them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from vitrm import data as datasets
from vitrm.checkpoint import Checkpoint, build_model
from vitrm.config import ModelConfig, preset
from vitrm.layers.conv_group import ShiftBatchNorm
from vitrm.model import ViTRM, WhitenedTokenizer
from vitrm.runtime.backends.onnxruntime.session import cuts_float16

STEPS = 3
# Changes that make a baseline's preset small, with every part that it has.
SMALL: dict[str, dict[str, Any]] = {
    "resnet20": {"depth": 8},
    "mobilenetv2-cifar": {"width": 0.2},
    "convmixer-256-8": {"dim": 16, "layers": 2},
    "airbench": {"width": 12, "deep_width": 16},
    "vit-small": {"dim": 64, "layers": 2, "heads": 2, "mlp": 64},
    "cct-7-3x1": {"dim": 64, "layers": 2, "heads": 2, "mlp": 64},
}


def small(name: str) -> ModelConfig:
    """The preset of a baseline, made small."""
    return preset(name, **SMALL[name])


def make_checkpoint(name: str, seed: int = 0, **changes: object) -> Checkpoint:
    """A model with random layers; a ViTRM's heads are fitted to digits by least squares, so that it is mostly right."""
    torch.manual_seed(seed)
    config = preset(name, **changes)
    model = build_model(config).eval()
    if isinstance(model, ViTRM):
        if isinstance(model.tokenizer, WhitenedTokenizer):
            _see_digits(model.tokenizer)
        _fit_heads(model)
    data = {"name": "digits", "classes": [str(i) for i in range(config.classes)]}
    return Checkpoint(model=config, data=data, weights=model.state_dict(), source="test")


@torch.no_grad()
def _see_digits(tokenizer: WhitenedTokenizer) -> None:
    """What training finds before its first update, and its batch norms in the first: else activations grow with depth."""
    images = torch.from_numpy(datasets.load("digits", "train").floats()) * 2 - 1
    tokenizer.whitening.whiten(images)
    for module in tokenizer.modules():
        if isinstance(module, ShiftBatchNorm):
            module.momentum = 1.0
    tokenizer.train()(images)
    tokenizer.eval()


@torch.no_grad()
def _fit_heads(model: ViTRM) -> None:
    images = datasets.load("digits", "train")
    embedded = model.embed(torch.from_numpy(images.floats()))
    state = model.initial_state(len(images))
    for _ in range(STEPS):
        state = model.step(embedded, state)
    y = state.y[:, 0]
    features = torch.cat([y, torch.ones(len(y), 1)], 1)
    labels = torch.from_numpy(images.labels)
    targets = 8 * torch.nn.functional.one_hot(labels, model.config.classes).float()
    solution = torch.linalg.lstsq(features, targets).solution
    model.classifier.weight.copy_(solution[:-1].T)
    model.classifier.bias.copy_(solution[-1])
    right = (model.classifier(y).argmax(1) == labels).float()[:, None]
    solution = torch.linalg.lstsq(features, 4 * right - 2).solution
    model.halt.weight.copy_(solution[:-1].T)
    model.halt.bias.copy_(solution[-1])


def clear_threshold(halts: Any, low: float = 0.25, high: float = 0.75) -> float:
    """A threshold that no halting probability is near, so that no rounding decides: the middle of the widest gap between
    those from the quantile `low` to `high`.
    """
    values = np.sort(np.asarray(halts, np.float64), axis=None)
    values = values[int(low * len(values)) : max(int(high * len(values)), int(low * len(values)) + 2)]
    gap = int(np.diff(values).argmax())
    # Rounding moves a probability by some 1e-6.
    assert values[gap + 1] - values[gap] > 1e-4, "the halting probabilities are too close to each other"
    return float(values[gap : gap + 2].mean())


def with_props(source: Path, target: Path, /, **changes: str | None) -> Path:
    """A copy of an ONNX file with other metadata_props (None removes one), and the digest that goes with them."""
    model = onnx.load(str(source))
    kept = {p.key: p.value for p in model.metadata_props} | {f"vitrm.{k}": v for k, v in changes.items()}
    kept = {k: v for k, v in kept.items() if v is not None}
    del model.metadata_props[:]
    if "vitrm.sha256" in kept and changes.get("sha256") is None:
        kept["vitrm.sha256"] = digest_of(model, kept)
    for key, value in kept.items():
        model.metadata_props.add(key=key, value=value)
    onnx.save(model, str(target))
    return target


def digest_of(model: onnx.ModelProto, props: dict[str, str]) -> str:
    """The digest of a model without metadata_props and external weights, as vitrm.runtime.artifact.onnx_file defines it."""
    described = sorted((k, v) for k, v in props.items() if k.startswith("vitrm.") and k != "vitrm.sha256")
    pieces = [model.SerializeToString(), *(text.encode() for pair in described for text in pair)]
    return hashlib.sha256(b"".join(len(piece).to_bytes(8, "little") + piece for piece in pieces)).hexdigest()


def skip_if_float16_is_cut(target: str) -> None:
    """Skips a test of numbers from a file for TensorRT where this onnxruntime truncates what it should round."""
    if target == "tensorrt" and cuts_float16(onnxruntime.__version__):
        pytest.skip(f"onnxruntime {onnxruntime.__version__} truncates float16 where it quantizes on a CPU: 1.30 rounds")
