"""Stage "calibrate": the scales of an int8 export's activations, from a calibration given, read or made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitrm.calib.calibration import Calibration, calibrate, check_calibration, load_calibration
from vitrm.calib.quant_params import QuantTable, quant_table
from vitrm.calib.state_error import StateError, draw_state_error, state_error
from vitrm.config import ViTRMConfig
from vitrm.export.images import ExportImages
from vitrm.export.settings import ExportSettings, OnStage
from vitrm.system.files import lock_path
from vitrm.system.locks import lock

_SIMULATED = 16  # images that the error of int8 is told from


@dataclass(frozen=True)
class Scales:
    """The scales of all sites, and where they come from."""

    calibration: Calibration
    table: QuantTable
    state_error: StateError | None  # None for a model without a state


def find_scales(settings: ExportSettings, images: ExportImages, on_stage: OnStage) -> Scales | None:
    """Calibrates, or reads a calibration, and computes the scales; None for an export without int8 linear layers.

    Raises:
        UserError: for a calibration of something else, or images that cannot be calibrated on.
    """
    if settings.precision != "int8" or settings.convolutional:
        return None
    calibration = _given(settings, images)
    if calibration is None:
        found = calibrate(
            images.checkpoint,
            settings.steps,
            method=settings.calibration_method,
            data_dir=images.data_dir,
            progress=lambda done: on_stage(f"calibrating, {done:.0%}"),
        )
        calibration = _kept(found, settings, images)
    table = quant_table(
        calibration, settings.target, shared=settings.shares_steps, convolutions=settings.int8_convolutions
    )
    if not isinstance(images.checkpoint.model, ViTRMConfig):
        return Scales(calibration, table, None)
    on_stage("simulating int8")
    return Scales(calibration, table, state_error(images.checkpoint, table, _few(images), calibration.steps))


def _given(settings: ExportSettings, images: ExportImages) -> Calibration | None:
    """The calibration given, or read from the file given; None where there is none yet."""
    given = settings.calibration
    if isinstance(given, Calibration):
        check_calibration(given, images.checkpoint, settings.steps, "the calibration given")
        return given
    if given is not None and Path(given).exists():
        return load_calibration(given, images.checkpoint, settings.steps)
    return None


def _kept(calibration: Calibration, settings: ExportSettings, images: ExportImages) -> Calibration:
    """The calibration, written to the file that the settings name, with its picture; or what another export wrote there first."""
    if settings.calibration is None or isinstance(settings.calibration, Calibration):
        return calibration
    path = Path(settings.calibration)
    with lock(lock_path(path), str(path), "try again"):
        if (earlier := _given(settings, images)) is not None:
            return earlier
        calibration.save(path)
    if isinstance(images.checkpoint.model, ViTRMConfig):
        _draw(calibration, settings, images, path.with_suffix(".png"))
    return calibration


def _draw(calibration: Calibration, settings: ExportSettings, images: ExportImages, path: Path) -> None:
    shared, own = (
        state_error(
            images.checkpoint,
            quant_table(calibration, settings.target, shared=by_all),
            _few(images),
            calibration.steps,
        )
        for by_all in (True, False)
    )
    draw_state_error(shared, own, calibration, path)


def _few(images: ExportImages) -> NDArray[np.float32]:
    return images.verification[0][:_SIMULATED]
