"""Charts: a mark hides no other."""

from __future__ import annotations

import re

from vitrm.runtime.bench.report.charts import Series, line_chart


def test_rings_at_one_place_lie_around_each_other() -> None:
    rings = [Series(name, ((2.0, 0.5),), color, marks_only=True) for color, name in enumerate("abc")]
    apart = Series("d", ((1.0, 0.4),), 3, marks_only=True)
    chart = line_chart([*rings, apart], label="", x_label="", y_label="", y_text=str)
    radii = [float(r) for r in re.findall(r'class="ring"[^>]* r="([\d.]+)"', str(chart))]
    assert len(set(radii[:3])) == 3
    assert radii[3] == radii[0]
