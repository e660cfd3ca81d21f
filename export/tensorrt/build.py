"""ONNX → TensorRT plan, built in a process of its own, with the side-car that says where alone it may be opened.

One recipe for TensorRT 10.3 … 11 and TensorRT for RTX: types stand in the graph (a strongly typed network), so there
are no precision flags and no calibrators.  TensorRT builds for the GPU that is present; TensorRT for RTX for any RTX
card, present or not.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from vitrm.errors import UserError
from vitrm.export.tensorrt.child import FLAGS, Request, to_json
from vitrm.export.tensorrt.lint import check_graph
from vitrm.fields import Whole, checked, shown
from vitrm.runtime.artifact.metadata import PARTS, Metadata
from vitrm.runtime.artifact.onnx_file import inspect
from vitrm.runtime.artifact.sidecar import (
    AMPERE_PLUS,
    SUFFIXES,
    Engine,
    Sidecar,
    sidecar_path,
    this_system,
    weights_path,
    write_sidecar,
)
from vitrm.runtime.backends.tensorrt.api import ERRORS, FULL, INSTALL, NAMES, RTX, TensorRT, installed, load_tensorrt
from vitrm.runtime.system.gpus import Gpus, find_gpus
from vitrm.system.files import atomic_files, atomic_folder, sha256_of, write_text
from vitrm.system.outputs import check_outputs

BATCHES = (1, 8, 64)  # of the one profile that is made where none is asked for
MAX_BATCH = 1 << 20  # of a profile
MAX_WORKSPACE = 1 << 20  # MiB: a tebibyte
_OLDEST_PORTABLE = 80  # TensorRT for RTX has no float32 products on older ones, and the heads are float32
# What the builder says, and what to do about it.
_HINTS = (
    (
        r"Turing.*FP32 GEMM",
        "TensorRT for RTX has no float32 products on sm75, and the heads are float32: leave sm75 out",
    ),
    (
        r"OutOfMemory|Requested size was|within workspace limit",
        "the builder's memory did not suffice: give it more with --workspace",
    ),
    (r"ShapeMismatch|carried|recurrence|loop", "a Loop must carry values of one shape and type"),
)

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What is asked of a plan beside its graph."""

    gpus: tuple[str, ...] = ()  # compute capabilities, as "sm89"; none: the GPU present, or all that can be
    profiles: tuple[tuple[int, int, int], ...] = (BATCHES,)  # batch sizes (min, opt, max) of each optimization profile
    workspace_mib: int | None = None  # limit of the builder's scratch memory
    timing_cache: Path | None = None  # of TensorRT; None: beside the plan, one for each GPU and version
    version_compatible: bool = False  # also runs in later TensorRT of the same major version
    hardware_compatible: bool = False  # also runs on other GPUs, of compute capability 8.0 and later
    strip_weights: bool = False  # the plan holds no weights: they come from the ONNX file when it is opened
    refit: bool = False  # weights of the plan can be replaced
    flavour: str | None = None  # full or rtx, where both are installed

    @property
    def flags(self) -> list[str]:
        """Those that are set, by the names of `Engine.flags`."""
        return [name for name in (*FLAGS, AMPERE_PLUS) if getattr(self, name)]


@dataclass(frozen=True)
class Toolchain:
    """Which TensorRT builds, and for what."""

    api: TensorRT
    gpus: list[str]
    gpu_name: str | None  # the GPU it is built on
    runs_here: bool  # whether the plan can be run on this machine's GPU


@dataclass(frozen=True, kw_only=True)
class Built:
    """A plan, or the three of a stepwise folder."""

    path: Path  # the plan, or the folder
    sidecars: dict[str, Sidecar]  # by file name
    layers: int  # of TensorRT's network before it fuses them
    bytes: int  # of the plans
    seconds: float

    @property
    def engine(self) -> Engine:
        """Of the plan, or of the step's."""
        return list(self.sidecars.values())[min(1, len(self.sidecars) - 1)].engine


def normal_gpu(text: str) -> str:
    """ "sm89", "SM_89", "89" or "8.9" as "sm89"; raises `UserError` for anything else."""
    found = re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)", text.strip().lower())
    if not found:
        raise UserError(f"GPU is {text!r}, expected a compute capability such as sm89 (GeForce RTX 40) or sm87 (Orin)")
    return f"sm{found[1]}{found[2]}"


