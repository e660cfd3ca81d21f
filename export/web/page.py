"""The folder of a page: two models, the runtime, test images, and the static files, put together whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import vitrm
import vitrm.runtime
from vitrm.checkpoint import Checkpoint
from vitrm.config import with_article
from vitrm.data.decoding import LONGEST, MAX_PIXELS
from vitrm.errors import UserError
from vitrm.export.pipeline import export
from vitrm.export.result import ExportResult
from vitrm.export.settings import OnStage, default_steps
from vitrm.export.web import runtime_files
from vitrm.export.web.gallery import Outcomes, PageGallery, choose_gallery
from vitrm.export.web.options import WebOptions
from vitrm.runtime.artifact.graph_names import ANSWER, HALT_PROB, LOGITS, NEXT_SUFFIX, PARTS, PIXELS
from vitrm.runtime.artifact.metadata import Metadata
from vitrm.runtime.stepping import SteppingSession
from vitrm.system.files import atomic_folder, is_leftover
from vitrm.system.terminal import neutral

FORMAT = 1  # of page.json
PAGE_FILE = "page.json"
PRECISIONS = {"fp32": "float32", "int8": "int8"}  # folders of the models, and what they are called
_STATIC = Path(__file__).parent / "static"
_TEMPLATE, _LICENSE = "index.html", "onnxruntime-LICENSE"
_RUNTIME, _IMAGES = "onnxruntime", "gallery"
_LOOKS = {  # what a step does first, by the setting `glimpses`
    "none": "",
    "shift": "looks at the picture anew, a little moved, and ",
    "mirror": "looks at the picture anew, a little moved or mirrored, and ",
}
# What a page consists of: a folder that holds nothing else may be replaced by a new one.
_NAMES = {_TEMPLATE, PAGE_FILE, "style.css", "icon.svg", "js", _RUNTIME, _IMAGES, *PRECISIONS}


@dataclass(frozen=True)
class PageResult:
    """A page, and the evidence for its models."""

    folder: Path
    models: dict[str, ExportResult]  # by precision
    gallery: PageGallery
    bytes: int  # of all files
    first_bytes: int  # downloaded before the first answer: page, runtime, float32 model, images
    compressed_runtime: int  # bytes of the runtime after gzip, which many servers apply


def write_page(
    checkpoint: Checkpoint,
    folder: str | os.PathLike[str],
    options: WebOptions | None = None,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    progress: OnStage = lambda message: None,
    **int8: Any,
) -> PageResult:
    """Writes a page that runs the model of `checkpoint` in the browser.

    Args:
        checkpoint: a model with recursion.
        folder: what to write; it is new, empty, or an earlier page.
        options: the page's settings.
        data_dir: the folder of the data set, for calibration, verification and the gallery.
        progress: called with the name of each stage that begins.
        int8: further settings of `vitrm.export.export` for the int8 model: calibration, calibration_method, max_drop.

    Raises:
        UserError: for a model without steps, a `folder` with other things in it, a missing runtime, and what `export` refuses.
    """
    folder, options = Path(folder), options or WebOptions()
    if checkpoint.model.kind != "vitrm":
        raise UserError(f"--web shows steps, and {with_article(checkpoint.model.kind)} has none: name a vitrm run")
    _check_preprocessing(checkpoint)
    check_folder(folder)
    steps = default_steps(checkpoint) if options.steps is None else options.steps
    runtime = runtime_files.find_runtime(options.runtime, download=options.download, on_stage=progress)
    with atomic_folder(folder) as temporary:
        models = {}
        for precision in PRECISIONS:
            models[precision] = export(
                checkpoint,
                temporary / precision,
                steps=steps,
                graph="stepwise",
                precision=precision,
                halt_threshold=options.halt_threshold,
                data_dir=data_dir,
                progress=lambda stage, precision=precision: progress(f"{PRECISIONS[precision]}: {stage}"),  # type: ignore[misc]
                **(int8 if precision == "int8" else {}),
            )
        progress("choosing test images")
        session = vitrm.runtime.open(temporary / "fp32")
        assert isinstance(session, SteppingSession)
        gallery = choose_gallery(
            session, options.images, options.halt_threshold, data_dir, deepest=max(options.max_steps, steps)
        )
        progress("writing the page")
        compressed = _place_runtime(runtime, temporary / _RUNTIME)
        images = _place_images(gallery, temporary / _IMAGES)
        settings = _settings(checkpoint, models, options, gallery, images, temporary)
        (temporary / PAGE_FILE).write_text(json.dumps(settings, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        _place_static(temporary)
        (temporary / _TEMPLATE).write_text(_index(settings, compressed), encoding="utf-8")
        total = _bytes(temporary)
    first = total - settings["models"][1]["bytes"]
    return PageResult(folder, models, gallery, total, first, compressed)


def _check_preprocessing(checkpoint: Checkpoint) -> None:
    """Raises `UserError` for a preprocessing that the page's scripts do not know."""
    of = checkpoint.preprocessing
    if (of.resampling, of.orientation) != ("bicubic", "exif"):
        raise UserError(
            f"{checkpoint.source} takes pictures resampled {of.resampling}, orientation {of.orientation}: the page does bicubic and "
            "exif alone"
        )


