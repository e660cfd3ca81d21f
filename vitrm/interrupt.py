"""Ctrl-C and SIGTERM, held back until a moment when the state is whole.

An exception in the middle of an optimizer update would leave half the weights updated.  So the first
signal only sets a mark, which the training loop looks at between batches; the second one raises at once.

Not so in one of several processes: Ctrl-C reaches each of them twice, from the terminal and from torchrun, and
torchrun itself kills those that take too long.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """A context that counts signals, and raises KeyboardInterrupt at the second.  Does nothing outside the main thread."""

    def __init__(self, *, patient: bool = False) -> None:
        self.patient = patient  # never raise
        self.asked = 0  # signals received
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._handle) for s in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.asked += 1
        if self.asked > 1 and not self.patient:
            raise KeyboardInterrupt("not saved since the last state")
