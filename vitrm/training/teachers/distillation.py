"""Knowledge distillation: the answers of a trained model as a second target beside the labels (Hinton et al., 2015).

    (1 − w) · CE(student, target) + w · T² · KL(softmax(teacher / T) ‖ softmax(student / T))

The teacher answers for the very images that the student sees, cropped and mixed as they are: so both look at one
function on the same points (Beyer et al., 2022).  A recursive teacher answers at the deepest step it was trained for,
unless told another: each of its steps costs about a third of one that the student learns from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrm.checkpoint import Checkpoint
from vitrm.errors import UserError


class TeacherTargets(NamedTuple):
    """A teacher's answer, and how much it counts."""

    logits: Tensor  # float32 [B, classes]
    weight: float  # w ∈ [0, 1]
    temperature: float  # T > 0


class Teacher:
    """A trained model that answers for a student's batches, on `device`, without gradient."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, steps: int = 0) -> None:
        self.model = checkpoint.build().to(device).requires_grad_(False)
        self.steps = steps or checkpoint.trained_depth or 1

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """images float [B, 3, H, W] in [0, 1] → logits, float32 [B, classes]."""
        if self.model.recursive:
            return self.model(images, self.steps).logits.float()
        return self.model(images).float()


def check_teacher(teacher: Checkpoint, classes: Sequence[str], image_size: int) -> None:
    """Raises `UserError` unless `teacher` answers for images of this size about these classes."""
    known = list(teacher.data.get("classes", []))
    if known != list(classes):
        raise UserError(
            f"the teacher {teacher.source} knows {len(known)} classes ({', '.join(known[:3])} …), the data has "
            f"{len(classes)} ({', '.join(list(classes)[:3])} …): name a teacher that was trained on the same classes"
        )
    if teacher.model.image_size != image_size:
        raise UserError(
            f"the teacher {teacher.source} takes images of {teacher.model.image_size} pixels, the student of "
            f"{image_size}: name a teacher of the same size, or change --image-size"
        )


def classification_loss(logits: Tensor, target: Tensor, targets: TeacherTargets | None) -> Tensor:
    """The equation above, a scalar: logits float [B, classes], target [B, classes]; without a teacher, CE alone."""
    loss = F.cross_entropy(logits, target)
    if targets is None:
        return loss
    t = targets.temperature
    return (1 - targets.weight) * loss + targets.weight * t * t * divergence(logits / t, targets.logits / t)


def divergence(logits: Tensor, teacher: Tensor) -> Tensor:
    """KL(softmax(teacher) ‖ softmax(logits)), the mean over a batch, a scalar; both float [B, classes]."""
    own, other = F.log_softmax(logits, dim=1), F.log_softmax(teacher, dim=1)
    return F.kl_div(own, other, reduction="batchmean", log_target=True)
