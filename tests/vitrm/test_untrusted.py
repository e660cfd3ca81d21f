"""Files and numbers from anybody: one line, in little memory, or what they say; never another exception."""

from __future__ import annotations

import functools
import json
import os
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import NUMBERS, RAW, little_memory, mutants, refused_or_read
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vitrm import checkpoint, data
from vitrm.checkpoint import CONFIG_FILE, Checkpoint, build_model
from vitrm.config import PRESETS, ViTRMConfig, from_dict, to_dict
from vitrm.errors import UserError
from vitrm.preprocessing import Preprocessing
from vitrm.recipe import Recipe, recipe
from vitrm.system import strict_json
from vitrm.system.files import read_json
from vitrm.training import cli
from vitrm.training.optimizers import learning_rate
from vitrm.training.run_config import MODEL_KEYS, RECIPE_KEYS, parse, read
from vitrm.training.run_folder import state as training_state
from vitrm.training.run_folder.curves import draw_curves
from vitrm.training.run_folder.state import RunProgress
from vitrm.training.supervision import Learner


@pytest.fixture
def run(tmp_path, model) -> Path:
    """A run folder whose checkpoint says all that training says."""
    training = {
        "recipe": asdict(recipe("fast")),
        "seed": 0,
        "test_accuracy": [0.5, 0.25],
        "versions": {"vitrm": "0.1.0"},
    }
    of = {"name": "digits", "classes": [str(i) for i in range(10)], "image_size": 32, "train": 1295}
    weights = build_model(model).state_dict()
    checkpoint.save(tmp_path / "run", Checkpoint(model=model, data=of, training=training, weights=weights))
    return tmp_path / "run"


@pytest.mark.slow
def test_any_config_is_a_checkpoint_or_one_line(run):
    config = json.loads((run / CONFIG_FILE).read_text())
    del config["sha256"]
    refused = 0
    with little_memory():
        for what, text in mutants(config, 700):
            (run / CONFIG_FILE).write_text(text)
            with refused_or_read(what) as said:
                loaded = checkpoint.load(run)
                assert loaded.trained_depth is None or loaded.trained_depth >= 1
                loaded.build()
            refused += bool(said)
    assert refused > 350


@pytest.mark.slow
def test_any_settings_are_a_model_and_a_recipe_or_one_line(tmp_path):
    """Every field of the models and of the recipe with every value, in TOML; what a run asks before it imports torch."""
    path, refused, total = tmp_path / "run.toml", 0, 0
    values = [v for v in RAW if not v.startswith(("{", "null"))] + ["inf", "nan", "0x" + "f" * 5000, "2020-01-01"]
    with little_memory():
        for key in (*MODEL_KEYS, *RECIPE_KEYS, "seed", "teacher", "data", "download", "limit_train", "model", "recipe"):
            for value in values:
                path.write_text(f"{key} = {value}\n")
                with refused_or_read(f"{key} = {value[:60]}") as said:
                    settings = read(path)
                    for preset in {config.kind: name for name, config in PRESETS.items()}.values():
                        if key == "model" or key in {f.name for f in fields(PRESETS[preset])} or key in RECIPE_KEYS:
                            chosen, how = cli.resolve(replace(settings, model={"preset": preset, **settings.model}))
                            how.step_weights()
                            assert learning_rate(how, 0.5) > 0 or how.lr < 1e-300
                            assert from_dict(to_dict(chosen), "again") == chosen
                refused += bool(said)
                total += 1
    assert 0.5 * total < refused < total


