"""ONNX Runtime, on the CPU or a GPU.

No `onnx` package is needed: vitrm.runtime.artifact.onnx_file reads what the artifact says of itself.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitrm.errors import UserError
from vitrm.runtime.artifact.graph_names import HALT_PROB, HALT_THRESHOLD, LOGITS, PIXELS, STEPS, STEPS_USED
from vitrm.runtime.artifact.interface import check_tensors
from vitrm.runtime.artifact.metadata import Metadata
from vitrm.runtime.artifact.onnx_file import inspect
from vitrm.runtime.backends.onnxruntime.binding import BoundGraph
from vitrm.runtime.backends.onnxruntime.providers import create, load_onnxruntime
from vitrm.runtime.session import Result, Session
from vitrm.runtime.system import machine

FP16_ON_CPU = (
    "FP16 on ONNX Runtime's CPU provider is computed in float32: the file is smaller, not faster, and no preview of a "
    "GPU's FP16"
)
INT8_FOR_TENSORRT = "made for TensorRT: ONNX Runtime runs its int8 products slower than float32 ones; vitrm-export --int8 --target cpu is for here"
SATURATES = (
    "int8 of an earlier version: this CPU has no VNNI, so its integer sums may saturate and the answers differ from those that "
    "were verified; export it again"
)
CUTS_FLOAT16 = (
    "onnxruntime before 1.30 cuts float16 values off on a CPU where it should round them to int8: answers are worse than "
    "those of a GPU or of a newer onnxruntime; pip install 'onnxruntime>=1.30'"
)


class OnnxRuntimeSession(Session):
    """An .onnx file in ONNX Runtime."""

    def __init__(
        self,
        path: Path,
        *,
        device: str = "cpu",
        threads: int | None = None,
        provider: str | None = None,
        bound: bool | None = None,
        verify: bool = True,
    ) -> None:
        """Opens `path`; see `vitrm.runtime.open`.  `bound`: see `vitrm.runtime.backends.onnxruntime.binding.BoundGraph`."""
        ort = load_onnxruntime()
        file = inspect(path, verify=verify)
        self.path, self.metadata = path, file.metadata
        session, running = create(ort, file, device, threads, provider)
        self._graph = BoundGraph(session, running, str(path), bound=bound)
        self.device_kind, self.device, self.threads = running.device_kind, running.device, running.threads
        self.device_index = running.index
        self.backend = running.backend
        self.prefers_one_batch = running.provider.startswith("tensorrt")  # builds an engine for each size it meets
        self.size_bytes = file.size_bytes
        inputs, outputs = self._graph.inputs, self._graph.outputs
        self._takes_depth = STEPS in inputs
        self._outputs = [n for n in (LOGITS, HALT_PROB, STEPS_USED) if n in outputs]
        needed = {LOGITS, HALT_PROB, STEPS_USED} if self.metadata.recursive else {LOGITS}
        if PIXELS not in inputs or not needed <= outputs or inputs - {PIXELS, STEPS, HALT_THRESHOLD}:
            raise UserError(
                f"{path}: inputs {sorted(inputs)} and outputs {sorted(outputs)} are not those of a vitrm "
                f"{self.metadata.graph} graph ({PIXELS} → {', '.join(sorted(needed))}): export it again"
            )
        check_tensors(str(path), self.metadata, self._graph.tensors)
        self.notes = (*notes_on(self.metadata, running.provider, ort.__version__), *file.notes)

    @property
    def takes_depth(self) -> bool:
        return self._takes_depth

    def _runner(self, images: NDArray[np.float32], steps: int, halt_threshold: float) -> Callable[[], Result]:
        feeds: dict[str, Any] = {PIXELS: images}
        graph, names = self._graph, self._outputs
        if self._takes_depth:
            # Scalars; [1] in the copy of the file that vitrm-export --triton makes.
            feeds[STEPS] = np.full((1,) * graph.rank(STEPS), steps, np.int64)
            feeds[HALT_THRESHOLD] = np.full((1,) * graph.rank(HALT_THRESHOLD), halt_threshold, np.float32)

        def run() -> Result:
            outputs = graph.run(names, feeds)
            return Result(outputs[LOGITS], outputs.get(HALT_PROB), outputs.get(STEPS_USED))

        return run


def notes_on(metadata: Metadata, provider: str, version: str) -> tuple[str, ...]:
    """Returns remarks for readers of an artifact's figures where it runs on something that it is not made for; `version` is onnxruntime's."""
    if provider == "cpu" and metadata.precision == "fp16":
        return (FP16_ON_CPU,)
    if metadata.target == "cpu" and provider == "cpu" and may_saturate(metadata):
        return (SATURATES,)
    if metadata.target == "tensorrt" and not provider.startswith("tensorrt"):
        cuts = provider == "cpu" and metadata.precision == "int8" and cuts_float16(version)
        return (INT8_FOR_TENSORRT, *((CUTS_FLOAT16,) if cuts else ()))
    if metadata.target == "cpu" and provider != "cpu":
        return ("made for a CPU: its integer products run there alone; vitrm-export --fp16 is for GPUs",)
    return ()


def cuts_float16(version: str) -> bool:
    """True for an onnxruntime whose QuantizeLinear of float16 truncates on a CPU: 1.22 to 1.29 do, 1.30 rounds."""
    return tuple(int(part) for part in version.split(".")[:2]) < (1, 30)


def may_saturate(metadata: Metadata) -> bool:
    """Tells whether an artifact's integer sums may differ on this CPU from those on the one where it was verified."""
    return metadata.precision == "int8" and not metadata.exact_sums and machine.saturates_integer_sums()
