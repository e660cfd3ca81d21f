"""Runtime: opens any artifact and runs, measures and compares it.  Needs numpy and a backend, never torch.

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

    Opening a plan runs code in it: open what you trust.

    Args:
        path: an .onnx or .plan file, or a stepwise folder, as vitrm-export wrote it.
        device: "cpu", "cuda" (the first GPU), "cuda:1" … or "auto" (cuda where it works).  "cuda" is an error where the backend
            cannot use it, never a quiet run on the CPU.  A plan runs on a GPU whatever this says, the first unless it names one.
        threads: CPU threads of one inference; None: every physical core.
        provider: what ONNX Runtime computes with on a GPU: "cuda" (the default), "tensorrt" or "tensorrt-rtx".  One that
            cannot be had is an error.
        verify: compares an .onnx file with the SHA-256 it keeps of itself (30 ms for 15 MB).  False opens one that was
            changed on purpose.  A plan is always compared.

    Returns:
        A session; its `infer` takes float32 images [batch, 3, H, W] in [0, 1].

    Raises:
        UserError: the file is missing, damaged or not written by vitrm-export, its backend is not installed, or (for a
            plan) this machine is not what it was built for.
    """
    from vitrm.runtime.session import open_session

    return open_session(path, device=device, threads=threads, provider=provider, verify=verify)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'vitrm.runtime' has no attribute {name!r}")