@pytest.mark.parametrize(
    "text",
    [
        ".".join("a" * 30_000) + " = 1",  # a parser's minutes
        "a = " + "[" * 30_000,
        "a = " + "{a=" * 10_000,
        "lr = " + "9" * 60_000,
        "#" * 70_000,
        "\0",
    ],
)
def test_toml_that_is_none_is_refused_at_once(tmp_path, text):
    (tmp_path / "run.toml").write_text(text)
    with little_memory(), refused_or_read(text[:20], seconds=1) as said:
        read(tmp_path / "run.toml")
    assert said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 10**5, "nested deeper than 64"),
        ("[" + "{}," * 10**6 + "1]", "more than 200,000 lists and objects"),
        ('{"a": ' + "9" * 10**6 + "}", "more than 64 bits"),
        ('{"a": 1e400}', "not finite"),
        ('{"a": NaN}', "NaN, which is no JSON"),
        ('{"a": 1, "a": 2}', "the key 'a' twice"),
        ('{"a": "\\ud800"}', "half a character"),
        (" " * (9 << 20), "more than 8,388,608 bytes"),
        ("[]", "holds a JSON list, expected an object"),
    ],
)
def test_json_that_is_none_is_refused_at_once(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with little_memory(), refused_or_read(text[:20], seconds=2) as said:
        read_json(tmp_path / "a.json", "it")
    assert message in said[0]


def test_a_name_that_is_no_utf8_can_be_read_back(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    (tmp_path / "a.json").write_text(json.dumps({"classes": [name]}))
    assert read_json(tmp_path / "a.json", "it") == {"classes": [name]}


@pytest.fixture
def state(tmp_path, model) -> tuple[Path, dict[str, Any], Learner]:
    """A training state, its run's identity and a learner that it fits."""
    how = recipe("fast")
    learner = Learner(build_model(model), how, torch.device("cpu"), False)
    data = {"name": "digits", "train": 64, "preprocessing": Preprocessing.unrecorded(model.image_size).to_dict()}
    identity = {"model": to_dict(model), "recipe": asdict(how), "data": data, "seed": 0}
    line = {"epoch": 1, "train_loss": 1.0, "train_accuracy": 0.5, "validation_accuracy": [0.5, 0.5], "lr": 0.1}
    line |= {"validation_loss": [1.0, 1.0], "seconds": 1.0, "halt": None}
    for parameter in learner.model.parameters():
        moments = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        learner.optimizers[0].state[parameter] = {"step": torch.tensor(1.0), **moments}
    progress = RunProgress(epoch=1, history=[line], best={"epoch": 1, "accuracy": 0.5, "loss": 1.0})
    progress.sums = torch.zeros(4, dtype=torch.float64)
    settings = {
        "data": {"name": "digits"},
        "model": {"preset": "tiny"},
        "recipe": {"lr": 0.1},
        "seed": 0,
        "teacher": None,
    }
    training_state.save(tmp_path / "state.safetensors", learner, progress, identity, settings)
    return tmp_path / "state.safetensors", identity, learner


def _header(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["vitrm_state"])


def _write(path: Path, header: str) -> None:
    save_file(load_file(path), path, {"vitrm_state": header})


def test_no_flipped_bit_of_a_state_is_resumed(state):
    path, identity, _ = state
    raw = path.read_bytes()
    size = 8 + int.from_bytes(raw[:8], "little")
    before, tensors = training_state.read(path, identity)
    said = len(raw[:size].rstrip())  # spaces fill the header up
    places = [*range(0, said, 23), *range(size, len(raw), (len(raw) - size) // 100)]
    for place in places:
        flipped = bytearray(raw)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        with refused_or_read(f"byte {place} of {size} + {len(raw) - size}") as refusal:
            training_state.read(path, identity)
        assert refusal, f"byte {place}: {raw[place - 20 : place + 20]!r}"
    path.write_bytes(raw)
    again, same = training_state.read(path, identity)
    assert again == before
    assert all(torch.equal(same[k], v) for k, v in tensors.items())


@pytest.mark.slow
def test_any_header_of_a_state_is_a_run_or_one_line(state, tmp_path):
    path, identity, learner = state
    header = _header(path)
    del header["sha256"]
    refused = 0
    with little_memory():
        for what, text in mutants(header, 250):
            try:
                sealed = {**json.loads(text), "sha256": strict_json.digest(json.loads(text))}
                text = json.dumps(sealed)
            except (ValueError, RecursionError):
                pass  # no JSON: read as it is
            _write(path, text)
            with refused_or_read(what) as said:
                found, tensors = training_state.read(path, identity)
                progress = training_state.restore(path, found, tensors, learner)
                if progress.history != header["history"]:
                    draw_curves(progress.history, tmp_path / "curve.png", "title")
                parse({k: v for k, v in found["settings"].items() if v is not None}, "settings")
            refused += bool(said)
    assert refused > 125


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sums", torch.zeros(3, dtype=torch.float64)),
        ("sums", torch.zeros(4)),
        ("optimizer.y0.exp_avg", torch.zeros(3)),
        ("optimizer.y0.exp_avg", None),
        ("optimizer.y0.more", torch.zeros(3)),
        ("optimizer.y0.step", torch.tensor(float("nan"))),
        ("model.y0", torch.full((1, 1, 16), float("inf"))),
        ("ema.y0", torch.zeros(1, 1, 16, dtype=torch.bfloat16)[..., :3]),
        ("huge", torch.zeros(40_000_000)),
    ],
)
def test_tensors_of_a_state_that_do_not_fit_are_refused(state, name, value):
    path, identity, learner = state
    header, tensors = _header(path), load_file(path)
    tensors.pop(name, None)
    if value is not None:
        tensors[name] = value
    del header["sha256"]
    header["checksum"] = training_state._checksum(tensors, header["format"])
    header["sha256"] = strict_json.digest(header)
    save_file(tensors, path, {"vitrm_state": json.dumps(header)})
    with pytest.raises(UserError):
        training_state.restore(path, *training_state.read(path, identity), learner)


def test_a_state_of_version_0_1_0_is_resumed_with_a_note(state):
    path, identity, learner = state
    header = _header(path)
    assert training_state.note(header) == ""
    del header["sha256"]
    tensors = load_file(path)
    _write(path, json.dumps({**header, "format": 1, "checksum": training_state._checksum(tensors, 1)}))
    found, tensors = training_state.read(path, identity)
    assert training_state.restore(path, found, tensors, learner).epoch == 1
    assert "has no checksum" in training_state.note(found)


_NUMBERS = [f.name for f in (*fields(ViTRMConfig), *fields(Recipe)) if type(f.default) in (int, float)]
_NUMBER_FLAGS = [
    f"--{name.replace('_', '-')}"
    for name in (*_NUMBERS, "conv_layers", "stage_widths", "seed", "limit_train", "threads", "save_every")
    if name != "classes"
]


@pytest.mark.slow
def test_any_number_on_the_command_line_trains_or_is_one_line(tmp_path, capsys, monkeypatch):
    """Up to where training begins."""

    def begins(*args: Any, **settings: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vitrm.training.loop.train", begins)
    monkeypatch.setattr("vitrm.data.load", functools.cache(data.load))
    began = 0
    for flag in _NUMBER_FLAGS:
        for value in (*NUMBERS, "nan", "inf", "-inf", "0xff", "1_0", "x"):
            argv = ["--model", "tiny", f"{flag}={value}", "--out", str(tmp_path / "run"), "--device", "cpu"]
            with little_memory(1024):
                code = cli.main(argv)
            error = capsys.readouterr().err
            began += code == 130
            assert code in (2, 130), f"{flag}={value[:40]}"
            if code == 2:
                assert error.startswith("error: "), error
                assert error.count("\n") == 1
    torch.set_num_threads(1)
    assert began > 50


@pytest.mark.slow
@pytest.mark.parametrize(
    "flag", ["--out", "--data", "--data-dir", "--init", "--teacher", "--config", "--sweep", "--device"]
)
@pytest.mark.parametrize("name", ["a" * 5000, "a\0b", "/dev/zero", "n=" + "9" * 5000, "n=" + "[" * 5000])
def test_any_name_on_the_command_line_trains_or_is_one_line(flag, name, tmp_path, capsys, monkeypatch):
    def begins(*args: Any, **settings: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vitrm.training.loop.train", begins)
    monkeypatch.chdir(tmp_path)
    code = cli.main(["--model", "tiny", "--device", "cpu", f"{flag}={name}"])
    error = capsys.readouterr().err
    assert code == 2 or (code, flag) == (130, "--data-dir"), "digits need no folder"
    assert code == 130 or (error.startswith("error: ") and error.count("\n") == 1)
