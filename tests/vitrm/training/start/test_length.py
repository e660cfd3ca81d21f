"""The note about runs too short to learn anything."""

from __future__ import annotations

import re

import pytest

from vitrm.recipe import recipe
from vitrm.training.start.length import FEW, few_batches


@pytest.mark.parametrize(
    ("images", "changes"), [(216, {}), (7, {"epochs": 3}), (2000, {"epochs": 5, "batch_size": 128})]
)
def test_a_short_run_is_told_what_would_be_long_enough(images, changes):
    short = recipe("anytime", **changes)
    note = few_batches(images, short)
    batches = images // min(short.batch_size, images)
    assert f"{short.epochs} epochs of {batches} batches are {short.epochs * batches} updates" in note
    epochs = int(re.search(r"--epochs (\d+)", note)[1])
    size = re.search(r"--batch-size (\d+)", note)
    longer = recipe("anytime", epochs=epochs, batch_size=int(size[1]) if size else short.batch_size)
    assert few_batches(images, longer) == ""
    assert longer.epochs * (images // min(longer.batch_size, images)) < 1000 + images  # and not much longer than that


def test_a_run_of_usual_length_has_no_note():
    assert few_batches(50_000, recipe("anytime", epochs=1)) == ""
    assert few_batches(64 * FEW, recipe("anytime", epochs=1, batch_size=64)) == ""
