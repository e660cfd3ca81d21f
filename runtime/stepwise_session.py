"""A stepwise folder in ONNX Runtime: the host holds the state, as arrays (see vitrm.runtime.stepping)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitrm.errors import UserError
from vitrm.runtime.metadata import EMBEDDED, HALT_PROB, LOGITS, NEXT, PARTS, PIXELS, STATE, Metadata
from vitrm.runtime.onnxruntime_session import create, describe_device, first_line, load_onnxruntime, notes_on
from vitrm.runtime.stepping import Stepping, SteppingSession

_NAMES = {
    "embed": ({PIXELS}, {*EMBEDDED, *STATE}),
    "step": ({*EMBEDDED, *STATE}, set(NEXT)),
    "heads": (set(STATE[:1]), {LOGITS, HALT_PROB}),
}


class HostStepping(Stepping):
    """A batch whose state is in the host's memory."""

    def __init__(self, session: StepwiseSession, images: NDArray[np.float32]) -> None:
        super().__init__(len(images), session.metadata.model["classes"])
        self._session = session
        outputs = dict(
            zip((*EMBEDDED, *STATE), session.run("embed", (*EMBEDDED, *STATE), {PIXELS: images}), strict=True)
        )
        self._embedded = {n: outputs[n] for n in EMBEDDED}
        self._state = {n: outputs[n] for n in STATE}
        # The rows last gathered: the same ones usually go on.
        self._rows = np.arange(len(images))
        self._gathered = self._embedded

    def _advance(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        everyone = len(rows) == len(self._logits)
        if not np.array_equal(rows, self._rows):
            self._rows = rows
            self._gathered = self._embedded if everyone else {n: v[rows] for n, v in self._embedded.items()}
        state = self._state if everyone else {n: v[rows] for n, v in self._state.items()}
        after = dict(zip(STATE, self._session.run("step", NEXT, {**self._gathered, **state}), strict=True))
        logits, halt_prob = self._session.run("heads", (LOGITS, HALT_PROB), {STATE[0]: after[STATE[0]]})
        if everyone:
            self._state = after
        else:
            for name, values in self._state.items():
                values[rows] = after[name]
        return logits, halt_prob


class StepwiseSession(SteppingSession):
    """A folder of embed.onnx, step.onnx and heads.onnx in ONNX Runtime."""

    def __init__(self, path: Path, *, device: str = "cpu", threads: int | None = None) -> None:
        """Opens the folder `path`; see `vitrm.runtime.open`."""
        ort = load_onnxruntime()
        missing = [f"{part}.onnx" for part in PARTS if not (path / f"{part}.onnx").is_file()]
        if missing:
            raise UserError(f"{path} lacks {', '.join(missing)}: copy the whole folder, or export it again")
        self.path = path
        self._parts = {part: create(ort, path / f"{part}.onnx", device, threads) for part in PARTS}
        found = {
            part: Metadata.from_props(s.get_modelmeta().custom_metadata_map, str(path / f"{part}.onnx"))
            for part, s in self._parts.items()
        }
        self.metadata = found["step"]
        for part, metadata in found.items():
            if metadata != self.metadata or metadata.graph != "stepwise":
                raise UserError(
                    f"{path / part}.onnx and {path / 'step'}.onnx are not of one export (graph {metadata.graph}, weights "
                    f"{metadata.weights_sha256[:12]}; {self.metadata.graph}, {self.metadata.weights_sha256[:12]}): export "
                    "the folder again"
                )
            inputs = {i.name for i in self._parts[part].get_inputs()}
            outputs = {o.name for o in self._parts[part].get_outputs()}
            if (inputs, outputs) != _NAMES[part]:
                raise UserError(
                    f"{path / part}.onnx: inputs {sorted(inputs)} and outputs {sorted(outputs)} are not those of a vitrm "
                    f"{part} graph: export it again"
                )
        self.device_kind, self.device, self.threads = describe_device(self._parts["step"], threads)
        self.backend = f"onnxruntime-{self.device_kind}"
        self.size_bytes = sum((path / f"{part}.onnx").stat().st_size for part in PARTS)
        self.notes = notes_on(self.metadata, self.device_kind)

    def _begin(self, images: NDArray[np.float32]) -> HostStepping:
        return HostStepping(self, images)

    def run(self, part: str, outputs: tuple[str, ...], feeds: dict[str, Any]) -> list[NDArray[Any]]:
        """Runs one of the graphs."""
        try:
            found: list[NDArray[Any]] = self._parts[part].run(outputs, feeds)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            batch = len(next(iter(feeds.values())))
            raise UserError(f"{self.name}/{part}.onnx failed on a batch of {batch}: {first_line(error)}") from error
        return found
