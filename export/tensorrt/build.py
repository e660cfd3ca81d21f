"""ONNX → TensorRT plan, built in a process of its own, with the side-car that says where alone it may be opened.

One recipe for TensorRT 10.3 … 11 and TensorRT for RTX: types stand in the graph (a strongly typed network), so there
are no precision flags and no calibrators.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from vitrm.errors import UserError
from vitrm.export.settings import OnStage
from vitrm.export.tensorrt.builder_process import run_builder
from vitrm.export.tensorrt.lint import check_graph
from vitrm.export.tensorrt.options import PlanOptions, check_plan_path
from vitrm.export.tensorrt.toolchain import Toolchain, toolchain
from vitrm.runtime.artifact.graph_names import PARTS
from vitrm.runtime.artifact.metadata import Metadata
from vitrm.runtime.artifact.onnx_file import OnnxFile, inspect
from vitrm.runtime.artifact.plan_sidecar import (
    BuildRecord,
    Sidecar,
    sidecar_path,
    this_system,
    weights_path,
    write_sidecar,
)
from vitrm.system.files import atomic_files, atomic_folder, sha256_of
from vitrm.system.outputs import check_outputs


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    """A plan, or the three of a stepwise folder."""

    path: Path  # the plan, or the folder
    sidecars: dict[str, Sidecar]  # by file name
    layers: int  # of TensorRT's network before it fuses them
    bytes: int  # of the plans
    seconds: float
    complaints: tuple[str, ...] = ()  # what TensorRT logged as errors and built the plans all the same

    @property
    def engine(self) -> BuildRecord:
        """The description of the plan, or of the step's."""
        return list(self.sidecars.values())[min(1, len(self.sidecars) - 1)].engine


def build_engine(
    onnx: str | os.PathLike[str],
    plan: str | os.PathLike[str],
    options: PlanOptions | None = None,
    *,
    metadata: Metadata | None = None,
    source: str | None = None,
    check: Callable[[Path], Metadata] | None = None,
    progress: OnStage = lambda message: None,
) -> BuildResult:
    """Builds a TensorRT plan from an ONNX file, with its side-car; from a stepwise folder, a folder of three plans.

    Nothing is left behind by a build that fails, and what was there before stays as it was.

    Args:
        onnx: the ONNX file, or the stepwise folder.
        plan: the file to write, .plan or .engine, or the folder.
        options: GPUs, batch sizes and flags.
        metadata: the artifact's description.  Default: the ONNX file's own.
        source: the source that the rebuild command names.  Default: `onnx`.
        check: called with the plan before it gets its name, where it can run on this machine.  Raises for one that is not
            right, and returns the metadata to keep.
        progress: told of each stage.

    Returns:
        The plans' path, side-cars and sizes.

    Raises:
        UserError: for a graph that TensorRT does not take, a builder that refuses, crashes or is killed (its messages are
            then in PLAN.log), and for what `toolchain` refuses.
    """
    began = time.perf_counter()
    source_path, target = Path(onnx), Path(plan)
    options = options or PlanOptions()
    tools = toolchain(options)
    stepwise = source_path.is_dir()
    check_plan_path(target, stepwise=stepwise)
    files = {f"{part}.plan": source_path / f"{part}.onnx" for part in PARTS} if stepwise else {target.name: source_path}
    check_outputs({"-o": target, "--timing-cache": options.timing_cache}, files.values(), replacing=["-o"])
    sources = _inspected(files, source_path, options)
    build = _Build(target, tools, options, source or str(source_path), progress)
    names = [name for plan_name in files for name in _names(plan_name, options)]
    folder = target if stepwise else target.parent
    with atomic_folder(folder) if stepwise else atomic_files(folder, names) as temporary:
        for name, file in files.items():
            stage = f"building {name}" if stepwise else "building the plan"
            build.add(file, temporary / name, metadata or sources[name].metadata, stage)
        if check is not None and tools.runs_here:
            progress("verifying the plan")
            build.describe(temporary, check(temporary if stepwise else temporary / target.name))
    target.with_name(f"{target.name}.log").unlink(missing_ok=True)  # of an attempt that failed
    return BuildResult(
        path=target,
        sidecars=build.sidecars,
        layers=build.layers,
        bytes=sum(s.engine.bytes for s in build.sidecars.values()),
        seconds=time.perf_counter() - began,
        complaints=tuple(dict.fromkeys(build.complaints)),
    )


class _Build:
    """The plans of one target under construction."""

    def __init__(self, target: Path, tools: Toolchain, options: PlanOptions, source: str, on_stage: OnStage) -> None:
        self.target, self.tools, self.options, self.source = target, tools, options, source
        self.on_stage = on_stage
        self.sidecars: dict[str, Sidecar] = {}
        self.layers = 0
        self.complaints: list[str] = []

    def add(self, onnx: Path, plan: Path, metadata: Metadata, stage: str) -> None:
        """Builds one plan and writes its side-car, and its weights where they stay outside."""
        tools, options = self.tools, self.options
        built = run_builder(onnx, plan, self.target, tools, options, lambda text: self.on_stage(f"{stage}: {text}"))
        self.layers += built.layers
        self.complaints += built.complaints
        engine = BuildRecord(
            flavour=tools.api.flavour,
            version=tools.api.version,
            gpus=tools.gpus,
            gpu_name=tools.gpu_name,
            system=this_system(),
            profiles=[list(p) for p in options.profiles],
            flags=options.flags,
            workspace_mib=options.workspace_mib,
            source=self.source,
            sha256=sha256_of(plan),
            bytes=plan.stat().st_size,
        )
        self.sidecars[plan.name] = Sidecar(metadata, engine)
        write_sidecar(self.sidecars[plan.name], sidecar_path(plan))
        if options.strip_weights:
            weights_path(plan).write_bytes(onnx.read_bytes())

    def describe(self, folder: Path, metadata: Metadata) -> None:
        """Puts other metadata into the side-cars of the plans in `folder`."""
        for name, sidecar in self.sidecars.items():
            self.sidecars[name] = replace(sidecar, metadata=metadata)
            write_sidecar(self.sidecars[name], sidecar_path(folder / name))


def _inspected(files: dict[str, Path], source: Path, options: PlanOptions) -> dict[str, OnnxFile]:
    """The graphs that plans are built from, by the plan's name.  Raises `UserError` for those that TensorRT does not take."""
    for file in files.values():
        if not file.is_file():
            raise UserError(f"{file} does not exist: make it with vitrm-export, or check the path")
    sources = {name: inspect(file) for name, file in files.items()}
    for file in files.values():
        check_graph(file)
    if options.strip_weights and any(s.external for s in sources.values()):
        raise UserError(f"{source} keeps weights in other files: save it with its weights inside for --strip-weights")
    return sources


def _names(plan: str, options: PlanOptions) -> list[str]:
    """The files of one plan, the plan first: a side-car beside another plan is noticed, the reverse would not be."""
    return [plan, f"{plan}.json", *([f"{plan}.onnx"] if options.strip_weights else [])]
