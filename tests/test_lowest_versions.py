"""What `make test-lowest` installs is what pyproject.toml promises."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib comes with Python 3.11")
def test_every_lower_bound_is_tried():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    promised = dict(re.findall(r"^([\w-]+)>=([\d.]+)", "\n".join([*project["dependencies"], *extras["cpu"]]), re.M))
    own = dict(re.findall(r"^(pytest|hypothesis)>=([\d.]+)", "\n".join(extras["dev"]), re.M))
    tried = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "tests" / "lowest-versions.txt").read_text(), re.M))
    assert tried.keys() == promised.keys() | own.keys()
    for name, bound in (promised | own).items():
        assert re.fullmatch(rf"{re.escape(bound)}(\.0)*", tried[name]), f"{name}: {tried[name]} tried, {bound} promised"
