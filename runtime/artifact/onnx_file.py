"""An .onnx file before any library opens it: whole, unchanged since its export, and without weights from elsewhere.

Everything that opens an .onnx file (ONNX Runtime, OpenVINO, onnx, TensorRT's parser) asks `inspect` first.  It needs
neither torch nor `onnx`: it reads the file's own description out of the protobuf (vitrm.runtime.artifact.protobuf_wire).

**The digest.**  `metadata_props` have one entry `vitrm.sha256`: the SHA-256, in hexadecimal, of these pieces, each
preceded by its length as eight bytes, little end first:

1. every top-level field of the ModelProto but metadata_props, with tag and length, as its bytes stand in the file: the
   graph with its weights, the operator sets, functions, versions;
2. key and value of every other entry `vitrm.…` of metadata_props, sorted by key: two pieces an entry;
3. location and content of every file of external weights that the graph names, sorted by location: two pieces a file.

So it covers all that decides about answers, and not the entries that other tools add.  It tells damage and changes, not
who made them: whoever can write the file can write another digest.

**External weights.**  ONNX lets a tensor name a file, relative to its own.  ONNX Runtime 1.22 also follows absolute paths,
`..` and links to any place that the process may read; those are refused here.  Without the key "location" no reader finds a
file, so where those letters are nowhere in the bytes, nothing can be external, and the graph is not walked (vitrm-export writes no external weights).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PureWindowsPath

from vitrm.errors import UserError, explain_os_error
from vitrm.runtime.artifact.metadata import DIGEST, DIGEST_SINCE, MAX_BYTES, PREFIX, Metadata
from vitrm.runtime.artifact.protobuf_wire import LENGTH, VARINT, WireError, encode, fields
from vitrm.system.files import check_regular

MAX_FILE = 2**31 - 1  # bytes that protobuf reads as one message
NOT_CHECKED = (
    "written by vitrm 0.1, without a SHA-256 of its own: damage to it would not be noticed; export it again to have one"
)
_METADATA_PROPS = 14
_MAX_FIELDS = 1_000_000  # walked at most: less than a second
# Where tensors may stand in a model: message → field number → the message in it.  Tested against onnx's own schema.
MESSAGES: dict[str, dict[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
}
_EXTERNAL_DATA = 13  # of TensorProto: entries key → value
_DATA_LOCATION = 14  # of TensorProto: 0 inside, 1 elsewhere


@dataclass(frozen=True)
class OnnxFile:
    """An .onnx file's own metadata, and the files that belong to it."""

    path: Path
    props: dict[str, str]  # metadata_props
    external: dict[str, Path]  # files of weights, by the location that the graph names
    _kept: list[tuple[int, int]] = field(repr=False)  # byte ranges of all fields but the entries vitrm.…
    _model: list[tuple[int, int]] = field(repr=False)  # and of all but metadata_props

    @cached_property
    def metadata(self) -> Metadata:
        """Its description.  Raises `UserError` where vitrm-export did not write it."""
        return Metadata.from_props(self.props, str(self.path))

    @property
    def size_bytes(self) -> int:
        """Size of the file and its external weights."""
        return sum(p.stat().st_size for p in (self.path, *self.external.values()))

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks for users of the file."""
        return () if DIGEST in self.props else (NOT_CHECKED,)


def inspect(path: str | os.PathLike[str], *, verify: bool = True) -> OnnxFile:
    """Reads what the .onnx file at `path` says of itself.

    Raises `UserError` for what is no whole ONNX file, for external weights that are not beside it, and, unless `verify` is
    False, where the digest is another than the file's own.
    """
    path = Path(path)
    return _inspect(path, _read(path), verify)


def write_metadata(source: str | os.PathLike[str], target: str | os.PathLike[str], metadata: Metadata) -> None:
    """Writes the .onnx file `source` to `target` with `metadata` as its description, and the digest of what it is then.

    Everything else in the file stays as it is, byte by byte; external weights are not copied.  Not atomic by itself; `target` may
    be `source`.  A digest vouches for the file: call it for a file that was just made, or opened and verified.
    Metadata of format 1 gets no digest, which that format does not have.
    """
    source, target = Path(source), Path(target)
    data = _read(source)
    found = _inspect(source, data, verify=False)
    ours = metadata.to_props()
    if metadata.format >= DIGEST_SINCE:
        ours[DIGEST] = _digest(data, found._model, ours, found.external)
    view = memoryview(data)
    try:
        with open(target, "wb") as file:
            file.writelines(view[begin:end] for begin, end in found._kept)
            file.writelines(_entry(key, value) for key, value in ours.items())
    except OSError as error:
        raise explain_os_error(error, f"writing {target}") from error


def _read(path: Path) -> bytes:
    check_regular(path, "artifact")
    try:
        size = path.stat().st_size
        if size > MAX_FILE:
            raise UserError(f"{path} has {size} bytes, an ONNX file has at most {MAX_FILE}: export it again")
        return path.read_bytes()
    except OSError as error:
        raise explain_os_error(error, f"reading {path}") from error


def _inspect(path: Path, data: bytes, verify: bool) -> OnnxFile:
    try:
        props, kept, model = _top_level(data, path)
        locations = sorted(set(_locations(data)))
    except WireError as error:
        raise UserError(
            f"{path} ({len(data)} bytes) is not a whole ONNX file ({error}): it may be truncated; copy or export it again"
        ) from None
    external = {location: _beside(path, location) for location in locations}
    told = props.get(DIGEST)
    if told is not None and verify:
        found = _digest(data, model, props, external)
        if found != told:
            raise UserError(
                f"{path} has SHA-256 {found[:12]}…, its own metadata says {told[:12]}…: it is damaged, or was changed after it "
                "was exported; copy or export it again, or, if it was changed on purpose, open it with "
                "vitrm.runtime.open(path, verify=False) or vitrm-bench --no-verify"
            )
    return OnnxFile(path, props, external, kept, model)


def _top_level(data: bytes, path: Path) -> tuple[dict[str, str], list[tuple[int, int]], list[tuple[int, int]]]:
    """metadata_props, and the byte ranges of all fields but the entries vitrm.…, and but all of metadata_props."""
    props: dict[str, str] = {}
    kept, model = [], []
    described = 0
    for number, wire, begin, content, end in fields(data, 0, len(data)):
        span = begin, end
        if number != _METADATA_PROPS:
            kept.append(span)
            model.append(span)
            continue
        if wire != LENGTH:
            raise WireError(f"metadata_props of wire type {wire}")
        key, value = _key_and_value(data, content, end)
        if not key.startswith(PREFIX):
            kept.append(span)
            props.setdefault(key, value)
            continue
        described += end - begin
        if key in props or described > MAX_BYTES:
            what = f"{key} twice" if key in props else f"more than {MAX_BYTES} bytes of it"
            raise UserError(f"{path}: damaged vitrm metadata ({what}): export it again")
        props[key] = value
    if not model:
        raise WireError("no model in it")
    return props, kept, model


def _key_and_value(data: bytes, begin: int, end: int) -> tuple[str, str]:
    """A StringStringEntryProto."""
    found = {1: b"", 2: b""}
    for number, wire, _, content, after in fields(data, begin, end):
        if number in found and wire == LENGTH:
            found[number] = data[content:after]
    try:
        return found[1].decode(), found[2].decode()
    except UnicodeDecodeError as error:
        raise WireError(f"an entry that is no UTF-8 at byte {begin}: {error.reason}") from None


def _entry(key: str, value: str) -> bytes:
    return encode(_METADATA_PROPS, encode(1, key.encode()) + encode(2, value.encode()))


def _digest(data: bytes, model: list[tuple[int, int]], props: dict[str, str], external: dict[str, Path]) -> str:
    """The digest as the module's head defines it; `model` are the byte ranges of piece 1."""
    digest = hashlib.sha256()

    def begin(size: int) -> None:
        digest.update(size.to_bytes(8, "little"))

    view = memoryview(data)
    begin(sum(end - start for start, end in model))
    for start, end in model:
        digest.update(view[start:end])
    for key in sorted(k for k in props if k.startswith(PREFIX) and k != DIGEST):
        for text in (key, props[key]):
            encoded = text.encode()
            begin(len(encoded))
            digest.update(encoded)
    for location in sorted(external):
        encoded = location.encode()
        begin(len(encoded))
        digest.update(encoded)
        try:
            with open(external[location], "rb") as file:
                begin(os.fstat(file.fileno()).st_size)
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise explain_os_error(error, f"reading {external[location]}") from error
    return digest.hexdigest()


