"""A stepwise folder in ONNX Runtime: the host decides who goes on, the state stays where it is computed (see
vitrm.runtime.stepping).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitrm.errors import UserError
from vitrm.runtime.artifact.graph_names import ANSWER, HALT_PROB, LOGITS, NEXT_SUFFIX, PARTS, PIXELS
from vitrm.runtime.artifact.interface import CarriedTensors, check_tensors
from vitrm.runtime.artifact.onnx_file import inspect
from vitrm.runtime.backends.onnxruntime.binding import BoundGraph, BoundTensor, on_host
from vitrm.runtime.backends.onnxruntime.providers import create, load_onnxruntime
from vitrm.runtime.backends.onnxruntime.session import notes_on
from vitrm.runtime.stepping import Stepping, SteppingSession


class BoundStepping(Stepping):
    """A batch on its way through the three graphs.

    What the active samples need stays in the backend's memory, a GPU's included, from one step to the next.  Only when
    other samples are active than at the step before do tensors pass through the host, which keeps those of the samples
    that are not.
    """

    def __init__(self, session: StepwiseSession, images: NDArray[np.float32]) -> None:
        super().__init__(len(images), session.metadata.model["classes"])
        self._session = session
        carried = session.carried
        names = (*carried.embedded, *carried.state)
        made = session.run("embed", names, {PIXELS: images}, keep=names)
        self._rows = np.arange(len(images))  # the samples that the next two are of
        self._embedded = {n: made[n] for n in carried.embedded}
        self._state = {n: made[n] for n in carried.state}
        self._everyone: dict[str, NDArray[Any]] = {}  # every sample's tensors on the host, once some have left

    def _advance(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        if not np.array_equal(rows, self._rows):
            self._regroup(rows)
        later = self._session.carried.next
        made = self._session.run("step", later, {**self._embedded, **self._state}, keep=later)
        state = {n: made[n + NEXT_SUFFIX] for n in self._state}
        answer = self._session.run("heads", (LOGITS, HALT_PROB), {ANSWER: state[ANSWER]})
        self._state = state  # only now: a run that fails leaves the state as it was before the step
        return answer[LOGITS], answer[HALT_PROB]

    def _regroup(self, rows: NDArray[np.int64]) -> None:
        """Makes `rows` the samples that the next step is of."""
        if not self._everyone:
            self._everyone = {n: on_host(v) for n, v in {**self._embedded, **self._state}.items()}
        else:
            for name, values in self._state.items():
                self._everyone[name][self._rows] = on_host(values)
        self._embedded = {n: self._everyone[n][rows] for n in self._embedded}
        self._state = {n: self._everyone[n][rows] for n in self._state}
        self._rows = rows


class StepwiseSession(SteppingSession):
    """A folder of embed.onnx, step.onnx and heads.onnx in ONNX Runtime."""

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
        """Opens the folder `path`; see `vitrm.runtime.open`.  `bound`: see `vitrm.runtime.backends.onnxruntime.binding.BoundGraph`."""
        ort = load_onnxruntime()
        missing = [f"{part}.onnx" for part in PARTS if not (path / f"{part}.onnx").is_file()]
        if missing:
            raise UserError(f"{path} lacks {', '.join(missing)}: copy the whole folder, or export it again")
        self.path = path
        self._parts: dict[str, BoundGraph] = {}
        files = {part: inspect(path / f"{part}.onnx", verify=verify) for part in PARTS}
        self.metadata = files["step"].metadata
        for part, file in files.items():
            metadata = file.metadata
            if metadata != self.metadata or metadata.graph != "stepwise":
                raise UserError(
                    f"{path / part}.onnx and {path / 'step'}.onnx are not of one export (graph {metadata.graph}, weights "
                    f"{metadata.weights_sha256[:12]}; {self.metadata.graph}, {self.metadata.weights_sha256[:12]}): export "
                    "the folder again"
                )
            session, running = create(ort, file, device, threads, provider)
            self._parts[part] = BoundGraph(session, running, f"{self.name}/{part}.onnx", bound=bound)
            check_tensors(str(file.path), metadata, self._parts[part].tensors)
        self.carried = CarriedTensors.between(path, {part: (g.inputs, g.outputs) for part, g in self._parts.items()})
        self.device_kind, self.device, self.threads = running.device_kind, running.device, running.threads
        self.device_index = running.index
        self.backend = running.backend
        self.prefers_one_batch = running.provider.startswith("tensorrt")  # builds an engine for each size it meets
        self.size_bytes = sum(file.size_bytes for file in files.values())
        self.notes = (*notes_on(self.metadata, running.provider, ort.__version__), *files["step"].notes)

    def _begin(self, images: NDArray[np.float32]) -> BoundStepping:
        return BoundStepping(self, images)

    def run(
        self, part: str, outputs: tuple[str, ...], feeds: dict[str, BoundTensor], *, keep: tuple[str, ...] = ()
    ) -> dict[str, BoundTensor]:
        """Runs one of the graphs; see `vitrm.runtime.backends.onnxruntime.binding.BoundGraph.run`."""
        return self._parts[part].run(outputs, feeds, keep=keep)
