"""Locks between processes: a file that its holder keeps open under flock.

The kernel gives a lock back when its holder ends, however it ends, so no lock is ever stale.  A pid in a file would be:
pids come again, and mean nothing in another container or on another machine.  flock holds between containers of one
machine, and over NFS, unless it is mounted to keep locks to itself; what a file says of its holder is for messages alone.

A file system without locks (some of FUSE and Lustre) is told by `Lock.held`.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import json
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from vitrm.errors import UserError, explain_os_error

NO_LOCKS = errno.ENOTSUP  # what `acquire` raises where the file system has none
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_POLL = 0.05  # seconds between two tries
# statfs' numbers for file systems that one kernel has for itself: ext, XFS, Btrfs, tmpfs, overlay, F2FS, ZFS, bcachefs, FAT.
_LOCAL = {0xEF53, 0x58465342, 0x9123683E, 0x01021994, 0x794C7630, 0xF2F52010, 0x2FC12FC1, 0xCA451A4E, 0x4D44}
_open_locks: set[int] = set()  # descriptors


@dataclass(frozen=True)
class Holder:
    """Who holds a lock, or held it last."""

    pid: int
    host: str
    since: str  # local time
    kernel: str  # see `kernel`
    pids: str  # the namespace that `pid` belongs to

    def __str__(self) -> str:
        container = " in another container" if self.kernel == kernel() and self.pids != pid_namespace() else ""
        return f"process {self.pid}{container} on {self.host}, since {self.since}"


@dataclass(frozen=True)
class Lock:
    """A lock that was asked for."""

    held: bool  # False where the file system has no locks
    lost: Holder | None = None  # on another machine: it may be dead, or the file system keeps locks to each machine


@functools.lru_cache(maxsize=1)
def kernel() -> str:
    """A name for the running kernel: the same in all of its containers, another one on every machine and after a restart."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def pid_namespace() -> str:
    """Name the PID namespace of this process; "" where the system does not say."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def is_local(folder: Path) -> bool:
    """True if no other machine can have the file system of `folder`: there, a lock that is free is nobody's."""
    try:
        statfs = ctypes.CDLL(None).statfs
    except (OSError, AttributeError):
        return False
    statistics = (ctypes.c_long * 64)()  # longer than any system's struct statfs, whose first member is the type
    return statfs(os.fsencode(folder), statistics) == 0 and statistics[0] & 0xFFFFFFFF in _LOCAL


def acquire(path: Path, *, create: bool = True) -> int | None:
    """Locks the file `path`, and gives its descriptor for `release`; None where another process holds it.

    Raises `OSError`: FileNotFoundError where it is not there and `create` is False, one with errno NO_LOCKS where there are no locks.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if create else 0), 0o666)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EEXIST, "not a regular file", str(path))
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    return None
                if error.errno in _UNSUPPORTED:
                    raise OSError(NO_LOCKS, "the file system has no locks", str(path)) from None
                raise
            # Its holder before may have removed it since it was opened: then this lock is on a file without a name.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False)):
                    _open_locks.add(descriptor)
                    return descriptor
        finally:
            if descriptor not in _open_locks:
                os.close(descriptor)


def release(descriptor: int) -> None:
    """Gives back what `acquire` gave; does nothing in a process forked since."""
    if descriptor in _open_locks:
        _open_locks.remove(descriptor)
        os.close(descriptor)


@contextmanager
def lock(path: Path, what: str, way_out: str, *, wait: float = 0.5) -> Iterator[Lock]:
    """A context that holds the lock file `path`, which is removed at its end, with folders made for it that are empty then.

    Raises `UserError` where another process holds it for longer than `wait` seconds: `what` is in use, by whom, and the
    `way_out`.  Goes on without a lock where the file system has none.
    """
    made = [folder for folder in path.absolute().parents if not folder.exists()]
    try:
        descriptor = _acquire_within(path, wait)
    except OSError as error:
        if error.errno != NO_LOCKS:
            raise explain_os_error(error, f"locking {what}") from error
        with suppress(OSError):
            path.unlink()
        yield Lock(held=False)
        return
    if descriptor is None:
        holder = _read_holder(path)
        raise UserError(f"{what} is in use by {holder or 'another process'}: {way_out}")
    try:
        before = _read_holder(path)
        elsewhere = before is not None and before.kernel != kernel() and not is_local(path.parent)
        _write_holder(descriptor)
        yield Lock(held=True, lost=before if elsewhere else None)
    finally:
        if descriptor in _open_locks:
            with suppress(OSError):
                path.unlink()
            release(descriptor)
            for folder in made:
                with suppress(OSError):
                    folder.rmdir()


def check_free(path: Path, what: str, way_out: str) -> None:
    """Raises `UserError` as `lock` does if another process holds the lock file `path`; leaves nothing behind."""
    try:
        descriptor = acquire(path, create=False)
    except OSError:  # not there; what else there is, `lock` will say
        return
    if descriptor is None:
        raise UserError(f"{what} is in use by {_read_holder(path) or 'another process'}: {way_out}")
    release(descriptor)


def _acquire_within(path: Path, wait: float) -> int | None:
    deadline = time.monotonic() + wait
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = acquire(path)
        except FileNotFoundError:  # the folder's maker, another process, has just removed it
            continue
        if descriptor is not None or time.monotonic() > deadline:
            return descriptor
        time.sleep(_POLL)


def _write_holder(descriptor: int) -> None:
    since = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %z")
    own = Holder(os.getpid(), socket.gethostname(), since, kernel(), pid_namespace())
    with suppress(OSError):  # a full disk: the lock holds all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(asdict(own)).encode(), 0)


def _read_holder(path: Path) -> Holder | None:
    try:
        with open(path, "rb") as file:
            said = json.loads(file.read(4096))
        holder = Holder(**said)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    texts = (holder.host, holder.since, holder.kernel, holder.pids)
    fits = isinstance(holder.pid, int) and all(isinstance(text, str) and text.isprintable() for text in texts)
    return holder if fits else None


def _forget_in_child() -> None:
    """A forked process must not keep its parent's locks alive."""
    for descriptor in _open_locks:
        os.close(descriptor)
    _open_locks.clear()


os.register_at_fork(after_in_child=_forget_in_child)
