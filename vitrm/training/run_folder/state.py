"""The state that a killed run continues from: one safetensors file, nothing in it is executed on loading.

    model.*  ema.*              weights and averaged weights
    optimizer.PARAMETER.*       AdamW's step, exp_avg, exp_avg_sq
    sums                        float64 [4]: of the epoch so far (see `RunProgress`)
    metadata `vitrm_state`      JSON: counters, history, best so far, and the identity of the run

The run's identity (model, recipe, data, seed) is compared before anything is loaded.  Two checksums tell a damaged file
from a whole one: a CRC-32 over all tensors, which stands in the JSON, and the JSON's own SHA-256.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitrm.config import from_dict as config_from_dict
from vitrm.config import to_dict
from vitrm.errors import UserError, explain_os_error
from vitrm.fields import Real, Rule, Whole, checked, shown
from vitrm.preprocessing import Preprocessing
from vitrm.recipe import from_dict as recipe_from_dict
from vitrm.system import strict_json, tensor_file
from vitrm.system.files import atomic_path, check_regular

if TYPE_CHECKING:
    from torch import Tensor

    from vitrm.training.supervision import Learner

STATE_FILE = "state.safetensors"
FORMAT = 2
_UNSEALED = 1  # format of version 0.1.0, whose checksum is of the tensors' bytes alone
_KEY = "vitrm_state"
_DIGEST = "sha256"  # the header's own, in it
_BATCH_SIZE = "recipe.batch_size"


@dataclass
class RunProgress:
    """The point that a run has reached."""

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
    progress: RunProgress,
    identity: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    """Writes the state atomically, in the main process only; `settings` is kept for whoever resumes.  Raises `UserError` if a weight or a loss is not finite, or the disk is full."""
    import torch

    tensors = {f"model.{k}": v for k, v in learner.model.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in learner.ema.model.state_dict().items()}
    for name, parameter in learner.model.named_parameters():
        for optimizer in learner.optimizers:
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}"] = value
    if progress.sums is not None:
        tensors["sums"] = learner.world.all_reduce(progress.sums)
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
        "checksum": _checksum(tensors, FORMAT),
    }
    try:
        header = json.loads(json.dumps(header, allow_nan=False))  # as it will be read: JSON has no tuples
    except ValueError:
        raise UserError("training has diverged: a loss is NaN or infinite; lower the learning rate (--lr)") from None
    header[_DIGEST] = strict_json.digest(header)
    if not learner.world.main:
        return
    with atomic_path(path) as temporary:
        tensor_file.write(temporary, tensors, {_KEY: json.dumps(header)})


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The state's JSON header.  Raises `UserError` when the file is missing, damaged or something else."""
    return _read_header(path)[0]


def _read_header(path: str | os.PathLike[str]) -> tuple[dict[str, Any], int]:
    """The JSON header, and the bytes of all tensors."""
    try:
        os.stat(path)
    except FileNotFoundError:
        raise UserError(f"nothing to resume: {path} does not exist; start the run without --resume") from None
    except OSError as error:
        raise explain_os_error(error, f"reading {path}") from error
    check_regular(path, "training state")
    try:
        metadata, size = tensor_file.read_header(path)
        header = strict_json.parse(metadata[_KEY])
    except KeyError:
        raise _damaged(path, "it is a file of another kind") from None
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None
    if not isinstance(header, dict) or header.get("format") not in (FORMAT, _UNSEALED):
        raise UserError(f"{path} is a training state of another version: start a new run with another --out")
    if header["format"] == FORMAT:
        said = header.pop(_DIGEST, None)
        if said != strict_json.digest(header):
            raise _damaged(path, "its header does not match its checksum")
    _check_header(header, path)
    return header, size


