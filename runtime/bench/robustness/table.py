"""Text of what corrupted images do: a table for each artifact, and what follows from it in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vitrm.runtime.bench.case_names import file_and_settings
from vitrm.runtime.bench.report.numbers import digits, percent
from vitrm.runtime.bench.robustness.measure import (
    BROKEN,
    KEPT,
    SEVERITIES,
    UNCLEAR,
    Figures,
    Robustness,
    UnderCorruption,
)
from vitrm.system.terminal import neutral_line
from vitrm.system.text_table import TextRow, TextTable

if TYPE_CHECKING:
    from rich.console import Console

_WORST = SEVERITIES[-1]
_MARKS = {KEPT: "", UNCLEAR: " ?", BROKEN: " ✗"}  # behind a corruption's name, so that color is not needed
_TOO_SURE = 0.05  # by which halt_prob may exceed the share of right answers before that is a warning
_AT_WORST = f"at {_WORST}"
_WIDE = 120  # columns that a whole table needs


def title(found: Robustness) -> str:
    """Says whose table it is, and at which setting."""
    if found.steps is None:
        return found.name
    steps = f"{found.steps} step{'s' * (found.steps > 1)}"
    _, named = file_and_settings(found.name)  # the setting need not be said twice
    if found.halt_threshold is not None and found.halt_threshold < 1:
        return f"{found.name}, at most {steps}" + ("" if named else f", halting above {found.halt_threshold:g}")
    return f"{found.name}, {steps}" + ("" if named else ", never halting")


def figures(found: Robustness) -> list[str]:
    """Returns the names of the figures that are known: each has two columns, its mean over the severities and the worst one."""
    names = ["accuracy"]
    if found.clean.mean_steps_used is not None and found.halt_threshold is not None and found.halt_threshold < 1:
        names.append("steps")
    if found.clean.lost is not None:
        names.append("points lost")
    if found.clean.halt_ece is not None:
        names += ["halt_prob", "ECE"]
    return names


def head(found: Robustness) -> list[str]:
    """Returns the columns of a table with one line of heads."""
    return ["corruption", *(column for name in figures(found) for column in (name, _AT_WORST))]


def lines(found: Robustness) -> list[tuple[str, list[str], str]]:
    """Returns a line for the images as they are, one for each corruption and one for the mean.

    A line is its name, its cells, and whether halting keeps its budget.
    """
    clean = [cell for pair in zip(_cells(found, found.clean), _blank(found), strict=True) for cell in pair]
    made = [("none (clean)", clean, KEPT)]
    made.extend(
        (words(one) + _MARKS[one.budget or KEPT], _pairs(found, one.mean, one.severities[-1]), one.budget or KEPT)
        for one in found.corruptions
    )
    made.append(("mean", _pairs(found, found.mean, found.at(_WORST)), KEPT))
    return made


def _pairs(found: Robustness, mean: Figures, worst: Figures) -> list[str]:
    cells = zip(_cells(found, mean), _cells(found, worst), strict=True)
    return [cell for pair in cells for cell in pair]


def _blank(found: Robustness) -> list[str]:
    return [""] * len(_cells(found, found.clean))


def _cells(found: Robustness, of: Figures) -> list[str]:
    shown, decimals = figures(found), digits(found.images)
    every = {
        "accuracy": percent(of.accuracy, decimals),
        "steps": "–" if of.mean_steps_used is None else f"{of.mean_steps_used:.2f}",
        "points lost": "–" if of.lost is None else points(of.lost),
        "halt_prob": percent(of.mean_halt_prob, decimals),
        "ECE": percent(of.halt_ece, decimals),
    }
    return [every[name] for name in shown]


def points(share: float) -> str:
    """Writes a difference of accuracies in percentage points, without a negative zero."""
    return f"{round(share * 100, 2) + 0.0:.2f}".replace("-", "−")


def words(one: UnderCorruption) -> str:
    """Writes a corruption's name as prose has it."""
    return one.name.replace("_", " ").replace("jpeg", "JPEG")


