"""Kills training, calibration and export 20 times with `kill -9`, at random moments, and looks at what is left.

    python benchmarks/kill_torture.py [--kills 20] [--seed 0]

A run is trained uninterrupted. The same run is trained again, killed at random moments and resumed; half-way its folder is
moved to another place. Then exports with and without calibration are killed, each beside a good file of an earlier
export, and started again. After every kill all files are opened: each must be whole, the earlier one or the new one. In
the end weights and metrics must equal those of the uninterrupted run bit for bit, and the exports must answer alike.
A disk that is full (a small tmpfs, where mounting is allowed) must stop training with one line and the last state kept.
Writes benchmarks/records/kill_torture.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from record import RECORDS, made

from vitrm import checkpoint
from vitrm.calib.calibration import load_calibration
from vitrm.data import load
from vitrm.files import sha256_of, write_json
from vitrm.runtime import open as open_artefact
from vitrm.training_state import STATE_FILE, read_header

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ""}
RUN = ["--data", "digits", "--model", "tiny", "--device", "cpu", "--save-every", "0.3", "--seed", "4"]
TIMES = ("seconds", "images_per_s")


def command(name: str, *argv: object) -> list[str]:
    module = {"train": "vitrm.cli", "export": "vitrm.export.cli"}[name]
    return [sys.executable, "-m", module, *map(str, argv)]


def finish(argv: list[str]) -> float:
    """Runs a command to its end, which must be a good one; its seconds."""
    start = time.monotonic()
    ended = subprocess.run(argv, env=ENVIRONMENT, text=True, capture_output=True, check=False)
    if ended.returncode:
        raise SystemExit(f"{' '.join(argv)} ended with {ended.returncode}:\n{ended.stdout}{ended.stderr}")
    return time.monotonic() - start


def kill_after(argv: list[str], seconds: float, started: bool = False) -> bool:
    """Starts a command and kills it after `seconds`, with `started` counted from its first line; False if it had ended."""
    with subprocess.Popen(argv, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        if started:
            process.stdout.readline()
        try:
            process.wait(seconds)
            if process.returncode:
                raise SystemExit(f"{' '.join(argv)} ended by itself with {process.returncode}")
            return False
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            return True


def check_run(folder: Path) -> dict[str, object]:
    """Opens every file of a run folder; where training stands."""
    if not (folder / STATE_FILE).exists():
        return {"epoch": None}
    header = read_header(folder / STATE_FILE)
    if (folder / checkpoint.WEIGHTS_FILE).exists() and (folder / checkpoint.CONFIG_FILE).exists():
        checkpoint.load(folder).build()
    if (folder / "metrics.jsonl").exists():
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {"epoch": header["epoch"], "batch": header["batch"]}


def fingerprint(folder: Path) -> dict[str, object]:
    """What must be equal in the end."""
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "weights": checkpoint.load(folder).weights_id,
        "state": read_header(folder / STATE_FILE)["checksum"],
        "metrics": [{k: v for k, v in line.items() if k not in TIMES} for line in metrics],
        "test_accuracy": checkpoint.load(folder).training["test_accuracy"],
    }


def torture_training(kills: int, epochs: int, folder: Path, dice: random.Random) -> dict[str, object]:
    whole, killed, moved = folder / "whole", folder / "killed", folder / "elsewhere" / "moved"
    train = command("train", *RUN, "--epochs", epochs, "--out")
    seconds = finish([*train, str(whole)])
    print(f"uninterrupted: {seconds:.0f} s", flush=True)
    at: list[dict[str, object]] = []
    here = killed
    while len(at) < kills:
        if len(at) == kills // 2 and here.exists():
            moved.parent.mkdir(exist_ok=True)
            here = here.rename(moved)
        resume = (here / STATE_FILE).exists()
        argv = command("train", "--resume", "--save-every", "0.3", "--out", here) if resume else [*train, str(here)]
        # Every sixth time while the program starts; the others fall, all together, within the run.
        early = len(at) % 6 == 5
        if not kill_after(argv, dice.uniform(0.0, 4.0 if early else 1.4 * seconds / kills), started=not early):
            break
        at.append(check_run(here))
        print(f"  training killed at {at[-1]}", flush=True)
    if not read_header(here / STATE_FILE)["test_accuracy"]:
        finish(command("train", "--resume", "--out", here))
    equal = fingerprint(here) == fingerprint(whole)
    left = sorted(p.name for p in here.iterdir() if p.name.startswith("."))
    return {"kills": len(at), "at": at, "equal": equal, "leftovers": left, "uninterrupted_s": round(seconds, 1)}


def torture_export(kills: int, int8: bool, run: Path, folder: Path, dice: random.Random) -> dict[str, object]:
    artefact, ranges = folder / ("int8.onnx" if int8 else "fp32.onnx"), folder / "ranges.json"
    more = ["--int8", "--calibration", ranges] if int8 else ["--graph", "loop"]
    argv = command("export", run, "--steps", 4, *more, "-o", artefact)
    seconds = finish(argv)
    images = load("digits", "test").floats(slice(0, 32))
    expected = open_artefact(artefact).infer(images).logits
    damaged, count, tries = 0, 0, 0
    before = sha256_of(artefact)
    while count < kills and tries < 3 * kills:
        tries += 1
        if int8 and tries % 2:
            ranges.unlink(missing_ok=True)  # every other time ranges are measured anew, else read
        if not kill_after(argv, dice.uniform(0.3, 1.0) * seconds):
            continue
        count += 1
        found = open_artefact(artefact).infer(images).logits
        if not np.allclose(found, expected, atol=1e-5):
            damaged += 1
        if ranges.exists():
            load_calibration(ranges, checkpoint.load(run), 4)
        print(
            f"  export {'int8' if int8 else 'fp32'} killed, file {'as before' if sha256_of(artefact) == before else 'new'}"
        )
        finish(argv)
    again = open_artefact(artefact).infer(images).logits
    left = sorted(p.name for p in folder.iterdir() if p.name.startswith("."))
    return {
        "kills": count,
        "damaged": damaged,
        "equal": bool(np.allclose(again, expected, atol=1e-5)),
        "leftovers": left,
        "export_s": round(seconds, 1),
    }


def full_disk(folder: Path) -> dict[str, object]:
    """Trains on a file system of 3 MB, which fills up: after the first state, before the second has room beside it."""
    disk = folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        return {"skipped": mounted.stderr.strip() or "mounting a tmpfs is not allowed here"}
    try:
        argv = command("train", *RUN, "--epochs", 3, "--limit-train", 256, "--out", disk / "run")
        ended = subprocess.run(argv, env=ENVIRONMENT, text=True, capture_output=True, check=False)
        state = check_run(disk / "run")
        room = [p.name for p in (disk / "run").iterdir() if p.name.startswith(".")]
        shutil.copytree(disk / "run", folder / "rescued")
    finally:
        subprocess.run(["umount", disk], check=True)
    finish(command("train", "--resume", "--out", folder / "rescued"))
    message = ended.stderr.strip().replace(f"{folder}/", "")
    return {"exit": ended.returncode, "message": message, "state": state, "leftovers": room}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--kills", type=int, default=20)
    p.add_argument("--epochs", type=int, default=16)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    dice = random.Random(args.seed)
    of_export = max(1, args.kills // 5)
    with tempfile.TemporaryDirectory(prefix="kill-torture-") as name:
        folder = Path(name)
        training = torture_training(args.kills - 2 * of_export, args.epochs, folder, dice)
        plain = torture_export(of_export, False, folder / "whole", folder, dice)
        int8 = torture_export(of_export, True, folder / "whole", folder, dice)
        disk = full_disk(folder)
    record = {
        **made(
            "training, export and calibration under kill -9 at random moments; a full disk",
            ("vitrm", "torch", "onnxruntime"),
        ),
        "seed": args.seed,
        "kills": training["kills"] + plain["kills"] + int8["kills"],  # type: ignore[operator]
        "training": training,
        "export": plain,
        "calibration and int8 export": int8,
        "full disk": disk,
    }
    write_json(RECORDS / "kill_torture.json", record)
    good = all(part["equal"] and not part["leftovers"] for part in (training, plain, int8)) and not (
        plain["damaged"] or int8["damaged"]
    )
    print(json.dumps({k: v for k, v in record.items() if k != "training"}, indent=1))
    print(f"{record['kills']} kills: {'all whole and equal' if good else 'SOMETHING IS DAMAGED OR DIFFERENT'}")
    sys.exit(not good)


if __name__ == "__main__":
    main()
