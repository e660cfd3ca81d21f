"""torch.compile of a learner's functions.

On a CPU it makes training a quarter faster (docs/train/speed.md) after a minute or two: only when asked for.  On a GPU it makes
a few dozen kernels of more than a thousand (tests/vitrm/training/test_supervision.py counts them): unless told otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vitrm.model import ViTRM
from vitrm.training.augmentation.augment import Batch
from vitrm.training.supervision import BatchPart, Learner, StepFunctions

MOST_STEPS = 4  # that are compiled as one
_FORMS = 6  # of a function, at most: from the first state and later ones, with gradient and without, in training and behind free steps


def compile_learner(learner: Learner, image_size: int, batch_size: int, say: Callable[[str], None]) -> bool:
    """Gives the learner compiled functions, tried out forward and backward; False if that failed.

    A failure (no C++ compiler, for one) is said in one line, and the run goes on uncompiled.
    """
    names = compiled_names(learner)
    _make_room(len(learner.functions))
    # One shape each.  Workers need code that runs without Python's lock, which is what the C++ wrapper is.
    options: dict[str, str | int | bool | Callable[..., Any]] = {"cpp_wrapper": True} if learner.workers else {}

    def compiled(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, dynamic=False, options=options) if name in names else function

    functions = [StepFunctions(each.model, learner.recipe, compiled) for each in learner.functions]
    images = torch.rand(batch_size, 3, image_size, image_size, device=learner.device)
    # Batch norms count what they see: the trial must leave no trace in the weights.
    before = {k: v.clone() for k, v in learner.model.state_dict().items()}
    learner.to_train_mode()
    try:
        _try_out_all(learner, functions, images)
        learner.functions = functions
        return True
    except Exception as error:  # whatever a compiler may raise: eager always works
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = " ".join(lines[:2])  # the first may only say who raised what the second says
        say(f"torch.compile does not work here ({reason[:160]}): training goes on uncompiled")
        return False
    finally:
        learner.model.load_state_dict(before)
        for each in functions:
            each.model.zero_grad(set_to_none=True)


def compiled_names(learner: Learner) -> list[str]:
    """The functions that are worth compiling."""
    if not isinstance(learner.model, ViTRM):
        return ["classify"]
    # All of an update's steps in one, where they are few: compiling takes its time for each.
    few = learner.recipe.supervision == "sequential" or learner.recipe.n_sup <= MOST_STEPS
    names = ["step", "supervise"] if few else ["step"]
    # On a CPU Inductor's pooling and batch norm are slower than torch's: the tokenizer stays as it is.
    return names if learner.device.type == "cpu" else [*names, "tokens"]


def _make_room(models: int) -> None:
    """Lets Dynamo keep the forms of all functions of `models` models, and forget those of earlier ones.

    It counts the forms of all models together, and beyond 8 leaves a function as it is without a word.
    """
    from torch._dynamo import config, reset

    reset()
    config.recompile_limit = max(config.recompile_limit, _FORMS * models)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 4 * _FORMS * models)


def _try_out_all(learner: Learner, functions: list[StepFunctions], images: torch.Tensor) -> None:
    """Forward and backward through the functions of all parts of a batch at once."""
    if learner.workers is None:
        _try_out(learner, functions[0], images)
        return
    parts = [images[learner.workers.part(worker, len(images))] for worker in range(learner.workers.count)]
    learner.workers.map(lambda worker: _try_out(learner, functions[worker], parts[worker]))


def _try_out(learner: Learner, functions: StepFunctions, images: torch.Tensor) -> None:
    """Forward and backward through the functions of a part of a batch."""
    classes = learner.model.config.classes
    label = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    batch = Batch(images, torch.full((len(images), classes), 1 / classes, device=images.device), label)
    targets = learner.teacher_targets(images)
    # The first state, expanded from learned embeddings, is compiled apart from later ones: those a second time, where any are met.
    recipe = learner.recipe
    later = recipe.free_steps > 0 or (recipe.supervision == "sequential" and recipe.n_sup > 1)
    state = None
    for _ in range(2 if later else 1):
        result = learner.compute(functions, BatchPart(batch, targets, state))
        result.loss.backward()
        state = result.state
    if isinstance(learner.model, ViTRM) and recipe.free_steps:
        learner.compute(functions, BatchPart(batch, targets), 1)
