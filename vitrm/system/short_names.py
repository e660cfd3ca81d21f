"""Names shortened in the middle: their beginning says what they are, their end of which kind, and no two become one."""

from __future__ import annotations

from collections.abc import Sequence

_CUT, _SETTING = "…", " · "
_SUFFIX = 9  # letters up to which an end that several names share stays whole: .onnx
_ALIKE = 3  # letters by which two names are taken for relatives
_KEPT = 3  # letters that stay of a beginning or an end that several names share


def shorten(name: str, length: int) -> str:
    """Returns `name` in at most `length` letters, of which one says that its middle is missing."""
    if len(name) <= length:
        return name
    if length < 3:
        return name[: max(length - 1, 0)] + _CUT
    end = (length - 1) * 2 // 3  # files of one run differ there: -s6-int8.onnx
    return name[: length - 1 - end] + _CUT + name[len(name) - end :]


def shorten_all(names: Sequence[str], length: int) -> list[str]:
    """Shortens every one of `names` to `length` letters; two that differ still differ, if need be in more letters.

    What follows a " · ", a setting, stays as it is.
    """
    parts = [name.partition(_SETTING) for name in names]
    room = max(length - max((len(mark + setting) for _, mark, setting in parts), default=0), 2 * _KEPT + 1)
    short = dict(zip(names, names, strict=True))
    files = list(dict.fromkeys(file for name, (file, _, _) in zip(names, parts, strict=True) if len(name) > length))
    shown = dict(zip(files, _shorten_apart(files, room), strict=True))
    for name, (file, mark, setting) in zip(names, parts, strict=True):
        if len(name) > length:
            short[name] = shown[file] + mark + setting
    distinct = len(set(short.values())) == len(short)
    return [short[name] if distinct else name for name in names]


def _shorten_apart(names: Sequence[str], length: int) -> list[str]:
    short = {name: shorten(name, length) for name in names}
    for alike in _relatives([name for name in names if len(name) > length]):
        apart = _apart(alike, length)
        if max(map(len, apart)) <= length or len({short[name] for name in alike}) < len(alike):
            short |= zip(alike, apart, strict=True)
    return [short[name] for name in names]


def _relatives(names: Sequence[str]) -> list[list[str]]:
    """Groups names that begin and end alike; those that are alone are left out."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        groups.setdefault((name[:_ALIKE], name[-_ALIKE:]), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _apart(names: Sequence[str], length: int) -> list[str]:
    """Shortens what all of `names` have in common at their beginning and end, and leaves what tells them apart."""
    head = _common(names)
    tail = _common([name[head:][::-1] for name in names])
    middle = max(map(len, names)) - head - tail
    room = max(length - middle, 2 * _KEPT)
    after = tail if tail < min(room, _SUFFIX) else min(tail, max(room - head, room // 2))
    before = min(head, room - after)
    return [
        shorten(name[:head], before) + name[head : len(name) - tail] + shorten(name[len(name) - tail :], after)
        for name in names
    ]


def _common(names: Sequence[str]) -> int:
    """Returns how many letters all of `names` begin with alike."""
    places = zip(*names, strict=False)  # as far as the shortest goes
    return next((i for i, letters in enumerate(places) if len(set(letters)) > 1), min(map(len, names)))
