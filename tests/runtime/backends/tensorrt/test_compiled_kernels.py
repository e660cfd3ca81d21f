"""Compiled kernels of TensorRT for RTX between two processes.  The real bindings need a GPU for them, so these stand in:
they prove what is read, written and kept, and in which order.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vitrm.runtime.backends.tensorrt.api import RTX, TensorRT
from vitrm.runtime.backends.tensorrt.compiled_kernels import JitSettings
from vitrm.system.cache import cache_folder


class Cache:
    def __init__(self) -> None:
        self.block = b""

    def deserialize(self, block: bytes) -> bool:
        self.block = block if block.startswith(b"this GPU") else b""
        return bool(self.block)

    def serialize(self) -> bytes:
        return self.block


def settings(calls: list[str] | None = None) -> tuple[JitSettings, Cache]:
    cache = Cache()
    config = SimpleNamespace(
        create_runtime_cache=lambda: cache,
        set_runtime_cache=lambda c: (calls if calls is not None else []).append("set"),
    )
    engine: Any = SimpleNamespace(create_runtime_config=lambda: config)
    strategy = SimpleNamespace(EAGER="eager")
    api = TensorRT(SimpleNamespace(DynamicShapesKernelSpecializationStrategy=strategy), RTX, "1.7.1")
    made = JitSettings(api, engine, "ab" * 32)
    assert made.config is config  # contexts read it for as long as they live
    assert config.dynamic_shapes_kernel_specialization_strategy == "eager"
    return made, cache


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_a_second_start_takes_what_the_first_compiled(home: Path) -> None:
    calls: list[str] = []
    first, cache = settings(calls)
    assert calls == ["set"]
    assert cache.block == b""
    cache.block = b"this GPU: two kernels"
    first.keep()
    (file,) = cache_folder().iterdir()
    assert file.read_bytes() == cache.block
    assert cache_folder().stat().st_mode & 0o077 == 0
    second, taken = settings()
    assert taken.block == cache.block
    file.unlink()
    second.keep()  # nothing new
    assert not file.exists()


def test_kernels_of_another_gpu_are_compiled_anew() -> None:
    first, cache = settings()
    cache.block = b"another GPU"
    first.keep()
    again, cache = settings()
    assert cache.block == b""
    cache.block = b"this GPU: and more of them"
    again.keep()
    assert settings()[1].block == b"this GPU: and more of them"


def test_what_others_can_write_is_not_run() -> None:
    first, cache = settings()
    cache.block = b"this GPU: two kernels"
    first.keep()
    (file,) = cache_folder().iterdir()
    file.chmod(0o666)
    assert settings()[1].block == b""
    file.chmod(0o600)
    assert settings()[1].block == b"this GPU: two kernels"
    cache_folder().chmod(0o777)
    assert settings()[1].block == b""


def test_a_folder_that_cannot_be_written_is_no_error(home: Path) -> None:
    (home / "vitrm").write_text("a file")
    first, cache = settings()
    cache.block = b"this GPU: two kernels"
    first.keep()
    assert (home / "vitrm").read_text() == "a file"
