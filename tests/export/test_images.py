"""Images for an export: the run's own where they are now, or photographs."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vitrm.checkpoint import Checkpoint
from vitrm.config import preset
from vitrm.data import load
from vitrm.errors import UserError
from vitrm.export.images import ExportImages


def test_a_folder_that_has_moved_is_named_with_data_dir(tmp_path):
    folder, moved = tmp_path / "photos", tmp_path / "elsewhere"
    for name in ("a", "b"):
        (moved / name).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(np.full((8, 8, 3), 10 * i, np.uint8)).save(moved / name / f"{i}.png")
    config = preset("tiny", classes=2)
    checkpoint = Checkpoint(model=config, data={"name": str(folder), "classes": ["a", "b"]}, weights={})
    own = ExportImages(checkpoint, moved)
    assert f"validation images of {moved}" in own.verification[1]
    assert own.validation().classes == ("a", "b")
    assert len(own.calibration()) == len(load(str(moved), "train", size=32))
    # Not named, it is not there, which is no reason to stop where crops of photographs do.
    assert "the folder" in ExportImages(checkpoint, None).verification[1]
    with pytest.raises(UserError, match="is not there: if it has moved, name where it is now with --data-dir"):
        ExportImages(checkpoint, None).validation()
    with pytest.raises(UserError, match="is no folder"):
        ExportImages(checkpoint, tmp_path / "nothing").validation()
    (moved / "b").rename(moved / "c")
    with pytest.raises(UserError, match="has other classes"):
        ExportImages(checkpoint, moved).validation()
