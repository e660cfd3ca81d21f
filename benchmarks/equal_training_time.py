"""What do ViTRM `nano` and the baselines give on CIFAR-10 after the same training time on this CPU, and what do they cost?

    python benchmarks/equal_training_time.py [--runs runs/equal] [--data-dir DIR] [--threads 1]
    python benchmarks/equal_training_time.py --draw benchmarks/records/equal_training_time-CPU.json

Each model is trained by vitrm-train with the recipe `fast` and the passes below, chosen beforehand so that training takes
about a quarter of an hour on one core of a Zen 4 (a model too slow for whole passes in that time sees a part of the
images); then exported in float32 and int8, and all files take turns in one vitrm-bench.  Goes on where it was stopped.
Writes benchmarks/records/equal_training_time-CPU.json, a picture beside it, and the same picture for the docs.  --draw makes
the pictures anew from a record, without training.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from record import RECORDS, draw_all, made, processor

from vitrm.checkpoint import load
from vitrm.system.files import read_json, write_json
from vitrm.system.picture import NEUTRAL, SERIES, picture
from vitrm.training.run_folder.files import METRICS_FILE
from vitrm.training.run_folder.state import STATE_FILE

PASSES = {
    "nano": ["--epochs", "3"],
    "resnet18": ["--epochs", "8"],
    "resnet18-cifar": ["--epochs", "2", "--limit-train", "27000"],
    "vit-small": ["--epochs", "1", "--limit-train", "20700"],
}
PRECISIONS = {"fp32": [], "int8": ["--int8"]}
MARKERS = {"float32": "o", "int8": "s"}  # in the order of PRECISIONS
RECURSIVE = {"nano"}  # the others are there to compare with
DOCS_PICTURE = RECORDS.parents[1] / "docs" / "train" / "equal_training_time.svg"


def command(module: str, *arguments: str) -> None:
    """One of the toolkit's commands, as from the command line."""
    print(f"$ {module} {' '.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, "-m", module, *arguments], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def trained(name: str, run: Path, data: list[str], threads: int) -> list[str]:
    """Trains one model, or goes on, or does nothing; the settings of its run."""
    settings = ["--recipe", "fast", *PASSES[name], "--seed", "0"]
    asked = ["--resume"] if (run / STATE_FILE).exists() else ["--data", "cifar10", *data, "--model", name, *settings]
    command("vitrm.training.cli", *asked, "--threads", str(threads), "--out", str(run))
    return settings


def exported(run: Path, depth: int, precision: str, folder: Path, data: list[str]) -> Path:
    """The artifact of a run at a depth."""
    path = folder / f"{run.name}-{precision}.onnx"
    if not path.exists():
        command("vitrm.export.cli", str(run), "--steps", str(depth), *PRECISIONS[precision], *data, "-o", str(path))
    return path


def accuracies(model: dict[str, Any]) -> list[float]:
    """Percent of the test images right, of each file: all images for float32; int8 differs by what it does on the bench's images."""
    right = model["test_accuracy"][model["depth"] - 1]
    return [100 * (right + model["files"][p]["accuracy"] - model["files"]["fp32"]["accuracy"]) for p in PRECISIONS]


def draw(record: dict[str, Any], path: Path) -> None:
    """Draws test accuracy over latency, as PNG or SVG: a line from each model's float32 file to its int8 one, and its name beside it."""
    from matplotlib.ticker import FixedLocator, NullLocator

    files = [file for model in record["models"].values() for file in model["files"].values()]
    images = " or ".join(f"{n:,}" for n in sorted({file["images"] for file in files}))
    minutes = sorted(round(model["minutes"]) for model in record["models"].values())
    took = " to ".join(map(str, dict.fromkeys((minutes[0], minutes[-1]))))
    with picture(path, 7.6, 3.8, f"Accuracy and latency after {took} minutes of training each") as figure:
        axes = figure.subplots()
        low, high = accuracy_limits([y for model in record["models"].values() for y in accuracies(model)])
        for (name, model), color in zip(record["models"].items(), SERIES, strict=False):
            found = [model["files"][precision] for precision in PRECISIONS]
            x, right = [f["latency_ms"]["p50"] for f in found], accuracies(model)
            axes.plot(x, right, color=color)
            for marker, *point in zip(MARKERS.values(), x, right, strict=True):
                axes.plot(*point, marker, color=color, markersize=7)
            slowest = max(zip(x, right, strict=True))
            beside: dict[str, Any] = {"textcoords": "offset points", "color": color}
            recursion = f": ViTRM, {model['depth']} steps" if name in RECURSIVE else ""
            axes.annotate(name + recursion, slowest, (9, 1), va="bottom", weight="bold", **beside)
            axes.annotate(f"{model['parameters'] / 1e6:.1f} M parameters", slowest, (9, -1), va="top", **beside)
        axes.set_xscale("log")
        axes.set_xlim(*time_limits([file["latency_ms"]["p50"] for file in files]))
        axes.xaxis.set_major_locator(FixedLocator([m * 10.0**p for p in range(-2, 4) for m in (1, 2, 5)]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_ylim(low, high)
        axes.set_xlabel("milliseconds for one image, median")
        axes.set_ylabel("test images right, %")
        for precision, marker in MARKERS.items():
            axes.plot([], [], marker, color=NEUTRAL, markersize=7, label=f"{precision} file")
        axes.legend(loc="lower left", handletextpad=0.2)
        threads = record["threads"]
        on = f"{record['cpu']}, {threads} thread{'s' * (threads > 1)}"
        int8 = f"int8 points: float32's accuracy plus the difference on {images} images"
        axes.set_title(f"{on}; CIFAR-10, all test images\n{int8}", fontweight="normal")


def time_limits(milliseconds: list[float]) -> tuple[float, float]:
    """Returns the ends of the time axis; right of the slowest there is room for its name."""
    return min(milliseconds) / 1.5, max(milliseconds) * 3.5


def accuracy_limits(percent: list[float]) -> tuple[float, float]:
    """Returns the tens around the accuracies; above the best there is room for a name."""
    return 10 * math.floor(min(percent) / 10), min(100, 10 * math.ceil(max(percent) / 10 + 0.3))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--runs", type=Path, default=Path("runs/equal"))
    p.add_argument("--data-dir")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--limit", type=int, default=2000, help="test images that the files are measured on")
    p.add_argument("--draw", type=Path, metavar="RECORD", help="only draw the pictures of this record anew")
    args = p.parse_args()
    if args.draw:
        draw_all(draw, read_json(args.draw, "record"), args.draw.with_suffix(".svg"), DOCS_PICTURE)
        return
    data = ["--data-dir", args.data_dir] if args.data_dir else []

    rows: dict[str, dict[str, Any]] = {}
    files: list[Path] = []
    for name in PASSES:
        run = args.runs / name
        settings = trained(name, run, data, args.threads)
        kept = load(run)
        epochs = [json.loads(line) for line in (run / METRICS_FILE).read_text().splitlines()]
        depth = kept.trained_depth or 1
        rows[name] = {
            "command": f"vitrm-train --data cifar10 --model {name} {' '.join(settings)}",
            "parameters": sum(p.numel() for p in kept.build().parameters()),
            "training_images": kept.data["train"],
            "minutes": round(sum(e["seconds"] for e in epochs) / 60, 1),
            "images_per_s": round(sum(e["images_per_s"] for e in epochs) / len(epochs), 1),
            "depth": depth,
            "test_accuracy": kept.training["test_accuracy"],
            "files": {},
        }
        files += [exported(run, depth, precision, args.runs, data) for precision in PRECISIONS]

    found = args.runs / "bench.json"
    command(
        "vitrm.runtime.bench.cli", *map(str, files), "--data", "cifar10", *data, "--batch", "1", "--threads", str(args.threads),
        "--limit", str(args.limit), "--no-eager", "--seconds", "10", "--json", str(found),
    )  # fmt: skip
    bench = read_json(found, "bench")
    for row in bench["rows"]:
        model, _, precision = Path(row["name"]).stem.rpartition("-")
        keep = ("accuracy", "images", "bytes", "latency_ms", "status")
        rows[model]["files"][precision] = {key: row[key] for key in keep}
    what = "accuracy on CIFAR-10's test images after about equal training time, and the exported files' cost"
    record = {
        **made(what, ("vitrm", "torch", "torchvision", "onnxruntime", "numpy")),
        "threads": args.threads,
        "load": [round(v, 1) for v in os.getloadavg()],
        "other_cpus_busy": bench["machine"].get("other_cpus_busy"),
        "models": rows,
    }
    path = RECORDS / f"equal_training_time-{processor(record)}.json"
    write_json(path, record)
    draw_all(draw, record, path.with_suffix(".svg"), DOCS_PICTURE)
    print(path.relative_to(RECORDS.parents[1]))


if __name__ == "__main__":
    main()
