"""The state that a killed run continues from: one safetensors file, nothing in it is executed on loading.

    model.*  ema.*              weights and averaged weights
    optimizer.PARAMETER.*       AdamW's step, exp_avg, exp_avg_sq
    sums                        float64 [4]: of the epoch so far (see `Progress`)
    metadata `vitrm_state`      JSON: counters, history, best so far, and the identity of the run

The run's identity (model, recipe, data, seed) is compared before anything is loaded, and a checksum
over all tensors tells a damaged file from a whole one.
"""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitrm.config import from_dict as config_from_dict
from vitrm.config import to_dict
from vitrm.errors import UserError
from vitrm.files import atomic_path
from vitrm.recipe import from_dict as recipe_from_dict

if TYPE_CHECKING:
    from torch import Tensor

    from vitrm.supervision import Learner

STATE_FILE = "state.safetensors"
FORMAT = 1
_KEY = "vitrm_state"


@dataclass
class Progress:
    """How far a run is."""

    epoch: int = 0  # epochs finished
    batch: int = 0  # batches done of the current epoch
    seconds: float = 0.0  # spent training in the current epoch
    sums: Tensor | None = (
        None  # float64 [4] on the device: loss, right answers, halt, supervised steps of the epoch so far, this process's share
    )
    history: list[dict[str, Any]] = field(default_factory=list)  # the lines of metrics.jsonl
    best: dict[str, Any] | None = None  # epoch, accuracy and loss of the best validation result
    test_accuracy: list[float] | None = None  # by depth, once the run has finished


def save(
    path: str | os.PathLike[str],
    learner: Learner,
    progress: Progress,
    identity: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    """Writes the state atomically, in the main process only; `settings` is kept for whoever resumes.  Raises `UserError` if a weight is not finite or the disk is full."""
    import torch
    from safetensors.torch import save_file

    tensors = {f"model.{k}": v for k, v in learner.model.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in learner.ema.model.state_dict().items()}
    for name, parameter in learner.model.named_parameters():
        for key, value in learner.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    if progress.sums is not None:
        tensors["sums"] = learner.world.total(progress.sums)
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    if not all(bool(torch.isfinite(v).all()) for v in tensors.values() if v.is_floating_point()):
        raise UserError("training has diverged: a weight is NaN or infinite; lower the learning rate (--lr)")
    header = {
        "format": FORMAT,
        "identity": identity,
        "settings": settings,
        "epoch": progress.epoch,
        "batch": progress.batch,
        "seconds": progress.seconds,
        "history": progress.history,
        "best": progress.best,
        "test_accuracy": progress.test_accuracy,
        "updates": learner.updates,
        "checksum": _checksum(tensors),
    }
    if not learner.world.main:
        return
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={_KEY: json.dumps(header)})
        except OSError:
            raise
        except Exception as error:  # safetensors wraps the system's error in its own
            raise OSError(28 if "No space left" in str(error) else 5, str(error), str(path)) from error


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The state's JSON header.  Raises `UserError` when the file is missing, damaged or something else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        header = json.loads(metadata[_KEY])
    except FileNotFoundError:
        raise UserError(f"nothing to resume: {path} does not exist; start the run without --resume") from None
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError, ValueError) as error:
        raise _damaged(path, error) from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise UserError(f"{path} is a training state of another version: start a new run with another --out")
    return header


def read(path: str | os.PathLike[str], identity: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The state's header and tensors.  Raises `UserError` if it is damaged or of a run with another identity."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    header = read_header(path)
    check_identity(identity, _completed(header["identity"], str(path)), Path(path).parent)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from None
    if _checksum(tensors) != header["checksum"]:
        raise _damaged(path, "its checksum does not match")
    return header, tensors


def restore(
    path: str | os.PathLike[str], header: dict[str, Any], tensors: dict[str, Tensor], learner: Learner
) -> Progress:
    """Puts the state that `read` gave into `learner`.  Raises `UserError` if it does not fit."""
    from vitrm.checkpoint import load_weights

    load_weights(learner.model, _under(tensors, "model."), str(path))
    load_weights(learner.ema.model, _under(tensors, "ema."), str(path))
    learner.optimizer.state.clear()
    for name, parameter in learner.model.named_parameters():
        own = _under(tensors, f"optimizer.{name}.")
        if own:
            learner.optimizer.state[parameter] = {k: v.to(learner.device) for k, v in own.items()}
    learner.updates = header["updates"]
    sums = tensors.get("sums")
    return Progress(
        epoch=header["epoch"],
        batch=header["batch"],
        seconds=header["seconds"],
        sums=None if sums is None else sums.to(learner.device),
        history=header["history"],
        best=header["best"],
        test_accuracy=header["test_accuracy"],
    )


def check_identity(asked: dict[str, Any], saved: dict[str, Any], folder: Path) -> None:
    """Raises `UserError` that names every difference between the run asked for and the one saved in `folder`."""
    a, b = _flat(asked), _flat(saved)
    differences = [
        f"{key} is {a.get(key, 'absent')!r}, the run has {b.get(key, 'absent')!r}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key)
    ]
    if not differences:
        return
    hint = ""
    if any(d.startswith("recipe.epochs ") for d in differences):
        hint = " (the number of epochs shapes the learning rate's schedule, so a run cannot be lengthened half-way)"
    shown = "; ".join(differences[:4]) + ("; …" if len(differences) > 4 else "")
    raise UserError(
        f"{folder} cannot be resumed, it is another run: {shown}{hint}: leave these settings out, or start anew with another --out"
    )


def _completed(identity: dict[str, Any], where: str) -> dict[str, Any]:
    """A saved identity with the settings that came after it was saved, at their defaults."""
    model = to_dict(config_from_dict(identity["model"], where))
    return {**identity, "model": model, "recipe": asdict(recipe_from_dict(identity["recipe"], where))}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def _checksum(tensors: dict[str, Tensor]) -> int:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(name.encode(), value)
        value = zlib.crc32(
            tensors[name].contiguous().numpy().data if tensors[name].ndim else tensors[name].numpy().tobytes(), value
        )
    return value


def _damaged(path: str | os.PathLike[str], why: object) -> UserError:
    return UserError(
        f"{path} cannot be read as a training state ({why}): it may be truncated; restore it from a copy, or start anew with another --out"
    )
