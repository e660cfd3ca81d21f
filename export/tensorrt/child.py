"""The process that builds one plan: `python -m vitrm.export.tensorrt.child < request.json`.

A process of its own, because TensorRT's builder can crash (SIGSEGV) or be killed for its memory, and then takes its
process along; here that is one message of the command that started it (vitrm.export.tensorrt.build).  It reads a `BuildRequest` as
JSON from standard input and answers with JSON lines: {"log": [severity, text]}, {"progress": text} and at last
{"built": {…}} or {"failed": {"stage": …, "errors": […]}}.

A build has failed where no plan came of it: TensorRT logs a kernel that it tried and left out as an ERROR, and goes on to
the next one.  A plan is refused where a message of any severity says that it computes something else than the graph.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import re
import signal
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from vitrm.export.tensorrt.options import BUILDER_FLAGS
from vitrm.model_limits import MAX_STEPS
from vitrm.runtime.backends.tensorrt.api import TensorRT, load_tensorrt, make_log

_PR_SET_PDEATHSIG = 1
# Messages of builders that then give a plan all the same, which computes something else than the graph says.
_WRONG_RESULTS = re.compile(
    r"UINT8.*Defaulting to INT8"
    r"|would overflow in FP16 and converted"
    r"|Detected (NaN|infinit\w*) values"
    r"|outside the range of INT32 (was|were) clamped",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """One build."""

    flavour: str
    onnx: str  # the graph's file
    plan: str  # where to write the plan: this file alone, whose name the caller takes care of
    profiles: list[list[int]]  # batch sizes [min, opt, max]
    gpus: list[str] | None  # compute capabilities to build for; None: the GPU present
    workspace_mib: int | None
    timing_cache: str | None  # file to read, if it is there, and to write
    flags: list[str]  # version_compatible, hardware_compatible, strip_weights, refit


class Failure(Exception):
    """A build that TensorRT refused."""

    def __init__(self, stage: str, errors: list[str]) -> None:
        super().__init__(stage)
        self.stage, self.errors = stage, errors


def main() -> int:
    """Entry point; returns the exit code."""
    _end_with_parent()
    request = BuildRequest(**json.load(sys.stdin))
    # TensorRT prints to the process's own standard output too: that goes where the errors go.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(**answer: Any) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        say(built=_build(request, say))
    except Failure as failure:
        say(failed={"stage": failure.stage, "errors": failure.errors})
        return 1
    return _leave(answers)


def _leave(answers: TextIO) -> int:
    # The plan is written: a crash while TensorRT's libraries unload should not count.
    answers.flush()
    os._exit(0)


def _build(request: BuildRequest, say: Any) -> dict[str, Any]:
    api = load_tensorrt(request.flavour)
    trt = api.module
    log = make_log(trt, lambda severity, text: say(log=[severity, text]))
    builder = trt.Builder(log)
    # TensorRT 11 and the one for RTX know no other kind and ignore the flag.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(request.onnx):
        raise Failure("parse", [str(parser.get_error(i)) for i in range(parser.num_errors)] or log.errors)
    config = builder.create_builder_config()
    _configure(api, config, request, log)
    for batches in request.profiles:
        config.add_optimization_profile(_profile(builder, network, batches))
    monitor = _monitor(trt, say)
    config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise Failure("build", log.errors)
    if wrong := wrong_results(log.messages):
        raise Failure("trust", wrong)
    Path(request.plan).write_bytes(memoryview(plan))
    cache = config.get_timing_cache() if request.timing_cache else None
    if cache is not None and request.timing_cache:
        Path(request.timing_cache).write_bytes(memoryview(cache.serialize()))
    return {"layers": network.num_layers, "bytes": plan.nbytes, "errors": log.errors}


def wrong_results(messages: Iterable[tuple[str, str]]) -> list[str]:
    """The texts among TensorRT's `messages` (severity, text) that say of a plan that it computes something else than its graph."""
    return list(dict.fromkeys(text for _, text in messages if _WRONG_RESULTS.search(text)))


def _configure(api: TensorRT, config: Any, request: BuildRequest, log: Any) -> None:
    trt = api.module
    # float32 means float32; whoever wants less precision says so in the graph.
    config.clear_flag(trt.BuilderFlag.TF32)
    if request.gpus is not None and api.targets is not None:
        config.num_compute_capabilities = len(request.gpus)
        for i, sm in enumerate(request.gpus):
            config.set_compute_capability(getattr(trt.ComputeCapability, sm.upper()), i)
    if request.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace_mib << 20)
    for flag in request.flags:
        if flag in BUILDER_FLAGS:
            config.set_flag(getattr(trt.BuilderFlag, BUILDER_FLAGS[flag]))
        else:
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if request.timing_cache:
        file = Path(request.timing_cache)
        cache = config.create_timing_cache(file.read_bytes() if file.exists() else b"")
        if not config.set_timing_cache(cache, False):
            raise Failure("timing cache", log.errors)


def _profile(builder: Any, network: Any, batches: list[int]) -> Any:
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        shape = tuple(tensor.shape)
        if -1 in shape:
            profile.set_shape(tensor.name, *((batch, *shape[1:]) for batch in batches))
        elif tensor.is_shape_tensor:
            profile.set_shape_input(tensor.name, [1], [6], [MAX_STEPS])
    return profile


def _monitor(trt: Any, say: Any) -> Any:
    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.outermost: tuple[str, int] | None = None

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self.outermost = name, steps
            say(progress=name)

        def phase_finish(self, name: str) -> None:
            pass

        def step_complete(self, name: str, step: int) -> bool:
            if self.outermost and name == self.outermost[0]:
                say(progress=f"{name}, {step + 1} of {self.outermost[1]}")
            return True

    return Monitor()


def _end_with_parent() -> None:
    """A build goes on for minutes: it must not outlive a command that was killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def to_json(request: BuildRequest) -> str:
    """The JSON that `main` reads."""
    return json.dumps(dataclasses.asdict(request))


if __name__ == "__main__":
    sys.exit(main())
