"""Files that are either whole or not there.

Everything the toolkit writes goes to a temporary neighbour first and gets its name by an atomic
rename, so a killed command or a full disk leaves neither a half-written file nor a damaged old one.
What `kill -9` leaves beside the target is removed when the target is written the next time.
"""

from __future__ import annotations

import ctypes
import glob
import hashlib
import json
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vitrm.errors import UserError, explain_os_error


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is flushed to disk and renamed to `path`.

    On any exception the temporary file is removed and `path` is as it was.
    Raises `UserError` for a full disk, a missing right or any other `OSError`.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise UserError(f"{target} is a folder: name a file")
        # The suffix stays: whoever checks the file before it gets its name may go by it.
        prefix, suffix = f".{target.stem}.", f".part{target.suffix}"
        _remove_leftovers(target.parent, prefix, suffix)
        handle, name = tempfile.mkstemp(prefix=prefix + _owner(), suffix=suffix, dir=target.parent)
        umask = os.umask(0)
        os.umask(umask)
        os.close(handle)
    except OSError as error:
        raise explain_os_error(error, f"writing {target}") from error
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
            # mkstemp gives 0600, and so does safetensors, which replaces the file: give the rights of any new file.
            os.fchmod(file.fileno(), 0o666 & ~umask)
        os.replace(temporary, target)
    except OSError as error:
        raise explain_os_error(error, f"writing {target}") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; on success it takes the place of whatever folder `path` is.

    On any exception, an interrupt in the midst of the exchange included, the temporary folder is removed and `path` is
    as it was.  A link is followed.  Raises `UserError` for a full disk, a missing right or any other `OSError`.
    """
    target = Path(path).resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not target.is_dir():
            raise UserError(f"{target} is a file: name a folder")
        prefix = f".{target.name}."
        _remove_leftovers(target.parent, prefix, ".part")
        _remove_leftovers(target.parent, prefix, ".old")
        temporary = Path(tempfile.mkdtemp(prefix=prefix + _owner(), suffix=".part", dir=target.parent))
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
    except OSError as error:
        raise explain_os_error(error, f"writing {target}") from error
    old = temporary.with_suffix(".old")
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb") as opened:
                    os.fsync(opened.fileno())
        if not (target.exists() and _exchange(temporary, target)):
            # Folders cannot be renamed over one another: the old one steps aside, and comes back if the new one fails.
            if target.exists():
                target.rename(old)
            temporary.rename(target)
    except BaseException as error:
        if old.exists() and not target.exists():
            old.rename(target)
        if isinstance(error, OSError):
            raise explain_os_error(error, f"writing {target}") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def atomic_files(folder: str | os.PathLike[str], names: Sequence[str]) -> Iterator[Path]:
    """Yields a temporary folder inside `folder`; on success the files `names` in it move to `folder`, all or none.

    On any exception the temporary folder is removed and `folder` is as it was.  A kill between two of the moves leaves
    some new and some old: files that belong together say so themselves.
    Raises `UserError` for a full disk, a missing right or any other `OSError`.
    """
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name in names:
            if (target / name).is_dir():
                raise UserError(f"{target / name} is a folder: name a file")
        prefix = f".{Path(names[0]).stem}."
        _remove_leftovers(target, prefix, ".part")
        temporary = Path(tempfile.mkdtemp(prefix=prefix + _owner(), suffix=".part", dir=target))
    except OSError as error:
        raise explain_os_error(error, f"writing {target / names[0]}") from error
    moved: list[str] = []
    old = temporary / "old"
    try:
        yield temporary
        old.mkdir()
        for name in names:
            with open(temporary / name, "rb") as file:
                os.fsync(file.fileno())
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
    except OSError as error:
        raise explain_os_error(error, f"writing {target / names[0]}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names in one atomic step; False where the system cannot (not Linux, or some network file systems)."""
    libc = ctypes.CDLL(None, use_errno=True)
    at_fdcwd, rename_exchange = -100, 2
    try:
        renameat2 = libc.renameat2
    except AttributeError:
        return False
    return renameat2(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), rename_exchange) == 0


def _owner() -> str:
    """In a temporary name: which process of which machine writes it."""
    machine = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
    return f"{machine}-{os.getpid()}-"


def _remove_leftovers(folder: Path, prefix: str, suffix: str) -> None:
    """Removes temporaries of processes of this machine that live no more."""
    machine = _owner().split("-")[0]
    for left in folder.glob(f"{glob.escape(prefix)}{machine}-*-*{glob.escape(suffix)}"):
        process = left.name[len(prefix) :].split("-")[1]
        if process.isdecimal() and not Path(f"/proc/{process}").exists() and Path("/proc/self").exists():
            with suppress(OSError):
                shutil.rmtree(left) if left.is_dir() else left.unlink()


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


def read_json(path: str | os.PathLike[str], what: str) -> dict[str, Any]:
    """Reads a JSON object; `what` names the file's role in the `UserError` raised when it is not one."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{what}: {path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{what}: {path} is not valid JSON ({error}): it may be truncated") from None
    except OSError as error:
        raise explain_os_error(error, f"reading {path}") from error
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
