"""Pages of small models, each made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from vitrm import checkpoint as checkpoints
from vitrm.checkpoint import Checkpoint
from vitrm.errors import UserError
from vitrm.export.web.options import WebOptions
from vitrm.export.web.page import PageResult, write_page
from vitrm.export.web.runtime_files import find_runtime
from vitrm.training.cli import main as train

STEPS, THRESHOLD = 3, 0.5


@pytest.fixture(scope="session")
def runtime() -> Path:
    """The folder of onnxruntime-web's files."""
    try:
        return find_runtime(None, download=False)
    except UserError as error:
        pytest.skip(f"{error}; `make web-runtime` fetches it")


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory, runtime: Path) -> PageResult:
    """The page of a small model with the paper's block, for which some digits are easy and some are not."""
    return make_page(tmp_path_factory.mktemp("page") / "joint", _trained(tmp_path_factory.mktemp("runs") / "joint"))


@pytest.fixture(scope="session")
def cross_page(tmp_path_factory: pytest.TempPathFactory, runtime: Path) -> PageResult:
    """The page of a model with another block and tokenizer, whose steps look anew: other tensors go from step to step."""
    form = [
        "--mixing",
        "cross",
        "--tokenizer",
        "whitened",
        "--stage-widths",
        "8,8,8",
        "--n",
        "1",
        "--glimpses",
        "shift",
    ]
    trained = _trained(tmp_path_factory.mktemp("runs") / "cross", *form)
    return make_page(tmp_path_factory.mktemp("page") / "cross", trained)


def _trained(out: Path, *form: str) -> Checkpoint:
    """Trained, for seconds: a random model makes much of int8's noise."""
    fixed = ["--data", "digits", "--model", "tiny", "--recipe", "fast", "--device", "cpu", "--threads", "1"]
    assert train([*fixed, *form, "--epochs", "8", "--batch-size", "64", "--out", str(out)]) == 0
    return checkpoints.load(out)


def make_page(folder: Path, checkpoint: Checkpoint) -> PageResult:
    """Writes a page that begins with STEPS and THRESHOLD."""
    return write_page(checkpoint, folder, WebOptions(steps=STEPS, halt_threshold=THRESHOLD, images=6, max_steps=8))
