"""`vitrm-train --config FILE`: a run's settings in TOML.

    seed = 1                       # optional, as everything else
    teacher = "runs/resnet18"      # a run folder or a bundled checkpoint's name, to learn from

    [data]
    name = "cifar10"               # or digits, cifar100, the path of a folder
    dir = "data"                   # where CIFAR's files are
    download = true
    limit_train = 5000             # images
    fit = "crop"                   # or letterbox, squash

    [model]
    preset = "nano"
    n = 2                          # any field of the model's config

    [recipe]
    name = "fast"
    epochs = 4                     # any field of vitrm.recipe.Recipe

The same fields may stand at the top level, without sections; there `data`, `model` and `recipe`
name the data set, the preset and the recipe.  Flags win over the file.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vitrm.config import KINDS
from vitrm.errors import UserError
from vitrm.fields import (
    Text,
    Whole,
    check,
    checked,
    choice,
    declared,
    did_you_mean,
    flag,
    shown,
    text,
    text_or_none,
    whole_or_none,
)
from vitrm.preprocessing import FITS, Preprocessing
from vitrm.recipe import Recipe
from vitrm.system import strict_json
from vitrm.system.files import read_text

MAX_BYTES = 1 << 16  # of a file: a run has some sixty settings
_MAX_DOTS = 100  # of a line
SEEDS = Whole(0, 2**63 - 1)


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The images of a run."""

    name: str = text(
        "digits",
        "digits, cifar10, cifar100 or a folder of class folders (default: digits)",
        flag="--data",
        unit="name|dir",
    )
    dir: str | None = text_or_none(
        "where CIFAR's files are (default: $VITRM_DATA, else data)", flag="--data-dir", unit="dir"
    )
    download: bool = flag(False, "fetch CIFAR into --data-dir if it is not there")
    limit_train: int | None = whole_or_none(
        2, 10**9, "train on so many images only, drawn from all classes (default: all)", unit="images"
    )
    fit: str = choice(*FITS, help=declared(Preprocessing)["fit"].help)
    cache: bool = flag(
        True,
        "keep the decoded pictures of a folder in $XDG_CACHE_HOME/vitrm/images (default: ~/.cache), for the next run",
    )
    skip_damaged: bool = flag(False, "leave out files of a folder that cannot be read, and name them")

    def __post_init__(self) -> None:
        check(self)


DEFAULT_MODEL = "nano"  # the preset of a run that names none
TORCHVISION = "torchvision:"  # begins the name of a teacher that is a network of torchvision
_FROM_DATA = {"classes", "mean", "std"}  # settings of a model that follow from its data, so not for the file to say
MODEL_KEYS = tuple(dict.fromkeys(name for kind in KINDS.values() for name in declared(kind) if name not in _FROM_DATA))
RECIPE_KEYS = tuple(declared(Recipe))
DATA_KEYS = tuple(declared(DataSettings))
_NAMES = {"model": "preset", "recipe": "name", "data": "name"}  # section → the key that names its subject


@dataclass
class RunConfig:
    """The settings of a run that a file or the command line names; what it leaves out is not in it."""

    data: dict[str, Any] = field(default_factory=dict)  # of DATA_KEYS
    model: dict[str, Any] = field(default_factory=dict)  # preset, and of MODEL_KEYS
    recipe: dict[str, Any] = field(default_factory=dict)  # name, and of RECIPE_KEYS
    seed: int | None = whole_or_none(
        SEEDS.low, SEEDS.high, "seed of weights, order, augmentation and dropout (default: 0)", unit="n"
    )
    teacher: str | None = text_or_none(
        "learn from this model's answers as well as from the labels: a run folder, a bundled name, or torchvision:NAME[:FILE]",
        unit="run",
    )

    def __post_init__(self) -> None:
        check(self)
        DataSettings(**self.data)  # the others are checked where a model and a recipe are made of them

    def over(self, base: RunConfig) -> RunConfig:
        """These settings on top of `base`.  Another preset, recipe or data set starts afresh: base's fields are not for it."""

        def merged(own: dict[str, Any], below: dict[str, Any], name: str) -> dict[str, Any]:
            return {**below, **own} if own.get(name) in (None, below.get(name)) or name not in below else own

        return RunConfig(
            data={**base.data, **self.data},
            model=merged(self.model, base.model, "preset"),
            recipe=merged(self.recipe, base.recipe, "name"),
            seed=base.seed if self.seed is None else self.seed,
            teacher=base.teacher if self.teacher is None else self.teacher,
        )


def read(path: str | os.PathLike[str]) -> RunConfig:
    """Reads a TOML file.  Raises `UserError` for a missing or damaged file, an unknown key or a value of a wrong type."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    text = read_text(path, "config file", MAX_BYTES)
    if any(line.count(".") > _MAX_DOTS for line in text.splitlines()):
        raise UserError(f"{path} is not valid TOML: a key of more than {_MAX_DOTS} parts")  # minutes for the parser
    try:
        values = tomllib.loads(text)
        strict_json.check(values)
    except RecursionError:
        raise UserError(f"{path} is not valid TOML: nested too deeply") from None
    except ValueError as error:  # the parser's own error is one, and so is Python's of too many digits
        raise UserError(f"{path} is not valid TOML: {error}") from None
    return parse(values, str(path))


def parse(values: Mapping[str, Any], where: str) -> RunConfig:
    """The settings in a parsed file; `where` names it in a `UserError`."""
    config = RunConfig()
    for key, value in values.items():
        if key in _NAMES:
            section = getattr(config, key)
            if isinstance(value, dict):
                for inner, inner_value in value.items():
                    _put(section, key, inner, inner_value, f"{where}, [{key}]")
            else:
                _put(section, key, _NAMES[key], value, where)
        elif key == "seed":
            config.seed = checked(f"{where}: seed", value, SEEDS)
        elif key == "teacher":
            config.teacher = checked(f"{where}: teacher", value, Text())
        elif key == "data_dir":
            _put(config.data, "data", "dir", value, where)
        elif key in MODEL_KEYS:
            _put(config.model, "model", key, value, where)
        elif key in RECIPE_KEYS:
            _put(config.recipe, "recipe", key, value, where)
        elif key in DATA_KEYS and key not in ("name", "dir"):
            _put(config.data, "data", key, value, where)
        else:
            known = (
                *_NAMES,
                "seed",
                "teacher",
                "data_dir",
                "download",
                "limit_train",
                "fit",
                "cache",
                "skip_damaged",
                *MODEL_KEYS,
                *RECIPE_KEYS,
            )
            raise _unknown(where, key, known)
    return config


def _put(into: dict[str, Any], section: str, key: str, value: Any, where: str) -> None:
    known = {"model": ("preset", *MODEL_KEYS), "recipe": ("name", *RECIPE_KEYS), "data": DATA_KEYS}[section]
    if key not in known:
        raise _unknown(where, key, known)
    if section == "data":
        value = checked(f"{where}: {key}", value, declared(DataSettings)[key].rule)
    elif key == _NAMES[section]:
        value = checked(f"{where}: {key}", value, Text())
    # The other values are checked where they belong: by the model's config and the recipe.
    into[key] = value


def _unknown(where: str, key: str, known: Iterable[str]) -> UserError:
    known = list(known)
    return UserError(
        f"{where}: unknown key {shown(key, quoted=False)}; known are {', '.join(known)}{did_you_mean(key, known)}"
    )
