"""How good a model is at every depth: one run of the recursion, read after each step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from vitrm.baselines import Baseline
from vitrm.data import Images
from vitrm.model import ViTRM


@dataclass(frozen=True)
class DepthAccuracy:
    """A model on a set of n images at the depths 1 … S; a baseline has the one depth 1 and no halting."""

    accuracy: list[float]  # share of right answers in [0, 1], per depth
    loss: list[float]  # mean cross-entropy in nats, per depth
    halt: list[float]  # mean halting probability, per depth; empty for a baseline
    predictions: NDArray[np.int64]  # [S, n]
    halt_prob: NDArray[np.float32]  # [S, n]; [0, n] for a baseline


def accuracy_by_depth(
    model: ViTRM | Baseline,
    images: Images,
    steps: int,
    *,
    batch_size: int = 256,
    bf16: bool = False,
    between_batches: Callable[[], None] | None = None,
) -> DepthAccuracy:
    """Runs `model` (in eval mode, where it lies) on all `images` to depth `steps`.

    `bf16` runs it under autocast; `between_batches` is called before each batch and may raise.
    Raises ValueError for steps < 1 or no images.
    """
    if steps < 1 or not len(images):
        raise ValueError(f"steps is {steps} and there are {len(images)} images, expected at least 1 of each")
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    losses, predictions, halts = [], [], []
    try:
        for start in range(0, len(images), batch_size):
            if between_batches is not None:
                between_batches()
            part = slice(start, start + batch_size)
            pixels = torch.from_numpy(images.pixels[part]).to(device)
            labels = torch.from_numpy(images.labels[part]).to(device)
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                floats = pixels.to(torch.float32) / 255
                if isinstance(model, ViTRM):
                    logits, halt = model.trajectory(floats, steps)  # [S, B, classes], [S, B]
                else:
                    logits = model(floats)[None]
                    halt = logits.new_empty(0, len(labels))
            logits = logits.float()
            losses.append(torch.stack([F.cross_entropy(step, labels, reduction="none") for step in logits]))
            predictions.append(logits.argmax(-1))
            halts.append(halt.float())
    finally:
        model.train(training)
    predicted = torch.cat(predictions, 1).cpu().numpy()
    halt_prob = torch.cat(halts, 1).cpu().numpy()
    return DepthAccuracy(
        accuracy=[float(v) for v in (predicted == images.labels).mean(1)],
        loss=[float(v) for v in torch.cat(losses, 1).mean(1)],
        halt=[float(v) for v in halt_prob.mean(1)] if len(halt_prob) else [],
        predictions=predicted,
        halt_prob=halt_prob,
    )