def toolchain(options: EngineOptions, gpus: Gpus | None = None) -> Toolchain:
    """The TensorRT that can build what `options` ask for, on this machine (with these `gpus`).

    Raises `UserError` when none is installed, or it cannot: another GPU, or a flag it does not have.
    """
    gpus = find_gpus() if gpus is None else gpus
    present = gpus.found[0] if gpus.found else None
    wanted = list(dict.fromkeys(normal_gpu(g) for g in options.gpus))
    for profile in options.profiles:
        if len(profile) != 3 or not 1 <= profile[0] <= profile[1] <= profile[2] <= MAX_BATCH:
            raise UserError(
                f"batch sizes are {shown(list(profile))}, expected MIN,OPT,MAX with 1 ≤ MIN ≤ OPT ≤ MAX ≤ {MAX_BATCH:,}"
            )
    if options.workspace_mib is not None:
        checked("workspace, in MiB,", options.workspace_mib, Whole(1, MAX_WORKSPACE))
    if options.strip_weights and options.refit:
        raise UserError("a plan without weights is refitted whenever it is opened: leave out --refit")
    api = load_tensorrt(_flavour(options, wanted, present.sm if present else None))
    if api.flavour == FULL:
        if present is None:
            raise UserError(
                f"{api} builds for the GPU of its own machine, and here {gpus.problem}: build the plan on the machine with "
                f"the GPU; for GeForce and RTX cards, {NAMES[RTX]} builds anywhere ({INSTALL[RTX]})"
            )
        other = [g for g in wanted if g != present.sm]
        if other and not options.hardware_compatible:
            raise UserError(
                f"--gpu {', '.join(other)}: {api} builds for the GPU of its own machine, here an {present}: build the plan "
                "there, or add --hardware-compatible to run on all of compute capability 8.0 and later"
            )
        return Toolchain(api, [present.sm], present.name, True)
    targets = api.targets or ()
    _check_rtx_flags(api, options, present is None)
    unknown = [g for g in wanted if g not in targets]
    if unknown:
        raise UserError(
            f"--gpu {', '.join(unknown)}: {api} builds for {', '.join(targets)}; for other GPUs (Jetson, data center) build "
            f"with {NAMES[FULL]} on the machine that has it: {INSTALL[FULL]}"
        )
    if not wanted and present is not None and present.sm not in targets:
        raise UserError(
            f"the GPU here is an {present}, and {api} builds for {', '.join(targets)}: install {NAMES[FULL]} "
            f"({INSTALL[FULL]}), or name another GPU with --gpu"
        )
    if not wanted:
        portable = [g for g in targets if int(g[2:]) >= _OLDEST_PORTABLE]
        wanted = [present.sm] if present is not None else portable
    return Toolchain(api, wanted, None, present is not None and present.sm in wanted)


def _flavour(options: EngineOptions, wanted: list[str], present: str | None) -> str | None:
    """Which TensorRT to use where both are installed: the full one if the GPU meant is here, else the one for RTX."""
    if options.flavour is not None or len(installed()) < 2:
        return options.flavour
    return FULL if present is not None and all(g == present for g in wanted) else RTX


def _check_rtx_flags(api: TensorRT, options: EngineOptions, no_gpu: bool) -> None:
    if options.hardware_compatible:
        raise UserError(
            f"--hardware-compatible: {api} has none; name every GPU that the plan is for: --gpu {','.join(api.targets or ())}"
        )
    if options.version_compatible:
        raise UserError(f"--version-compatible: {api} has no lean runtime to run such plans with: leave it out")
    if options.timing_cache is not None:
        raise UserError(f"--timing-cache: {api} times nothing while it builds: leave it out")
    if no_gpu and (options.strip_weights or options.refit):
        flag = "--strip-weights" if options.strip_weights else "--refit"
        raise UserError(f"{flag}: {api} makes such plans on a machine with a GPU alone: leave it out, or build there")


