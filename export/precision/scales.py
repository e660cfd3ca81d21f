"""Stage "calibrate": the scales of an int8 export's activations, from a calibration given, read or made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitrm.calib.calibration import Calibration, calibrate, check_calibration, load_calibration
from vitrm.calib.quant_params import QuantTable, quant_table
from vitrm.calib.sensitivity import SENSITIVITY_IMAGES, Sensitivity, sensitivity
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
    calibration = _calibration(settings, images, on_stage)
    table = quant_table(
        calibration, settings.target, shared=settings.shares_steps, convolutions=settings.int8_convolutions
    )
    if not isinstance(images.checkpoint.model, ViTRMConfig):
        return Scales(calibration, table, None)
    on_stage("simulating int8")
    return Scales(calibration, table, state_error(images.checkpoint, table, _few(images), calibration.steps))


def find_sensitivity(scales: Scales, images: ExportImages, on_stage: OnStage) -> Sensitivity:
    """Measures how much each site alone changes the answer."""
    return sensitivity(
        images.checkpoint,
        scales.calibration,
        scales.table,
        images.verification[0][:SENSITIVITY_IMAGES],
        progress=lambda done: on_stage(f"measuring each site's sensitivity, {done:.0%}"),
    )


def _calibration(settings: ExportSettings, images: ExportImages, on_stage: OnStage) -> Calibration:
    """The calibration given, read from the file given, or made now and written there, with its picture."""
    checkpoint, steps, given = images.checkpoint, settings.steps, settings.calibration
    if isinstance(given, Calibration):
        check_calibration(given, checkpoint, steps, "the calibration given")
        return given
    if given is not None and Path(given).exists():
        return load_calibration(given, checkpoint, steps)
    calibration = calibrate(
        checkpoint,
        steps,
        method=settings.calibration_method,
        data_dir=images.data_dir,
        progress=lambda done: on_stage(f"calibrating, {done:.0%}"),
    )
    if given is not None:
        with lock(lock_path(Path(given)), str(given), "try again"):
            # Another export may have written it in the meantime: the first one's ranges hold, as they would have before.
            if Path(given).exists():
                return load_calibration(given, checkpoint, steps)
            calibration.save(given)
        if isinstance(checkpoint.model, ViTRMConfig):
            _draw(calibration, settings, images, Path(given).with_suffix(".png"))
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
