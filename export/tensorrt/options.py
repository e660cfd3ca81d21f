"""vitrm-export's options for TensorRT plans, and what it prints of one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from vitrm.errors import UserError
from vitrm.system.terminal import say

if TYPE_CHECKING:
    from collections.abc import Callable

    from vitrm.export.tensorrt.build import Built, EngineOptions

SUFFIXES = (".plan", ".engine")
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options' group."""
    g = parser.add_argument_group(
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


def wants_plan(args: argparse.Namespace) -> bool:
    """Whether a plan is asked for; raises `UserError` for options of a plan with another kind of output."""
    asked = [name for name in _IMPLY_PLAN if getattr(args, name)]
    by_name = args.output is not None and args.output.suffix in SUFFIXES
    if args.plan or by_name:
        return True
    if not asked:
        return False
    if args.hf or (args.output is not None and (args.graph != "stepwise" or args.output.suffix)):
        raise UserError(
            f"--{asked[0].replace('_', '-')} is for a TensorRT plan: name one with -o NAME.plan, or leave it out"
        )
    return True


def options(args: argparse.Namespace) -> EngineOptions:
    """What the command line asks of a plan."""
    from vitrm.export.tensorrt.build import BATCHES, EngineOptions

    return EngineOptions(
        gpus=tuple(gpu for some in args.gpu or () for gpu in some),
        profiles=tuple(args.batch or (BATCHES,)),
        workspace_mib=args.workspace,
        timing_cache=args.timing_cache,
        version_compatible=args.version_compatible,
        hardware_compatible=args.hardware_compatible,
        strip_weights=args.strip_weights,
        refit=args.refit,
        flavour=args.tensorrt,
    )


def from_onnx(args: argparse.Namespace, source: Path, progress: Callable[[str], None]) -> Built:
    """Builds a plan from a file, or stepwise folder, that vitrm-export made earlier."""
    from vitrm.export.tensorrt.build import build_engine

    fixed = ("steps", "halt_threshold", "hf", "every_step", "target", "calibration", "max_drop", "sensitivity")
    for name in fixed:
        if getattr(args, name) not in (None, False):
            raise UserError(f"--{name.replace('_', '-')} was decided when {source} was exported: name the run instead")
    if args.precision != "fp32" or args.graph != "unrolled":
        raise UserError(f"graph and precision were decided when {source} was exported: name the run instead")
    if not wants_plan(args) and args.output is not None:
        raise UserError(f"{args.output}: from an ONNX file a plan is made: name one with -o NAME.plan")
    stepwise = source.is_dir()
    default = source.with_name(f"{source.name}-plan") if stepwise else source.with_suffix(".plan")
    return build_engine(source, args.output or default, options(args), progress=progress)


def print_engine(built: Built, verified: bool | None) -> None:
    """The line about a plan; `verified` says whether it ran here and agreed with PyTorch (None: nobody asked)."""
    from vitrm.runtime.backends.tensorrt.api import NAMES

    e = built.engine
    batches = "; ".join(
        f"batch {low}" if low == high else f"batch {low} to {high}, best at {best}" for low, best, high in e.profiles
    )
    built_on = f" on an {e.gpu_name}" if e.gpu_name else ""
    say(
        f"  engine   {NAMES[e.flavour]} {e.version} for {', '.join(e.gpus)}{built_on}, {e.system}; {batches}; "
        f"{built.layers} layers before fusion, built in {built.seconds:.1f} s"
    )
    if verified is False:
        say("           the parity is that of its ONNX graph: the plan itself was not run, its GPU is not here")


def _gpus(text: str) -> tuple[str, ...]:
    from vitrm.export.tensorrt.build import normal_gpu

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