# Sentences -------------------------------------------------------------------------------------


def basis(found: Sequence[Robustness]) -> list[str]:
    """Says what was measured on, one line for each data set."""
    told = []
    for one in found:
        part = f"all {one.total:,}" if one.images == one.total else f"{one.images:,} of the {one.total:,}"
        told.append(
            f"{len(one.corruptions)} corruptions at {len(SEVERITIES)} severities each, of {part} test images of {one.data} (seed "
            f"{one.seed}), made here the way CIFAR-10-C is; not its files. An accuracy on {one.images:,} images is known to "
            f"±{98 / one.images**0.5:.1f} points or better"
        )
    return list(dict.fromkeys(told))


def reading(found: Sequence[Robustness]) -> list[str]:
    """Says how the tables are read; nothing where there are none."""
    if not found:
        return []
    told = [f"columns: the mean over the severities, then severity {_WORST}"]
    if any(one.clean.lost is not None for one in found):
        told.append("points lost: by halting, against full depth on the same images" + _marks(found))
    if any(one.clean.halt_ece is not None for one in found):
        told.append(
            "mean of halt_prob: the share of answers that it expects to be right; ECE: its expected calibration error"
        )
    return told


def _marks(found: Sequence[Robustness]) -> str:
    """Explains the marks behind names, those that occur alone."""
    there = {corruption.budget for one in found for corruption in one.corruptions}
    said = {BROKEN: "✗: more than the budget", UNCLEAR: "?: more than the budget, but within chance"}
    shown = [text for budget, text in said.items() if budget in there]
    return f"; behind a corruption's name {', '.join(shown)}" if shown else ""


def most_told(group: Sequence[Robustness]) -> Robustness:
    """Returns the one of artifacts that are alike whose table says most: that halts, where one does."""
    return max(group, key=lambda one: one.clean.lost is not None)


def sentences(found: Sequence[Robustness]) -> list[tuple[str, bool]]:
    """Says what follows for artifacts that are alike, warnings first; each sentence with True for a warning.

    What is said of halt_prob is said of the one whose table is shown, in the name of all.
    """
    told = [_budget(one) for one in found if _halts(one)]
    one = most_told(found)
    if one.clean.mean_halt_prob is not None and one.mean.mean_halt_prob is not None:
        told.append(_trust(one, " and ".join(each.name for each in found)))
    return sorted(told, key=lambda sentence: not sentence[1])


def _trust(found: Robustness, name: str) -> tuple[str, bool]:
    """Says how many answers halt_prob expects to be right, and how many are; a warning where that is far too many."""

    def share(value: float | None) -> str:
        return percent(value, digits(found.images))

    clean, mean = found.clean, found.mean
    clean_ones = f"{share(clean.mean_halt_prob)} to be right, and {share(clean.accuracy)} are"
    corrupted = f"{share(mean.mean_halt_prob)} to be right, and {share(mean.accuracy)} are"
    if _excess(mean) <= _TOO_SURE:
        return (
            f"of the clean images halt_prob of {name} expects {clean_ones}; of the corrupted ones {corrupted}",
            False,
        )
    worst = max(found.corruptions, key=lambda one: _excess(one.mean))
    return (
        f"on corrupted images halt_prob of {name} is too sure: it expects {corrupted}; most under {words(worst)} "
        f"({share(worst.mean.mean_halt_prob)} expected, {share(worst.mean.accuracy)} right); of the clean ones it expects {clean_ones}",
        True,
    )


def _excess(figures: Figures) -> float:
    """Returns by how much halt_prob exceeds the share of right answers."""
    return 0.0 if figures.mean_halt_prob is None else figures.mean_halt_prob - figures.accuracy


def _halts(found: Robustness) -> bool:
    return found.halt_threshold is not None and found.halt_threshold < 1 and found.steps is not None and found.steps > 1


