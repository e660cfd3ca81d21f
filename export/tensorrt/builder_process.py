"""Runs the builder's process (vitrm.export.tensorrt.child) and explains how it ended."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitrm.errors import UserError
from vitrm.export.settings import OnStage
from vitrm.export.tensorrt.child import BuildRequest, to_json
from vitrm.export.tensorrt.options import PlanOptions
from vitrm.export.tensorrt.toolchain import Toolchain
from vitrm.runtime.backends.tensorrt.api import ERRORS, FULL, RTX
from vitrm.system.files import atomic_files, write_text

# Patterns in the builder's messages, and what to do about each.
_HINTS = (
    (
        r"Turing.*FP32 GEMM",
        "TensorRT for RTX has no float32 GEMM on sm75, and the heads are float32: leave sm75 out",
    ),
    (
        r"OutOfMemory|Requested size was|within workspace limit",
        "the builder's memory did not suffice: give it more with --workspace",
    ),
    (r"ShapeMismatch|carried|recurrence|loop", "a Loop must carry values of one shape and type"),
)


@dataclass(frozen=True)
class Built:
    """A plan that a builder made."""

    layers: int  # of the network before TensorRT fuses them
    complaints: tuple[str, ...]  # what TensorRT logged as an error and built the plan all the same


def run_builder(
    onnx: Path, plan: Path, target: Path, tools: Toolchain, options: PlanOptions, on_stage: OnStage
) -> Built:
    """Builds the file `plan` from the file `onnx` in a process of its own.

    Raises:
        UserError: where the builder refuses, crashes or is killed.  Its messages are then beside `target`, in PLAN.log.
    """
    cache = options.timing_cache
    if cache is None and tools.api.flavour == FULL:
        cache = target.parent / f"tensorrt-{tools.api.version}-{tools.gpus[0]}.timing"
    with tempfile.TemporaryDirectory() as scratch:
        own_cache = Path(scratch) / "timing"
        if cache is not None and cache.exists():
            own_cache.write_bytes(cache.read_bytes())
        request = BuildRequest(
            flavour=tools.api.flavour,
            onnx=str(onnx),
            plan=str(plan),
            profiles=[list(p) for p in options.profiles],
            gpus=tools.gpus if tools.api.flavour == RTX else None,
            workspace_mib=options.workspace_mib,
            timing_cache=str(own_cache) if cache is not None else None,
            flags=options.flags,
        )
        built = _built(_answer(request, on_stage), target, tools)
        if cache is not None and own_cache.exists():
            with atomic_files(cache.parent, [cache.name]) as temporary:
                (temporary / cache.name).write_bytes(own_cache.read_bytes())
    return built


@dataclass
class _Answer:
    """Everything a builder said."""

    messages: list[list[str]] = field(default_factory=list)  # [severity, text] of TensorRT's log
    last: dict[str, Any] = field(default_factory=dict)  # {"built": …} or {"failed": …}; empty where it crashed
    printed: str = ""
    status: int = 0


def _answer(request: BuildRequest, on_stage: OnStage) -> _Answer:
    answer = _Answer()
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
                said = json.loads(line)
                if "log" in said:
                    answer.messages.append(said["log"])
                elif "progress" in said:
                    on_stage(said["progress"])
                else:
                    answer.last = said
            answer.status = child.wait()
        except BrokenPipeError:
            answer.status = child.wait()
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        errors.seek(0)
        answer.printed = errors.read()
    return answer


def _built(answer: _Answer, target: Path, tools: Toolchain) -> Built:
    """The plan that was built.  Raises `UserError` where none was."""
    if "built" in answer.last and answer.status == 0:
        built = answer.last["built"]
        return Built(int(built["layers"]), tuple(dict.fromkeys(_shorten(str(e)) for e in built["errors"])))
    log = _keep_log(target, answer)
    failed = answer.last.get("failed")
    if failed is None:
        raise UserError(_explain_end(tools, answer) + log)
    if failed["stage"] == "timing cache":
        raise UserError("the timing cache was made by another TensorRT or on another GPU: name another one")
    raise UserError(_explain(tools, str(failed["stage"]), [str(e) for e in failed["errors"]]) + log)


def _explain(tools: Toolchain, stage: str, errors: list[str]) -> str:
    """The builder's complaint, and what to do about it."""
    said = _shorten(errors[0]) if errors else "no reason given"
    if stage == "trust":
        return f"{tools.api} built a plan that computes something else than this graph: {said}"
    everything = " ".join(errors)
    hint = next((text for pattern, text in _HINTS if re.search(pattern, everything, re.IGNORECASE)), None)
    return f"{tools.api} cannot {stage} this graph: {said}" + (f" ({hint})" if hint else "")


def _explain_end(tools: Toolchain, answer: _Answer) -> str:
    """The end of a builder that gave no answer."""
    complaints = [text for severity, text in answer.messages if severity in ERRORS]
    lines = [line for line in answer.printed.strip().splitlines() if line.strip()]
    said = complaints[-1:] or lines[-1:]
    last = f"; the last it said: {_shorten(said[0])}" if said else ""
    if answer.status == -9:
        return (
            f"{tools.api}'s builder was killed (signal 9), probably for its memory: free some, or build smaller{last}"
        )
    if answer.status < 0:
        return f"{tools.api}'s builder crashed (signal {-answer.status}) on this graph{last}"
    return f"{tools.api}'s builder ended with status {answer.status}{last}"


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 400 else text[:399] + "…"


def _keep_log(target: Path, answer: _Answer) -> str:
    """Writes everything the builder said to PLAN.log; returns where that is, to end a message with."""
    path = target.with_name(target.name + ".log")
    text = "".join(f"{severity}: {message}\n" for severity, message in answer.messages) + answer.printed
    if not text.strip():
        return ""
    try:
        write_text(path, text)
    except UserError:  # the failure itself is what matters
        return ""
    return f"; all it said is in {path}"
