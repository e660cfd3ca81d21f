"""Accuracy of a model at every depth: one run of the recursion, read after each step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vitrm.baselines.networks import Baseline
from vitrm.classification.confusion import classify
from vitrm.data import Images
from vitrm.exact_float32 import exact_float32
from vitrm.model import ViTRM
from vitrm.training.parallel.distributed import World
from vitrm.training.upload import upload

_BATCH = 256  # images computed at once, at most
_VALUES = 1 << 26  # in the largest tensor of a batch: large images come in smaller ones


@dataclass(frozen=True)
class DepthAccuracy:
    """A model on a set of n images at the depths 1 … S; a baseline has the one depth 1 and no halting."""

    accuracy: list[float]  # share of right answers in [0, 1], per depth
    loss: list[float]  # mean cross-entropy in nats, per depth
    halt: list[float]  # mean halting probability, per depth; empty for a baseline
    balanced: list[float]  # mean recall of the classes in [0, 1], per depth: each counts the same, however rare
    estimated_balanced: list[float]  # the same with what is not known of rare classes, per depth: to choose weights by
    predictions: NDArray[np.int64]  # [S, n]
    confidence: NDArray[np.float32]  # [S, n]: the probability of the answer
    in_top5: NDArray[np.bool_]  # [S, n]: whether the label is among the five likeliest
    halt_prob: NDArray[np.float32]  # [S, n]; [0, n] for a baseline


def accuracy_by_depth(
    model: ViTRM | Baseline,
    images: Images,
    steps: int,
    *,
    batch_size: int | None = None,
    bf16: bool = False,
    between_batches: Callable[[], None] | None = None,
    world: World | None = None,
) -> DepthAccuracy:
    """Runs `model` (in eval mode, where it lies) on all `images` to depth `steps`.

    `bf16` runs it under autocast; `between_batches` is called before each batch and may raise.  The processes of
    `world` take turns with the batches, and each gets the whole result.
    Raises ValueError for steps < 1 or no images.
    """
    if steps < 1 or not len(images):
        raise ValueError(f"steps is {steps} and there are {len(images)} images, expected at least 1 of each")
    device = next(model.parameters()).device
    training = model.training
    world = world or World()
    model.eval()
    measured: list[tuple[Tensor, ...]] = []  # of this process's batches: loss, answer, halt_prob, confidence, in_top5
    batch_size = batch_size or max(1, min(_BATCH, _VALUES // model.config.activation))
    starts = range(0, len(images), batch_size)
    try:
        for turn in range(0, len(starts), world.size):
            if between_batches is not None:
                between_batches()
            if turn + world.rank >= len(starts):
                break
            start = starts[turn + world.rank]
            part = slice(start, start + batch_size)
            pixels, labels = upload(images.pixels[part], device), upload(images.labels[part], device)
            measured.append(_measured(model, pixels, labels, steps, bf16))
    finally:
        model.train(training)
    of_all = world.all_gather([[t.cpu().numpy() for t in batch] for batch in measured])
    in_order = [of_all[i % world.size][i // world.size] for i in range(len(starts))]
    loss, predicted, halt_prob, confidence, in_top5 = (
        np.concatenate(parts, 1) for parts in zip(*in_order, strict=True)
    )
    by_class = [classify(images.labels, answers, images.classes) for answers in predicted]
    return DepthAccuracy(
        accuracy=[float(v) for v in (predicted == images.labels).mean(1)],
        loss=[float(v) for v in loss.mean(1, dtype=np.float64)],
        halt=[float(v) for v in halt_prob.mean(1)] if len(halt_prob) else [],
        balanced=[found.balanced_accuracy for found in by_class],
        estimated_balanced=[found.estimated_balanced_accuracy for found in by_class],
        predictions=predicted,
        confidence=confidence,
        in_top5=in_top5,
        halt_prob=halt_prob,
    )


def _measured(model: ViTRM | Baseline, pixels: Tensor, labels: Tensor, steps: int, bf16: bool) -> tuple[Tensor, ...]:
    """Loss, answer, halt_prob, confidence and whether the label is among the likeliest five, each [S, B]."""
    # Training may use TF32; an accuracy in float32 is one of float32.
    with torch.no_grad(), exact_float32(), torch.autocast(pixels.device.type, torch.bfloat16, enabled=bf16):
        floats = pixels.to(torch.float32) / 255
        if isinstance(model, ViTRM):
            logits, halt = model.trajectory(floats, steps)  # [S, B, classes], [S, B]
        else:
            logits = model(floats)[None]
            halt = logits.new_empty(0, len(labels))
    logits = logits.float()
    losses = torch.stack([F.cross_entropy(step, labels, reduction="none") for step in logits])
    likeliest = logits.topk(min(5, logits.shape[-1])).indices
    among = (likeliest == labels[None, :, None]).any(-1)
    return losses, logits.argmax(-1), halt.float(), logits.softmax(-1).amax(-1), among