# External weights -----------------------------------------------------------------------------------


def _locations(data: bytes) -> Iterator[str]:
    """The locations of external weights, wherever tensors stand in the model."""
    if b"location" not in data:
        return
    waiting = [("ModelProto", 0, len(data))]  # a list, not recursion: the file chooses the depth
    seen = 0
    while waiting:
        message, begin, end = waiting.pop()
        if message == "TensorProto":
            yield from _location(data, begin, end)
            continue
        holds = MESSAGES[message]
        for number, wire, _, content, after in fields(data, begin, end):
            seen += 1
            if seen > _MAX_FIELDS:
                raise WireError(f"more than {_MAX_FIELDS} fields")
            inner = holds.get(number)
            if inner is not None and wire == LENGTH:
                waiting.append((inner, content, after))


def _location(data: bytes, begin: int, end: int) -> list[str]:
    """Every location that a tensor names, where its weights are elsewhere."""
    external, locations = False, []
    for number, wire, _, content, after in fields(data, begin, end):
        if number == _DATA_LOCATION and wire == VARINT:
            external = data[content:after] != b"\0"
        elif number == _EXTERNAL_DATA and wire == LENGTH:
            key, value = _key_and_value(data, content, after)
            locations += [value] if key == "location" else []
    return (locations or [""]) if external else []


def _beside(path: Path, location: str) -> Path:
    """The file of external weights at `location`.  Raises `UserError` unless it is one in the folder of `path`."""
    what = f"{path} keeps weights in {location!r}"
    # Windows' rules too: a file is judged alike wherever it is opened.  ONNX Runtime's "*/…" are addresses in memory.
    parts = PureWindowsPath(location).parts
    outside = PureWindowsPath(location).anchor or ".." in parts or location.startswith("*")
    if not parts or outside or not location.isprintable():
        raise UserError(
            f"{what}, expected a file beside it: it is not opened; export it again, or save it with its weights inside"
        )
    found = path.parent / location
    check_regular(found, f"{what}, which must be copied along")
    if not found.resolve().is_relative_to(path.parent.resolve()):
        raise UserError(
            f"{what}, a link to {found.resolve()} outside its folder: it is not opened; copy the file there"
        )
    return found
