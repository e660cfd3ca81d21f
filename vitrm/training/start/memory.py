"""The memory that a training step needs, told before it is asked for.

Counted are the tensors that autograd keeps of a batch until the backward pass: the model runs once on
torch's device `meta`, which has shapes and no values.  A step takes more than that for a moment: what does not fit by this count does not fit.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from vitrm import checkpoint
from vitrm.config import ModelConfig
from vitrm.errors import UserError
from vitrm.model import ViTRM
from vitrm.recipe import Recipe
from vitrm.training.augmentation.augment import Batch
from vitrm.training.supervision import StepFunctions, step_loss

_TENSORS = 200  # at most so many tensors of the largest's size are kept: the paper's model keeps a hundred
_COUNTED = 2  # images of the batch that is counted; a batch of 1 takes other paths in some operators


def bytes_per_image(config: ModelConfig, recipe: Recipe, bf16: bool = False) -> int:
    """Bytes that autograd keeps for one image of a batch: all in float32, or half of that."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model = checkpoint.build_model(config).train()
        own = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
        side, b = config.image_size, _COUNTED
        batch = Batch(torch.empty(b, 3, side, side), torch.empty(b, config.classes), torch.zeros(b, dtype=torch.int64))
        functions = StepFunctions(model, recipe)
        alive = [batch]  # what is freed may be counted for something else
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            if isinstance(model, ViTRM):
                x = functions.seen_first(model, batch.images)
                state = model.y0.expand(b, -1, -1), model.z0.expand(b, -1, -1)
                alive += [functions.supervise(x, state, batch, None)]  # type: ignore[list-item]
            else:
                logits = functions.classify(batch.images)
                alive += [step_loss(logits, None, batch.target, batch.label, 0.0, None)]  # type: ignore[list-item]
    return sum(size for storage, size in kept.items() if storage not in own) // _COUNTED // (2 if bf16 else 1)


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on `device`, of this process's container where it is in one; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    found = []
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found.append(next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")))
    with suppress(OSError, ValueError):  # "max" where there is no limit
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        found.append(limit - int((group / "memory.current").read_text(encoding="ascii")))
    return min(found) if found else None


def fitting_batch(config: ModelConfig, recipe: Recipe, device: torch.device, bf16: bool, processes: int) -> int | None:
    """The largest batch, of all `processes` together, that fits into what is free now; None where that cannot be told."""
    with suppress(MemoryError, RuntimeError, ImportError):  # counting takes some memory, too
        free = free_bytes(device)
        return None if free is None else processes * (free // bytes_per_image(config, recipe, bf16))
    return None


def check_batch(
    config: ModelConfig, recipe: Recipe, batch: int, device: torch.device, bf16: bool, processes: int
) -> None:
    """Raises `UserError` where a batch of `batch` images, of all processes together, cannot fit."""
    free, share = free_bytes(device), -(-batch // processes)
    # Counting takes seconds: not where it can be told without that a batch fits.
    if free is None or share * 4 * config.activation * _TENSORS < free:
        return
    each = bytes_per_image(config, recipe, bf16)
    if each * share <= free:
        return
    largest = processes * (free // each)
    way_out = f"--batch-size {largest} fits" if largest else "not even one does: choose a smaller model or --image-size"
    raise UserError(
        f"a batch of {share} images of {config.image_size} × {config.image_size} pixels needs about {each * share / 1e9:.1f} GB to train "
        f"({each / 1e6:.0f} MB an image), {free / 1e9:.1f} GB are free: {way_out}"
    )
