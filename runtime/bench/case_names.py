"""Names of cases: an artifact's file, and behind it the depth and threshold at which it is measured, where there are several."""

from __future__ import annotations

from collections.abc import Iterable

_BETWEEN = " · "


def case_name(file: str, settings: Iterable[str]) -> str:
    """Names a case of a file at some settings."""
    return _BETWEEN.join([file, *settings])


def file_and_settings(name: str) -> tuple[str, str]:
    """Splits a case's name; the settings are empty where it has none."""
    file, _, settings = name.partition(_BETWEEN)
    return file, settings
