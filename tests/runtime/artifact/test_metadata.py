"""What an artifact says of itself is checked before it is used: it may come from anyone."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import pytest

from vitrm.config import preset, to_dict
from vitrm.errors import UserError
from vitrm.preprocessing import Preprocessing
from vitrm.runtime.artifact import metadata
from vitrm.runtime.artifact.metadata import Metadata

GOOD = Metadata(
    model=to_dict(preset("tiny")),
    classes=[str(i) for i in range(10)],
    data={"name": "digits"},
    preprocessing=Preprocessing.square(32, fit="letterbox"),
    graph="loop",
    steps=6,
    halt_threshold=2.0,
    precision="fp32",
    weights_sha256="0" * 64,
    run="mine",
)
DEEP = "[" * 100_000 + "]" * 100_000
MODEL = dict(GOOD.model)


def test_what_was_written_is_read() -> None:
    props = GOOD.to_props() | {metadata.DIGEST: "not looked at here"}
    assert Metadata.from_props(props, "a.onnx") == GOOD
    assert set(metadata._EXPECTED) == {f.name for f in dataclasses.fields(Metadata)}


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Metadata)])
def test_values_out_of_bounds_are_one_line_at_once(name: str) -> None:
    hostile = [DEEP, "NaN", "-Infinity", "1e999", "9" * 5000, "-1", "1" + "0" * 30, "true", '"' + "x" * 5000 + '"', "[1]", "[NaN]", "{", ""]  # fmt: skip
    began = time.process_time()
    for value in hostile:
        if (name, value) == ("exact_sums", "true"):
            continue
        props = {**GOOD.to_props(), metadata.DIGEST: "", f"vitrm.{name}": value}
        with pytest.raises(UserError) as caught:
            Metadata.from_props(props, "a.onnx")
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {**MODEL, "classes": 10**9}}, "model is .*, expected a config with image_size up to"),
        ({"model": {**MODEL, "image_size": 10**9}}, "expected a config"),
        ({"model": {**MODEL, "image_size": 0}}, "expected a config"),
        ({"model": {**MODEL, "kind": "spiral"}}, "model kind is 'spiral'"),
        ({"classes": []}, None),
        ({"classes": ["cat"]}, "1 class names for a model of 10 classes"),
        ({"classes": [1] * 10}, "classes is .*, expected a list of names"),
        ({"steps": 1025}, "steps is 1025, expected a whole number from 1 to 1024"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": True}, "steps is True"),
        ({"halt_threshold": -0.1}, "halt_threshold is -0.1"),
        ({"precision": "fp8"}, "precision is 'fp8', expected one of fp32, fp16, int8"),
        ({"format": 4}, "metadata format 4, this vitrm reads 1 to 3"),
        ({"preprocessing": None}, "preprocessing is None, expected an object"),
        ({"preprocessing": {}}, "the preprocessing has no size"),
        ({"preprocessing": {"size": [64, 64]}}, "gives 64 × 64 pixels, the model takes 32 × 32"),
        ({"preprocessing": {"size": [32]}}, r"size is \[32\], expected height and width"),
        (
            {"preprocessing": {"size": [32, 32], "fit": "zoom"}},
            "fit is 'zoom', expected 'crop', 'letterbox' or 'squash'",
        ),
        ({"preprocessing": {"size": [32, 32], "gamma": 2}}, "unknown key gamma for a preprocessing"),
        (
            {"preprocessing": {"size": [32, 32], "padding": [0, 0, 256]}},
            "expected three numbers, each whole number from 0 to 255",
        ),
        ({"parity": {"logits": "small"}}, "parity is "),
    ],
)
def test_fields_are_within_their_bounds(changes: dict, message: str | None) -> None:
    values = {**GOOD.to_dict(), **changes}
    if message is None:
        assert Metadata.from_dict(values, "a.onnx").classes == []
        return
    with pytest.raises(UserError, match=message):
        Metadata.from_dict(values, "a.onnx")


def test_megabytes_are_not_parsed() -> None:
    props = {**GOOD.to_props(), "vitrm.data": '{"a": "' + "x" * (9 << 20) + '"}'}
    with pytest.raises(UserError, match="more than 8388608"):
        Metadata.from_props(props, "a.onnx")


def test_a_file_of_this_format_has_a_digest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no vitrm\.sha256"):
        Metadata.from_props(GOOD.to_props(), "a.onnx")
    old = dataclasses.replace(GOOD, format=1, preprocessing=Preprocessing.unrecorded(32))
    assert Metadata.from_props(old.to_props(), "a.onnx") == old


def test_files_of_before_mean_the_preprocessing_that_they_had() -> None:
    """Formats 1 and 2 say nothing of it: a center crop, of JPEGs decoded whole."""
    props = {k: v for k, v in GOOD.to_props().items() if k != "vitrm.preprocessing"}
    with pytest.raises(UserError, match=r"lacks \['preprocessing'\]"):
        Metadata.from_props(props | {metadata.DIGEST: ""}, "a.onnx")
    old = Metadata.from_props(props | {metadata.DIGEST: "", "vitrm.format": "2"}, "a.onnx")
    assert (old.preprocessing.fit, old.preprocessing.jpeg_reduction, old.preprocessing.size) == ("crop", 0, (32, 32))
    assert old.to_props() == {**props, "vitrm.format": "2"}  # what is written back is of the same format
