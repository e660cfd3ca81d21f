"""One training batch: the loss of a step, and when the weights are updated.

    loss of a step = CE(logits, target) + halt_weight · BCE(halt, [argmax logits = label])

With a teacher, CE becomes what vitrm.training.teachers.distillation says.  `target` may be mixed (Mixup, CutMix); `label` is the un-mixed
one: halting learns whether the answer is right.

sequential (the paper): each step starts from the detached y, z of the one before, and ends with
    backward and an optimizer update: up to n_sup updates per batch, fewer once mean(halt) > τ.
joint: all n_sup steps are unrolled, their losses averaged (weighted by `step_weights`), and one
    update takes the gradient through all of them.  With `agreement_weight` w > 0 each step but the last also learns
    what the last one answers: w · KL(softmax(last) ‖ softmax(step)), without gradient through the last.

With `token_weight` w > 0 the classifier also answers from the image tokens alone, by the largest value of each feature:

    + w · CE(W_c max_i x_i + b_c, target)

That is a short way from the loss to the tokenizer, past attention that at first looks everywhere alike.  Nothing of it is
in the model: no parameter, no operation.

With `free_steps` r > 0 the supervised steps start at a random depth 0 … r, reached without gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrm.baselines.networks import Baseline
from vitrm.errors import UserError
from vitrm.model import Embedded, State, ViTRM
from vitrm.recipe import Recipe
from vitrm.training.augmentation.augment import Batch
from vitrm.training.ema import EMA
from vitrm.training.optimizers import make_optimizers
from vitrm.training.parallel.cpu_workers import Workers
from vitrm.training.parallel.distributed import World
from vitrm.training.parallel.replica import Gradients, Replica
from vitrm.training.teachers.distillation import TeacherTargets, classification_loss, divergence


@dataclass(frozen=True)
class BatchResult:
    """Losses and counts of a batch.  Tensors stay on the device: the caller chooses the moment to wait for them."""

    losses: list[Tensor]  # of each supervised step, scalars
    correct: Tensor  # images whose answer at the last supervised step is their un-mixed label, scalar
    halt: Tensor  # mean halting probability at the last supervised step, scalar; 0 for a baseline
    updates: int  # optimizer updates made


# What `ViTRM.state` makes a state of, detached: y, z, and with glimpses the next view's number.
Carried = tuple[Tensor, ...]


class BatchPart(NamedTuple):
    """A part of a batch that is computed at once: all of it, or a worker's."""

    batch: Batch
    targets: TeacherTargets | None
    state: Carried | None = None  # that the next step starts from; None: the initial one


class PartResult(NamedTuple):
    """Losses and counts of a part, and the state that was reached."""

    loss: Tensor  # scalar, with its graph
    losses: list[Tensor]  # of each supervised step, scalars
    correct: Tensor  # as in BatchResult
    halt: Tensor
    state: Carried | None = None


# Called with a function's name and the function; gives what is called in its place.
Compile = Callable[[str, Callable[..., Any]], Callable[..., Any]]


