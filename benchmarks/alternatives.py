"""What would people take instead?  Accuracy, size, compute and latency of ViTRM's models beside well-known small networks.

    python benchmarks/alternatives.py [--data-dir DIR] [--threads 1] [--images 300] [--run resnet20=RUN …]
    python benchmarks/alternatives.py --draw benchmarks/records/alternatives-CPU.json

Our bundled models are measured: their files answer all of CIFAR-10's test images.  The other networks are this project's
presets of them (`vitrm-train --model NAME`), exported with untrained weights, as neither size nor latency depends on what the
weights are; their accuracy is quoted from its source, and marked so, unless --run names a run of theirs.

Latency is of one image.  All files answer each image in turn before the next one comes, so that whatever else the machine does
hits all of them.  A file that halts takes less time for some images: its median and its mean are both given.
Writes benchmarks/records/alternatives-CPU.json, a picture beside it, and the same picture for the docs.  --draw makes the
pictures anew from a record, without measuring.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from record import RECORDS, draw_all, made, processor
from torch.utils.flop_counter import FlopCounterMode

import vitrm.runtime
from vitrm import checkpoint as checkpoints
from vitrm.checkpoint import Checkpoint
from vitrm.config import preset
from vitrm.data import Images, load
from vitrm.errors import UserError
from vitrm.export import export
from vitrm.runtime.bench.accuracy import predict, wilson
from vitrm.runtime.session import Session
from vitrm.system.files import read_json, write_json
from vitrm.system.picture import BLUE, DIM, NEUTRAL, PANEL, picture

WARM_UP = 20  # images
TEST_IMAGES = 10_000  # of CIFAR-10
# Where a model's threshold was chosen, on validation images; None: it is not measured with halting.
OURS = {
    "nano-v3-cifar10": "halting-nano-v3-cifar10-amd-epyc.json",
    "nano-v2-cifar10": "halting-nano-v2-cifar10-amd-epyc.json",
    "small-v2-cifar10": "halting-small-v2-cifar10-amd-epyc.json",
    "nano-cifar10": None,
}
OF_LAYERS = {"cct-7-3x1"}  # its int8 is that of its layers, not of convolutions
MARKERS = {"fp32": "o", "int8": "s", "int8 convolutions": "D"}
DOCS_PICTURE = RECORDS.parents[1] / "docs" / "train" / "alternatives.svg"


@dataclasses.dataclass(frozen=True)
class Quoted:
    """Somebody else's figure."""

    accuracy: float  # on CIFAR-10's 10,000 test images, in [0, 1]
    source: str


ALTERNATIVES = {
    "resnet20": Quoted(0.9125, "He et al. 2015, arXiv:1512.03385, table 6"),
    "convmixer-256-8": Quoted(0.9260, "github.com/locuslab/convmixer-cifar10, README: 25 epochs, kernel 5, patch 2"),
    "cct-7-3x1": Quoted(0.9478, "github.com/SHI-Labs/Compact-Transformers, README: 200 epochs"),
    "resnet18-cifar": Quoted(0.9302, "github.com/kuangliu/pytorch-cifar, README: 350 epochs"),
    "mobilenetv2-cifar": Quoted(0.9443, "github.com/kuangliu/pytorch-cifar, README"),
}


