"""Training recipes as data: one frozen dataclass, and the named recipes.

`paper` is the paper's recipe.  `paper+` goes beyond it, for the preset of that name: supervision that holds at every
depth, a longer average, no early end.  `fast` is meant for a CPU and for minutes: light augmentation, a high
learning rate, and the losses of two steps in one update instead of one update per step.  `anytime` is `fast`
for every depth: the two supervised steps begin at a random depth of up to four, which rises during training, so
that accuracy does not fall with more steps than two.  `deepen` is a short second stage for a trained model (`--init`):
four steps at a random depth, the later ones weighing more (docs/train/anytime.md).  `looks` is another: a model that was
trained on one view learns to use the views of `--glimpses`, its tokenizer as it is (docs/train/nano-v2.md).

Weight decay acts on weight matrices and convolutions only, unless `decay_all`: biases, LayerNorms
(batch norms), position embeddings and the initial state y₀, z₀ set a level rather than a slope, and
pulling them to zero only biases the model.

Imports neither torch nor numpy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vitrm.errors import UserError
from vitrm.fields import UNBOUNDED, check, choice, did_you_mean, flag, from_values, real, shown, whole
from vitrm.model_limits import MAX_STEPS


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training recipe.  The defaults are the paper's; dropout belongs to the model's config."""

    epochs: int = whole(
        1000, 1, 1_000_000, "passes over the training images, at most", group="recipe: length and optimizer"
    )
    batch_size: int = whole(
        128, 1, 1_000_000, "images per batch; the last, incomplete batch of an epoch is left out", unit="images"
    )
    lr: float = real(3e-4, 0, UNBOUNDED, "AdamW's peak learning rate", above=True)
    final_lr: float = real(1e-6, 0, UNBOUNDED, "learning rate that the schedule ends at")
    schedule: str = choice(
        "cosine", "linear", help="how the learning rate falls after the warm-up: half a cosine, or a straight line"
    )
    optimizer: str = choice(
        "adamw", "muon", help="muon: Muon for the weights of hidden matrices and convolutions, AdamW for the rest"
    )
    muon_lr: float = real(0.02, 0, UNBOUNDED, "Muon's peak learning rate", above=True)
    muon_momentum: float = real(0.95, 0, 1, "Muon: decay of the sum of gradients, per update", below=True)
    warmup: float = real(0.03, 0, 1, "share of the epochs with a linearly rising learning rate", below=True)
    weight_decay: float = real(0.05, 0, UNBOUNDED, "AdamW's decoupled decay, per unit of learning rate")
    decay_all: bool = flag(False, "decay biases, norms, positions and initial states too")
    beta1: float = real(0.9, 0, 1, "AdamW: decay of the mean of the gradient, per update", below=True)
    beta2: float = real(0.999, 0, 1, "AdamW: decay of the mean of its square, per update", below=True)
    clip_norm: float = real(0.0, 0, UNBOUNDED, "largest norm of the gradient; 0 does not clip")
    ema_decay: float = real(
        0.999,
        0,
        1,
        "decay of the averaged weights: at update t the smaller of this and (1 + t) / (10 + t), which is a warm-up",
        below=True,
    )
    patience: int = whole(
        10, 0, 1_000_000, "stop after so many epochs without a better validation result; 0: never", unit="epochs"
    )

    balance: str = choice(
        "none",
        "loss",
        "sampling",
        help="for classes of unequal size: loss weighs each class's images so that all classes count the same, sampling draws "
        "all classes equally often; the weights with the best mean recall are kept then",
    )
    freeze: str = choice("none", "tokenizer", help="part of the --init weights that stays as it is")

    crop_padding: int = whole(
        4,
        0,
        1024,
        "pixels added on each side before a random crop back to size; 0 does not crop",
        unit="pixels",
        group="recipe: augmentation",
    )
    crop_fill: str = choice("black", "reflect", help="what these pixels are")
    flip: str = choice(
        "auto",
        "on",
        "off",
        "alternate",
        help="mirror images left to right: on (with chance 1/2), off, auto (off for digits, else on) or alternate: a random "
        "half of the images in the first epoch, the other half in the next, and so on",
    )
    cutout: int = whole(
        0, 0, 1024, "side of a square at a random place that is made gray; 0 leaves it out", unit="pixels"
    )
    label_smoothing: float = real(0.0, 0, 1, "share of a target spread over all classes", below=True)
    randaugment_ops: int = whole(2, 0, 64, "RandAugment operations per image; 0 leaves it out")
    randaugment_magnitude: int = whole(9, 0, 30, "RandAugment's strength")
    mixup_alpha: float = real(0.2, 0, 1000, "Mixup's Beta(α, α); 0 leaves it out")
    cutmix_alpha: float = real(
        1.0, 0, 1000, "CutMix's Beta(α, α); 0 leaves it out; with both, each batch tosses a coin"
    )

    supervision: str = choice(
        "sequential",
        "joint",
        help="sequential: an update after every step; joint: all steps in one update",
        group="recipe: supervision of recursive models",
    )
    n_sup: int = whole(1, 1, MAX_STEPS, "supervised steps per batch, at most", unit="steps")
    free_steps: int = whole(
        0,
        0,
        MAX_STEPS,
        "steps without gradient before the supervised ones: uniform in 0 … this, per batch",
        unit="steps",
    )
    free_ramp: float = real(0.0, 0, 1, "share of the batches over which that upper end rises from 0")
    step_weight_power: float = real(
        0.0, -64, 64, "joint: step i weighs i^this, weights scaled to a mean of 1; 0 weighs them equally"
    )
    agreement_weight: float = real(
        0.0, 0, UNBOUNDED, "joint: weight of each step's divergence from the last step's answer"
    )
    token_weight: float = real(
        0.0,
        0,
        UNBOUNDED,
        "weight of the classifier's loss on the image tokens' largest values, which depth does not reach",
    )
    halt_weight: float = real(1.0, 0, UNBOUNDED, "weight of the halting loss beside the cross-entropy")
    halt_threshold: float = real(
        0.5, -1000, 1000, "sequential: a batch ends once its mean halting probability exceeds this"
    )

    distill_weight: float = real(
        0.5,
        0,
        1,
        "the teacher's share of the classification loss",
        unit="w",
        group="recipe: distillation, with --teacher",
    )
    distill_temperature: float = real(1.0, 0, 1000, "both answers are softened by it", above=True, unit="T")
    teacher_steps: int = whole(
        0,
        0,
        MAX_STEPS,
        "depth at which a recursive teacher answers; 0: the deepest it was trained for",
        unit="steps",
    )

    teacher_image_size: int = whole(
        0,
        0,
        4096,
        "to which a torchvision teacher's images are resized; 0: what its weights were made for, mostly 224",
        unit="pixels",
    )

    def __post_init__(self) -> None:
        check(self)
        if self.final_lr > self.lr:
            raise UserError(f"final_lr is {self.final_lr:g}, expected at most lr ({self.lr:g})")

    @property
    def trained_depth(self) -> int:
        """The deepest step that training reaches, once it has ended."""
        return self.n_sup + self.free_steps

    def flips(self, data_name: str) -> bool:
        """True if images of `data_name` are mirrored: a mirrored digit is another shape, or none."""
        return self.flip in ("on", "alternate") or (self.flip == "auto" and data_name != "digits")

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
RECIPES["nano-v2"] = Recipe(
    epochs=32,
    lr=1e-3,
    schedule="linear",
    optimizer="muon",
    warmup=0.1,
    weight_decay=0.02,
    clip_norm=0.0,
    patience=0,
    crop_padding=2,
    crop_fill="reflect",
    flip="alternate",
    randaugment_ops=0,
    mixup_alpha=0.0,
    cutmix_alpha=0.0,
    cutout=6,
    label_smoothing=0.1,
    supervision="joint",
    n_sup=2,
    free_steps=4,
    free_ramp=0.6,
    step_weight_power=1.0,
    agreement_weight=0.5,
    token_weight=1.0,
)
# A larger model learns an image sooner by heart: it sees it less often, and more changed.
RECIPES["small-v2"] = dataclasses.replace(RECIPES["nano-v2"], epochs=14, crop_padding=3, cutout=8)
RECIPES["nano-v3"] = dataclasses.replace(RECIPES["small-v2"], epochs=36)
# Glimpses after one reading: the tokenizer, which has learned the training images nearly by heart, stays; the block learns
# what to make of the next view, mostly from a teacher, as labels of images known by heart say little.
RECIPES["looks"] = dataclasses.replace(
    RECIPES["nano-v3"],
    freeze="tokenizer",
    epochs=3,
    lr=3e-4,
    muon_lr=0.005,
    cutout=12,
    n_sup=3,
    free_steps=3,
    free_ramp=0.0,
    step_weight_power=0.0,
    agreement_weight=0.0,
    token_weight=0.0,
    distill_weight=0.8,
)
TEACHER_KEYS = (  # fields that say nothing without a teacher
    "distill_weight",
    "distill_temperature",
    "teacher_steps",
    "teacher_image_size",
)
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
        raise UserError(
            f"unknown recipe {shown(name)}: choose one of {', '.join(RECIPES)}{did_you_mean(name, RECIPES)}"
        )
    values = dataclasses.asdict(RECIPES[name])
    if name == "paper" and kind != "vitrm":
        values["epochs"] = BASELINE_EPOCHS
    return from_dict({**values, **changes}, f"recipe {name}")


def from_dict(values: Mapping[str, Any], where: str) -> Recipe:
    """A recipe of these fields, the others at their defaults; `where` names the source in a `UserError`."""
    return from_values(Recipe, dict(values), where, "a recipe")
