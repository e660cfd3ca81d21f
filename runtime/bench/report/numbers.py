"""Numbers in words: no more digits than are true, and nothing rounded to what it is not."""

from __future__ import annotations


def percent(share: float | None, digits: int = 2) -> str:
    """Writes a share as a percentage that says 100 % only when it is: 0.99996 is "99.99 %"."""
    if share is None:
        return "–"
    text = f"{share * 100:.{digits}f}"
    if share < 1 and float(text) >= 100:
        text = f"{100 - 10.0**-digits:.{digits}f}"
    return f"{text} %"


def digits(images: int) -> int:
    """Returns the decimals of a percentage of so many images: one image is 0.1 % of 1,000, and 0.01 % of 10,000."""
    return 0 if images < 1000 else 1 if images < 10_000 else 2


def milliseconds(value: float | None) -> str:
    """Writes milliseconds with three significant digits."""
    if value is None:
        return "–"
    return (
        f"{value:.0f}"
        if value >= 100
        else f"{value:.1f}"
        if value >= 10
        else f"{value:.2f}"
        if value >= 1
        else f"{value:.3f}"
    )


def size(count: int | None) -> str:
    """Writes bytes in decimal units, as file managers and registries count."""
    if count is None:
        return "–"
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def number(value: float | None) -> str:
    """Writes a count or rate, with thousands apart."""
    return "–" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def times(value: float | None, span: tuple[float, float] | None, quiet: bool = True) -> str:
    """Writes a ratio: two decimals where rounds agree within a tenth and the machine was `quiet`, else their range."""
    if value is None or span is None:
        return "–"
    low, high = span
    return f"{value:.2f}" if quiet and high - low <= 0.1 * value else between(low, high, "–")


def between(low: float, high: float, to: str = " to ") -> str:
    """Writes a range with two significant digits: "3.1 to 4.4", or "3.1" where both ends are written alike."""
    texts = [_two_digits(low), _two_digits(high)]
    return to.join(dict.fromkeys(texts))


def _two_digits(value: float) -> str:
    rounded = float(f"{value:.2g}")
    return f"{rounded:,.0f}" if rounded >= 10 else f"{rounded:.1f}" if rounded >= 1 else f"{rounded:.2g}"
