"""The command vitrm-train, as its users call it."""

from __future__ import annotations

import fcntl
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import termios
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import PATIENCE
from safetensors.torch import load_file

from vitrm import checkpoint
from vitrm.config import preset
from vitrm.errors import UserError
from vitrm.training import cli
from vitrm.training.cli import main
from vitrm.training.run_config import RunConfig
from vitrm.training.run_folder.state import STATE_FILE, read_header

pytestmark = pytest.mark.slow

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
    "70",
    "--batch-size",
    "16",
]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
COMMAND = [sys.executable, "-m", "vitrm.training.cli"]


def _error(capsys, argv: list[str]) -> str:
    """Runs the command, expects it to refuse in one line, and gives that line."""
    assert main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_a_run_is_trained_and_refused_a_second_time_then_resumed(tmp_path, capsys):
    out = str(tmp_path / "run")
    assert main([*SMALL, "--epochs", "2", "--out", out, "--seed", "3", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "epoch 2/2" in printed
    assert "test accuracy at 1 … 6 steps" in printed
    loaded = checkpoint.load(out)
    assert loaded.training["seed"] == 3
    assert loaded.data["train"] == 70
    assert len(loaded.training["test_accuracy"]) == 6
    assert "already holds a run" in _error(capsys, [*SMALL, "--out", out])
    assert main(["--resume", "--out", out]) == 0
    assert "has finished" in capsys.readouterr().out
    assert "recipe.lr is 0.5" in _error(capsys, ["--resume", "--out", out, "--lr", "0.5"])
    assert "model." in _error(capsys, ["--resume", "--out", out, "--model", "nano"])


def test_a_folder_of_photos_by_a_config_file(tmp_path, capsys, photos):
    file = tmp_path / "run.toml"
    file.write_text(
        f'[data]\nname = "{photos()}"\n[model]\npreset = "tiny"\nimage_size = 16\ndim = 16\nlayers = 1\n'
        "[recipe]\nepochs = 5\nbatch_size = 8\n"
    )
    out = tmp_path / "run"
    assert main(["--config", str(file), "--epochs", "1", "--out", str(out)]) == 0
    loaded = checkpoint.load(out)
    assert (loaded.model.image_size, loaded.model.classes) == (16, 2)
    assert loaded.data["classes"] == ["cat", "dog"]
    assert loaded.training["recipe"]["epochs"] == 1
    assert loaded.training["recipe"]["batch_size"] == 8


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "huge"], "unknown model preset 'huge': choose one of paper"),
        (["--recipe", "slow"], "unknown recipe 'slow'"),
        (["--data", "mnist"], "unknown data set 'mnist'"),
        (["--epochs", "0"], "epochs is 0, expected a whole number from 1 to 1,000,000"),
        (["--distill-weight", "0.3"], "distill_weight is 0.3, but there is no teacher: name one with --teacher"),
        (["--teacher", "nano-cifar10", "--distill-weight", "2"], r"distill_weight is 2.0, expected a number in [0, 1]"),
        (["--dim", "65"], "dim 65 is not a multiple"),
        (["--model", "resnet18", "--latents", "3"], "unknown key latents for a resnet"),
        (["--precision", "int8"], "precision is 'int8'"),
        (["--device", "tpu"], "expected auto, cpu, cuda"),
        (["--seed", "-1"], "seed is -1"),
        (["--limit-train", "0"], "limit_train is 0"),
        (["--config", "none.toml"], "none.toml does not exist"),
        (["--resume"], "nothing to resume"),
        (["--init", "imagenet"], "a network of ImageNet is a teacher, as in --teacher torchvision:resnet50"),
        (["--init", "torchvision:resnet18"], "a network of ImageNet is a teacher"),
        (["--data", "cifar10", "--data-dir", "."], "cifar10 is not in"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    assert message in _error(capsys, argv)
    assert not list(tmp_path.iterdir())


def test_an_unknown_key_in_a_file_lists_the_known_ones(tmp_path, capsys):
    (tmp_path / "run.toml").write_text("[recipe]\nlearning_rate = 1\n")
    assert "unknown key learning_rate; known are name, epochs" in _error(
        capsys, ["--config", str(tmp_path / "run.toml")]
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU here")
def test_cuda_asked_for_where_there_is_none_is_an_error(tmp_path, capsys):
    line = _error(capsys, [*SMALL, "--device", "cuda", "--out", str(tmp_path / "run")])
    assert "finds no CUDA GPU here: use --device cpu" in line
    assert not (tmp_path / "run").exists()


def test_bad_folders_of_images_are_refused(tmp_path, capsys, photos):
    out = str(tmp_path / "run")
    one = photos(classes=("cat",), root="one")
    assert "only the class 'cat'" in _error(capsys, ["--model", "tiny", "--data", str(one), "--out", out])
    two = photos()
    (two / "dog" / "1.png").write_bytes(b"nonsense")
    assert "1.png cannot be read as an image" in _error(capsys, ["--model", "tiny", "--data", str(two), "--out", out])
    assert not Path(out).exists()


def _start(out: Path, *more: str, **options: object) -> subprocess.Popen[str]:
    argv = [*COMMAND, *SMALL, "--epochs", "10000", "--save-every", "0", "--out", str(out), *more]
    return subprocess.Popen(argv, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def _wait_for_epoch(out: Path, epoch: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if (out / STATE_FILE).exists() and read_header(out / STATE_FILE)["epoch"] >= epoch:
            return
        time.sleep(0.05)
    raise AssertionError("the run did not get going")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_leaves_a_state_that_continues(tmp_path, how, capsys):
    out = tmp_path / "run"
    process = _start(out)
    try:
        _wait_for_epoch(out, 2)
        process.send_signal(how)
        _, error = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    if how is signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130
        assert "the state is saved, --resume continues" in error
        assert "Traceback" not in error
    header = read_header(out / STATE_FILE)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] in (
        list(range(1, header["epoch"] + 1)),
        list(range(1, header["epoch"])),  # killed between the state and its copy; resuming makes up for it
    )
    checkpoint.load(out).build()


def test_one_folder_is_trained_into_by_one_process(tmp_path, capsys):
    """Also where both start at once; that a killed holder leaves the folder free is seen in the tests of kills."""
    out = tmp_path / "run"
    pair = [_start(out), _start(out)]
    try:
        while all(process.poll() is None for process in pair):
            time.sleep(0.05)
        refused, running = sorted(pair, key=lambda process: process.poll() is None)
        said = refused.communicate()[1]
        assert refused.returncode == 2
        assert said.count("\n") == 1
        assert f"{out} is in use by process {running.pid} on {socket.gethostname()}, since 20" in said
        assert "wait for it, stop it, or name another folder with --out" in said
        _wait_for_epoch(out, 1)
        assert f"in use by process {running.pid}" in _error(capsys, ["--resume", "--out", str(out)])
        assert "in use by process" in _error(capsys, ["--sweep", "seed=1,2", *SMALL, "--out", str(out)])
        assert running.poll() is None
    finally:
        for process in pair:
            process.kill()
            process.communicate()


def _kill_at_first_save(out: Path, *more: str) -> bool:
    """Kills a run while its first state is being written; False if it was too quick."""
    with _start(out, *more) as process:
        while process.poll() is None:
            if any(out.glob(".state.safetensors.*.part/new/*")):  # what safetensors writes
                process.kill()
            time.sleep(0.0005)
        return process.returncode == -signal.SIGKILL and not (out / STATE_FILE).exists()


def test_a_kill_in_the_very_first_save_locks_nobody_out(tmp_path, capsys):
    # Large enough that writing takes a while.
    large = ["--dim", "384", "--layers", "4"]
    out = next(folder for folder in map(tmp_path.joinpath, "abcdef") if _kill_at_first_save(folder, *large))
    assert list(out.glob(".state.*")), "the kill came before the save"
    (out / ".tmpAb3dE9").touch()  # of safetensors, where version 0.1.0 was killed
    (out / ".state.0a1b2c3d-77-abcdefgh.part.safetensors").touch()
    for old in (out / ".tmpAb3dE9", out / ".state.0a1b2c3d-77-abcdefgh.part.safetensors"):
        os.utime(old, (0, 0))
    assert "start the run without --resume" in _error(capsys, ["--resume", "--out", str(out)])
    assert main([*SMALL, "--epochs", "1", "--out", str(out)]) == 0
    assert not list(out.glob(".*"))


def _on_a_terminal(out: Path, errors: Path, hangup: signal.Handlers) -> tuple[subprocess.Popen[bytes], int]:
    """Starts a run on a terminal of its own; gives it and the other end, whose closing hangs up."""
    ours, theirs = os.openpty()

    def control() -> None:
        signal.signal(signal.SIGHUP, hangup)
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    argv = [*COMMAND, *SMALL, "--epochs", "30", "--save-every", "1e9", "--device", "cpu", "--out", str(out)]
    with open(errors, "wb") as file:
        process = subprocess.Popen(
            argv, env={**ENVIRONMENT, "TERM": "xterm"}, stdin=theirs, stdout=theirs, stderr=file, preexec_fn=control
        )
    os.close(theirs)
    return process, ours


@pytest.mark.parametrize("hangup", [signal.SIG_DFL, signal.SIG_IGN], ids=["ssh", "nohup"])
def test_a_lost_terminal_costs_no_result(tmp_path, hangup):
    out, errors = tmp_path / "run", tmp_path / "errors"
    process, ours = _on_a_terminal(out, errors, hangup)
    try:
        shown = b""
        while b"epoch 2/30" not in shown:
            shown += os.read(ours, 4096)
        os.close(ours)  # the kernel sends SIGHUP, and the terminal is gone
        if hangup == signal.SIG_DFL:
            process.send_signal(signal.SIGHUP)  # and so does the shell
        process.wait(120)
    finally:
        process.kill()
    said = errors.read_text()
    assert "Traceback" not in said
    header = read_header(out / STATE_FILE)
    if hangup == signal.SIG_DFL:
        assert process.returncode == 130, said
        assert "the state is saved, --resume continues" in said
        assert header["test_accuracy"] is None
    else:
        assert process.returncode == 141, said
        assert len(header["test_accuracy"]) == 6
    assert not list(out.glob(".*"))


def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    """A shell ignores SIGINT for what it starts in the background."""
    code = (
        "import os, signal, sys; from vitrm.errors import run_command; from vitrm.system.interrupt import Interruption\n"
        "def command(argv):\n"
        "    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):\n"
        "        os.kill(os.getpid(), number)\n"
        "        with Interruption() as one:\n"
        "            os.kill(os.getpid(), number)\n"
        "        assert one.asked == 0\n"
        "sys.exit(run_command(command))"
    )

    def ignore() -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)

    ended = subprocess.run([sys.executable, "-c", code], preexec_fn=ignore, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


# Memory is limited once all libraries are loaded: what is left is the run's own.
LIMITED = """
import re, resource, sys
from pathlib import Path
import matplotlib, torch, vitrm.training.supervision, vitrm.training.loop
from vitrm import data
from vitrm.training.cli import main

data.load("digits", "train")
torch.ones(8, 8) @ torch.ones(8, 8)
size = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024 + 350 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (size, size))
sys.exit(main(sys.argv[1:]))
"""


def test_a_batch_that_does_not_fit_names_one_to_try(tmp_path):
    out = tmp_path / "run"
    argv = ["--model", "tiny", "--device", "cpu", "--threads", "1", "--batch-size", "1024", "--out", str(out)]
    ended = subprocess.run(
        [sys.executable, "-c", LIMITED, *argv], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "error: out of memory" in ended.stderr
    assert "1024 images a batch are too many" in ended.stderr
    assert "--batch-size 512" in ended.stderr
    assert not out.exists(), "the same command with a smaller batch finds nothing in its way"


def test_a_run_killed_again_and_again_ends_as_if_nothing_had_happened(tmp_path):
    """The small version of benchmarks/torture/kills.py."""
    settings = [*SMALL, "--epochs", "10", "--save-every", "0", "--device", "cpu", "--threads", "1"]
    assert main([*settings, "--out", str(tmp_path / "whole")]) == 0
    out, dice = tmp_path / "run", random.Random(0)
    for epoch in (1, 4, 7):
        argv = ["--resume", "--save-every", "0", "--out", str(out)] if out.exists() else [*settings, "--out", str(out)]
        with subprocess.Popen([*COMMAND, *argv], env=ENVIRONMENT, stdout=subprocess.DEVNULL) as process:
            _wait_for_epoch(out, epoch)
            time.sleep(dice.uniform(0, 0.1))
            process.kill()
    assert main(["--resume", "--out", str(out), "--threads", "1"]) == 0
    for name in (STATE_FILE, checkpoint.WEIGHTS_FILE):
        one, two = load_file(out / name), load_file(tmp_path / "whole" / name)
        assert all(torch.equal(one[k], two[k]) for k in two), name
    assert not list(out.glob(".*")), "what a kill leaves is cleared away"


def test_a_run_goes_on_elsewhere_with_its_images_elsewhere(tmp_path, capsys, photos):
    settings = ["--model", "tiny", "--image-size", "16", "--dim", "16", "--layers", "1", "--epochs", "1"]
    assert main([*settings, "--data", str(photos()), "--out", str(tmp_path / "run")]) == 0
    (tmp_path / "away").mkdir()
    run = (tmp_path / "run").rename(tmp_path / "away" / "moved")
    images = (tmp_path / "photos").rename(tmp_path / "away" / "pictures")
    capsys.readouterr()
    assert "unknown data set '/" in _error(capsys, ["--resume", "--out", str(run)])
    assert main(["--resume", "--out", str(run), "--data", str(images)]) == 0
    assert "has finished" in capsys.readouterr().out
    (images / "cat" / "0.png").unlink()
    assert "it is another run: data.id is" in _error(capsys, ["--resume", "--out", str(run), "--data", str(images)])


def test_a_file_too_large_for_the_disk_leaves_what_was_there(tmp_path):
    out = tmp_path / "run"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))

    process = _start(out, preexec_fn=limit)
    _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2, error
    assert len(error.splitlines()) == 1
    assert "state.safetensors" in error
    assert not out.exists(), "nothing is left, the folder made for it included"


@pytest.mark.parametrize("name", ["paper", "nano", "vit-small", "airbench"])
def test_the_model_of_an_earlier_run_is_named_by_its_preset(name):
    config = preset(name, classes=7, image_size=64, mean=[0.1, 0.2, 0.3])
    fields = cli.preset_fields(config)
    assert fields["preset"] == name
    again, _ = cli.resolve(RunConfig(model=fields))
    assert replace(again, classes=7, mean=config.mean, std=config.std) == config


def test_a_model_of_its_own_settings_is_spelled_out():
    config = preset("nano", latents=5, classes=3)
    again, _ = cli.resolve(RunConfig(model=cli.preset_fields(config)))
    assert replace(again, classes=3) == config
    with pytest.raises(UserError, match="none of the presets"):
        cli.preset_fields(preset("vit-small", layers=3))
