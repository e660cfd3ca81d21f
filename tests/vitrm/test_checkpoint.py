"""Checkpoints: whole or refused, and never damaged by a save that failed."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vitrm import checkpoint
from vitrm.checkpoint import CONFIG_FILE, WEIGHTS_FILE, Checkpoint, build_model
from vitrm.config import preset
from vitrm.errors import UserError
from vitrm.recipe import recipe

CONFIG = preset("tiny", dim=16, heads=2, layers=1, latents=2, n=1)


def _checkpoint(seed: int = 0) -> Checkpoint:
    torch.manual_seed(seed)
    return Checkpoint(
        model=CONFIG,
        data={"name": "digits", "classes": [str(i) for i in range(10)]},
        training={"seed": seed},
        weights=build_model(CONFIG).state_dict(),
    )


@pytest.fixture
def run(tmp_path) -> Path:
    checkpoint.save(tmp_path / "run", _checkpoint())
    return tmp_path / "run"


def test_what_is_saved_is_loaded(run):
    loaded, saved = checkpoint.load(run), _checkpoint()
    assert loaded.model == saved.model
    assert (loaded.data, loaded.training) == (saved.data, saved.training)
    assert loaded.weights_id == saved.weights_id != _checkpoint(1).weights_id
    images = torch.rand(3, 3, 32, 32)
    assert torch.equal(loaded.build()(images, 2).logits, saved.build()(images, 2).logits)


@pytest.mark.parametrize(
    ("training", "depth"),
    [
        ({"recipe": dataclasses.asdict(recipe("paper"))}, 1),
        ({"recipe": dataclasses.asdict(recipe("anytime")), "best_epoch": 24}, 6),
        ({"recipe": dataclasses.asdict(recipe("anytime")), "best_epoch": 1}, 2),  # stopped before the random steps came
        ({"recipe": dataclasses.asdict(recipe("anytime"))}, 6),
        ({}, None),
        ({"recipe": {"n_sup": 3, "of_a_later_version": 1}}, None),
    ],
)
def test_a_checkpoint_knows_the_depth_it_was_trained_to(training, depth):
    assert dataclasses.replace(_checkpoint(), training=training).trained_depth == depth


def test_files_have_the_rights_of_any_new_file(run, tmp_path):
    (tmp_path / "other").touch()
    expected = (tmp_path / "other").stat().st_mode
    assert {p.stat().st_mode for p in run.iterdir()} == {expected}


def test_half_storage_is_read_back_as_float32(run):
    whole = (run / WEIGHTS_FILE).stat().st_size
    checkpoint.save(run, _checkpoint(), half=True)
    assert (run / WEIGHTS_FILE).stat().st_size < 0.6 * whole
    loaded = checkpoint.load(run)
    assert all(v.dtype == torch.float32 for v in loaded.weights.values())
    loaded.build()


def test_a_missing_checkpoint_is_refused(run, tmp_path):
    with pytest.raises(UserError, match=r"no run folder .*bundled"):
        checkpoint.load(tmp_path / "none")
    (run / WEIGHTS_FILE).unlink()
    with pytest.raises(UserError, match=r"model\.safetensors does not exist: the run has not saved a model yet"):
        checkpoint.load(run)
    (run / CONFIG_FILE).unlink()
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        checkpoint.load(run)


@pytest.mark.parametrize("keep", [0, 4, 1000, -8])
def test_truncated_weights_are_refused(run, keep):
    raw = (run / WEIGHTS_FILE).read_bytes()
    (run / WEIGHTS_FILE).write_bytes(raw[:keep])
    with pytest.raises(UserError, match=r"cannot be read as safetensors .*truncated"):
        checkpoint.load(run)


def test_a_truncated_config_is_refused(run):
    text = (run / CONFIG_FILE).read_text()
    (run / CONFIG_FILE).write_text(text[: len(text) // 2])
    with pytest.raises(UserError, match=r"not valid JSON .*truncated"):
        checkpoint.load(run)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format",), 9, "format is 9, expected 1"),
        (("model", "kind"), "mlp", "model kind is 'mlp'"),
        (("model", "depth"), 3, "unknown key depth"),
        (("model", "dim"), -1, "dim is -1"),
        (("data",), [], "must be JSON objects"),
    ],
)
def test_a_config_of_something_else_is_refused(run, path, value, message):
    config = json.loads((run / CONFIG_FILE).read_text())
    place = config
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (run / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        checkpoint.load(run)


def _change(run: Path, how: str) -> None:
    weights = load_file(run / WEIGHTS_FILE)
    if how == "missing":
        del weights["y0"]
    elif how == "unexpected":
        weights["extra"] = torch.zeros(1)
    elif how == "of another shape":
        weights["y0"] = torch.zeros(1, 1, 8)
    else:
        weights["y0"][0, 0, 0] = float("nan")
    save_file(weights, run / WEIGHTS_FILE)


@pytest.mark.parametrize("how", ["missing", "unexpected", "of another shape", "NaN"])
def test_weights_that_do_not_fit_are_refused(run, how):
    _change(run, how)
    with pytest.raises(UserError, match=how):
        checkpoint.load(run).build()


SAVE_ANOTHER = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_checkpoint import _checkpoint
from vitrm import checkpoint
from vitrm.errors import run_command
limit = int(sys.argv[2])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.exit(run_command(lambda argv: checkpoint.save(sys.argv[1], _checkpoint(1))))
"""


def _save_another(folder: Path, limit: int = 0) -> subprocess.CompletedProcess[str]:
    code = SAVE_ANOTHER.format(tests=str(Path(__file__).parent))
    return subprocess.run(
        [sys.executable, "-c", code, str(folder), str(limit)], capture_output=True, text=True, check=False
    )


def test_a_save_that_fails_leaves_the_earlier_checkpoint(run):
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    ended = _save_another(run, limit=4096)
    assert ended.returncode == 2, ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    try:
        checkpoint.save(disk / "run", _checkpoint())
        before = {p.name: p.read_bytes() for p in (disk / "run").iterdir()}
        filler = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        (disk / "filler").write_bytes(b"x" * max(filler - 8192, 1))
        ended = _save_another(disk / "run")
        assert ended.returncode == 2, ended.stderr
        assert "no space left on the disk" in ended.stderr
        assert {p.name: p.read_bytes() for p in (disk / "run").iterdir()} == before
    finally:
        subprocess.run(["umount", str(disk)], check=True)
