"""A model repository for Triton Inference Server: one server for many models, with batching across requests.

    REPOSITORY/
      NAME/
        config.pbtxt        what goes in and out, how requests are batched
        labels.txt          class names, by label
        1/model.onnx        version 1 (model.plan for a TensorRT plan); 2/ … for later exports of the same name

The file is written as protobuf text by hand, which needs no package; the tests parse it with Triton's own schema.  A config
can name a library to load, so nothing in it may come from a stranger: strings are quoted by protobuf's rules, and the
one text that is an artifact's own, in a comment, has its line breaks and other control characters escaped.
What Triton's rules make of this project's graphs:

* The first axis is the batch and is not part of `dims`; a value per sample (`halt_prob`, `steps_used`) has no further
  axis, which Triton cannot say: `dims: [ 1 ]` with `reshape { shape: [ ] }` is its way to.
* A loop's `steps` and `halt_threshold` belong to the whole batch.  Requests that differ in them must not be merged, so a
  loop is served without batching (`max_batch_size: 0`, the batch axis in `dims`).  Without batching Triton knows no
  scalars: there the served copy of the file takes both as tensors [1].
* The server knows tensors, not pictures: how a client makes `pixel_values` of a file stands in the model's parameters, as JSON,
  for it to ask for (`vitrm.data.decoding.prepare`, given that `Preprocessing`, does it).
* `stepwise` needs a host that decides after each step who goes on.  Triton's ensembles are fixed pipelines, so the folder
  is refused: an ensemble of it would be an `unrolled` with copies between the steps.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import vitrm.runtime
from vitrm.errors import UserError
from vitrm.model_limits import NEVER
from vitrm.runtime.artifact.graph_names import (
    HALT_PROB,
    HALT_THRESHOLD,
    LOGITS,
    PIXELS,
    PLAN_SUFFIXES,
    STEPS,
    STEPS_USED,
)
from vitrm.runtime.artifact.metadata import Metadata
from vitrm.runtime.artifact.onnx_file import inspect, write_metadata
from vitrm.runtime.artifact.plan_sidecar import STRIPPED, read_sidecar, sidecar_path
from vitrm.runtime.backends.tensorrt.api import FULL, NAMES
from vitrm.system.files import atomic_folder, read_text
from vitrm.system.locks import lock
from vitrm.system.terminal import neutral_line

PBTXT_FILE = "config.pbtxt"
LABELS_FILE = "labels.txt"
PREPROCESSING_KEY = "vitrm_preprocessing"  # of the parameter that holds it
MODEL_FILES = {"onnxruntime": "model.onnx", "tensorrt": "model.plan"}  # what each backend looks for in a version
_ADDING = 300.0  # seconds to wait for another command that adds to the same model; a loop is copied and tried out
MAX_SERVED_BATCH = 64  # that the server may form of requests, where the artifact does not bound it
_MAX_TEXT = 8 << 20  # bytes of a configuration or of labels: a hundred thousand class names
_INTERFACE = "# interface "  # begins the line that says whether a later export may become a version of this model
_UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")  # controls, halves of surrogate pairs, line and paragraph separators
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class _Tensor:
    """One entry of `input` or `output`."""

    name: str
    dtype: str
    dims: tuple[int, ...]
    more: tuple[str, ...] = ()  # further lines

    def text(self) -> str:
        lines = [
            f"name: {_quoted(self.name)}",
            f"data_type: {self.dtype}",
            f"dims: [ {', '.join(map(str, self.dims))} ]",
        ]
        return "  {\n" + "".join(f"    {line}\n" for line in (*lines, *self.more)) + "  }"


def check_place(repository: Path, name: str, *, graph: str, every_step: bool) -> None:
    """Raises `UserError` for what cannot become the model `name` of `repository`, before the work of exporting it."""
    if graph == "stepwise":
        raise UserError(
            "a stepwise folder needs a host that decides after each step who goes on, and Triton's ensembles are fixed "
            "pipelines: serve --graph unrolled (batched) or --graph loop (depth and threshold by request)"
        )
    if every_step:
        raise UserError(
            "--every-step gives [steps, batch, …], and Triton's first axis is the batch: leave out --every-step"
        )
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{name!r} is no model name for Triton, expected letters, digits, dot, dash and underscore: name one with --triton-name"
        )
    for folder in (repository, repository / name):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file: name a folder for --triton")
    if (repository / PBTXT_FILE).exists():
        raise UserError(
            f"{repository} is a model (it has a {PBTXT_FILE}), expected a folder of models: name the folder above it"
        )


def check_flavour(flavour: str, plan: str) -> None:
    """Raises `UserError` where `plan` is one of TensorRT for RTX."""
    if flavour != FULL:
        raise UserError(
            f"{plan} is a plan of {NAMES[flavour]}, and Triton's tensorrt backend runs TensorRT's own: serve the .onnx "
            "file, or build the plan where TensorRT is installed"
        )


def add_file(repository: Path, name: str, path: Path) -> Path:
    """`add_model` for a file that vitrm-export wrote: of a plan its side-car says what is inside and which batches it takes.

    Raises `UserError` for what Triton cannot serve.
    """
    if path.suffix not in PLAN_SUFFIXES:
        return add_model(repository, name, path, vitrm.runtime.open(path).metadata)
    sidecar = read_sidecar(path)
    engine = sidecar.engine
    check_flavour(engine.flavour, str(path))
    if STRIPPED in engine.flags:
        raise UserError(
            f"{path} is a plan without weights, which Triton does not fill in: build it without --strip-weights"
        )
    if min(low for low, _, _ in engine.profiles) > 1:
        raise UserError(
            f"{path} takes no batch of 1, which Triton sends when nobody else asks: build it with --batch 1,…"
        )
    return add_model(
        repository,
        name,
        path,
        sidecar.metadata,
        max_batch=max(high for _, _, high in engine.profiles),
        profiles=len(engine.profiles),
    )


def add_model(
    repository: Path, name: str, path: Path, metadata: Metadata, *, max_batch: int = MAX_SERVED_BATCH, profiles: int = 1
) -> Path:
    """Adds the artifact at `path`, an .onnx or .plan file, to `repository` as the model `name`; returns its new version's folder.

    A model that is there already gets the next version, and keeps its earlier ones and its config.pbtxt, edited or not;
    other models are not touched.  A new model or version appears whole or not at all.  `max_batch` bounds the batches
    that the server forms: of a plan, the largest batch of its `profiles`, of which there are so many.
    Two additions at the same time become two versions.
    Raises `UserError` for what Triton cannot serve, and where `name` is a model with other inputs, outputs or classes.
    """
    backend = "tensorrt" if path.suffix in PLAN_SUFFIXES else "onnxruntime"
    check_place(repository, name, graph=metadata.graph, every_step=False)
    if backend == "tensorrt" and metadata.graph == "loop":
        raise UserError(
            f"{path}: a loop's steps and halt_threshold are scalars, which Triton knows none of without batching: serve "
            "the loop as .onnx, or an unrolled plan"
        )
    if max_batch < 1:
        raise UserError(f"max_batch is {max_batch}, expected at least 1")
    labels = labels_text(metadata)
    config = config_text(name, metadata, backend=backend, max_batch=max_batch, profiles=profiles)
    model = repository / name
    with lock(repository / f".{name}.adding.lock", str(model), "try again when it has ended", wait=_ADDING):
        if not model.exists():
            with atomic_folder(model) as temporary:
                (temporary / PBTXT_FILE).write_text(config, encoding="utf-8")
                (temporary / LABELS_FILE).write_text(labels, encoding="utf-8")
                (temporary / "1").mkdir()
                _place(path, temporary / "1" / MODEL_FILES[backend], metadata)
            return model / "1"
        _check_interface(model, config, labels)
        version = model / str(1 + max(_versions(model), default=0))
        with atomic_folder(version) as temporary:
            _place(path, temporary / MODEL_FILES[backend], metadata)
        return version


def config_text(
    name: str, metadata: Metadata, *, backend: str, max_batch: int = MAX_SERVED_BATCH, profiles: int = 1
) -> str:
    """config.pbtxt for the model `name`, run by `backend` ("onnxruntime" or "tensorrt", with so many `profiles`)."""
    m = metadata
    batched = m.graph != "loop"
    classes = int(m.model["classes"])
    batch = () if batched else (-1,)
    images = _Tensor(
        PIXELS, "TYPE_FP32", (*batch, 3, m.image_size, m.image_size), ("format: FORMAT_NCHW",) if batched else ()
    )
    inputs = [images]
    if not batched:
        inputs += [_Tensor(STEPS, "TYPE_INT64", (1,)), _Tensor(HALT_THRESHOLD, "TYPE_FP32", (1,))]
    outputs = [_Tensor(LOGITS, "TYPE_FP32", (*batch, classes), (f"label_filename: {_quoted(LABELS_FILE)}",))]
    if m.recursive:
        dims, more = ((1,), ("reshape { shape: [ ] }",)) if batched else ((-1,), ())
        outputs += [_Tensor(HALT_PROB, "TYPE_FP32", dims, more), _Tensor(STEPS_USED, "TYPE_INT64", dims, more)]
    # What all earlier exports had goes without saying: their models take versions of today.
    shape = "" if m.preprocessing.fit == "crop" else f"# {m.preprocessing.fit}\n"
    interface = (
        f"backend: {_quoted(backend)}\n"
        f"max_batch_size: {max_batch if batched else 0}\n"
        f"input [\n{_joined(inputs)}\n]\noutput [\n{_joined(outputs)}\n]\n"
    )
    depth = f", {m.steps} step{'s' * (m.steps > 1)}" if m.recursive else ""
    head = f"# {neutral_line(m.run)}: {m.graph}{depth}, {m.precision}.  Pixels are float32 in [0, 1]; normalization is inside.\n"
    if not batched:
        head += (
            f"# steps and halt_threshold [1]: exported with defaults {m.steps} and {m.halt_threshold:g} (1 or more never "
            "halts).\n# They belong to a whole request, so requests are not merged.\n"
        )
    # Of several profiles TensorRT's backend uses those that are named, each for the batches it takes.
    chosen = f" profile: [ {', '.join(_quoted(str(i)) for i in range(profiles))} ]" if profiles > 1 else ""
    kind = "KIND_GPU" if backend == "tensorrt" else "KIND_CPU" if m.target == "cpu" else "KIND_AUTO"
    return (
        f"{head}{_INTERFACE}{_interface_id(interface + shape, labels_text(m))}; vitrm-export adds versions of the same one\n"
        f"name: {_quoted(name)}\n{interface}"
        f"{_batching(max_batch) if batched else ''}"
        f"# A client's pictures become pixel_values so: {m.preprocessing}.\n"
        f'parameters {{ key: "{PREPROCESSING_KEY}" value {{ string_value: {_quoted(json.dumps(m.preprocessing.to_dict()))} }} }}\n'
        f"instance_group [ {{ count: 1 kind: {kind}{chosen} }} ]\n"
        "version_policy { latest { num_versions: 1 } }\n"
    )


def labels_text(metadata: Metadata) -> str:
    """labels.txt: a class name a line, spaces in it as one each.

    Raises `UserError` for a name that a line cannot hold.
    """
    names = metadata.class_names
    for label, name in enumerate(names):
        if any(unicodedata.category(c) in _UNPRINTABLE for c in name):
            raise UserError(
                f"class {label} is {name!r}, expected a name without line breaks and control characters, as {LABELS_FILE} has a name "
                "a line: rename the class and export again"
            )
    return "".join(" ".join(name.split()) + "\n" for name in names)


def _quoted(text: str) -> str:
    """`text` as a string of protobuf's text format: its UTF-8, with all but printable ASCII as octal escapes."""
    plain = (b for b in range(0x20, 0x7F) if b not in b"\"\\'")
    table = {b: chr(b) for b in plain}
    return '"' + "".join(table.get(b, f"\\{b:03o}") for b in text.encode()) + '"'