def _budget(found: Robustness) -> tuple[str, bool]:
    """Says under which corruptions halting gave up more than its budget: of the images seen, as others may differ."""
    if found.budget is None:
        return (
            f"what halting costs {found.name} under corruptions is not known, as its threshold is built in: a loop or stepwise "
            "artifact says it",
            False,
        )
    origin = {"chosen": "chosen now", "stored": "stored in it", "default": "the default, as it has none of its own"}
    budget = f"{found.budget * 100:g} points ({origin[found.budget_from or 'default']})"
    broken = [one for one in found.corruptions if one.budget == BROKEN]
    unclear = [one for one in found.corruptions if one.budget == UNCLEAR]
    seen = f"on these {found.images:,} images"
    kept = len(found.corruptions) - len(broken) - len(unclear)
    count = f"{len(found.corruptions)} corruption{'s' * (len(found.corruptions) > 1)}"
    if not broken and not unclear:
        return (
            f"halting of {found.name} gave up no more than its budget of {budget} {seen} under any of {count}, on average over "
            "severities",
            False,
        )
    told = []
    if broken:
        told.append(
            f"halting of {found.name} gave up more than its budget of {budget} {seen} under {len(broken)} of {count}, and not by "
            f"chance (95 % confidence each): {_losses(broken)}"
        )
    else:
        told.append(
            f"halting of {found.name} did not clearly give up more than its budget of {budget} {seen} under any of {count}"
        )
    if unclear:
        told.append(f"it gave up more, but within chance, under {_losses(unclear)}")
    told.append(f"it gave up no more under {kept}")
    return "; ".join(told), bool(broken)


def _losses(which: Sequence[UnderCorruption]) -> str:
    ordered = sorted(which, key=lambda one: -(one.mean.lost or 0))
    return ", ".join(
        f"{words(one)} ({points(one.mean.lost or 0)} ± {points(one.lost_error or 0)} points lost, "
        f"{points(one.severities[-1].lost or 0)} at severity {_WORST})"
        for one in ordered
    )


# Printing --------------------------------------------------------------------------------------


def corruption_tables(found: Sequence[Robustness], width: int | None = None) -> list[TextTable]:
    """Returns a table for each artifact; on a terminal that is too narrow, the worst severity for its accuracy alone."""
    tables = []
    for one in found:
        names, every = head(one), lines(one)
        whole = len(names) if width is None or width >= _WIDE else 3
        shown = [i for i, name in enumerate(names) if i < whole or name != _AT_WORST]
        rows = [
            TextRow(
                [[name, *cells][j] for j in shown],
                style={BROKEN: "red", UNCLEAR: "yellow"}.get(budget, ""),
                ends_section=i in (0, len(every) - 2),
            )
            for i, (name, cells, budget) in enumerate(every)
        ]
        heads = [names[j] for j in shown]
        tables.append(TextTable(heads, rows, left={"corruption"}, title=f"Corruptions: {title(one)}"))
    return tables


def print_corruptions(found: Sequence[Robustness], console: Console) -> None:
    """Prints the tables and, below them, what follows, to a `vitrm.system.terminal.console`."""
    for table in corruption_tables(found, console.width):
        table.print(console)
    for text, warns in _footer(found):
        console.print(text, style="red" if warns else "dim")


def plain_corruptions(found: Sequence[Robustness]) -> str:
    """Returns the same in letters alone: for devices without `rich`."""
    tables = [f"{table.plain()}\n" for table in corruption_tables(found)]
    return "\n".join([*tables, *(text for text, _ in _footer(found))])


def _footer(found: Sequence[Robustness]) -> list[tuple[str, bool]]:
    told = [sentence for one in found for sentence in sentences([one])]
    return [
        (neutral_line(("✗ " if warns else "") + text), warns)
        for text, warns in (*told, *((b, False) for b in (*basis(found), *reading(found))))
    ]
