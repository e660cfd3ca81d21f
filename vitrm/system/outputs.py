"""Outputs of a command: what must not be written over is refused before the work, not found out after it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from vitrm.errors import UserError

_KINDS = {  # by the end of the name
    ".onnx": "an ONNX file",
    ".plan": "a TensorRT plan",
    ".engine": "a TensorRT plan",
    ".plan.json": "the side-car of a plan",
    ".engine.json": "the side-car of a plan",
    ".safetensors": "a file of weights",
}
_RUN_FILES = ("config.json", "metrics.jsonl", "curve.png", "preprocessor_config.json")  # beside one of the next
_WEIGHTS = ("model.safetensors", "state.safetensors", "model.onnx")


def check_outputs(
    outputs: Mapping[str, Path | None], inputs: Iterable[Path] = (), *, replacing: Iterable[str] = ()
) -> None:
    """Raises `UserError` where one of the `outputs`, by the option that names it, would destroy something else.

    That is an input (a file, or one in an input folder), another output, or a file that is of another kind than what
    would be written: an artifact, weights, part of a run.  Options `replacing` may write over their own kind.
    """
    inputs = list(inputs)
    taken: dict[Path, str] = {}
    for option, path in outputs.items():
        if path is None:
            continue
        place = path.resolve()
        if place in taken:
            raise UserError(f"{taken[place]} and {option} both name {path}: give them different names")
        taken[place] = option
        for source in inputs:
            if place == source.resolve() or (source.is_file() and path.is_file() and path.samefile(source)):
                raise UserError(f"{option} {path} is read by this command: name another file")
        kind = None if option in replacing else kind_of(path)
        if kind is not None:
            raise UserError(f"{option} {path} is {kind}, which it would replace: name another file")


def kind_of(path: Path) -> str | None:
    """The kind of the file `path`, if only its own maker may replace it; None for any other, or none."""
    if not path.is_file():
        return None
    if path.name in _RUN_FILES and any((path.parent / name).is_file() for name in _WEIGHTS):
        return f"part of the model in {path.parent}"
    return next((kind for end, kind in _KINDS.items() if path.name.endswith(end)), None)
