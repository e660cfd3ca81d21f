"""The error a user can mend, and how a command ends.

A `UserError` says what was found, what was expected and what to do about it; commands print it
as one line and exit with 2, as they do for what the system refuses (a full disk, a name too long).  Every other exception is
a bug and keeps its traceback (exit 1).
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Sequence

from vitrm.system.streams import forgiving
from vitrm.system.terminal import neutral_line, say

# What is the machine's or a name's fault, wherever it comes up; a file that is not there may be ours.
_SURROUNDINGS = {errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT}
_SURROUNDINGS |= {errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE}


_LONGEST_LINE = 300  # characters that one line of another library's message may take


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


def first_line(error: BaseException, *, named: bool = False) -> str:
    """The first line of an exception's message, at most 300 characters; the exception's type where it has no message.

    `named` puts the type before the message, for errors of which the message alone says too little.
    """
    kind = type(error).__name__
    text = " ".join((str(error).strip().splitlines() or [""])[0].split())
    text = text if len(text) <= _LONGEST_LINE else text[: _LONGEST_LINE - 1] + "…"
    return text if text and not named else f"{kind}: {text}" if text else kind


def run_command(command: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None = None) -> int:
    """Runs a command's body and returns its exit code.

    0 done, 2 user error, 130 interrupted (Ctrl-C, `kill`, or a lost terminal), 141 done, but nobody reads the output any more.
    What cannot be printed ends nothing: files are written all the same.
    Raises whatever is not a `UserError`: that is a bug, and Python's own traceback (exit 1) is the report.
    """
    # A plain `kill`, or the end of an ssh connection, then unwinds like Ctrl-C: files half written are removed, the message
    # is one line.  What is ignored (nohup) stays so.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupt)
    with forgiving() as streams:
        try:
            code = _outcome(command, argv)
        except SystemExit as error:  # of argparse
            streams.flush()
            raise SystemExit(error.code or streams.exit_code()) from None
        streams.flush()
        return code or streams.exit_code()


def _outcome(command: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None) -> int:
    """The exit code of a command's body, whose errors are printed."""
    from vitrm.system.memory import shortage_explained  # which raises the error above

    try:
        with shortage_explained(lambda: "free some, or run this on a machine with more"):
            return command(argv) or 0
    except UserError as error:
        return _refuse(error)
    except OSError as error:
        if error.errno not in _SURROUNDINGS:
            raise
        return _refuse(explain_os_error(error, "running this command"))
    except KeyboardInterrupt as error:
        detail = str(error)
        if os.environ.get("RANK", "0") == "0":
            say(neutral_line(f"interrupted{': ' + detail if detail else ''}"), error=True)
        return 130


def _refuse(error: UserError) -> int:
    # Processes beside each other (torchrun) write to one terminal: say whose error it is.
    rank = os.environ.get("RANK", "0")
    say(neutral_line(f"error{'' if rank == '0' else f' (process {rank})'}: {error}"), error=True)
    return 2


def _interrupt(signum: int, frame: object) -> None:
    if signum == signal.SIGHUP:
        # A lost connection sends it more than once, by the kernel and by the shell: the second must not disturb the clearing up.
        signal.signal(signum, signal.SIG_IGN)
    raise KeyboardInterrupt
