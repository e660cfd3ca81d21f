"""The command line of vitrm-export, and what it asks for."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from vitrm.command_line import CommandParser, add_setting
from vitrm.config import ViTRMConfig
from vitrm.errors import UserError
from vitrm.export.web.options import WebOptions
from vitrm.fields import Choice, Setting, declared
from vitrm.runtime.artifact.graph_names import PLAN_SUFFIXES

if TYPE_CHECKING:
    from vitrm.export.tensorrt.options import PlanOptions

EXAMPLES = """examples:
  vitrm-export --steps 6 --fp16                      the run trained last, or the bundled default
  vitrm-export runs/mine --steps 16 -o mine.onnx
  vitrm-export runs/mine --graph loop                depth and halting threshold chosen at run time
  vitrm-export runs/mine --graph stepwise            a folder of three graphs: halted samples leave the batch
  vitrm-export runs/mine --steps 6 --halt-threshold 0.9 --every-step
  vitrm-export runs/mine --int8 --max-drop 0.3       what int8 loses more accuracy with stays floating point
  vitrm-export --steps 6 --fp16 -o engine.plan --gpu sm89      a TensorRT plan, and what it is in engine.plan.json
  vitrm-export mine.onnx -o mine.plan --batch 1,1,1 --batch 2,32,256
  vitrm-export runs/mine --hf mine-hf                for optimum and transformers
  vitrm-export runs/mine --triton models             a model of Triton Inference Server's repository
  vitrm-export runs/mine --web page --download       a page that runs the model in the browser, step by step
  vitrm-export --doctor                              which backends and GPUs are here, and what each can do

