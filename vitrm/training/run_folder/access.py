"""Access to a run folder: one run at a time, and nothing of anybody else's in it.

While a run goes on, the folder has a file .lock that the (main) process holds: a second run into it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from vitrm import checkpoint
from vitrm.errors import UserError
from vitrm.system.files import is_leftover, remove_leftovers
from vitrm.system.locks import Lock, check_free, lock
from vitrm.training.parallel.distributed import World
from vitrm.training.run_folder import state as training_state
from vitrm.training.run_folder.state import STATE_FILE

LOCK_FILE = ".lock"
_OTHER_OUT = "wait for it, stop it, or name another folder with --out"


@contextmanager
def alone_in(out: Path, world: World) -> Iterator[Lock]:
    """A context in which no other process trains into the folder `out`, which the main process locks for all.

    Raises `UserError` where another process does.
    """
    with ExitStack() as stack:

        def enter() -> Lock:
            _check_no_file(out)
            return stack.enter_context(lock(out / LOCK_FILE, str(out), _OTHER_OUT))

        yield world.broadcast(enter)


def check_not_in_use(out: Path) -> None:
    """Raises `UserError` if another process trains into `out` at this moment."""
    check_free(out / LOCK_FILE, str(out), _OTHER_OUT)


def take_over(out: Path, resume: bool, locked: Lock, say: Callable[[str], None]) -> None:
    """Checks the folder, now that it is this process's, and clears away what a killed one left."""
    if not locked.held:
        say(f"note: the file system of {out} has no locks: nothing keeps another process from training into it, too")
    if locked.lost is not None:
        say(
            f"note: {out} was not given back by {locked.lost}: make sure that it has ended, as this file system may keep "
            "locks to each machine"
        )
    check_folder(out, resume)
    remove_leftovers(out)


def check_folder(out: Path, resume: bool) -> None:
    """Raises `UserError` unless a run may be started (or, with `resume`, continued) in `out`."""
    _check_no_file(out)
    if resume:
        training_state.read_header(out / STATE_FILE)
    elif (out / STATE_FILE).exists() or (out / checkpoint.CONFIG_FILE).exists():
        raise UserError(f"{out} already holds a run: continue it with --resume, or name another folder with --out")
    elif out.exists() and any(p.name != LOCK_FILE and not is_leftover(p.name) for p in out.iterdir()):
        raise UserError(f"{out} is not empty and holds no run: name another folder with --out")


def _check_no_file(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, expected a folder for the run: name another --out")
