"""Is a run long enough to learn anything?  What counts are batches, not epochs: a small set has few in each."""

from __future__ import annotations

from vitrm.recipe import Recipe

FEW = 500  # batches; a model that starts from random weights has learned little by then
_ENOUGH = 1000
_SMALL = 16  # images of a batch, that a small set may well have


def few_batches(images: int, recipe: Recipe) -> str:
    """Says that a run from random weights with so many training images has few batches, and what gives more; else empty."""
    each = images // min(recipe.batch_size, images)
    total = recipe.epochs * each
    if total >= FEW:
        return ""
    size = min(recipe.batch_size, _SMALL)
    epochs = -(-_ENOUGH // (images // min(size, images)))
    smaller = f" --batch-size {size}" if size < recipe.batch_size else ""
    return (
        f"{recipe.epochs} epochs of {each} batches are {total} updates, which is little from random weights:{smaller} --epochs {epochs} "
        f"are {_ENOUGH:,}; --init RUN starts from a trained model instead"
    )