def not_compiled(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as it is."""
    return function


class StepFunctions:
    """A model (the learner's, or a worker's replica of it) and the functions of a training step, each passed through `compile`.

    ViTRM has `tokens`, `recur` and `supervise`, a baseline has `classify`.
    """

    tokens: Callable[[Tensor], Tensor]
    recur: Callable[[Embedded, State], State]
    supervise: Callable[[Tensor, Carried, Batch, TeacherTargets | None], PartResult]
    classify: Callable[[Tensor], Tensor]

    def __init__(self, model: ViTRM | Baseline, recipe: Recipe, compile: Compile = not_compiled) -> None:
        self.model = model
        if isinstance(model, ViTRM):
            self.tokens, self.recur = compile("tokens", model.tokens), compile("step", model.recur)
            weights = recipe.step_weights() if recipe.supervision == "joint" else [1.0]
            self.supervise = compile("supervise", partial(self._supervise, model, weights, recipe))
        else:
            self.classify = compile("classify", model.forward)

    def _supervise(
        self,
        model: ViTRM,
        weights: list[float],
        recipe: Recipe,
        x: Tensor,
        carried: Carried,
        batch: Batch,
        targets: TeacherTargets | None,
    ) -> PartResult:
        """The weighted mean loss of as many steps from `carried` as there are `weights`.

        x [B, N, D] are the tokens; of a model with glimpses, whose steps each see others, the images [B, 3, H, W].
        """
        state = model.state(*carried)
        seen, read = self.first_read(model, x)
        answers: list[tuple[Tensor, Tensor]] = []
        for _ in weights:
            if state.glimpse is not None:
                tokens, read, state = self.look(model, x, state)
                seen.append(tokens)
            state = self.recur(read, state)
            answers.append(model.head_logits(state.y))
        final = answers[-1][0].detach().float()
        losses: list[Tensor] = []
        total = torch.zeros((), device=x.device)
        for i, (weight, (logits, halt_logit)) in enumerate(zip(weights, answers, strict=True), 1):
            loss, right = step_loss(logits, halt_logit, batch.target, batch.label, recipe.halt_weight, targets)
            if recipe.agreement_weight and i < len(answers):
                loss = loss + recipe.agreement_weight * divergence(logits.float(), final)
            total = total + weight * loss
            losses.append(loss)
        total = total / len(losses)
        if recipe.token_weight:
            for tokens in seen:
                logits = model.classifier(tokens.amax(1)).float()
                total = total + recipe.token_weight / len(seen) * classification_loss(logits, batch.target, targets)
        halt = halt_logit.detach().float().sigmoid().mean()
        return PartResult(total, losses, right.sum(), halt, tuple(t.detach() for t in state.carried))

    def seen_first(self, model: ViTRM, images: Tensor) -> Tensor:
        """The tokens of images, which all steps see; with glimpses the images, of which each step takes its own."""
        return self.tokens(images) if model.glimpses is None else images

    def first_read(self, model: ViTRM, x: Tensor) -> tuple[list[Tensor], Embedded]:
        """The tokens that all steps see, and what they read of them; neither with glimpses, where x are images."""
        return ([x], model.read(x)) if model.glimpses is None else ([], ())

    def look(self, model: ViTRM, images: Tensor, state: State) -> tuple[Tensor, Embedded, State]:
        """The tokens that the next step of a model with glimpses sees, what it reads of them, and the state that knows the view after it."""
        assert model.glimpses is not None
        assert state.glimpse is not None
        tokens = self.tokens(model.glimpses(images, state.glimpse))
        return tokens, model.read(tokens), state._replace(glimpse=model.glimpses.after(state.glimpse))


def step_loss(
    logits: Tensor,
    halt_logit: Tensor | None,
    target: Tensor,
    label: Tensor,
    halt_weight: float,
    targets: TeacherTargets | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss of one step (scalar) and which answers are right (bool [B]).

    logits [B, classes] and halt_logit [B] (None: no halting) of any float type; target [B, classes]; label [B];
    `targets` are a teacher's for the same images.
    """
    logits = logits.float()
    right = logits.argmax(1) == label
    loss = classification_loss(logits, target, targets)
    if halt_logit is not None:
        loss = loss + halt_weight * F.binary_cross_entropy_with_logits(halt_logit.float(), right.float())
    return loss, right


def freeze(model: ViTRM | Baseline, part: str) -> nn.Module | None:
    """Keeps a part of `model` (a name of the recipe's `freeze`) as it is: weights, and batch norm's statistics.

    Returns the part, which must stay in eval mode; None for "none".  Raises `UserError` for a model without that part.
    """
    if part == "none":
        return None
    frozen = getattr(model, part, None)
    if not isinstance(frozen, nn.Module):
        raise UserError(f"freeze is {part!r}, but a {model.config.kind} has no {part}: leave out --freeze")
    frozen.requires_grad_(False)
    return frozen.eval()


class Learner:
    """A model, its optimizers and its averaged weights; `train_step` learns from one batch, and from `teacher`.

    With `workers` (in one process, on a CPU, for a model without dropout) the cores divide a batch among them: see
    vitrm.training.parallel.cpu_workers.
    """

    def __init__(
        self,
        model: ViTRM | Baseline,
        recipe: Recipe,
        device: torch.device,
        bf16: bool,
        world: World | None = None,
        teacher: Callable[[Tensor], Tensor] | None = None,
        workers: Workers | None = None,
        replicated: bool | None = None,
    ) -> None:
        """`replicated`: a replica of the model learns in its place, as workers' do (None: on a GPU, in one process)."""
        self.model = model
        self.world = world or World()
        self.teacher = teacher
        self.recipe = recipe
        self.device = device
        self.bf16 = bf16
        self.ema = EMA(model, recipe.ema_decay)
        self.frozen = freeze(model, recipe.freeze)
        self.updates = 0  # optimizer updates made so far
        self.optimizers = make_optimizers(model, recipe, workers)
        # y₀ and z₀ take no part behind free steps, nor in any sequential step but the first.
        joint = recipe.supervision == "joint" and not recipe.free_steps
        self.forward = self.world.parallel(model, unused=isinstance(model, ViTRM) and not joint)
        self.batch_share = 1.0  # of the whole batch, that this process has
        self.workers = workers
        if replicated is None:
            replicated = device.type == "cuda" and self.world.size == 1
        copies = workers.count if workers else int(replicated)
        self.replicas = [Replica(model, bf16, workers) for _ in range(copies)]
        for replica in self.replicas:
            freeze(replica.model, recipe.freeze)
        # One for each part of a batch that is computed at once.
        self.functions = [StepFunctions(net, recipe) for net in [replica.model for replica in self.replicas] or [model]]

    def autocast(self) -> torch.autocast:
        """The context of every forward pass.  One per pass: its cache of cast weights must not outlive an update."""
        cached = self.workers is None  # see vitrm.training.parallel.cpu_workers
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=cached)

    def to_train_mode(self) -> None:
        """Puts the model into train mode, but for what is frozen: its batch norms would go on with their statistics."""
        self.model.train()
        if self.frozen is not None:
            self.frozen.eval()

    def train_step(self, batch: Batch, lr: float, free_steps: int = 0, batch_share: float = 1.0) -> BatchResult:
        """Trains on one batch.

        Args:
            batch: in several processes, this one's part of the batch, of which the result is, too
            lr: learning rate
            free_steps: steps without gradient before the supervised ones
            batch_share: share of the whole batch that `batch` is
        """
        self.batch_share = batch_share
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_share"]
        self.to_train_mode()
        whole = BatchPart(batch, self.teacher_targets(batch.images))
        if isinstance(self.model, ViTRM) and self.recipe.supervision == "sequential":
            return self._sequential(whole, free_steps)
        result, _ = self._update_from(self._parts(whole), free_steps)
        return BatchResult(result.losses, result.correct, result.halt, 1)

    def _sequential(self, whole: BatchPart, free_steps: int) -> BatchResult:
        losses: list[Tensor] = []
        parts = self._parts(whole)
        for i in range(self.recipe.n_sup):
            result, states = self._update_from(parts, free_steps)
            parts = [part._replace(state=state) for part, state in zip(parts, states, strict=True)]
            losses += result.losses
            # The comparison waits for the device; after the last step there is nothing to decide.
            if i + 1 < self.recipe.n_sup and self._mean_over_processes(result.halt) > self.recipe.halt_threshold:
                break
        return BatchResult(losses, result.correct, result.halt, len(losses))

    def _mean_over_processes(self, value: Tensor) -> Tensor:
        """The mean over the whole batch of what is `value` for this process's part."""
        return self.world.all_reduce(self.batch_share * value)

    def compute(self, net: StepFunctions, part: BatchPart, free_steps: int = 0) -> PartResult:
        """The forward pass of one update through a part of a batch."""
        batch, targets, state = part
        with self.autocast():
            if not isinstance(net.model, ViTRM):
                logits = net.classify(batch.images)
                loss, right = step_loss(logits, None, batch.target, batch.label, 0.0, targets)
                return PartResult(loss, [loss.detach()], right.sum(), loss.new_zeros(()))
            # Sequential steps compute the tokens anew: the update just made has changed what they are.
            x = net.seen_first(net.model, batch.images)
        if state is None:
            state = net.model.y0.expand(len(x), -1, -1), net.model.z0.expand(len(x), -1, -1)
            if free_steps:
                with torch.no_grad(), self.autocast():
                    (_, read), free = net.first_read(net.model, x), net.model.state(*state)
                    for _ in range(free_steps):
                        if free.glimpse is not None:
                            _, read, free = net.look(net.model, x, free)
                        free = net.recur(read, free)
                state = free.carried
        with self.autocast():
            result = net.supervise(x, state, batch, targets)
        # Not within: of a single step the total is the same tensor, and a compiler that returns it once would detach both.
        return result._replace(losses=[loss.detach() for loss in result.losses])

    def teacher_targets(self, images: Tensor) -> TeacherTargets | None:
        """The teacher's answer for `images`; None without a teacher."""
        if self.teacher is None:
            return None
        with self.autocast():
            return TeacherTargets(self.teacher(images), self.recipe.distill_weight, self.recipe.distill_temperature)

    def _parts(self, whole: BatchPart) -> list[BatchPart]:
        """Each worker's part of a batch; without workers, all of it as one."""
        if self.workers is None:
            return [whole]
        images = len(whole.batch.images)
        slices = [self.workers.part(worker, images) for worker in range(self.workers.count)]
        targets = whole.targets
        return [
            BatchPart(
                Batch(*(tensor[rows] for tensor in whole.batch)),
                None if targets is None else targets._replace(logits=targets.logits[rows]),
            )
            for rows in slices
        ]

    def _update_from(self, parts: list[BatchPart], free_steps: int) -> tuple[PartResult, list[Carried | None]]:
        """Goes forward and backward through all parts and updates the weights; gives the results as one, and each part's state."""
        if self.workers is not None:
            return self._update_in_workers(self.workers, parts, free_steps)
        if self.replicas:
            return self._update_in_replica(self.replicas[0], parts[0], free_steps)
        self.model.zero_grad(set_to_none=True)
        result = self.forward(lambda: self.compute(self.functions[0], parts[0], free_steps))
        # The processes' gradients are averaged; their parts of the batch may differ in size.
        (result.loss * (self.batch_share * self.world.size)).backward()
        if self.recipe.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self._update()
        return result, [result.state]

    def _update_in_replica(
        self, replica: Replica[ViTRM | Baseline], part: BatchPart, free_steps: int
    ) -> tuple[PartResult, list[Carried | None]]:
        replica.refresh()
        result = self.compute(self.functions[0], part, free_steps)
        self._update_by(replica.gradients(result.loss))
        return result, [result.state]

    def _update_in_workers(
        self, workers: Workers, parts: list[BatchPart], free_steps: int
    ) -> tuple[PartResult, list[Carried | None]]:
        images = sum(len(part.batch.images) for part in parts)
        shares = [len(part.batch.images) / images for part in parts]

        def in_worker(worker: int) -> tuple[PartResult, Gradients]:
            replica = self.replicas[worker]
            replica.refresh()
            result = self.compute(self.functions[worker], parts[worker], free_steps)
            return result, replica.gradients(result.loss * shares[worker])

        results = workers.map(in_worker)
        total = results[0][1]
        for _, others in results[1:]:
            total.all.add_(others.all)
        self._update_by(total)
        return _combined([result for result, _ in results], shares), [result.state for result, _ in results]

    def _update_by(self, gradients: Gradients) -> None:
        if self.recipe.clip_norm:  # as clip_grad_norm_ does
            gradients.all.mul_((self.recipe.clip_norm / (gradients.all.norm() + 1e-6)).clamp(max=1.0))
        learned = [p for p in self.model.parameters() if p.requires_grad]
        for parameter, gradient in zip(learned, gradients.each, strict=True):
            parameter.grad = gradient
        self._update()

    def _update(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
        self.ema.update(self.model, self.updates)
        self.updates += 1


def _combined(results: list[PartResult], shares: list[float]) -> PartResult:
    """Combines the results of the parts of a batch, each its share of the images, into one."""

    def mean(values: list[Tensor]) -> Tensor:
        return torch.stack([value * share for value, share in zip(values, shares, strict=True)]).sum(0)

    return PartResult(
        mean([r.loss.detach() for r in results]),
        [mean(list(losses)) for losses in zip(*(r.losses for r in results), strict=True)],
        torch.stack([r.correct for r in results]).sum(0),
        mean([r.halt for r in results]),
    )
