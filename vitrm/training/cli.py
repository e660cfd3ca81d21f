"""vitrm-train: trains a model into a run folder."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitrm.checkpoint import RUNS, find, load
from vitrm.command_line import CommandParser, add_setting
from vitrm.config import KINDS, PRESETS, ModelConfig, ViTRMConfig, preset, to_dict
from vitrm.errors import UserError, run_command
from vitrm.fields import declared, shown
from vitrm.preprocessing import Preprocessing
from vitrm.recipe import RECIPES, TEACHER_KEYS, Recipe, default_recipe, recipe
from vitrm.system.files import check_name
from vitrm.system.memory import shortage_explained
from vitrm.system.terminal import say
from vitrm.tokens import FOLLOWING, following
from vitrm.training.parallel.device import Execution
from vitrm.training.parallel.process_tuning import keep_freed_memory, start_anew_tuned
from vitrm.training.run_config import (
    DEFAULT_MODEL,
    MODEL_KEYS,
    RECIPE_KEYS,
    TORCHVISION,
    DataSettings,
    RunConfig,
    parse,
    read,
)
from vitrm.training.sweep import CSV_FILE, Axis, Cell, SweepRow, cells, parse_axes, sweep

if TYPE_CHECKING:
    from vitrm.checkpoint import Checkpoint
    from vitrm.data import Splits
    from vitrm.training.loop import TrainingResult
    from vitrm.training.parallel.distributed import World
    from vitrm.training.start.preparation import TeacherModel

_ELSEWHERE = {  # flags of other trainers
    "--class-weights": "classes of unequal size are made to count the same by --balance loss or --balance sampling",
    "--pretrained": "--init RUN starts from other weights, --teacher torchvision:resnet50 learns from a network of ImageNet",
    "--weights": "--init RUN starts from other weights",
    "--imgsz": "it is called --image-size",
}
_EPILOG = """\
examples:
  vitrm-train                                             nano on scikit-learn's digits, a few minutes on a CPU
  vitrm-train --data cifar10 --download --epochs 4        nano on CIFAR-10
  vitrm-train --data photos/ --image-size 64              a folder of images, one folder per class
  vitrm-train --data cifar10 --model paper --device cuda  the paper's model and recipe
  vitrm-train --data photos/ --fit letterbox              nothing of a wide picture is cut off: it gets bars
  vitrm-train --config run.toml --seed 1                  settings from a file: its keys are the flags' names, as in batch_size = 64
  vitrm-train --data photos/ --init runs/nano-cifar10     start from other weights
  vitrm-train --data cifar10 --init runs/a --recipe deepen --out runs/b   a second stage, for deeper steps
  vitrm-train --data cifar10 --teacher runs/resnet18-cifar10      learn from a trained model's answers, too
  vitrm-train --data photos/ --teacher torchvision:resnet50       from what a network of ImageNet sees; …:FILE.pth for weights at hand
  vitrm-train --sweep n=1,2,3 n_sup=1,2,4 --out runs/ablation   a run per combination, a table and two pictures
  vitrm-train --out runs/nano-digits --resume             continue a run that was interrupted
  torchrun --nproc-per-node 4 -m vitrm.training.cli --model paper --data cifar10    on four GPUs; --batch-size is the whole batch

The run folder gets config.json and model.safetensors (the checkpoint: averaged weights of the best
validation result), metrics.jsonl, curve.png and state.safetensors (what --resume continues from); at the end results.json,
confusion.csv, confusion.png and mistakes.png: the test images by class.

