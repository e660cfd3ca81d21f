"""The pictures that README and docs show, made anew: screenshots of the page and of the report, and the curves of the bundled model.

    make pictures DATA=DIR           # DIR: CIFAR-10
    python benchmarks/pictures.py --data-dir DIR [--only page,report,curves] [--page FOLDER]

Needs Chromium or Chrome, and onnxruntime-web (make web-runtime).  Writes docs/pictures/, each PNG with at most 256 colors and
200 kB.  The report's is of a bench on this machine: its figures are not evidence, those are in records/.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from vitrm import checkpoint as checkpoints
from vitrm.checkpoint import Checkpoint
from vitrm.errors import UserError
from vitrm.export import export
from vitrm.export.web.page import write_page
from vitrm.runtime.bench.report.page import render
from vitrm.runtime.bench.run import bench
from vitrm.system.files import atomic_path
from vitrm.system.terminal import say
from vitrm.training.run_folder.curves import draw_curves

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))
import browser  # noqa: E402

PICTURES = ROOT / "docs" / "pictures"
MODEL, STEPS, THRESHOLD = "nano-v2-cifar10", 6, 0.9
LARGEST = 200_000  # bytes
FLAT = 48  # colors of a picture that stay as they are
_ANSWERED = "document.querySelector('#saving')?.dataset.done === 'true' && document.querySelector('#answer').dataset.done === 'true'"
_UNTIMED = "document.getElementById('times').style.display = 'none'"
_READY = "document.readyState === 'complete' && document.querySelector('svg') !== null && [...document.images].every((i) => i.complete)"


def main() -> None:
    """Makes what is asked for."""
    makers: dict[str, Callable[[argparse.Namespace], None]] = {
        "page": page_pictures,
        "report": report_pictures,
        "curves": curve_pictures,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="the folder of CIFAR-10 (default: $VITRM_DATA, else data)")
    parser.add_argument("--only", default=",".join(makers), help="what to make (default: %(default)s)")
    parser.add_argument(
        "--page", type=Path, metavar="FOLDER", help="a page that vitrm-export --web wrote; default: made here"
    )
    args = parser.parse_args()
    PICTURES.mkdir(exist_ok=True)
    for name in args.only.split(","):
        if name not in makers:
            raise UserError(f"--only {name}: expected some of {', '.join(makers)}")
        makers[name](args)


def model_shown() -> Checkpoint:
    """The bundled model with glimpses: its later steps see something new."""
    return checkpoints.load(MODEL).with_glimpses("mirror")


def page_pictures(args: argparse.Namespace) -> None:
    """Makes the page in the browser: on a desk and on a phone, light and dark, without the times that this machine took."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        page = args.page or write_page(model_shown(), Path(folder) / "page", data_dir=args.data_dir).folder
        with browser.chromium(Path(folder) / "profile") as tab, browser.served(page) as address:
            for dark in (False, True):
                look = "dark" if dark else "light"
                tab.open(address, width=1180, height=980, dark=dark)
                tab.wait(_ANSWERED)
                tab.evaluate(_UNTIMED)
                # Down to the knobs: what is below explains, and is read on the page.
                height = tab.evaluate("document.querySelector('#knobs').getBoundingClientRect().bottom + 7")
                save(tab, f"page-{look}", 1180, height)
                tab.open(address, width=390, height=844, dark=dark)
                tab.wait(_ANSWERED)
                tab.evaluate(_UNTIMED)
                height = tab.evaluate("document.querySelector('#steps').getBoundingClientRect().bottom + 5")
                save(tab, f"page-phone-{look}", 390, height)


def report_pictures(args: argparse.Namespace) -> None:
    """Makes the beginning of a report: on a desk, light and dark."""
    checkpoint = model_shown()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        files = [
            export(
                checkpoint,
                Path(folder) / f"{MODEL}-{precision}",
                steps=STEPS,
                graph="stepwise",
                precision=precision,
                data_dir=args.data_dir,
            ).path
            for precision in ("fp32", "int8")
        ]
        found = bench(
            files,
            data_dir=args.data_dir,
            limit=2000,
            batches=(1, 32),
            halt_thresholds=(1, THRESHOLD),
            depths=True,
            threads=1,
        )
        site = Path(folder) / "report"
        site.mkdir()
        (site / "index.html").write_text(render(found), encoding="utf-8")
        photograph_report(site, Path(folder) / "profile")


def photograph_report(site: Path, profile: Path) -> None:
    """Photographs the report in the folder `site`: its figures, and what halting saves."""
    place = (
        "(() => { const named = [...document.querySelectorAll('main section')].find("
        "section => section.querySelector('h2').textContent.includes('%s'));"
        "const box = named.getBoundingClientRect(); return [box.top, box.bottom + 16]; })()"
    )
    with browser.chromium(profile) as tab, browser.served(site) as address:
        for dark in (False, True):
            tab.open(address, width=1180, height=900, dark=dark)
            tab.wait(_READY)
            look = "dark" if dark else "light"
            save(tab, f"report-{look}", 1180, tab.evaluate(place % "Results")[1])
            top, bottom = tab.evaluate(place % "halting saves")
            save(tab, f"report-halting-{look}", 1180, bottom - top, top)


def curve_pictures(args: argparse.Namespace) -> None:
    """Draws the curves of the bundled model's training, as vitrm-train draws them, from its record."""
    record = json.loads((ROOT / "benchmarks" / "records" / f"{MODEL}-training.json").read_text(encoding="utf-8"))
    history = record["stages"][-1]["epochs"]
    best = max(history, key=lambda line: sum(line["validation_accuracy"]))["epoch"]
    path = PICTURES / "curves.svg"
    draw_curves(history, path, f"Training of {MODEL}", best)
    say(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1e3:.0f} kB")


def save(tab: browser.Tab, name: str, width: int, height: float, top: float = 0) -> None:
    """Writes a screenshot of `height` pixels of the page below `top`, with as few colors as keep it small."""
    shot = tab.screenshot_bytes(width=width, height=height, top=top)
    with Image.open(io.BytesIO(shot)) as picture:
        small = with_few_colors(picture.convert("RGB"))
    path = PICTURES / f"{name}.png"
    with atomic_path(path) as temporary:
        small.save(temporary, "PNG", optimize=True)
    size = path.stat().st_size
    say(f"{path.relative_to(ROOT)}: {small.width} × {small.height}, {size / 1e3:.0f} kB")
    if size > LARGEST:
        raise UserError(f"{path} has {size:,} bytes, at most {LARGEST:,} are wanted: show less of the page")


def with_few_colors(picture: Image.Image) -> Image.Image:
    """Returns an RGB picture with a palette of 256 colors, the most frequent of them its own.

    A quantizer alone shifts grounds and panels, which are flat and nearly alike, toward the colors of photos.
    """
    pixels = np.asarray(picture).reshape(-1, 3)
    colors, place, counts = np.unique(pixels, axis=0, return_inverse=True, return_counts=True)
    flat = colors[np.argsort(-counts, kind="stable")[:FLAT]]
    rest = picture.quantize(256 - FLAT, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    palette = np.unique(np.concatenate([flat, np.reshape(rest.getpalette(), (-1, 3)).astype(np.uint8)]), axis=0)
    a, b = colors.astype(np.float32), palette.astype(np.float32)
    nearest = ((b**2).sum(1) - 2 * a @ b.T).argmin(1).astype(np.uint8)
    small = Image.fromarray(nearest[place.reshape(picture.height, picture.width)], "P")
    small.putpalette(palette.tobytes())
    return small


if __name__ == "__main__":
    main()
