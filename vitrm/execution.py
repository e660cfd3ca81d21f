"""Where and how a training run computes: device, precision, compilation, threads.

None of it changes what is learned beyond rounding, so a run may be resumed with another choice.

`auto` precision is bfloat16 autocast on CUDA and on a CPU with bfloat16 instructions, else float32.
On a CPU compilation brings five to ten per cent (docs/training.md) after a minute or two: only when asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vitrm.errors import UserError

if TYPE_CHECKING:
    import torch

    from vitrm.supervision import Learner


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How to run; the defaults suit any machine."""

    device: str = "auto"  # auto (CUDA if there is any), cpu, cuda or cuda:N
    precision: str = "auto"  # auto, fp32 or bf16 (autocast; the weights stay float32)
    compile: bool = False  # torch.compile of the model's fragments
    threads: int = 0  # CPU threads; 0 leaves torch's choice
    save_every: float = 60.0  # seconds between saved states within an epoch

    def __post_init__(self) -> None:
        if self.precision not in ("auto", "fp32", "bf16"):
            raise UserError(f"precision is {self.precision!r}, expected auto, fp32 or bf16")
        if self.threads < 0:
            raise UserError(f"threads is {self.threads}, expected 1 or more (0: torch's choice)")
        if not self.save_every >= 0:
            raise UserError(f"save_every is {self.save_every}, expected seconds, 0 or more")

    def resolve(self) -> tuple[torch.device, bool]:
        """The device, and whether to compute in bfloat16.  Raises `UserError` for a device that is not there."""
        import torch

        device = _device(self.device)
        if self.threads:
            torch.set_num_threads(self.threads)
        if self.precision != "auto":
            return device, self.precision == "bf16"
        return device, device.type == "cuda" or _cpu_has_bf16()


def keep_freed_memory() -> None:
    """Lets glibc keep what is freed instead of handing every large block back to the system.

    A training step frees and allocates the same blocks again and again; taking them from the system anew costs
    page faults: a sixth of the time of `nano` on two cores.  Does nothing on other C libraries.
    """
    import ctypes

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3
    # Older versions refuse more than 32 MiB here, and the other two settings alone would make things worse.
    if not mallopt(m_mmap_threshold, 1 << 30) and not mallopt(m_mmap_threshold, 1 << 25):
        return
    mallopt(m_trim_threshold, (1 << 31) - 1)
    mallopt(m_top_pad, 1 << 28)


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device is {name!r}, expected auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device is {name!r}, expected auto, cpu, cuda or cuda:N")
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


def compile_learner(learner: Learner, image_size: int, batch_size: int, say: Callable[[str], None]) -> bool:
    """Replaces the learner's functions by compiled ones, tried out forward and backward; False if that failed.

    A failure (no C++ compiler, for one) is said in one line, and the run goes on uncompiled.
    """
    import torch

    from vitrm.model import ViTRM

    model = learner.model
    if not isinstance(model, ViTRM):
        names = ["classify"]
    else:
        # On a CPU Inductor's pooling and batch norm are slower than torch's: the tokenizer stays as it is.
        names = ["step"] if learner.device.type == "cpu" else ["embed", "step"]
    plain: dict[str, Any] = {name: getattr(learner, name) for name in names}
    images = torch.rand(batch_size, 3, image_size, image_size, device=learner.device)
    # Batch norms count what they see: the trial must leave no trace in the weights.
    before = {k: v.clone() for k, v in model.state_dict().items()}
    try:
        for name in names:
            setattr(learner, name, torch.compile(plain[name]))
        model.train()
        with learner.autocast():
            if isinstance(model, ViTRM):
                # Two steps: the first state, expanded from learned embeddings, is compiled apart from the later ones.
                embedded = learner.embed(images)
                state = learner.step(embedded, model.initial_state(batch_size))
                logits = model.head_logits(learner.step(embedded, state).y)[0]
            else:
                logits = learner.classify(images)
        logits.float().sum().backward()
        return True
    except Exception as error:  # whatever a compiler may raise: eager always works
        for name in names:
            setattr(learner, name, plain[name])
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        say(f"torch.compile does not work here ({reason[:160]}): training goes on uncompiled")
        return False
    finally:
        model.load_state_dict(before)
        learner.optimizer.zero_grad(set_to_none=True)
