"""How much faster than a plain PyTorch loop does vitrm-train learn, on this CPU?

    python benchmarks/training_throughput.py [--preset nano] [--recipe fast] [--threads N] [--rounds 8] [--batches 8]

The plain loop is what a tutorial writes: a DataLoader with worker processes and torchvision's transforms on PIL images,
the equations as they stand (tests/reference.py), float32, AdamW, torch's AveragedModel.  The others are vitrm-train's own
parts: images resident as uint8 and augmented in batches, exact savings, bfloat16, fused AdamW, memory kept; the same
with --compile; and the same in one process per core, as torchrun starts them.  Same model, batch size, augmentation
(crop and flip) and loss.

Each way lives in a process (or several) of its own with the environment that its command sets, all in one run; they take
turns, and wait while another has its turn.
Writes benchmarks/records/training_throughput-PRESET-THREADS-CPU.json.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import vitrm  # noqa: F401 (before tests/ is on the path, which has a folder of that name)

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import reference  # noqa: E402
from PIL import Image  # noqa: E402
from record import RECORDS, made, processor  # noqa: E402

from vitrm.checkpoint import build_model  # noqa: E402
from vitrm.config import preset  # noqa: E402
from vitrm.data import photo_crops  # noqa: E402
from vitrm.recipe import recipe  # noqa: E402
from vitrm.runtime.system.machine import physical_cores  # noqa: E402
from vitrm.system.files import write_json  # noqa: E402
from vitrm.training.augmentation.augment import augment  # noqa: E402
from vitrm.training.parallel.compilation import compile_learner  # noqa: E402
from vitrm.training.parallel.device import Execution, workers_for  # noqa: E402
from vitrm.training.parallel.distributed import join  # noqa: E402
from vitrm.training.parallel.process_tuning import keep_freed_memory  # noqa: E402
from vitrm.training.supervision import Learner, step_loss  # noqa: E402

IMAGES = 4096
CLASSES = 10
PLAIN, OWN = "plain loop", "vitrm-train"
COMPILED, PROCESSES, BOTH = "vitrm-train --compile", "torchrun vitrm-train", "torchrun vitrm-train --compile"
WAYS = (PLAIN, OWN, COMPILED, PROCESSES, BOTH)


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


def plain_loop(
    preset_name: str, recipe_name: str, pixels: np.ndarray, labels: np.ndarray, workers: int
) -> Callable[[], None]:
    """One batch of the plain loop, each time it is called."""
    chosen = recipe(recipe_name)
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


def own_loop(
    preset_name: str, recipe_name: str, pixels: np.ndarray, labels: np.ndarray, way: str
) -> Callable[[], None]:
    """One batch as vitrm-train does it, each time it is called; in several processes, this one's part of it."""
    keep_freed_memory()
    chosen = recipe(recipe_name)
    device, bf16 = Execution(device="cpu").resolve()
    world = join(device)
    part = world.part(chosen.batch_size)
    model = build_model(preset(preset_name))
    workers = workers_for(model, device, chosen.batch_size, world.size)
    learner = Learner(model, chosen, device, bf16, world, workers=workers)
    if way in (COMPILED, BOTH) and not compile_learner(
        learner, pixels.shape[-1], part.stop - part.start, lambda text: print(text, file=sys.stderr)
    ):
        sys.exit(1)
    resident, targets = torch.from_numpy(pixels), torch.from_numpy(labels)
    rng = np.random.default_rng(0)

    def batch() -> None:
        index = torch.from_numpy(rng.permutation(len(resident))[: chosen.batch_size])
        images = augment(resident[index], targets[index], CLASSES, chosen, True, rng, part)
        learner.train_step(images, 1e-3, batch_share=1 / world.size)

    return batch


def take_turns(args: argparse.Namespace) -> None:
    """A way's process: for each number of batches read, trains on so many and answers with the seconds it took."""
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    pixels = photo_crops(IMAGES)
    labels = np.random.default_rng(0).integers(0, CLASSES, IMAGES)
    if args.way == PLAIN:
        batch = plain_loop(args.preset, args.recipe, pixels, labels, args.workers)
    else:
        batch = own_loop(args.preset, args.recipe, pixels, labels, args.way)
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            batch()
        print(time.perf_counter() - start, flush=True)
    os._exit(0)  # a loader's workers and a process group have nothing left to say


class Way:
    """The processes of one way."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name = name
        count = args.threads if name in (PROCESSES, BOTH) else 1
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes = []
        for rank in range(count):
            environment = dict(os.environ)
            if name != PLAIN:
                environment |= {
                    "GOMP_SPINCOUNT": "2000",
                    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
                }  # as vitrm-train does
            if count > 1:  # as torchrun does
                environment |= {"RANK": str(rank), "WORLD_SIZE": str(count)}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            own = ["--way", name, "--preset", args.preset, "--recipe", args.recipe]
            own += ["--threads", str(args.threads // count), "--workers", str(args.workers)]
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, __file__, *own],
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )

    def seconds(self, batches: int) -> float:
        """How long `batches` batches take."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(f"{batches}\n")
            process.stdin.flush()
        answers = [process.stdout.readline() for process in self.processes if process.stdout is not None]
        if not all(answers):
            sys.exit(f"{self.name} has ended; what it said stands above")
        return max(float(answer) for answer in answers)

    def close(self) -> None:
        for process in self.processes:
            process.kill()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--preset", default="nano")
    p.add_argument("--recipe", default="fast")
    p.add_argument("--threads", type=int, default=physical_cores())
    p.add_argument("--workers", type=int, default=2, help="of the plain loop's DataLoader")
    p.add_argument("--rounds", type=int, default=8)
    p.add_argument("--batches", type=int, default=8, help="per round and way")
    p.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    p.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.way:
        take_turns(args)

    ways = [Way(name, args) for name in args.ways]
    rates: dict[str, list[float]] = {way.name: [] for way in ways}
    size = recipe(args.recipe).batch_size
    try:
        for way in ways:
            way.seconds(3)  # compiles, and warms up
        for _ in range(args.rounds):
            for way in ways:
                rates[way.name].append(args.batches * size / way.seconds(args.batches))
    finally:
        for way in ways:
            way.close()
    ratios = {way: np.array(found) / np.array(rates[args.ways[0]]) for way, found in rates.items()}
    what = "training throughput, images per second; each way in processes of its own, taking turns in one run"
    record = {
        **made(what, ("vitrm", "torch", "torchvision", "numpy")),
        "preset": args.preset,
        "recipe": args.recipe,
        "threads": args.threads,
        "workers": args.workers,
        "batch_size": size,
        "rounds": args.rounds,
        "batches": args.batches,
        "images_per_s": {name: [round(r, 1) for r in found] for name, found in rates.items()},
        "load": [round(v, 1) for v in os.getloadavg()],
        "ratio": {
            way: {"median": round(float(np.median(r)), 3), "min": round(float(r.min()), 3)} for way, r in ratios.items()
        },
    }
    path = RECORDS / f"training_throughput-{args.preset}-{args.threads}-{processor(record)}.json"
    write_json(path, record)
    for way_name, found in rates.items():
        ratio = np.median(ratios[way_name])
        print(f"{way_name:30} {np.median(found):7.1f} images/s, {ratio:.2f} × (medians of {args.rounds} rounds)")
    print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