def check_folder(folder: Path) -> None:
    """Raises `UserError` unless a page may take the place of `folder`: only another one may be replaced."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: name a folder for --web")
    if folder.is_dir():
        others = sorted(p.name for p in folder.iterdir() if p.name not in _NAMES and not is_leftover(p.name))
        if others or (any(folder.iterdir()) and not (folder / PAGE_FILE).is_file()):
            raise UserError(
                f"{folder} is a folder with other things in it{f' ({others[0]})' if others else ''}: name a new one for --web"
            )


def _settings(
    checkpoint: Checkpoint,
    models: dict[str, ExportResult],
    options: WebOptions,
    gallery: PageGallery,
    images: Sequence[str],
    folder: Path,
) -> dict[str, Any]:
    """Collects what the page's scripts need to know."""
    metadata = models["fp32"].metadata
    return {
        "format": FORMAT,
        "name": neutral(metadata.run or "ViTRM"),
        "parameters": checkpoint.model.parameters,
        "data": neutral(str(metadata.data.get("name", ""))),
        "classes": [neutral(name) for name in metadata.class_names],
        "image_size": metadata.image_size,
        "background": list(metadata.preprocessing.background),
        "fit": metadata.preprocessing.fit,
        "glimpses": metadata.glimpses,
        "padding": list(metadata.preprocessing.padding),
        "longest": LONGEST,
        "max_pixels": MAX_PIXELS,
        "trained_depth": metadata.trained_depth,
        "steps": metadata.steps,
        "max_steps": max(options.max_steps, metadata.steps),
        "halt_threshold": min(options.halt_threshold, 1.0),
        "tensors": {
            "pixels": PIXELS,
            "logits": LOGITS,
            "halt_prob": HALT_PROB,
            "answer": ANSWER,
            "next": NEXT_SUFFIX,
        },
        "runtime": {
            "version": runtime_files.VERSION,
            "wasm": f"{_RUNTIME}/{runtime_files.WASM}",
            "bytes": (folder / _RUNTIME / runtime_files.WASM).stat().st_size,
        },
        "models": [_model(precision, result.metadata, result.bytes) for precision, result in models.items()],
        "gallery": [
            {"file": file, "name": neutral(image.name), "label": image.label, "group": image.group}
            for file, image in zip(images, gallery.images, strict=True)
        ],
        "gallery_note": neutral(gallery.note),
        "first": gallery.first,
        "outcomes": _outcomes(gallery.outcomes),
        "vitrm": vitrm.__version__,
    }


def _outcomes(found: Outcomes | None) -> dict[str, Any] | None:
    """Returns the counts as rows of text, a depth each: a line for every number would be three quarters of the file."""
    if found is None:
        return None
    return {
        "images": found.images,
        "steps": [" ".join(map(str, row)) for row in found.steps.tolist()],
        "right": [" ".join(map(str, row)) for row in found.right.tolist()],
    }


def _model(precision: str, metadata: Metadata, size: int) -> dict[str, Any]:
    return {
        "name": precision,
        "title": PRECISIONS[precision],
        "files": {part: f"{precision}/{part}.onnx" for part in PARTS},
        "bytes": size,
        "weights_sha256": metadata.weights_sha256,
    }


def _place_static(folder: Path) -> None:
    for name in ("style.css", "icon.svg"):
        shutil.copyfile(_STATIC / name, folder / name)
    shutil.copytree(_STATIC / "js", folder / "js", copy_function=shutil.copyfile)


def _place_runtime(source: Path, folder: Path) -> int:
    """Copies onnxruntime-web; returns its bytes after gzip."""
    folder.mkdir()
    # As .js: some servers do not know .mjs, and a browser runs no module of an unknown type.
    shutil.copyfile(source / runtime_files.SCRIPT, folder / Path(runtime_files.SCRIPT).with_suffix(".js"))
    shutil.copyfile(source / runtime_files.WASM, folder / runtime_files.WASM)
    shutil.copyfile(_STATIC / _LICENSE, folder / "LICENSE")
    return len(zlib.compress((folder / runtime_files.WASM).read_bytes(), 6))


def _place_images(gallery: PageGallery, folder: Path) -> list[str]:
    """Writes the gallery's images, without loss; returns their names relative to the page."""
    from PIL import Image

    names = []
    for i, image in enumerate(gallery.images):
        folder.mkdir(exist_ok=True)
        names.append(f"{_IMAGES}/{i:02}.png")
        pixels = np.ascontiguousarray(image.pixels.transpose(1, 2, 0))
        Image.fromarray(pixels).save(folder / f"{i:02}.png", "PNG", optimize=True)
    return names


def _index(settings: dict[str, Any], compressed: int) -> str:
    """The page's HTML; the template escapes what comes from a run."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_STATIC), autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    sizes = " or ".join(f"{m['bytes'] / 1e6:.1f} MB ({m['title']})" for m in settings["models"])
    return environment.get_template(_TEMPLATE).render(
        name=settings["name"],
        tried=f"{settings['outcomes']['images']:,}" if settings["outcomes"] else "",
        size=settings["image_size"],
        looks=_LOOKS[settings["glimpses"]],
        facts=f"{settings['parameters'] / 1e6:.2f} M parameters, {len(settings['classes'])} classes",
        downloads=(
            f"It loads {settings['runtime']['bytes'] / 1e6:.1f} MB of runtime ({compressed / 1e6:.1f} MB where the server "
            f"compresses) and {sizes} of model."
        ),
        runtime=settings["runtime"]["version"],
        version=settings["vitrm"],
    )


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
