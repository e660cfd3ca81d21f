"""Does a video's frame take fewer steps if its recursion starts from the frame before?  Measured on pans over CIFAR-10's test images.

    python benchmarks/photos/video_warm_start.py --data-dir DIR [--runs nano-v2-cifar10,nano-cifar10] [--images 200] [--json FILE]

Each image, mirrored at its edges, becomes nine frames, in which the camera moves a pixel right and down each; then the next image
follows, as after a cut.  `cold` starts every frame from y0, z0; `warm` from the state in which the frame before ended, the first
frame of another image, too; `warm in a scene` knows the cuts and starts cold there.  Each frame halts at the threshold, after six steps at most.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vitrm import checkpoint, data
from vitrm.model import State, ViTRM
from vitrm.system.files import write_json

sys.path.append(str(Path(__file__).resolve().parents[1]))
from record import made

REACH = 4  # pixels that the camera moves to either side
FRAMES = 2 * REACH + 1  # of an image
STREAMS = 100  # videos that run side by side
STEPS = 6
THRESHOLDS = (0.7, 0.9, 0.99)  # of which 0.7 is what docs/photos.md has


def pan(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Images [n, 3, 32, 32] as frames [n, FRAMES, 3, 32, 32]."""
    size = images.shape[-1]
    wide = np.pad(images, ((0, 0), (0, 0), (REACH, REACH), (REACH, REACH)), mode="reflect")
    return np.stack([wide[..., i : i + size, i : i + size] for i in range(FRAMES)], axis=1)


@torch.no_grad()
def watch(
    model: ViTRM, frames: torch.Tensor, threshold: float, how: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Answers and steps [streams, frames] of streams [streams, frames, 3, H, W]."""
    answers, used = [], []
    start = model.initial_state(len(frames))
    state = start
    for i in range(frames.shape[1]):
        if how == "cold" or (how == "warm in a scene" and i % FRAMES == 0):
            state = start
        embedded = model.embed(frames[:, i])
        active = torch.ones(len(frames), dtype=torch.bool)
        steps = torch.zeros(len(frames), dtype=torch.int64)
        logits = torch.zeros(len(frames), model.config.classes)
        for _ in range(STEPS):
            following = model.step(embedded, state)
            fresh, sure = model.heads(following.y)
            state = _chosen(active, following, state)
            logits = torch.where(active[:, None], fresh, logits)
            steps += active
            active = active & ~((sure > threshold) & (threshold < 1))
            if not active.any():
                break
        answers.append(logits.argmax(1))
        used.append(steps)
    return torch.stack(answers, 1).numpy(), torch.stack(used, 1).numpy()


def _chosen(active: torch.Tensor, new: State, old: State) -> State:
    rows = active[:, None, None]
    of_z = tuple(
        torch.where(active.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in zip(new.of_z, old.of_z, strict=True)
    )
    return State(torch.where(rows, new.y, old.y), torch.where(rows, new.z, old.z), of_z)


def measure(run: str, images: data.Images) -> list[dict[str, Any]]:
    """Rows of one model."""
    model = checkpoint.load(run).build()
    assert isinstance(model, ViTRM)
    frames = torch.from_numpy(pan(images.floats())).reshape(STREAMS, -1, 3, 32, 32)
    labels = images.labels.repeat(FRAMES).reshape(STREAMS, -1)
    rows = []
    for threshold in THRESHOLDS:
        for how in ("cold", "warm", "warm in a scene"):
            answers, steps = watch(model, frames, threshold, how)
            right = answers == labels
            row = {
                "run": run, "threshold": threshold, "start": how, "frames": right.size,
                "accuracy": round(float(right.mean()), 4),
                "accuracy_after_cut": round(float(right[:, FRAMES::FRAMES].mean()), 4),
                "mean_steps": round(float(steps.mean()), 3),
            }  # fmt: skip
            rows.append(row)
            print(f"{run:16} {threshold:5.2f} {how:16} {100 * row['accuracy']:6.2f} % ({100 * row['accuracy_after_cut']:6.2f} % "
                  f"after a cut), {row['mean_steps']:.3f} steps", flush=True)  # fmt: skip
    return rows


def main() -> None:
    """Prints the table, and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir")
    parser.add_argument("--runs", default="nano-v2-cifar10,nano-cifar10")
    parser.add_argument("--images", type=int, default=200, help=f"a multiple of {STREAMS}")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    images = data.load("cifar10", "test", data_dir=args.data_dir).take(slice(0, args.images))
    rows = [row for run in args.runs.split(",") for row in measure(run, images)]
    if args.json:
        record = made(
            "a video's frames started from the frame before, on pans over CIFAR-10 test images", ("vitrm", "torch")
        )
        write_json(args.json, {**record, "images": args.images, "frames_each": FRAMES, "steps": STEPS, "rows": rows})


if __name__ == "__main__":
    main()
