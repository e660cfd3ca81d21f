"""Metadata of an artifact: the contract between vitrm.export, which writes it, and vitrm.runtime.

In an ONNX file each field is one entry `vitrm.FIELD` of `metadata_props`, its value JSON, and one more entry,
`vitrm.sha256`, is the digest of the file (vitrm.runtime.artifact.onnx_file says of what); beside a TensorRT plan the same fields
stand in `NAME.plan.json`.  Format 1, of vitrm 0.1, has no digest; up to format 2 the preprocessing is not said: there was one alone.
Torch-free.

A file may come from anyone: every value is checked for its type and bounds before it is used.
"""

from __future__ import annotations

import dataclasses
import json
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vitrm import config
from vitrm.errors import UserError
from vitrm.model_limits import MAX_CLASSES, MAX_IMAGE_SIZE, MAX_STEPS
from vitrm.preprocessing import Preprocessing
from vitrm.system import strict_json

PREFIX = "vitrm."
FORMAT = 3
PREPROCESSING_SINCE = 3  # the format from which on it says how a picture becomes its input
DIGEST_SINCE = 2  # the format from which on a file holds its own digest
DIGEST = PREFIX + "sha256"  # the entry that is not a field
MAX_BYTES = 8 << 20  # of all fields together: twenty thousand class names take one
GRAPHS = ("unrolled", "loop", "stepwise", "single")
PRECISIONS = ("fp32", "fp16", "int8")
TARGETS = ("any", "cpu", "tensorrt")


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """An artifact's own description."""

    format: int = FORMAT
    model: dict[str, Any]  # vitrm.config.to_dict of the model's config: kind, classes, n, recursions, mean, std …
    classes: list[str]  # class names, by label
    data: dict[str, Any]  # the data set trained on: name, and what else identifies it
    preprocessing: Preprocessing  # how a picture file becomes pixel_values
    graph: str  # unrolled, loop or stepwise; single for a baseline without recursion
    steps: int  # depth: fixed in unrolled, the default in loop and stepwise, 1 in single
    halt_threshold: float  # baked into unrolled, the default in loop and stepwise; 1 or more never halts
    precision: str  # fp32, fp16 or int8
    target: str = "any"  # the runtime it is made for: any, cpu or tensorrt
    weights_sha256: str  # Checkpoint.weights_id of the weights inside
    run: str  # the run folder or bundled name it was exported from
    exact_sums: bool = False  # of int8: no integer sum can saturate, so every CPU computes the same numbers
    trained_depth: int | None = None  # the deepest step that training reached; None where it is not known
    calibration_id: str | None = None
    kept_float: list[str] = field(default_factory=list)  # step/role/layer that int8 left in floating point
    parity: dict[str, float] = field(default_factory=dict)  # largest differences from eager found at export
    versions: dict[str, str] = field(default_factory=dict)  # package → version
    halting: dict[str, Any] = field(default_factory=dict)  # how halt_threshold was chosen, where a bench chose it

    def to_props(self) -> dict[str, str]:
        """Returns ONNX metadata_props, without the file's digest."""
        return {PREFIX + k: json.dumps(v, allow_nan=False) for k, v in self.to_dict().items()}

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields that its format has, JSON-ready."""
        values = {**dataclasses.asdict(self), "preprocessing": self.preprocessing.to_dict()}
        if self.format < PREPROCESSING_SINCE:
            del values["preprocessing"]
        return values

    @classmethod
    def from_props(cls, props: Mapping[str, str], where: str) -> Metadata:
        """Reads ONNX metadata_props.  Raises `UserError` when `where` was not written by vitrm-export, or is damaged."""
        ours = {k[len(PREFIX) :]: v for k, v in props.items() if k.startswith(PREFIX)}
        if not ours:
            raise UserError(f"{where} was not written by vitrm-export (no vitrm metadata): export it with vitrm-export")
        digest = ours.pop(DIGEST[len(PREFIX) :], None)
        if sum(map(len, ours.values())) > MAX_BYTES:
            raise UserError(f"{where}: vitrm metadata has more than {MAX_BYTES} characters: export it again")
        try:
            values = {k: strict_json.parse(v) for k, v in ours.items()}
        except ValueError as error:
            raise UserError(f"{where}: damaged vitrm metadata ({error}): export it again") from None
        found = cls.from_dict(values, where)
        if digest is None and found.format >= DIGEST_SINCE:
            raise UserError(f"{where}: damaged vitrm metadata (no {DIGEST}): export it again")
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> Metadata:
        """Reads a mapping of fields.

        Raises `UserError` for another format, missing or unknown fields, and values of other types or out of bounds.
        """
        version: Any = values.get("format")
        if not _whole(1, FORMAT)(version):
            raise UserError(
                f"{where}: metadata format {_short(version)}, this vitrm reads 1 to {FORMAT}: export it again with this version"
            )
        fields = {f.name: f for f in dataclasses.fields(cls)}
        required = {
            n
            for n, f in fields.items()
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        }
        if version < PREPROCESSING_SINCE:
            required.remove("preprocessing")
            del fields["preprocessing"]
        missing, unknown = sorted(required - set(values)), sorted(set(values) - set(fields))
        if missing or unknown:
            raise UserError(
                f"{where}: vitrm metadata lacks {missing or 'nothing'}, has unknown {_short(unknown) if unknown else 'nothing'}: "
                "export it again"
            )
        for name, value in values.items():
            expected, holds = _EXPECTED[name]
            if not holds(value):
                raise UserError(
                    f"{where}: vitrm metadata says {name} is {_short(value)}, expected {expected}: export it again"
                )
        config.from_dict(values["model"], f"{where}: vitrm metadata")
        classes, count = values["classes"], values["model"]["classes"]
        if classes and len(classes) != count:
            raise UserError(
                f"{where}: vitrm metadata has {len(classes)} class names for a model of {count} classes: export it again"
            )
        side = values["model"]["image_size"]
        preprocessing = Preprocessing.recorded(values.get("preprocessing"), side, f"{where}: vitrm metadata")
        return cls(**{**values, "preprocessing": preprocessing})

    @property
    def class_names(self) -> list[str]:
        """Names of all classes, by label: their numbers where it has no names."""
        return list(self.classes) or [str(i) for i in range(int(self.model["classes"]))]

    @property
    def image_size(self) -> int:
        """Height and width of the input, pixels."""
        return int(self.model["image_size"])

    @property
    def glimpses(self) -> str:
        """Name of what each step looks at, as in the model's settings; "none" in an artifact of before there were any."""
        return str(self.model.get("glimpses", "none"))

    @property
    def recursive(self) -> bool:
        """True for a model with steps; a baseline has none."""
        return self.graph != "single"