exit status: 0 done; 2 wrong input or settings, a full disk, too little memory; 130 interrupted (Ctrl-C, kill, a lost
terminal); 141 done, but nobody reads the output any more.
"""


def parser() -> CommandParser:
    """The command line."""
    p = CommandParser(
        "vitrm-train",
        "Trains a ViTRM, or a baseline to compare it with, into a run folder.",
        _EPILOG,
        elsewhere=_ELSEWHERE,
        usage="vitrm-train [--data NAME|DIR] [--model PRESET] [--recipe NAME] [--out DIR] [--any-setting VALUE …]",
    )
    run = declared(RunConfig)
    p.add_argument("--config", metavar="FILE", help="settings in TOML; flags win over it")
    p.add_argument("--out", metavar="DIR", help=f"run folder (default: {RUNS}/MODEL-DATA)")
    p.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --out; its settings are taken from it, those given must agree",
    )
    p.add_argument(
        "--init", metavar="RUN", help="start from this checkpoint's weights and model: a run folder or a bundled name"
    )
    add_setting(p, "teacher", run["teacher"])
    p.add_argument(
        "--sweep",
        nargs="+",
        metavar="NAME=V,V",
        help="a run for every combination of these settings (of model or recipe, or model, recipe, seed, limit_train), "
        "in folders under --out, with a table and a picture per setting; the same command goes on with a stopped sweep",
    )
    add_setting(p, "seed", run["seed"])
    _add_model_flags(p)
    _add_recipe_flags(p)
    execution = p.add_argument_group("execution", "may differ from run to run, and when resuming")
    for name, setting in declared(Execution).items():
        add_setting(execution, name, setting)
    data = p.add_argument_group("data")
    for name, setting in declared(DataSettings).items():
        add_setting(data, name, setting)
    return p


def _add_model_flags(p: CommandParser) -> None:
    """Flags of the model's settings, first those of a ViTRM."""
    kinds = {kind: declared(config) for kind, config in KINDS.items()}
    own = p.add_argument_group("model", "the preset's values hold where no flag is given")
    own.add_argument(
        "--model",
        metavar="PRESET",
        default=argparse.SUPPRESS,
        help=f"{', '.join(PRESETS)} (default: {DEFAULT_MODEL})",
    )
    others = p.add_argument_group("model: settings of baselines alone")
    for name in MODEL_KEYS:
        settings = {kind: declarations[name] for kind, declarations in kinds.items() if name in declarations}
        if ViTRMConfig.kind in settings:
            add_setting(own, name, *settings.values())
        else:
            texts = dict.fromkeys(setting.explained for setting in settings.values())
            kinds_of = {text: [k for k, setting in settings.items() if setting.explained == text] for text in texts}
            add_setting(
                others, name, *settings.values(), help="; ".join(f"{', '.join(k)}: {t}" for t, k in kinds_of.items())
            )


def _add_recipe_flags(p: CommandParser) -> None:
    """Flags of the recipe's settings, in its groups."""
    group = p.add_argument_group("recipe", "the recipe's values hold where no flag is given")
    group.add_argument(
        "--recipe",
        metavar="NAME",
        default=argparse.SUPPRESS,
        help=f"{', '.join(RECIPES)} (default: the one called like the preset, else paper for the paper's models and the "
        "baselines, else anytime)",
    )
    for name, setting in declared(Recipe).items():
        if setting.group:
            group = p.add_argument_group(setting.group)
        add_setting(group, name, setting)


def from_flags(args: argparse.Namespace) -> RunConfig:
    """The settings of the run that the flags name."""
    given = vars(args)

    def named(keys: Iterable[str], **flags: str) -> dict[str, Any]:
        """Picks what is given of `keys`, and of the `flags` that are called otherwise than their key."""
        wanted = {**{key: key for key in keys}, **flags}
        return {key: given[flag] for key, flag in wanted.items() if flag in given}

    return RunConfig(
        data=named(("download", "limit_train", "fit", "cache", "skip_damaged"), name="data", dir="data_dir"),
        model=named(MODEL_KEYS, preset="model"),
        recipe=named(RECIPE_KEYS, name="recipe"),
        **named(("seed", "teacher")),
    )


def resolve(settings: RunConfig) -> tuple[ModelConfig, Recipe]:
    """The model's config and the recipe that the settings name, with their changes.  Raises `UserError`."""
    changes = dict(settings.model)
    name = changes.pop("preset", DEFAULT_MODEL)
    model = preset(name, **changes)
    changes = dict(settings.recipe)
    idle = [key for key in TEACHER_KEYS if key in changes]
    if idle and not settings.teacher:
        raise UserError(f"{idle[0]} is {shown(changes[idle[0]])}, but there is no teacher: name one with --teacher RUN")
    return model, recipe(changes.pop("name", default_recipe(name, model.kind)), model.kind, **changes)


