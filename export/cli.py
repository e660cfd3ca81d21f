"""vitrm-export: a run → a file for a device."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

from vitrm.command_line import CommandParser
from vitrm.errors import run_command
from vitrm.export.tensorrt import options as engine_cli
from vitrm.system.terminal import console, neutral_line, say

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
  vitrm-export --doctor                              which backends and GPUs are here, and what each can do

exit status: 0 done; 2 wrong input or settings, a full disk, too little memory; 130 interrupted (Ctrl-C, kill, a lost
terminal); 141 done, but nobody reads the output any more.
"""

# What exporting takes and a device that only runs artifacts may lack.
_PACKAGES = ("torch", "torchvision", "onnx", "onnx_ir", "onnxscript", "safetensors", "matplotlib", "sklearn", "rich")


def parser() -> argparse.ArgumentParser:
    """The command line of vitrm-export."""
    p = CommandParser(
        "vitrm-export",
        "Exports a trained model to ONNX, or to a TensorRT plan, and verifies it against PyTorch on real images.",
        EXAMPLES,
    )
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
    shape = p.add_argument_group("shape")
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
        help="products with weights in int8, calibrated on training images",
    )
    precision.add_argument(
        "--target",
        choices=["cpu", "tensorrt"],
        help="what int8 is for: ONNX Runtime on a CPU (default), or TensorRT, with float16 around the products",
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
    engine_cli.add_arguments(p)
    checks = p.add_argument_group(
        "data, for verification, calibration and --max-drop",
        "A file gets its name when it answers like PyTorch on 64 validation images, or on those that 10 s suffice for (at "
        "least 7): no logit may differ by more than 1e-4 (fp32), 0.03 (fp16) or 0.1 (int8) times the largest logit. At int8 "
        "that tells a wrong graph from a right one; what int8 costs in accuracy, --max-drop and vitrm-bench measure.",
    )
    checks.add_argument(
        "--data-dir", metavar="DIR", help="where the run's data set is (default: $VITRM_DATA, else ./data)"
    )
    p.add_argument(
        "--doctor", action="store_true", help="say which backends, versions and GPUs are here and what each can do"
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(_export, argv)


def _export(argv: Sequence[str] | None) -> int:
    try:
        return _choose(parser().parse_args(argv))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in _PACKAGES:
            raise
        from vitrm.errors import UserError

        raise UserError(
            f"this needs {error.name}, which is not installed: pip install {error.name.split('.')[0].replace('_', '-')}, or export "
            "on a machine with all of vitrm's dependencies and copy the file"
        ) from None


def _choose(args: argparse.Namespace) -> int:
    """Does what is asked: an export, a plan from an ONNX file, a place in a repository, or a diagnosis."""
    if args.doctor:
        from vitrm.export.doctor import print_diagnosis

        print_diagnosis()
        return 0
    if args.triton and args.run and Path(args.run).suffix in (".onnx", ".plan", ".engine"):
        return _add_to_repository(args)
    if args.run is not None and (args.run.endswith(".onnx") or (Path(args.run) / "step.onnx").is_file()):
        with _status() as progress:
            built = engine_cli.from_onnx(args, Path(args.run), progress)
        say(f"{args.run} → {built.path}")
        engine_cli.print_engine(built, None)
        say(f"  file     {built.path}, {built.bytes / 1e6:.2f} MB")
        say(f"next: vitrm-bench {built.path}")
        return 0
    with TemporaryDirectory() if args.triton else nullcontext() as scratch:
        return _run(args, scratch)


def _run(args: argparse.Namespace, scratch: str | None) -> int:
    """Exports; a folder `scratch` is where the file goes first that is to be placed elsewhere."""
    plan = engine_cli.wants_plan(args)
    from vitrm import checkpoint as checkpoints
    from vitrm.errors import UserError
    from vitrm.export.pipeline import export
    from vitrm.export.settings import MAX_UNROLLED, NEVER, default_steps
    from vitrm.export.targets import huggingface, triton
    from vitrm.system.files import atomic_files
    from vitrm.training.state import STATE_FILE

    if args.steps is not None and not 1 <= args.steps <= MAX_UNROLLED:
        raise UserError(f"--steps is {args.steps}, expected 1 to {MAX_UNROLLED}")
    checkpoint = checkpoints.load(args.run)
    name = Path(checkpoint.source).name
    depth = ""
    if checkpoint.model.kind == "vitrm":
        depth = f"-{args.steps or default_steps(checkpoint)}steps" if args.graph == "unrolled" else f"-{args.graph}"
    suffix = ".plan" if plan else ".onnx"
    if args.graph == "stepwise":
        suffix = "-plan" if plan else ""
    target = args.target or ("tensorrt" if plan else "cpu")
    precision = f"int8-{target}" if args.precision == "int8" else args.precision
    path = args.output or Path(f"{name}{depth}-{precision}{suffix}")
    if args.hf:
        if args.output or args.graph != "unrolled":
            raise UserError(
                "--hf DIR names the output, and optimum feeds images alone: leave out -o, and --graph loop or stepwise"
            )
        if args.hf.exists() and not args.hf.is_dir():
            raise UserError(f"{args.hf} is a file: name a folder for --hf")
        held = [name for name in (checkpoints.WEIGHTS_FILE, STATE_FILE) if (args.hf / name).exists()]
        if held:
            raise UserError(
                f"{args.hf} holds a run ({held[0]}), whose config.json would be replaced: name another folder"
            )
        path = args.hf / huggingface.MODEL_FILE
    shown = path
    if args.triton_name and not args.triton:
        raise UserError("--triton-name is for --triton DIR: add it, or leave the name out")
    if args.triton and scratch:
        if args.output or args.hf:
            raise UserError("--triton DIR names the output: leave out -o and --hf")
        model = args.triton_name or f"{name}{depth}-{precision}"
        triton.check_place(args.triton, model, graph=args.graph, every_step=args.every_step)
        if plan:
            from vitrm.export.tensorrt.build import toolchain

            triton.check_flavour(toolchain(engine_cli.options(args)).api.flavour, "what is built here")
        path, shown = Path(scratch) / f"{model}{suffix}", args.triton / model
    if args.precision != "int8":
        for option in ("calibration", "target", "estimator", "max_drop", "sensitivity"):
            if getattr(args, option) is not None:
                raise UserError(f"--{option.replace('_', '-')} is for int8: add --int8, or leave it out")
    if args.max_drop is not None and not 0 <= args.max_drop <= 100:
        raise UserError(f"--max-drop is {args.max_drop}, expected 0 to 100 percentage points")
    say(f"{checkpoint.source} ({checkpoint.model.kind}, {checkpoint.data.get('name', 'unknown data')}) → {shown}")
    if checkpoint.note:
        say(f"  note     {checkpoint.note}")
    with _status() as progress, atomic_files(args.hf, huggingface.FILES) if args.hf else nullcontext() as together:
        made = export(
            checkpoint,
            together / huggingface.MODEL_FILE if together else path,
            steps=args.steps,
            graph=args.graph,
            precision=args.precision,
            halt_threshold=NEVER if args.halt_threshold is None else args.halt_threshold,
            every_step=args.every_step,
            target=target,
            calibration=args.calibration,
            estimator=args.estimator or "mse",
            max_drop=args.max_drop,
            sensitivity_file=args.sensitivity,
            data_dir=args.data_dir,
            engine=engine_cli.options(args) if plan else None,
            progress=progress,
        )
        if together:
            huggingface.write_configs(together, made.metadata)
    then = f"vitrm-bench {path}"
    if args.triton:
        shown = triton.add_file(args.triton, model, made.path)
        then = f"tritonserver --model-repository={args.triton}"
    m, parity = made.metadata, made.parity
    depth = f", {m.steps} step{'s' * (m.steps > 1)}" if m.recursive else ""
    kinds = [f"{n} {kind}" for n, kind in ((made.int8_weights, "int8"), (made.half_weights, "float16")) if n]
    half = f", {' and '.join(kinds)}" if kinds else ""
    say(
        f"  graph    {m.graph}{depth}, {m.precision}: {made.nodes} nodes, {made.weights} weight tensors stored once{half}"
    )
    if made.depth_note:
        say(f"  depth    {made.depth_note}")
    if made.calibration is not None:
        c = made.calibration
        images = f"{c.data['name']} ({c.note})" if c.note else f"training images of {c.data['name']}"
        say(
            f"  int8     for {m.target}; activations calibrated on {c.data['count']} {images} at {c.steps} "
            f"step{'s' * (c.steps > 1)} ({c.estimator}), id {c.id[:12]}"
        )
    if made.state_error is not None:
        y, z = made.state_error.y, made.state_error.z
        say(
            f"  error    of the state, signal to noise: y {y[0]:.1f} dB after step 1, {y[-1]:.1f} dB after step {len(y)}; "
            f"z {z[0]:.1f} dB, {z[-1]:.1f} dB"
        )
    if made.budget is not None:
        b = made.budget
        say(
            f"  budget   {b.final:.2%} of {b.images} validation images, PyTorch {b.exact:.2%}: drop {b.drop:.2f} of {b.allowed:g} "
            f"points, top-1 agreement {b.agreement:.2%}"
        )
        if b.kept:
            say(f"           {b.first:.2%} with everything in int8; in floating point since, most harmful first:")
        for sites, noise in b.kept:
            steps = f"step {sites[0].step}" if len(sites) == 1 else "all steps"
            say(
                f"           {sites[0].role} {sites[0].layer}, {steps} (noise of the logits {noise:.1e} of their variance)"
            )
    if made.headroom is not None:
        say(f"  headroom {made.headroom.factor:.0f} × to float16's limit: largest activation {made.headroom.where}")
    halting = f", halt_prob {parity.halt_prob:.1e}" if m.recursive else ""
    say(
        f"  parity   max |Δ| logits {parity.logits:.1e}{halting} (limit {parity.limit:.1e}, {parity.tolerance:g} of the largest "
        f"logit), top-1 agreement {parity.agreement:.1%} on {parity.images} of {made.verified_on}"
    )
    if made.engine is not None:
        engine_cli.print_engine(made.engine, made.plan_verified)
    share = made.bytes / made.float32_bytes
    say(f"  file     {shown}, {made.bytes / 1e6:.2f} MB, {share:.2f} × the float32 weights, in {made.seconds:.1f} s")
    elsewhere = made.engine is not None and not made.plan_verified and not args.triton
    say(f"next{', where its GPU is' if elsewhere else ''}: {then}")
    return 0


def _add_to_repository(args: argparse.Namespace) -> int:
    """Adds a file that was exported before to a model repository of Triton Inference Server."""
    from vitrm.errors import UserError
    from vitrm.export.targets import triton

    source = Path(args.run)
    if args.output or args.hf or args.precision != "fp32" or args.graph != "unrolled" or args.steps:
        raise UserError(
            f"--triton takes {source} as it is: leave out other outputs, --steps, --graph and the precision"
        )
    name = args.triton_name or source.stem
    version = triton.add_file(args.triton, name, source)
    say(f"{source} → {version}")
    say(f"next: tritonserver --model-repository={args.triton}")
    return 0


@contextmanager
def _status() -> Iterator[Callable[[str], None]]:
    """A spinner with the present stage on a terminal; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda message: None
        return
    from rich.text import Text

    with console(error=True).status("loading") as status:
        yield lambda message: status.update(Text(neutral_line(message)))  # no string: that would be read as markup


if __name__ == "__main__":
    sys.exit(main())
