"""vitrm-export: a run → a file for a device."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vitrm.errors import UserError, run_command
from vitrm.export.arguments import (
    check_decided,
    check_precision_options,
    page_options,
    parser,
    plan_options,
)
from vitrm.runtime.artifact.graph_names import PLAN_SUFFIXES
from vitrm.system.terminal import console, neutral_line, say, sparingly

if TYPE_CHECKING:
    from vitrm.checkpoint import Checkpoint
    from vitrm.export.targets.destination import Destination
    from vitrm.export.tensorrt.options import PlanOptions
    from vitrm.export.web.options import WebOptions

# Packages that exporting takes and a device that only runs artifacts may lack.
_PACKAGES = ("torch", "torchvision", "onnx", "onnx_ir", "onnxscript", "safetensors", "matplotlib", "sklearn", "rich")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(_export, argv)


def _export(argv: Sequence[str] | None) -> int:
    try:
        return _choose(parser().parse_args(argv))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in _PACKAGES:
            raise
        raise UserError(
            f"this needs {error.name}, which is not installed: pip install {error.name.split('.')[0].replace('_', '-')}, or export "
            "on a machine with all of vitrm's dependencies and copy the file"
        ) from None


def _choose(args: argparse.Namespace) -> int:
    """Does what is asked: an export, a plan from an ONNX file, a place in a repository, or a diagnosis."""
    if args.doctor:
        from vitrm.export.doctor import print_diagnosis

        print_diagnosis()
    elif args.triton and args.run and Path(args.run).suffix in (".onnx", *PLAN_SUFFIXES):
        _add_to_repository(args, Path(args.run))
    elif args.run is not None and (args.run.endswith(".onnx") or (Path(args.run) / "step.onnx").is_file()):
        _build_from_onnx(args, Path(args.run))
    elif (page := page_options(args)) is not None:
        _write_page(args, page)
    else:
        _export_run(args)
    return 0


def _export_run(args: argparse.Namespace) -> None:
    """Exports a run to a file, or to what is packed for others."""
    plan = plan_options(args)
    check_precision_options(args)
    from vitrm.export.settings import MAX_UNROLLED
    from vitrm.model_limits import NEVER

    if args.steps is not None and not 1 <= args.steps <= MAX_UNROLLED:
        raise UserError(f"--steps is {args.steps}, expected 1 to {MAX_UNROLLED}")
    checkpoint = _loaded(args)  # first: a mistyped name should not wait for what exports
    from vitrm.export.pipeline import export
    from vitrm.export.summary import summary

    destination = _destination(args, checkpoint, plan)
    say(
        f"{checkpoint.source} ({checkpoint.model.kind}, {checkpoint.data.get('name', 'unknown data')}) → {destination.announced}"
    )
    if checkpoint.note:
        say(f"  note     {checkpoint.note}")
    with _status() as progress, destination.opened() as path:
        result = export(
            checkpoint,
            path,
            steps=args.steps,
            graph=args.graph,
            precision=args.precision,
            halt_threshold=NEVER if args.halt_threshold is None else args.halt_threshold,
            every_step=args.every_step,
            target=args.target,
            int8_convolutions=bool(args.int8_convolutions),
            calibration=args.calibration,
            calibration_method=args.estimator or "mse",
            max_drop=args.max_drop,
            sensitivity_file=args.sensitivity,
            data_dir=args.data_dir,
            plan=plan,
            progress=progress,
        )
        shown = destination.complete(result)
    for line in summary(result, shown):
        say(line)
    elsewhere = result.plan is not None and not result.plan_verified and not args.triton
    say(f"next{', where its GPU is' if elsewhere else ''}: {destination.next_command}")


def _write_page(args: argparse.Namespace, options: WebOptions) -> None:
    """Writes a page that runs a run's model in the browser."""
    if args.max_drop is not None and not 0 <= args.max_drop <= 100:
        raise UserError(f"--max-drop is {args.max_drop}, expected 0 to 100 percentage points")
    checkpoint = _loaded(args)
    from vitrm.export.summary import page_summary
    from vitrm.export.web.page import write_page

    say(f"{checkpoint.source} ({checkpoint.model.kind}) → {args.web}")
    with _status() as progress:
        page = write_page(
            checkpoint,
            args.web,
            options,
            data_dir=args.data_dir,
            progress=progress,
            calibration=args.calibration,
            calibration_method=args.estimator or "mse",
            max_drop=args.max_drop,
        )
    for line in page_summary(page):
        say(line)
    say(f"next: python3 -m http.server --directory {shlex.quote(str(args.web))}, then open http://localhost:8000")


