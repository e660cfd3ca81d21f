"""How much faster than a plain PyTorch loop does vitrm-train learn, on this CPU?

    python benchmarks/training_throughput.py [--preset nano] [--threads N] [--rounds 8] [--compile]

The plain loop is what a tutorial writes: a DataLoader with worker processes and torchvision's transforms on PIL images,
the equations as they stand (tests/reference.py), float32, AdamW, torch's AveragedModel.  The other is vitrm-train's own
parts: images resident as uint8 and augmented in batches, exact savings, bfloat16, fused AdamW, memory kept.  Same model,
batch size, augmentation (crop and flip) and loss (two steps); they take turns within each round.  --compile adds
vitrm-train --compile as a third way.
Writes benchmarks/records/training_throughput-PRESET-THREADS-CPU.json.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as vitrm-train does

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import reference  # noqa: E402
from PIL import Image  # noqa: E402

from vitrm.augment import augment  # noqa: E402
from vitrm.checkpoint import build_model  # noqa: E402
from vitrm.config import preset  # noqa: E402
from vitrm.data import photo_crops  # noqa: E402
from vitrm.execution import Execution, compile_learner, keep_freed_memory  # noqa: E402
from vitrm.files import write_json  # noqa: E402
from vitrm.recipe import recipe  # noqa: E402
from vitrm.runtime.machine import cpu_name, physical_cores, versions  # noqa: E402
from vitrm.supervision import Learner, step_loss  # noqa: E402

IMAGES = 4096
CLASSES = 10


class Photos(Dataset):
    """Images as a data set of files would give them."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray) -> None:
        self.images = [Image.fromarray(p.transpose(1, 2, 0)) for p in pixels]
        self.labels = labels
        self.transform = transforms.Compose(
            [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[i]), int(self.labels[i])


def plain_loop(preset_name: str, pixels: np.ndarray, labels: np.ndarray, workers: int) -> Callable[[], None]:
    """One batch of the plain loop, each time it is called."""
    chosen = recipe("fast")
    model = build_model(preset(preset_name)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=chosen.weight_decay)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999))
    loader = DataLoader(
        Photos(pixels, labels),
        batch_size=chosen.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )

    def endless() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            yield from loader

    batches = endless()

    def batch() -> None:
        images, label = next(batches)
        total = torch.zeros(())
        for logits, halt in reference.run(model, images, chosen.n_sup):
            total = total + step_loss(logits, halt.logit(1e-6), label, label, chosen.halt_weight)[0]
        optimizer.zero_grad()
        (total / chosen.n_sup).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), chosen.clip_norm)
        optimizer.step()
        average.update_parameters(model)

    return batch


def own_loop(preset_name: str, pixels: np.ndarray, labels: np.ndarray, compiled: bool) -> Callable[[], None]:
    """One batch as vitrm-train does it, each time it is called."""
    chosen = recipe("fast")
    device, bf16 = Execution(device="cpu").resolve()
    learner = Learner(build_model(preset(preset_name)), chosen, device, bf16)
    if compiled and not compile_learner(learner, pixels.shape[-1], chosen.batch_size, print):
        sys.exit(1)
    resident, targets = torch.from_numpy(pixels), torch.from_numpy(labels)
    rng = np.random.default_rng(0)

    def batch() -> None:
        index = torch.from_numpy(rng.permutation(len(resident))[: chosen.batch_size])
        learner.batch(augment(resident[index], targets[index], CLASSES, chosen, True, rng), 1e-3)

    return batch


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--preset", default="nano")
    p.add_argument("--threads", type=int, default=physical_cores())
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--rounds", type=int, default=8)
    p.add_argument("--compile", action="store_true", help="vitrm-train --compile as well: minutes at the start")
    p.add_argument("--batches", type=int, default=8, help="per round and way")
    args = p.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    pixels = photo_crops(IMAGES)
    labels = np.random.default_rng(0).integers(0, CLASSES, IMAGES)
    ways = {
        "plain loop": plain_loop(args.preset, pixels, labels, args.workers),
        "vitrm-train": own_loop(args.preset, pixels, labels, False),
    }
    if args.compile:
        ways["vitrm-train --compile"] = own_loop(args.preset, pixels, labels, True)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for r in range(1 + args.rounds):  # the first round warms up
        for name, batch in ways.items():
            start = time.perf_counter()
            for _ in range(args.batches):
                batch()
            if r:
                rates[name].append(args.batches * recipe("fast").batch_size / (time.perf_counter() - start))
    ratios = {way: np.array(found) / np.array(rates["plain loop"]) for way, found in rates.items()}
    cpu = cpu_name()
    record = {
        "what": "training throughput, images per second, interleaved in one run",
        "command": "python benchmarks/training_throughput.py " + " ".join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu,
        "preset": args.preset,
        "threads": args.threads,
        "workers": args.workers,
        "batch_size": recipe("fast").batch_size,
        "rounds": args.rounds,
        "batches": args.batches,
        "versions": versions(("vitrm", "torch", "torchvision", "numpy")),
        "images_per_s": {name: [round(r, 1) for r in found] for name, found in rates.items()},
        "load": [round(v, 1) for v in os.getloadavg()],
        "ratio": {
            way: {"median": round(float(np.median(r)), 3), "min": round(float(r.min()), 3)} for way, r in ratios.items()
        },
    }
    name = re.sub(r"[^a-z0-9]+", "-", cpu.lower()).strip("-")
    path = ROOT / "benchmarks" / "records" / f"training_throughput-{args.preset}-{args.threads}-{name}.json"
    write_json(path, record)
    for way, found in rates.items():
        print(
            f"{way:21} {np.median(found):7.1f} images/s, {np.median(ratios[way]):.2f} × (medians of {args.rounds} rounds)"
        )
    print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