def build_engine(
    onnx: str | os.PathLike[str],
    plan: str | os.PathLike[str],
    options: EngineOptions | None = None,
    *,
    metadata: Metadata | None = None,
    source: str | None = None,
    check: Callable[[Path], Metadata] | None = None,
    progress: Progress = lambda message: None,
) -> Built:
    """Builds `plan` (.plan or .engine) from the ONNX file `onnx`, with its side-car; of a stepwise folder, a folder of three.

    `metadata` and `source` (what the rebuild command names) are the file's own unless told otherwise.  Where the plan
    can run on this machine, `check` is called with it before it gets its name: it raises for one that is not right, and
    returns the metadata to keep.
    Raises `UserError` for a graph that TensorRT does not take, a builder that refuses, crashes or is killed, and for
    what `toolchain` refuses.  Nothing is left behind then, and what was there before stays as it was; the builder's
    messages are in PLAN.log.
    """
    began = time.perf_counter()
    source_path, target = Path(onnx), Path(plan)
    options = options or EngineOptions()
    tools = toolchain(options)
    stepwise = source_path.is_dir()
    files = {f"{part}.plan": source_path / f"{part}.onnx" for part in PARTS} if stepwise else {target.name: source_path}
    check_plan_path(target, stepwise=stepwise)
    check_outputs({"-o": target, "--timing-cache": options.timing_cache}, files.values(), replacing=["-o"])
    for file in files.values():
        if not file.is_file():
            raise UserError(f"{file} does not exist: make it with vitrm-export, or check the path")
    sources = {name: inspect(file) for name, file in files.items()}
    for file in files.values():
        check_graph(file)
    if options.strip_weights and any(s.external for s in sources.values()):
        raise UserError(
            f"{source_path} keeps weights in other files: save it with its weights inside for --strip-weights"
        )
    sidecars: dict[str, Sidecar] = {}
    layers = 0
    names = [name for plan_name in files for name in _names(plan_name, options)]
    folder = target if stepwise else target.parent
    with atomic_folder(folder) if stepwise else atomic_files(folder, names) as temporary:
        for name, file in files.items():
            own = metadata or sources[name].metadata
            stage = f"building {name}" if stepwise else "building the plan"
            layers += _build(file, temporary / name, target, tools, options, partial(_staged, progress, stage))
            built = temporary / name
            engine = Engine(
                flavour=tools.api.flavour,
                version=tools.api.version,
                gpus=tools.gpus,
                gpu_name=tools.gpu_name,
                system=this_system(),
                profiles=[list(p) for p in options.profiles],
                flags=options.flags,
                workspace_mib=options.workspace_mib,
                source=source or str(source_path),
                sha256=sha256_of(built),
                bytes=built.stat().st_size,
            )
            sidecars[name] = Sidecar(own, engine)
            write_sidecar(sidecars[name], sidecar_path(built))
            if options.strip_weights:
                weights_path(built).write_bytes(file.read_bytes())
        if check is not None and tools.runs_here:
            progress("verifying the plan")
            checked = check(temporary if stepwise else temporary / target.name)
            for name in files:
                sidecars[name] = replace(sidecars[name], metadata=checked)
                write_sidecar(sidecars[name], sidecar_path(temporary / name))
    target.with_name(f"{target.name}.log").unlink(missing_ok=True)  # of an attempt that failed
    return Built(
        path=target,
        sidecars=sidecars,
        layers=layers,
        bytes=sum(s.engine.bytes for s in sidecars.values()),
        seconds=time.perf_counter() - began,
    )


def _staged(progress: Progress, stage: str, text: str) -> None:
    progress(f"{stage}: {text}")


def check_plan_path(path: Path, *, stepwise: bool) -> None:
    """Raises `UserError` unless a plan may be written to `path`, or a stepwise folder of plans may take its place."""
    if not stepwise:
        if path.suffix not in SUFFIXES:
            raise UserError(f"{path}: expected a file name ending in .plan or .engine")
        if path.is_dir():
            raise UserError(f"{path} is a folder: name a file")
        return
    if path.suffix == ".onnx":
        raise UserError(f"{path}: a stepwise plan is a folder of three plans: name a folder")
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file: a stepwise plan is a folder of three, name a folder")
    ours = {f"{part}.plan{suffix}" for part in PARTS for suffix in ("", ".json", ".onnx")}
    if path.is_dir() and {p.name for p in path.iterdir()} - ours:
        raise UserError(f"{path} is a folder with other things in it: name a new one")


