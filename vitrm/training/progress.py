"""Reports of a training run while it goes on: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from vitrm.system.terminal import console, say


def clock(seconds: float) -> str:
    """A duration as m:ss or h:mm:ss."""
    minutes, second = divmod(round(max(seconds, 0)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def epoch_line(line: dict[str, Any], epochs: int, left: float) -> str:
    """One epoch's metrics as text; `left` is the time to go, in seconds."""
    accuracies = " ".join(f"{100 * a:.1f}" for a in line["validation_accuracy"])
    return (
        f"epoch {line['epoch']}/{epochs}  loss {line['train_loss']:.3f}  train {100 * line['train_accuracy']:.1f} %  "
        f"validation {accuracies} %  {line['images_per_s']:.0f} images/s  {clock(line['seconds'])}, {clock(left)} left"
    )


class Reporter:
    """A reporter that says nothing: the library's own, when no one listens."""

    interval = 1.0  # seconds between two calls of `batch`: reading a loss waits for the device

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def say(self, text: str) -> None:
        """Reports a line about the run."""

    def batch(self, done: float, loss: float, accuracy: float, images_per_s: float, left: float, epoch: int) -> None:
        """Reports a point within an epoch: `done` epochs, the current epoch's means, `left` seconds to go."""

    def epoch(self, line: dict[str, Any], epochs: int, left: float) -> None:
        """Reports the end of an epoch."""


class PlainReporter(Reporter):
    """Plain lines on stdout, one per epoch, and one every half minute within long ones."""

    interval = 30.0

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def say(self, text: str) -> None:
        say(text)

    def batch(self, done: float, loss: float, accuracy: float, images_per_s: float, left: float, epoch: int) -> None:
        say(
            f"  epoch {epoch}, {100 * (done % 1):.0f} %: loss {loss:.3f}  train {100 * accuracy:.1f} %  "
            f"{images_per_s:.0f} images/s  {clock(left)} left"
        )

    def epoch(self, line: dict[str, Any], epochs: int, left: float) -> None:
        say(epoch_line(line, epochs, left))


class LiveReporter(Reporter):
    """A progress bar on a terminal; finished epochs stay above it."""

    def __init__(self, epochs: int) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self.epochs = epochs
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}/{task.total:.0f}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:.0f} %  {task.description}"),
            console=console(),
        )
        self._task = self._bar.add_task("starting", total=epochs, epoch=1)

    def __enter__(self) -> LiveReporter:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        self._bar.console.print(text, soft_wrap=True)

    def batch(self, done: float, loss: float, accuracy: float, images_per_s: float, left: float, epoch: int) -> None:
        text = f"loss {loss:.3f}  train {100 * accuracy:.1f} %  {images_per_s:.0f} images/s  {clock(left)} left"
        self._bar.update(self._task, completed=done, description=text, epoch=epoch)

    def epoch(self, line: dict[str, Any], epochs: int, left: float) -> None:
        text = f"loss {line['train_loss']:.3f}  {line['images_per_s']:.0f} images/s  {clock(left)} left"
        self._bar.update(self._task, completed=line["epoch"], description=text, epoch=min(line["epoch"] + 1, epochs))
        self.say(epoch_line(line, epochs, left))


def reporter(epochs: int) -> Reporter:
    """The reporter that suits stdout."""
    return LiveReporter(epochs) if sys.stdout.isatty() else PlainReporter(epochs)


class Ticker:
    """A clock that is due every `interval` seconds."""

    def __init__(self, interval: float) -> None:
        self.interval = interval
        self._last = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds of the interval that have gone by."""
        return time.monotonic() - self._last

    def due(self) -> bool:
        """True at most once per interval."""
        if self.elapsed < self.interval:
            return False
        self.reset()
        return True

    def reset(self) -> None:
        """Starts the interval anew."""
        self._last = time.monotonic()
