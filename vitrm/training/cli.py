"""vitrm-train: trains a model into a run folder."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitrm.checkpoint import RUNS, load
from vitrm.config import PRESETS, ModelConfig, ViTRMConfig, preset, to_dict
from vitrm.data import DATASETS
from vitrm.errors import UserError, run_command
from vitrm.fields import shown
from vitrm.system.files import check_name
from vitrm.system.memory import shortage_explained
from vitrm.system.terminal import say
from vitrm.training.parallel.device import start_anew_tuned
from vitrm.training.recipe import RECIPES, TEACHER_KEYS, Recipe, default_recipe, recipe
from vitrm.training.run_config import MODEL_KEYS, RunConfig, parse, read
from vitrm.training.sweep import CSV_FILE, Axis, Cell, Row, cells, parse_axes, sweep

if TYPE_CHECKING:
    from vitrm.checkpoint import Checkpoint
    from vitrm.training.loop import Splits, TrainingResult
    from vitrm.training.parallel.device import Execution
    from vitrm.training.parallel.distributed import World

DEFAULT_DATA = "digits"
DEFAULT_MODEL = "nano"
_MODEL_FLAGS = (
    "image_size",
    "patch_size",
    "tokenizer",
    "dim",
    "heads",
    "layers",
    "ffn",
    "latents",
    "n",
    "recursions",
    "dropout",
)
_RECIPE_FLAGS = (
    "epochs",
    "batch_size",
    "lr",
    "weight_decay",
    "n_sup",
    "supervision",
    "free_steps",
    "flip",
    "ema_decay",
    "patience",
    "distill_weight",
    "teacher_steps",
)
_EPILOG = """\
examples:
  vitrm-train                                             nano on scikit-learn's digits, a few minutes on a CPU
  vitrm-train --data cifar10 --download --epochs 4        nano on CIFAR-10
  vitrm-train --data photos/ --image-size 64              a folder of images, one folder per class
  vitrm-train --data cifar10 --model paper --device cuda  the paper's model and recipe
  vitrm-train --config run.toml --seed 1                  settings from a file (its keys: see vitrm.training.run_config)
  vitrm-train --data photos/ --init runs/nano-cifar10     start from other weights
  vitrm-train --data cifar10 --init runs/a --recipe deepen --out runs/b   a second stage, for deeper steps
  vitrm-train --data cifar10 --teacher runs/resnet18-cifar10      learn from a trained model's answers, too
  vitrm-train --sweep n=1,2,3 n_sup=1,2,4 --out runs/ablation   a run per combination, a table and two pictures
  vitrm-train --out runs/nano-digits --resume             continue a run that was interrupted
  torchrun --nproc-per-node 4 -m vitrm.training.cli --model paper --data cifar10    on four GPUs; --batch-size is the whole batch

The run folder gets config.json and model.safetensors (the checkpoint: averaged weights of the best
validation result), metrics.jsonl, curve.png and state.safetensors (what --resume continues from).

