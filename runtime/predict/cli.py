"""`vitrm-predict`: parse, classify, print."""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from vitrm.command_line import CommandParser
from vitrm.errors import UserError, run_command
from vitrm.model_limits import MAX_STEPS
from vitrm.system.terminal import console, neutral_line, say

if TYPE_CHECKING:
    from vitrm.runtime.predict.predictions import Prediction
    from vitrm.runtime.session import Session

_EPILOG = """\
examples:
  vitrm-predict model.onnx photo.jpg               the five most probable classes
  vitrm-predict model.onnx photos/ --csv > labels.csv
  vitrm-predict stepwise/ 'photos/**/*.jpg' --halt-threshold 0.9 --top 1
  cat photo.jpg | vitrm-predict model.onnx - --json
  vitrm-predict model.onnx clip.mp4 --fps 2 --top 1
  vitrm-predict model.onnx camera --top 1          until Ctrl-C; camera:1 is the second one
  vitrm-predict model.onnx photos/ --annotate seen copies with the answer written on them

Pictures are prepared as the model was trained (its metadata says how): by default turned upright, laid on white where
transparent, and cut to their center square.

exit status: 0 all classified; 2 a picture could not be read (the others are classified), or the input was wrong; 130 interrupted.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command's entry point; returns its exit status."""
    return run_command(_main, argv)


def _parser() -> CommandParser:
    parser = CommandParser(
        "vitrm-predict",
        "Say which class is on a picture, with what vitrm-export wrote; torch is not needed.",
        _EPILOG,
    )
    parser.add_argument("artifact", metavar="ARTIFACT", help="an .onnx or .plan file, or a stepwise folder")
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="a picture, a video, a folder of pictures, a pattern, camera or camera:N, or - for a picture on standard input",
    )
    parser.add_argument("--top", type=int, default=5, metavar="N", help="classes named per picture (default: 5)")
    parser.add_argument("--steps", type=int, metavar="N", help="steps at most (default: the artifact's own)")
    parser.add_argument(
        "--halt-threshold",
        type=float,
        metavar="P",
        help="a picture is done once the model is that sure; 1 never halts (default: the artifact's own)",
    )
    parser.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help="pictures computed at once (default: 32; on a CPU 1 for a loop with a threshold, which waits for the last one)",
    )
    parser.add_argument(
        "--fps", type=float, metavar="N", help="frames of a second of video that are classified, at most (default: all)"
    )
    parser.add_argument(
        "--annotate",
        metavar="DIR",
        help="also write copies into DIR on which labels, probabilities and steps stand; of a video, a video",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or auto (default: cpu; a plan has its own)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: one for each core)")
    formats = parser.add_mutually_exclusive_group()
    formats.add_argument("--json", action="store_true", help="print one JSON object a line")
    formats.add_argument(
        "--csv", action="store_true", help="print CSV: path, label, probability, halt_prob, steps_used, seconds"
    )
    return parser


def _main(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    for name, low, high in (("top", 1, 100_000), ("steps", 1, MAX_STEPS), ("batch", 1, 4096), ("threads", 1, 1024)):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name} is {value}, expected {low} to {high}")

    if args.fps is not None and not 0 < args.fps <= 1000:
        raise UserError(f"--fps is {args.fps:g}, expected more than 0, at most 1000")

    import vitrm.runtime
    from vitrm.runtime.predict.sources import pictures
    from vitrm.runtime.predict.video import is_video, load_opencv

    with pictures(args.sources) as paths, ExitStack() as stack:
        if any(map(is_video, paths)):
            load_opencv()  # what is missing should not be found out after a thousand pictures
        session = vitrm.runtime.open(args.artifact, device=args.device, threads=args.threads)
        show = _json if args.json else _csv if args.csv else _table
        failed = show(_predictions(session, paths, args, stack))
    if failed:
        what = "files" if any(map(is_video, paths)) else "pictures"
        raise UserError(f"{failed} of {len(paths)} {what} could not be read: see above")
    return 0


def _predictions(
    session: Session, paths: list[Path], args: argparse.Namespace, stack: ExitStack
) -> Iterator[Prediction]:
    """The predictions; where asked for, each picture's copy has been written when its prediction is given."""
    from vitrm.runtime.predict.predictions import predict_with_pictures

    copies = None
    if args.annotate is not None:
        from vitrm.runtime.predict.annotate import Annotations

        copies = stack.enter_context(Annotations(Path(args.annotate), paths, args.fps))
    classified = predict_with_pictures(
        session,
        paths,
        top=args.top,
        steps=args.steps,
        halt_threshold=args.halt_threshold,
        batch=args.batch,
        rate=args.fps,
    )
    for prediction, picture in classified:
        if copies is not None and prediction.error is None:
            copies.add(prediction, picture.pixels())
        yield prediction


def _json(predictions: Iterable[Prediction]) -> int:
    failed = 0
    for prediction in predictions:
        failed += prediction.error is not None
        say(json.dumps(prediction.to_dict(), ensure_ascii=False))
    return failed


def _csv(predictions: Iterable[Prediction]) -> int:
    failed = 0
    say("path,label,probability,halt_prob,steps_used,seconds")
    for p in predictions:
        if p.error is not None:
            failed += 1
            _complain(p)
            continue
        for label, probability in zip(p.labels, p.probabilities, strict=True):
            line = io.StringIO()
            halt = "" if p.halt_prob is None else f"{p.halt_prob:.6f}"
            used = "" if p.steps_used is None else p.steps_used
            when = "" if p.seconds is None else f"{p.seconds:.3f}"
            csv.writer(line, lineterminator="").writerow([p.path, label, f"{probability:.6f}", halt, used, when])
            say(line.getvalue())
    return failed


def _table(predictions: Iterable[Prediction]) -> int:
    """One line a picture, as soon as it is known."""
    failed = 0
    for p in predictions:
        if p.error is not None:
            failed += 1
            _complain(p)
            continue
        found = "  ".join(
            f"{label} {100 * share:.1f} %" for label, share in zip(p.labels, p.probabilities, strict=True)
        )
        halting = "" if p.steps_used is None else f"  [{p.steps_used} step{'' if p.steps_used == 1 else 's'}]"
        when = "" if p.seconds is None else f"  {p.seconds:.2f} s"
        say(neutral_line(f"{p.path}{when}  {found}{halting}"))
    return failed


def _complain(prediction: Prediction) -> None:
    if sys.stderr.isatty():
        console(error=True).print(neutral_line(str(prediction.error)), style="red", soft_wrap=True)
    else:
        say(neutral_line(str(prediction.error)), error=True)


if __name__ == "__main__":
    sys.exit(main())
