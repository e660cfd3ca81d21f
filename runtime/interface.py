"""What a graph takes and gives, held against what its metadata says of it."""

from __future__ import annotations

from collections.abc import Mapping

from vitrm.errors import UserError
from vitrm.runtime.metadata import HALT_PROB, HALT_THRESHOLD, LOGITS, PIXELS, STEPS, STEPS_USED, Metadata

Signature = tuple[str, tuple[object, ...]]  # a tensor's type, as numpy calls it, and shape

_BATCH = "batch"


def check_tensors(where: str, metadata: Metadata, found: Mapping[str, Signature]) -> None:
    """Raises `UserError` where an input or output `found` in the graph has another type or shape than `metadata` implies.

    Names that are not of the public interface are left alone.  Of the batch any length is right; a scalar may be [1], as in
    the copy of a loop that Triton is served.
    """
    size, classes = metadata.image_size, int(metadata.model["classes"])
    expected: dict[str, Signature] = {
        PIXELS: ("float32", (_BATCH, 3, size, size)),
        LOGITS: ("float32", (_BATCH, classes)),
        HALT_PROB: ("float32", (_BATCH,)),
        STEPS_USED: ("int64", (_BATCH,)),
        STEPS: ("int64", ()),
        HALT_THRESHOLD: ("float32", ()),
    }
    for name, (dtype, shape) in expected.items():
        if name not in found:
            continue
        its_dtype, its_shape = found[name]
        if not shape and its_shape == (1,):
            its_shape = ()
        same = len(shape) == len(its_shape) and all(a in (_BATCH, b) for a, b in zip(shape, its_shape, strict=True))
        if its_dtype != dtype or not same:
            raise UserError(
                f"{where}: {name} is {its_dtype} {_words(its_shape)} in the graph, and {dtype} {_words(shape)} after its metadata "
                f"(images of {size} × {size}, {classes} classes): export it again"
            )


def _words(shape: tuple[object, ...]) -> str:
    return f"[{', '.join(str(d) if isinstance(d, int) and d >= 0 else _BATCH for d in shape)}]"
