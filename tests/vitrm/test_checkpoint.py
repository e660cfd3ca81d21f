"""Checkpoints: whole or refused, and never damaged by a save that failed."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def _edit(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes config.json as its owner may: without the checksums of what it was."""
    config = json.loads((run / CONFIG_FILE).read_text())
    del config["sha256"]
    change(config)
    (run / CONFIG_FILE).write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format",), 9, "format is 9, expected 1"),
        (("model", "kind"), "mlp", "model kind is 'mlp'"),
        (("model", "depth"), 3, "unknown key depth"),
        (("model", "dim"), -1, "dim is -1"),
        (("model", "dim"), 10**9, "dim is 1000000000, expected a whole number from 1 to 65,536"),
        (("model", "dim"), 60_000, "would have [0-9,]+ parameters, at most 1,000,000,000"),
        (("data",), [], "must be JSON objects"),
        (("training",), 3, "must be JSON objects"),
        (("data", "classes"), ["cat"], "names 1 classes, the model knows 10"),
        (("data", "classes"), [1] * 10, "expected a list of names"),
        (("sha512",), {}, "unknown key 'sha512'"),
        (("sha256",), {"config": "0" * 64}, "expected that of 'config' and of 'weights'"),
    ],
)
def test_a_config_of_something_else_is_refused(run, path, value, message):
    def change(place: dict[str, Any]) -> None:
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    _edit(run, change)
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
    _edit(run, lambda config: None)


@pytest.mark.parametrize("how", ["missing", "unexpected", "of another shape", "NaN"])
def test_weights_that_do_not_fit_are_refused(run, how):
    _change(run, how)
    with pytest.raises(UserError, match=how):
        checkpoint.load(run).build()