def _joined(tensors: list[_Tensor]) -> str:
    return ",\n".join(t.text() for t in tensors)


def _batching(max_batch: int) -> str:
    """Requests that wait while a batch runs go together; nobody waits for company."""
    preferred = [size for size in (2**i for i in range(2, 20)) if size < max_batch] + [max_batch]
    return (
        "dynamic_batching {\n"
        f"  preferred_batch_size: [ {', '.join(map(str, preferred))} ]\n"
        "  max_queue_delay_microseconds: 0\n"
        "}\n"
    )


def _interface_id(interface: str, labels: str) -> str:
    return hashlib.sha256((interface + labels).encode()).hexdigest()[:16]


def _check_interface(model: Path, config: str, labels: str) -> None:
    """Raises `UserError` unless the model in the folder `model` takes and gives what `config` describes."""
    interface = _interface_of(_read(model / PBTXT_FILE))
    if interface is None:
        raise UserError(
            f"{model} is a model that vitrm-export did not write, or its {_INTERFACE.strip()!r} line was removed: name "
            "another with --triton-name"
        )
    if interface != _interface_of(config) or _read(model / LABELS_FILE) != labels:
        raise UserError(
            f"{model} is a model with other inputs, outputs, classes, batch size or preprocessing than this export: name another with --triton-name"
        )