@dataclasses.dataclass
class File:
    """An exported model, ready to answer."""

    model: str
    precision: str
    path: Path
    session: Session
    steps: str  # how deep it goes, in words

    @property
    def name(self) -> str:
        """The row's name."""
        return ", ".join(filter(None, (self.model, self.precision, self.steps)))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data-dir")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--images", type=int, default=300, help="test images whose latency is measured")
    p.add_argument("--run", action="append", default=[], metavar="PRESET=RUN", help="a trained run of an alternative")
    p.add_argument("--draw", type=Path, metavar="RECORD", help="only draw the pictures of this record anew")
    args = p.parse_args()
    if args.draw:
        draw_all(draw, read_json(args.draw, "record"), args.draw.with_suffix(".png"), DOCS_PICTURE)
        return
    runs = dict(named.split("=", 1) for named in args.run)
    test = load("cifar10", "test", data_dir=args.data_dir)

    with tempfile.TemporaryDirectory() as folder:
        files: list[File] = []
        models: dict[str, dict[str, Any]] = {}
        for name in (*OURS, *ALTERNATIVES):
            known = name in OURS or name in runs
            checkpoint = checkpoints.load(runs.get(name, name)) if known else untrained(name)
            models[name] = size_and_cost(checkpoint)
            if not known:
                models[name]["quoted"] = dataclasses.asdict(ALTERNATIVES[name])
            for file in exported(name, checkpoint, Path(folder), args):
                print(f"exported {file.name}", flush=True)
                files.append(file)
        times = latencies(files, test, args.images)
        rows = []
        for file in files:
            rows.append(row(file, times[file.name], None if "quoted" in models[file.model] else test))
            print({k: v for k, v in rows[-1].items() if k != "latency_ms"}, rows[-1]["latency_ms"], flush=True)
    what = "CIFAR-10: accuracy, size, compute, latency of one image of ViTRM's models and of what people would take instead"
    record = {
        **made(what, ("vitrm", "torch", "torchvision", "onnxruntime", "numpy")),
        "threads": args.threads,
        "images_timed": args.images,
        "load": [round(v, 1) for v in os.getloadavg()],
        "models": models,
        "rows": rows,
    }
    path = RECORDS / f"alternatives-{processor(record)}.json"
    write_json(path, record)
    draw_all(draw, record, path.with_suffix(".png"), DOCS_PICTURE)
    print(path.relative_to(RECORDS.parents[1]))


def untrained(name: str) -> Checkpoint:
    """The preset called `name` with the weights it begins with, as if for CIFAR-10."""
    torch.manual_seed(0)
    config = preset(name)
    weights = checkpoints.build_model(config).state_dict()
    return Checkpoint(model=config, data={"name": "cifar10"}, weights=weights, source="untrained")


def size_and_cost(checkpoint: Checkpoint) -> dict[str, Any]:
    """Parameters and multiply-accumulates of one image, as torch's counter has them; of a recursive model at 1 and 6 steps."""
    model = checkpoint.build().eval().requires_grad_(False)
    image = torch.zeros(1, 3, 32, 32)
    recursive = checkpoint.model.kind == "vitrm"
    macs = {}
    for steps in (1, 6) if recursive else (1,):
        with FlopCounterMode(display=False) as counter:
            model(image, steps) if recursive else model(image)
        macs[str(steps)] = counter.get_total_flops() // 2
    return {"parameters": sum(p.numel() for p in model.parameters()), "macs": macs}


def exported(name: str, checkpoint: Checkpoint, folder: Path, args: argparse.Namespace) -> Iterator[File]:
    """The files of a model in float32 and int8; of ours also as loops that halt, and with convolutions in int8."""
    recursive = checkpoint.model.kind == "vitrm"
    depth = checkpoint.trained_depth or 1
    forms: list[tuple[str, dict[str, Any]]] = [
        (f"{depth} steps" if recursive else "", {"steps": depth if recursive else None})
    ]
    if chosen := OURS.get(name):
        threshold = float(read_json(RECORDS / chosen, "record")["halting"][0]["chosen"]["threshold"])
        forms.insert(0, ("halting", {"steps": depth, "graph": "loop", "halt_threshold": threshold}))
    precisions: dict[str, dict[str, Any]] = {"fp32": {"precision": "fp32"}, "int8": {"precision": "int8"}}
    if recursive:  # the others' convolutions are in int8 anyway
        precisions["int8 convolutions"] = {"precision": "int8", "int8_convolutions": True}
    for steps, settings in forms:
        for precision, form in precisions.items():
            path = folder / f"{name}-{precision}-{steps}.onnx".replace(" ", "")
            try:
                export(checkpoint, path, data_dir=args.data_dir, **settings, **form)
            except UserError as e:
                print(f"{name} {precision}: left out: {e}", flush=True)
                continue
            yield File(name, precision, path, vitrm.runtime.open(path, threads=args.threads), steps)


