"""Opens any artifact and runs, measures and compares it.  Needs numpy and a backend, never torch.

session = vitrm.runtime.open("model.onnx")
result = session.infer(images)          # float32 [B, 3, H, W] in [0, 1]
result.logits, result.halt_prob, result.steps_used
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitrm.runtime.artifact.metadata import Metadata
    from vitrm.runtime.session import Result, Session

__all__ = ["Metadata", "Result", "Session", "open"]

# Loaded when first asked for, so that a command can answer `--help` before numpy is there.
_LAZY = {
    "Metadata": "vitrm.runtime.artifact.metadata",
    "Result": "vitrm.runtime.session",
    "Session": "vitrm.runtime.session",
}


def open(
    path: str | os.PathLike[str],
    *,
    device: str = "cpu",
    threads: int | None = None,
    provider: str | None = None,
    verify: bool = True,
) -> Session:
    """Opens the artifact at `path` for inference.

    `device` is "cpu", "cuda" (an error where the backend cannot use it, never a quiet run on the CPU) or "auto"
    (cuda where it works); a TensorRT plan runs on the GPU it was built for whatever it says.  `provider` is what ONNX Runtime
    uses on a GPU: "cuda" (the default), "tensorrt" or "tensorrt-rtx"; one that cannot be had is an error too.  `threads`
    is the number of CPU threads for one inference; None: every physical core.  `verify` compares an .onnx file with the SHA-256 it
    keeps of itself (30 ms for 15 MB); False opens one that was changed on purpose.  A plan is always compared.
    Raises `UserError` when the file is missing, damaged, not written by vitrm-export, or its backend is not installed; for a
    plan also when this machine is not what it was built for.  Opening a plan runs code in it: open what you trust.
    """
    from vitrm.runtime.session import open_session

    return open_session(path, device=device, threads=threads, provider=provider, verify=verify)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'vitrm.runtime' has no attribute {name!r}")
