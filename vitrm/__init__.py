"""ViTRM: train, export and measure recursive vision models.

vitrm           the model and how it learns
vitrm.calib     what quantization needs to know, measured on images
vitrm.export    model → files for a device
vitrm.runtime   opens those files, runs, measures and compares them (no torch)
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Loaded when first asked for: `import vitrm` must stay cheap, and free of torch for vitrm.runtime's sake.
_LAZY = {
    "ViTRM": "vitrm.model",
    "ViTRMConfig": "vitrm.config",
    "PRESETS": "vitrm.config",
    "preset": "vitrm.config",
    "Checkpoint": "vitrm.checkpoint",
    "UserError": "vitrm.errors",
}
__all__ = ["PRESETS", "Checkpoint", "UserError", "ViTRM", "ViTRMConfig", "preset"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'vitrm' has no attribute {name!r}")