def latencies(files: list[File], test: Images, count: int) -> dict[str, NDArray[np.float64]]:
    """Milliseconds of each file for each of the first `count` test images, all files taking turns at an image."""
    images = test.floats()[: WARM_UP + count]
    times: dict[str, list[float]] = {file.name: [] for file in files}
    for image in images:
        for file in files:
            start = time.perf_counter()
            file.session.infer(image[None])
            times[file.name].append((time.perf_counter() - start) * 1e3)
    return {name: np.array(found[WARM_UP:]) for name, found in times.items()}


def row(file: File, times: NDArray[np.float64], test: Images | None) -> dict[str, Any]:
    """A file's figures; its accuracy on all test images where its weights are trained."""
    found: dict[str, Any] = {
        "model": file.model,
        "precision": file.precision,
        "steps": file.steps,
        "bytes": file.path.stat().st_size,
        "latency_ms": {
            "mean": float(times.mean()),
            **{f"p{q}": float(np.percentile(times, q)) for q in (50, 90, 99)},
        },
    }
    if test is not None:
        answers = predict(file.session, test.pixels)
        found["accuracy"] = float((answers.top1 == test.labels).mean())
        if answers.steps_used is not None:
            found["mean_steps"] = float(answers.steps_used.mean())
    return found


@dataclasses.dataclass
class Drawn:
    """A model's files in the picture: a line from its float32 file on, and a label beside the last one."""

    label: str
    ours: bool
    measured: bool  # its accuracy, too; else quoted
    points: list[tuple[float, float, str]]  # mean latency, accuracy in percent, precision

    @property
    def color(self) -> str:
        """Ours, or another's."""
        return BLUE if self.ours else NEUTRAL


def drawn_models(record: dict[str, Any]) -> list[Drawn]:
    """What the picture shows of a record: ours that halt, and the others.

    The same models at a fixed depth are as often right and slower; with a model as far below the rest as `nano-cifar10` they would
    press together what is to be compared.
    """
    found: dict[tuple[str, str], Drawn] = {}
    for row in record["rows"]:
        own, measured, halting = row["model"] in OURS, "accuracy" in row, row["steps"] == "halting"
        if own and not halting:
            continue
        # The others' int8 files have their convolutions in int8, too.
        others_int8 = row["precision"] == "int8" and not own and row["model"] not in OF_LAYERS
        precision = "int8 convolutions" if others_int8 else row["precision"]
        accuracy = row["accuracy"] if measured else record["models"][row["model"]]["quoted"]["accuracy"]
        steps = f", {row['steps']}" if row["steps"] else ""
        model = found.setdefault((row["model"], row["steps"]), Drawn(f"{row['model']}{steps}", own, measured, []))
        if own and not model.points:
            model.label += f": {row['mean_steps']:.1f} steps"
        model.points.append((row["latency_ms"]["mean"], 100 * accuracy, precision))
    return list(found.values())


def _height(percent: Any) -> Any:
    """Returns the place of an accuracy on its axis: minus the logarithm of the error."""
    return -np.log(np.maximum(100 - percent, 0.1))


def _percent(height: Any) -> Any:
    return 100 - np.exp(-height)


def draw(record: dict[str, Any], path: Path) -> None:
    """Draws test accuracy over mean latency, as PNG or SVG; hollow where the accuracy is quoted."""
    models = drawn_models(record)
    with picture(
        path, 8.4, 5.6, "CIFAR-10: accuracy and time of one image, ViTRM beside well-known networks"
    ) as figure:
        axes = figure.subplots()
        for model in models:
            line = list(zip(*((x, y) for x, y, _ in model.points), strict=True))
            axes.plot(*line, "-" if model.ours else ":", color=model.color, lw=0.8, alpha=0.7)
            for x, y, precision in model.points:
                look: dict[str, Any] = {"color": model.color, "markersize": 5.5}
                if model.measured:  # an edge tells marks apart that lie on each other
                    look |= {"markeredgecolor": PANEL, "markeredgewidth": 0.6, "markersize": 6.5, "zorder": 3}
                else:  # what is hollow hides nothing
                    look |= {"markerfacecolor": "none", "zorder": 4}
                axes.plot(x, y, MARKERS[precision], **look)
        _draw_axes(axes, models)
        threads = f"{record['threads']} thread{'s' * (record['threads'] > 1)}"
        axes.set_title(
            f"{record['cpu']}{_features(record)}, {threads}; mean of {record['images_timed']} images; accuracies ±{_chance(models):.1f} points (95 %)",
            fontweight="normal",
        )
        _draw_legend(figure, models)
        _draw_labels(figure, axes, models)


