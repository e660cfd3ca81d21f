"""`vitrm-predict`: which class is on a picture, and how sure the model is."""

from typing import Any

__all__ = ["Prediction", "predict", "prepare"]


def __getattr__(name: str) -> Any:
    # Loaded when first asked for, so that the command can answer `--help` before numpy is there.
    if name in __all__:
        from vitrm.runtime.predict import predictions

        return getattr(predictions, name)
    raise AttributeError(f"module 'vitrm.runtime.predict' has no attribute {name!r}")