_short = reprlib.Repr().repr  # of a value, for a message: a file may hold megabytes of it


def _whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high


def _one_of(*names: str) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, str) and v in names


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)  # finite, as strict_json makes sure


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 4096


def _anything(value: Any) -> bool:
    return True


def _texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MAX_CLASSES and all(map(_text, value))


def _mapping(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, dict) and all(_text(k) and of(e) for k, e in v.items())


def _model(value: Any) -> bool:
    """Checks what `vitrm.config.from_dict` does not: the bounds within which a graph can be."""
    return (
        _mapping(_anything)(value)
        and _whole(1, MAX_IMAGE_SIZE)(value.get("image_size"))
        and _whole(1, MAX_CLASSES)(value.get("classes"))
    )


# Of each field: what it must be, in words and as a test.
_EXPECTED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "format": (f"1 to {FORMAT}", _whole(1, FORMAT)),
    "model": (f"a config with image_size up to {MAX_IMAGE_SIZE} and classes up to {MAX_CLASSES}", _model),
    "classes": ("a list of names", _texts),
    "data": ("an object of plain values", _mapping(_anything)),
    "preprocessing": ("an object", _mapping(_anything)),
    "graph": (f"one of {', '.join(GRAPHS)}", _one_of(*GRAPHS)),
    "steps": (f"a whole number from 1 to {MAX_STEPS}", _whole(1, MAX_STEPS)),
    "halt_threshold": ("a finite number of at least 0", lambda v: _number(v) and v >= 0),
    "precision": (f"one of {', '.join(PRECISIONS)}", _one_of(*PRECISIONS)),
    "target": (f"one of {', '.join(TARGETS)}", _one_of(*TARGETS)),
    "weights_sha256": ("a hash", _text),
    "run": ("a name", _text),
    "exact_sums": ("true or false", lambda v: isinstance(v, bool)),
    "trained_depth": ("a depth or null", lambda v: v is None or _whole(1, 2**31)(v)),
    "calibration_id": ("a hash or null", lambda v: v is None or _text(v)),
    "kept_float": ("a list of names", _texts),
    "parity": ("an object of numbers", _mapping(_number)),
    "versions": ("an object of versions", _mapping(_text)),
    "halting": ("an object of plain values", _mapping(_anything)),
}
