"""Files that are either whole or not there.

Everything the toolkit writes goes to a temporary neighbor first and gets its name by an atomic
rename, so a killed command or a full disk leaves neither a half-written file nor a damaged old one.
Of two commands that write the same file at once, the one that ends last wins, whole.

The neighbor is in a folder of its own, `.NAME.SYSTEM-PID-XXXXXXXX.part`, with a file `lock` that its writer holds: what
the libraries below leave beside it (safetensors' `.tmp…`) goes with it.  What `kill -9` leaves is removed when the same
name is written the next time: the lock is free then, whichever container the writer was in.  A kill between the making
of the folder and of its lock is told by the PID, where that is of the same PID namespace, or else by time.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vitrm.errors import UserError, explain_os_error
from vitrm.fields import shown
from vitrm.system import locks, strict_json

_LOCK, _NEW, _OLD = "lock", "new", "old"  # in such a folder: held by its writer, what it writes, and what it replaces
_LOCK_MADE = "lock.made"  # what the lock is called until it is held
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<system>[0-9a-f]{8})-(?P<pid>\d+)-\w{8}\.part(\.\w+)?")
_SAFETENSORS = re.compile(r"\.tmp\w{6}")  # its own temporary, where version 0.1.0 let it write
_FORSAKEN = 86_400  # seconds: a temporary without a lock, as of version 0.1.0, is removed when untouched for so long
_MAKING = 60  # seconds: one of this machine without a lock is removed then
_COMMIT_WAIT = 60.0  # seconds for another command's renames of the same files, which take milliseconds
MAX_JSON = 8 << 20  # bytes: the names of a hundred thousand classes


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path of the same file name; on success it is flushed to disk and renamed to `path`.

    On any exception the temporary file is removed and `path` is as it was.
    Raises `UserError` for a full disk, a missing right or any other `OSError`.
    """
    target = Path(path)
    with _workspace(target.parent, target.name) as scratch:
        if target.is_dir():
            raise UserError(f"{target} is a folder: name a file")
        temporary = scratch / _NEW / target.name
        yield temporary
        _flush(temporary)
        os.replace(temporary, target)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; on success it takes the place of whatever folder `path` is.

    On any exception, an interrupt in the midst of the exchange included, the temporary folder is removed and `path` is
    as it was.  A link is followed.  Raises `UserError` for a full disk, a missing right or any other `OSError`.
    """
    target = Path(path).resolve()
    with _workspace(target.parent, target.name) as scratch:
        if target.exists() and not target.is_dir():
            raise UserError(f"{target} is a file: name a folder")
        temporary, old = scratch / _NEW / target.name, scratch / _OLD / target.name
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _flush(file, rights=False)
        with _commit(target):
            if target.exists() and _exchange(temporary, target):
                return
            # Folders cannot be renamed over one another: the old one steps aside, and comes back if the new one fails.
            try:
                if target.exists():
                    target.rename(old)
                temporary.rename(target)
            except BaseException:
                if old.exists() and not target.exists():
                    old.rename(target)
                raise


@contextmanager
def atomic_files(folder: str | os.PathLike[str], names: Sequence[str]) -> Iterator[Path]:
    """Yields a temporary folder inside `folder`; on success the files `names` in it move to `folder`, all or none.

    On any exception the temporary folder is removed and `folder` is as it was.  A kill between two of the moves leaves
    some new and some old: files that belong together say so themselves.
    Raises `UserError` for a full disk, a missing right or any other `OSError`.
    """
    target = Path(folder)
    with _workspace(target, names[0]) as scratch:
        for name in names:
            if (target / name).is_dir():
                raise UserError(f"{target / name} is a folder: name a file")
        temporary, old = scratch / _NEW, scratch / _OLD
        yield temporary
        for name in names:
            _flush(temporary / name)
        moved: list[str] = []
        with _commit(target / names[0]):
            try:
                for name in names:
                    if (target / name).exists():
                        os.replace(target / name, old / name)
                    moved.append(name)
                    os.replace(temporary / name, target / name)
            except BaseException:
                for name in moved:
                    (target / name).unlink(missing_ok=True)
                    if (old / name).exists():
                        os.replace(old / name, target / name)
                raise


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Removes what killed commands left in `folder`, of the file or folder `name` alone where one is named.

    What a living one writes stays, and what may be of a living one on another machine.
    """
    for left in folder.glob(".*"):
        if not is_leftover(left.name):
            continue
        match = _TEMPORARY.fullmatch(left.name)
        if name is not None and (match is None or match["name"] not in (name, Path(name).stem)):
            continue
        with suppress(OSError):
            _remove_if_dead(left, match)


def is_leftover(name: str) -> bool:
    """True if a file or folder of this name is a temporary of ours, or of safetensors'."""
    return bool(_TEMPORARY.fullmatch(name) or _SAFETENSORS.fullmatch(name))


def lock_path(target: Path) -> Path:
    """The lock file, beside it, of a file or folder that is changed in more than one step."""
    return target.with_name(f".{target.name}.lock")


@contextmanager
def _workspace(folder: Path, name: str) -> Iterator[Path]:
    """A temporary folder in `folder` for what is to be called `name`, whose lock this process holds.

    It is removed at the end.  An `OSError` in the context becomes a `UserError`.
    """
    descriptor: int | None = None
    scratch: Path | None = None
    made = [parent for parent in (folder, *folder.absolute().parents) if not parent.exists()]
    doing = f"writing {folder / name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder, name)
        scratch, descriptor = _make_workspace(folder, f".{name}.{_system()}-{os.getpid()}-")
        yield scratch
    except OSError as error:
        raise explain_os_error(error, doing) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        if descriptor is not None:
            locks.release(descriptor)
        for parent in made:
            with suppress(OSError):  # not empty: the file is there
                parent.rmdir()


