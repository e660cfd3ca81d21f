"""Numbers in words: no more digits than are true."""

from __future__ import annotations

from vitrm.runtime.bench.report.numbers import between, digits, milliseconds, percent, size, times


def test_numbers_do_not_flatter() -> None:
    assert percent(1.0) == "100.00 %"
    assert percent(0.99999) == "99.99 %"
    assert percent(0.9876) == "98.76 %"
    assert percent(None) == "–"
    assert [percent(2 / 3, digits(n)) for n in (999, 1000, 9999, 10_000)] == ["67 %", "66.7 %", "66.7 %", "66.67 %"]
    assert percent(0.999, digits(24)) == "99 %"
    assert [milliseconds(v) for v in (0.1234, 1.234, 12.34, 1234.5)] == ["0.123", "1.23", "12.3", "1234"]
    assert [size(v) for v in (468_835, 14_500_000)] == ["469 kB", "14.5 MB"]


def test_a_ratio_is_a_range_where_rounds_differ_or_the_machine_was_busy() -> None:
    assert times(3.52, (3.45, 3.60)) == "3.52"
    assert times(3.52, (3.45, 3.60), quiet=False) == "3.5–3.6"
    assert times(69.14, (40.2, 91.3)) == "40–91"
    assert times(None, None) == "–"
    assert [between(*span) for span in ((69.1, 72.9), (3.11, 3.14), (0.917, 2.08))] == [
        "69 to 73",
        "3.1",
        "0.92 to 2.1",
    ]