exit status: 0 done; 2 wrong input or settings, a full disk, too little memory; 130 interrupted (Ctrl-C, kill, a lost
terminal); 141 done, but nobody reads the output any more.
"""

# Options that make a plan of what is exported, without saying so.
_IMPLY_PLAN = (
    "gpu",
    "batch",
    "workspace",
    "timing_cache",
    "version_compatible",
    "hardware_compatible",
    "strip_weights",
    "refit",
    "tensorrt",
)


def parser() -> argparse.ArgumentParser:
    """The command line of vitrm-export."""
    p = CommandParser(
        "vitrm-export",
        "Exports a trained model to ONNX, or to a TensorRT plan, and verifies it against PyTorch on real images.",
        EXAMPLES,
        elsewhere={
            "--opset": "a file has the lowest opset that its operators need, 18, or 19 for int8 with float16",
            "--imgsz": "a file has the image size that was trained",
            "--half": "it is called --fp16",
        },
    )
    _add_places(p)
    _add_shape(p)
    _add_precision(p)
    _add_plan(p)
    _add_data(p)
    _add_page(p)
    p.add_argument(
        "--doctor", action="store_true", help="say which backends, versions and GPUs are here and what each can do"
    )
    return p


def _add_places(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "run",
        nargs="?",
        metavar="RUN",
        help="run folder or bundled checkpoint (default: the run trained last in ./runs, else the bundled one); for a plan "
        "also an .onnx file or stepwise folder that was exported before",
    )
    p.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="file to write, .onnx or .plan, or for stepwise a folder (default: named after run, depth and precision)",
    )
    p.add_argument(
        "--hf",
        type=Path,
        metavar="DIR",
        help="write a folder for Hugging Face's libraries instead: model.onnx, config.json and preprocessor_config.json",
    )
    p.add_argument(
        "--triton",
        type=Path,
        metavar="DIR",
        help="add a model to Triton Inference Server's repository DIR instead, or a version to a model that is there: "
        "config.pbtxt, labels.txt and VERSION/model.onnx",
    )
    p.add_argument("--triton-name", metavar="NAME", help="what to call it there (default: as the file would be called)")
    p.add_argument(
        "--web",
        type=Path,
        metavar="DIR",
        help="write a page instead that runs the model in the browser, in float32 and int8: static files for any web server",
    )


def _add_shape(p: argparse.ArgumentParser) -> None:
    shape, glimpses = p.add_argument_group("shape"), declared(ViTRMConfig)["glimpses"]
    assert isinstance(glimpses.rule, Choice)
    shape.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="recursion steps (default: as deep as the run was trained; deeper ones may answer worse); of loop and stepwise, "
        "the default at run time",
    )
    shape.add_argument(
        "--graph",
        choices=["unrolled", "loop", "stepwise"],
        default="unrolled",
        help="unrolled: the step N times, weights stored once (default); loop: steps and halting threshold are inputs; "
        "stepwise: embed, step and heads apart, and samples that halt leave the batch",
    )
    shape.add_argument(
        "--glimpses",
        choices=glimpses.rule.values,
        help=f"{glimpses.help}. A later step then costs a pass of the tokenizer (default: as trained)",
    )
    shape.add_argument(
        "--halt-threshold",
        type=float,
        metavar="P",
        help="keep a sample's answer once its halt_prob exceeds P (default: never)",
    )
    shape.add_argument(
        "--every-step",
        action="store_true",
        help="also output logits and halt_prob of each step (step_logits, step_halt_prob)",
    )


def _add_precision(p: argparse.ArgumentParser) -> None:
    precision = p.add_argument_group("precision")
    choice = precision.add_mutually_exclusive_group()
    choice.add_argument(
        "--fp16",
        dest="precision",
        action="store_const",
        const="fp16",
        default="fp32",
        help="float16 inside, float32 inputs and outputs",
    )
    choice.add_argument(
        "--int8",
        dest="precision",
        action="store_const",
        const="int8",
        help="matmuls with weights in int8, calibrated on training images",
    )
    precision.add_argument(
        "--target",
        choices=["cpu", "tensorrt"],
        help="what int8 is for: ONNX Runtime on a CPU (default), or TensorRT, with float16 around the matmuls",
    )
    precision.add_argument(
        "--int8-convolutions",
        action="store_true",
        default=None,
        help="the tokenizer's convolutions in int8, too, on a CPU: a smaller and faster file, and more answers that change",
    )
    precision.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="read int8's activation ranges from this file, or write them to it, with a picture, if it is not there yet",
    )
    precision.add_argument(
        "--estimator",
        choices=["minmax", "percentile", "mse", "entropy"],
        help="how a range follows from the values met: all of them (minmax), the inner 99.99 %% (percentile), least squared "
        "error (mse, default) or least divergence (entropy)",
    )
    precision.add_argument(
        "--max-drop",
        type=float,
        metavar="POINTS",
        help="keep those layers of int8 in floating point that hurt most, until at most POINTS percentage points of accuracy "
        "are lost on the validation images",
    )
    precision.add_argument(
        "--sensitivity",
        type=Path,
        metavar="FILE",
        help="write how much int8 at each layer, step and role alone changes the answer: JSON, and a picture beside it",
    )


def _add_plan(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group(
        "TensorRT", "A plan is built from the same ONNX graph; int8 in it is that of --target tensorrt."
    )
    g.add_argument(
        "--plan", action="store_true", help="build a TensorRT plan, as -o NAME.plan does; of stepwise a folder of three"
    )
    g.add_argument(
        "--gpu",
        action="append",
        type=_gpus,
        metavar="SM",
        help="compute capability to build for, such as sm89, or several: sm86,sm89 (default: the GPU here; TensorRT for RTX "
        "without one: all from sm80 on)",
    )
    g.add_argument(
        "--batch",
        action="append",
        type=_batches,
        metavar="MIN,OPT,MAX",
        help="batch sizes of an optimization profile, fastest at OPT (default: 1,8,64); may be given several times",
    )
    g.add_argument("--workspace", type=int, metavar="MIB", help="limit of the builder's scratch memory on the GPU")
    g.add_argument(
        "--timing-cache",
        type=Path,
        metavar="FILE",
        help="TensorRT's measurements of kernels, to build faster next time (default: beside the plan)",
    )
    g.add_argument(
        "--version-compatible",
        action="store_true",
        help="the plan also runs in later TensorRT of the same major version",
    )
    g.add_argument(
        "--hardware-compatible",
        action="store_true",
        help="the plan also runs on other GPUs of compute capability 8.0 and later",
    )
    weights = g.add_mutually_exclusive_group()
    weights.add_argument(
        "--strip-weights", action="store_true", help="a plan without weights: they stay in an ONNX file beside it"
    )
    weights.add_argument("--refit", action="store_true", help="a plan whose weights can be replaced")
    g.add_argument(
        "--tensorrt", choices=["full", "rtx"], help="which one, where TensorRT and TensorRT for RTX are both installed"
    )


def _add_data(p: argparse.ArgumentParser) -> None:
    checks = p.add_argument_group(
        "data, for verification, calibration and --max-drop",
        "A file gets its name when it answers like PyTorch on 64 validation images, or on those that 10 s suffice for (at "
        "least 7): no logit may differ by more than 1e-4 (fp32), 0.03 (fp16) or 0.2 (int8) times the largest logit. At int8 "
        "that tells a wrong graph from a right one; what int8 costs in accuracy, --max-drop and vitrm-bench measure.",
    )
    checks.add_argument(
        "--data-dir",
        metavar="DIR",
        help="where the run's data set is: CIFAR's files (default: $VITRM_DATA, else ./data), or a folder of images that has moved",
    )


def _add_page(p: argparse.ArgumentParser) -> None:
    page = p.add_argument_group("page in the browser (--web)")
    for name, setting in _page_flags().items():
        add_setting(page, name, setting)


def _page_flags() -> dict[str, Setting]:
    """The settings of a page that have flags of their own; its depth and threshold are those of every export."""
    return {name: setting for name, setting in declared(WebOptions).items() if name not in ("steps", "halt_threshold")}


def page_options(args: argparse.Namespace) -> WebOptions | None:
    """The settings of a page, where one is asked for.

    Raises `UserError` for them without --web, and for what a page has not to choose.
    """
    given = {
        name: getattr(args, dest)
        for name, setting in _page_flags().items()
        if hasattr(args, dest := (setting.flag or name).lstrip("-").replace("-", "_"))
    }
    if args.web is None:
        if given:
            setting = _page_flags()[next(iter(given))]
            raise UserError(f"{setting.flag} is for a page: add --web DIR, or leave it out")
        return None
    if args.output or args.hf or args.triton or args.triton_name:
        raise UserError("--web DIR names the output: leave out -o, --hf and --triton")
    others = [
        name for name in ("plan", *_IMPLY_PLAN, "every_step", "int8_convolutions", "sensitivity") if getattr(args, name)
    ]
    if others:
        raise UserError(
            f"{flag(others[0])} is not for --web, whose page runs ONNX graphs one step at a time: leave it out"
        )
    if args.precision != "fp32" or args.target or args.graph == "loop":
        raise UserError(
            "--web writes float32 and int8 for the browser, one graph a step: leave out --fp16, --int8, --target and --graph"
        )
    depth = {name: getattr(args, name) for name in ("steps", "halt_threshold") if getattr(args, name) is not None}
    return WebOptions(**depth, **given)


def plan_options(args: argparse.Namespace) -> PlanOptions | None:
    """The options of a plan, where one is asked for.  Raises `UserError` for them with another kind of output."""
    asked = [name for name in _IMPLY_PLAN if getattr(args, name)]
    by_name = args.output is not None and args.output.suffix in PLAN_SUFFIXES
    if not args.plan and not by_name:
        if not asked:
            return None
        if args.hf or (args.output is not None and (args.graph != "stepwise" or args.output.suffix)):
            raise UserError(f"{flag(asked[0])} is for a TensorRT plan: name one with -o NAME.plan, or leave it out")
    from vitrm.export.tensorrt.options import DEFAULT_PROFILE, PlanOptions

    return PlanOptions(
        gpus=tuple(gpu for some in args.gpu or () for gpu in some),
        profiles=tuple(args.batch or (DEFAULT_PROFILE,)),
        workspace_mib=args.workspace,
        timing_cache=args.timing_cache,
        version_compatible=args.version_compatible,
        hardware_compatible=args.hardware_compatible,
        strip_weights=args.strip_weights,
        refit=args.refit,
        flavour=args.tensorrt,
    )


def check_precision_options(args: argparse.Namespace) -> None:
    """Raises `UserError` for options of int8 at another precision, and for an impossible --max-drop."""
    if args.precision != "int8":
        for option in ("int8_convolutions", "calibration", "target", "estimator", "max_drop", "sensitivity"):
            if getattr(args, option) is not None:
                raise UserError(f"{flag(option)} is for int8: add --int8, or leave it out")
    if args.max_drop is not None and not 0 <= args.max_drop <= 100:
        raise UserError(f"--max-drop is {args.max_drop}, expected 0 to 100 percentage points")


def check_decided(args: argparse.Namespace, source: Path) -> None:
    """Raises `UserError` for options that were decided when `source` was exported."""
    for name in (
        "steps",
        "glimpses",
        "halt_threshold",
        "hf",
        "web",
        "every_step",
        "target",
        "calibration",
        "max_drop",
        "sensitivity",
    ):
        if getattr(args, name) not in (None, False):
            raise UserError(f"{flag(name)} was decided when {source} was exported: name the run instead")
    if args.precision != "fp32" or args.graph != "unrolled":
        raise UserError(f"graph and precision were decided when {source} was exported: name the run instead")


def flag(option: str) -> str:
    """The flag of an option: "--max-drop" for "max_drop"."""
    return f"--{option.replace('_', '-')}"


def _gpus(text: str) -> tuple[str, ...]:
    from vitrm.export.tensorrt.options import normal_gpu

    try:
        return tuple(normal_gpu(part) for part in text.split(","))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _batches(text: str) -> tuple[int, int, int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) == 1:
        numbers *= 3
    if len(numbers) != 3 or not 1 <= numbers[0] <= numbers[1] <= numbers[2]:
        raise argparse.ArgumentTypeError(f"{text!r} is not MIN,OPT,MAX with 1 ≤ MIN ≤ OPT ≤ MAX, such as 1,8,64")
    return numbers[0], numbers[1], numbers[2]
