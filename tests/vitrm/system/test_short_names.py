"""Shortened names: as long as they may be, and never two alike."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from vitrm.system.short_names import shorten, shorten_all


def test_a_name_keeps_its_beginning_and_more_of_its_end() -> None:
    assert shorten("nano.onnx", 9) == "nano.onnx"
    assert shorten("experiment-of-a-long-afternoon-s6-int8.onnx", 24) == "experime…on-s6-int8.onnx"
    assert [shorten("abcdef", n) for n in (1, 2, 3)] == ["…", "a…", "a…f"]


def test_what_tells_names_apart_stays_wherever_it_is() -> None:
    names = [f"a-very-long-{kind}-name-for-an-artifact-of-this-year.onnx" for kind in ("fp32", "int8")]
    short = shorten_all([*names, "b.onnx"], 20)
    assert "fp32" in short[0]
    assert "int8" in short[1]
    assert short[2] == "b.onnx"
    assert max(map(len, short)) <= 20


def test_a_setting_stays_whole() -> None:
    names = ["nano-v2-cifar10-loop-int8.onnx · halting at 0.9", "nano-v2-cifar10-loop-fp32.onnx · halting at 0.9"]
    assert shorten_all(names, 28) == ["n…int8.onnx · halting at 0.9", "n…fp32.onnx · halting at 0.9"]


@given(st.lists(st.text("ab-8.", min_size=0, max_size=40), unique=True, max_size=6), st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_no_two_names_become_one(names: list[str], length: int) -> None:
    assert len(set(shorten_all(names, length))) == len(names)