def _interface_of(config: str) -> str | None:
    lines = [line for line in config.splitlines() if line.startswith(_INTERFACE)]
    return lines[0].removeprefix(_INTERFACE).split(";")[0] if lines else None


def _read(path: Path) -> str:
    return read_text(path, "Triton's repository", _MAX_TEXT) if path.exists() else ""


def _versions(model: Path) -> list[int]:
    return [int(p.name) for p in model.iterdir() if p.is_dir() and re.fullmatch("[0-9]{1,18}", p.name)]


def _place(path: Path, target: Path, metadata: Metadata) -> None:
    """Puts the artifact at `path` where Triton looks for it; a plan's side-car, or external weights, go with it."""
    if metadata.graph == "loop":
        _without_scalars(path, target)
        return
    shutil.copy2(path, target)
    if path.suffix not in PLAN_SUFFIXES:
        for location, source in inspect(path).external.items():
            weights = target.parent / location
            if weights.exists():
                raise UserError(
                    f"{path} keeps weights in {location!r}, which is {target.name} here: rename them, or export it again"
                )
            weights.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, weights)
    beside = sidecar_path(path)
    if path.suffix in PLAN_SUFFIXES and beside.is_file():
        shutil.copy2(beside, sidecar_path(target))


def _without_scalars(path: Path, target: Path) -> None:
    """Writes the loop at `path` to `target` with inputs [1] in place of its scalars, and compares the two.

    Raises `UserError` if they do not give the same answers.
    """
    import onnx_ir as ir  # here, so that a device without it can still add any other file

    metadata = inspect(path).metadata
    model = ir.external_data.load_to_model(ir.load(path))
    graph = model.graph
    for value in [v for v in graph.inputs if v.name in (STEPS, HALT_THRESHOLD)]:
        scalar = ir.Value(name=f"{value.name}/scalar", shape=ir.Shape([]), type=value.type)
        # Everyone who reads the scalar, in the loop's body too, reads what is left of [1] without its only axis.
        ir.convenience.replace_all_uses_with(value, scalar)
        value.shape = ir.Shape([1])
        first = next(iter(graph))
        graph.insert_before(first, ir.node("Squeeze", [value], outputs=[scalar], name=f"{value.name}/squeeze"))
    ir.save(model, target)
    write_metadata(target, target, metadata)
    own, served = vitrm.runtime.open(path), vitrm.runtime.open(target)
    size = own.metadata.image_size
    images = np.random.default_rng(0).random((3, 3, size, size), np.float32)
    for steps, threshold in ((1, NEVER), (own.metadata.steps, 0.5)):
        expected, answer = (s.infer(images, steps=steps, halt_threshold=threshold) for s in (own, served))
        assert expected.steps_used is not None
        assert answer.steps_used is not None
        if not (expected.logits == answer.logits).all() or not (expected.steps_used == answer.steps_used).all():
            raise UserError(f"the served copy of {path} gives other answers than it: please report this")
