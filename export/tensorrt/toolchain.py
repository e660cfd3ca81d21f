"""The TensorRT that builds a plan: which of the two, and for which GPUs.

TensorRT builds for the GPU that is present; TensorRT for RTX for any RTX card, present or not.
"""

from __future__ import annotations

from dataclasses import dataclass

from vitrm.errors import UserError
from vitrm.export.tensorrt.options import PlanOptions, normal_gpu
from vitrm.runtime.backends.tensorrt.api import FULL, INSTALL, NAMES, RTX, TensorRT, installed, load_tensorrt
from vitrm.runtime.system.gpus import Gpu, Gpus, find_gpus

_OLDEST_PORTABLE = 80  # TensorRT for RTX has no float32 GEMM on older ones, and the heads are float32


@dataclass(frozen=True)
class Toolchain:
    """A TensorRT, and the GPUs it builds for."""

    api: TensorRT
    gpus: list[str]
    gpu_name: str | None  # the GPU it is built on
    runs_here: bool  # whether the plan can be run on this machine's GPU


def toolchain(options: PlanOptions, gpus: Gpus | None = None) -> Toolchain:
    """Chooses the TensorRT that can build what `options` ask for, on this machine (with these `gpus`).

    Raises:
        UserError: when none is installed, or it cannot: another GPU, or a flag it does not have.
    """
    gpus = find_gpus() if gpus is None else gpus
    present = gpus.found[0] if gpus.found else None
    wanted = list(dict.fromkeys(normal_gpu(g) for g in options.gpus))
    options.check()
    api = load_tensorrt(_flavour(options, wanted, present.sm if present else None))
    if api.flavour == FULL:
        return _for_this_gpu(api, options, wanted, present, gpus.problem)
    return _for_rtx_cards(api, options, wanted, present)


def _flavour(options: PlanOptions, wanted: list[str], present: str | None) -> str | None:
    """The TensorRT to use where both are installed: the full one if the GPU meant is here, else the one for RTX."""
    if options.flavour is not None or len(installed()) < 2:
        return options.flavour
    return FULL if present is not None and all(g == present for g in wanted) else RTX


def _for_this_gpu(
    api: TensorRT, options: PlanOptions, wanted: list[str], present: Gpu | None, problem: str | None
) -> Toolchain:
    if present is None:
        raise UserError(
            f"{api} builds for the GPU of its own machine, and here {problem}: build the plan on the machine with "
            f"the GPU; for GeForce and RTX cards, {NAMES[RTX]} builds anywhere ({INSTALL[RTX]})"
        )
    other = [g for g in wanted if g != present.sm]
    if other and not options.hardware_compatible:
        raise UserError(
            f"--gpu {', '.join(other)}: {api} builds for the GPU of its own machine, here an {present}: build the plan "
            "there, or add --hardware-compatible to run on all of compute capability 8.0 and later"
        )
    return Toolchain(api, [present.sm], present.name, True)


def _for_rtx_cards(api: TensorRT, options: PlanOptions, wanted: list[str], present: Gpu | None) -> Toolchain:
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


def _check_rtx_flags(api: TensorRT, options: PlanOptions, no_gpu: bool) -> None:
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
