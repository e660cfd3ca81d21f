"""`vitrm-bench`: parse, measure, print."""

from __future__ import annotations

import argparse
import math
import os
import shlex
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vitrm.command_line import CommandParser
from vitrm.errors import UserError, run_command
from vitrm.model_limits import MAX_STEPS
from vitrm.system.outputs import check_outputs
from vitrm.system.terminal import console, neutral_line, say, sparingly

if TYPE_CHECKING:
    from argparse import _ArgumentGroup as Group  # argparse has no public name for it

    from vitrm.runtime.bench.cases import ReportProgress
    from vitrm.runtime.bench.options import BenchOptions
    from vitrm.runtime.bench.rows import BenchResult

_EPILOG = """\
examples:
  vitrm-bench model.onnx                           against the eager model, on the test images it was trained for
  vitrm-bench a.onnx b.onnx --batch 1,8,64 --report bench.html
  vitrm-bench engine.plan a.onnx                   a TensorRT plan, on the GPU it was built for, and eager there
  vitrm-bench loop.onnx --steps 1-6                one file at six depths
  vitrm-bench loop.onnx --halting                  choose when easy images may stop
  vitrm-bench loop.onnx --halting --corruptions    and what becomes of that in noise, blur, fog …
  vitrm-bench fp32.onnx int8.onnx --peers          beside what other tools make of fp32.onnx
  vitrm-bench model.onnx --threads 1 --seconds 5   one core, longer
  vitrm-bench model.onnx --json bench.json --min-agreement 0.999   a gate for CI

exit status: 0 measured; 2 an artifact could not be measured, a gate failed, the input was wrong or standard output is
full; 130 interrupted; 141 measured and written, but nobody reads the table.
"""
_COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return run_command(_main, argv)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "vitrm-bench",
        "Measure exported files: latency, accuracy, and agreement with the eager model they came from.",
        _EPILOG,
    )
    parser.add_argument(
        "artifacts",
        nargs="*",
        metavar="ARTIFACT",
        help="what vitrm-export wrote: an .onnx or .plan file, or a stepwise folder; none with --run measures PyTorch alone",
    )
    _add_images(parser.add_argument_group("images"))
    _add_settings(parser.add_argument_group("batch sizes, depths and halting"))
    _add_comparisons(parser.add_argument_group("what artifacts are measured beside"))
    _add_machine(parser.add_argument_group("how they are measured"))
    _add_results(parser.add_argument_group("results"))
    return parser


def _add_images(group: Group) -> None:
    group.add_argument(
        "--data",
        help="digits, cifar10, cifar100 or a folder of images by class (default: the artifact's); of a new folder all images, "
        "or its test part where it has one; it may have some of the classes only",
    )
    group.add_argument("--data-dir", metavar="DIR", help="where CIFAR's files are (default: $VITRM_DATA, else data)")
    group.add_argument("--limit", type=_positive, metavar="N", help="use at most N test images (default: all)")
    group.add_argument(
        "--corruptions",
        action="store_true",
        help="measure artifacts on corrupted test images too (noise, blur, weather, digital; five severities): accuracy, and "
        "what halting gives up and halt_prob is worth there",
    )
    group.add_argument(
        "--corruption-images",
        type=_positive,
        metavar="N",
        help="test images that --corruptions makes 65 copies of (default: 1000, or all there are)",
    )


def _add_settings(group: Group) -> None:
    group.add_argument("--batch", type=_batches, default=(1, 32), metavar="N,N", help="batch sizes (default: 1,32)")
    group.add_argument(
        "--steps",
        type=_depths,
        default=(),
        metavar="N,N",
        help="depths to measure loop and stepwise artifacts at, such as 1,2,6 or 1-16 (default: the artifact's own)",
    )
    group.add_argument(
        "--halt-threshold",
        type=_thresholds,
        default=(),
        metavar="P,P",
        help="halting thresholds to measure them at, each with every depth; 1 never halts (default: the artifact's own)",
    )
    group.add_argument(
        "--halting",
        action="store_true",
        help="choose the halting threshold of loop and stepwise artifacts on the validation images, measure them with and "
        "without, and write it into them",
    )
    group.add_argument(
        "--max-drop",
        type=_points,
        metavar="POINTS",
        help="of accuracy that --halting may give up, in percentage points (default: 0.3)",
    )


def _add_comparisons(group: Group) -> None:
    group.add_argument("--run", help="checkpoint to compare with (default: the one the artifact was exported from)")
    group.add_argument("--no-eager", action="store_true", help="measure the artifacts alone, without torch")
    group.add_argument(
        "--compile",
        nargs="?",
        const=True,
        default=False,
        metavar="MODE",
        help="add a row for torch.compile, in a mode of its own such as max-autotune where one is named",
    )
    group.add_argument("--bf16", action="store_true", help="add rows for PyTorch in bfloat16")
    group.add_argument(
        "--peers",
        action="store_true",
        help="add rows for what other tools make of the same file: OpenVINO, NNCF, onnxruntime's quantize_static, optimum",
    )