def chosen_preprocessing(settings: RunConfig, image_size: int, earlier: Preprocessing | None = None) -> Preprocessing:
    """The preprocessing that the settings name; what they leave out is as in the run that is resumed, where there is an `earlier` one."""
    changes = {key: settings.data[key] for key in ("fit",) if key in settings.data}
    return dataclasses.replace(earlier or Preprocessing.square(image_size), size=(image_size, image_size), **changes)


def load_data(settings: RunConfig, preprocessing: Preprocessing) -> Splits:
    """The three splits that the settings name.  Raises `UserError`."""
    from vitrm import data
    from vitrm.data import Splits, limited

    chosen = DataSettings(**settings.data)
    with data.decoding_once():
        parts = {
            split: data.load(
                chosen.name,
                split,
                data_dir=chosen.dir,
                preprocessing=preprocessing,
                download=chosen.download,
                skip_damaged=chosen.skip_damaged,
                keep=chosen.cache,
                in_memory=data.memory() // 4,
            )
            for split in data.SPLITS
        }
    if chosen.limit_train is not None:
        parts["train"] = limited(parts["train"], chosen.limit_train)
    return Splits(parts["train"], parts["validation"], parts["test"])


def preset_fields(config: ModelConfig) -> dict[str, Any]:
    """A model section that gives `config`: its preset where one has these settings, else every field of a ViTRM.

    Raises `UserError` for a baseline that is no preset.
    """
    from_data = dict.fromkeys(("classes", "mean", "std"))
    wanted = {**to_dict(config), **from_data}
    for name in PRESETS:
        with suppress(UserError):  # a preset that cannot be of this size
            if {**to_dict(preset(name, image_size=config.image_size)), **from_data} == wanted:
                return {"preset": name, "image_size": config.image_size}
    if not isinstance(config, ViTRMConfig):
        raise UserError(
            f"this {config.kind} is none of the presets: name its settings with --model and the flags after it"
        )
    return {"preset": DEFAULT_MODEL, **{k: v for k, v in wanted.items() if k in MODEL_KEYS}}


def default_out(settings: RunConfig, before: str = "") -> Path:
    """runs/MODEL-DATA, with `before` before MODEL."""
    data = Path(DataSettings(**settings.data).name).name or "data"
    return RUNS / f"{before}{settings.model.get('preset', DEFAULT_MODEL)}-{data}"


def command(argv: Sequence[str] | None) -> int | None:
    """Parses, calls, prints."""
    args = parser().parse_args(argv)
    if argv is None:
        start_anew_tuned()
    if "WORLD_SIZE" in os.environ:
        # DistributedDataParallel warns where all parameters take part, which y₀ and z₀ do in some batches only.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    settings, init = _settings(args)
    axes = parse_axes(args.sweep or [])
    wanted = cells(axes, settings)
    if axes and args.resume:
        raise UserError("a sweep goes on where it was stopped by itself: leave out --resume")
    out = Path(args.out) if args.out else default_out(settings, "sweep-" if axes else "")
    check_name(out, "--out")
    if not args.resume:
        for cell in wanted:
            resolve(cell.settings)  # a mistyped setting should not wait for torch

    from vitrm.training.parallel.distributed import join, losses_explained, own_device, restarted

    given = {name: getattr(args, name) for name in declared(Execution) if hasattr(args, name)}
    execution = Execution(**{**given, "device": own_device(given.get("device", Execution.device))})
    device, _ = execution.resolve()
    keep_freed_memory()
    world = join(device)
    train_one = partial(run, init=init, execution=execution, world=world)
    with losses_explained(world):
        if axes:
            sweep_all(axes, wanted, out, train_one, world)
        else:
            # Processes that torchrun started anew go on, whatever the command said.
            result = train_one(settings, out, resume=args.resume, go_on=restarted())
        world.close()
    if not axes and world.main:
        _say_result(result)
    return 0


