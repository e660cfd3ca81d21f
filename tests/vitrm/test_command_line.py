"""Every setting is a flag, mistakes are one line with a suggestion, and all commands know their version."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
from processes import timed

import vitrm
from vitrm.command_line import COMMANDS
from vitrm.config import KINDS
from vitrm.errors import run_command
from vitrm.export import cli as export_cli
from vitrm.fields import Choice, Flag, OrNone, Several, Whole, declared
from vitrm.recipe import Recipe
from vitrm.runtime.bench import cli as bench_cli
from vitrm.runtime.predict import cli as predict_cli
from vitrm.training import cli as train_cli
from vitrm.training.parallel.device import Execution
from vitrm.training.run_config import DataSettings, RunConfig, parse

MAINS = {
    "vitrm-train": train_cli.main,
    "vitrm-export": export_cli.main,
    "vitrm-bench": bench_cli.main,
    "vitrm-predict": predict_cli.main,
}
MODULES = {name: main.__module__ for name, main in MAINS.items()}
FROM_DATA = {"classes", "mean", "std"}


def _other_value(setting, default):
    """Another value than the default, as text, and itself."""
    rule = setting.rule.rule if isinstance(setting.rule, OrNone) else setting.rule
    if isinstance(rule, Several):
        return "3,5,7", (3, 5, 7)
    if isinstance(rule, Choice):
        value = next(v for v in rule.values if v != default)
        return str(value), value
    if isinstance(rule, Whole):
        value = rule.low + (rule.low == default)
        return str(value), value
    return "0.5", 0.5


@pytest.mark.parametrize("kind", [*KINDS, "recipe"])
def test_every_setting_of_a_model_or_recipe_is_a_flag_and_a_key(kind):
    """None is skipped: a field that is added without a declaration, or whose flag does not come through, fails here."""
    make = KINDS.get(kind, Recipe)
    section = "recipe" if kind == "recipe" else "model"
    for field in dataclasses.fields(make):
        if field.name in FROM_DATA:
            continue
        setting = declared(make)[field.name]
        assert setting.help
        flag = f"--{field.name.replace('_', '-')}"
        if isinstance(setting.rule, Flag):
            words, value = [flag if not field.default else f"--no-{flag[2:]}"], not field.default
        else:
            text, value = _other_value(setting, field.default)
            words = [flag, text]
        given = getattr(train_cli.from_flags(train_cli.parser().parse_args(words)), section)
        given = {key: tuple(v) if isinstance(v, list) else v for key, v in given.items()}
        assert given == {field.name: value}
        assert setting.rule.accepted(given[field.name]) == value
        from_file = getattr(parse({section: {field.name: value}}, "file"), section)
        assert from_file == given


@pytest.mark.parametrize("settings", [Execution, DataSettings, RunConfig])
def test_all_other_declared_settings_are_flags_too(settings):
    known = train_cli.parser().format_help()
    for name, setting in declared(settings).items():
        assert (setting.flag or f"--{name.replace('_', '-')}") + " " in known.replace(",", " ")


def test_a_list_and_none_come_through_to_the_model():
    argv = ["--model", "nano-v2", "--stage-widths", "32,64", "--ffn-hidden", "none", "--patch-size", "4"]
    model, _ = train_cli.resolve(train_cli.from_flags(train_cli.parser().parse_args(argv)))
    assert model.stage_widths == (32, 64)
    assert model.ffn_hidden is None
    from_file, _ = train_cli.resolve(parse({"model": "nano-v2", "stage_widths": [32, 64]}, "file"))
    assert from_file.stage_widths == (32, 64)


@pytest.mark.parametrize(
    ("command", "argv", "message"),
    [
        ("vitrm-train", ["--eopchs", "3"], "--eopchs is unknown: did you mean --epochs?"),
        ("vitrm-train", ["--eopchs=3"], "--eopchs is unknown: did you mean --epochs?"),
        ("vitrm-export", ["--fp61"], "--fp61 is unknown: did you mean --fp16?"),
        ("vitrm-bench", ["--bacth", "1", "a.onnx"], "--bacth is unknown: did you mean --batch?"),
        ("vitrm-bench", ["--xyzzy"], "--xyzzy is unknown: see vitrm-bench --help"),
        ("vitrm-train", ["--epoch", "3"], "--epoch is unknown: did you mean --epochs?"),  # no abbreviations
        ("vitrm-train", ["--epochs", "ten"], "--epochs is 'ten', expected a whole number from 1 to 1,000,000"),
        ("vitrm-train", ["--stage-widths", "48,x"], "--stage-widths is '48,x', expected a list, each whole number"),
        ("vitrm-train", ["--epochs"], "--epochs: expected one argument"),
        ("vitrm-train", ["nano"], "nano is one argument too many"),
        ("vitrm-train", ["--tokenizer", "whitned"], "tokenizer is 'whitned', expected 'patch', 'conv' or 'whitened': did you"),
        ("vitrm-train", ["--model", "nanno"], "did you mean nano?"),
        ("vitrm-train", ["--recipe", "anytim"], "did you mean anytime?"),
        ("vitrm-train", ["--data", "cifar01"], "did you mean cifar10?"),
        ("vitrm-train", ["--model", "resnet18", "--latents", "3"], "unknown key latents for a resnet: it is a setting of vitrm"),
        ("vitrm-train", ["--deep-width", "8"], "unknown key deep_width for a vitrm: it is a setting of airbench"),
        ("vitrm-export", ["--graph", "lop"], "--graph: 'lop' is none of unrolled, loop, stepwise: did you mean loop?"),
        ("vitrm-predict", ["a.onnx", "b.jpg", "--tpo", "3"], "--tpo is unknown: did you mean --top?"),
        ("vitrm-train", ["--class-weights", "auto"], "--class-weights is unknown: classes of unequal size are made to count the same"),
        ("vitrm-export", ["--opset", "13"], "--opset is unknown: a file has the lowest opset that its operators need"),
        ("vitrm-export", ["--steps", "six"], "--steps is 'six', expected a whole number"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_with_a_suggestion(command, argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert MAINS[command](argv) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", MAINS)
def test_the_version_has_one_source(command, capsys):
    with pytest.raises(SystemExit) as ended:
        MAINS[command](["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"vitrm {vitrm.__version__}\n"


def test_the_package_says_which_commands_there_are():
    from importlib.metadata import distribution

    ended = subprocess.run([sys.executable, "-m", "vitrm"], capture_output=True, text=True, check=True)
    assert f"vitrm {vitrm.__version__}" in ended.stdout
    for name in COMMANDS:
        assert f"\n  {name} " in ended.stdout
    installed = {entry.name for entry in distribution("vitrm").entry_points if entry.group == "console_scripts"}
    assert installed == set(COMMANDS) == set(MAINS)
    assert distribution("vitrm").version == vitrm.__version__


@pytest.mark.parametrize("command", MAINS)
def test_help_is_quick_and_imports_no_libraries(command):
    heavy = "{'torch', 'numpy', 'onnx', 'onnxruntime', 'matplotlib', 'rich', 'sklearn'}"
    code = (
        f"import sys, {MODULES[command]} as cli\n"
        "try: cli.main(['--help'])\n"
        f"finally: print('loaded', sorted({heavy} & set(sys.modules)))"
    )
    ended, seconds = timed([sys.executable, "-c", code])
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == "loaded []"
    assert seconds < 1  # 0.2 on a quiet machine


def test_parsing_raises_nothing_that_a_command_does_not_print(capsys):
    assert run_command(lambda argv: train_cli.parser().parse_args(argv), ["--lr", "x"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


MISTYPED = (
    ("vitrm-train", "--data", "cifr10"),
    ("vitrm-train", "--model", "nno"),
    ("vitrm-train", "--recipe", "fst"),
    ("vitrm-train", "--init", "nano-cifr10"),
    ("vitrm-train", "--teacher", "nano-cifr10"),
    ("vitrm-train", "--config", "missing.toml"),
    ("vitrm-export", "nano-cifr10"),
    ("vitrm-export", "nano-cifr10", "--web", "page"),
    ("vitrm-export", "nano-cifar10", "--steps", "0"),
    ("vitrm-bench", "missing.onnx"),
    ("vitrm-bench", "--run", "nano-cifr10"),
    ("vitrm-predict", "missing.onnx", "a.png"),
)


def test_a_mistyped_name_does_not_wait_for_torch(tmp_path):
    """One process for all: whichever loads torch fails those after it, and is named."""
    code = (
        "import importlib, sys\n"
        f"for command, *arguments in {MISTYPED!r}:\n"
        f"    code = importlib.import_module({MODULES!r}[command]).main(arguments)\n"
        "    print(code, 'torch' in sys.modules, command, *arguments)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.splitlines() == [" ".join(("2", "False", *command)) for command in MISTYPED]
    assert done.stderr.count("did you mean") == 8, done.stderr