exit status: 0 done; 2 wrong input or settings, a full disk, too little memory; 130 interrupted (Ctrl-C, kill, a lost
terminal); 141 done, but nobody reads the output any more.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="vitrm-train",
        description="Trains a ViTRM, or a baseline to compare it with, into a run folder.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
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
    p.add_argument(
        "--teacher",
        metavar="RUN",
        help="learn from this model's answers as well as from the labels: a run folder or a bundled name",
    )
    p.add_argument(
        "--sweep",
        nargs="+",
        metavar="NAME=V,V",
        help="a run for every combination of these settings (of model or recipe, or model, recipe, seed, limit_train), "
        "in folders under --out, with a table and a picture per setting; the same command goes on with a stopped sweep",
    )
    p.add_argument("--seed", type=int, help="of weights, order, augmentation and dropout (default: 0)")

    g = p.add_argument_group("data")
    g.add_argument(
        "--data",
        metavar="NAME|DIR",
        help=f"digits, cifar10, cifar100 or a folder of class folders (default: {DEFAULT_DATA})",
    )
    g.add_argument("--data-dir", metavar="DIR", help="where CIFAR's files are (default: $VITRM_DATA, else data)")
    g.add_argument(
        "--download", action=argparse.BooleanOptionalAction, help="fetch CIFAR into --data-dir if it is not there"
    )
    g.add_argument("--limit-train", type=int, metavar="N", help="train on N images only, drawn from all classes")

    g = p.add_argument_group("model", "the preset's values hold where no flag is given")
    g.add_argument("--model", metavar="PRESET", help=f"{', '.join(PRESETS)} (default: {DEFAULT_MODEL})")
    g.add_argument("--image-size", type=int, metavar="PIXELS", help="height and width that images are brought to")
    g.add_argument("--patch-size", type=int, metavar="PIXELS", help="one token per patch of this size")
    g.add_argument("--tokenizer", choices=("patch", "conv"), help="linear patches (the paper) or convolutions")
    g.add_argument("--dim", type=int, metavar="D", help="token width")
    g.add_argument("--heads", type=int, help="attention heads")
    g.add_argument("--layers", type=int, metavar="K", help="layers of the shared block")
    g.add_argument("--ffn", choices=("gelu", "swiglu"), help="feed-forward network")
    g.add_argument("--latents", type=int, metavar="K", help="latent tokens")
    g.add_argument("--n", type=int, help="latent updates per recursion")
    g.add_argument("--recursions", type=int, metavar="T", help="recursions per step")
    g.add_argument("--dropout", type=float, metavar="P", help="in [0, 1)")

    g = p.add_argument_group("recipe", "the recipe's values hold where no flag is given")
    g.add_argument(
        "--recipe",
        metavar="NAME",
        help=f"{', '.join(RECIPES)} (default: paper for the paper's models and the baselines, else anytime)",
    )
    g.add_argument("--epochs", type=int, help="passes over the training images, at most")
    g.add_argument("--batch-size", type=int, metavar="IMAGES", help="images per batch")
    g.add_argument("--lr", type=float, help="peak learning rate")
    g.add_argument("--weight-decay", type=float, metavar="W", help="AdamW's weight decay")
    g.add_argument("--n-sup", type=int, metavar="STEPS", help="supervised steps per batch")
    g.add_argument("--supervision", metavar="HOW", help="sequential (an update per step) or joint (one per batch)")
    g.add_argument("--free-steps", type=int, metavar="R", help="up to R steps without gradient before those")
    g.add_argument("--flip", metavar="WHEN", help="mirror images: auto, on or off (auto: not digits)")
    g.add_argument("--ema-decay", type=float, metavar="D", help="decay of the averaged weights")
    g.add_argument("--patience", type=int, metavar="EPOCHS", help="stop after so many without gain; 0: never")

    g.add_argument("--distill-weight", type=float, metavar="W", help="the teacher's share of the loss, in [0, 1]")
    g.add_argument("--teacher-steps", type=int, metavar="N", help="depth of a recursive teacher (default: its deepest)")

    g = p.add_argument_group("execution", "may differ from run to run, and when resuming")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    g.add_argument("--precision", default="auto", metavar="P", help="auto, fp32 or bf16 (default: auto)")
    g.add_argument(
        "--compile", action="store_true", help="torch.compile the training step: a minute or more at the start"
    )
    g.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads (default: torch's choice)")
    g.add_argument("--save-every", type=float, default=60.0, metavar="SECONDS", help="within an epoch (default: 60)")
    return p


def from_flags(args: argparse.Namespace) -> RunConfig:
    """What the flags say of the run."""

    def given(pairs: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in pairs.items() if v is not None}

    return RunConfig(
        data=given(
            {"name": args.data, "dir": args.data_dir, "download": args.download, "limit_train": args.limit_train}
        ),
        model=given({"preset": args.model, **{k: getattr(args, k) for k in _MODEL_FLAGS}}),
        recipe=given({"name": args.recipe, **{k: getattr(args, k) for k in _RECIPE_FLAGS}}),
        seed=args.seed,
        teacher=args.teacher,
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


def load_data(settings: RunConfig, image_size: int) -> Splits:
    """The three splits that the settings name.  Raises `UserError`."""
    from vitrm import data
    from vitrm.training.loop import Splits, limited

    name = settings.data.get("name", DEFAULT_DATA)
    parts = {
        split: data.load(
            name,
            split,
            data_dir=settings.data.get("dir"),
            size=image_size,
            download=settings.data.get("download", False),
        )
        for split in data.SPLITS
    }
    if "limit_train" in settings.data:
        parts["train"] = limited(parts["train"], settings.data["limit_train"])
    return Splits(parts["train"], parts["validation"], parts["test"])


def preset_fields(config: ModelConfig) -> dict[str, Any]:
    """A model section that gives `config`: its preset where one has these settings, else every field of a ViTRM.

    Raises `UserError` for a baseline that is no preset.
    """
    from_data = dict.fromkeys(("classes", "mean", "std"))
    wanted = {**to_dict(config), **from_data}
    for name, known in PRESETS.items():
        if {**to_dict(known), **from_data, "image_size": config.image_size} == wanted:
            return {"preset": name, "image_size": config.image_size}
    if not isinstance(config, ViTRMConfig):
        raise UserError(
            f"this {config.kind} is none of the presets: name its settings with --model and the flags after it"
        )
    return {"preset": DEFAULT_MODEL, **{k: v for k, v in wanted.items() if k in MODEL_KEYS}}


def default_out(settings: RunConfig, before: str = "") -> Path:
    """runs/MODEL-DATA, with `before` before MODEL."""
    data = Path(settings.data.get("name", DEFAULT_DATA)).name or "data"
    return RUNS / f"{before}{settings.model.get('preset', DEFAULT_MODEL)}-{data}"


def command(argv: Sequence[str] | None) -> int | None:
    """Parses, calls, prints."""
    args = parser().parse_args(argv)
    if argv is None:
        start_anew_tuned()
    if "WORLD_SIZE" in os.environ:
        # DistributedDataParallel warns where all parameters take part, which y₀ and z₀ do in some batches only.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    settings = from_flags(args)
    if args.config:
        settings = settings.over(read(args.config))
    init = None
    if args.init:
        init = _loaded(args.init)
        if not settings.model:
            settings.model.update(preset_fields(init.model))
    for key in ("name", "dir"):  # absolute, so that the run can be resumed and benched from elsewhere
        if os.path.isdir(settings.data.get(key, "")) and settings.data.get(key, "") not in ("", *DATASETS):
            settings.data[key] = str(Path(settings.data[key]).resolve())
    if settings.teacher and os.path.isdir(settings.teacher):
        settings.teacher = str(Path(settings.teacher).resolve())
    axes = parse_axes(args.sweep or [])
    wanted = cells(axes, settings)
    if axes and args.resume:
        raise UserError("a sweep goes on where it was stopped by itself: leave out --resume")
    out = Path(args.out) if args.out else default_out(settings, "sweep-" if axes else "")
    check_name(out, "--out")
    if not args.resume:
        for cell in wanted:
            resolve(cell.settings)  # a mistyped setting should not wait for torch

    from vitrm.training.parallel.device import Execution, keep_freed_memory
    from vitrm.training.parallel.distributed import join, losses_explained, own_device, restarted

    execution = Execution(
        device=own_device(args.device),
        precision=args.precision,
        compile=args.compile,
        threads=args.threads,
        save_every=args.save_every,
    )
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
    if axes or not world.main:
        return 0
    tested = " ".join(f"{100 * a:.2f}" for a in result.test_accuracy)
    depths = f" at 1 … {len(result.test_accuracy)} steps" if len(result.test_accuracy) > 1 else ""
    say(
        f"best epoch {result.best_epoch} of {result.epochs}: validation {100 * result.validation_accuracy:.2f} %\n"
        f"test accuracy{depths}: {tested} % ({result.test_images} images)\nthe checkpoint is {out}"
    )
    return 0


def _loaded(name: str) -> Checkpoint:
    """A checkpoint to learn from; says what of it could not be checked."""
    found = load(name)
    if found.note and os.environ.get("RANK", "0") == "0":
        say(f"note: {found.source}: {found.note}")
    return found


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
    from vitrm.training.loop import check_folder, check_not_in_use, train
    from vitrm.training.parallel.distributed import first_on_host
    from vitrm.training.progress import reporter
    from vitrm.training.state import STATE_FILE, read_header

    def saved() -> dict[str, Any] | None:
        """The settings of the run to be resumed, None for a new run."""
        check_not_in_use(out)  # before the images are loaded; `train` locks the folder
        if resume or (go_on and (out / STATE_FILE).exists()):
            check_folder(out, True)
            return read_header(out / STATE_FILE)["settings"]
        check_folder(out, False)
        return None

    found = world.shared(saved)
    if found is not None:
        settings = settings.over(parse({k: v for k, v in found.items() if v is not None}, str(out / STATE_FILE)))
        init = init if resume else None
    model, chosen = resolve(settings)
    teacher = _loaded(settings.teacher) if settings.teacher else None
    if settings.data.get("download") and first_on_host():
        load_data(settings, model.image_size)  # one process fetches, not all of a host at once
    world.any(False)
    with shortage_explained(lambda: "the images do not fit: bring them to a smaller --image-size, or free some"):
        data = load_data(settings, model.image_size)
    if world.main:
        _, bf16 = execution.resolve()
        among = f" × {world.size} processes" if world.size > 1 else ""
        say(
            f"{settings.model.get('preset', DEFAULT_MODEL)} on {data.train.name}: {len(data.train)} training, "
            f"{len(data.validation)} validation, {len(data.test)} test images of {len(data.train.classes)} classes, "
            f"{execution.resolve()[0]} {'bf16' if bf16 else 'fp32'}{among}, into {out}"
        )
    return train(
        model,
        chosen,
        data,
        out,
        seed=settings.seed or 0,
        resume=found is not None,
        init=init,
        teacher=teacher,
        execution=execution,
        reporter=reporter(chosen.epochs),
        settings=dataclasses.asdict(settings),
        world=world,
    )


def sweep_all(
    axes: Sequence[Axis], wanted: Sequence[Cell], out: Path, train_one: Callable[..., TrainingResult], world: World
) -> None:
    """Runs the cells one after the other and says what was found."""

    from vitrm.training.loop import alone_in

    def cell(one: Cell, folder: Path) -> Row:
        result = train_one(one.settings, folder, resume=False, go_on=True)
        model, chosen = resolve(one.settings)
        return Row(one, chosen.trained_depth if model.kind == "vitrm" else 1, result)

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
