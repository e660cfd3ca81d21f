"""The recursion driven from the host: one step at a time, and only for the samples that need it.

    state = session.start(images)
    state.step()                        # one step for every sample
    state.step(halt_threshold=0.9)      # one more for those whose halt_prob does not exceed 0.9 yet
    state.logits, state.halt_prob, state.steps_used

In a batch, unrolled and loop compute every step for every sample until the last one has halted; here a halted
sample leaves, and the others get cheaper.  A state can be kept: a sample that has halted keeps its y and z, so a
higher threshold later goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitrm.errors import UserError
from vitrm.runtime.metadata import EMBEDDED, HALT_PROB, LOGITS, NEXT, PARTS, PIXELS, STATE, Metadata
from vitrm.runtime.onnxruntime_session import create, describe_device, first_line, load_onnxruntime, notes_on
from vitrm.runtime.session import Result, Session

_NAMES = {
    "embed": ({PIXELS}, {*EMBEDDED, *STATE}),
    "step": ({*EMBEDDED, *STATE}, set(NEXT)),
    "heads": (set(STATE[:1]), {LOGITS, HALT_PROB}),
}


class Stepping:
    """A batch on its way through the recursion.  Made by `StepwiseSession.start`; independent of all others."""

    def __init__(self, session: StepwiseSession, images: NDArray[np.float32]) -> None:
        self._session = session
        outputs = dict(
            zip((*EMBEDDED, *STATE), session.run("embed", (*EMBEDDED, *STATE), {PIXELS: images}), strict=True)
        )
        self._embedded = {n: outputs[n] for n in EMBEDDED}
        self._state = {n: outputs[n] for n in STATE}
        self._logits = np.zeros((len(images), session.metadata.model["classes"]), np.float32)
        self._halt_prob = np.full(len(images), -np.inf, np.float32)  # exceeds no threshold: every sample starts active
        self._steps_used = np.zeros(len(images), np.int64)
        # The rows last gathered: the same ones usually go on.
        self._rows = np.arange(len(images))
        self._gathered = self._embedded

    def step(self, halt_threshold: float | None = None) -> int:
        """One step for every sample whose halt_prob does not exceed the threshold; returns how many those were.

        None: for every sample.  A threshold of 1 or more, or NaN, halts none.
        """
        rows = np.arange(len(self._logits))
        if halt_threshold is not None and halt_threshold < 1:
            rows = np.flatnonzero(~(self._halt_prob > halt_threshold))
        if not len(rows):
            return 0
        everyone = len(rows) == len(self._logits)
        if not np.array_equal(rows, self._rows):
            self._rows = rows
            self._gathered = self._embedded if everyone else {n: v[rows] for n, v in self._embedded.items()}
        state = self._state if everyone else {n: v[rows] for n, v in self._state.items()}
        after = dict(zip(STATE, self._session.run("step", NEXT, {**self._gathered, **state}), strict=True))
        logits, halt_prob = self._session.run("heads", (LOGITS, HALT_PROB), {STATE[0]: after[STATE[0]]})
        if everyone:
            self._state, self._logits, self._halt_prob = after, logits, halt_prob
        else:
            for name, values in self._state.items():
                values[rows] = after[name]
            self._logits[rows], self._halt_prob[rows] = logits, halt_prob
        self._steps_used[rows] += 1
        return len(rows)

    @property
    def logits(self) -> NDArray[np.float32]:
        """[B, classes] after each sample's last step.  Raises `UserError` before the first."""
        return self.result.logits

    @property
    def halt_prob(self) -> NDArray[np.float32]:
        """[B] in [0, 1] after each sample's last step.  Raises `UserError` before the first."""
        halt_prob = self.result.halt_prob
        assert halt_prob is not None
        return halt_prob

    @property
    def steps_used(self) -> NDArray[np.int64]:
        """[B]: steps that each sample has taken so far."""
        return self._steps_used.copy()

    @property
    def result(self) -> Result:
        """What is known so far, as copies.  Raises `UserError` before the first step."""
        if not self._steps_used.all():
            raise UserError("no step has been taken yet, so there is no answer: call step() first")
        return Result(self._logits.copy(), self._halt_prob.copy(), self._steps_used.copy())


class StepwiseSession(Session):
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

    @property
    def takes_depth(self) -> bool:
        return True

    def start(self, images: NDArray[np.float32]) -> Stepping:
        """Embeds `images`, float32 [B, 3, H, W] in [0, 1], and returns their state at depth 0.

        Raises `UserError` for images of another shape, type or range.
        """
        self._check_images(images)
        return Stepping(self, np.ascontiguousarray(images))

    def run(self, part: str, outputs: tuple[str, ...], feeds: dict[str, Any]) -> list[NDArray[Any]]:
        """Runs one of the graphs."""
        try:
            found: list[NDArray[Any]] = self._parts[part].run(outputs, feeds)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            batch = len(next(iter(feeds.values())))
            raise UserError(f"{self.name}/{part}.onnx failed on a batch of {batch}: {first_line(error)}") from error
        return found

    def _runner(
        self, images: NDArray[np.float32], steps: int | None, halt_threshold: float | None
    ) -> Callable[[], Result]:
        depth = self.metadata.steps if steps is None else steps
        threshold = self.metadata.halt_threshold if halt_threshold is None else halt_threshold

        def run() -> Result:
            state = Stepping(self, images)
            for _ in range(depth):
                if not state.step(threshold):
                    break
            return state.result

        return run
