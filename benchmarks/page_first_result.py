"""How long a visitor waits for the page in the browser: from opening it to the first answer, and how much is downloaded.

    python benchmarks/page_first_result.py PAGE [--times 10]      # PAGE: a folder that vitrm-export --web wrote

Each time a new Chromium profile opens the page, with an empty cache, from a server on this machine: so these are the times of the
processor, and a network adds its own to them.  `opened` counts from the navigation; `loaded` from the moment when runtime and model
have been downloaded and are being prepared.  Writes records/page_first_result-PROCESSOR.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import RECORDS, made, processor

from vitrm.system.files import write_json
from vitrm.system.terminal import say

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
import browser

# Runs before the page's own scripts.
_WATCH = r"""
addEventListener('DOMContentLoaded', () => {
  const see = (id, name, test) => new MutationObserver(() => {
    if (!window[name] && test(document.getElementById(id).textContent)) window[name] = performance.now();
  }).observe(document.getElementById(id), { childList: true, characterData: true, subtree: true });
  see('status', 'downloadedAt', (text) => text.startsWith('Preparing'));
  see('top', 'answeredAt', (text) => /\w/.test(text) && text !== 'No picture yet');
});
"""


def measure(page: Path) -> dict[str, float]:
    """Returns seconds from opening a page, and from its download, to the first answer; and the bytes that were downloaded."""
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        browser.chromium(Path(folder) / "profile") as tab,
    ):
        tab.send("Page.addScriptToEvaluateOnNewDocument", source=_WATCH)
        with browser.served(page) as address:
            tab.open(address)
            answered = tab.wait("window.answeredAt")
            downloaded = tab.evaluate("window.downloadedAt")
            files = {request.removeprefix(address).split("?")[0] or "index.html" for request in tab.requests}
            assert not tab.problems, tab.problems
    return {
        "opened": answered / 1000,
        "loaded": (answered - downloaded) / 1000,
        "bytes": sum((page / file).stat().st_size for file in files if (page / file).is_file()),
    }


def main() -> None:
    """Measures, prints and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, metavar="PAGE")
    parser.add_argument("--times", type=int, default=10)
    args = parser.parse_args()
    found = [measure(args.page) for _ in range(args.times)]
    seconds: dict[str, Any] = {}
    for name in ("opened", "loaded"):
        values = sorted(one[name] for one in found)
        seconds[name] = {"median": statistics.median(values), "min": values[0], "max": values[-1]}
        say(f"{name}: median {seconds[name]['median']:.2f} s, {values[0]:.2f} to {values[-1]:.2f}, n = {len(values)}")
    settings = json.loads((args.page / "page.json").read_text(encoding="utf-8"))
    record = made("seconds from opening the page in the browser to its first answer", ["vitrm"])
    record["command"] = record["command"].replace(str(args.page), "PAGE")
    record |= {
        "page": settings["name"],
        "onnxruntime_web": settings["runtime"]["version"],
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "times": args.times,
        "seconds": seconds,
        "downloaded_bytes": found[0]["bytes"],
        "all_bytes": sum(file.stat().st_size for file in args.page.rglob("*") if file.is_file()),
    }
    write_json(RECORDS / f"page_first_result-{processor(record)}.json", record)
    say(f"{record['downloaded_bytes'] / 1e6:.1f} MB downloaded of {record['all_bytes'] / 1e6:.1f}")


if __name__ == "__main__":
    main()
