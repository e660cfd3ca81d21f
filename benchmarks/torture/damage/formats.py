"""Every kind of file that the product reads: how it is damaged, how it is read, and what of its answers is sealed.

What is sealed (weights, graphs, ranges, training states) must be refused once it is damaged.  The rest is text that its
owner may edit (a config, a recipe, metadata, a picture): another valid text gives other answers, and is counted apart.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

import vitrm.runtime
from vitrm.errors import UserError

from .. import subjects
from ..oracle import Answers, Violation, unclean
from . import mutations, onnx_mutations, reseal
from .mutations import Done

# A file lies in one folder of the scratch folder, so that what it points to outside itself still lies within.
HOME = "here"


@dataclass(frozen=True)
class Format:
    """One kind of file."""

    name: str
    cases: int  # in a full run
    needs: tuple[str, ...]  # names in the subjects' folder
    mutate_home: Callable[[Path, random.Random], Done]
    read_home: Callable[[Path], Answers]
    sealed: tuple[str, ...] = ()  # answers that damage must not change

    def prepare(self, subjects_folder: Path, scratch: Path) -> None:
        """Copies the whole files to `scratch`."""
        home = scratch / HOME
        home.mkdir()
        for name in self.needs:
            source = subjects_folder / name
            if source.is_dir():
                shutil.copytree(source, home / name)
            else:
                shutil.copy(source, home / name)

    def mutate(self, scratch: Path, rng: random.Random) -> Done:
        """Damages them."""
        return self.mutate_home(scratch / HOME, rng)

    def read(self, scratch: Path) -> Answers:
        """Reads them as the product does; its answers."""
        here = os.getcwd()
        os.chdir(scratch / HOME)  # what looks around for its run should find only this
        try:
            return self.read_home(scratch / HOME)
        finally:
            os.chdir(here)


def _one_of(*ways: tuple[float, Callable[[Path, random.Random], Done]]) -> Callable[[Path, random.Random], Done]:
    """A mutation that takes one of `ways`, each with its weight."""

    def mutate(home: Path, rng: random.Random) -> Done:
        way = rng.choices([w for _, w in ways], [weight for weight, _ in ways])[0]
        return way(home, rng)

    return mutate


def _bytes(*names: str) -> Callable[[Path, random.Random], Done]:
    return lambda home, rng: mutations.rewrite(home / rng.choice(names), mutations.damage, rng)


def _kind(*names: str) -> Callable[[Path, random.Random], Done]:
    return lambda home, rng: mutations.disguise(home / rng.choice(names), rng)


def _json(name: str) -> Callable[[Path, random.Random], Done]:
    return lambda home, rng: mutations.rewrite(home / name, lambda data, r: mutations.json_text(data.decode(), r), rng)


def _resealed(
    way: Callable[[Path, random.Random], Done], seal: Callable[[Path], None]
) -> Callable[[Path, random.Random], Done]:
    """`way`, and digests that fit again."""

    def mutate(home: Path, rng: random.Random) -> Done:
        done = way(home, rng)
        seal(home)
        return dataclasses.replace(done, what=f"{done.what}; resealed", resealed=True)

    return mutate


def _artifacts(home: Path) -> None:
    for path in home.rglob("*.onnx"):
        reseal.artifact(path)


def _on(change: Callable[[Path, random.Random], Done], *names: str) -> Callable[[Path, random.Random], Done]:
    return lambda home, rng: change(home / rng.choice(names), rng)


@cache
def _images() -> np.ndarray:
    return subjects.images(3)


# Checkpoints


def _read_run(home: Path) -> Answers:
    import torch

    from vitrm import checkpoint
    from vitrm.config import to_dict

    found = checkpoint.load(home / "run")
    model = found.build()
    with torch.no_grad():
        images = torch.from_numpy(_images())
        output = model(images, 2, 2.0) if model.recursive else model(images)
    logits = output if isinstance(output, torch.Tensor) else output[0]
    return {
        "logits": logits.numpy(),
        "weights": found.weights_id,
        "config": [to_dict(found.model), found.data, found.training, found.trained_depth],
    }


def _damage_weights(home: Path, rng: random.Random) -> Done:
    return mutations.rewrite(home / "run" / "model.safetensors", mutations.safetensors, rng)


# Training states

_STATE = "run/state.safetensors"


def _read_state(home: Path) -> Answers:
    from vitrm.training.run_folder import state as training_state

    header = training_state.read_header(home / _STATE)
    header, tensors = training_state.read(home / _STATE, header["identity"])
    return {"header": header, **{name: tensor.numpy() for name, tensor in tensors.items()}}


class _Everything(tuple[str, ...]):
    """Seals every answer."""

    def __contains__(self, name: object) -> bool:
        return True


def _damage_state(home: Path, rng: random.Random) -> Done:
    return mutations.rewrite(
        home / _STATE, lambda data, r: mutations.safetensors(data, r, metadata_key="vitrm_state"), rng
    )


def _resume(home: Path) -> Answers:
    from vitrm.training.cli import command

    with redirect_stdout(StringIO()) as said:
        command(["--resume", "--out", str(home / "run"), "--device", "cpu", "--threads", "1"])
    if not (home / "run" / "state.safetensors").is_file():
        raise Violation("lost", "the state is no file any more")
    return {"said": said.getvalue().replace(str(home), ""), "weights": subjects.weights_of(home / "run")}


# Calibrations


def _read_ranges(home: Path) -> Answers:
    from vitrm import checkpoint
    from vitrm.calib.calibration import load_calibration

    found = load_calibration(home / "ranges.json", checkpoint.load(home / "run"), subjects.STEPS)
    return {"ranges": found.ranges, "id": found.id, "rest": dataclasses.replace(found, ranges={})}


# Recipes


def _toml_keys() -> tuple[str, ...]:
    from vitrm.training.run_config import DATA_KEYS, MODEL_KEYS, RECIPE_KEYS

    return (*MODEL_KEYS, *RECIPE_KEYS, *DATA_KEYS, "preset", "seed", "teacher", "classes", "x")


def _kind_of_toml(home: Path, rng: random.Random) -> Done:
    done = mutations.disguise(home / "run.toml", rng)
    return dataclasses.replace(done, refuse=done.refuse and not done.what.endswith(("empty", "newlines")))  # valid TOML


def _read_toml(home: Path) -> Answers:
    from vitrm.checkpoint import build_model, load
    from vitrm.config import to_dict
    from vitrm.training.cli import chosen_preprocessing, load_data, resolve
    from vitrm.training.run_config import read

    settings = read(home / "run.toml")
    model, recipe = resolve(settings)
    if settings.teacher:
        load(settings.teacher)
    if settings.data.get("name", "digits") != "digits":
        load_data(settings, chosen_preprocessing(settings, model.image_size))
    build_model(model)
    return {"settings": [dataclasses.asdict(settings), to_dict(model), dataclasses.asdict(recipe)]}


# Artifacts


def _infer(path: Path) -> Answers:
    """What an artifact answers at the depths and thresholds that it takes, whatever its defaults."""
    session = vitrm.runtime.open(path, threads=1)
    m = session.metadata
    answers: dict[str, Any] = {"metadata": m.to_props()}
    settings = ((1, 2.0), (3, 0.5)) if session.takes_depth else ((None, None),)
    for number, (steps, threshold) in enumerate(settings):
        result = session.infer(_images(), steps=steps, halt_threshold=threshold)
        answers |= {f"{k} {number}": v for k, v in dataclasses.asdict(result).items()}
    return answers


_ANSWERS = tuple(f"{k} {i}" for k in ("logits", "halt_prob", "steps_used") for i in (0, 1))


def _read_artifact(name: str) -> Callable[[Path], Answers]:
    return lambda home: _infer(home / name)


def _read_and_pass_on(home: Path) -> Answers:
    """Opens an artifact and hands its metadata to everyone who writes or looks something up from it."""
    from vitrm.export.targets import huggingface, triton
    from vitrm.runtime.bench.images import load_sample
    from vitrm.runtime.bench.reference import find_reference

    path = home / "unrolled.onnx"
    answers = _infer(path)
    m = vitrm.runtime.open(path, threads=1).metadata
    places: list[Callable[[], object]] = [
        lambda: _check_triton(triton.add_file(home / "repository", "model", path).parent, m),
        lambda: huggingface.write_configs(home / "folder", m),
        lambda: find_reference(m, path),
    ]
    if m.data.get("name") != "digits":
        places.append(lambda: load_sample(m, str(path), limit=2))
    for place in places:
        try:
            place()
        except UserError as error:
            if fault := unclean(error):
                raise Violation("message", fault) from None
    if (home / "folder").exists():
        json.loads((home / "folder" / "config.json").read_text(encoding="utf-8"))
    return answers


@cache
def _triton_schema() -> Any:
    found = importlib.util.find_spec("tritonclient")
    if found is None or found.submodule_search_locations is None:
        return None
    path = Path(found.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_TRITON_FIELDS = {
    "name", "backend", "max_batch_size", "input", "output", "dynamic_batching", "instance_group", "version_policy",
    "parameters", "optimization",
}  # fmt: skip


def _check_triton(model: Path, metadata: vitrm.runtime.Metadata) -> None:
    """Raises `Violation` unless the configuration is one, and says only what vitrm-export means to say."""
    from google.protobuf import text_format

    schema = _triton_schema()
    if schema is None:
        return
    text = (model / "config.pbtxt").read_text(encoding="utf-8")
    try:
        config = text_format.Parse(text, schema.ModelConfig())
    except text_format.ParseError as error:
        raise Violation("contract", f"config.pbtxt cannot be parsed: {error}") from None
    if foreign := {field.name for field, _ in config.ListFields()} - _TRITON_FIELDS:
        raise Violation("contract", f"config.pbtxt has fields that came from metadata: {sorted(foreign)}")
    if config.name != model.name:
        raise Violation("contract", f"config.pbtxt names the model {config.name!r}")
    labels = (model / "labels.txt").read_text(encoding="utf-8").split("\n")[:-1]
    if len(labels) != config.output[0].dims[-1]:
        raise Violation("contract", f"{len(labels)} labels for {config.output[0].dims[-1]} classes")


# Stepwise folders

_PARTS = tuple(f"stepwise/{part}.onnx" for part in ("embed", "step", "heads"))


def _mix_parts(home: Path, rng: random.Random) -> Done:
    one, other = rng.sample(_PARTS, 2)
    kind = rng.choice(("swap", "copy", "drop", "extra", "of another graph"))
    a, b = home / one, home / other
    if kind == "swap":
        data = a.read_bytes()
        a.write_bytes(b.read_bytes())
        b.write_bytes(data)
    elif kind == "copy":
        shutil.copy(a, b)
    elif kind == "drop":
        a.unlink()
    elif kind == "of another graph":
        shutil.copy(home / "loop.onnx", a)
    else:
        (home / "stepwise" / "model.onnx").write_bytes(a.read_bytes())
        return Done("a file more in the folder")
    return Done(f"{kind}: {one}, {other}", refuse=True)


# Plans' side-cars


def _read_sidecar(home: Path) -> Answers:
    from vitrm.runtime.artifact.plan_sidecar import read_sidecar, rebuild
    from vitrm.runtime.backends.tensorrt.check_machine import check_here
    from vitrm.runtime.system.gpus import Gpus

    plan = home / "noise.plan"
    found = read_sidecar(plan)
    try:
        check_here(found, plan, Gpus((), None, "none here"))
    except UserError as error:
        if fault := unclean(error):
            raise Violation("message", fault) from None
    else:
        raise Violation("contract", "a plan is fit for a machine without a GPU")
    return {"plan": plan.read_bytes(), "side-car": found.to_dict(), "command": rebuild(found, plan)}


# Triton's repository


def _read_repository(home: Path) -> Answers:
    from vitrm.export.targets import triton

    model = home / "triton" / "model"
    before = _contents(model)
    try:
        version = triton.add_file(home / "triton", "model", home / "unrolled.onnx")
    except UserError:
        if _contents(model) != before:
            raise Violation("lost", "a refused addition changed the repository") from None
        raise
    after = _contents(model)
    if {k: v for k, v in after.items() if k in before} != before:
        raise Violation("lost", "an addition changed what was there")
    return {"version": version.name}


def _contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Size and beginning of every regular file."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            with open(path, "rb") as file:
                found[str(path.relative_to(folder))] = path.stat().st_size, file.read(1 << 20)
    return found


def _damage_repository(home: Path, rng: random.Random) -> Done:
    model = home / "triton" / "model"
    kind = rng.choice(("config", "config", "labels", "version", "version", "text"))
    if kind == "text":
        path = model / "config.pbtxt"
        lines = path.read_text().splitlines()
        lines.insert(
            rng.randrange(len(lines)), rng.choice((*onnx_mutations.NAMES[:8], "# vitrm-interface: 0; x", lines[1]))
        )
        path.write_text("\n".join(lines))
        return Done("a line more in config.pbtxt")
    if kind == "version":
        name = rng.choice(("2", "007", "9" * 400, "٣", "-1", "1.5", "2147483647", "a\nb", "²"))
        try:
            (model / name).mkdir()
        except OSError:
            return Done("nothing: no such name on this file system")
        return Done(f"a version {name[:20]!r}")
    name = {"config": "config.pbtxt", "labels": "labels.txt"}[kind]
    return mutations.rewrite(model / name, mutations.damage, rng)


# Hugging Face's folder


def _read_hf(home: Path) -> Answers:
    from vitrm import checkpoint

    answers = _infer(home / "hf" / "model.onnx")
    for look in (lambda: checkpoint.load(home / "hf"), lambda: vitrm.runtime.open(home / "hf")):
        try:
            look()
        except UserError as error:
            if fault := unclean(error):
                raise Violation("message", fault) from None
        else:
            raise Violation("contract", "a Hugging Face folder opened as a run or artifact")
    return answers


# Pictures in class folders


def _read_photos(home: Path) -> Answers:
    from vitrm.data import load

    parts = {split: load(str(home / "photos"), split, size=16) for split in ("train", "test")}
    return {split: [part.pixels.tobytes(), part.labels.tolist(), part.classes] for split, part in parts.items()}


def _a_photo(home: Path, rng: random.Random) -> Path:
    return home / "photos" / rng.choice(("cat", "dog")) / f"x{rng.choice(subjects.IMAGE_SUFFIXES)}"


def _damage_photo(home: Path, rng: random.Random) -> Done:
    return mutations.rewrite(_a_photo(home, rng), mutations.damage, rng)


def _strange_photo(home: Path, rng: random.Random) -> Done:
    photos = home / "photos"
    kind = rng.choice(("file", "file", "file", "bomb", "size", "class", "class", "loop", "suffix", "mode"))
    if kind == "file":
        return dataclasses.replace(mutations.disguise(_a_photo(home, rng), rng), refuse=False)
    if kind == "bomb":
        side = rng.choice((3000, 6000, 20_000))
        (photos / "cat" / "bomb.png").write_bytes(_bomb(side))
        return Done(f"a PNG of {side} × {side}")
    if kind == "class":
        name = rng.choice(
            ("a\nb", "\x1b[2J", "[bold]x[/]", "\u202ex", " ", "-rf", "a" * 250, ".hidden", "train", "test")
        )
        shutil.copytree(photos / "cat", photos / name)
        return Done(f"a class {name[:20]!r}")
    if kind == "loop":
        (photos / "cat" / "up").symlink_to(photos)
        return Done("a link to the folder above")
    if kind == "suffix":
        path = _a_photo(home, rng)
        path.rename(path.with_suffix(rng.choice(subjects.IMAGE_SUFFIXES)))
        return Done("another suffix")
    from PIL import Image

    if kind == "size":
        size = rng.choice(((1, 1), (1, 5000), (5000, 1), (2, 1)))
        Image.new("RGB", size).save(photos / "cat" / "thin.png")
        return Done(f"an image of {size}")
    mode = rng.choice(("1", "L", "LA", "P", "RGBA", "I;16", "I", "F", "CMYK", "YCbCr", "LAB", "HSV"))
    Image.new(mode, (9, 9)).save(
        photos / "cat" / ("m.tiff" if mode not in ("LA", "P", "RGBA", "HSV") else "m.png"), None
    ) if mode != "HSV" else Image.new("P", (9, 9)).save(photos / "cat" / "m.gif")
    return Done(f"an image of mode {mode}")


@cache
def _bomb(side: int) -> bytes:
    return subjects.bomb(side)


def _artifact(name: str, cases: int, *ways: tuple[float, Callable[[Path, random.Random], Done]]) -> Format:
    file = f"{name}.onnx"
    return Format(
        f"onnx-{name}", cases, (file,), _one_of((8, _bytes(file)), *ways), _read_artifact(file), sealed=_ANSWERS
    )


FORMATS: tuple[Format, ...] = (
    Format(
        "config",
        500,
        ("run",),
        _one_of(
            (2, _json("run/config.json")),
            (4, _resealed(_json("run/config.json"), reseal.run)),
            (3, _bytes("run/config.json")),
            (1, _kind("run/config.json")),
        ),
        _read_run,
        sealed=("weights", "config"),
    ),
    Format(
        "weights",
        500,
        ("run",),
        _one_of(
            (4, _bytes("run/model.safetensors")),
            (4, _damage_weights),
            (3, _resealed(_damage_weights, reseal.run)),
            (1, _kind("run/model.safetensors")),
        ),
        _read_run,
        sealed=("logits", "weights"),
    ),
    Format(
        "state",
        500,
        ("run",),
        _one_of(
            (4, _bytes(_STATE)), (3, _damage_state), (4, _resealed(_damage_state, reseal.state)), (1, _kind(_STATE))
        ),
        _read_state,
        sealed=_Everything(),
    ),
    Format(
        "resume",
        160,
        ("run",),
        _one_of(
            (2, _bytes(_STATE)),
            (2, _damage_state),
            (5, _resealed(_damage_state, reseal.state)),
            (1, _kind(_STATE, "run/config.json")),
            (2, _resealed(_json("run/config.json"), reseal.run)),
            (1, _bytes("run/metrics.jsonl", "run/config.json", "run/model.safetensors")),
        ),
        _resume,
        sealed=("weights",),
    ),
    Format(
        "metrics",
        40,
        ("run",),
        _one_of(
            (1, _bytes("run/metrics.jsonl")),
            (1, _on(lambda p, r: dataclasses.replace(mutations.disguise(p, r), refuse=False), "run/metrics.jsonl")),
        ),
        _resume,
        sealed=("weights",),
    ),
    Format(
        "calibration",
        500,
        ("run", "ranges.json"),
        _one_of(
            (3, _json("ranges.json")),
            (3, _resealed(_json("ranges.json"), reseal.ranges)),
            (3, _bytes("ranges.json")),
            (1, _kind("ranges.json")),
        ),
        _read_ranges,
        sealed=("ranges", "id"),
    ),
    Format(
        "toml",
        700,
        ("run.toml",),
        _one_of(
            (
                7,
                lambda home, rng: mutations.rewrite(
                    home / "run.toml", lambda d, r: mutations.toml_text(d.decode(), r, _toml_keys()), rng
                ),
            ),
            (2, _bytes("run.toml")),
            (1, _kind_of_toml),
        ),
        _read_toml,
    ),
    _artifact("unrolled", 500, (2, _resealed(_bytes("unrolled.onnx"), _artifacts)), (1, _kind("unrolled.onnx"))),
    _artifact("loop", 400, (3, _resealed(_on(onnx_mutations.graph, "loop.onnx"), _artifacts)), (1, _kind("loop.onnx"))),
    _artifact("int8", 300, (3, _resealed(_on(onnx_mutations.graph, "int8.onnx"), _artifacts)), (1, _kind("int8.onnx"))),
    Format(
        "onnx-graph",
        500,
        ("unrolled.onnx",),
        _one_of(
            (1, _on(onnx_mutations.graph, "unrolled.onnx")),
            (3, _resealed(_on(onnx_mutations.graph, "unrolled.onnx"), _artifacts)),
        ),
        _read_artifact("unrolled.onnx"),
        sealed=_ANSWERS,
    ),
    Format(
        "onnx-metadata",
        600,
        ("unrolled.onnx",),
        _one_of(
            (1, _on(onnx_mutations.metadata, "unrolled.onnx")),
            (5, _resealed(_on(onnx_mutations.metadata, "unrolled.onnx"), _artifacts)),
        ),
        _read_and_pass_on,
        sealed=_ANSWERS,
    ),
    Format(
        "onnx-external",
        120,
        ("unrolled.onnx",),
        _resealed(_on(onnx_mutations.external, "unrolled.onnx"), _artifacts),
        _read_and_pass_on,
        sealed=_ANSWERS,
    ),
    Format(
        "stepwise",
        400,
        ("stepwise", "loop.onnx"),
        _one_of(
            (4, _bytes(*_PARTS)),
            (1, _on(onnx_mutations.graph, *_PARTS)),
            (3, _resealed(_on(onnx_mutations.graph, *_PARTS), _artifacts)),
            (3, _resealed(_on(onnx_mutations.metadata, *_PARTS), _artifacts)),
            (1, _kind(*_PARTS)),
            (1, _mix_parts),
        ),
        _read_artifact("stepwise"),
        sealed=_ANSWERS,
    ),
    Format(
        "side-car",
        450,
        ("noise.plan", "noise.plan.json"),
        _one_of(
            (6, _json("noise.plan.json")),
            (2, _bytes("noise.plan.json")),
            (1, lambda home, rng: dataclasses.replace(_bytes("noise.plan")(home, rng), refuse=False)),
            (1, _kind("noise.plan.json", "noise.plan")),
        ),
        _read_sidecar,
        sealed=("plan",),
    ),
    Format(
        "triton",
        250,
        ("triton", "unrolled.onnx"),
        _one_of(
            (4, _damage_repository),
            (
                1,
                lambda home, rng: dataclasses.replace(
                    _kind("triton/model/config.pbtxt", "triton/model/labels.txt")(home, rng), refuse=False
                ),
            ),
        ),
        _read_repository,
    ),
    Format(
        "hugging-face",
        100,
        ("hf",),
        _one_of(
            (2, _json("hf/config.json")),
            (1, _bytes("hf/config.json", "hf/preprocessor_config.json")),
            (1, _on(lambda p, r: dataclasses.replace(mutations.disguise(p, r), refuse=False), "hf/config.json")),
        ),
        _read_hf,
        sealed=_ANSWERS,
    ),
    Format(
        "photos",
        400,
        ("photos",),
        _one_of((6, _damage_photo), (4, _strange_photo)),
        _read_photos,
    ),
)
