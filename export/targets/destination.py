"""The places that an export can go to: a file, a Hugging Face folder, a Triton model repository."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from vitrm.checkpoint import WEIGHTS_FILE
from vitrm.errors import UserError
from vitrm.export.result import ExportResult
from vitrm.export.targets import huggingface, triton
from vitrm.export.tensorrt.options import PlanOptions
from vitrm.export.tensorrt.toolchain import toolchain
from vitrm.system.files import atomic_files
from vitrm.training.run_folder.state import STATE_FILE


class Destination(ABC):
    """A place for one export."""

    @property
    @abstractmethod
    def announced(self) -> Path:
        """The place, as it is known before the work begins."""

    @contextmanager
    @abstractmethod
    def opened(self) -> Iterator[Path]:
        """Gives the path to export to; what is there, and `complete`, is in place when the block ends."""

    @abstractmethod
    def complete(self, result: ExportResult) -> Path:
        """Adds what belongs beside the artifact; returns the path under which it will be found."""

    @property
    @abstractmethod
    def next_command(self) -> str:
        """The command that uses it."""


@dataclass(frozen=True)
class PlainFile(Destination):
    """A file, or for stepwise a folder."""

    path: Path

    @property
    def announced(self) -> Path:
        return self.path

    @contextmanager
    def opened(self) -> Iterator[Path]:
        yield self.path

    def complete(self, result: ExportResult) -> Path:
        return self.path

    @property
    def next_command(self) -> str:
        return f"vitrm-bench {self.path}"


@dataclass(frozen=True)
class HuggingFaceFolder(Destination):
    """A folder with model.onnx and its two configurations."""

    folder: Path

    def check(self) -> None:
        """Raises `UserError` where the folder cannot take them."""
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder} is a file: name a folder for --hf")
        held = [name for name in (WEIGHTS_FILE, STATE_FILE) if (self.folder / name).exists()]
        if held:
            raise UserError(
                f"{self.folder} holds a run ({held[0]}), whose config.json would be replaced: name another folder"
            )

    @property
    def announced(self) -> Path:
        return self.folder / huggingface.MODEL_FILE

    @contextmanager
    def opened(self) -> Iterator[Path]:
        with atomic_files(self.folder, huggingface.FILES) as together:
            yield together / huggingface.MODEL_FILE

    def complete(self, result: ExportResult) -> Path:
        huggingface.write_configs(result.path.parent, result.metadata)
        return self.announced

    @property
    def next_command(self) -> str:
        return f"vitrm-bench {self.announced}"


@dataclass(frozen=True)
class TritonRepository(Destination):
    """A model repository, to which a model or a version of one is added."""

    repository: Path
    model: str
    suffix: str  # of the file that is exported first

    def check(self, *, graph: str, every_step: bool, plan: PlanOptions | None) -> None:
        """Raises `UserError` for what Triton cannot serve from there."""
        triton.check_place(self.repository, self.model, graph=graph, every_step=every_step)
        if plan is not None:
            triton.check_flavour(toolchain(plan).api.flavour, "what is built here")

    @property
    def announced(self) -> Path:
        return self.repository / self.model

    @contextmanager
    def opened(self) -> Iterator[Path]:
        with TemporaryDirectory() as scratch:
            yield Path(scratch) / f"{self.model}{self.suffix}"

    def complete(self, result: ExportResult) -> Path:
        return triton.add_file(self.repository, self.model, result.path)

    @property
    def next_command(self) -> str:
        return f"tritonserver --model-repository={self.repository}"
