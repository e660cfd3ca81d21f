"""Where a user's files lie that can be made, or fetched, anew."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """This user's cache folder of the project, made or not: in $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitrm"
