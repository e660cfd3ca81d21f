"""Digests made right again after a change: they tell damage, not malice, so what lies behind them is tortured, too.

Whoever can write a file can write another digest.  Each function leaves a file as it is where it is too broken for one.
"""

from __future__ import annotations

import json
import struct
from contextlib import suppress
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from vitrm.calib import calibration
from vitrm.errors import UserError
from vitrm.runtime.artifact import onnx_file
from vitrm.runtime.artifact.metadata import DIGEST
from vitrm.system import strict_json
from vitrm.system.files import sha256_of

_TOO_BROKEN = (
    DecodeError,
    UserError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RecursionError,
    OSError,
    struct.error,
)


def run(home: Path) -> None:
    """A run folder's config.json: of its own content and of the weights beside it."""
    path = home / "run" / "config.json"
    with suppress(*_TOO_BROKEN):
        values = json.loads(path.read_text(encoding="utf-8"))
        content = {k: v for k, v in values.items() if k != "sha256"}
        weights = sha256_of(home / "run" / "model.safetensors")
        text = json.dumps({**content, "sha256": {"config": strict_json.digest(content), "weights": weights}})
        path.write_text(text, encoding="utf-8")


def state(home: Path) -> None:
    """The header in a training state."""
    path = home / "run" / "state.safetensors"
    with suppress(*_TOO_BROKEN):
        data = path.read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        outer = json.loads(data[8 : 8 + size])
        header = json.loads(outer["__metadata__"]["vitrm_state"])
        header.pop("sha256", None)
        header["sha256"] = strict_json.digest(header)
        outer["__metadata__"]["vitrm_state"] = json.dumps(header)
        raw = json.dumps(outer).encode()
        path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + size :])


def ranges(home: Path) -> None:
    """A calibration: of its ranges, and its id."""
    path = home / "ranges.json"
    with suppress(*_TOO_BROKEN):
        values = json.loads(path.read_text(encoding="utf-8"))
        values["ranges_sha256"] = calibration.digest(values["ranges"])
        origin = ("weights_sha256", "preprocessing", "steps", "data", "estimator")
        values["id"] = calibration.identity(*(values[k] for k in origin))
        path.write_text(json.dumps(values), encoding="utf-8")


def artifact(path: Path) -> None:
    """An .onnx file."""
    with suppress(*_TOO_BROKEN):
        data = path.read_bytes()
        found = onnx_file._inspect(path, data, verify=False)
        digest = onnx_file.digest(data, found._model, found.props, found.external)
        model = onnx.load_from_string(data)
        for entry in model.metadata_props:
            if entry.key == DIGEST:
                entry.value = digest
        path.write_bytes(model.SerializeToString())
