"""Device, precision and threads of a training run, whether it is compiled, and what is logged.

None of it changes what is learned beyond rounding, so a run may be resumed with another choice.

`auto` precision is bfloat16 autocast on CUDA and on a CPU with bfloat16 instructions, else float32.  On CUDA what stays
float32 in training may be TF32, as PyTorch has it (convolutions are, matrix products are not); accuracies never are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vitrm.errors import UserError
from vitrm.fields import UNBOUNDED, check, choice, choices_or_none, flag_or_none, real, shown, text, whole
from vitrm.training.callbacks import LOGGERS

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vitrm.training.parallel.cpu_workers import Workers


@dataclass(frozen=True, kw_only=True)
class Execution:
    """The way a run computes; the defaults suit any machine."""

    device: str = text("auto", "auto (CUDA if there is any), cpu, cuda or cuda:N (default: auto)", unit="name")
    precision: str = choice(
        "auto",
        "fp32",
        "bf16",
        help="bf16: autocast, the weights stay float32 (default: auto, what the device is fast at)",
    )
    compile: bool | None = flag_or_none(
        "torch.compile the training step: a minute or more at the start, and where it does not work the run says so and goes on "
        "without (default: on a GPU, in one process)"
    )
    threads: int = whole(0, 0, 1024, "CPU threads; 0: torch's choice (default: 0)")
    save_every: float = real(
        60.0,
        0,
        UNBOUNDED,
        "most time between saved states, and what a kill may lose; after an epoch they are saved sooner, where that takes a "
        "hundredth of the time (default: 60)",
        unit="seconds",
    )

    log: tuple[str, ...] | None = choices_or_none(
        *LOGGERS,
        help="keep the epochs' metrics for other programs, too: csv writes metrics.csv; tensorboard (which needs pip "
        "install 'vitrm[tensorboard]') events in tensorboard/",
        unit="name,…",
    )

    def __post_init__(self) -> None:
        check(self)

    def compiles(self, device: torch.device, processes: int) -> bool:
        """True if the training step is compiled: where it was asked for, and by itself on a GPU in one process.

        Several processes meet in batch norm while they compile, and one that failed would leave the others waiting.
        """
        return device.type == "cuda" and processes == 1 if self.compile is None else self.compile

    def resolve(self) -> tuple[torch.device, bool]:
        """The device, and whether to compute in bfloat16.  Raises `UserError` for a device that is not there."""
        import torch

        device = _device(self.device)
        if self.threads:
            torch.set_num_threads(self.threads)
        if self.precision != "auto":
            return device, self.precision == "bf16"
        return device, device.type == "cuda" or _cpu_has_bf16()


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device is {shown(name)}, expected auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device is {shown(name)}, expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(
                f"device {name} was asked for, but torch {torch.__version__} finds no CUDA GPU here: use --device cpu, "
                "or install a driver and a CUDA build of torch"
            )
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise UserError(f"device {name} was asked for, but there are {torch.cuda.device_count()} CUDA GPUs")
    return device


def _cpu_has_bf16() -> bool:
    import torch

    probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(probe is not None and probe() for probe in probes)


def workers_for(model: nn.Module, device: torch.device, images: int, processes: int) -> Workers | None:
    """The workers that share a batch of `images` of `model` (see vitrm.training.parallel.cpu_workers); None where one computation does it all."""
    import torch

    from vitrm.training.parallel.cpu_workers import Workers, worthwhile

    # In several processes each has its core already, and dropout draws from a generator that all threads share: what it
    # draws for whom would depend on who comes first.
    dropout = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())
    count = worthwhile(torch.get_num_threads(), images)
    if device.type != "cpu" or processes > 1 or dropout or count == 1:
        return None
    return Workers(count, torch.get_num_threads() // count)