def _chance(models: list[Drawn]) -> float:
    """Returns the points by which an accuracy on all test images may differ by chance, for the median one."""
    share = float(np.median([y for model in models for _, y, _ in model.points])) / 100
    low, high = wilson(share * TEST_IMAGES, TEST_IMAGES)
    return 50 * (high - low)


def _features(record: dict[str, Any]) -> str:
    return " with VNNI" if "avx512_vnni" in record.get("cpu_features", ()) else ""


def _draw_axes(axes: Any, models: list[Drawn]) -> None:
    """Draws the axes: time by its logarithm; accuracy by the logarithm of the error, which spreads what is close to the best."""
    from matplotlib.ticker import FixedLocator, NullLocator

    axes.set_xscale("log")
    times = [x for model in models for x, _, _ in model.points]
    axes.set_xlim(min(times) / 1.35, max(times) * 1.35)
    axes.xaxis.set_major_locator(FixedLocator([m * 10.0**k for k in range(-2, 4) for m in (1, 2, 5)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("milliseconds for one image, mean")
    errors = [100 - y for model in models for _, y, _ in model.points]
    axes.set_yscale("function", functions=(_height, _percent))
    axes.set_ylim(100 - max(errors) * 1.12, 100 - min(errors) / 1.12)
    axes.yaxis.set_major_locator(FixedLocator([50, 60, 70, 80, 85, *np.arange(87, 90), *np.arange(90, 99, 0.5), 99]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylabel("test images right, % (logarithm of the error)")
    axes.grid(visible=True, axis="both")


def _draw_legend(figure: Any, models: list[Drawn]) -> None:
    """Draws what shapes and colors mean, below the axes."""
    from matplotlib.lines import Line2D

    names = {"fp32": "float32", "int8": "int8, convolutions float32", "int8 convolutions": "int8, convolutions too"}
    shapes = [Line2D([], [], ls="", marker=MARKERS[key], color=DIM, label=name) for key, name in names.items()]
    kinds = {
        "ViTRM that halts: measured": (BLUE, True),
        "others: accuracy measured": (NEUTRAL, True),
        "others: accuracy quoted, of float32": (NEUTRAL, False),
    }
    met = {(model.color, model.measured) for model in models}
    signs = [
        Line2D(
            [],
            [],
            ls="",
            marker="o",
            color=color,
            markerfacecolor=None if measured else "none",
            label=name,
        )
        for name, (color, measured) in kinds.items()
        if (color, measured) in met
    ]
    rows = max(len(shapes), len(signs))
    for column in (shapes, signs):
        column += [Line2D([], [], ls="", label="")] * (rows - len(column))
    # Columns are filled first.
    pairs = [sign for pair in zip(shapes, signs, strict=True) for sign in pair]
    figure.legend(handles=pairs, loc="outside lower left", ncols=rows, handletextpad=0.2, columnspacing=1.6)


def _draw_labels(figure: Any, axes: Any, models: list[Drawn]) -> None:
    """Writes each model's name where it covers neither a file nor a line nor another name."""
    figure.canvas.draw()  # places are in pixels from here on
    figure.set_layout_engine("none")
    lines = [axes.transData.transform([point[:2] for point in model.points]) for model in models]
    files = [box for line in lines for box in _boxes_along(line)]
    names: list[Any] = []
    leaders: list[Any] = []
    # Those with least room first: beside files that are close to others'.
    order = sorted(range(len(models)), key=lambda i: -sum(_near(lines[i][-1], other) for other in lines))
    for i in order:
        # Where files lie on each other the line that leads to a name has to cross others.
        ways = ((names + leaders, False), (names + leaders, True), (names, True))
        found = (_placed(axes, models[i], lines[i], files, taken, across) for taken, across in ways)
        placed = next(filter(None, found), None)
        if not placed:
            raise AssertionError(f"no room for {models[i].label}")
        names.append(placed[0])
        leaders += placed[1:]


def _near(place: NDArray[np.float64], line: NDArray[np.float64]) -> bool:
    return bool(np.abs(line - place).max(1).min() < 60)


def _boxes_along(line: NDArray[np.float64], half: float = 5) -> list[Any]:
    """Returns boxes that cover the line through some places, in pixels, and the marks at them."""
    from matplotlib.transforms import Bbox

    boxes = [Bbox.from_bounds(x - 7, y - 7, 14, 14) for x, y in line] if half > 2 else []
    for start, end in itertools.pairwise(line):
        for part in np.linspace(0, 1, max(2, int(np.abs(end - start).max() / 4))):
            x, y = start + part * (end - start)
            boxes.append(Bbox.from_bounds(x - half / 2, y - half / 2, half, half))
    return boxes


def _placed(
    axes: Any, model: Drawn, line: NDArray[np.float64], files: list[Any], names: list[Any], across: bool
) -> list[Any]:
    """Writes a label, and a line that leads to it where it is far; returns the boxes of both, none where there is no room.

    As near as that goes, beside the last file if it can be, else beside another one.  `across`: its line may cross `files`.
    """
    points = axes.figure.dpi / 72  # pixels of one
    for distance in range(9, 260, 4):
        for (x, y, _), place in zip(model.points[::-1], line[::-1], strict=True):
            for dx, dy, side in _directions(distance):
                look: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "ha": side, "va": "center"}
                # No line of the grid goes through it.
                look["bbox"] = {"facecolor": PANEL, "edgecolor": "none", "pad": 0.5}
                text = axes.annotate(
                    model.label, (x, y), xytext=(dx, dy), color=model.color if model.ours else DIM, **look
                )
                box = text.get_window_extent()
                end = (dx, dy - math.copysign(6, dy) if dy else 0)
                leader = _leader(place, np.array(end) * points) if distance > 13 else []
                inside = (
                    axes.bbox.x0 <= box.x0
                    and box.x1 <= axes.bbox.x1
                    and axes.bbox.y0 <= box.y0
                    and box.y1 <= axes.bbox.y1
                )
                on_files = any(own.overlaps(other) for own in (box, *([] if across else leader)) for other in files)
                if (
                    inside
                    and not on_files
                    and not any(own.overlaps(other) for own in (box, *leader) for other in names)
                ):
                    if leader:
                        arrow = {"arrowstyle": "-", "color": NEUTRAL, "lw": 0.7, "shrinkA": 0, "shrinkB": 4}
                        axes.annotate("", (x, y), xytext=end, textcoords="offset points", arrowprops=arrow)
                    return [box, *leader]
                text.remove()
    return []


def _leader(place: NDArray[np.float64], way: NDArray[np.float64]) -> list[Any]:
    """Returns the boxes of a line from `place` on, without those on the file there."""
    return [box for box in _boxes_along(np.array([place, place + way]), 2) if np.hypot(*(box.p0 + 1 - place)) > 10]


def _directions(distance: float) -> list[tuple[float, float, str]]:
    """Offsets of a label, in points, and the side that it begins from."""
    far, long, short = 0.7 * distance, 0.92 * distance, 0.38 * distance
    between = [(dx * s, dy * t) for dx, dy in ((long, short), (short, long)) for s in (1, -1) for t in (-1, 1)]
    return [
        (0, -distance, "center"),
        (0, distance, "center"),
        (distance, 0, "left"),
        (-distance, 0, "right"),
        (far, -far, "left"),
        (far, far, "left"),
        (-far, -far, "right"),
        (-far, far, "right"),
        *((dx, dy, "left" if dx > 0 else "right") for dx, dy in between),
    ]


if __name__ == "__main__":
    main()
