"""onnxruntime-web's files: found, checked, and refused when they are others."""

from __future__ import annotations

import io
import tarfile

import pytest

from vitrm.errors import UserError
from vitrm.export.web import runtime_files
from vitrm.export.web.runtime_files import SCRIPT, WASM, cache_folder, find_runtime


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _package(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return str(path)


def test_without_it_the_ways_to_get_it_are_said():
    with pytest.raises(UserError, match=r"add --download .*`npm pack onnxruntime-web@"):
        find_runtime(None, download=False)


def test_other_files_are_refused(tmp_path):
    for name in (SCRIPT, WASM):
        (tmp_path / name).write_bytes(b"something else")
    with pytest.raises(UserError, match="is not that of onnxruntime-web"):
        find_runtime(str(tmp_path), download=False)
    with pytest.raises(UserError, match="has no ort-wasm"):
        find_runtime(str(tmp_path / "nowhere"), download=False)


def test_a_package_with_other_files_leaves_nothing_in_the_cache(tmp_path):
    package = _package(
        tmp_path / "a.tgz", {f"package/dist/{SCRIPT}": b"something else", f"package/dist/{WASM}": b"something else"}
    )
    with pytest.raises(UserError, match="is not that of onnxruntime-web"):
        find_runtime(package, download=False)
    assert not cache_folder().exists()


@pytest.mark.parametrize("content", [b"no archive", b""])
def test_a_file_that_is_no_package(tmp_path, content):
    (tmp_path / "a.tgz").write_bytes(content)
    with pytest.raises(UserError, match="is not the npm package"):
        find_runtime(str(tmp_path / "a.tgz"), download=False)
    with pytest.raises(UserError, match="is not the npm package"):
        find_runtime(_package(tmp_path / "b.tgz", {"package/other": b""}), download=False)


def test_a_download_that_fails_is_one_message(monkeypatch):
    monkeypatch.setattr(runtime_files, "ADDRESS", "http://127.0.0.1:9/nobody.tgz")  # a port that nobody listens to
    with pytest.raises(UserError, match="could not be fetched"):
        find_runtime(None, download=True)
    assert not any(cache_folder().iterdir())
