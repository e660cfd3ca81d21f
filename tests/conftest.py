"""Skips tests whose marker names something that is not here."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec

import pytest
from browser import find_chromium


@cache
def no_plans_here() -> str | None:
    """The reason why no plan can be built and run here; None where one can."""
    from vitrm.errors import UserError
    from vitrm.export.tensorrt.options import PlanOptions
    from vitrm.export.tensorrt.toolchain import toolchain
    from vitrm.runtime.backends.tensorrt.cuda import Cuda
    from vitrm.runtime.system.gpus import find_gpus

    gpus = find_gpus()
    if not gpus.found:
        return f"needs a GPU: {gpus.problem}"
    try:
        toolchain(PlanOptions())
        Cuda()
    except UserError as error:
        return str(error)
    return None


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is cached while testing is not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips tests marked rtx, gpu or browser where these are missing."""
    if item.get_closest_marker("rtx") and find_spec("tensorrt_rtx") is None:
        pytest.skip("needs TensorRT for RTX: pip install 'vitrm[tensorrt-rtx]'")
    if item.get_closest_marker("gpu") and (missing := no_plans_here()):
        pytest.skip(missing)
    if item.get_closest_marker("browser"):
        if find_chromium() is None:
            pytest.skip("needs Chromium or Chrome: apt-get install chromium")
        if find_spec("websocket") is None:
            pytest.skip("needs websocket-client, which speaks with Chromium: pip install 'vitrm[dev]'")