def _settings(args: argparse.Namespace) -> tuple[RunConfig, Checkpoint | None]:
    """The settings that flags and file name, with absolute paths, and the checkpoint of --init."""
    from vitrm.data.sources import DATASETS, check_known

    settings = from_flags(args)
    if args.config:
        settings = settings.over(read(args.config))
    init = None
    if args.init:
        if args.init.startswith(TORCHVISION) or args.init == "imagenet":
            raise UserError(
                f"--init {args.init}: a run starts from a run's weights; a network of ImageNet is a teacher, as in --teacher "
                "torchvision:resnet50"
            )
        init = _loaded(args.init)
        if "preset" not in settings.model:
            base = preset_fields(init.model)
            if "dim" in base:  # no preset: what follows an image size is written out
                base |= following(init.model, settings.model)
            settings.model = {**base, **settings.model}
    for key in ("name", "dir"):  # absolute, so that the run can be resumed and benched from elsewhere
        place = settings.data.get(key)
        if place and place not in DATASETS and os.path.isdir(place):
            settings.data[key] = str(Path(place).resolve())
    if settings.teacher and os.path.isdir(settings.teacher):
        settings.teacher = str(Path(settings.teacher).resolve())
    elif settings.teacher and settings.teacher.startswith(TORCHVISION):
        from vitrm.training.teachers.torchvision import absolute

        settings.teacher = absolute(settings.teacher)
    elif settings.teacher:
        find(settings.teacher)  # as of the data set: a mistyped name should not wait for torch
    if "name" in settings.data:
        check_known(settings.data["name"])
    return settings, init


def _say_result(result: TrainingResult) -> None:
    tested = " ".join(f"{100 * a:.2f}" for a in result.test_accuracy)
    depths = f" at 1 … {len(result.test_accuracy)} steps" if len(result.test_accuracy) > 1 else ""
    mean = ", the mean of its steps" if depths else ""
    say(
        f"best epoch {result.best_epoch} of {result.epochs}: validation {100 * result.validation_accuracy:.2f} %{mean}\n"
        f"test accuracy{depths}: {tested} % ({result.test_images} images)"
    )
    if result.by_class is not None:
        from vitrm.training.by_class import told

        say(told(result.by_class, result.training_images, result.out))
    say(f"the checkpoint is {result.out}")


def _loaded(name: str) -> Checkpoint:
    """Loads a checkpoint to learn from; says what of it could not be checked."""
    checkpoint = load(name)
    if checkpoint.note and os.environ.get("RANK", "0") == "0":
        say(f"note: {checkpoint.source}: {checkpoint.note}")
    return checkpoint


def _teacher(name: str) -> TeacherModel:
    """Loads the model that `--teacher` names."""
    if not name.startswith(TORCHVISION):
        return _loaded(name)
    from vitrm.training.teachers.torchvision import load as load_torchvision

    return load_torchvision(name)


def run(
    settings: RunConfig,
    out: Path,
    *,
    resume: bool,
    go_on: bool,
    init: Checkpoint | None,
    execution: Execution,
    world: World,
) -> TrainingResult:
    """Loads the data and trains, with progress.  `go_on`: resume if there is something to resume."""
    from vitrm.training.callbacks import loggers
    from vitrm.training.loop import train
    from vitrm.training.parallel.distributed import first_on_host
    from vitrm.training.progress import reporter
    from vitrm.training.run_folder.access import check_folder, check_not_in_use
    from vitrm.training.run_folder.state import STATE_FILE, preprocessing_in, read_header

    def saved() -> dict[str, Any] | None:
        """The header of the state of the run to be resumed, None for a new run."""
        check_not_in_use(out)  # before the images are loaded; `train` locks the folder
        if resume or (go_on and (out / STATE_FILE).exists()):
            check_folder(out, True)
            return read_header(out / STATE_FILE)
        check_folder(out, False)
        return None

    callbacks = loggers(execution.log or ())  # a package that is missing should not wait for the images
    earlier = world.broadcast(saved)
    if earlier is not None:
        settings = _resumed(settings, earlier, out / STATE_FILE)
        init = init if resume else None
    model, chosen = resolve(settings)
    teacher = _teacher(settings.teacher) if settings.teacher else None
    known = None if earlier is None else preprocessing_in(earlier, str(out / STATE_FILE))
    preprocessing = chosen_preprocessing(settings, model.image_size, known)
    if settings.data.get("download") and first_on_host():
        load_data(settings, preprocessing)  # one process fetches, not all of a host at once
    world.any(False)
    with shortage_explained(lambda: "the images do not fit: bring them to a smaller --image-size, or free some"):
        data = load_data(settings, preprocessing)
    if world.main:
        _say_start(settings, data, out, execution, world)
        for note in _notes(settings, model, chosen, data, begins=init is None and earlier is None):
            say(f"note: {note}")
    return train(
        model,
        chosen,
        data,
        out,
        seed=settings.seed or 0,
        resume=earlier is not None,
        init=init,
        teacher=teacher,
        execution=execution,
        reporter=reporter(chosen.epochs),
        callbacks=callbacks,
        settings=dataclasses.asdict(settings),
        world=world,
    )


