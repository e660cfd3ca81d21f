"""Files and folders that are either whole or not there."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from processes import PATIENCE
from torture import children
from torture.kills import before_operation

from vitrm.errors import UserError
from vitrm.system import files, locks
from vitrm.system.files import atomic_files, atomic_folder, remove_leftovers, write_text


@pytest.fixture
def old(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").write_text("old")
    return folder


def test_a_folder_takes_the_place_of_another(old, tmp_path):
    with atomic_folder(old) as new:
        (new / "b").write_text("new")
        assert (old / "a").read_text() == "old"
    assert [p.name for p in old.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
@pytest.mark.parametrize("rename", [0, 1, 2])
def test_whatever_happens_one_of_the_two_is_there(old, tmp_path, monkeypatch, error, rename):
    """`rename` 0 fails before the exchange, 1 and 2 in its first and second renaming, where the system cannot swap."""
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    real, calls = Path.rename, []

    def fail(self, target):
        calls.append(self)
        if len(calls) == rename:
            raise error
        return real(self, target)

    monkeypatch.setattr(Path, "rename", fail)

    def exchange() -> None:
        with atomic_folder(old) as new:
            (new / "b").write_text("new")
            if not rename:
                raise error

    with pytest.raises(UserError if error is OSError else error):
        exchange()
    assert [p.name for p in old.iterdir()] == ["a"]
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_names_are_swapped_in_one_step_where_the_system_can(old, monkeypatch):
    monkeypatch.setattr(Path, "rename", lambda self, target: pytest.fail("the old folder need not step aside"))
    with atomic_folder(old) as new:
        (new / "b").write_text("new")
    assert [p.name for p in old.iterdir()] == ["b"]


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    code = (
        "import os, sys; from vitrm.system.files import atomic_path, atomic_folder\n"
        "with atomic_path(sys.argv[1]) as a, atomic_folder(sys.argv[2]) as b:\n"
        "    (b / 'x').write_text('x'); print('ready', flush=True); sys.stdin.read()"
    )
    file, folder = tmp_path / "file.txt", tmp_path / "folder"
    argv = [sys.executable, "-c", code, str(file), str(folder)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        assert len(list(tmp_path.glob(".*.part*"))) == 2
        write_text(file, "mine")
        assert len(list(tmp_path.glob(".*.part*"))) == 2
        process.kill()
    assert len(list(tmp_path.glob(".*.part*"))) == 2
    write_text(file, "mine again")
    with atomic_folder(folder) as new:
        (new / "y").write_text("y")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file.txt", "folder"]


def test_links_are_followed_and_files_refused(old, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(old)
    with atomic_folder(link) as new:
        (new / "b").write_text("new")
    assert link.is_symlink()
    assert [p.name for p in old.iterdir()] == ["b"]
    with pytest.raises(UserError, match="is a file: name a folder"), atomic_folder(old / "b"):
        pass


def test_files_that_belong_together_come_together(tmp_path):
    (tmp_path / "a.plan").write_text("old plan")
    with atomic_files(tmp_path, ["a.plan", "a.json"]) as new:
        (new / "a.plan").write_text("new plan")
        (new / "a.json").write_text("new")
        (new / "scratch").write_text("not asked for")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.plan": "new plan", "a.json": "new"}


@pytest.mark.parametrize("when", ["body", "missing", "second move"])
def test_files_that_belong_together_fail_together(tmp_path, monkeypatch, when):
    (tmp_path / "a.plan").write_text("old plan")
    (tmp_path / "a.json").write_text("old")
    move = os.replace

    def replace(source, target):
        if when == "second move" and Path(target) == tmp_path / "a.json" and Path(source).read_text() == "new":
            raise OSError(errno.ENOSPC, "no space", str(target))
        move(source, target)

    def write():
        with atomic_files(tmp_path, ["a.plan", "a.json"]) as new:
            (new / "a.plan").write_text("new plan")
            if when == "body":
                raise UserError("no")
            if when == "second move":
                (new / "a.json").write_text("new")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(UserError):
        write()
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.plan": "old plan", "a.json": "old"}


def test_a_pid_that_is_free_here_may_live_in_another_container(tmp_path):
    """Seen from here, a container's process has another number, which here is nobody's, or anybody's."""
    code = (
        "import sys; from vitrm.system.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as a: print(a.parent.parent, flush=True); sys.stdin.read()"
    )
    file = tmp_path / "file.txt"
    argv = [sys.executable, "-c", code, str(file)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        own = Path(process.stdout.readline().strip())
        theirs = own.rename(own.with_name(own.name.replace(f"-{process.pid}-", "-4194305-")))
        assert theirs != own
        write_text(file, "mine")
        assert theirs.is_dir()
        process.kill()
    write_text(file, "mine again")
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_what_another_machine_may_still_write_stays(tmp_path, monkeypatch):
    """On a network's file system a lock that is free here proves nothing of other machines."""
    left = tmp_path / ".file.txt.0123abcd-7-abcdefgh.part"
    (left / "new").mkdir(parents=True)
    (left / "old").mkdir()
    (left / "lock").touch()
    monkeypatch.setattr(locks, "is_local", lambda folder: False)
    write_text(tmp_path / "file.txt", "mine")
    assert left.is_dir()
    monkeypatch.undo()
    assert locks.is_local(tmp_path), "the tests' folder is on a disk of this machine"
    write_text(tmp_path / "file.txt", "mine")
    assert not left.exists()


def test_a_temporary_is_locked_from_its_first_moment(tmp_path, monkeypatch):
    """Between the making of a lock file and its locking, others would take the folder for one that a kill has left."""
    real = locks.acquire

    def acquire(path, *, create=True):
        if create and path.parent.suffix == ".part":
            path.touch()  # as far as the system's own open() has come
            remove_leftovers(tmp_path, "a")  # and then comes another writer of the same file
        return real(path, create=create)

    monkeypatch.setattr(locks, "acquire", acquire)
    write_text(tmp_path / "a", "text")
    assert (tmp_path / "a").read_text() == "text"


@pytest.mark.parametrize("operation", range(1, 7))
@pytest.mark.parametrize("seen", [True, False], ids=["same PID namespace", "unknown PID namespace"])
def test_a_kill_before_the_lock_leaves_nothing(tmp_path, monkeypatch, operation, seen):
    """Of the folder itself, its two parts and its lock: whichever the kill came before.

    Where processes cannot be told apart by their PIDs, what has no lock may be just being made, for a minute.
    """
    if not seen:
        monkeypatch.setattr(locks, "pid_namespace", lambda: "")

    def write() -> int:
        write_text(tmp_path / "a", "text")
        return 0

    children.run(write, before=before_operation(tmp_path, operation))
    for folder in [p for p in tmp_path.iterdir() if p.name.startswith(".")]:
        lockless = not (folder / "lock").exists()
        write_text(tmp_path / "a", "again")
        assert folder.exists() == (lockless and not seen)
        if folder.exists():
            os.utime(folder, (time.time() - 61,) * 2)
    write_text(tmp_path / "a", "again")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_an_exchange_killed_half_way_is_taken_back(tmp_path, monkeypatch):
    """Where names cannot be swapped, a kill between the two renames leaves the old folder in the temporary one."""
    code = (
        "import os, sys; from pathlib import Path; from vitrm.system import files\n"
        "files._exchange = lambda one, other: False\n"
        "real = Path.rename\n"
        "Path.rename = lambda self, to: (real(self, to), os.kill(os.getpid(), 9))\n"
        "with files.atomic_folder(sys.argv[1]) as new: (new / 'b').write_text('new')"
    )
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").write_text("old")
    assert subprocess.run([sys.executable, "-c", code, str(folder)], check=False).returncode == -9
    assert not folder.exists()
    with pytest.raises(ValueError, match="no"), atomic_folder(folder):
        raise ValueError("no")
    assert [(p.name, p.read_text()) for p in folder.iterdir()] == [("a", "old")]
    with atomic_folder(folder) as new:
        (new / "c").write_text("c")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("name", ["lock", "new", "old"])
def test_any_name_can_be_written(tmp_path, name):
    write_text(tmp_path / "a" / name, name)
    with atomic_folder(tmp_path / name) as new:
        (new / name).write_text("x")
    with atomic_files(tmp_path / "c", [name, "other"]) as new:
        (new / name).write_text("y")
        (new / "other").write_text("y")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["a", name, "c"])
    assert (tmp_path / "a" / name).read_text() == name


