"""`vitrm-predict`: parse, classify, print."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from vitrm.command_line import CommandParser
from vitrm.errors import UserError, run_command
from vitrm.model_size import MAX_STEPS
from vitrm.system.terminal import console, neutral_line, say

if TYPE_CHECKING:
    from vitrm.runtime.predict.predictions import Prediction

_EPILOG = """\
examples:
  vitrm-predict model.onnx photo.jpg               the five most probable classes
  vitrm-predict model.onnx photos/ --csv > labels.csv
  vitrm-predict stepwise/ 'photos/**/*.jpg' --halt-threshold 0.9 --top 1
  cat photo.jpg | vitrm-predict model.onnx - --json

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
        "sources", nargs="+", metavar="SOURCE", help="a picture, a folder, a pattern, or - for standard input"
    )
    parser.add_argument("--top", type=int, default=5, metavar="N", help="classes named per picture (default: 5)")
    parser.add_argument("--steps", type=int, metavar="N", help="steps at most (default: the artifact's own)")
    parser.add_argument(
        "--halt-threshold",
        type=float,
        metavar="P",
        help="a picture is done once the model is that sure; 1 never halts (default: the artifact's own)",
    )
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="pictures computed at once (default: 32)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or auto (default: cpu; a plan has its own)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: one for each core)")
    formats = parser.add_mutually_exclusive_group()
    formats.add_argument("--json", action="store_true", help="print one JSON object a line")
    formats.add_argument(
        "--csv", action="store_true", help="print CSV: path, label, probability, halt_prob, steps_used"
    )
    return parser


def _main(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    for name, low, high in (("top", 1, 100_000), ("steps", 1, MAX_STEPS), ("batch", 1, 4096), ("threads", 1, 1024)):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name} is {value}, expected {low} to {high}")

    import vitrm.runtime
    from vitrm.runtime.predict.predictions import predict
    from vitrm.runtime.predict.sources import pictures

    with pictures(args.sources) as paths:
        session = vitrm.runtime.open(args.artifact, device=args.device, threads=args.threads)
        predictions = predict(
            session, paths, top=args.top, steps=args.steps, halt_threshold=args.halt_threshold, batch=args.batch
        )
        show = _json if args.json else _csv if args.csv else _table
        failed = show(predictions, len(paths))
    if failed:
        raise UserError(f"{failed} of {len(paths)} pictures could not be read: see above")
    return 0


def _json(predictions: Iterable[Prediction], count: int) -> int:
    failed = 0
    for prediction in predictions:
        failed += prediction.error is not None
        say(json.dumps(prediction.to_dict(), ensure_ascii=False))
    return failed


def _csv(predictions: Iterable[Prediction], count: int) -> int:
    failed = 0
    say("path,label,probability,halt_prob,steps_used")
    for p in predictions:
        if p.error is not None:
            failed += 1
            _complain(p)
            continue
        for label, probability in zip(p.labels, p.probabilities, strict=True):
            line = io.StringIO()
            halt = "" if p.halt_prob is None else f"{p.halt_prob:.6f}"
            used = "" if p.steps_used is None else p.steps_used
            csv.writer(line, lineterminator="").writerow([p.path, label, f"{probability:.6f}", halt, used])
            say(line.getvalue())
    return failed


def _table(predictions: Iterable[Prediction], count: int) -> int:
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
        say(neutral_line(f"{p.path}  {found}{halting}"))
    return failed


def _complain(prediction: Prediction) -> None:
    if sys.stderr.isatty():
        console(error=True).print(neutral_line(str(prediction.error)), style="red", soft_wrap=True)
    else:
        say(neutral_line(str(prediction.error)), error=True)


if __name__ == "__main__":
    sys.exit(main())
