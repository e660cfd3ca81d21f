"""Figures in README.md and docs/ are those of their records."""

from __future__ import annotations

import json
from pathlib import Path

import figures
import pytest

PAGE = """<!-- figures: speed
rows/name=a/ms | .1f
rows/name=b/ms - rows/name=a/ms | *1000 | ,d
runs/median | .2f
cpu
-->
| way | ms |
|---|---|
| a | 3.1 ms |
| b | 1,500 µs more; 0.25 in the middle, on a Z80 |

The rest is prose.
"""


@pytest.fixture(autouse=True)
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"cpu": "Z80", "rows": [{"name": "a", "ms": 3.14}, {"name": "b", "ms": 4.64}], "runs": [0.1, 0.25, 0.9]}
    (tmp_path / "speed.json").write_text(json.dumps(values))
    monkeypatch.setattr(figures, "RECORDS", tmp_path)
    figures.read_record.cache_clear()


def test_every_figure_of_readme_and_docs_is_that_of_its_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "RECORDS", figures.ROOT / "benchmarks" / "records")
    assert figures.main([]) == 0


def test_figures_that_agree_pass() -> None:
    complaints, found = figures.check_page(PAGE, "page.md")
    assert not complaints
    assert [f.text() for f in found] == ["3.1", "1,500", "0.25", "Z80"]


@pytest.mark.parametrize(
    ("was", "becomes", "complaint"),
    [
        ("3.1 ms", "3.2 ms", "page.md:2: speed says 3.1"),
        ("1,500", "1,501", "page.md:3: speed says 1,500"),
        ("0.25", "0.255", "page.md:4: speed says 0.25"),
        ("Z80 |", "8086 |", "page.md:5: speed says Z80"),
        ("rows/name=a/ms |", "rows/name=c/ms |", "speed has no 'rows/name=c/ms'"),
        ("figures: speed", "figures: haste", "there is no record haste"),
        ("is prose", "is 12 % faster", "page.md:12: '12 %' has no record"),
        ("is prose", "has 7.5 of them", "page.md:12: '7.5' has no record"),
        ("3.1 ms |", "3.1 ms, once 2.9 ms |", "'2.9 ms' has no record"),
    ],
)
def test_a_figure_that_was_changed_is_found(was: str, becomes: str, complaint: str) -> None:
    assert was in PAGE
    complaints, _ = figures.check_page(PAGE.replace(was, becomes, 1), "page.md")
    assert any(complaint in c for c in complaints), complaints


def test_what_measures_nothing_is_named() -> None:
    page = "A budget of 0.3 points in `0.5 ms` of TensorRT 10.3.\n"
    assert len(figures.check_page(page, "p.md")[0]) == 2
    assert not figures.check_page(page + '<!-- not measured: "0.3 points", "10.3" -->', "p.md")[0]
