"""Checkpoints: a run folder's `config.json` and `model.safetensors`, and the bundled ones.

`config.json` says what the model is, what it was trained on and how well it did; the weights are
safetensors, so loading a checkpoint executes nothing.  Float16 storage is read back as float32.

`config.json` ends with two SHA-256, checked on loading: of its own content (in canonical JSON, so not of its layout) and
of the file `model.safetensors`.  The two files change together: `save` writes the new config beside the old one under
another name (`config.next.json`), gives the new weights their name, then the new config its own.  Whoever reads in
between, or after a kill there, finds weights that the config does not know and that the next one does, and takes that.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitrm.config import ModelConfig, ViTRMConfig, from_dict, to_dict
from vitrm.errors import UserError, explain_os_error
from vitrm.fields import did_you_mean, shown
from vitrm.preprocessing import Preprocessing
from vitrm.recipe import from_dict as recipe_from_dict
from vitrm.system import strict_json, tensor_file
from vitrm.system.files import atomic_path, check_regular, read_json, sha256_of, write_json

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vitrm.baselines.networks import Baseline
    from vitrm.model import ViTRM

CONFIG_FILE = "config.json"
NEXT_CONFIG_FILE = "config.next.json"  # between the two renames of `save`
WEIGHTS_FILE = "model.safetensors"
FORMAT = 1
_CONTENT = ("format", "model", "data", "training")  # what config.json says, beside its SHA-256
DEFAULT_BUNDLED = "nano-v3-cifar10"
_UNVERIFIED = "it was saved without checksums, by version 0.1.0: damage to it would not be seen"
_TRIES = 5  # to read weights and config of one save, while another process saves
RUNS = Path("runs")  # where vitrm-train puts runs, and the other commands look for the last one


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Weights with everything needed to rebuild, evaluate and describe the model."""

    model: ModelConfig
    data: dict[str, Any]  # name, classes (names), and what else identifies the data set
    training: dict[str, Any] = field(default_factory=dict)  # recipe, seed, epochs, accuracies
    weights: dict[str, Tensor]
    source: str = ""  # where it came from, for messages
    note: str = ""  # what could not be checked on loading, for whoever shows it

    @property
    def weights_id(self) -> str:
        """SHA-256 over names, shapes and float32 values of the weights: the same for the same function."""
        return weights_sha256(self.weights)

    @property
    def preprocessing(self) -> Preprocessing:
        """The way that picture files become the model's input.  Raises `UserError` for a description that is none."""
        return Preprocessing.recorded(
            self.data.get("preprocessing"), self.model.image_size, self.source or "checkpoint"
        )

    @property
    def trained_depth(self) -> int | None:
        """The deepest step that training had reached in the epoch that was kept; None where the checkpoint does not say.

        1 for a model without recursion.  A run that was stopped early may not have reached its recipe's last step.
        """
        if self.model.kind != "vitrm":
            return 1
        try:
            recipe = recipe_from_dict(self.training["recipe"], self.source)
        except (KeyError, TypeError, ValueError, UserError):  # made by hand, or by another version
            return None
        epoch = self.training.get("best_epoch")
        done = epoch / recipe.epochs if isinstance(epoch, int) and 0 < epoch <= recipe.epochs else 1.0
        return recipe.n_sup + recipe.free_steps_at(done)

    def with_glimpses(self, glimpses: str) -> Checkpoint:
        """The same weights in a model whose steps look at the image in this way (`ViTRMConfig.glimpses`).

        They need no training for it: what a step reads of a moved or mirrored image is what it learned to read.  Raises
        `UserError` for a model without steps, and for mirror images where training is known to have shown none.
        """
        if not isinstance(self.model, ViTRMConfig):
            raise UserError(
                f"{self.source} is a {self.model.kind}, which has no steps to look anew: leave out --glimpses"
            )
        recipe = self.training.get("recipe")
        if glimpses == "mirror" and isinstance(recipe, dict):
            known = recipe_from_dict(recipe, self.source)
            if not known.flips(self.data.get("name", "")):
                raise UserError(
                    f"{self.source} was trained without mirror images, as a mirrored picture may be of another class: choose "
                    "--glimpses shift"
                )
        return replace(self, model=replace(self.model, glimpses=glimpses))

    def build(self) -> ViTRM | Baseline:
        """The model with these weights, in eval mode.  Raises `UserError` if they do not fit the config."""
        where = self.source or "checkpoint"
        if sum(v.numel() for v in self.weights.values()) < self.model.parameters:
            import torch

            # Said before gigabytes are allocated for weights that are not there.
            with torch.device("meta"):
                check_fit(build_model(self.model), self.weights, where)
        model = build_model(self.model)
        load_weights(model, self.weights, where)
        return model.eval()


