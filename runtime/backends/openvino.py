"""OpenVINO on a CPU: the same file in Intel's runtime.

OpenVINO takes the float graphs, unrolled or as a loop, and the Q/DQ graphs of `vitrm-export --int8 --target tensorrt`, whose
int8 products it fuses.

It is a peer that the bench compares with (vitrm.runtime.bench.peers): `vitrm.runtime.open` never opens a file with it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitrm.errors import UserError
from vitrm.runtime.artifact.graph_names import HALT_PROB, HALT_THRESHOLD, LOGITS, PIXELS, STEPS, STEPS_USED
from vitrm.runtime.artifact.onnx_file import inspect
from vitrm.runtime.backends.onnxruntime.session import SATURATES, may_saturate
from vitrm.runtime.session import Result, Session
from vitrm.runtime.system import machine

_HINTS = {"fp32": "f32", "bf16": "bf16"}  # by what floating point is computed in


class OpenVinoSession(Session):
    """An .onnx file in OpenVINO's CPU plugin."""

    def __init__(
        self, path: Path, *, floats: str = "fp32", threads: int | None = None, compiled_from: Any = None
    ) -> None:
        """Compiles `path` for this CPU.

        `floats` is what floating point is computed in: "fp32", or "bf16" (where the CPU has instructions for it).
        `compiled_from` is an OpenVINO model made of the file, to run in its place.  Raises `UserError` when OpenVINO is
        missing, cannot read the file, or cannot compute in `floats` here.
        """
        try:
            import openvino
        except ImportError:
            raise UserError("OpenVINO is not installed: pip install openvino") from None
        core = openvino.Core()
        if floats not in _HINTS:
            raise UserError(f"floats is {floats!r}, expected one of {', '.join(_HINTS)}")
        if floats == "bf16" and not has_bf16():
            raise UserError(
                "OpenVINO computes in bfloat16 only on a CPU with instructions for it, which this one lacks"
            )
        self.path = path
        self.threads = threads or machine.physical_cores()
        try:
            self.metadata = inspect(path, verify=False).metadata  # its digest was compared when ONNX Runtime opened it
            model = core.read_model(str(path))
            self._compiled = core.compile_model(
                compiled_from if compiled_from is not None else model,
                "CPU",
                {
                    "INFERENCE_PRECISION_HINT": _HINTS[floats],
                    "INFERENCE_NUM_THREADS": self.threads,
                    "PERFORMANCE_HINT": "LATENCY",
                },
            )
        except RuntimeError as error:  # all that OpenVINO raises
            reason = str(error).strip().splitlines()
            raise UserError(
                f"OpenVINO {openvino.__version__.split('-')[0]} cannot run {path}: {reason[-1] if reason else error}"
            ) from None
        self._takes_depth = any(STEPS in i.names for i in self._compiled.inputs)
        self.device_kind, self.device = "cpu", machine.cpu_name()
        self.backend = "openvino-cpu" if floats == "fp32" else f"openvino-cpu-{floats}"
        self.size_bytes = path.stat().st_size
        self.notes = (SATURATES,) if may_saturate(self.metadata) else ()

    @property
    def takes_depth(self) -> bool:
        return self._takes_depth

    def _runner(self, images: NDArray[np.float32], steps: int, halt_threshold: float) -> Callable[[], Result]:
        feeds: dict[str, Any] = {PIXELS: images}
        if self._takes_depth:
            feeds |= {STEPS: np.asarray(steps, np.int64), HALT_THRESHOLD: np.asarray(halt_threshold, np.float32)}
        request = self._compiled.create_infer_request()

        def run() -> Result:
            found = request.infer(feeds)
            recursive = self.metadata.recursive
            # The request's own buffers are written again by its next run.
            return Result(
                found[LOGITS].copy(),
                found[HALT_PROB].copy() if recursive else None,
                found[STEPS_USED].copy() if recursive else None,
            )

        return run


def has_bf16() -> bool:
    """Tells whether OpenVINO computes in bfloat16 on this CPU."""
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