@pytest.mark.slow
def test_no_flipped_bit_is_loaded(run):
    """Refused, or the same checkpoint (what was a space, or a newline, between two values)."""
    before, dice = checkpoint.load(run), random.Random(0)
    for file, count in ((WEIGHTS_FILE, 300), (CONFIG_FILE, 800)):
        raw = (run / file).read_bytes()
        accepted = set()
        for bit in dice.sample(range(8 * min(len(raw), 4000)), count):
            flipped = bytearray(raw)
            flipped[bit // 8] ^= 1 << bit % 8
            (run / file).write_bytes(flipped)
            try:
                loaded = checkpoint.load(run)
            except UserError:
                continue
            accepted.add(raw[bit // 8 : bit // 8 + 1])
            assert (loaded.model, loaded.data, loaded.training) == (before.model, before.data, before.training)
            assert loaded.weights_id == before.weights_id
        assert accepted <= ({b" ", b"\n"} if file == CONFIG_FILE else set())
        (run / file).write_bytes(raw)


def test_damage_can_be_looked_at_by_whoever_asks_for_it(run):
    raw = bytearray((run / WEIGHTS_FILE).read_bytes())
    raw[-3] ^= 1
    (run / WEIGHTS_FILE).write_bytes(raw)
    with pytest.raises(UserError, match=r"is not the file that config\.json was written with \(SHA-256"):
        checkpoint.load(run)
    assert checkpoint.load(run, verify=False).weights_id != _checkpoint().weights_id


def test_a_checkpoint_without_checksums_is_loaded_with_a_note(run):
    assert checkpoint.load(run).note == ""
    _edit(run, lambda config: None)
    assert "without checksums" in checkpoint.load(run).note


@pytest.mark.parametrize("name", checkpoint.bundled())
def test_bundled_checkpoints_carry_their_checksums(name):
    assert checkpoint.load(name).note == ""


KILLED_SAVES = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_checkpoint import _checkpoint
from vitrm import checkpoint
real, new = os.replace, _checkpoint(1)
for folder in sys.argv[1:]:
    left = int(folder[-1])
    def replace(source, target):
        global left
        left -= 1
        os._exit(9) if left < 0 else real(source, target)
    if not os.fork():
        os.replace = replace
        checkpoint.save(folder, new)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.slow
def test_config_and_weights_stay_a_pair_whenever_a_save_is_killed(run, tmp_path):
    """Killed before its first, second and third rename, and not at all; the second one gives the weights their name."""
    made = [(earlier, renames) for earlier in ("none", "with checksums", "without") for renames in range(4)]
    folders = [tmp_path / f"{earlier} {renames}" for earlier, renames in made]
    for folder, (earlier, _) in zip(folders, made, strict=True):
        if earlier != "none":
            shutil.copytree(run, folder)
        if earlier == "without":
            _edit(folder, lambda config: None)
    code = KILLED_SAVES.format(tests=str(Path(__file__).parent))
    ended = subprocess.run([sys.executable, "-c", code, *map(str, folders)], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["9", "9", "9", "0"] * 3
    for folder, (earlier, renames) in zip(folders, made, strict=True):
        if earlier == "none" and renames < 2:
            with pytest.raises(UserError, match="does not exist"):
                checkpoint.load(folder)
        else:
            loaded, seed = checkpoint.load(folder), int(renames >= 2)
            assert (loaded.training, loaded.weights_id) == ({"seed": seed}, _checkpoint(seed).weights_id)
        checkpoint.save(folder, _checkpoint(2))
        assert checkpoint.load(folder).training == {"seed": 2}
        assert sorted(p.name for p in folder.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]


def test_a_reader_beside_a_writer_gets_one_save_whole(run):
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_checkpoint import _checkpoint; from vitrm import checkpoint\n"
        "made = [_checkpoint(seed) for seed in (0, 1)]; print('ready', flush=True)\n"
        "while True:\n    for one in made: checkpoint.save(sys.argv[1], one)"
    )
    ids = [_checkpoint(seed).weights_id for seed in (0, 1)]
    with subprocess.Popen([sys.executable, "-c", code, str(run)], stdout=subprocess.PIPE, text=True) as writer:
        try:
            assert writer.stdout.readline() == "ready\n"
            for _ in range(100):
                loaded = checkpoint.load(run)
                assert loaded.weights_id == ids[loaded.training["seed"]]
        finally:
            writer.kill()


@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
def test_what_is_no_file_is_not_opened(run, kind, file):
    (run / file).unlink()
    if kind == "fifo":
        os.mkfifo(run / file)
    elif kind == "folder":
        (run / file).mkdir()
    else:
        (run / file).symlink_to("/dev/zero")
    with pytest.raises(UserError, match="expected a regular file"):
        checkpoint.load(run)


def _lying(header: dict[str, Any], held: int = 0) -> bytes:
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(held)


@pytest.mark.parametrize(
    "content",
    [
        (2**63).to_bytes(8, "little") + b"{}",
        (10**9).to_bytes(8, "little") + b"{}",
        _lying({"y0": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 2**62]}}),
        _lying({"y0": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, 4),
        _lying({"y0": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}, 4),
        _lying({"y0": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}}, 4),
        _lying({"y0": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, 4),
        _lying({"y0": []}),
        (50_000).to_bytes(8, "little") + b"[" * 50_000,
    ],
)
def test_a_header_that_promises_too_much_is_refused(run, content):
    (run / WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        checkpoint.load(run)


def test_more_weights_than_the_model_can_have_are_not_read(run):
    with open(run / WEIGHTS_FILE, "wb") as file:
        file.write(_lying({"y0": {"dtype": "U8", "shape": [50 << 30], "data_offsets": [0, 50 << 30]}}))
        file.truncate(file.tell() + (50 << 30))  # a hole: it takes no space on the disk
    with pytest.raises(UserError, match="too many for the model of"):
        checkpoint.load(run)


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


def test_the_same_weights_look_anew_at_every_step(run):
    loaded, images = checkpoint.load(run), torch.rand(3, 3, 32, 32)
    looking = loaded.with_glimpses("shift")
    assert looking.weights_id == loaded.weights_id
    plain, other = loaded.build(), looking.build()
    assert torch.equal(plain(images, 1).logits, other(images, 1).logits), "the first view is the image"
    assert not torch.equal(plain(images, 2).logits, other(images, 2).logits)
    assert looking.with_glimpses("none").model == loaded.model


def test_mirror_images_are_refused_where_training_showed_none():
    digits = dataclasses.replace(_checkpoint(), training={"recipe": dataclasses.asdict(recipe("fast"))}, source="d")
    with pytest.raises(UserError, match=r"d was trained without mirror images.*--glimpses shift"):
        digits.with_glimpses("mirror")
    photos = dataclasses.replace(digits, data={**digits.data, "name": "cifar10"})
    assert photos.with_glimpses("mirror").model.glimpses == "mirror"
    unknown = dataclasses.replace(digits, training={})
    assert unknown.with_glimpses("mirror").model.glimpses == "mirror"
    baseline = dataclasses.replace(digits, model=preset("resnet20"))
    with pytest.raises(UserError, match="d is a cifar-resnet, which has no steps"):
        baseline.with_glimpses("shift")
