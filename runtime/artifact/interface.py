"""Inputs and outputs of a graph, compared with what its metadata says of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vitrm.errors import UserError
from vitrm.runtime.artifact.graph_names import (
    ANSWER,
    HALT_PROB,
    HALT_THRESHOLD,
    LOGITS,
    NEXT_SUFFIX,
    PARTS,
    PIXELS,
    STEPS,
    STEPS_USED,
)
from vitrm.runtime.artifact.metadata import Metadata

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


@dataclass(frozen=True)
class CarriedTensors:
    """Names of the tensors that go from one of the three graphs of `stepwise` to another."""

    embedded: tuple[str, ...]  # what embed gives once, and every step reads
    state: tuple[str, ...]  # what a step reads and gives anew, as NAME_next; the answer among it

    @property
    def next(self) -> tuple[str, ...]:
        """The state one step later, in the order of `state`."""
        return tuple(name + NEXT_SUFFIX for name in self.state)

    @classmethod
    def between(cls, folder: Path, tensors: Mapping[str, tuple[Iterable[str], Iterable[str]]]) -> CarriedTensors:
        """Reads them off the graphs' own names; `tensors` has the inputs and outputs of each of PARTS.

        Raises `UserError` unless they fit together.
        """
        inputs = {part: set(tensors[part][0]) for part in PARTS}
        outputs = {part: set(tensors[part][1]) for part in PARTS}
        state = {name.removesuffix(NEXT_SUFFIX) for name in outputs["step"] if name.endswith(NEXT_SUFFIX)}
        fits = {
            "embed": (inputs["embed"], outputs["embed"]) == ({PIXELS}, inputs["step"]),
            "step": len(state) == len(outputs["step"]) and ANSWER in state and state <= inputs["step"],
            "heads": (inputs["heads"], outputs["heads"]) == ({ANSWER}, {LOGITS, HALT_PROB}),
        }
        for part, good in fits.items():
            if not good:
                raise UserError(
                    f"{folder}: {part}: inputs {sorted(inputs[part])} and outputs {sorted(outputs[part])} are not those of a "
                    f"vitrm {part} graph: export it again"
                )
        return cls(tuple(sorted(inputs["step"] - state)), tuple(sorted(state)))


def _words(shape: tuple[object, ...]) -> str:
    return f"[{', '.join(str(d) if isinstance(d, int) and d >= 0 else _BATCH for d in shape)}]"
