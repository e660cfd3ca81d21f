"""Training: from a model's config, a recipe and images to a run folder.

    config.json, model.safetensors   the checkpoint: averaged weights of the best validation result
    metrics.jsonl, curve.png         one line per epoch, and its picture
    state.safetensors                what --resume continues from

The order of the images, the augmentation and the dropout of a batch depend on (seed, epoch, batch)
alone, never on what ran before.  A run continued from its state, even in mid-epoch, thus computes what
the uninterrupted one would have; on a CPU bit for bit.

Validation selects the weights; the test images are looked at once, when the run has ended.

While it runs, the folder has a file .lock that the (main) process holds: a second run into it is refused.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitrm import __version__, checkpoint
from vitrm.airbench import Whitening
from vitrm.checkpoint import Checkpoint
from vitrm.config import ModelConfig, to_dict
from vitrm.data import DATASETS, Images, normalization
from vitrm.errors import UserError
from vitrm.fields import checked, shown
from vitrm.model import WhitenedTokenizer
from vitrm.system.files import is_leftover, remove_leftovers, write_text
from vitrm.system.interrupt import Interruption
from vitrm.system.locks import Lock, check_free, lock
from vitrm.system.memory import OutOfMemory, shortage_explained
from vitrm.training import curves
from vitrm.training import state as training_state
from vitrm.training.augment import augment
from vitrm.training.distillation import Teacher, check_teacher
from vitrm.training.evaluate import DepthAccuracy, accuracy_by_depth
from vitrm.training.parallel.device import Execution, compile_learner, workers_for
from vitrm.training.parallel.distributed import World, losses_explained
from vitrm.training.progress import Reporter, Ticker
from vitrm.training.recipe import Recipe
from vitrm.training.run_config import SEEDS
from vitrm.training.state import STATE_FILE, Progress
from vitrm.training.supervision import BatchResult, Learner

LOCK_FILE = ".lock"
METRICS_FILE = "metrics.jsonl"
CURVE_FILE = "curve.png"
CLASSIFIERS = (
    "classifier.",
    "net.fc.",
    "net.head.",
    "net.classifier.",
)  # layers that know classes, in all kinds of models
_OTHER_OUT = "wait for it, stop it, or name another folder with --out"
WHITENING_IMAGES = 5000  # that filters which whiten are computed from
TEST_DEPTH = 6  # the test accuracy is measured at the depths 1 … this, at least


@dataclass(frozen=True)
class Splits:
    """The three parts of a data set, of one image size."""

    train: Images
    validation: Images
    test: Images


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run found."""

    out: Path  # the run folder
    epochs: int  # epochs run
    best_epoch: int  # whose weights were kept, counted from 1
    validation_accuracy: float  # of the kept weights, in [0, 1]
    test_accuracy: list[float]  # of the kept weights at the depths 1, 2, …, in [0, 1]
    test_images: int
    history: list[dict[str, Any]]  # the lines of metrics.jsonl


# Called after each batch with the epoch and batch (from 0) and the losses of the batch's supervised steps.
OnBatch = Callable[[int, int, list[float]], None]


def fit_config(config: ModelConfig, images: Images) -> ModelConfig:
    """`config` with the classes, image size and normalization of `images`."""
    norm = normalization(images)
    return dataclasses.replace(
        config, classes=len(images.classes), image_size=images.pixels.shape[-1], mean=norm.mean, std=norm.std
    )


def train(
    model_config: ModelConfig,
    recipe: Recipe,
    data: Splits,
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    resume: bool = False,
    init: Checkpoint | None = None,
    teacher: Checkpoint | None = None,
    execution: Execution | None = None,
    reporter: Reporter | None = None,
    on_batch: OnBatch | None = None,
    settings: dict[str, Any] | None = None,
    world: World | None = None,
) -> TrainingResult:
    """Trains a model into the folder `out`, or with `resume` continues the run in it.

    `model_config` takes its classes, image size and normalization from the data.  A new run starts from the weights of
    `init`, where one is given: a checkpoint of the same model, on any data (its classifier is left out for other
    classes).  `teacher` is a trained model whose answers count as `recipe.distill_weight` says; a run
    that is resumed needs the same one.  `settings` is any JSON
    object, kept in the state for the command that resumes the run.  In several processes (`world`) all of them call this
    with the same arguments; the main one alone reads and writes `out`.  SIGINT and SIGTERM
    (in the main thread), and SIGHUP where it is not ignored, save the state before `KeyboardInterrupt` is raised.
    Raises `UserError` for a folder that holds something else or that another process trains into, a state of another
    run, a loss that is not finite, a full disk, or too little memory; what was saved before stays as it was.
    """
    checked("seed", seed, SEEDS)
    out, world = Path(out), world or World()
    if resume and init is not None:
        raise UserError("a run that is resumed goes on from its own weights: leave out --init")
    reporter = reporter or Reporter()
    with torch.random.fork_rng(devices=[]), losses_explained(world), alone_in(out, world) as locked:
        world.shared(lambda: _take_over(out, resume, locked, reporter.say))
        run = Run(model_config, recipe, data, out, seed, execution or Execution(), reporter, on_batch, world, teacher)
        run.settings = settings or {}
        if init is not None:
            run.start_from(init)
        with run.reporter:
            return run.run(resume)


