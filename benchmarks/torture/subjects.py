"""What is tortured: a small trained run, and everything that the product makes of it."""

from __future__ import annotations

import shutil
import struct
import zlib
from pathlib import Path

import numpy as np

import vitrm.runtime
from vitrm import checkpoint
from vitrm.calib.calibration import calibrate
from vitrm.data import load
from vitrm.runtime.artifact.plan_sidecar import BuildRecord, Sidecar, sidecar_path, this_system, write_sidecar
from vitrm.system.files import sha256_of

from . import children

STEPS = 3
SMALL = ("--model", "tiny", "--dim", "32", "--layers", "1", "--latents", "4", "--n", "1")
RUN = ("--data", "digits", *SMALL, "--device", "cpu", "--threads", "1", "--seed", "4")
IMAGE_SUFFIXES = (".png", ".jpg", ".gif", ".bmp", ".webp", ".tiff", ".ppm")
TOML = """\
seed = 1

[data]
name = "digits"
limit_train = 200

[model]
preset = "tiny"
n = 2
dropout = 0.1

[recipe]
name = "fast"
epochs = 2
lr = 1e-3
batch_size = 32
flip = "off"
"""


def make(folder: Path, *, small: bool) -> list[str]:
    """Makes all subjects in `folder`, unless they are there; what could not be made, and why.

    `small` ones are trained for less, and there is no int8 among them.
    """
    done = folder / "made"
    if done.is_file():
        return done.read_text(encoding="utf-8").splitlines()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    missing = []
    _finish("vitrm-train", *RUN, "--epochs", 3 if small else 10, "--batch-size", 32, "--out", folder / "run")
    children.trace(folder / "run")
    at = ("vitrm-export", folder / "run", "--steps", STEPS)
    _finish(*at, "--halt-threshold", "0.5", "-o", folder / "unrolled.onnx")
    _finish(*at, "--graph", "loop", "-o", folder / "loop.onnx")
    _finish(*at, "--graph", "stepwise", "-o", folder / "stepwise")
    _finish(*at, "--hf", folder / "hf")
    if small:
        some = load("digits", "train").take(slice(0, 64))
        calibrate(checkpoint.load(folder / "run"), STEPS, images=some).save(folder / "ranges.json")
    else:
        try:
            ranges = ("--calibration", folder / "ranges.json", "--sensitivity", folder / "sites.json")
            _finish(*at, "--int8", *ranges, "-o", folder / "int8.onnx")
        except RuntimeError as error:
            missing.append(f"int8: {error}")
    _finish("vitrm-export", folder / "unrolled.onnx", "--triton", folder / "triton", "--triton-name", "model")
    _photos(folder / "photos")
    (folder / "run.toml").write_text(TOML, encoding="utf-8")
    _plan(folder)
    done.write_text("\n".join(missing), encoding="utf-8")
    return missing


def _finish(*argv: object) -> None:
    ended = children.run(children.command(*argv), timeout=600)
    if ended.code:
        raise RuntimeError(f"{argv[0]} ended with {ended.code}: {ended.stderr.strip().splitlines()[-1:]}")


def _photos(folder: Path) -> None:
    from PIL import Image

    random = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
        for suffix in IMAGE_SUFFIXES:
            pixels = random.integers(0, 256, (20, 24, 3), np.uint8)
            Image.fromarray(pixels).save(folder / label / f"x{suffix}")


def bomb(side: int) -> bytes:
    """A PNG of `side` × `side` black pixels, small as a file and large in memory."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packed = zlib.compressobj(9)
    rows = b"".join(packed.compress(bytes(1 + 3 * side)) for _ in range(side)) + packed.flush()
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def _plan(folder: Path) -> None:
    """A side-car with a file of noise for a plan: the side-car is read, and the plan hashed, before any GPU is asked for."""
    plan = folder / "noise.plan"
    plan.write_bytes(np.random.default_rng(0).bytes(5000))
    engine = BuildRecord(
        flavour="full",
        version="10.3.0.26",
        gpus=["sm87"],
        gpu_name=None,
        system=this_system(),
        profiles=[[1, 8, 64]],
        flags=["version_compatible"],
        workspace_mib=None,
        source="run",
        sha256=sha256_of(plan),
        bytes=5000,
    )
    write_sidecar(Sidecar(vitrm.runtime.open(folder / "unrolled.onnx").metadata, engine), sidecar_path(plan))


def images(count: int) -> np.ndarray:
    """Real digits, float32 [count, 3, 32, 32]."""
    return load("digits", "test").floats(slice(0, count))


def weights_of(run: Path) -> str:
    """The identity of a run's kept weights."""
    return checkpoint.load(run).weights_id