def _make_workspace(folder: Path, prefix: str) -> tuple[Path, int | None]:
    """The folder, and its lock; None where the file system has no locks."""
    scratch = Path(tempfile.mkdtemp(prefix=prefix, suffix=".part", dir=folder))
    try:
        for part in (_NEW, _OLD):
            (scratch / part).mkdir()
        # It gets its name once it is locked: another process that finds it free takes the folder for one that was left.
        descriptor = locks.acquire(scratch / _LOCK_MADE)
        os.rename(scratch / _LOCK_MADE, scratch / _LOCK)
        return scratch, descriptor
    except OSError as error:
        if error.errno == locks.NO_LOCKS:
            return scratch, None
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _remove_if_dead(left: Path, match: re.Match[str] | None) -> None:
    """Removes a temporary if its writer lives no more."""
    lock, age = left / _LOCK, time.time() - left.stat().st_mtime
    if match is None or (match["system"] != _system() and not lock.exists()):
        if age > _FORSAKEN:
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        return
    if not lock.exists():
        # Its maker is about to lock it, which takes milliseconds, or was killed before that.
        if age <= _MAKING and _may_live(int(match["pid"])):
            return
        lock = left / _LOCK_MADE
        if not lock.exists():
            shutil.rmtree(left)
            return
    # A lock that is free proves nothing where another machine may hold it and the file system does not say so.
    if match["system"] != _system() and not locks.is_local(left):
        return
    descriptor = locks.acquire(lock, create=False)
    if descriptor is None:
        return
    try:
        for old in (left / _OLD).iterdir():
            if not left.with_name(old.name).exists():
                old.rename(left.with_name(old.name))  # killed between the two renames of an exchange
        shutil.rmtree(left)
    finally:
        locks.release(descriptor)


@contextmanager
def _commit(target: Path) -> Iterator[None]:
    """A context in which no other command gives `target`, or what belongs to it, its name."""
    with locks.lock(lock_path(target), str(target), "try again", wait=_COMMIT_WAIT):
        yield


def _flush(file: Path, *, rights: bool = True) -> None:
    """Writes a file through to the disk, and gives it the rights of any new file, which mkstemp and safetensors do not."""
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())
        if rights:
            umask = os.umask(0)
            os.umask(umask)
            os.fchmod(opened.fileno(), 0o666 & ~umask)


def _system() -> str:
    """In a temporary name: where its writer's PID means something, one PID namespace on one machine since its start."""
    return hashlib.sha256(f"{locks.kernel()} {locks.pid_namespace()}".encode()).hexdigest()[:8]


def _may_live(pid: int) -> bool:
    """True if a process of this system may have that PID."""
    if not locks.pid_namespace():
        return True  # unknown: another container's processes cannot be seen
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    return True


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names in one atomic step; False where the system cannot (not Linux, or some network file systems)."""
    libc = ctypes.CDLL(None, use_errno=True)
    at_fdcwd, rename_exchange = -100, 2
    try:
        renameat2 = libc.renameat2
    except AttributeError:
        return False
    return renameat2(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), rename_exchange) == 0


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes `text` (UTF-8) to `path`, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as indented JSON to `path`, atomically."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def check_regular(path: str | os.PathLike[str], what: str) -> None:
    """Raises `UserError` unless `path` is a regular file, or a link to one; `what` names its role in the message.

    Called before a file is opened: opening a FIFO waits for a writer, and reading a device may never end.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        if os.path.islink(path):
            raise UserError(f"{what}: {path} is a link to {os.readlink(path)}, which does not exist") from None
        raise UserError(f"{what}: {path} does not exist") from None
    except ValueError:  # a NUL in the name
        raise UserError(f"{what}: {os.fspath(path)!r} is no file name") from None
    except OSError as error:
        raise explain_os_error(error, f"reading {path}") from error
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in _KINDS if test(mode)), "special file")
        raise UserError(f"{what}: {path} is a {kind}, expected a regular file")


_KINDS = (
    (stat.S_ISDIR, "folder"),
    (stat.S_ISFIFO, "FIFO"),
    (stat.S_ISSOCK, "socket"),
    (stat.S_ISCHR, "device"),
    (stat.S_ISBLK, "device"),
)


def check_name(path: str | os.PathLike[str], what: str) -> None:
    """Raises `UserError` for a path that cannot be looked for, such as one that is too long; it need not exist."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:  # the latter for a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{what}: {shown(os.fspath(path))} cannot be used ({reason}): name another place") from None


def read_text(path: str | os.PathLike[str], what: str, limit: int) -> str:
    """The text (UTF-8) of a file of at most `limit` bytes; `what` names its role in the `UserError` for any other."""
    check_regular(path, what)
    try:
        with open(path, "rb") as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise explain_os_error(error, f"reading {path}") from error
    if len(raw) > limit:
        raise UserError(f"{what}: {path} has more than {limit:,} bytes: it is something else")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{what}: {path} is not UTF-8 text ({error}): it may be damaged") from None


def read_json(path: str | os.PathLike[str], what: str, limit: int = MAX_JSON) -> dict[str, Any]:
    """Reads a JSON object of at most `limit` bytes; `what` names the file's role in the `UserError` for anything else."""
    text = read_text(path, what, limit)
    try:
        value = strict_json.parse(text)
    except ValueError as error:
        raise UserError(f"{what}: {path} is not valid JSON ({error}): it may be truncated") from None
    if not isinstance(value, dict):
        raise UserError(f"{what}: {path} holds a JSON {type(value).__name__}, expected an object")
    return value


def sha256_of(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, as hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
