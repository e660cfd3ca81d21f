"""The files of a run, which the main process writes.

config.json, model.safetensors   the checkpoint: averaged weights of the best validation result
metrics.jsonl, curve.png         one line per epoch, and its picture
results.json, confusion.csv      the test images by class: precision, recall, which class was taken for which
confusion.png, mistakes.png      the same as a picture, and the surest mistakes
state.safetensors                the state that --resume continues from
"""

from __future__ import annotations

import dataclasses
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vitrm import __version__, checkpoint
from vitrm.checkpoint import Checkpoint
from vitrm.classification.confusion import Classification
from vitrm.data import Splits
from vitrm.system.files import write_json, write_text
from vitrm.training.evaluate import DepthAccuracy
from vitrm.training.run_folder import state as training_state
from vitrm.training.run_folder.curves import draw_curves
from vitrm.training.run_folder.result_pictures import confusion_csv, draw_confusion, draw_mistakes
from vitrm.training.run_folder.state import STATE_FILE, RunProgress
from vitrm.training.supervision import Learner

METRICS_FILE = "metrics.jsonl"
CURVE_FILE = "curve.png"
RESULTS_FILE = "results.json"
CONFUSION_FILE = "confusion.csv"
CONFUSION_PICTURE = "confusion.png"
MISTAKES_PICTURE = "mistakes.png"


class RunFiles:
    """The files in the folder `path` of a run on `data`."""

    def __init__(
        self, path: Path, data: Splits, identity: dict[str, Any], settings: dict[str, Any], seed: int, main: bool
    ) -> None:
        self.path, self.data, self.identity, self.settings, self.seed = path, data, identity, settings, seed
        self.main = main  # False: this process writes nothing

    def save_state(self, learner: Learner, progress: RunProgress) -> None:
        """Writes what the run can be resumed from; all processes call it."""
        training_state.save(self.path / STATE_FILE, learner, progress, self.identity, self.settings)

    def read_state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """The state's header and tensors.  Raises `UserError` if it is of another run, but for the weights that it started from."""
        path = self.path / STATE_FILE
        saved = training_state.read_header(path)["identity"]
        return training_state.read(path, self.identity | ({"init": saved["init"]} if "init" in saved else {}))

    def best_checkpoint(self, learner: Learner, progress: RunProgress) -> Checkpoint:
        """A copy of the averaged weights of the epoch that has just ended, the best so far, to be written later."""
        best, data = progress.best, self.data
        assert best is not None
        description = {
            "name": data.train.name,
            "classes": list(data.train.classes),
            "image_size": learner.model.config.image_size,
            "train": len(data.train),
            "validation": len(data.validation),
            "test": len(data.test),
            "train_id": self.identity["data"]["id"],
            "preprocessing": self.identity["data"]["preprocessing"],
        }
        training = {
            "recipe": dataclasses.asdict(learner.recipe),
            "seed": self.seed,
            **{key: value for key, value in self.identity.items() if key in ("init", "teacher")},
            "epochs_run": progress.epoch + 1,
            "best_epoch": best["epoch"],
            "validation_accuracy": best["accuracy"],
            "train_size": len(data.train),
            "device": learner.device.type,
            "processes": learner.world.size,
            "precision": "bf16" if learner.bf16 else "fp32",
            "versions": {"vitrm": __version__, "torch": torch.__version__, "python": platform.python_version()},
        }
        weights = {name: tensor.clone() for name, tensor in learner.ema.model.state_dict().items()}
        return Checkpoint(model=learner.model.config, data=description, training=training, weights=weights)

    def save_checkpoint(self, best: Checkpoint) -> None:
        """Writes the best weights so far."""
        if self.main:
            checkpoint.save(self.path, best)

    def add_test_result(self, kept: Checkpoint, epochs: int, tested: DepthAccuracy) -> None:
        """Writes the accuracy on the test images into the checkpoint `kept`, after a run of `epochs`."""
        if not self.main:
            return
        training = {**kept.training, "epochs_run": epochs, "test_accuracy": tested.accuracy}
        if tested.halt:
            training["test_halt"] = tested.halt
        checkpoint.save(self.path, dataclasses.replace(kept, training=training))

    def write_results(
        self, result: Classification, answers: NDArray[np.int64], confidence: NDArray[np.float32]
    ) -> None:
        """Writes the results by class, and draws them: `answers` [n] to the test images, of which `result` counts, and their probabilities."""
        if not self.main:
            return
        test, title = self.data.test, f"{self.path.name}: {len(self.data.test):,} test images of {self.data.test.name}"
        write_json(self.path / RESULTS_FILE, result.to_dict())
        write_text(self.path / CONFUSION_FILE, confusion_csv(result))
        draw_confusion(result, self.path / CONFUSION_PICTURE, title)
        draw_mistakes(test, answers, confidence, self.path / MISTAKES_PICTURE, title)

    def write_metrics(self, history: list[dict[str, Any]]) -> None:
        """Writes metrics.jsonl whole from the state's own history: it can neither lag behind that nor repeat an epoch."""
        if self.main:
            write_text(self.path / METRICS_FILE, "".join(json.dumps(line) + "\n" for line in history))

    def draw_curves(self, history: list[dict[str, Any]], best: int | None) -> None:
        """Draws curve.png; `best` is the epoch whose weights are kept, counted from 1."""
        if self.main:
            data = self.data.train.name
            title = self.path.name if data in self.path.name else f"{self.path.name}: {data}"
            draw_curves(history, self.path / CURVE_FILE, f"Training of {title}", best)

    def remove_state(self) -> None:
        """Removes what a run that has learned nothing left: the same command finds no run in its way."""
        if self.main:
            for name in (STATE_FILE, METRICS_FILE):
                (self.path / name).unlink(missing_ok=True)
