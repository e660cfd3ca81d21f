"""The error a user can mend, and how a command ends.

A `UserError` says what was found, what was expected and what to do about it; commands print it
as one line and exit with 2.  Every other exception is a bug and keeps its traceback (exit 1).
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence

from vitrm.terminal import neutral_line, say


class UserError(Exception):
    """Bad input or a missing tool, with the way out in its message."""


def explain_os_error(error: OSError, doing: str) -> UserError:
    """Turns an `OSError` met while `doing` something (a verb phrase) into a `UserError`."""
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"no space left on the disk while {doing}{where}: free some space and run the command again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(f"not permitted while {doing}{where}: choose a place you can write to")
    return UserError(f"{error.strerror or error} while {doing}{where}")


def run_command(command: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None = None) -> int:
    """Runs a command's body and returns its exit code: 0 done, 2 user error, 130 interrupted.

    Raises whatever is not a `UserError`: that is a bug, and Python's own traceback (exit 1) is the report.
    """
    # A plain `kill` then unwinds like Ctrl-C: files half written are removed, the message is one line.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return command(argv) or 0
    except UserError as error:
        # Processes beside each other (torchrun) write to one terminal: say whose error it is.
        rank = os.environ.get("RANK", "0")
        say(neutral_line(f"error{'' if rank == '0' else f' (process {rank})'}: {error}"), error=True)
        return 2
    except KeyboardInterrupt as error:
        detail = str(error)
        if os.environ.get("RANK", "0") == "0":
            say(neutral_line(f"interrupted{': ' + detail if detail else ''}"), error=True)
        return 130
    except BrokenPipeError:
        # The reader of our output (`| head`) went away; there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt
