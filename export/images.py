"""Images that an export is calibrated on, judged on and verified on."""

from __future__ import annotations

import os
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from vitrm.calib.calibration import calibration_images
from vitrm.checkpoint import Checkpoint
from vitrm.data import Images, affordable, load_of_run, photo_crops
from vitrm.data.images import to_floats
from vitrm.errors import UserError
from vitrm.export.verify import VERIFICATION_BATCHES, VERIFICATION_IMAGES
from vitrm.fields import shown

_MEBIBYTES = 256  # of verification images


class ExportImages:
    """The images of one export, loaded when they are asked for."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        data_dir: str | os.PathLike[str] | None,
        verification: NDArray[np.float32] | None = None,
    ) -> None:
        self.checkpoint, self.data_dir = checkpoint, data_dir
        self._given = verification

    @cached_property
    def verification(self) -> tuple[NDArray[np.float32], str]:
        """Images to check parity on, float32 [n, 3, H, W] in [0, 1], and what they are, in words.

        Raises `UserError` for fewer than verification needs.
        """
        if self._given is None:
            return verification_images(self.checkpoint, self.data_dir)
        least = max(VERIFICATION_BATCHES)
        if len(self._given) < least:
            raise UserError(f"verification needs at least {least} images, got {len(self._given)}")
        return self._given, "the given images"

    def validation(self) -> Images:
        """The validation part of the data set, to judge accuracy on.  Raises `UserError` where it is not at hand."""
        name = str(self.checkpoint.data.get("name", ""))
        try:
            images = load_of_run(
                name, "validation", data_dir=self.data_dir, preprocessing=self.checkpoint.preprocessing
            )
        except UserError as error:
            raise UserError(f"--max-drop is judged on validation images: {error}") from None
        known = self.checkpoint.data.get("classes")
        if known and tuple(known) != images.classes:
            raise UserError(
                f"--max-drop is judged on validation images: {images.name} has other classes "
                f"({shown(list(images.classes), quoted=False)}) than the run ({shown(list(known), quoted=False)})"
            )
        return images

    def calibration(self) -> NDArray[np.float32]:
        """Images to calibrate convolutions on, float32 [n, 3, H, W] in [0, 1]."""
        return calibration_images(self.checkpoint, self.data_dir)[0].floats()


def verification_images(
    checkpoint: Checkpoint, data_dir: str | os.PathLike[str] | None, count: int = VERIFICATION_IMAGES
) -> tuple[NDArray[np.float32], str]:
    """Loads real images to check parity on, float32 [n, 3, H, W] in [0, 1], and says what they are.

    The first `count` of the validation part of the checkpoint's data set, or fewer where they are large or there are no
    more; natural photo crops where the set is not at hand, or in addition where it has too few.
    """
    size, name, least = checkpoint.model.image_size, str(checkpoint.data.get("name", "")), max(VERIFICATION_BATCHES)
    count = affordable(count, size, _MEBIBYTES, least=least)
    try:
        images = load_of_run(name, "validation", data_dir=data_dir, preprocessing=checkpoint.preprocessing)
        pixels, name = images.floats(slice(0, count)), images.name
    except UserError as error:
        if data_dir is not None:
            raise
        reason = str(error).split(":")[0]
        return _crops(count, size), f"photo crops, as {reason}"
    if len(pixels) >= least:
        return pixels, f"validation images of {name}"
    return np.concatenate([pixels, _crops(count - len(pixels), size)]), (
        f"images: {len(pixels)} validation images of {name}, which has no more, and photo crops"
    )


def _crops(count: int, size: int) -> NDArray[np.float32]:
    return to_floats(photo_crops(count, size))
