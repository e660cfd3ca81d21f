"""Standard streams that cost no result: a command that has lost its reader goes on, and says so by its exit code.

A pipe may be closed (`| head`), a disk full, a terminal gone with its ssh connection, a stream closed from the start
(`>&-`); none of it may end hours of training, or keep a file from being written.  A terminal that knows ASCII alone gets
-> for an arrow.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from vitrm.system.terminal import say

READER_GONE = 141  # the exit code that a shell gives a command ended by SIGPIPE
_STREAMS = {"stdout": 1, "stderr": 2}
_PLAIN = {"→": "->", "×": "x", "–": "-", "—": "-", "−": "-", "…": "...", "≤": "<=", "≥": ">=", "±": "+-", "Δ": "delta"}
_PLAIN |= {
    "°": " deg",
    "·": "-",
    "•": "*",
    "✓": "+",
    "✗": "x",
    "²": "^2",
    "µ": "u",
    "“": '"',
    "”": '"',
    "‘": "'",
    "’": "'",
}


class _Output(io.FileIO):
    """A stream's file descriptor; what is written after a failure goes nowhere."""

    failure: OSError | None = None

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.terminal = os.isatty(descriptor)

    def write(self, data: object) -> int:
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        while self.failure is None:
            try:
                written: int | None = super().write(view)
            except OSError as error:
                self.failure = error
                break
            if written is not None:
                return written
            select.select((), (self,), ())  # somebody made it non-blocking
        return len(view)


class Streams:
    """This process's standard streams, wrapped."""

    def __init__(self) -> None:
        self.outputs: dict[str, _Output] = {}

    def flush(self) -> None:
        """Writes out what is buffered."""
        for name in self.outputs:
            getattr(sys, name).flush()

    def exit_code(self) -> int:
        """After `flush`, 0 if standard output could be written, 141 if its reader has gone, else 2, which is said on standard error."""
        output = self.outputs.get("stdout")
        if output is None or output.failure is None:
            return 0
        if output.failure.errno == errno.EPIPE or (
            output.terminal and output.failure.errno in (errno.EIO, errno.ENXIO)
        ):
            return READER_GONE
        reason = output.failure.strerror or output.failure
        say(f"error: standard output could not be written ({reason}); files were written all the same", error=True)
        return 2


@contextmanager
def forgiving() -> Iterator[Streams]:
    """A context in which writing to standard output and standard error raises nothing.

    Streams that somebody has replaced (a test, a notebook) are left alone.
    """
    _open_closed()
    streams, before = Streams(), {}
    for name, number in _STREAMS.items():
        current: TextIO | None = getattr(sys, name)
        if current is not getattr(sys, f"__{name}__"):
            continue
        output = _Output(number)
        before[name], streams.outputs[name] = current, output
        setattr(sys, name, _text(output, current))
    try:
        yield streams
    finally:
        streams.flush()
        for name, output in streams.outputs.items():
            setattr(sys, name, before[name])
            if output.failure is not None:
                # The interpreter flushes its own streams when it ends, and would complain.
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, _STREAMS[name])
                os.close(null)


def _text(output: _Output, current: TextIO | None) -> TextIO:
    """A text stream over `output`, with the encoding and buffering of the `current` one."""
    buffered = io.BufferedWriter(output)
    if current is None:  # closed when the command began
        return io.TextIOWrapper(buffered, encoding="utf-8", errors="vitrm.plain")
    with suppress(OSError, ValueError):
        current.flush()
    return io.TextIOWrapper(
        buffered,
        encoding=current.encoding,
        errors="vitrm.plain",
        line_buffering=bool(getattr(current, "line_buffering", False)),
        write_through=bool(getattr(current, "write_through", False)),
    )


def _open_closed() -> None:
    """Opens /dev/null for standard streams that were closed: a file opened later would get their number, and their output."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)  # as the streams are


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Replaces what an encoding lacks by ASCII; a byte of a file name that is no character, and all the rest, as an escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_plain_character(c) for c in error.object[error.start : error.end]), error.end


def _plain_character(character: str) -> str:
    code = ord(character)
    if character in _PLAIN:
        return _PLAIN[character]
    if 0x2500 <= code < 0x2600 or 0x2800 <= code < 0x2900:  # lines, blocks and spinners
        return "-"
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("ascii", "backslashreplace").decode("ascii")


codecs.register_error("vitrm.plain", _plain)
