"""A camera with a deadline: as many recursion steps for a frame as fit before the next one is due.

    vitrm-export runs/mine --graph stepwise -o mine-stepwise
    pip install 'vitrm[video]'
    python examples/video_loop.py mine-stepwise /dev/video0 --fps 15

A frame that the model is sure of ends early; a hard one gets what time is left, and is answered in any case.  `vitrm-predict mine.onnx
camera` is the same without a deadline.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import vitrm.runtime
from vitrm.data.decoding import fit
from vitrm.data.images import to_floats
from vitrm.runtime.predict.video import frames
from vitrm.runtime.stepping import SteppingSession


def main() -> None:
    """Prints a line a frame."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, help="a stepwise folder")
    parser.add_argument("video", type=Path, help="a camera's device file, or a video")
    parser.add_argument("--fps", type=float, default=15)
    parser.add_argument("--halt-threshold", type=float, default=0.9)
    parser.add_argument("--most-steps", type=int, default=6)
    args = parser.parse_args()
    session = vitrm.runtime.open(args.artifact, threads=1)
    if not isinstance(session, SteppingSession):
        parser.error(f"{args.artifact} is no stepwise folder: export with --graph stepwise")

    preprocessing, names = session.metadata.preprocessing, session.metadata.class_names
    for frame in frames(args.video, args.fps):
        due = time.monotonic() + 1 / args.fps
        state = session.start(to_floats(fit(frame.pixels, preprocessing))[None])
        longest = 0.0
        for _ in range(args.most_steps):
            began = time.monotonic()
            if not state.step(args.halt_threshold):
                break  # sure enough
            longest = max(longest, time.monotonic() - began)
            if time.monotonic() + longest > due:
                break  # another step would be late
        best = int(state.logits.argmax())
        left = 1000 * (due - time.monotonic())
        print(
            f"{frame.seconds:7.2f} s  {names[best]:20} sure {100 * state.halt_prob[0]:3.0f} %, "
            f"{state.steps_used[0]} steps, {left:4.0f} ms left",
            flush=True,
        )


if __name__ == "__main__":
    main()
