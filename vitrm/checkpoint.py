"""Checkpoints: a run folder's `config.json` and `model.safetensors`, and the bundled ones.

`config.json` says what the model is, what it was trained on and how well it did; the weights are
safetensors, so loading a checkpoint executes nothing.  Float16 storage is read back as float32.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitrm.config import ModelConfig, ViTRMConfig, from_dict, to_dict
from vitrm.errors import UserError
from vitrm.files import atomic_path, read_json, write_json
from vitrm.recipe import from_dict as recipe_from_dict

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vitrm.baselines import Baseline
    from vitrm.model import ViTRM

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
FORMAT = 1
DEFAULT_BUNDLED = "nano-cifar10"
RUNS = Path("runs")  # where vitrm-train puts runs, and the other commands look for the last one


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Weights with everything needed to rebuild, evaluate and describe the model."""

    model: ModelConfig
    data: dict[str, Any]  # name, classes (names), and what else identifies the data set
    training: dict[str, Any] = field(default_factory=dict)  # recipe, seed, epochs, accuracies
    weights: dict[str, Tensor]
    source: str = ""  # where it came from, for messages

    @property
    def weights_id(self) -> str:
        """SHA-256 over names, shapes and float32 values of the weights: the same for the same function."""
        import torch

        digest = hashlib.sha256()
        for name in sorted(self.weights):
            tensor = self.weights[name]
            if tensor.is_floating_point():
                tensor = tensor.to(torch.float32)
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()

    @property
    def trained_depth(self) -> int | None:
        """The deepest step that training had reached in the epoch that was kept; None where the checkpoint does not say.

        1 for a model without recursion.  A run that was stopped early may not have reached its recipe's last step.
        """
        if self.model.kind != "vitrm":
            return 1
        try:
            recipe = recipe_from_dict(self.training["recipe"], self.source)
        except (KeyError, TypeError, UserError):  # made by hand, or by another version
            return None
        epoch = self.training.get("best_epoch")
        done = epoch / recipe.epochs if isinstance(epoch, int) and 0 < epoch <= recipe.epochs else 1.0
        return recipe.n_sup + recipe.free_steps_at(done)

    def build(self) -> ViTRM | Baseline:
        """The model with these weights, in eval mode.  Raises `UserError` if they do not fit the config."""
        model = build_model(self.model)
        load_weights(model, self.weights, self.source or "checkpoint")
        return model.eval()


def build_model(config: ModelConfig) -> ViTRM | Baseline:
    """A freshly initialised model of `config`."""
    from vitrm.baselines import Baseline
    from vitrm.model import ViTRM

    return ViTRM(config) if isinstance(config, ViTRMConfig) else Baseline(config)


def load_weights(model: nn.Module, weights: dict[str, Tensor], where: str) -> None:
    """Copies `weights` into `model`; raises `UserError` for missing, unexpected or misshapen ones and for NaN."""
    own = model.state_dict()
    missing = sorted(set(own) - set(weights))
    unexpected = sorted(set(weights) - set(own))
    misshapen = sorted(k for k in set(own) & set(weights) if own[k].shape != weights[k].shape)
    if missing or unexpected or misshapen:
        parts = []
        for label, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen)):
            if names:
                parts.append(f"{len(names)} {label} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})")
        raise UserError(f"{where}: the weights do not fit the config: {'; '.join(parts)}")
    broken = sorted(k for k, v in weights.items() if v.is_floating_point() and not v.isfinite().all())
    if broken:
        raise UserError(
            f"{where}: weights hold NaN or infinity ({', '.join(broken[:3])}): train again or take an earlier run"
        )
    model.load_state_dict(weights)


def save(folder: str | os.PathLike[str], checkpoint: Checkpoint, *, half: bool = False) -> None:
    """Writes `config.json` and `model.safetensors` into `folder`, each atomically; `half` stores float16."""
    import torch
    from safetensors.torch import save_file

    folder = Path(folder)
    tensors = {
        k: v.detach().cpu().to(torch.float16 if half and v.is_floating_point() else v.dtype).contiguous()
        for k, v in checkpoint.weights.items()
    }
    with atomic_path(folder / WEIGHTS_FILE) as temporary:
        try:
            save_file(tensors, temporary)
        except OSError:
            raise
        except Exception as error:  # safetensors wraps the system's error in its own
            raise OSError(28 if "No space left" in str(error) else 5, str(error), str(folder / WEIGHTS_FILE)) from error
    write_json(
        folder / CONFIG_FILE,
        {
            "format": FORMAT,
            "model": to_dict(checkpoint.model),
            "data": checkpoint.data,
            "training": checkpoint.training,
        },
    )


def load(run: str | os.PathLike[str] | None = None) -> Checkpoint:
    """Loads a run folder or a bundled checkpoint by name; None: the run trained last, else the bundled default.

    Raises `UserError` when it is missing, truncated or not a checkpoint.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = find(run)
    config_path, weights_path = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    config = read_json(config_path, "checkpoint")
    if config.get("format") != FORMAT or "model" not in config:
        raise UserError(f"{config_path}: format is {config.get('format')!r}, expected {FORMAT}: not a vitrm checkpoint")
    if not isinstance(config["model"], dict) or not isinstance(config.get("data"), dict):
        raise UserError(f"{config_path}: 'model' and 'data' must be JSON objects: not a vitrm checkpoint")
    model = from_dict(config["model"], str(config_path))
    try:
        weights = load_file(weights_path)
    except FileNotFoundError:
        raise UserError(f"checkpoint: {weights_path} does not exist: the run has not saved a model yet") from None
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{weights_path} cannot be read as safetensors ({error}): it may be truncated; copy it again"
        ) from None
    weights = {k: v.to(torch.float32) if v.is_floating_point() else v for k, v in weights.items()}
    return Checkpoint(
        model=model,
        data=config["data"],
        training=config.get("training", {}),
        weights=weights,
        source=folder.name if folder.parent == _bundled_root() else str(folder),
    )


def bundled() -> list[str]:
    """Names of the checkpoints that came with the package."""
    return sorted(p.parent.name for p in _bundled_root().glob(f"*/{CONFIG_FILE}"))


def _bundled_root() -> Path:
    return Path(str(resources.files("vitrm"))) / "checkpoints"


def find(run: str | os.PathLike[str] | None = None) -> Path:
    """The folder of a run: a path, a bundled name, or (None) the run trained last, else the bundled default."""
    if run is None:
        latest = sorted(RUNS.glob(f"*/{WEIGHTS_FILE}"), key=lambda p: p.stat().st_mtime)
        return latest[-1].parent if latest else _bundled_root() / DEFAULT_BUNDLED
    folder = Path(run)
    if folder.is_dir():
        return folder
    if str(run) in bundled():
        return _bundled_root() / str(run)
    if folder.is_file():
        raise UserError(f"{folder} is a file, expected a run folder (with {CONFIG_FILE} and {WEIGHTS_FILE})")
    raise UserError(
        f"no run folder {folder}, and no bundled checkpoint of that name ({', '.join(bundled()) or 'none bundled'})"
    )
