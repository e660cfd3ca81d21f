"""One training batch: the loss of a step, and when the weights are updated.

    loss of a step = CE(logits, target) + halt_weight · BCE(halt, [argmax logits = label])

With a teacher, CE becomes what vitrm.distillation says.  `target` may be mixed (Mixup, CutMix); `label` is the un-mixed
one: halting learns whether the answer is right.

sequential (the paper): each step starts from the detached y, z of the one before, and ends with
    backward and an optimizer update: up to n_sup updates per batch, fewer once mean(halt) > τ.
joint: all n_sup steps are unrolled, their losses averaged (weighted by `step_weights`), and one
    update takes the gradient through all of them.

With `free_steps` r > 0 the supervised steps start at a random depth 0 … r, reached without gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrm.augment import Batch
from vitrm.baselines import Baseline
from vitrm.distillation import Taught, Teacher, classification_loss
from vitrm.distributed import World
from vitrm.ema import EMA
from vitrm.model import Embedded, State, ViTRM
from vitrm.recipe import Recipe


@dataclass(frozen=True)
class BatchResult:
    """What a batch did.  Tensors stay on the device, so reading them is the caller's choice of a moment to wait."""

    losses: list[Tensor]  # of each supervised step, scalars
    correct: Tensor  # images whose answer at the last supervised step is their un-mixed label, scalar
    halt: Tensor  # mean halting probability at the last supervised step, scalar; 0 for a baseline
    updates: int  # optimizer updates made


