"""What do glimpses bring: depth without and with a look of its own for every step, beside plain averaging over the same views?

    python benchmarks/glimpses.py [MODEL …] [--data-dir DIR] [--glimpses mirror] [--threads 1]
    python benchmarks/glimpses.py --draw benchmarks/records/glimpses-KIND-CPU.json

For each bundled model (default: those of CIFAR): accuracy on the test part after 1 … 6 steps as it was trained; with glimpses,
with the same weights; and of the mean of one-step answers to the same views, which is what people do without a recursion.
The halting threshold is chosen on the validation part (vitrm.runtime.halting.choose), and tried on the test part.  All in
float32 in PyTorch.  Writes benchmarks/records/glimpses-KIND-CPU.json and a picture beside it, where the figures of other models stay,
and the same picture for the docs.  --draw makes the pictures anew from a record, without measuring.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from record import RECORDS, draw_all, made, processor
from torch.utils.flop_counter import FlopCounterMode

from vitrm import checkpoint as checkpoints
from vitrm.checkpoint import Checkpoint
from vitrm.data import Images, load
from vitrm.model import ViTRM
from vitrm.runtime.bench.images import Sample
from vitrm.runtime.halting.choose import DEFAULT_BUDGET, Trajectory, at_threshold, choose
from vitrm.system.files import read_json, write_json
from vitrm.system.picture import BLUE, NEUTRAL, ORANGE, picture

MODELS = ("nano-v3-cifar10", "nano-v2-cifar10", "small-v2-cifar10", "nano-v2-cifar100", "small-v2-cifar100")
STEPS = 6
DOCS_PICTURE = RECORDS.parents[1] / "docs" / "ideas" / "glimpses.svg"
_BATCH = 250


def trajectories(plain: ViTRM, looking: ViTRM, images: Images) -> tuple[dict[str, Trajectory], NDArray[np.bool_]]:
    """Right answers and halt_prob after each step, without and with glimpses; and whether the mean answer to so many views is right, [S, N]."""
    labels = torch.from_numpy(np.asarray(images.labels))
    right: dict[str, list[torch.Tensor]] = {"none": [], "glimpses": [], "averaged": []}
    halts: dict[str, list[torch.Tensor]] = {"none": [], "glimpses": []}
    assert looking.glimpses is not None
    for start in range(0, len(labels), _BATCH):
        rows = slice(start, start + _BATCH)
        batch, truth = torch.from_numpy(images.floats(rows)), labels[rows]
        numbers = [torch.full((len(batch), 1), float(t % len(looking.glimpses))) for t in range(STEPS)]
        views = [looking.look((batch,), number)[0] for number in numbers]
        for name, reads in (("none", [views[0]] * STEPS), ("glimpses", views)):
            state, steps = plain.initial_state(len(batch)), []
            for read in reads:
                state = plain.recur(read, state)
                steps.append(plain.heads(state.y))
            right[name].append(torch.stack([logits.argmax(1) == truth for logits, _ in steps]))
            halts[name].append(torch.stack([halt_prob for _, halt_prob in steps]))
        first = plain.initial_state(len(batch))
        each = torch.stack([plain.heads(plain.recur(read, first).y)[0].softmax(1) for read in views])
        right["averaged"].append(each.cumsum(0).argmax(2) == truth)
        print(f"\r{images.name} {images.split}: {rows.stop} of {len(labels)}", end="", flush=True)
    print()
    joined = {name: torch.cat(parts, 1).numpy() for name, parts in right.items()}
    found = {name: Trajectory(joined[name], torch.cat(parts, 1).numpy()) for name, parts in halts.items()}
    return found, joined["averaged"]


def multiply_adds(plain: ViTRM, looking: ViTRM) -> dict[str, int]:
    """Multiply-adds per image of embedding it and of a step without glimpses; and of a step with them."""
    image = torch.zeros(1, 3, plain.config.image_size, plain.config.image_size)
    embedded, state, seeing = plain.embed(image), plain.initial_state(1), looking.initial_state(1)

    def counted(run: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops() // 2

    return {
        "embed": counted(lambda: plain.embed(image)),
        "step": counted(lambda: plain.step(embedded, state)),
        "step_with_glimpses": counted(lambda: looking.step((image,), seeing)),
    }


def measured(checkpoint: Checkpoint, kind: str, data_dir: Path | None, limit: int | None) -> dict[str, Any]:
    """The figures of one model."""
    plain, looking = checkpoint.build(), checkpoint.with_glimpses(kind).build()
    assert isinstance(plain, ViTRM)
    assert isinstance(looking, ViTRM)
    data = checkpoint.data["name"]
    parts = {split: load(data, split, data_dir=data_dir).take(slice(0, limit)) for split in ("validation", "test")}
    with torch.inference_mode():
        on_validation, _ = trajectories(plain, looking, parts["validation"])
        on_test, averaged = trajectories(plain, looking, parts["test"])
    work = multiply_adds(plain, looking)
    part = parts["validation"]
    count = len(part.labels)
    sample = Sample(part.pixels, part.labels, np.arange(count), part.classes, data, part.split, count)
    halting = {}
    for name, trajectory in on_validation.items():
        choice = choose(checkpoint.source, sample, trajectory, DEFAULT_BUDGET if limit is None else 0.05)
        halting[name] = {
            "threshold": choice.chosen.threshold,
            "max_drop": choice.budget,
            "test": dataclasses.asdict(at_threshold(on_test[name], choice.chosen.threshold)),
            "test_curve": [
                {"threshold": t, "accuracy": p.accuracy, "mean_steps": p.mean_steps}
                for t in (*(i / 50 for i in range(1, 50)), 0.99, 0.995, 0.998, 1.0)
                for p in [at_threshold(on_test[name], t)]
            ],
        }
    first, last = on_test["glimpses"].right[0], on_test["glimpses"].right[-1]
    return {
        "data": data,
        "images": {split: len(images.labels) for split, images in parts.items()},
        "multiply_adds": work,
        "test_accuracy": {
            **{name: [float(v) for v in t.right.mean(1)] for name, t in on_test.items()},
            "averaged": [float(v) for v in averaged.mean(1)],
        },
        "validation_accuracy": {name: [float(v) for v in t.right.mean(1)] for name, t in on_validation.items()},
        "last_step_against_first": {"gained": int((last & ~first).sum()), "lost": int((first & ~last).sum())},
        "halting": halting,
    }


def draw(record: dict[str, Any], path: Path) -> None:
    """Draws a panel for each model: test accuracy by the mean number of steps, with halting and at fixed depths."""
    models = record["models"]
    columns = 2 if len(models) > 1 else 1
    rows = -(-len(models) // columns)
    with picture(
        path, 8.4, 0.9 + 2.9 * rows, "Every step looks anew: accuracy on the test images (each model its own scale)"
    ) as figure:
        panels = np.atleast_1d(figure.subplots(rows, columns, sharex=True)).ravel()
        for axes, (name, model) in zip(panels, models.items(), strict=False):
            steps = range(1, STEPS + 1)
            accuracy = model["test_accuracy"]
            axes.plot(
                steps,
                [100 * v for v in accuracy["averaged"]],
                ":",
                color=NEUTRAL,
                label="views answered one by one, averaged",
            )
            axes.plot(steps, [100 * v for v in accuracy["none"]], "o-", color=ORANGE, label="no glimpses, fixed depth")
            axes.plot(steps, [100 * v for v in accuracy["glimpses"]], "o-", color=BLUE, label="glimpses, fixed depth")
            curve = [p for p in model["halting"]["glimpses"]["test_curve"] if p["mean_steps"] <= STEPS]
            x, y = [p["mean_steps"] for p in curve], [100 * p["accuracy"] for p in curve]
            axes.plot(x, y, "--", color=BLUE, label="glimpses, halting")
            axes.set_title(name, fontsize=10)
        for axes in panels[::columns]:
            axes.set_ylabel("test images right, %")
        for axes in panels[len(models) :]:
            axes.set_visible(False)
        for axes in panels[max(0, len(models) - columns) : len(models)]:  # the lowest of each column
            axes.set_xlabel("steps, mean per image")
            axes.tick_params(labelbottom=True)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)


def main() -> None:
    """Measures, writes the record, draws."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("models", nargs="*", default=MODELS, metavar="MODEL", help="bundled checkpoints or run folders")
    p.add_argument("--glimpses", choices=["shift", "mirror"], default="mirror")
    p.add_argument("--data-dir", type=Path, help="folder of CIFAR's files")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--limit", type=int, help="images of each part, to try it out: the record goes here")
    p.add_argument("--draw", type=Path, metavar="RECORD", help="only draw the pictures of this record anew")
    args = p.parse_args()
    if args.draw:
        draw_all(draw, read_json(args.draw, "record"), args.draw.with_suffix(".svg"), DOCS_PICTURE)
        return
    torch.set_num_threads(args.threads)
    for name in args.models:
        found = measured(checkpoints.load(name), args.glimpses, args.data_dir, args.limit)
        for label, values in found["test_accuracy"].items():
            print(f"{name} {label:9} {' '.join(f'{100 * v:.2f}' for v in values)}")
        for label, choice in found["halting"].items():
            test = choice["test"]
            print(f"{name} halting, {label}: {100 * test['accuracy']:.2f} % after {test['mean_steps']:.2f} steps")
        add_to_record(args, Path(name).name, found)


def add_to_record(args: argparse.Namespace, name: str, found: dict[str, Any]) -> None:
    """Writes the figures of a model beside those of other models, and draws them all."""
    record = made("glimpses: every step with a look of its own, without further training", ("torch", "numpy"))
    path = (Path() if args.limit else RECORDS) / f"glimpses-{args.glimpses}-{processor(record)}.json"
    found["command"] = record.pop("command")
    models = {**(read_json(path, "record")["models"] if path.exists() else {}), name: found}
    models = {key: models[key] for key in dict.fromkeys((*MODELS, *models)) if key in models}
    record |= {"glimpses": args.glimpses, "steps": STEPS, "models": models}
    write_json(path, record)
    draw(record, path.with_suffix(".svg")) if args.limit else draw_all(
        draw, record, path.with_suffix(".svg"), DOCS_PICTURE
    )
    print(path)


if __name__ == "__main__":
    main()
