"""The recursion driven from the host: one step at a time, and only for the samples that need it.

    state = session.start(images)
    state.step()                        # one step for every sample
    state.step(halt_threshold=0.9)      # one more for those whose halt_prob does not exceed 0.9 yet
    state.logits, state.halt_prob, state.steps_used

In a batch, unrolled and loop compute every step for every sample until the last one has halted; here a halted
sample leaves, and the others get cheaper.  A state can be kept: a sample that has halted keeps its y and z, so a
higher threshold later goes on where it stopped.

Which samples go on, and what they have answered, is the same on every backend; where their state lies and how it
advances is the backend's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from vitrm.errors import UserError
from vitrm.runtime.session import Result, Session


class Stepping(ABC):
    """A batch on its way through the recursion.  Made by `SteppingSession.start`; independent of all others."""

    def __init__(self, count: int, classes: int) -> None:
        self._logits = np.zeros((count, classes), np.float32)
        self._halt_prob = np.full(count, -np.inf, np.float32)  # exceeds no threshold: every sample starts active
        self._steps_used = np.zeros(count, np.int64)

    @abstractmethod
    def _advance(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Takes one step for the samples `rows` (ascending); returns their logits [k, classes] and halt_prob [k].

        All others keep their state.
        """

    def step(self, halt_threshold: float | None = None) -> int:
        """Takes one step for every sample whose halt_prob does not exceed the threshold; returns how many those were.

        None: for every sample.  A threshold of 1 or more, or NaN, halts none.
        """
        rows = np.arange(len(self._logits))
        if halt_threshold is not None and halt_threshold < 1:
            rows = np.flatnonzero(~(self._halt_prob > halt_threshold))
        if not len(rows):
            return 0
        self._logits[rows], self._halt_prob[rows] = self._advance(rows)
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
        """Answers so far, as copies.  Raises `UserError` before the first step."""
        if not self._steps_used.all():
            raise UserError("no step has been taken yet, so there is no answer: call step() first")
        return Result(self._logits.copy(), self._halt_prob.copy(), self._steps_used.copy())


class SteppingSession(Session):
    """An artifact of three graphs, embed, step and heads."""

    @property
    def takes_depth(self) -> bool:
        return True

    def start(self, images: NDArray[np.float32]) -> Stepping:
        """Embeds `images`, float32 [B, 3, H, W] in [0, 1], and returns their state at depth 0.

        Raises `UserError` for images of another shape, type or range.
        """
        self._check_images(images)
        return self._begin(np.ascontiguousarray(images))

    @abstractmethod
    def _begin(self, images: NDArray[np.float32]) -> Stepping:
        """The state of `images`, which have been checked."""

    def _runner(self, images: NDArray[np.float32], steps: int, halt_threshold: float) -> Callable[[], Result]:

        def run() -> Result:
            state = self._begin(images)
            for _ in range(steps):
                if not state.step(halt_threshold):
                    break
            return state.result

        return run
