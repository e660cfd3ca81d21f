"""Training: from a model's config, a recipe and images to a run folder (vitrm.training.run_folder).

The order of the images, the augmentation and the dropout of a batch depend on (seed, epoch, batch)
alone, never on what ran before.  A run continued from its state, even in mid-epoch, thus computes what
the uninterrupted one would have; on a CPU bit for bit.

Validation selects the weights; the test images are looked at once, when the run has ended.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitrm import checkpoint
from vitrm.checkpoint import Checkpoint
from vitrm.classification.confusion import Classification, classify
from vitrm.config import ModelConfig
from vitrm.data import Splits
from vitrm.errors import UserError
from vitrm.fields import checked
from vitrm.recipe import Recipe
from vitrm.system.interrupt import Interruption
from vitrm.system.memory import OutOfMemory, shortage_explained
from vitrm.training.augmentation.augment import TrainingBatches
from vitrm.training.callbacks import Callback, all_closed
from vitrm.training.evaluate import DepthAccuracy, accuracy_by_depth
from vitrm.training.optimizers import learning_rate
from vitrm.training.parallel.compilation import compile_learner
from vitrm.training.parallel.device import Execution
from vitrm.training.parallel.distributed import World, losses_explained
from vitrm.training.progress import Reporter, Ticker
from vitrm.training.run_config import SEEDS
from vitrm.training.run_folder import state as training_state
from vitrm.training.run_folder.access import alone_in, take_over
from vitrm.training.run_folder.files import RunFiles
from vitrm.training.run_folder.state import STATE_FILE, RunProgress
from vitrm.training.start.memory import check_batch, fitting_batch
from vitrm.training.start.preparation import TeacherModel, fit_config, new_learner, origin_of, run_identity, start_from
from vitrm.training.supervision import BatchResult

TEST_DEPTH = 6  # the test accuracy is measured at the depths 1 … this, at least


@dataclass(frozen=True)
class TrainingResult:
    """The result of a finished run."""

    out: Path  # the run folder
    epochs: int  # epochs run
    best_epoch: int  # whose weights were kept, counted from 1
    validation_accuracy: float  # of the kept weights, in [0, 1]
    test_accuracy: list[float]  # of the kept weights at the depths 1, 2, …, in [0, 1]
    test_images: int
    training_images: list[int]  # of each class, by label
    by_class: Classification | None  # the test images at the trained depth; None for a run that had finished before
    history: list[dict[str, Any]]  # the lines of metrics.jsonl


# Called after each batch with the epoch and batch (from 0) and the losses of the batch's supervised steps.
OnBatch = Callable[[int, int, list[float]], None]


def train(
    model_config: ModelConfig,
    recipe: Recipe,
    data: Splits,
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    resume: bool = False,
    init: Checkpoint | None = None,
    teacher: TeacherModel | None = None,
    execution: Execution | None = None,
    reporter: Reporter | None = None,
    on_batch: OnBatch | None = None,
    callbacks: Sequence[Callback] = (),
    settings: dict[str, Any] | None = None,
    world: World | None = None,
) -> TrainingResult:
    """Trains a model into the folder `out`, or with `resume` continues the run in it.

    SIGINT and SIGTERM (in the main thread), and SIGHUP where it is not ignored, save the state before `KeyboardInterrupt`
    is raised.

    Args:
        model_config: the model; its classes, image size and normalization are taken from the data
        recipe: how it is trained
        data: the images, all of one size
        out: run folder, new or empty unless the run is resumed
        seed: of weights, order, augmentation and dropout
        resume: continue from the state in `out`, which must be of the same model, recipe, data, seed and teacher
        init: checkpoint of the same model whose weights a new run starts from, but for other classes' classifier
        teacher: trained model, or a network of torchvision, whose answers count as `recipe.distill_weight` says
        execution: device, precision and threads
        reporter: told how far the run is
        on_batch: called after each batch
        callbacks: told, in the main process, of the run's start, epochs and end (vitrm.training.callbacks)
        settings: JSON object that is kept in the state for the command that resumes the run
        world: the processes of the run, which all call this alike; the main one alone reads and writes `out`

    Returns:
        The accuracy of the kept weights, those of the best validation result, and the history.

    Raises:
        UserError: for a folder that holds something else or that another process trains into, a state of another run, a
            loss that is not finite, a full disk, or too little memory; what was saved before stays as it was
    """
    _check_start(recipe, seed, resume, init)
    out, world = Path(out), world or World()
    execution, settings = execution or Execution(), settings or {}
    reporter = reporter if reporter and world.main else Reporter()
    with torch.random.fork_rng(devices=[]), losses_explained(world), alone_in(out, world) as locked:
        world.broadcast(lambda: take_over(out, resume, locked, reporter.say))
        run = TrainingRun(
            model_config, recipe, data, out, seed, execution, reporter, on_batch, world, teacher, settings
        )
        told = list(callbacks) if world.main else []
        if init is not None:
            run.start_from(init)
        with run.reporter, all_closed(told):
            return run.run(resume, told)


def _check_start(recipe: Recipe, seed: int, resume: bool, init: Checkpoint | None) -> None:
    checked("seed", seed, SEEDS)
    if resume and init is not None:
        raise UserError("a run that is resumed goes on from its own weights: leave out --init")
    if recipe.freeze != "none" and init is None and not resume:
        raise UserError(
            f"freeze is {recipe.freeze!r}, which keeps weights that were learned before: name them with --init RUN"
        )


class TrainingRun:
    """One training run; `run` does it."""

    def __init__(
        self,
        model_config: ModelConfig,
        recipe: Recipe,
        data: Splits,
        out: Path,
        seed: int,
        execution: Execution,
        reporter: Reporter,
        on_batch: OnBatch | None,
        world: World,
        teacher: TeacherModel | None,
        settings: dict[str, Any],
    ) -> None:
        config = fit_config(model_config, data.train)
        self.recipe, self.data, self.out = recipe, data, out
        self.execution, self.reporter, self.on_batch, self.world = execution, reporter, on_batch, world
        self.device, self.bf16 = execution.resolve()
        self.batch_size = min(recipe.batch_size, len(data.train))
        if self.batch_size < world.size:
            raise UserError(
                f"a batch of {self.batch_size} images cannot be shared by {world.size} processes: start fewer, or raise "
                "--batch-size"
            )
        self.batches = len(data.train) // self.batch_size  # of an epoch
        check_batch(config, recipe, self.batch_size, self.device, self.bf16, world.size)
        part = world.part(self.batch_size)
        self.batch_share = (part.stop - part.start) / self.batch_size
        identity = run_identity(config, recipe, data.train, seed, teacher)
        self.files = RunFiles(out, data, identity, settings, seed, world.main)
        self.learner = new_learner(
            config,
            recipe,
            data.train,
            self.batch_size,
            seed=seed,
            device=self.device,
            bf16=self.bf16,
            world=world,
            teacher=teacher,
            say=reporter.say,
        )
        self.source = TrainingBatches(data.train, recipe, seed, self.batch_size, part)
        self.progress = RunProgress()
        self.resumed = False
        self.by_class: Classification | None = None
        self.unsaved: Checkpoint | None = None  # the best so far, where it is not written yet
        self.save_due = Ticker(execution.save_every)
        self.saving = 0.0  # seconds that the state took to save
        self.callbacks: Sequence[Callback] = ()

    def start_from(self, init: Checkpoint) -> None:
        """Takes over the weights of `init`.  Raises `UserError` if it is another model."""
        for note in start_from(self.learner, init, self.data.train.classes):
            self.reporter.say(f"note: {note}")
        self.files.identity["init"] = origin_of(init)

    def run(self, resume: bool, callbacks: Sequence[Callback] = ()) -> TrainingResult:
        """Trains from the start or from the state in the folder, measures the test accuracy, and says so."""
        if resume:
            self._resume()
        self.callbacks = callbacks
        for callback in callbacks:
            callback.on_start(self.out, self.files.identity, self.progress.history)
        if self.progress.test_accuracy is None:
            if self.progress.sums is None:
                self.progress.sums = torch.zeros(4, dtype=torch.float64, device=self.device)
            with Interruption(patient=self.world.size > 1) as self.interruption:
                self._train_and_test()
        best = self.progress.best
        assert best is not None
        assert self.progress.test_accuracy is not None
        result = TrainingResult(
            out=self.out,
            epochs=self.progress.epoch,
            best_epoch=best["epoch"],
            validation_accuracy=best["accuracy"],
            test_accuracy=self.progress.test_accuracy,
            test_images=len(self.data.test),
            training_images=np.bincount(self.data.train.labels, minlength=len(self.data.train.classes)).tolist(),
            by_class=self.by_class,
            history=self.progress.history,
        )
        for callback in callbacks:
            callback.on_end(result)
        return result

    def _resume(self) -> None:
        """Takes over the state in the folder, and says how far it is."""
        header, tensors = self.world.broadcast(self.files.read_state)
        if "init" in header["identity"]:
            self.files.identity["init"] = header["identity"]["init"]
        self.progress = training_state.restore(self.out / STATE_FILE, header, tensors, self.learner)
        self.resumed = True
        of_batch = self._go_on_with_batch_size(header["identity"]["recipe"].get("batch_size", self.recipe.batch_size))
        if not self.world.main and self.progress.sums is not None:
            self.progress.sums.zero_()  # the main process goes on with all that was saved
        done = self.progress.epoch, self.progress.batch
        reached = (
            "has finished" if self.progress.test_accuracy else f"goes on after {done[0]} epochs and {done[1]} batches"
        )
        note = training_state.note(header)
        self.reporter.say(f"the run in {self.out} {reached}{f'; {note}' if note else ''}")
        if of_batch:
            self.reporter.say(f"note: {of_batch}")

    def _go_on_with_batch_size(self, before: int) -> str:
        """Brings the progress to the recipe's batch size from `before`; returns what that means, "" where it is the same."""
        images = len(self.data.train)
        if self.progress.test_accuracy or min(before, images) == self.batch_size:
            return ""
        training_state.rebatched(self.progress, min(before, images), self.batch_size, images)
        return (
            f"from here on {self.batch_size} images a batch instead of {min(before, images)}: the images of an epoch, their order and the "
            f"learning rate ({self.recipe.lr:g} at its peak, by share of the epochs) stay, an epoch has {self.batches} updates; the result is "
            "that of neither batch size alone"
        )

    def _train_and_test(self) -> None:
        """Compiles, trains and tests; saves the state of a run that is interrupted."""
        # Compiled only now: restoring replaced weights, and a failed start should fail fast.
        if self.execution.compiles(self.device, self.world.size):
            if self.execution.compile is None:
                self.reporter.say(
                    "compiling the training step, which takes a minute or more; --no-compile leaves it out"
                )
            images = self.source.part.stop - self.source.part.start
            compile_learner(self.learner, self.learner.model.config.image_size, images, self.reporter.say)
        try:
            with shortage_explained(self._way_out):
                if not self.resumed:
                    self._save()
                self.files.write_metrics(self.progress.history)
                self._epochs()
                self._test()
        except OutOfMemory:
            if self._nothing_learned:
                self.files.remove_state()  # the same command with a smaller batch should not find a run in its way
            raise
        except KeyboardInterrupt:
            # Raised between batches, where the state is whole.
            if self.interruption.patient or self.interruption.asked == 1:
                self._save()
                raise KeyboardInterrupt(f"the state is saved, --resume continues {self.out}") from None
            raise

    def _save(self) -> None:
        """Writes the state, and before it the best weights that it tells of."""
        began = time.monotonic()
        if self.unsaved is not None:
            self.files.save_checkpoint(self.unsaved)
            self.unsaved = None
        self.files.save_state(self.learner, self.progress)
        self.saving = time.monotonic() - began
        self.save_due.reset()

    def _save_after_epoch(self) -> None:
        """Saves if it costs a hundredth of the time, or is due, or if this was the last epoch.

        Where an epoch takes a second, saving after each would take longer than what a kill could lose.
        """
        ended = self.progress.epoch == self.recipe.epochs or self._out_of_patience()
        due = self.save_due.elapsed >= min(100 * self.saving, self.execution.save_every)
        if self.world.any(self.world.main and (due or ended))[0]:
            self._save()

    def _stop_if_asked(self) -> None:
        """Raises KeyboardInterrupt, in all processes, if a signal has come to any."""
        if self.world.any(self.interruption.asked > 0)[0]:
            raise KeyboardInterrupt

    def _epochs(self) -> None:
        self.source.move_to(self.device)
        drawn, drawing = 0.0, 0.0  # when the picture was last drawn, and how long that took
        while self.progress.epoch < self.recipe.epochs and not self._out_of_patience():
            self._epoch()
            self._end_epoch()
            self._save_after_epoch()
            self.files.write_metrics(self.progress.history)
            # The picture may cost one per cent of the time, whatever the length of an epoch.
            if time.monotonic() - drawn > 100 * drawing:
                drawn = time.monotonic()
                self.files.draw_curves(self.progress.history, self._best_epoch)
                drawing = time.monotonic() - drawn
        self.files.draw_curves(self.progress.history, self._best_epoch)

    def _epoch(self) -> None:
        """Trains on what is left of the current epoch."""
        progress = self.progress
        assert progress.sums is not None
        report_due = Ticker(self.reporter.interval)
        before, started = progress.seconds, time.monotonic()
        self._stop_if_asked()
        for i in range(progress.batch, self.batches):
            result = self._train_step(i)
            progress.sums += _summary(result, self.batch_share)
            progress.batch = i + 1
            progress.seconds = before + time.monotonic() - started
            if self.on_batch is not None:
                self.on_batch(progress.epoch, i, [float(loss) for loss in result.losses])
            # What the processes do together they decide together.  On a GPU, reading a number waits for all work
            # queued: only where somebody looks at it.
            infinite, report, save, stop = self.world.any(
                self.device.type == "cpu" and not bool(progress.sums[0].isfinite()),
                self.world.main and report_due.due(),
                self.world.main and self.save_due.due(),
                self.interruption.asked > 0,
            )
            if infinite:
                self._check_finite()
            if report and i + 1 < self.batches:
                self._report()
            if save:
                self._save()
            if stop:
                raise KeyboardInterrupt

    def _train_step(self, i: int) -> BatchResult:
        """Learns from batch `i` of the current epoch."""
        epoch, recipe = self.progress.epoch, self.recipe
        with shortage_explained(self._way_out_of_batch):
            batch, rng = self.source.draw(epoch, i)
            done = (epoch * self.batches + i + 1) / (recipe.epochs * self.batches)
            free_steps = int(rng.integers(recipe.free_steps_at(done) + 1))
            torch.manual_seed((int(rng.integers(2**63)) + self.world.rank) % 2**63)  # of the dropout
            return self.learner.train_step(batch, learning_rate(recipe, done), free_steps, self.batch_share)

    def _end_epoch(self) -> None:
        """Validates, keeps the weights if they are the best so far, and opens the next epoch."""
        progress = self.progress
        self._check_finite()
        loss, right, halt, steps = self._means()
        validated = accuracy_by_depth(
            self.learner.ema.model,  # type: ignore[arg-type]
            self.data.validation,
            self._depth,
            bf16=self.bf16,
            between_batches=self._stop_if_asked,
            world=self.world,
        )
        line = {
            "epoch": progress.epoch + 1,
            "train_loss": loss,
            "train_accuracy": right,
            "validation_accuracy": validated.accuracy,
            "validation_loss": validated.loss,
            "validation_balanced_accuracy": validated.balanced,
            "halt": halt,
            "validation_halt": validated.halt,
            "steps": steps,
            "lr": learning_rate(self.recipe, (progress.epoch + 1) / self.recipe.epochs),
            "images_per_s": self.batches * self.batch_size / max(progress.seconds, 1e-9),
            "seconds": progress.seconds,
        }
        left = (self.recipe.epochs - progress.epoch - 1) * progress.seconds
        best = progress.best
        score, negative_loss = _score(validated, self.recipe.balance != "none")
        # States of earlier versions have no score: it was the accuracy.
        if best is None or (score, negative_loss) > (best.get("score", best["accuracy"]), -best["loss"]):
            accuracy = _mean(validated.accuracy)
            progress.best = {
                "epoch": progress.epoch + 1,
                "accuracy": accuracy,
                "score": score,
                "loss": -negative_loss,
            }
            self.unsaved = self.files.best_checkpoint(self.learner, progress)
        progress.history.append(line)
        progress.epoch += 1
        progress.batch, progress.seconds = 0, 0.0
        assert progress.sums is not None
        progress.sums.zero_()
        self.reporter.epoch(line, self.recipe.epochs, left)
        for callback in self.callbacks:
            callback.on_epoch(line)

    @property
    def _best_epoch(self) -> int | None:
        return self.progress.best["epoch"] if self.progress.best else None

    @property
    def _depth(self) -> int:
        """The deepest step that training supervises."""
        return self.recipe.trained_depth if self.learner.model.recursive else 1

    def _out_of_patience(self) -> bool:
        best = self.progress.best
        return bool(self.recipe.patience and best and self.progress.epoch - best["epoch"] >= self.recipe.patience)

    def _test(self) -> None:
        """Measures the kept weights on the test images, in float32, and writes that into the checkpoint."""
        kept = self.world.broadcast(lambda: checkpoint.load(self.out))
        tested = accuracy_by_depth(
            kept.build().to(self.device),
            self.data.test,
            max(TEST_DEPTH, self.recipe.trained_depth),
            between_batches=self._stop_if_asked,
            world=self.world,
        )
        self.files.add_test_result(kept, self.progress.epoch, tested)
        at = self._depth - 1
        test = self.data.test
        self.by_class = classify(test.labels, tested.predictions[at], test.classes, tested.in_top5[at])
        self.files.write_results(self.by_class, tested.predictions[at], tested.confidence[at])
        self.progress.test_accuracy = tested.accuracy
        self._save()

    def _means(self) -> tuple[float, float, float, float]:
        """Means of the epoch so far: loss, accuracy, halting probability, supervised steps per batch."""
        assert self.progress.sums is not None
        loss, right, halt, steps = self.world.all_reduce(self.progress.sums).tolist()
        batches = max(self.progress.batch, 1)
        return loss / batches, right / batches / self.batch_size, halt / batches, steps / batches

    def _check_finite(self) -> None:
        """Raises `UserError`, in all processes, for a loss that is NaN or infinite in any."""
        if not math.isfinite(self._means()[0]):
            raise UserError(
                f"the loss is not finite in epoch {self.progress.epoch + 1}, batch {self.progress.batch}: lower the "
                f"learning rate (--lr, now {self.recipe.lr:g}); the last good state is kept in {self.out}"
            )

    @property
    def _nothing_learned(self) -> bool:
        return not self.resumed and (self.progress.epoch, self.progress.batch) == (0, 0)

    def _way_out(self) -> str:
        """The way out of a shortage of memory."""
        if self._nothing_learned:
            return "free some, or train with fewer or smaller images (--limit-train, --image-size), or a smaller model"
        return "free some, and --resume goes on from the state saved last"

    def _way_out_of_batch(self) -> str:
        """The way out of a shortage of memory within a batch."""
        fitting = fitting_batch(self.learner.model.config, self.recipe, self.device, self.bf16, self.world.size)
        smaller = self.batch_size // 2
        if fitting:
            smaller = min(smaller, max(fitting, self.world.size))
        if smaller < self.world.size:
            return "even the smallest batch does not fit: choose a smaller model or --image-size"
        too_many = f"{self.batch_size} images a batch are too many"
        if self._nothing_learned:
            return f"{too_many}: try --batch-size {smaller}"
        return f"{too_many} now: --resume goes on from the state saved last where there is more memory, or with --batch-size {smaller}"

    def _report(self) -> None:
        self._check_finite()
        loss, right, _, _ = self._means()
        progress = self.progress
        done = progress.epoch + progress.batch / self.batches
        rate = progress.batch * self.batch_size / max(progress.seconds, 1e-9)
        left = (self.recipe.epochs - done) * self.batches * self.batch_size / rate
        self.reporter.batch(done, loss, right, rate, left, progress.epoch + 1)


def _summary(result: BatchResult, batch_share: float) -> Tensor:
    """A batch's contribution to `RunProgress.sums`, float64 [4]; `batch_share` is this process's share of its images."""
    loss = torch.stack(result.losses).mean().double()
    steps = torch.full_like(loss, len(result.losses))
    halt = result.halt.double()
    return torch.stack([batch_share * loss, result.correct.double(), batch_share * halt, batch_share * steps])


def _score(validated: DepthAccuracy, balanced: bool) -> tuple[float, float]:
    """The score that selection maximizes: the mean accuracy (or estimated balanced accuracy) over the trained depths; the loss decides ties.

    Small validation sets tie often, and the earliest of the best is then seldom the best of them.
    """
    return _mean(validated.estimated_balanced if balanced else validated.accuracy), -_mean(validated.loss)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