def limited(images: Images, count: int) -> Images:
    """`count` of `images`, drawn from all classes: the same ones every time.  Raises `UserError` for too few or many."""
    if not 2 <= count <= len(images):
        raise UserError(f"limit_train is {count}, expected 2 … {len(images)}, the number of training images")
    return images.take(np.sort(np.random.default_rng(0).permutation(len(images))[:count]))


@contextmanager
def alone_in(out: Path, world: World) -> Iterator[Lock]:
    """A context in which no other process trains into the folder `out`, which the main process locks for all.

    Raises `UserError` where another process does.
    """
    with ExitStack() as stack:

        def enter() -> Lock:
            _check_no_file(out)
            return stack.enter_context(lock(out / LOCK_FILE, str(out), _OTHER_OUT))

        yield world.shared(enter)


def check_not_in_use(out: Path) -> None:
    """Raises `UserError` if another process trains into `out` at this moment."""
    check_free(out / LOCK_FILE, str(out), _OTHER_OUT)


def _take_over(out: Path, resume: bool, locked: Lock, say: Callable[[str], None]) -> None:
    """Checks the folder, now that it is this process's, and clears away what a killed one left."""
    if not locked.held:
        say(f"note: the file system of {out} has no locks: nothing keeps another process from training into it, too")
    if locked.lost is not None:
        say(
            f"note: {out} was not given back by {locked.lost}: make sure that it has ended, as this file system may keep "
            "locks to each machine"
        )
    check_folder(out, resume)
    remove_leftovers(out)


def check_folder(out: Path, resume: bool) -> None:
    """Raises `UserError` unless a run may be started (or, with `resume`, continued) in `out`."""
    _check_no_file(out)
    if resume:
        training_state.read_header(out / STATE_FILE)
    elif (out / STATE_FILE).exists() or (out / checkpoint.CONFIG_FILE).exists():
        raise UserError(f"{out} already holds a run: continue it with --resume, or name another folder with --out")
    elif out.exists() and any(p.name != LOCK_FILE and not is_leftover(p.name) for p in out.iterdir()):
        raise UserError(f"{out} is not empty and holds no run: name another folder with --out")