def _add_machine(group: Group) -> None:
    group.add_argument(
        "--device",
        metavar="DEVICE",
        help="cpu, cuda, cuda:N or auto; default: cpu, cuda with --provider, auto with a plan among them",
    )
    group.add_argument(
        "--provider",
        choices=("cuda", "tensorrt", "tensorrt-rtx"),
        help="what ONNX Runtime runs .onnx files with on a GPU (default: cuda)",
    )
    group.add_argument("--threads", type=_positive, metavar="N", help="CPU threads (default: physical cores)")
    group.add_argument("--seconds", type=_seconds, default=2.0, metavar="S", help="measured per row (default: 2)")
    group.add_argument(
        "--no-power",
        action="store_true",
        help="leave energy out (it is measured, after latency, where there are sensors)",
    )
    group.add_argument(
        "--no-verify",
        action="store_true",
        help="open .onnx files that were changed on purpose after their export, whose SHA-256 is no longer the one they hold",
    )


def _add_results(group: Group) -> None:
    group.add_argument("--json", metavar="FILE", help="write the figures as JSON")
    group.add_argument("--report", metavar="FILE", help="write one self-contained HTML page")
    group.add_argument(
        "--min-agreement",
        type=_share,
        metavar="X",
        help="fail (exit 2) if an artifact gives another answer than eager on more than 1 − X of the images",
    )