def step_loss(
    logits: Tensor,
    halt_logit: Tensor | None,
    target: Tensor,
    label: Tensor,
    halt_weight: float,
    taught: Taught | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss of one step (scalar) and which answers are right (bool [B]).

    logits [B, classes] and halt_logit [B] (None: no halting) of any float type; target [B, classes]; label [B];
    `taught` is a teacher's answer for the same images.
    """
    logits = logits.float()
    right = logits.argmax(1) == label
    loss = classification_loss(logits, target, taught)
    if halt_logit is not None:
        loss = loss + halt_weight * F.binary_cross_entropy_with_logits(halt_logit.float(), right.float())
    return loss, right


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, object]]:
    """AdamW's groups: decayed are matrices and convolutions; see vitrm.recipe for the reason."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        level = parameter.ndim < 2 or name.rpartition(".")[2] in ("pos", "y0", "z0", "cls")
        (decayed if recipe.decay_all or not level else plain).append(parameter)
    groups = [(decayed, recipe.weight_decay), (plain, 0.0)]
    return [{"params": parameters, "weight_decay": decay} for parameters, decay in groups if parameters]


class Learner:
    """A model, its optimizer and its averaged weights; `batch` is one training batch, with what `teacher` says of it."""

    def __init__(
        self,
        model: ViTRM | Baseline,
        recipe: Recipe,
        device: torch.device,
        bf16: bool,
        world: World | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        self.model = model
        self.world = world or World()
        self.teacher = teacher
        self.recipe = recipe
        self.device = device
        self.bf16 = bf16
        self.ema = EMA(model, recipe.ema_decay)
        self.updates = 0  # optimizer updates made so far
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, recipe), lr=recipe.lr, betas=(recipe.beta1, recipe.beta2), fused=True
        )
        # Replaced by their compiled forms in vitrm.execution.
        self.embed: Callable[[Tensor], Embedded]
        self.step: Callable[[Embedded, State], State]
        self.classify: Callable[[Tensor], Tensor]
        if isinstance(model, ViTRM):
            self.embed, self.step = model.embed, model.step
        else:
            self.classify = model.forward
        # y₀ and z₀ take no part behind free steps, nor in any sequential step but the first.
        joint = recipe.supervision == "joint" and not recipe.free_steps
        self.forward = self.world.parallel(model, unused=isinstance(model, ViTRM) and not joint)
        self.share = 1.0

    def autocast(self) -> torch.autocast:
        """The context of every forward pass.  One per pass: its cache of cast weights must not outlive an update."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def batch(self, batch: Batch, lr: float, free_steps: int = 0, share: float = 1.0) -> BatchResult:
        """Trains on one batch at learning rate `lr`, after `free_steps` steps without gradient.

        In several processes `batch` is this one's part, the share `share` of the whole batch, and so is the result.
        """
        self.share = share
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.train()
        taught = self._ask(batch.images)
        if not isinstance(self.model, ViTRM):
            return self._baseline(batch, taught)
        return (self._joint if self.recipe.supervision == "joint" else self._sequential)(batch, taught, free_steps)

    def _baseline(self, batch: Batch, taught: Taught | None) -> BatchResult:
        def compute() -> tuple[Tensor, Tensor]:
            with self.autocast():
                logits = self.classify(batch.images)
            return step_loss(logits, None, batch.target, batch.label, 0.0, taught)

        loss, right = self.forward(compute)
        self._update(loss)
        return BatchResult([loss.detach()], right.sum(), loss.new_zeros(()), 1)

    def _sequential(self, batch: Batch, taught: Taught | None, free_steps: int) -> BatchResult:
        losses: list[Tensor] = []
        state = self._start(batch.images, free_steps)

        def compute() -> tuple[Tensor, Tensor, State, Tensor]:
            with self.autocast():
                # The tokens are computed anew: the update just made has changed what they are.
                reached = self.step(self.embed(batch.images), state)
                logits, halt_logit = self._heads(reached.y)
            loss, right = step_loss(logits, halt_logit, batch.target, batch.label, self.recipe.halt_weight, taught)
            return loss, right, State(reached.y.detach(), reached.z.detach()), halt_logit.detach()

        for i in range(self.recipe.n_sup):
            loss, right, state, halt_logit = self.forward(compute)
            self._update(loss)
            losses.append(loss.detach())
            halt = halt_logit.float().sigmoid().mean()
            # The comparison waits for the device; after the last step there is nothing to decide.
            if i + 1 < self.recipe.n_sup and self.world.total(self.share * halt) > self.recipe.halt_threshold:
                break
        return BatchResult(losses, right.sum(), halt, len(losses))

    def _joint(self, batch: Batch, taught: Taught | None, free_steps: int) -> BatchResult:
        losses: list[Tensor] = []

        def compute() -> tuple[Tensor, Tensor, Tensor]:
            total = torch.zeros((), device=self.device)
            with self.autocast():
                embedded = self.embed(batch.images)
            state = self._start(batch.images, free_steps, embedded)
            with self.autocast():
                for weight in self.recipe.step_weights():
                    state = self.step(embedded, state)
                    logits, halt_logit = self._heads(state.y)
                    loss, right = step_loss(
                        logits, halt_logit, batch.target, batch.label, self.recipe.halt_weight, taught
                    )
                    total = total + weight * loss
                    losses.append(loss.detach())
            return total / len(losses), right, halt_logit.detach()

        loss, right, halt_logit = self.forward(compute)
        self._update(loss)
        return BatchResult(losses, right.sum(), halt_logit.float().sigmoid().mean(), 1)

    def _ask(self, images: Tensor) -> Taught | None:
        """What the teacher says of `images`; None without a teacher."""
        if self.teacher is None:
            return None
        with self.autocast():
            return Taught(self.teacher(images), self.recipe.distill_weight, self.recipe.distill_temperature)

    def _start(self, images: Tensor, free_steps: int, embedded: Embedded | None = None) -> State:
        """The state that the supervised steps start from: the initial one, or what it is `free_steps` later."""
        assert isinstance(self.model, ViTRM)
        state = self.model.initial_state(len(images))
        if free_steps:
            with torch.no_grad(), self.autocast():
                embedded = self.embed(images) if embedded is None else embedded
                for _ in range(free_steps):
                    state = self.step(embedded, state)
        return state

    def _heads(self, y: Tensor) -> tuple[Tensor, Tensor]:
        assert isinstance(self.model, ViTRM)
        return self.model.head_logits(y)

    def _update(self, loss: Tensor) -> None:
        if self.share != 1.0:
            # The processes' gradients are averaged; their parts of the batch may differ in size.
            loss = loss * (self.share * self.world.size)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.recipe.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self.optimizer.step()
        self.ema.update(self.model, self.updates)
        self.updates += 1