def _check_no_file(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, expected a folder for the run: name another --out")


class Run:
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
        teacher: Checkpoint | None,
    ) -> None:
        self.config = fit_config(model_config, data.train)
        self.recipe, self.data, self.out, self.seed = recipe, data, out, seed
        self.execution, self.on_batch, self.world = execution, on_batch, world
        self.reporter = reporter if world.main else Reporter()
        self.device, self.bf16 = execution.resolve()
        self.batch_size = min(recipe.batch_size, len(data.train))
        self.batches = len(data.train) // self.batch_size
        if self.batch_size < world.size:
            raise UserError(
                f"a batch of {self.batch_size} images cannot be shared by {world.size} processes: start fewer, or raise "
                "--batch-size"
            )
        self.part = world.part(self.batch_size)
        self.share = (self.part.stop - self.part.start) / self.batch_size
        self.flip = recipe.flips(data.train.name)
        self._mirrored = (
            np.random.default_rng(seed).random(len(data.train)) < 0.5
        )  # in the first epoch, where epochs alternate
        self.identity: dict[str, Any] = {
            "model": to_dict(self.config),
            "recipe": dataclasses.asdict(recipe),
            # A folder of images may lie elsewhere when the run goes on; its id says that it is the same.
            "data": {
                "name": data.train.name if data.train.name in DATASETS else "folder",
                "train": len(data.train),
                "id": data.train.id,
            },
            "seed": seed,
        }
        asked = None
        if teacher is not None:
            check_teacher(teacher, data.train.classes, self.config.image_size)
            self.identity["teacher"] = _origin(teacher)
            asked = Teacher(teacher, self.device, recipe.teacher_steps)
        torch.manual_seed(seed)
        with shortage_explained(lambda: "the model does not fit: choose a smaller one"):
            model = checkpoint.build_model(self.config).to(self.device)
            for module in model.modules():
                if isinstance(module, (WhitenedTokenizer, Whitening)):
                    some = torch.from_numpy(data.train.pixels[:WHITENING_IMAGES]).to(self.device)
                    module.whiten((some.float() / 255 - model.mean) / model.std)
            workers = workers_for(model, self.device, self.batch_size, world.size)
            self.learner = Learner(model, recipe, self.device, self.bf16, world, asked, workers)
        self.progress = Progress()
        self.resumed = False
        self.settings: dict[str, Any] = {}

    def start_from(self, init: Checkpoint) -> None:
        """Takes over the weights of `init`.  Raises `UserError` if it is another model."""
        own, theirs = to_dict(self.config), to_dict(init.model)
        differing = [
            f"{k} {shown(own.get(k))} against {shown(theirs.get(k))}"
            for k in own.keys() | theirs.keys()
            if own.get(k) != theirs.get(k) and k not in ("classes", "mean", "std", "dropout")
        ]
        if differing:
            raise UserError(
                f"{init.source} is another model than asked for ({', '.join(sorted(differing))}): name its preset"
            )
        weights = dict(init.weights)
        if list(init.data.get("classes", [])) != list(self.data.train.classes):
            fresh = self.learner.model.state_dict()
            for head in CLASSIFIERS:
                weights |= {k: v for k, v in fresh.items() if k.startswith(head)}
        for model in (self.learner.model, self.learner.ema.model):
            checkpoint.load_weights(model, weights, init.source)
        self.identity["init"] = _origin(init)

    @property
    def _eval_depth(self) -> int:
        return self.recipe.trained_depth if self.learner.model.recursive else 1

    def run(self, resume: bool) -> TrainingResult:
        """Trains from the start or from the state in the folder, measures the test accuracy, and says so."""
        state_path = self.out / STATE_FILE
        if resume:
            header, tensors = self.world.shared(self._read_state)
            if "init" in header["identity"]:
                self.identity["init"] = header["identity"]["init"]
            self.progress = training_state.restore(state_path, header, tensors, self.learner)
            self.resumed = True
            if not self.world.main and self.progress.sums is not None:
                self.progress.sums.zero_()  # the main process goes on with all that was saved
            done = self.progress.epoch, self.progress.batch
            finished = (
                "has finished"
                if self.progress.test_accuracy
                else f"goes on after {done[0]} epochs and {done[1]} batches"
            )
            note = training_state.note(header)
            self.reporter.say(f"the run in {self.out} {finished}{f'; {note}' if note else ''}")
        if self.progress.test_accuracy is None:
            if self.progress.sums is None:
                self.progress.sums = torch.zeros(4, dtype=torch.float64, device=self.device)
            with Interruption(patient=self.world.size > 1) as self.interruption:
                # Compiled only now: restoring replaced weights, and a failed start should fail fast.
                if self.execution.compile:
                    images = self.part.stop - self.part.start
                    compile_learner(self.learner, self.config.image_size, images, self.reporter.say)
                try:
                    with shortage_explained(self._way_out):
                        if not resume:
                            self._save()
                        self._write_metrics()
                        self._epochs()
                        self._test()
                except OutOfMemory:
                    if self._nothing_learned and self.world.main:
                        # The same command with a smaller batch should not find a run in its way.
                        for name in (STATE_FILE, METRICS_FILE):
                            (self.out / name).unlink(missing_ok=True)
                    raise
                except KeyboardInterrupt:
                    # Raised between batches, where the state is whole.
                    if self.interruption.patient or self.interruption.asked == 1:
                        self._save()
                        raise KeyboardInterrupt(f"the state is saved, --resume continues {self.out}") from None
                    raise
        best = self.progress.best
        assert best is not None
        assert self.progress.test_accuracy is not None
        return TrainingResult(
            out=self.out,
            epochs=self.progress.epoch,
            best_epoch=best["epoch"],
            validation_accuracy=best["accuracy"],
            test_accuracy=self.progress.test_accuracy,
            test_images=len(self.data.test),
            history=self.progress.history,
        )

    def _read_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        path = self.out / STATE_FILE
        saved = training_state.read_header(path)["identity"]
        return training_state.read(path, self.identity | ({"init": saved["init"]} if "init" in saved else {}))

    def _stop_if_asked(self) -> None:
        """Raises KeyboardInterrupt, in all processes, if a signal has come to any."""
        if self.world.any(self.interruption.asked > 0)[0]:
            raise KeyboardInterrupt

    def _epochs(self) -> None:
        pixels = torch.from_numpy(self.data.train.pixels).to(self.device)
        labels = torch.from_numpy(self.data.train.labels).to(self.device)
        save_due = Ticker(self.execution.save_every)
        drawn, drawing = 0.0, 0.0  # when the picture was last drawn, and how long that took
        while self.progress.epoch < self.recipe.epochs and not self._out_of_patience():
            self._epoch(pixels, labels, save_due)
            self._end_epoch()
            self._save()
            save_due.reset()
            self._write_metrics()
            # The picture may cost one per cent of the time, whatever the length of an epoch.
            if time.monotonic() - drawn > 100 * drawing:
                drawn = time.monotonic()
                self._draw()
                drawing = time.monotonic() - drawn
        self._draw()

    def _epoch(self, pixels: Tensor, labels: Tensor, save_due: Ticker) -> None:
        """Trains on what is left of the current epoch."""
        progress, recipe = self.progress, self.recipe
        assert progress.sums is not None
        # The third number keeps the streams apart: NumPy takes (seed, epoch) and (seed, epoch, 0) for the same.
        order = np.random.default_rng((self.seed, progress.epoch, 0)).permutation(len(labels))
        report_due = Ticker(self.reporter.interval)
        before, started = progress.seconds, time.monotonic()
        self._stop_if_asked()
        for i in range(progress.batch, self.batches):
            rng = np.random.default_rng((self.seed, progress.epoch, 1 + i))
            rows = order[i * self.batch_size : (i + 1) * self.batch_size]
            index = torch.from_numpy(rows).to(self.device)
            with shortage_explained(self._way_out_of_batch):
                flip = self._mirrored[rows] ^ bool(progress.epoch % 2) if recipe.flip == "alternate" else self.flip
                batch = augment(pixels[index], labels[index], self.config.classes, recipe, flip, rng, self.part)
                done = (progress.epoch * self.batches + i + 1) / (recipe.epochs * self.batches)
                free_steps = int(rng.integers(recipe.free_steps_at(done) + 1))
                torch.manual_seed((int(rng.integers(2**63)) + self.world.rank) % 2**63)  # of the dropout
                result = self.learner.batch(batch, recipe.lr_at(done), free_steps, self.share)
            progress.sums += _summary(result, self.share)
            progress.batch = i + 1
            progress.seconds = before + time.monotonic() - started
            if self.on_batch is not None:
                self.on_batch(progress.epoch, i, [float(loss) for loss in result.losses])
            # What the processes do together they decide together.  On a GPU, reading a number waits for all work
            # queued: only where somebody looks at it.
            infinite, report, save, stop = self.world.any(
                self.device.type == "cpu" and not bool(progress.sums[0].isfinite()),
                self.world.main and report_due.due(),
                self.world.main and save_due.due(),
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

    def _end_epoch(self) -> None:
        """Validates, keeps the weights if they are the best so far, and opens the next epoch."""
        progress = self.progress
        self._check_finite()
        loss, right, halt, steps = self._means()
        found = accuracy_by_depth(
            self.learner.ema.model,  # type: ignore[arg-type]
            self.data.validation,
            self._eval_depth,
            bf16=self.bf16,
            between_batches=self._stop_if_asked,
            world=self.world,
        )
        seen = self.batches * self.batch_size
        line = {
            "epoch": progress.epoch + 1,
            "train_loss": loss,
            "train_accuracy": right,
            "validation_accuracy": found.accuracy,
            "validation_loss": found.loss,
            "halt": halt,
            "validation_halt": found.halt,
            "steps": steps,
            "lr": self.recipe.lr_at((progress.epoch + 1) / self.recipe.epochs),
            "images_per_s": seen / max(progress.seconds, 1e-9),
            "seconds": progress.seconds,
        }
        left = (self.recipe.epochs - progress.epoch - 1) * progress.seconds
        best = progress.best
        if best is None or _score(found) > (best["accuracy"], -best["loss"]):
            accuracy, negative_loss = _score(found)
            progress.best = {"epoch": progress.epoch + 1, "accuracy": accuracy, "loss": -negative_loss}
            self._save_checkpoint()
        progress.history.append(line)
        progress.epoch += 1
        progress.batch, progress.seconds = 0, 0.0
        assert progress.sums is not None
        progress.sums.zero_()
        self.reporter.epoch(line, self.recipe.epochs, left)

    def _out_of_patience(self) -> bool:
        best = self.progress.best
        return bool(self.recipe.patience and best and self.progress.epoch - best["epoch"] >= self.recipe.patience)

    def _test(self) -> None:
        """Measures the kept weights on the test images, in float32, and writes that into the checkpoint."""
        kept = self.world.shared(lambda: checkpoint.load(self.out))
        depth = max(TEST_DEPTH, self.recipe.trained_depth)
        found = accuracy_by_depth(
            kept.build().to(self.device),
            self.data.test,
            depth,
            between_batches=self._stop_if_asked,
            world=self.world,
        )
        training = {**kept.training, "epochs_run": self.progress.epoch, "test_accuracy": found.accuracy}
        if found.halt:
            training["test_halt"] = found.halt
        if self.world.main:
            checkpoint.save(self.out, dataclasses.replace(kept, training=training))
        self.progress.test_accuracy = found.accuracy
        self._save()

    def _save_checkpoint(self) -> None:
        if not self.world.main:
            return
        best = self.progress.best
        assert best is not None
        data = self.data
        description = {
            "name": data.train.name,
            "classes": list(data.train.classes),
            "image_size": self.config.image_size,
            "train": len(data.train),
            "validation": len(data.validation),
            "test": len(data.test),
            "train_id": self.identity["data"]["id"],
        }
        training = {
            "recipe": dataclasses.asdict(self.recipe),
            "seed": self.seed,
            **{key: value for key, value in self.identity.items() if key in ("init", "teacher")},
            "epochs_run": self.progress.epoch + 1,
            "best_epoch": best["epoch"],
            "validation_accuracy": best["accuracy"],
            "train_size": len(data.train),
            "device": self.device.type,
            "processes": self.world.size,
            "precision": "bf16" if self.bf16 else "fp32",
            "versions": {"vitrm": __version__, "torch": torch.__version__, "python": platform.python_version()},
        }
        weights = self.learner.ema.model.state_dict()
        checkpoint.save(self.out, Checkpoint(model=self.config, data=description, training=training, weights=weights))

    def _save(self) -> None:
        training_state.save(self.out / STATE_FILE, self.learner, self.progress, self.identity, self.settings)

    def _write_metrics(self) -> None:
        if not self.world.main:
            return
        # Written whole from the state's own history, so the file can neither lag behind it nor repeat an epoch.
        write_text(self.out / METRICS_FILE, "".join(json.dumps(line) + "\n" for line in self.progress.history))

    def _draw(self) -> None:
        if not self.world.main:
            return
        curves.draw(self.progress.history, self.out / CURVE_FILE, f"{self.out.name}: {self.data.train.name}")

    def _means(self) -> tuple[float, float, float, float]:
        """Of the epoch so far: loss, accuracy, halting probability, supervised steps per batch."""
        assert self.progress.sums is not None
        loss, right, halt, steps = self.world.total(self.progress.sums).tolist()
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
        """Of a shortage of memory."""
        if self._nothing_learned:
            return "free some, or train with fewer or smaller images (--limit-train, --image-size), or a smaller model"
        return "free some, and --resume goes on from the state saved last"

    def _way_out_of_batch(self) -> str:
        """Of a shortage of memory within a batch."""
        smaller = self.batch_size // 2
        if smaller < self.world.size:
            return "even the smallest batch does not fit: choose a smaller model or --image-size"
        found = f"{self.batch_size} images a batch are too many"
        if self._nothing_learned:
            return f"{found}: try --batch-size {smaller}"
        return (
            f"{found} now: --resume goes on from the state saved last where there is more memory; with --batch-size {smaller} "
            "it is another run, which needs another --out"
        )

    def _report(self) -> None:
        self._check_finite()
        loss, right, _, _ = self._means()
        progress = self.progress
        done = progress.epoch + progress.batch / self.batches
        rate = progress.batch * self.batch_size / max(progress.seconds, 1e-9)
        left = (self.recipe.epochs - done) * self.batches * self.batch_size / rate
        self.reporter.batch(done, loss, right, rate, left, progress.epoch + 1)


def _origin(run: Checkpoint) -> dict[str, str]:
    """What tells a checkpoint from every other."""
    return {"run": Path(run.source).name, "weights_sha256": run.weights_id}


def _summary(result: BatchResult, share: float) -> Tensor:
    """A batch's contribution to `Progress.sums`, float64 [4]; `share` is this process's share of its images."""
    loss = torch.stack(result.losses).mean().double()
    steps = torch.full_like(loss, len(result.losses))
    return torch.stack([share * loss, result.correct.double(), share * result.halt.double(), share * steps])


def _score(found: DepthAccuracy) -> tuple[float, float]:
    """What selection maximizes: the mean accuracy over the trained depths; the loss decides ties.

    Small validation sets tie often, and the earliest of the best is then seldom the best of them.
    """
    return sum(found.accuracy) / len(found.accuracy), -sum(found.loss) / len(found.loss)