def _resumed(settings: RunConfig, earlier: dict[str, Any], state: Path) -> RunConfig:
    """The settings over those of the earlier run, whose header is in the file `state`."""
    kept = {k: v for k, v in earlier["settings"].items() if v is not None}
    before = parse(kept, str(state))
    settings = settings.over(before)
    if all(settings.model.get(key) == before.model.get(key) for key in ("preset", "image_size")):
        # What an earlier version made of the image size is kept.
        follows = {key: value for key, value in earlier["identity"]["model"].items() if key in FOLLOWING}
        settings.model = {**follows, **settings.model}
    return settings


def _notes(settings: RunConfig, model: ModelConfig, chosen: Recipe, data: Splits, *, begins: bool) -> list[str]:
    """Lists what a user should know of the settings and the images; `begins`: the weights are random."""
    from vitrm.training.by_class import unequal_classes
    from vitrm.training.start.length import few_batches

    of_parts = dict.fromkeys(note for part in (data.train, data.validation, data.test) for note in part.notes)
    few = few_batches(len(data.train), chosen) if begins else None
    return [n for n in (followed(settings, model), *of_parts, unequal_classes(data.train, chosen), few) if n]


def followed(settings: RunConfig, model: ModelConfig) -> str:
    """Says which settings of the preset followed the image size; "" where none did."""
    own = to_dict(PRESETS[settings.model.get("preset", DEFAULT_MODEL)])
    new = to_dict(model)
    changed = [key for key in FOLLOWING if key not in settings.model and own.get(key) != new.get(key)]
    if not changed:
        return ""
    named = ", ".join(f"{key} {_listed(new[key])} instead of {_listed(own[key])}" for key in changed)
    tokens = f"{model.tokens} image tokens" if isinstance(model, ViTRMConfig) else "few enough image tokens"
    return f"for images of {model.image_size} pixels {named}, which makes {tokens}; --patch-size and the like choose otherwise"


def _listed(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _say_start(settings: RunConfig, data: Splits, out: Path, execution: Execution, world: World) -> None:
    device, bf16 = execution.resolve()
    among = f" × {world.size} processes" if world.size > 1 else ""
    say(
        f"{settings.model.get('preset', DEFAULT_MODEL)} on {data.train.name}: {len(data.train)} training, "
        f"{len(data.validation)} validation, {len(data.test)} test images of {len(data.train.classes)} classes, "
        f"{device} {'bf16' if bf16 else 'fp32'}{among}, into {out}"
    )


def sweep_all(
    axes: Sequence[Axis], wanted: Sequence[Cell], out: Path, train_one: Callable[..., TrainingResult], world: World
) -> None:
    """Runs the cells one after the other and says their results."""
    from vitrm.training.run_folder.access import alone_in

    def cell(one: Cell, folder: Path) -> SweepRow:
        result = train_one(one.settings, folder, resume=False, go_on=True)
        model, chosen = resolve(one.settings)
        return SweepRow(one, chosen.trained_depth if model.kind == "vitrm" else 1, result)

    def told(text: str) -> None:
        if world.main:
            say(text)

    with alone_in(out, world):
        rows = sweep(axes, wanted, out, cell, told, world.main)
    for row in rows:
        told(f"{row.cell.name}: test accuracy {100 * row.accuracy:.2f} % at step {row.depth}")
    told(f"the table is {out / CSV_FILE}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of vitrm-train."""
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
