"""What an artefact says of itself: the contract between vitrm.export, which writes it, and vitrm.runtime.

In an ONNX file each field is one entry `vitrm.FIELD` of `metadata_props`, its value JSON; beside a
TensorRT plan the same fields stand in `NAME.plan.json`.  Torch-free.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vitrm.errors import UserError

PREFIX = "vitrm."
FORMAT = 1
GRAPHS = ("unrolled", "loop", "stepwise", "single")

# Graph inputs and outputs.  Hugging Face's names, so exported folders load in its pipelines.
PIXELS = "pixel_values"  # float32 [batch, 3, H, W] in [0, 1]
LOGITS = "logits"  # float32 [batch, classes]
HALT_PROB = "halt_prob"  # float32 [batch]
STEPS_USED = "steps_used"  # int64 [batch]
STEPS = "steps"  # int64 scalar, input of `loop`
HALT_THRESHOLD = "halt_threshold"  # float32 scalar, input of `loop`
MAX_STEPS = 1024  # what `steps` is clamped to in `loop`: nobody should wait for a million steps by mistake
STEP_LOGITS = "step_logits"  # float32 [steps, batch, classes], optional output of `unrolled`
STEP_HALT_PROB = "step_halt_prob"  # float32 [steps, batch], optional output of `unrolled`

# The three graphs of `stepwise`, files of one folder, and what goes between them, in the recursion's own type
# (float32 or float16):
#   embed.onnx   pixel_values → EMBEDDED, STATE        step.onnx   EMBEDDED, STATE → NEXT
#   heads.onnx   y → logits, halt_prob
PARTS = ("embed", "step", "heads")
EMBEDDED = ("x", "x_q", "x_k", "x_v")  # tokens [batch, N, D], and layer 1's projections of them
# answer [batch, 1, D], latents [batch, K, D], and layer 1's projection of them, which two steps need
STATE = ("y", "z", "z_q", "z_k", "z_v")
NEXT = tuple(f"{name}_next" for name in STATE)  # the state one step later


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """An artefact's own description."""

    format: int = FORMAT
    model: dict[str, Any]  # vitrm.config.to_dict of the model's config: kind, classes, n, recursions, mean, std …
    classes: list[str]  # class names, by label
    data: dict[str, Any]  # the data set trained on: name, and what else identifies it
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
        """As ONNX metadata_props."""
        return {PREFIX + k: json.dumps(v) for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_props(cls, props: Mapping[str, str], where: str) -> Metadata:
        """From ONNX metadata_props.  Raises `UserError` when `where` was not written by vitrm-export."""
        ours = {k[len(PREFIX) :]: v for k, v in props.items() if k.startswith(PREFIX)}
        if not ours:
            raise UserError(f"{where} was not written by vitrm-export (no vitrm metadata): export it with vitrm-export")
        try:
            return cls.from_dict({k: json.loads(v) for k, v in ours.items()}, where)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: damaged vitrm metadata ({error}): export it again") from None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> Metadata:
        """From a mapping of fields.  Raises `UserError` for another format, or missing or unknown fields."""
        if values.get("format") != FORMAT:
            raise UserError(
                f"{where}: metadata format {values.get('format')!r}, this vitrm reads {FORMAT}: export it again with this version"
            )
        fields = {f.name: f for f in dataclasses.fields(cls)}
        required = {
            n
            for n, f in fields.items()
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        }
        missing, unknown = sorted(required - set(values)), sorted(set(values) - set(fields))
        if missing or unknown:
            raise UserError(
                f"{where}: vitrm metadata lacks {missing or 'nothing'}, has unknown {unknown or 'nothing'}: export it again"
            )
        found = cls(**values)
        model = found.model if isinstance(found.model, dict) else {}
        if (
            not all(isinstance(model.get(k), int) for k in ("image_size", "classes"))
            or found.graph not in GRAPHS
            or not isinstance(found.steps, int)
            or not isinstance(found.halt_threshold, (int, float))
            or not isinstance(found.classes, list)
            or not isinstance(found.data, dict)
        ):
            raise UserError(
                f"{where}: vitrm metadata has values of other kinds than this version writes: export it again"
            )
        return found

    @property
    def image_size(self) -> int:
        """Height and width of the input, pixels."""
        return int(self.model["image_size"])

    @property
    def recursive(self) -> bool:
        """Whether the model has steps (a baseline has none)."""
        return self.graph != "single"
