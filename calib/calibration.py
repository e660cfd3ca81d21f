"""A calibration: the ranges of a checkpoint's activations, and what they are valid for.

Its id is the SHA-256 of everything that the ranges follow from: weights, preprocessing, images, depth and calibration method.
One that was made for anything else is refused, with both ids.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vitrm.baselines.networks import Baseline, Transformer
from vitrm.calib.histogram import collect
from vitrm.calib.methods import METHODS, Range, activation_range
from vitrm.calib.sites import NET, ROLES, Site, observe
from vitrm.checkpoint import Checkpoint
from vitrm.config import with_article
from vitrm.data import Images, affordable, load_of_run, photo_crops
from vitrm.errors import UserError
from vitrm.fields import shown
from vitrm.system.files import read_json, write_json

CALIBRATION_FORMAT = 2
CALIBRATION_IMAGES = 512
_METHOD_KEY = "estimator"  # the calibration method's name in files, as version 0.1.0 wrote it
_MEBIBYTES = 1024  # of images at once
_WIDEST = 1e30  # of a range, on either side; the inverse of the narrowest
_ORDER_SEED = 11  # of the draw of calibration images, the same in every run


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Activation ranges, and what they were made from."""

    weights_sha256: str
    preprocessing: dict[str, Any]  # image_size, mean, std; glimpses, where steps look anew
    steps: int
    data: dict[str, Any]  # name, count, and the SHA-256 of the images
    method: str  # of vitrm.calib.methods.METHODS
    ranges: dict[Site, Range]
    note: str = ""  # why the images are not the model's own training images, where they are not

    @property
    def id(self) -> str:
        """SHA-256 of what the ranges follow from."""
        return identity(self.weights_sha256, self.preprocessing, self.steps, self.data, self.method)

    def shared(self, role: str, layer: str) -> Range:
        """One range for all steps: from the lowest to the highest of theirs."""
        met = [r for site, r in self.ranges.items() if (site.role, site.layer) == (role, layer)]
        return Range(min(r.low for r in met), max(r.high for r in met))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON to `path`, atomically; the same calibration gives the same bytes."""
        write_json(
            path,
            {
                "format": CALIBRATION_FORMAT,
                "id": self.id,
                "weights_sha256": self.weights_sha256,
                "preprocessing": self.preprocessing,
                "steps": self.steps,
                "data": self.data,
                _METHOD_KEY: self.method,
                "note": self.note,
                "ranges": _plain(self.ranges),
                "ranges_sha256": digest(_plain(self.ranges)),
            },
        )


def calibrate(
    checkpoint: Checkpoint,
    steps: int,
    *,
    method: str = "mse",
    images: Images | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    progress: Callable[[float], None] | None = None,
) -> Calibration:
    """Finds the activation ranges of a checkpoint on images.

    Args:
        checkpoint: a ViTRM, ViT or CCT.
        steps: recursion steps to run, and to calibrate; 1 for a ViT or CCT.
        method: one of `METHODS`, by which a range follows from the values met.
        images: images to run on.  Default: `CALIBRATION_IMAGES` of the training part of the checkpoint's data set; natural
            photo crops where that is not at hand, and `note` of the result says so.
        data_dir: the folder of the data set.
        progress: called with the done fraction, in [0, 1].

    Returns:
        The ranges by site, and the identity of everything they follow from.

    Raises:
        UserError: for activations that are not finite, images that are all alike, another kind of model, or a damaged data
            set.
    """
    note = ""
    if images is None:
        images, note = calibration_images(checkpoint, data_dir)
    pixels = images.pixels
    # One order, whatever order they came in.
    images = images.take(sorted(range(len(images)), key=lambda i: pixels[i].tobytes()))
    if len(images) and (images.pixels == images.pixels[:1]).all():
        raise UserError(
            f"the {len(images)} calibration image{'s are all the same' if len(images) > 1 else ' is alone'}: ranges need "
            "images as various as those that will be met"
        )
    model = checkpoint.build()
    if isinstance(model, Baseline) and not isinstance(model.net, Transformer):
        kind = with_article(checkpoint.model.kind)
        raise UserError(f"{checkpoint.source} is {kind}: a calibration is for ViTRMs, ViTs and CCTs")
    histograms = collect(model, images.floats(), steps, progress=progress)
    return Calibration(
        weights_sha256=checkpoint.weights_id,
        preprocessing=_preprocessing(checkpoint),
        steps=steps,
        data={"name": images.name, "count": len(images), "sha256": images.id},
        method=method,
        ranges={site: activation_range(h, method) for site, h in histograms.items()},
        note=note,
    )


def calibration_images(checkpoint: Checkpoint, data_dir: str | os.PathLike[str] | None = None) -> tuple[Images, str]:
    """`CALIBRATION_IMAGES` images (fewer where they are large) of the training part of the checkpoint's data set; photo crops, and the reason, where it is not at hand.

    Raises `UserError` if `data_dir` is named and does not hold it.
    """
    size, name = checkpoint.model.image_size, str(checkpoint.data.get("name", ""))
    try:
        part = load_of_run(name, "train", data_dir=data_dir, preprocessing=checkpoint.preprocessing)
    except UserError as error:
        if data_dir is not None:
            raise
        pixels = photo_crops(affordable(CALIBRATION_IMAGES, size, _MEBIBYTES), size)
        labels: NDArray[np.int64] = np.zeros(len(pixels), np.int64)
        return Images(pixels, labels, ("photo",), "photo crops", "train"), str(error).split(":")[0]
    chosen = np.random.default_rng(_ORDER_SEED).permutation(len(part))[
        : affordable(CALIBRATION_IMAGES, size, _MEBIBYTES)
    ]
    return part.take(np.sort(chosen)), ""


def load_calibration(path: str | os.PathLike[str], checkpoint: Checkpoint, steps: int) -> Calibration:
    """Reads a calibration.  Raises `UserError` if it is damaged or was made for another model, depth or preprocessing."""
    values = read_json(path, "calibration")
    try:
        if values["format"] != CALIBRATION_FORMAT:
            raise UserError(
                f"{path}: calibration format {shown(values['format'])}, this vitrm reads {CALIBRATION_FORMAT}: calibrate again"
            )
        calibration = _parsed(values)
        if digest(values["ranges"]) != values["ranges_sha256"]:
            raise UserError(f"{path}: its ranges were changed after it was written: calibrate again")
    except (KeyError, ValueError) as error:
        why = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{path} is not a calibration file ({why}): calibrate again") from None
    if calibration.id != values.get("id"):
        raise UserError(
            f"{path} was changed after it was written (id {shown(values.get('id'))}, content {calibration.id[:12]}…): calibrate again"
        )
    check_calibration(calibration, checkpoint, steps, f"calibration {path}")
    return calibration


def _parsed(values: dict[str, Any]) -> Calibration:
    """The calibration in a file's JSON.  Raises KeyError and ValueError for what is missing, or of another kind."""

    def of_kind(where: dict[str, Any], key: str, kind: type) -> Any:
        if type(where[key]) is not kind:
            raise ValueError(f"{key} is {shown(where[key])}")
        return where[key]

    data = of_kind(values, "data", dict)
    of_kind(data, "name", str)
    of_kind(data, "count", int)
    method = of_kind(values, _METHOD_KEY, str)
    if method not in METHODS:
        raise ValueError(f"{_METHOD_KEY} is {shown(method)}")
    return Calibration(
        weights_sha256=of_kind(values, "weights_sha256", str),
        preprocessing=of_kind(values, "preprocessing", dict),
        steps=of_kind(values, "steps", int),
        data=data,
        method=method,
        ranges={_site(key): _range(key, value) for key, value in of_kind(values, "ranges", dict).items()},
        note=of_kind(values, "note", str),
    )


