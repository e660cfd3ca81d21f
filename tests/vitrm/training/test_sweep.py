"""Ablations: every combination once, a table that agrees with the runs, and going on where it was stopped."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

import pictures
import pytest
from matplotlib.figure import Figure

from vitrm import checkpoint
from vitrm.errors import UserError
from vitrm.training import cli
from vitrm.training import loop as train
from vitrm.training.run_config import RunConfig
from vitrm.training.sweep import Axis, Cell, SweepRow, _draw_axis, cells, draw_accuracy, parse_axes

SMALL = [
    "--model",
    "tiny",
    "--dim",
    "16",
    "--layers",
    "1",
    "--latents",
    "2",
    "--limit-train",
    "48",
    "--batch-size",
    "16",
]
SWEEP = ["--sweep", "n=1,2", "n_sup=1,3", *SMALL, "--epochs", "1", "--device", "cpu", "--out"]


def test_cells_are_all_combinations_over_the_settings_given():
    axes = parse_axes(["n=1,2", "supervision=joint,sequential", "lr=1e-3"])
    made = cells(axes, RunConfig(model={"preset": "tiny", "n": 7, "dim": 32}, recipe={"epochs": 5}))
    assert [c.name for c in made] == [
        f"n={n},supervision={s},lr=0.001" for n in (1, 2) for s in ("joint", "sequential")
    ]
    assert made[3].settings.model == {"preset": "tiny", "n": 2, "dim": 32}
    assert made[3].settings.recipe == {"epochs": 5, "supervision": "sequential", "lr": 0.001}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n", "expected NAME=VALUE"),
        ("n=", "expected NAME=VALUE"),
        ("n=1,,2", "expected NAME=VALUE"),
        ("n=1,1", "named twice"),
        ("steps=1,2", "unknown key steps; known are"),
    ],
)
def test_a_mistyped_axis_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse_axes([text])


def test_a_value_that_a_model_cannot_have_is_refused_before_anything_runs(tmp_path, capsys):
    assert cli.main(["--sweep", "n=1,0", *SMALL, "--out", str(tmp_path / "s")]) == 2
    assert "n is 0, expected a whole number from 1 to 1,024" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_stopped_sweep_goes_on_with_what_is_left(tmp_path, monkeypatch, capsys):
    out = tmp_path / "sweep"
    epochs = []
    real = train.TrainingRun._epoch

    def counted(self, *args):
        epochs.append(self.out.name)
        if len(epochs) == 3 and not (out / "n=2,n_sup=3").exists() and stop:
            raise KeyboardInterrupt
        return real(self, *args)

    stop = True
    monkeypatch.setattr(train.TrainingRun, "_epoch", counted)
    assert cli.main([*SWEEP, str(out)]) == 130
    assert "2 of 4 cells are done, the same command goes on" in capsys.readouterr().err
    first = (out / "n=1,n_sup=3" / "model.safetensors").read_bytes()
    assert len((out / "sweep.csv").read_text().splitlines()) == 3

    stop, epochs[:] = False, []
    assert cli.main([*SWEEP, str(out)]) == 0
    assert epochs == ["n=2,n_sup=1", "n=2,n_sup=3"]
    assert (out / "n=1,n_sup=3" / "model.safetensors").read_bytes() == first
    with open(out / "sweep.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["n"], r["n_sup"]) for r in rows] == [("1", "1"), ("1", "3"), ("2", "1"), ("2", "3")]
    for row in rows:
        kept = checkpoint.load(out / f"n={row['n']},n_sup={row['n_sup']}")
        assert kept.model.n == int(row["n"])
        assert kept.training["recipe"]["n_sup"] == int(row["n_sup"])
        depth = int(row["n_sup"]) + kept.training["recipe"]["free_steps"]
        assert int(row["depth"]) == depth
        assert float(row["test_accuracy"]) == kept.training["test_accuracy"][depth - 1]
    for name in ("accuracy-over-n.png", "accuracy-over-n_sup.png"):
        assert (out / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    # Other settings are another sweep.
    assert cli.main([*SWEEP, str(out), "--lr", "0.5"]) == 2
    assert "4 of 4 cells failed" in capsys.readouterr().err


@pytest.mark.slow
def test_a_cell_that_diverges_is_told_and_the_others_run(tmp_path, capsys):
    argv = ["--sweep", "lr=1e30,1e-3", *SMALL, "--epochs", "2", "--device", "cpu", "--out", str(tmp_path / "s")]
    assert cli.main([*argv, "--n-sup", "1", "--recipe", "fast"]) == 2
    printed = capsys.readouterr()
    assert "1 of 2 cells failed (lr=1e+30)" in printed.err
    assert len(Path(tmp_path / "s" / "sweep.csv").read_text().splitlines()) == 2


def test_the_pictures_labels_never_overlap(tmp_path, monkeypatch):
    seen = pictures.watch(monkeypatch)
    axes = [Axis("n", (1, 2, 3, 6)), Axis("a_setting_with_a_long_name", tuple(f"a-long-value-{i}" for i in range(8)))]
    rows = []
    for n, value, seed in itertools.product(axes[0].values, axes[1].values, (0, 1)):
        cell = Cell({"n": n, axes[1].name: value, "seed": seed}, RunConfig())
        accuracy = [0.9 + n / 100 + seed / 1000]
        rows.append(SweepRow(cell, 1, train.TrainingResult(tmp_path, 1, 1, 0.9, accuracy, 100, [10], None, [])))
    for axis in axes:
        draw_accuracy(axis, rows, tmp_path / "a.png")
    assert "after the deepest trained step; mean and range of seeds" in seen
    assert {"1", "6", "n: latent updates per recursion"} <= set(seen)


@pytest.mark.parametrize(
    ("values", "places"),
    [
        ((1, 2, 3, 6), [0, 0.6, 1.2, 3]),
        ((1, 10, 1000), [0, 2 / 3, 2]),  # to scale two labels would meet, so of the logarithm
        ((0, 1, 1000), [0, 1, 2]),
        ((True, False), [0, 1]),
        (("adamw", "muon"), [0, 1]),
        ((3,), [0]),
    ],
)
def test_numbers_stand_to_scale(values, places):
    axes = Figure().subplots()
    assert _draw_axis(axes, Axis("n", values)) == pytest.approx(places)
