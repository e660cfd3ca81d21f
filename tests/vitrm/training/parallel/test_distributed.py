"""Two real processes under torchrun learn what one learns, stop together, and hand a run over to another number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import PATIENCE
from safetensors.torch import load_file

import vitrm
from vitrm.checkpoint import WEIGHTS_FILE
from vitrm.recipe import recipe
from vitrm.training.augmentation.augment import augment
from vitrm.training.parallel.distributed import World
from vitrm.training.run_folder.state import STATE_FILE, read_header

sys.path.insert(0, str(Path(__file__).parent))
import one_process

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SCRIPT = str(Path(one_process.__file__))


def _torchrun(*argv: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*TORCHRUN, *argv], env=environment, text=True, capture_output=True, timeout=PATIENCE, check=False
    )


def _assert_same(folder: Path, other: Path) -> None:
    """The same epochs and weights but for the order of sums."""
    one, two = ([json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (folder, other))
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a["steps"] == pytest.approx(b["steps"], abs=1e-9)
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
        assert a["halt"] == pytest.approx(b["halt"], rel=1e-3)
        assert a["validation_loss"] == pytest.approx(b["validation_loss"], rel=1e-3)
        assert a["train_accuracy"] == pytest.approx(b["train_accuracy"], abs=0.02)
    for name in (WEIGHTS_FILE, STATE_FILE):
        weights, expected = load_file(folder / name), load_file(other / name)
        assert weights.keys() == expected.keys()
        for key, tensor in expected.items():
            # A key's bias cancels in the softmax: its gradient is rounding, and AdamW scales that up.
            if tensor.is_floating_point() and not key.endswith((".k.bias", ".k.bias.exp_avg", ".k.bias.exp_avg_sq")):
                scale = max(
                    float(tensor.abs().max()), 1e-2
                )  # what is small throughout is a difference of larger numbers
                assert float((weights[key] - tensor).abs().max()) < 3e-4 * scale, (name, key)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run by one process, uninterrupted, with a threshold at which some batches halt early and some do not."""
    with pytest.MonkeyPatch.context() as patch:
        for threshold in ("0.45", "0.48", "0.46", "0.47", "0.44", "0.49"):
            patch.setenv(one_process.THRESHOLD, threshold)
            folder = tmp_path_factory.mktemp("alone") / "run"
            if any(1 < line["steps"] < 4 for line in one_process.run(str(folder)).history):
                yield folder
                return
        pytest.fail("halting decides nothing at any of these thresholds")


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(alone, tmp_path):
    ended = _torchrun(SCRIPT, str(tmp_path / "run"))
    assert ended.returncode == 0, ended.stderr
    assert "FutureWarning" not in ended.stderr
    _assert_same(tmp_path / "run", alone)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["training"]["processes"] == 2


@pytest.mark.slow
def test_a_signal_to_one_stops_both_with_the_state_saved_and_one_process_goes_on(alone, tmp_path):
    ended = _torchrun(SCRIPT, str(tmp_path / "run"), "--send", "SIGTERM", "1", "1", "1")
    assert ended.returncode != 0
    assert "the state is saved, --resume continues" in ended.stderr
    header = read_header(tmp_path / "run" / STATE_FILE)
    assert (header["epoch"], header["batch"]) == (1, 2)
    one_process.run(str(tmp_path / "run"), resume=True)
    _assert_same(tmp_path / "run", alone)


@pytest.mark.slow
def test_two_processes_go_on_for_one_and_one_that_dies_takes_both_down(alone, tmp_path):
    class Killed(Exception):
        pass

    def die(epoch, batch, losses):
        if (epoch, batch) == (0, 2):
            raise Killed

    folder = tmp_path / "run"
    with pytest.raises(Killed):
        vitrm.training.loop.train(
            one_process.model(),
            one_process.everything(),
            one_process.few(),
            folder,
            seed=3,
            execution=one_process.EXECUTION,
            on_batch=die,
        )
    ended = _torchrun(SCRIPT, str(folder), "--resume", "--send", "SIGKILL", "1", "1", "2")
    assert ended.returncode != 0
    assert "another process of this run has ended" in ended.stderr
    header = read_header(folder / STATE_FILE)
    assert (header["epoch"], header["batch"]) == (1, 2)
    one_process.run(str(folder), resume=True)
    _assert_same(folder, alone)


@pytest.mark.slow
def test_the_command_trains_under_torchrun_and_speaks_once(tmp_path):
    out = str(tmp_path / "run")
    argv = [
        "-m",
        "vitrm.training.cli",
        "--model",
        "tiny",
        "--dim",
        "16",
        "--limit-train",
        "64",
        "--epochs",
        "1",
        "--out",
        out,
    ]
    ended = _torchrun(*argv)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("the checkpoint is") == 1
    assert "× 2 processes" in ended.stdout
    assert "FutureWarning" not in ended.stderr
    assert "find_unused_parameters" not in ended.stderr


@pytest.mark.parametrize("name", ["paper", "anytime"])
def test_the_parts_of_a_batch_are_augmented_as_the_whole(digits, name):
    pixels, labels = (torch.from_numpy(a[:37]) for a in (digits.train.pixels, digits.train.labels))
    for seed in range(4):
        whole, *parts = (
            augment(pixels, labels, 10, recipe(name), True, np.random.default_rng(seed), part)
            for part in (None, slice(0, 12), slice(12, 13), slice(13, 37))
        )
        for together, separate in zip(whole, zip(*parts, strict=True), strict=True):
            torch.testing.assert_close(torch.cat(separate), together, rtol=0, atol=1e-6)


def test_parts_cover_everything_once():
    class Some(World):
        size = 3

    covered = []
    for rank in range(3):
        world = Some()
        world.rank = rank
        covered += range(17)[world.part(17)]
    assert covered == list(range(17))
