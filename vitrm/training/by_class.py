"""Classes of a training run, in words: how unequal they are, and how each fared on the test images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vitrm.classification.confusion import Classification
from vitrm.classification.text import class_table, confusions, never_recognized
from vitrm.data import Images
from vitrm.recipe import Recipe
from vitrm.training.run_folder.files import CONFUSION_FILE, CONFUSION_PICTURE, MISTAKES_PICTURE, RESULTS_FILE

_UNEQUAL = 10  # times as many images of one class as of another are worth a note
_FILES = (RESULTS_FILE, CONFUSION_FILE, CONFUSION_PICTURE, MISTAKES_PICTURE)


def unequal_classes(images: Images, recipe: Recipe) -> str:
    """Says how unequal the classes of the training images are, where that is much and nothing is done about it; else empty."""
    counts = np.bincount(images.labels, minlength=len(images.classes))
    least, most = int(counts.argmin()), int(counts.argmax())
    if recipe.balance != "none" or counts[most] < _UNEQUAL * counts[least]:
        return ""
    return (
        f"{counts[most]} training images are {images.classes[most]!r}, {counts[least]} are {images.classes[least]!r}: a model "
        "may score well without ever answering the latter; --balance sampling (or loss) makes all classes count the same"
    )


def told(result: Classification, examples: Sequence[int], out: Path) -> str:
    """Says how each class fared, in lines: `examples` are the training images of each; `out` is the run folder."""
    top5 = "" if result.top5_accuracy is None else f"top-5 accuracy {100 * result.top5_accuracy:.2f} %, "
    files = ", ".join(name for name in _FILES if (out / name).exists())
    lines = [
        "",
        class_table({"": result}).plain(),
        "",
        f"{top5}mean recall {100 * result.balanced_accuracy:.2f} %; all of it, and as pictures: {files}",
        confusions(result),
        *(
            f"note: {line}"
            for line in never_recognized(
                result, np.asarray(examples), "add training images of it, or try --balance sampling"
            )
        ),
    ]
    return "\n".join(line for i, line in enumerate(lines) if line or i in (0, 2))
