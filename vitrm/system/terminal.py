"""The one place from which commands print: text from files can do nothing to the terminal.

A run's name, a class, a data set, a file name, a setting or an error that quotes one comes from whoever made the file.  As
it stands it could set the window's title, erase lines, reorder them (bidirectional controls) or, where `rich` reads
markup, change colors.  So everything is written with `say`, or on a `console`, and control characters come out as the
escapes that Python writes them with.  (`make lint` refuses a bare `print`.)
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

# C0 but tab and newline, DEL, C1; marks, embeddings, overrides and isolates of direction; line and paragraph separators;
# halves of surrogate pairs, which a file name that is no UTF-8 has and no terminal can be sent.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def neutral(text: str) -> str:
    """`text` with every control character but tab and newline as the escape that Python writes."""
    return _CONTROLS.sub(_escaped, text)


def neutral_line(text: str) -> str:
    """`neutral`, and on one line: a newline comes out as an escape, too."""
    return neutral(text).replace("\n", "\\n")


def say(text: str = "", *, error: bool = False) -> None:
    """Prints `text` and a newline to standard output, or to standard error, at once."""
    print(neutral(text), file=sys.stderr if error else sys.stdout, flush=True)


@contextmanager
def sparingly(seconds: float = 15.0) -> Iterator[Callable[[str], None]]:
    """Yields a function that takes the present stage in words; inside, it is said on standard error every so many seconds.

    For a log: short work says nothing, long work is not silent, and what has not changed is not said again.
    """
    present, done = "", Event()

    def take(text: str) -> None:
        nonlocal present
        present = text

    def tell() -> None:
        said = ""
        while not done.wait(seconds):
            if present != said:
                said = present
                say(said, error=True)

    thread = Thread(target=tell, name="progress", daemon=True)
    thread.start()
    try:
        yield take
    finally:
        done.set()
        thread.join()


def console(*, error: bool = False, width: int | None = None) -> Console:
    """A `rich` console on standard output, or on standard error, that reads no markup and neutralizes what it shows.

    Raises ImportError where `rich` is not installed.
    """
    from rich.console import Console
    from rich.segment import Segment

    class Neutral(Console):
        def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
            for segment in super().render(renderable, options):
                # A control segment is rich's own: it moves the cursor.
                yield segment if segment.control else Segment(neutral(segment.text), segment.style)

    return Neutral(stderr=error, width=width, markup=False, highlight=False, emoji=False)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return {13: "\\r"}.get(code, f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")