def _site(key: str) -> Site:
    step, role, layer = key.split("/")
    site = Site(int(step), role, layer)
    if str(site) != key or role not in (*ROLES, NET):
        raise ValueError(f"no site is called {shown(key)}")
    return site


def _range(key: str, value: Any) -> Range:
    """A range that includes 0 and gives a scale that float32 can hold."""
    numbers = isinstance(value, list) and len(value) == 2 and all(type(v) in (int, float) for v in value)
    if not numbers or not -_WIDEST <= value[0] <= 0 <= value[1] <= _WIDEST or value[1] - value[0] < 1 / _WIDEST:
        raise ValueError(f"the range of {shown(key)} is {shown(value)}")
    return Range(float(value[0]), float(value[1]))


def check_calibration(calibration: Calibration, checkpoint: Checkpoint, steps: int, name: str) -> None:
    """Raises `UserError`, with both ids, unless the calibration `name` is of this checkpoint at `steps` steps; and for one without the range of a site."""
    c, preprocessing = calibration, _preprocessing(checkpoint)
    wanted = identity(checkpoint.weights_id, preprocessing, steps, c.data, c.method)
    if wanted == c.id:
        _check_sites(calibration, checkpoint, name)
        return
    differences = []
    if c.weights_sha256 != checkpoint.weights_id:
        differences.append(
            f"weights {shown(c.weights_sha256[:12], quoted=False)}, the model has {checkpoint.weights_id[:12]}"
        )
    if c.steps != steps:
        differences.append(f"{c.steps} steps, asked for are {steps}")
    theirs, own = (p.get("glimpses", "none") for p in (c.preprocessing, preprocessing))
    if theirs != own:
        differences.append(f"glimpses {shown(theirs, quoted=False)}, the model has {own}")
    if {**c.preprocessing, "glimpses": ""} != {**preprocessing, "glimpses": ""}:
        differences.append("another preprocessing")
    raise UserError(
        f"{name} (id {c.id[:12]}) was made for {'; '.join(differences)} (id {wanted[:12]}): calibrate again"
    )


def _check_sites(calibration: Calibration, checkpoint: Checkpoint, name: str) -> None:
    """Raises `UserError` unless every site that the model meets has a range; those of convolutions may lack all, as older calibrations do."""
    met: set[Site] = set()
    size = checkpoint.model.image_size
    observe(checkpoint.build(), torch.zeros(1, 3, size, size), calibration.steps, lambda site, _: met.add(site))
    lacking = sorted(met - calibration.ranges.keys())
    if not any(site.of_tokenizer for site in calibration.ranges):
        lacking = [site for site in lacking if not site.of_tokenizer]
    if lacking:
        raise UserError(f"{name} has no range for {lacking[0]}: calibrate again")


def _preprocessing(checkpoint: Checkpoint) -> dict[str, Any]:
    m = checkpoint.model
    glimpses = getattr(m, "glimpses", "none")
    views = {} if glimpses == "none" else {"glimpses": glimpses}  # calibrations of before there were any stay valid
    return {"image_size": m.image_size, "mean": list(m.mean), "std": list(m.std), **views}


def identity(weights: str, preprocessing: dict[str, Any], steps: int, data: dict[str, Any], method: str) -> str:
    """The id of a calibration, from everything that its ranges follow from."""
    return digest([weights, preprocessing, steps, data, method])


def _plain(ranges: dict[Site, Range]) -> dict[str, list[float]]:
    return {str(site): [r.low, r.high] for site, r in sorted(ranges.items())}


def digest(value: Any) -> str:
    """The SHA-256 of a value's JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
