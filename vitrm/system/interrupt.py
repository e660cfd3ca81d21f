"""Ctrl-C, SIGTERM and SIGHUP, held back until a moment when the state is whole.

An exception in the middle of an optimizer update would leave half the weights updated.  So the first
signal only sets a mark, which the training loop looks at between batches; the second one raises at once.  SIGHUP never
does: when a connection is lost, the kernel and the shell send one each.  What is ignored (under nohup) stays ignored.

Not so in one of several processes: Ctrl-C reaches each of them twice, from the terminal and from torchrun, and
torchrun itself kills those that take too long.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interruption:
    """A context that counts signals, and raises KeyboardInterrupt at the second.  Does nothing outside the main thread."""

    def __init__(self, *, patient: bool = False) -> None:
        self.patient = patient  # never raise
        self.asked = 0  # signals received
        self._hung_up = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            heard = [s for s in _SIGNALS if signal.getsignal(s) != signal.SIG_IGN]
            self._before = {s: signal.signal(s, self._handle) for s in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            # The second one may still come, and nobody asks for more than it has had.
            signal.signal(number, signal.SIG_IGN if number == signal.SIGHUP and self._hung_up else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self._hung_up = True
            self.asked = max(self.asked, 1)
            return
        self.asked += 1
        if self.asked > 1 and not self.patient:
            raise KeyboardInterrupt("not saved since the last state")
