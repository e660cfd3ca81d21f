"""Answers images with an artifact and saves the logits: `int8_exactness.py` starts it as another processor would run it.

    python benchmarks/answers.py FILE PIXELS.npy LOGITS.npy

Pixels are uint8 [N, 3, H, W], logits float32 [N, classes].
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import vitrm.runtime
from vitrm.runtime.bench.accuracy import predict

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("file", "pixels", "logits"):
        p.add_argument(name, type=Path)
    args = p.parse_args()
    np.save(args.logits, predict(vitrm.runtime.open(args.file, threads=1), np.load(args.pixels)).logits)
