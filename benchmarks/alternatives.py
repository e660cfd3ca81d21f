"""What would people take instead?  Accuracy, size, compute and latency of ViTRM's models beside well-known small networks.

    python benchmarks/alternatives.py [--data-dir DIR] [--threads 1] [--images 300] [--run resnet20=RUN …]

Our bundled models are measured: their files answer all of CIFAR-10's test images.  The other networks are this project's
presets of them (`vitrm-train --model NAME`), exported with untrained weights, as neither size nor latency depends on what the
weights are; their accuracy is quoted from its source, and marked so, unless --run names a run of theirs.

Latency is of one image.  All files answer each image in turn before the next one comes, so that whatever else the machine does
hits all of them.  A file that halts takes less time for some images: its median and its mean are both given.
Writes benchmarks/records/alternatives-CPU.json and a picture beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from record import RECORDS, made, processor
from torch.utils.flop_counter import FlopCounterMode

import vitrm.runtime
from vitrm import checkpoint as checkpoints
from vitrm.checkpoint import Checkpoint
from vitrm.config import preset
from vitrm.data import Images, load
from vitrm.errors import UserError
from vitrm.export import export
from vitrm.runtime.bench.accuracy import predict
from vitrm.runtime.session import Session
from vitrm.system.files import read_json, write_json
from vitrm.system.picture import BLUE, NEUTRAL, picture

WARM_UP = 20  # images
# Where a model's threshold was chosen, on validation images; None: it is not measured with halting.
OURS = {
    "nano-v2-cifar10": "halting-nano-v2-cifar10-amd-epyc.json",
    "small-v2-cifar10": "halting-small-v2-cifar10-amd-epyc.json",
    "nano-cifar10": None,
}
MARKERS = {"fp32": "o", "int8": "s", "int8 convolutions": "D"}


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
    args = p.parse_args()
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
    draw(record, path.with_suffix(".png"))
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


def draw(record: dict[str, Any], path: Path) -> None:
    """Test accuracy over mean latency, as PNG; hollow where the accuracy is quoted."""
    from matplotlib.transforms import Bbox

    with picture(path, 7.2, 4.4) as figure:
        axes = figure.subplots()
        # By label, which stands beside the last of its files: the int8 one, where there is one.
        files: dict[str, list[tuple[float, float]]] = {}
        for row in record["rows"]:
            ours = "accuracy" in row
            accuracy = row["accuracy"] if ours else ALTERNATIVES[row["model"]].accuracy
            point = row["latency_ms"]["mean"], 100 * accuracy
            own = row["model"] in OURS
            # The others' int8 files have their convolutions in int8, too.
            precision = row["precision"] if own or row["precision"] != "int8" else "int8 convolutions"
            color = BLUE if own else NEUTRAL
            axes.plot(*point, MARKERS[precision], color=color, markerfacecolor=color if ours else "none", zorder=3)
            label = f"{row['model']}{', halting' if row['steps'] == 'halting' else ''}"
            files.setdefault(label, []).append(point)
            axes.plot(*zip(*files[label][-2:], strict=True), "-", color=color, lw=0.8, alpha=0.6)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel(
            f"latency of one image, ms (mean of {record['images_timed']} images, {record['threads']} thread)"
        )
        axes.set_ylabel("CIFAR-10 test accuracy, %")
        axes.set_title(
            "circle float32, square int8, diamond int8 with convolutions\nfilled: measured here, ours without glimpses; hollow: accuracy quoted from its source",
            fontsize="small",
        )
        axes.grid(alpha=0.3, which="both")
        axes.margins(0.08)
        figure.canvas.draw()  # places are in pixels from here on
        points = [axes.transData.transform(point) for model in files.values() for point in model]
        taken: list[Any] = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in points]
        for label, points in files.items():
            taken.append(_placed(axes, label, points[-1], taken))


def _placed(axes: Any, label: str, point: tuple[float, float], taken: list[Any]) -> Any:
    """Writes a label where it covers nothing `taken`, as near as that goes; returns its box in pixels."""
    for distance in range(9, 90, 5):
        for x, y, side in (
            (0, -distance, "center"),
            (0, distance - 3, "center"),
            (distance, -3, "left"),
            (-distance, -3, "right"),
        ):
            text = axes.annotate(label, point, xytext=(x, y), textcoords="offset points", fontsize=7, ha=side)
            box = text.get_window_extent()
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
            if inside and not any(box.overlaps(other) for other in taken):
                if distance > 15:
                    end = (x, y + 7 if y < -5 else y)  # the near edge of the writing
                    look = {"arrowstyle": "-", "color": NEUTRAL, "lw": 0.6}
                    axes.annotate("", point, xytext=end, textcoords="offset points", arrowprops=look)
                return box
            text.remove()
    raise AssertionError(f"no room for {label}")


if __name__ == "__main__":
    main()