def _main(argv: Sequence[str] | None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(argv)
    _check(args)

    from dataclasses import replace

    from vitrm.runtime.bench.run import bench

    with _progress() as progress:
        result = bench(args.artifacts, _options(args), progress=progress)
    result = replace(result, command=shlex.join(["vitrm-bench", *argv]))
    written = _write(result, args.json, args.report)  # first: printing may fail
    _print(result)
    for path in written:
        say(f"wrote {path}")
    _judge(result, args.min_agreement)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raises `UserError` for flags that do not go together, and for files that could not be written."""
    if not args.artifacts and not args.run:
        raise UserError("no artifact to measure: name what vitrm-export wrote, or a run for PyTorch alone with --run")
    for option in ("compile", "bf16"):
        if getattr(args, option) and args.no_eager:
            raise UserError(f"--{option} compares with torch and --no-eager leaves it out: choose one")
    if isinstance(args.compile, str) and args.compile not in _COMPILE_MODES:
        raise UserError(
            f"--compile {args.compile}: expected a mode of torch.compile, one of {', '.join(_COMPILE_MODES)} (put --compile "
            "behind the artifacts)"
        )
    if args.max_drop is not None and not args.halting:
        raise UserError("--max-drop says what --halting may give up: add --halting")
    if args.corruption_images is not None and not args.corruptions:
        raise UserError("--corruption-images says how many images --corruptions takes: add --corruptions")
    if args.halting and (args.halt_threshold or len(args.steps) > 1):
        raise UserError(
            "--halting chooses a threshold for one depth: leave out --halt-threshold, name at most one of --steps"
        )
    if args.min_agreement is not None and args.no_eager:
        raise UserError("--min-agreement needs the eager model: leave out --no-eager")
    for path in (args.json, args.report):
        if path:
            check_writable(path)
    if args.report:
        from vitrm.runtime.bench.report.page import check_libraries

        check_libraries()
    check_outputs(
        {"--json": args.json and Path(args.json), "--report": args.report and Path(args.report)},
        [Path(name) for name in (*args.artifacts, args.run) if name],
    )


def _options(args: argparse.Namespace) -> BenchOptions:
    """Makes the options of the bench that the flags ask for."""
    from vitrm.runtime.bench.options import BenchOptions
    from vitrm.runtime.bench.robustness.measure import IMAGES
    from vitrm.runtime.halting.choose import DEFAULT_BUDGET

    budget = DEFAULT_BUDGET if args.max_drop is None else args.max_drop / 100
    return BenchOptions(
        run=args.run,
        data=args.data,
        data_dir=args.data_dir,
        limit=args.limit,
        batches=args.batch,
        steps=args.steps,
        halt_thresholds=args.halt_threshold,
        max_drop=budget if args.halting else None,
        depths=bool(args.report),
        corruption_images=(args.corruption_images or IMAGES) if args.corruptions else None,
        eager=not args.no_eager,
        compile=args.compile,
        bf16=args.bf16,
        peers=args.peers,
        device=args.device or _device(args),
        provider=args.provider,
        threads=args.threads,
        seconds=args.seconds,
        power=not args.no_power,
        verify=not args.no_verify,
    )


def _device(args: argparse.Namespace) -> str:
    """Returns the device where none is named."""
    if args.provider:
        return "cuda"
    return "auto" if any(_is_plan(Path(a)) for a in args.artifacts) else "cpu"


def _is_plan(path: Path) -> bool:
    """Tells whether `path` is a TensorRT plan, or a folder of them: those run on a GPU alone."""
    return path.suffix in (".plan", ".engine") or (path / "step.plan").exists()


def _print(result: BenchResult) -> None:
    from vitrm.runtime.bench.report.by_class import plain_by_class, print_by_class
    from vitrm.runtime.bench.report.table import plain_text, print_result
    from vitrm.runtime.bench.robustness.table import plain_corruptions, print_corruptions

    try:
        # A pipe or a log has no width of its own: give the one wide table there.
        screen = console(width=None if sys.stdout.isatty() else 180)
    except ImportError:
        say(plain_text(result))
        if result.by_class:
            say("\n" + plain_by_class(result))
        if result.corruptions:
            say("\n" + plain_corruptions(result.corruptions))
    else:
        print_result(result, screen)
        print_by_class(result, screen)
        print_corruptions(result.corruptions, screen)


def _write(result: BenchResult, json_path: str | None, report_path: str | None) -> list[str]:
    """Writes what was asked for; returns the paths."""
    from vitrm.system.files import write_json, write_text

    if json_path:
        write_json(json_path, result.to_dict())
    if report_path:
        from vitrm.runtime.bench.report.page import render

        write_text(report_path, render(result))
    return [path for path in (json_path, report_path) if path]


def _judge(result: BenchResult, min_agreement: float | None) -> None:
    """Raises `UserError` for artifacts that failed, and for a gate that was not met."""
    complaints = [f"{row.name} could not be measured: {row.status}" for row in result.failed]
    if min_agreement is not None:
        failed = {row.name for row in result.failed}
        for row in {r.name: r for r in result.rows if r.kind == "artifact" and r.name not in failed}.values():
            if row.agreement is None:
                complaints.append(
                    f"{row.name}'s agreement could not be measured, --min-agreement {min_agreement} asks for it"
                )
            elif row.agreement < min_agreement:
                complaints.append(
                    f"{row.name} agrees with eager on {row.agreement:.6g} of {row.images} images, --min-agreement asks for {min_agreement}"
                )
    if complaints:
        raise UserError("; ".join(complaints))


def check_writable(path: str) -> None:
    """Raises `UserError` now rather than after minutes of measuring, if `path` could not be written."""
    target = Path(path)
    if target.is_dir():
        raise UserError(f"{path} is a folder: name a file")
    if target.exists() and not stat.S_ISREG(target.stat().st_mode):
        raise UserError(f"{path} is not a regular file: results are written beside it and renamed, name a file")
    folder = target.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"{path} cannot be written: {folder} is a file, expected a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{path} cannot be written: no permission in {folder}; choose another place")


@contextmanager
def _progress() -> Iterator[ReportProgress | None]:
    """A progress bar on a terminal's standard error; elsewhere a line now and then."""
    if not sys.stderr.isatty():
        with sparingly() as take:
            yield lambda stage, fraction: take(f"… {neutral_line(stage)}, {fraction:.0%}")
        return
    try:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    except ImportError:  # an edge device may do without
        yield None
        return

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(error=True), transient=True) as bar:
        task = bar.add_task("opening", total=1.0)
        current = "opening"

        def update(stage: str, fraction: float) -> None:
            nonlocal current
            if stage != current:
                bar.reset(task, description=neutral_line(stage), total=1.0)
                current = stage
            bar.update(task, completed=fraction)

        yield update


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def _batches(text: str) -> tuple[int, ...]:
    try:
        return tuple(_positive(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of batch sizes such as 1,32") from None


def _depths(text: str) -> tuple[int, ...]:
    try:
        depths: list[int] = []
        for part in text.split(","):
            first, dash, last = part.partition("-")
            if max(int(first), int(last or 1)) > MAX_STEPS:
                raise argparse.ArgumentTypeError(f"{text} goes beyond {MAX_STEPS} steps")
            depths += range(_positive(first), _positive(last) + 1) if dash else [_positive(first)]
    except ValueError:
        depths = []
    if not depths:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of depths such as 1,2,6 or 1-16")
    return tuple(dict.fromkeys(depths))


def _thresholds(text: str) -> tuple[float, ...]:
    try:
        thresholds = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        thresholds = (math.nan,)
    if not all(0 <= t < math.inf for t in thresholds):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of thresholds such as 0.8,0.9,1 (1 never halts)")
    return thresholds


def _points(text: str) -> float:
    value = float(text)
    if not 0 < value < 100:
        raise argparse.ArgumentTypeError(f"{text} is not a number of percentage points above 0")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
