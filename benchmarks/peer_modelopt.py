"""What NVIDIA ModelOpt makes of a float32 file, as an artifact that vitrm-bench measures beside ours.

    python -m venv modelopt && modelopt/bin/pip install "nvidia-modelopt[onnx]"      # it pins an older onnx: its own environment
    python benchmarks/peer_modelopt.py mine-6steps-fp32.onnx --python modelopt/bin/python [--data-dir DIR]
    vitrm-bench mine-6steps-fp32.onnx mine-6steps-fp32.modelopt.onnx

ModelOpt gets 128 training images and its defaults, on the CPU.  Says how many weights became int8, and how large the file is.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx

import vitrm.runtime
from vitrm.errors import UserError, run_command
from vitrm.runtime.artifact.graph_names import HALT_THRESHOLD, PIXELS, STEPS
from vitrm.runtime.artifact.onnx_file import inspect, write_metadata
from vitrm.runtime.bench.images import load_sample
from vitrm.runtime.bench.peers import count_int8_initializers

IMAGES = 128


def main(argv: list[str] | None) -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("file", type=Path, help="a float32 .onnx file that vitrm-export wrote")
    p.add_argument("--python", required=True, help="the Python of an environment with nvidia-modelopt[onnx]")
    p.add_argument("--data-dir", help="where the run's data set is")
    args = p.parse_args(argv)
    session = vitrm.runtime.open(args.file)
    m, made = session.metadata, args.file.with_suffix(".modelopt.onnx")
    sample = load_sample(m, str(args.file), data_dir=args.data_dir, limit=IMAGES, split="train")
    feeds: dict[str, np.ndarray] = {PIXELS: sample.batch(len(sample), 0)}
    if session.takes_depth:
        feeds |= {STEPS: np.asarray(m.steps, np.int64), HALT_THRESHOLD: np.asarray(m.halt_threshold, np.float32)}
    with tempfile.TemporaryDirectory() as folder:
        images, raw = Path(folder) / "images.npz", Path(folder) / "int8.onnx"
        np.savez(images, **feeds)
        source = Path(folder) / args.file.name  # ModelOpt writes into the file that it reads
        shutil.copyfile(args.file, source)
        words = ["-m", "modelopt.onnx.quantization", f"--onnx_path={source}", "--quantize_mode=int8"]
        words += [f"--calibration_data_path={images}", "--calibration_eps", "cpu", f"--output_path={raw}"]
        done = subprocess.run([args.python, *words], cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode or not raw.exists():
            said = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
            raise UserError(f"ModelOpt could not quantize {args.file}: {said[-1][:300]}")
        model = onnx.load(raw)
        onnx.save(model, made)  # with its weights inside
    write_metadata(made, made, replace(inspect(args.file).metadata, precision="int8"))
    before, after = args.file.stat().st_size, made.stat().st_size
    print(
        f"{made}: {count_int8_initializers(model.graph)} int8 weight tensors, {after / 1e6:.2f} MB, {after / before:.2f} × {args.file}"
    )


if __name__ == "__main__":
    sys.exit(run_command(main, None))