def test_files_that_belong_together_are_of_one_writer(tmp_path, monkeypatch):
    """Two commands that end at the same time: one's renames do not come in between the other's."""
    move, names = os.replace, ["a.plan", "a.plan.json"]

    first_moved = threading.Event()

    def replace(source, target):
        move(source, target)
        if Path(target).parent == tmp_path and Path(target).read_text() == "one" and not first_moved.is_set():
            first_moved.set()
            time.sleep(0.5)  # for the other to come in between

    monkeypatch.setattr(os, "replace", replace)

    def write(text: str) -> None:
        with atomic_files(tmp_path, names) as new:
            for name in names:
                (new / name).write_text(text)
            if text == "two":
                assert first_moved.wait(PATIENCE)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, ["one", "two"]))
    found = {p.name: p.read_text() for p in tmp_path.iterdir()}
    assert sorted(found) == names
    assert len(set(found.values())) == 1


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "fifo-link").symlink_to("fifo")
    (tmp_path / "broken").symlink_to("gone")
    for name in ("file", "link"):
        files.check_regular(tmp_path / name, "artifact")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        for path, what in [
            (tmp_path / "fifo", "a FIFO"),
            (tmp_path / "fifo-link", "a FIFO"),
            (tmp_path / "socket", "a socket"),
            (Path("/dev/zero"), "a device"),
            (tmp_path, "a folder"),
            (tmp_path / "none", "does not exist"),
            (tmp_path / "broken", "broken is a link to gone, which does not exist"),
            (tmp_path / "file" / "below", "does not exist"),
        ]:
            with pytest.raises(UserError, match=rf"artifact: .*{what}"):
                files.check_regular(path, "artifact")
