"""Callbacks and the loggers built on them: what they are told, in which order, and what is on the disk."""

from __future__ import annotations

import csv
import json

import pytest

from vitrm.errors import UserError
from vitrm.training.callbacks import Callback, CSVLogger, TensorBoardLogger, flat, loggers
from vitrm.training.loop import train
from vitrm.training.parallel.device import Execution

pytestmark = pytest.mark.slow

CPU = Execution(device="cpu", save_every=0.0)  # after every batch: the epochs here are shorter than a hundred saves


class Told(Callback):
    """Notes what it is told; ends the run after the epoch `until`."""

    def __init__(self, until: int = 99) -> None:
        self.until, self.calls = until, []

    def on_start(self, out, identity, history):
        self.calls.append(("start", identity["seed"], [line["epoch"] for line in history]))

    def on_epoch(self, line):
        self.calls.append(("epoch", line["epoch"]))
        if line["epoch"] == self.until:
            raise RuntimeError("stop")

    def on_end(self, result):
        self.calls.append(("end", result.epochs, result.test_images))

    def close(self):
        self.calls.append(("close",))


def test_callbacks_hear_of_start_epochs_and_end_and_of_where_a_run_goes_on(few, model, short, tmp_path):
    stopped, rest = Told(until=2), Told()
    with pytest.raises(RuntimeError, match="stop"):
        train(model, short, few, tmp_path / "run", execution=CPU, callbacks=[stopped], seed=3)
    assert stopped.calls == [("start", 3, []), ("epoch", 1), ("epoch", 2), ("close",)]
    train(model, short, few, tmp_path / "run", execution=CPU, callbacks=[rest], seed=3, resume=True)
    assert rest.calls == [("start", 3, [1]), ("epoch", 2), ("epoch", 3), ("end", 3, 40), ("close",)]


def test_loggers_hold_every_epoch_once_also_of_a_resumed_run(few, model, short, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    with pytest.raises(RuntimeError, match="stop"):
        train(model, short, few, out, execution=CPU, callbacks=[*loggers(["csv", "tensorboard"]), Told(until=2)])
    result = train(model, short, few, out, execution=CPU, callbacks=loggers(["csv", "tensorboard"]), resume=True)
    with open(out / "metrics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [{name: float(v) for name, v in row.items()} for row in rows] == [flat(line) for line in lines]
    assert len(rows) == 3
    assert float(rows[2]["validation_accuracy/4"]) == lines[2]["validation_accuracy"][3]
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train_loss")] == [1, 2, 3]
    assert events.Scalars("validation_loss/1")[2].value == pytest.approx(lines[2]["validation_loss"][0], rel=1e-6)
    assert [e.value for e in events.Scalars("test_accuracy_by_depth")] == pytest.approx(result.test_accuracy)


def test_a_logger_whose_package_is_missing_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"pip install 'vitrm\[tensorboard\]'"):
        TensorBoardLogger()
    assert [type(one) for one in loggers(["csv", "csv"])] == [CSVLogger]
    with pytest.raises(UserError, match=r"log is .*wandb.*'csv' or 'tensorboard'"):
        Execution(log=("wandb",))