def _check_header(header: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Raises `UserError` unless everything in `header` is of the kind that a run goes on with."""
    wanted: dict[str, type | tuple[type, ...] | Rule] = {
        "format": int,
        "identity": dict,
        "settings": dict,
        "epoch": Whole(0, 10**9),
        "batch": Whole(0, 10**9),
        "seconds": Real(0, 1e12),
        "history": list,
        "best": (dict, type(None)),
        "test_accuracy": (list, type(None)),
        "updates": Whole(0, 2**62),
        "checksum": Whole(0, 2**32 - 1),
    }
    if set(header) != set(wanted):
        raise _damaged(path, f"its header holds {', '.join(sorted(header))[:200]}")
    for name, rule in wanted.items():
        value = header[name]
        if not isinstance(rule, (type, tuple)):
            checked(f"{path}: {name}", value, rule)
        elif not isinstance(value, rule):
            raise _damaged(path, f"its {name} is {shown(value)}")
    best = header["best"]
    # States of earlier versions have no score.
    if best is not None and not _holds_numbers({"score": 0, **best}, ("epoch", "accuracy", "score", "loss")):
        raise _damaged(path, f"its best result is {shown(header['best'])}")
    if not all(_is_number(a) for a in header["test_accuracy"] or ()):
        raise _damaged(path, f"its test accuracy is {shown(header['test_accuracy'])}")
    for line in header["history"]:
        if not isinstance(line, dict) or not _is_history(line):
            raise _damaged(path, f"a line of its history is {shown(line)}")
    if len({len(line["validation_accuracy"]) for line in header["history"]}) > 1:
        raise _damaged(path, "its history has lines of several depths")


def _is_history(line: dict[str, Any]) -> bool:
    """True if a line of metrics.jsonl holds what is read of it: numbers, and such of every depth."""
    if not _holds_numbers(line, ("epoch", "train_loss", "train_accuracy", "lr", "seconds")):
        return False
    by_depth = [line.get(key) for key in ("validation_accuracy", "validation_loss")]
    return all(isinstance(values, list) and values and all(map(_is_number, values)) for values in by_depth)


def _holds_numbers(values: dict[str, Any], names: Sequence[str]) -> bool:
    return all(_is_number(values.get(name)) for name in names)


def _is_number(value: Any) -> bool:
    # What lies beyond cannot be drawn; no figure of a run in float32 does.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e100


def read(path: str | os.PathLike[str], identity: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The state's header and tensors.  Raises `UserError` if it is damaged or of a run with another identity."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    header, size = _read_header(path)
    check_identity(identity, _completed(header["identity"], str(path)), Path(path).parent)
    # Weights, their average and AdamW's two, of at most 8 bytes; batch norms' statistics and step counts are fewer.
    model = config_from_dict(identity["model"], str(path))
    if size > 64 * model.parameters + 1_000_000:
        raise _damaged(path, f"it holds {size:,} bytes for a model of {model.parameters:,} parameters")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from None
    if _checksum(tensors, header["format"]) != header["checksum"]:
        raise _damaged(path, "its checksum does not match")
    return header, tensors


def restore(
    path: str | os.PathLike[str], header: dict[str, Any], tensors: dict[str, Tensor], learner: Learner
) -> RunProgress:
    """Puts the state that `read` gave into `learner`.  Raises `UserError` if it does not fit."""
    import torch

    from vitrm.checkpoint import load_weights
    from vitrm.training.optimizers import Muon

    load_weights(learner.model, _under(tensors, "model."), str(path))
    load_weights(learner.ema.model, _under(tensors, "ema."), str(path))
    names = {parameter: name for name, parameter in learner.model.named_parameters()}
    for optimizer in learner.optimizers:
        optimizer.state.clear()
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            own = _under(tensors, f"optimizer.{names[parameter]}.")
            if own:
                kept = ("momentum_buffer",) if isinstance(optimizer, Muon) else ("exp_avg", "exp_avg_sq")
                _check_moments(own, kept, parameter, names[parameter], path)
                optimizer.state[parameter] = {k: v.to(learner.device) for k, v in own.items()}
    learner.updates = header["updates"]
    sums = tensors.get("sums")
    if sums is not None and (sums.dtype, sums.shape) != (torch.float64, (4,)):
        raise _damaged(path, f"its sums are {sums.dtype} {tuple(sums.shape)}")
    return RunProgress(
        epoch=header["epoch"],
        batch=header["batch"],
        seconds=header["seconds"],
        sums=None if sums is None else sums.to(learner.device),
        history=header["history"],
        best=header["best"],
        test_accuracy=header["test_accuracy"],
    )


def _check_moments(
    own: dict[str, Tensor], kept: tuple[str, ...], parameter: Tensor, name: str, path: str | os.PathLike[str]
) -> None:
    """Raises `UserError` unless `own` is what an optimizer keeps of `parameter`, moments called `kept`, and finite."""
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(kept, tuple(parameter.shape))
    if "exp_avg" in kept:  # AdamW counts its steps
        shapes["step"] = ()
    if {key: tuple(v.shape) for key, v in own.items()} != shapes or not all(
        v.is_floating_point() for v in own.values()
    ):
        raise _damaged(path, f"the optimizer's state of {name} does not fit the model")
    tensor_file.check_finite(own, f"{path}: optimizer, {name}")


def check_identity(asked: dict[str, Any], saved: dict[str, Any], folder: Path) -> None:
    """Raises `UserError` that names every difference between the run asked for and the one saved in `folder`.

    The batch size may differ: `rebatched` says how a run goes on with another.
    """
    a, b = _flat(asked), _flat(saved)
    a[_BATCH_SIZE] = b.get(_BATCH_SIZE)
    differences = [
        f"{key} is {shown(a.get(key, 'absent'))}, the run has {shown(b.get(key, 'absent'))}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key)
    ]
    if not differences:
        return
    hint = ""
    if any(d.startswith("recipe.epochs ") for d in differences):
        hint = " (the number of epochs shapes the learning rate's schedule, so a run cannot be lengthened half-way)"
    listed = "; ".join(differences[:4]) + ("; …" if len(differences) > 4 else "")
    raise UserError(
        f"{folder} cannot be resumed, it is another run: {listed}{hint}: leave these settings out, or start anew with another --out"
    )


def preprocessing_in(header: dict[str, Any], where: str) -> Preprocessing:
    """The preprocessing of the run with this header.  Raises `UserError` for a damaged one."""
    of_run = _completed(header["identity"], where)
    return Preprocessing.recorded(of_run["data"]["preprocessing"], of_run["model"]["image_size"], where)


def rebatched(progress: RunProgress, before: int, after: int, images: int) -> None:
    """Brings `progress`, within an epoch of `images` images in batches of `before`, to batches of `after`.

    The order of an epoch's images does not depend on the batch size: it goes on behind the images that were learned, or, where a
    new batch holds both learned and new ones, with the next batch.  The means of the epoch so far stay.
    """
    seen = progress.batch * before
    batch = min(-(-seen // after), images // after)
    if progress.sums is not None and progress.batch:
        share = batch / progress.batch
        progress.sums *= share  # means of a batch
        progress.sums[1] *= after / before  # right answers, of so many images
    progress.batch = batch


def _completed(identity: dict[str, Any], where: str) -> dict[str, Any]:
    """A saved identity with the settings that came after it was saved, at their defaults."""
    if not all(isinstance(identity.get(key), dict) for key in ("model", "recipe", "data")):
        raise _damaged(where, f"its identity is {shown(identity)}")
    config = config_from_dict(identity["model"], where)
    preprocessing = Preprocessing.recorded(identity["data"].get("preprocessing"), config.image_size, where)
    return {
        **identity,
        "model": to_dict(config),
        "recipe": asdict(recipe_from_dict(identity["recipe"], where)),
        "data": {**identity["data"], "preprocessing": preprocessing.to_dict()},
    }


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def _checksum(tensors: dict[str, Tensor], form: int) -> int:
    """CRC-32 over names, bytes and, from format 2 on, types and shapes."""
    import torch

    value = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        label = name if form == _UNSEALED else f"{name}{tensor.dtype}{tuple(tensor.shape)}"
        value = zlib.crc32(label.encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return value


def note(header: dict[str, Any]) -> str:
    """A note for whoever resumes a state with this header: what of it could not be checked."""
    return "its header has no checksum (it is of version 0.1.0)" if header["format"] == _UNSEALED else ""


def _damaged(path: str | os.PathLike[str], why: object) -> UserError:
    return UserError(
        f"{path} cannot be read as a training state ({why}): it may be truncated; restore it from a copy, or start anew with another --out"
    )
