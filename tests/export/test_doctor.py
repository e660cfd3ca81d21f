"""The doctor: what is here, and what each can do."""

from __future__ import annotations

import pytest

from vitrm.export.doctor import bindings_for, diagnose
from vitrm.runtime.system.gpus import find_gpus


def test_bindings_are_tried_and_not_only_imported() -> None:
    pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings")
    (found,) = [f for f in diagnose() if f.name == "cuda-bindings"]
    if find_gpus().found:
        assert found.can.startswith("runs plans on ")
    else:
        assert found.can.startswith("runs no plans here: ")
        assert "CUDA error " in found.can
        assert str(find_gpus().problem) in found.can


@pytest.mark.parametrize(
    ("driver", "version", "said"),
    [
        ("12.8", "13.0.1", 'serves CUDA 12.8, these bindings need 13: pip install "cuda-bindings>=12.9.1,<13"'),
        ("12.8", "12.6.2.post1", 'threads wait for each other\'s calls: pip install "cuda-bindings>=12.9.1,<13"'),
        ("13.0", "12.9.0", 'pip install "cuda-bindings==13.*"'),
        ("13.0", "13.5.0", None),
        ("12.8", "12.9.4", None),
        ("13.0", "12.9.1", None),  # a newer driver serves older bindings
        (None, "13.5.0", None),
    ],
)
def test_bindings_that_fit_the_driver_are_named(driver: str | None, version: str, said: str | None) -> None:
    found = bindings_for(driver, version)
    assert found is None if said is None else said in str(found)
