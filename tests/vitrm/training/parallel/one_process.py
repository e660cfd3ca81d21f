"""One of the processes of a run, as tests/vitrm/test_distributed.py starts them under torchrun.

    one_process.py OUT [--resume] [--send NAME RANK EPOCH BATCH]

With --send, process RANK sends itself that signal in that batch, before its state can be saved.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys

import numpy as np
import torch

from vitrm import data
from vitrm.config import ModelConfig, preset
from vitrm.data import Images, Splits
from vitrm.errors import run_command
from vitrm.recipe import Recipe, recipe
from vitrm.training.loop import TrainingResult, train
from vitrm.training.parallel.device import Execution
from vitrm.training.parallel.distributed import join

THRESHOLD = "VITRM_TEST_HALT_THRESHOLD"  # in the environment: which one decides something depends on torch's version
EXECUTION = Execution(device="cpu", precision="fp32", save_every=0.0)


def model() -> ModelConfig:
    """A recursive model whose tokenizer has batch norms."""
    return preset("nano", dim=16, heads=2, layers=1, latents=2, ffn_hidden=32, conv_width=4)


def everything() -> Recipe:
    """A recipe with everything that is drawn at random or decided on the way; batches of 17, so parts of 8 and 9."""
    threshold = float(os.environ[THRESHOLD])
    return recipe("paper", epochs=2, batch_size=17, lr=1e-3, n_sup=4, free_steps=1, flip="on", halt_threshold=threshold)


def few() -> Splits:
    """Four batches of digits, and more validation images than one process evaluates at once."""
    train_, validation, test = (_noisy(data.load("digits", split)) for split in data.SPLITS)
    more = validation.take(list(range(len(validation))) * 2)
    return Splits(train_.take(slice(0, 70)), more, test.take(slice(0, 40)))


def _noisy(images: Images) -> Images:
    """Digits with noise: in an even background a ReLU of all its pixels at once may hang on the last bit of a sum."""
    noise = np.random.default_rng(0).integers(0, 64, images.pixels.shape)
    return dataclasses.replace(images, pixels=(images.pixels * 0.75 + noise).astype(np.uint8))


def run(out: str, resume: bool = False, interrupt: tuple[int, int, int, int] | None = None) -> TrainingResult:
    """The run, whole or from its state on."""
    world = join(torch.device("cpu"))

    def on_batch(epoch: int, batch: int, losses: list[float]) -> None:
        if interrupt and (world.rank, epoch, batch) == interrupt[1:]:
            os.kill(os.getpid(), interrupt[0])

    result = train(
        model(), everything(), few(), out, seed=3, resume=resume, execution=EXECUTION, on_batch=on_batch, world=world
    )
    world.close()
    return result


def main(argv: object) -> None:
    p = argparse.ArgumentParser()
    p.add_argument("out")
    p.add_argument("--resume", action="store_true")
    p.add_argument("--send", nargs=4)
    args = p.parse_args()
    torch.set_num_threads(1)
    interrupt = None
    if args.send:
        name, *where = args.send
        rank, epoch, batch = (int(v) for v in where)
        interrupt = (getattr(signal, name), rank, epoch, batch)
    run(args.out, args.resume, interrupt)


if __name__ == "__main__":
    sys.exit(run_command(main))