def _names(plan: str, options: EngineOptions) -> list[str]:
    """The files of one plan, the plan first: a side-car beside another plan is noticed, the reverse would not be."""
    return [plan, f"{plan}.json", *([f"{plan}.onnx"] if options.strip_weights else [])]


def _build(onnx: Path, plan: Path, target: Path, tools: Toolchain, options: EngineOptions, progress: Progress) -> int:
    """Runs the builder's process; returns the number of layers in the network."""
    cache = options.timing_cache
    if cache is None and tools.api.flavour == FULL:
        cache = target.parent / f"tensorrt-{tools.api.version}-{tools.gpus[0]}.timing"
    with tempfile.TemporaryDirectory() as scratch:
        own_cache = Path(scratch) / "timing"
        if cache is not None and cache.exists():
            own_cache.write_bytes(cache.read_bytes())
        request = Request(
            flavour=tools.api.flavour,
            onnx=str(onnx),
            plan=str(plan),
            profiles=[list(p) for p in options.profiles],
            gpus=tools.gpus if tools.api.flavour == RTX else None,
            workspace_mib=options.workspace_mib,
            timing_cache=str(own_cache) if cache is not None else None,
            flags=options.flags,
        )
        layers = _run(request, target, tools, progress)
        if cache is not None and own_cache.exists():
            with atomic_files(cache.parent, [cache.name]) as temporary:
                (temporary / cache.name).write_bytes(own_cache.read_bytes())
    return layers


def _run(request: Request, target: Path, tools: Toolchain, progress: Progress) -> int:
    messages: list[list[str]] = []
    last: dict[str, object] = {}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", "vitrm.export.tensorrt.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,  # a terminal's Ctrl-C goes to us, and we end it
        )
        try:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write(to_json(request))
            child.stdin.close()
            for line in child.stdout:
                answer = json.loads(line)
                if "log" in answer:
                    messages.append(answer["log"])
                elif "progress" in answer:
                    progress(answer["progress"])
                else:
                    last = answer
            status = child.wait()
        except BrokenPipeError:
            status = child.wait()
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        errors.seek(0)
        printed = errors.read()
    if "built" in last and status == 0:
        built = last["built"]
        assert isinstance(built, dict)
        return int(built["layers"])
    log = _keep_log(target, messages, printed)
    if "failed" in last:
        failed = last["failed"]
        assert isinstance(failed, dict)
        if failed["stage"] == "timing cache":
            raise UserError("the timing cache was made by another TensorRT or on another GPU: name another one")
        raise UserError(_explain(tools, str(failed["stage"]), [str(e) for e in failed["errors"]]) + log)
    raise UserError(_explain_end(tools, status, messages, printed) + log)


def _explain(tools: Toolchain, stage: str, errors: list[str]) -> str:
    """What the builder said, and what to do."""
    said = _shorten(errors[0]) if errors else "no reason given"
    everything = " ".join(errors)
    hint = next((text for pattern, text in _HINTS if re.search(pattern, everything, re.IGNORECASE)), None)
    return f"{tools.api} cannot {stage} this graph: {said}" + (f" ({hint})" if hint else "")


def _explain_end(tools: Toolchain, status: int, messages: list[list[str]], printed: str) -> str:
    """A builder that ended without an answer."""
    complaints = [text for severity, text in messages if severity in ERRORS]
    lines = [line for line in printed.strip().splitlines() if line.strip()]
    said = complaints[-1:] or lines[-1:]
    last = f"; the last it said: {_shorten(said[0])}" if said else ""
    if status == -9:
        return (
            f"{tools.api}'s builder was killed (signal 9), probably for its memory: free some, or build smaller{last}"
        )
    if status < 0:
        return f"{tools.api}'s builder crashed (signal {-status}) on this graph{last}"
    return f"{tools.api}'s builder ended with status {status}{last}"


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 400 else text[:399] + "…"


def _keep_log(target: Path, messages: list[list[str]], printed: str) -> str:
    """Writes everything the builder said to PLAN.log; returns where that is, to end a message with."""
    path = target.with_name(target.name + ".log")
    text = "".join(f"{severity}: {message}\n" for severity, message in messages) + printed
    if not text.strip():
        return ""
    try:
        write_text(path, text)
    except UserError:  # the failure itself is what matters
        return ""
    return f"; all it said is in {path}"
