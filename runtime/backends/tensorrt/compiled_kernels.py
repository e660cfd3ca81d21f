"""Kernels that TensorRT for RTX compiles on the machine itself, kept between processes.

A plan for RTX holds kernels that are finished for the GPU and the shapes at hand when it is run first, which takes seconds.
TensorRT gives them as one block, and checks a block against GPU, driver and its own version before it takes it back.  Like a
plan it is code, and nobody's signature is on it: so it is kept in the user's own cache folder, which nobody else may write
to, and not beside the plan, which may have come from elsewhere.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vitrm.errors import UserError
from vitrm.runtime.backends.tensorrt.api import RTX, TensorRT
from vitrm.system.cache import cache_folder
from vitrm.system.files import atomic_path


class JitSettings:
    """The runtime configuration of a plan's contexts, with the kernels that were compiled before."""

    def __init__(self, api: TensorRT, engine: Any, plan_sha256: str) -> None:
        if api.flavour != RTX:
            raise ValueError(f"{api} compiles nothing on the machine that runs a plan")
        trt = api.module
        self.config = engine.create_runtime_config()
        # Compiled for the shapes in use before the first run, not behind its back during the first hundreds.
        self.config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        self._file = cache_folder() / f"{api.flavour}-{api.version}-{plan_sha256[:32]}.kernels"
        self._cache = self.config.create_runtime_cache()
        if (known := _read_own(self._file)) is not None:
            self._cache.deserialize(known)  # False for another GPU or driver: it begins anew then
        self.config.set_runtime_cache(self._cache)
        self._kept = len(known or b"")

    def keep(self) -> None:
        """Writes what there is by now, where it is more than before.  A folder that cannot be written to costs a start its time."""
        block = bytes(memoryview(self._cache.serialize()))
        if len(block) <= self._kept:
            return
        try:
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with atomic_path(self._file) as temporary:
                temporary.write_bytes(block)
        except (OSError, UserError):
            return
        self._kept = len(block)


def _read_own(file: Path) -> bytes | None:
    """The file's content; None where it is not there, or another user might have written it."""
    try:
        for path in (file.parent, file):
            about = path.stat()
            if hasattr(os, "getuid") and (about.st_uid != os.getuid() or about.st_mode & 0o022):
                return None
        return file.read_bytes()
    except OSError:
        return None
