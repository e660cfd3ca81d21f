"""What a training run tells of itself while it goes on: one small interface, and the loggers that are built on it.

    class Wandb(Callback):
        def on_start(self, out, identity, history):
            self.run = wandb.init(dir=out, config=identity)

        def on_epoch(self, line):
            self.run.log(flat(line))

    train(config, recipe, data, out, callbacks=[Wandb()])

Callbacks are called in the main process alone.  What one raises ends the run; its state stays.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitrm.errors import UserError
from vitrm.system.files import write_text

if TYPE_CHECKING:
    from vitrm.training.loop import TrainingResult

CSV_FILE = "metrics.csv"
TENSORBOARD_FOLDER = "tensorboard"
LOGGERS = ("csv", "tensorboard")


class Callback:
    """A callback that does nothing: override what you need."""

    def on_start(self, out: Path, identity: dict[str, Any], history: Sequence[dict[str, Any]]) -> None:
        """Called before the first epoch.

        Args:
            out: the run folder
            identity: model, recipe, data and seed, as JSON
            history: the lines of metrics.jsonl so far: none, or those of the epochs before a run was resumed
        """

    def on_epoch(self, line: dict[str, Any]) -> None:
        """Called after each epoch with its line of metrics.jsonl."""

    def on_end(self, result: TrainingResult) -> None:
        """Called once the run has ended and the test images were looked at."""

    def close(self) -> None:
        """Called last, also after an interruption or an error."""


@contextmanager
def all_closed(callbacks: Sequence[Callback]) -> Iterator[None]:
    """A context after which every callback is closed."""
    with ExitStack() as stack:
        for callback in callbacks:
            stack.callback(callback.close)
        yield


def flat(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl by name; those by depth as `validation_accuracy/1` … (after 1 step, 2 …)."""
    numbers: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, (list, tuple)):
            numbers |= {f"{name}/{depth}": float(v) for depth, v in enumerate(value, 1)}
        else:
            numbers[name] = value
    return numbers


class CSVLogger(Callback):
    """Keeps metrics.csv in the run folder: a line for each epoch, whole after every one."""

    def on_start(self, out: Path, identity: dict[str, Any], history: Sequence[dict[str, Any]]) -> None:
        self.path, self.lines = out / CSV_FILE, [flat(line) for line in history]

    def on_epoch(self, line: dict[str, Any]) -> None:
        self.lines.append(flat(line))
        file = io.StringIO()
        # A run that an earlier version began may lack columns in its first lines.
        table = csv.DictWriter(
            file, list(dict.fromkeys(name for one in self.lines for name in one)), lineterminator="\n"
        )
        table.writeheader()
        table.writerows(self.lines)
        write_text(self.path, file.getvalue())


class TensorBoardLogger(Callback):
    """Writes events for `tensorboard --logdir runs`: the epochs' metrics, and the test accuracy by depth.

    Raises `UserError` where TensorBoard is not installed.
    """

    def __init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(f"TensorBoard is not installed ({error}): pip install 'vitrm[tensorboard]'") from None
        self._open = SummaryWriter
        self.writer: Any = None

    def on_start(self, out: Path, identity: dict[str, Any], history: Sequence[dict[str, Any]]) -> None:
        # Epochs that are trained anew after a kill replace what was written of them.
        self.writer = self._open(str(out / TENSORBOARD_FOLDER), purge_step=len(history) + 1)

    def on_epoch(self, line: dict[str, Any]) -> None:
        for name, value in flat(line).items():
            if name != "epoch":
                self.writer.add_scalar(name, value, line["epoch"])
        self.writer.flush()

    def on_end(self, result: TrainingResult) -> None:
        for depth, accuracy in enumerate(result.test_accuracy, 1):
            self.writer.add_scalar("test_accuracy_by_depth", accuracy, depth)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def loggers(names: Sequence[str]) -> list[Callback]:
    """The loggers of these `names`, of `LOGGERS`.  Raises `UserError` for one that needs a package which is not installed."""
    made: dict[str, type[Callback]] = {"csv": CSVLogger, "tensorboard": TensorBoardLogger}
    return [made[name]() for name in dict.fromkeys(names)]
