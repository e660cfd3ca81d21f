"""The start of a run: its identity, and a learner for a model's config, a recipe and images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitrm import checkpoint
from vitrm.baselines.networks import Baseline
from vitrm.checkpoint import Checkpoint
from vitrm.config import ModelConfig, to_dict
from vitrm.data import DATASETS, Images, normalization
from vitrm.errors import UserError
from vitrm.layers.whitening import Whitening
from vitrm.model import ViTRM
from vitrm.preprocessing import Preprocessing
from vitrm.recipe import Recipe
from vitrm.system.memory import shortage_explained
from vitrm.training.parallel.device import workers_for
from vitrm.training.parallel.distributed import World
from vitrm.training.start.transfer import transfer
from vitrm.training.supervision import Learner
from vitrm.training.teachers.distillation import Teacher, check_teacher
from vitrm.training.teachers.torchvision import TorchvisionTeacher, TorchvisionWeights, make_teacher

TeacherModel = Checkpoint | TorchvisionWeights
WHITENING_IMAGES = 5000  # that filters which whiten are computed from


def fit_config(config: ModelConfig, images: Images) -> ModelConfig:
    """`config` with the classes, image size and normalization of `images`."""
    norm = normalization(images)
    return dataclasses.replace(
        config, classes=len(images.classes), image_size=images.pixels.shape[-1], mean=norm.mean, std=norm.std
    )


def run_identity(
    config: ModelConfig, recipe: Recipe, images: Images, seed: int, teacher: TeacherModel | None
) -> dict[str, Any]:
    """JSON that is equal for two runs if they compute the same: a run is resumed with its own alone."""
    identity: dict[str, Any] = {
        "model": to_dict(config),
        "recipe": dataclasses.asdict(recipe),
        # A folder of images may lie elsewhere when the run goes on; its id says that it is the same.
        "data": {
            "name": images.name if images.name in DATASETS else "folder",
            "train": len(images),
            "id": images.id,
            "preprocessing": preprocessing_of(images).to_dict(),
        },
        "seed": seed,
    }
    if teacher is not None:
        identity["teacher"] = origin_of(teacher)
    return identity


def preprocessing_of(images: Images) -> Preprocessing:
    """How files became `images`; of images that were none, how a file may become one like them."""
    return images.preprocessing or Preprocessing.square(images.pixels.shape[-1])


def origin_of(run: TeacherModel) -> dict[str, str]:
    """JSON that tells a checkpoint, or a network with weights, from every other."""
    name = f"torchvision:{run.name}" if isinstance(run, TorchvisionWeights) else Path(run.source).name
    return {"run": name, "weights_sha256": run.weights_id}


def new_learner(
    config: ModelConfig,
    recipe: Recipe,
    images: Images,
    batch_size: int,
    *,
    seed: int,
    device: torch.device,
    bf16: bool,
    world: World,
    teacher: TeacherModel | None,
    say: Callable[[str], None],
) -> Learner:
    """A learner with weights drawn from `seed`.  `say` is told of a teacher that has to learn first.

    Raises `UserError` for a teacher of other images or classes, and for too little memory.
    """
    asked = None if teacher is None else _asked(teacher, config, recipe, images, device, world, say)
    torch.manual_seed(seed)
    with shortage_explained(lambda: "the model does not fit: choose a smaller one"):
        model = checkpoint.build_model(config).to(device)
        whiten(model, images)
        workers = workers_for(model, device, batch_size, world.size)
        return Learner(model, recipe, device, bf16, world, asked, workers)


def _asked(
    teacher: TeacherModel,
    config: ModelConfig,
    recipe: Recipe,
    images: Images,
    device: torch.device,
    world: World,
    say: Callable[[str], None],
) -> Teacher | TorchvisionTeacher:
    if isinstance(teacher, Checkpoint):
        if recipe.teacher_image_size:
            raise UserError("teacher_image_size is for torchvision's networks: a run has an image size of its own")
        check_teacher(teacher, images.classes, config.image_size)
        return Teacher(teacher, device, recipe.teacher_steps)
    if recipe.teacher_steps:
        raise UserError(f"teacher_steps is {recipe.teacher_steps}, but {teacher.source} has no steps: leave it out")
    return make_teacher(
        teacher,
        images,
        device,
        image_size=recipe.teacher_image_size,
        balanced=recipe.balance != "none",
        broadcast=world.broadcast,
        say=say,
    )


def whiten(model: ViTRM | Baseline, images: Images) -> None:
    """Sets the filters of `model` that whiten, where it has any, for the training images."""
    for module in model.modules():
        if isinstance(module, Whitening):
            # From all of the set: a folder's images come class by class.  Of large ones fewer, which have as many patches.
            height, width = images.pixels.shape[2:]
            count = min(len(images), max(64, min(WHITENING_IMAGES, WHITENING_IMAGES * 32**2 // (height * width))))
            chosen = np.linspace(0, len(images) - 1, count).astype(np.int64)
            some = torch.from_numpy(images.pixels[chosen]).to(model.mean.device)
            module.whiten((some.float() / 255 - model.mean) / model.std)


def start_from(learner: Learner, init: Checkpoint, classes: Sequence[str]) -> tuple[str, ...]:
    """Takes over the weights of `init`, without its classifier if it knows other classes; returns what was done to them, in sentences.

    Raises `UserError` if it is another model, and for a tokenizer that is to stay as it is and cannot be taken over.
    """
    same = list(init.data.get("classes", [])) == list(classes)
    found = transfer(init, learner.model, same)
    if found.new_tokenizer and learner.recipe.freeze == "tokenizer":
        raise UserError(f"freeze is 'tokenizer', but {found.notes[0]}: leave out --freeze, or --image-size")
    for model in (learner.model, learner.ema.model):
        checkpoint.load_weights(model, found.weights, init.source)
    return found.notes
