"""Model → files for a device: fragments traced once, the recursion assembled in ONNX IR."""

from typing import Any

__all__ = ["ExportResult", "export"]


def __getattr__(name: str) -> Any:
    # Torch and the tracer load when an export is asked for, not with `--help`.
    if name in __all__:
        from vitrm.export import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'vitrm.export' has no attribute {name!r}")
