"""How a model is trained, as data: one frozen dataclass, and the named recipes.

`paper` is the paper's recipe.  `paper+` goes beyond it, for the preset of that name: supervision that holds at every
depth, a longer average, no early end.  `fast` is meant for a CPU and for minutes: light augmentation, a high
learning rate, and the losses of two steps in one update instead of one update per step.  `anytime` is `fast`
for every depth: the two supervised steps begin at a random depth of up to four, which rises during training, so
that accuracy does not fall with more steps than two.  `deepen` is a short second stage for a trained model (`--init`):
four steps at a random depth, the later ones weighing more (docs/anytime.md).

Weight decay acts on weight matrices and convolutions only, unless `decay_all`: biases, LayerNorms
(batch norms), position embeddings and the initial state y₀, z₀ set a level rather than a slope, and
pulling them to zero only biases the model.

Imports neither torch nor numpy.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vitrm.errors import UserError


def _check(name: str, value: object, good: bool, expected: str) -> None:
    if not good:
        raise UserError(f"{name} is {value!r}, expected {expected}")


def _typed(name: str, value: Any, wanted: str) -> Any:
    """`value` if it is of the type named `wanted`; a whole number will do for a float."""
    kinds = {"int": int, "float": float, "bool": bool, "str": str}
    if wanted == "float" and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kinds[wanted]) or (isinstance(value, bool) and wanted != "bool"):
        words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}
        raise UserError(f"{name} is {value!r}, expected {words[wanted]}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} is {value!r}, expected a finite number")
    return value


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training recipe.  The defaults are the paper's; dropout belongs to the model's config."""

    # Length and optimizer
    epochs: int = 1000  # passes over the training split, at most
    batch_size: int = 128  # images per batch; the last, incomplete batch of an epoch is left out
    lr: float = 3e-4  # AdamW's peak learning rate
    final_lr: float = 1e-6  # learning rate that the cosine ends at
    warmup: float = 0.03  # share of the epochs with a linearly rising learning rate, in [0, 1)
    weight_decay: float = 0.05  # AdamW's decoupled decay, per unit of learning rate
    decay_all: bool = False  # decay biases, norms, positions and initial states too
    beta1: float = 0.9  # AdamW: decay of the mean of the gradient, per update
    beta2: float = 0.999  # AdamW: decay of the mean of its square, per update
    clip_norm: float = 0.0  # largest norm of the gradient; 0 does not clip
    ema_decay: float = 0.999  # decay of the averaged weights per update, once warmed up: min(this, (1 + t) / (10 + t))
    patience: int = 10  # stop after this many epochs without a better validation result; 0 never stops early

    # Augmentation
    crop_padding: int = 4  # pixels added on each side before a random crop back to size; 0 does not crop
    flip: str = "auto"  # mirror images left to right with chance 1/2: "on", "off", or "auto" (off for digits)
    randaugment_ops: int = 2  # RandAugment operations per image; 0 leaves it out
    randaugment_magnitude: int = 9  # RandAugment's strength, 0 … 30
    mixup_alpha: float = 0.2  # Mixup's Beta(α, α); 0 leaves it out
    cutmix_alpha: float = 1.0  # CutMix's Beta(α, α); 0 leaves it out.  With both, each batch tosses a coin

    # Supervision (the recursive models only)
    supervision: str = "sequential"  # "sequential": an update after every step; "joint": all steps in one update
    n_sup: int = 1  # supervised steps per batch, at most
    free_steps: int = 0  # steps without gradient before the supervised ones: uniform in 0 … this, per batch
    free_ramp: float = 0.0  # share of the batches over which that upper end rises from 0, in [0, 1]
    step_weight_power: float = 0.0  # joint: step i weighs i^this, weights scaled to a mean of 1; 0 weighs them equally
    halt_weight: float = 1.0  # weight of the halting loss beside the cross-entropy
    halt_threshold: float = 0.5  # τ, sequential: a batch ends once its mean halting probability exceeds this

    # Distillation (with a teacher only)
    distill_weight: float = 0.5  # w: the teacher's share of the classification loss, in [0, 1]
    distill_temperature: float = 1.0  # T: both answers are softened by it
    teacher_steps: int = 0  # depth at which a recursive teacher answers; 0: the deepest it was trained for

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _typed(field.name, getattr(self, field.name), str(field.type)))
        for name in ("epochs", "batch_size", "n_sup"):
            _check(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("patience", "crop_padding", "randaugment_ops", "free_steps", "clip_norm", "teacher_steps"):
            _check(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        for name in ("weight_decay", "mixup_alpha", "cutmix_alpha", "halt_weight", "final_lr"):
            _check(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        for name in ("warmup", "beta1", "beta2", "ema_decay"):
            _check(name, getattr(self, name), 0 <= getattr(self, name) < 1, "a number in [0, 1)")
        _check("distill_weight", self.distill_weight, 0 <= self.distill_weight <= 1, "a number in [0, 1]")
        _check("distill_temperature", self.distill_temperature, self.distill_temperature > 0, "above 0")
        _check("free_ramp", self.free_ramp, 0 <= self.free_ramp <= 1, "a number in [0, 1]")
        _check("lr", self.lr, self.lr > 0, "above 0")
        _check("final_lr", self.final_lr, self.final_lr <= self.lr, f"at most lr ({self.lr:g})")
        _check("randaugment_magnitude", self.randaugment_magnitude, 0 <= self.randaugment_magnitude <= 30, "0 … 30")
        _check("flip", self.flip, self.flip in ("auto", "on", "off"), "'auto', 'on' or 'off'")
        _check(
            "supervision",
            self.supervision,
            self.supervision in ("sequential", "joint"),
            "'sequential' (an update per step) or 'joint' (one update per batch)",
        )

    @property
    def trained_depth(self) -> int:
        """The deepest step that training reaches, once it has ended."""
        return self.n_sup + self.free_steps

    def flips(self, data_name: str) -> bool:
        """Whether images of `data_name` are mirrored: a mirrored digit is another shape, or none."""
        return self.flip == "on" or (self.flip == "auto" and data_name != "digits")

    def step_weights(self) -> list[float]:
        """The weight of each supervised step's loss under joint supervision; their mean is 1."""
        raw = [(i + 1) ** self.step_weight_power for i in range(self.n_sup)]
        return [w * len(raw) / sum(raw) for w in raw]

    def free_steps_at(self, progress: float) -> int:
        """The most steps without gradient after the share `progress` ∈ [0, 1] of the batches.

        They begin at none: a model that cannot take one step yet learns little from its seventh.
        """
        if progress >= self.free_ramp:
            return self.free_steps
        return int((self.free_steps + 1) * progress / self.free_ramp)

    def lr_at(self, progress: float) -> float:
        """The learning rate after the share `progress` ∈ [0, 1] of the batches: linear warm-up, then a half cosine."""
        if progress < self.warmup:
            return self.lr * progress / self.warmup
        done = (progress - self.warmup) / (1 - self.warmup)
        return self.final_lr + (self.lr - self.final_lr) * (1 + math.cos(math.pi * min(done, 1.0))) / 2


RECIPES: dict[str, Recipe] = {
    "paper": Recipe(),
    "fast": Recipe(
        epochs=24,
        batch_size=64,
        lr=1e-3,
        warmup=0.1,
        clip_norm=1.0,
        patience=0,
        randaugment_ops=0,
        mixup_alpha=0.0,
        cutmix_alpha=0.0,
        supervision="joint",
        n_sup=2,
    ),
}
RECIPES["anytime"] = dataclasses.replace(RECIPES["fast"], free_steps=4, free_ramp=0.6)
RECIPES["deepen"] = dataclasses.replace(
    RECIPES["fast"], epochs=1, lr=3e-4, n_sup=4, free_steps=2, step_weight_power=2.0
)
RECIPES["paper+"] = dataclasses.replace(
    RECIPES["paper"],
    lr=1e-3,
    warmup=0.05,
    clip_norm=1.0,
    patience=0,  # heavy augmentation learns on long after ten epochs have brought nothing
    ema_decay=0.9998,
    mixup_alpha=0.8,
    supervision="joint",
    n_sup=2,
    free_steps=4,
    free_ramp=0.6,
)
TEACHER_KEYS = ("distill_weight", "distill_temperature", "teacher_steps")  # fields that say nothing without a teacher
BASELINE_EPOCHS = 300  # of the `paper` recipe, for the models that ViTRM is compared with


def default_recipe(preset: str, kind: str) -> str:
    """The recipe's name for a model preset: its own where one is called like it, else `paper` for the paper's models and
    the baselines, and `anytime` for the rest.
    """
    if preset in RECIPES:
        return preset
    return "paper" if kind != "vitrm" or preset.startswith("paper") else "anytime"


def recipe(name: str, kind: str = "vitrm", **changes: Any) -> Recipe:
    """The recipe called `name` for a model of `kind`, with fields replaced by `changes`.

    Raises `UserError` for an unknown recipe, an unknown field, or a value of another type or out of range.
    """
    if name not in RECIPES:
        raise UserError(f"unknown recipe {name!r}: choose one of {', '.join(RECIPES)}")
    values = dataclasses.asdict(RECIPES[name])
    if name == "paper" and kind != "vitrm":
        values["epochs"] = BASELINE_EPOCHS
    return from_dict({**values, **changes}, f"recipe {name}")


def from_dict(values: Mapping[str, Any], where: str) -> Recipe:
    """A recipe of these fields, the others at their defaults; `where` names the source in a `UserError`."""
    known = [f.name for f in dataclasses.fields(Recipe)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise UserError(f"{where}: unknown key {', '.join(unknown)}; known are {', '.join(known)}")
    try:
        return Recipe(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