def _loaded(args: argparse.Namespace) -> Checkpoint:
    """The checkpoint of a run, whose steps look as the command says."""
    from vitrm import checkpoint as checkpoints

    checkpoint = checkpoints.load(args.run)
    return checkpoint if args.glimpses is None else checkpoint.with_glimpses(args.glimpses)


def _destination(args: argparse.Namespace, checkpoint: Checkpoint, plan: PlanOptions | None) -> Destination:
    """The place to export to.  Raises `UserError` for one that cannot take what is asked for."""
    from vitrm.export.targets.destination import HuggingFaceFolder, PlainFile, TritonRepository

    name = _default_name(args, checkpoint, plan)
    suffix = ".onnx" if plan is None else ".plan"
    if args.graph == "stepwise":
        suffix = "" if plan is None else "-plan"
    if args.triton_name and not args.triton:
        raise UserError("--triton-name is for --triton DIR: add it, or leave the name out")
    if args.triton:
        if args.output or args.hf:
            raise UserError("--triton DIR names the output: leave out -o and --hf")
        repository = TritonRepository(args.triton, args.triton_name or name, suffix)
        repository.check(graph=args.graph, every_step=args.every_step, plan=plan)
        return repository
    if args.hf:
        if args.output or args.graph != "unrolled":
            raise UserError(
                "--hf DIR names the output, and optimum feeds images alone: leave out -o, and --graph loop or stepwise"
            )
        folder = HuggingFaceFolder(args.hf)
        folder.check()
        return folder
    return PlainFile(args.output or Path(f"{name}{suffix}"))


def _default_name(args: argparse.Namespace, checkpoint: Checkpoint, plan: PlanOptions | None) -> str:
    """A name that says run, depth and precision."""
    from vitrm.export.settings import default_steps

    depth = ""
    if checkpoint.model.kind == "vitrm":
        depth = f"-{args.steps or default_steps(checkpoint)}steps" if args.graph == "unrolled" else f"-{args.graph}"
    target = args.target or ("cpu" if plan is None else "tensorrt")
    convolutions = "-convolutions" if args.int8_convolutions else ""
    precision = f"int8-{target}{convolutions}" if args.precision == "int8" else args.precision
    glimpses = f"-{args.glimpses}" if args.glimpses not in (None, "none") else ""
    return f"{Path(checkpoint.source).name}{glimpses}{depth}-{precision}"


def _build_from_onnx(args: argparse.Namespace, source: Path) -> None:
    """Builds a plan from a file, or stepwise folder, that was exported before."""
    from vitrm.export.summary import complaint_lines, plan_line
    from vitrm.export.tensorrt.build import build_engine

    check_decided(args, source)
    options = plan_options(args)
    if options is None and args.output is not None:
        raise UserError(f"{args.output}: from an ONNX file a plan is made: name one with -o NAME.plan")
    default = source.with_name(f"{source.name}-plan") if source.is_dir() else source.with_suffix(".plan")
    with _status() as progress:
        build = build_engine(source, args.output or default, options, progress=progress)
    say(f"{source} → {build.path}")
    say(plan_line(build))
    for line in complaint_lines(build):
        say(line)
    say(f"  file     {build.path}, {build.bytes / 1e6:.2f} MB")
    say(f"next: vitrm-bench {build.path}")


def _add_to_repository(args: argparse.Namespace, source: Path) -> None:
    """Adds a file that was exported before to a model repository of Triton Inference Server."""
    from vitrm.export.targets import triton

    if args.output or args.hf or args.precision != "fp32" or args.graph != "unrolled" or args.steps:
        raise UserError(
            f"--triton takes {source} as it is: leave out other outputs, --steps, --graph and the precision"
        )
    version = triton.add_file(args.triton, args.triton_name or source.stem, source)
    say(f"{source} → {version}")
    say(f"next: tritonserver --model-repository={args.triton}")


@contextmanager
def _status() -> Iterator[Callable[[str], None]]:
    """A spinner with the present stage on a terminal; elsewhere a line now and then."""
    if not sys.stderr.isatty():
        with sparingly() as take:
            yield lambda message: take(f"… {neutral_line(message)}")
        return
    from rich.text import Text

    with console(error=True).status("loading") as status:
        yield lambda message: status.update(Text(neutral_line(message)))  # no string: that would be read as markup


if __name__ == "__main__":
    sys.exit(main())