def weights_sha256(weights: dict[str, Tensor]) -> str:
    """SHA-256 over names, shapes and float32 values of weights."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name]
        if tensor.is_floating_point():
            tensor = tensor.to(torch.float32)
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def build_model(config: ModelConfig) -> ViTRM | Baseline:
    """A freshly initialized model of `config`."""
    from vitrm.baselines.networks import Baseline
    from vitrm.model import ViTRM

    return ViTRM(config) if isinstance(config, ViTRMConfig) else Baseline(config)


def load_weights(model: nn.Module, weights: dict[str, Tensor], where: str) -> None:
    """Copies `weights` into `model`; raises `UserError` for missing, unexpected or misshapen ones and for NaN."""
    check_fit(model, weights, where)
    tensor_file.check_finite(weights, where)
    model.load_state_dict(weights)


def check_fit(model: nn.Module, weights: dict[str, Tensor], where: str, what: str = "the config") -> None:
    """Raises `UserError` for weights of `model` that are missing, unexpected or misshapen; `what` they do not fit then."""
    own = model.state_dict()
    missing = sorted(set(own) - set(weights))
    unexpected = sorted(set(weights) - set(own))
    misshapen = sorted(k for k in set(own) & set(weights) if own[k].shape != weights[k].shape)
    parts = []
    for label, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen)):
        if names:
            named = ", ".join(shown(name, quoted=False) for name in names[:3])
            parts.append(f"{len(names)} {label} ({named}{', …' if len(names) > 3 else ''})")
    if parts:
        raise UserError(f"{where}: the weights do not fit {what}: {'; '.join(parts)}")


def save(folder: str | os.PathLike[str], checkpoint: Checkpoint, *, half: bool = False) -> None:
    """Writes `config.json` and `model.safetensors` into `folder`, together; `half` stores float16."""
    import torch

    folder = Path(folder)
    tensors = {
        k: v.detach().cpu().to(torch.float16 if half and v.is_floating_point() else v.dtype).contiguous()
        for k, v in checkpoint.weights.items()
    }
    digest = ""
    try:
        with atomic_path(folder / WEIGHTS_FILE) as temporary:
            tensor_file.write(temporary, tensors)
            digest = sha256_of(temporary)
            write_json(folder / NEXT_CONFIG_FILE, _config_of(checkpoint, digest))
        os.replace(folder / NEXT_CONFIG_FILE, folder / CONFIG_FILE)
    except BaseException as error:
        # Once the new weights have their name, their config belongs to them.
        if not (digest and (folder / WEIGHTS_FILE).exists() and sha256_of(folder / WEIGHTS_FILE) == digest):
            (folder / NEXT_CONFIG_FILE).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise explain_os_error(error, f"writing {folder / CONFIG_FILE}") from error
        raise


def _config_of(checkpoint: Checkpoint, weights_digest: str) -> dict[str, Any]:
    """The content of `config.json`."""
    values = (FORMAT, to_dict(checkpoint.model), checkpoint.data, checkpoint.training)
    # As it will be read: JSON has neither tuples nor keys that are numbers.
    content = json.loads(json.dumps(dict(zip(_CONTENT, values, strict=True)), allow_nan=False))
    return {**content, "sha256": {"config": strict_json.digest(content), "weights": weights_digest}}


def load(run: str | os.PathLike[str] | None = None, *, verify: bool = True) -> Checkpoint:
    """Loads a run folder or a bundled checkpoint by name; None: the run trained last, else the bundled default.

    Raises `UserError` when it is missing, truncated, damaged or not a checkpoint, and for weights that are not finite.
    With `verify` False the SHA-256 in `config.json` are not looked at.  A checkpoint without any, of version 0.1.0, is
    loaded with a note.
    """
    folder = find(run)
    for _ in range(_TRIES):
        config = _read_config(folder, verify)
        model = from_dict(config["model"], str(folder / CONFIG_FILE))
        weights, digest = _read_weights(folder / WEIGHTS_FILE, model, verify)
        known = _knowing(folder, config, digest) if verify else [config]
        if known:
            config = known[0]
            break
    else:
        raise UserError(
            f"{folder / WEIGHTS_FILE} is not the file that {CONFIG_FILE} was written with (SHA-256 {digest[:12]}…, expected "
            f"{config['sha256']['weights'][:12]}…): it was damaged, or is another run's; copy both files again"
        )
    import torch  # not before: a mistyped name should not wait for it

    tensor_file.check_finite(weights, str(folder / WEIGHTS_FILE))
    weights = {k: v.to(torch.float32) if v.is_floating_point() else v for k, v in weights.items()}
    return Checkpoint(
        model=model,
        data=config["data"],
        training=config["training"],
        weights=weights,
        source=folder.name if folder.parent == _bundled_root() else str(folder),
        note="" if "sha256" in config else _UNVERIFIED,
    )


def _knowing(folder: Path, config: dict[str, Any], digest: str) -> list[dict[str, Any]]:
    """The configs in `folder` that belong to the weights with this SHA-256; else `config` itself if it names none.

    The next config comes second, the present one again last: its writer may just have given it its name.
    """
    later = []
    for name in (NEXT_CONFIG_FILE, CONFIG_FILE):
        if (folder / name).exists():
            with suppress(UserError):  # half-way through its own writing, or its renaming
                later.append(_read_one_config(folder / name, verify=True))
    matching = [c for c in (config, *later) if c.get("sha256", {}).get("weights") == digest]
    return matching or ([] if "sha256" in config else [config])


def _read_config(folder: Path, verify: bool) -> dict[str, Any]:
    """The content of `config.json`, or of what will be it where the first save was killed half-way."""
    path = folder / CONFIG_FILE
    if not path.exists() and (folder / NEXT_CONFIG_FILE).exists():
        path = folder / NEXT_CONFIG_FILE
    return _read_one_config(path, verify)


def _read_one_config(path: Path, verify: bool) -> dict[str, Any]:
    config = read_json(path, "checkpoint")
    if config.get("format") != FORMAT or "model" not in config:
        raise UserError(f"{path}: format is {shown(config.get('format'))}, expected {FORMAT}: not a vitrm checkpoint")
    config.setdefault("training", {})
    unknown = sorted(set(config) - {*_CONTENT, "sha256"})
    if unknown:
        raise UserError(f"{path}: unknown key {shown(unknown[0])}: not a vitrm checkpoint, or damaged")
    if not all(isinstance(config.get(key), dict) for key in ("model", "data", "training")):
        raise UserError(f"{path}: 'model', 'data' and 'training' must be JSON objects: not a vitrm checkpoint")
    if verify and "sha256" in config:
        _check_digests(config, path)
    model = from_dict(config["model"], str(path))
    _check_classes(model, config["data"], path)
    Preprocessing.recorded(config["data"].get("preprocessing"), model.image_size, str(path))
    return config


def _check_digests(config: dict[str, Any], path: Path) -> None:
    said = config["sha256"]
    if not isinstance(said, dict) or set(said) != {"config", "weights"} or not all(map(_is_sha256, said.values())):
        raise UserError(f"{path}: its sha256 is {shown(said)}, expected that of 'config' and of 'weights'")
    actual = strict_json.digest({key: config[key] for key in _CONTENT})
    if actual != said["config"]:
        raise UserError(
            f"{path} was changed after it was written (SHA-256 of its content {actual[:12]}…, expected {said['config'][:12]}…): "
            "copy it again; if the change is meant, take its 'sha256' out"
        )


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and all(c in "0123456789abcdef" for c in value)


def _check_classes(model: ModelConfig, data: dict[str, Any], path: Path) -> None:
    """Raises `UserError` unless the data set's name and classes, where they are given, are texts, one per logit."""
    names = data.get("classes", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: the classes are {shown(names)}, expected a list of names")
    if names and len(names) != model.classes:
        raise UserError(f"{path}: it names {len(names)} classes, the model knows {model.classes}")
    if not isinstance(data.get("name", ""), str):
        raise UserError(f"{path}: the data set's name is {shown(data['name'])}, expected a text")


def _read_weights(path: Path, model: ModelConfig, verify: bool) -> tuple[dict[str, Tensor], str]:
    """The tensors in a file, and its SHA-256 ("" unless asked for): of the same bytes, whoever replaces the file meanwhile."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        os.stat(path)
    except FileNotFoundError:
        raise UserError(f"checkpoint: {path} does not exist: the run has not saved a model yet") from None
    except OSError as error:
        raise explain_os_error(error, f"reading {path}") from error
    check_regular(path, "checkpoint")
    try:
        _, size = tensor_file.read_header(path)
        # Trainable weights of at most 8 bytes, and batch norms' statistics, which are fewer.
        if size > 16 * model.parameters + 1_000_000:
            raise UserError(
                f"{path} holds {size:,} bytes of weights, too many for the model of {model.parameters:,} parameters that "
                f"{CONFIG_FILE} describes: copy both files again"
            )
        raw = path.read_bytes()
        return load(raw), hashlib.sha256(raw).hexdigest() if verify else ""
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({error}): it may be truncated; copy it again") from None


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
    # os.path answers False where Path raises: for a name that is too long, or holds a NUL.
    if os.path.isdir(folder):
        return folder
    if str(run) in bundled():
        return _bundled_root() / str(run)
    if os.path.isfile(folder):
        raise UserError(f"{folder} is a file, expected a run folder (with {CONFIG_FILE} and {WEIGHTS_FILE})")
    raise UserError(
        f"no run folder {shown(str(folder), quoted=False)}, and no bundled checkpoint of that name "
        f"({', '.join(bundled()) or 'none bundled'}){did_you_mean(str(run), bundled())}"
    )
