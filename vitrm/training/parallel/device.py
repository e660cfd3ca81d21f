"""Where and how a training run computes: device, precision, compilation, threads.

None of it changes what is learned beyond rounding, so a run may be resumed with another choice.

`auto` precision is bfloat16 autocast on CUDA and on a CPU with bfloat16 instructions, else float32.
On a CPU compilation makes training a quarter faster (docs/training.md) after a minute or two: only when asked for.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vitrm.errors import UserError
from vitrm.fields import check, choice, flag, real, shown, whole

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vitrm.training.parallel.cpu_workers import Workers
    from vitrm.training.supervision import Learner


MOST_STEPS = 4  # that are compiled as one


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How to run; the defaults suit any machine."""

    device: str = "auto"  # auto (CUDA if there is any), cpu, cuda or cuda:N
    precision: str = choice("auto", "fp32", "bf16")  # bf16: autocast; the weights stay float32
    compile: bool = flag(False)  # torch.compile of the model's fragments
    threads: int = whole(0, 0, 1024)  # CPU threads; 0 leaves torch's choice
    save_every: float = real(60.0, 0)  # seconds between saved states within an epoch

    def __post_init__(self) -> None:
        check(self)

    def resolve(self) -> tuple[torch.device, bool]:
        """The device, and whether to compute in bfloat16.  Raises `UserError` for a device that is not there."""
        import torch

        device = _device(self.device)
        if self.threads:
            torch.set_num_threads(self.threads)
        if self.precision != "auto":
            return device, self.precision == "bf16"
        return device, device.type == "cuda" or _cpu_has_bf16()


def start_anew_tuned() -> None:
    """Starts this process again, once, with what the C library and OpenMP read before Python does.

    Large pages (glibc 2.35 on Linux) spare a training step its misses in the table of pages: 5 to 7 % of its time.
    Threads that wait by spinning collapse when another process wants a core, those that sleep at once cost a third of
    the speed on a quiet machine: they spin briefly.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if platform.libc_ver()[0] == "glibc" and "glibc.malloc.hugetlb" not in tunables:
        os.environ["GLIBC_TUNABLES"] = f"{tunables}:glibc.malloc.hugetlb=1".lstrip(":")
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


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


def compile_learner(learner: Learner, image_size: int, batch_size: int, say: Callable[[str], None]) -> bool:
    """Replaces the learner's functions by compiled ones, tried out forward and backward; False if that failed.

    A failure (no C++ compiler, for one) is said in one line, and the run goes on uncompiled.
    """
    import torch

    from vitrm.model import ViTRM

    if not isinstance(learner.model, ViTRM):
        names = ["classify"]
    else:
        # All of an update's steps in one, where they are few: compiling takes its time for each.
        few = learner.recipe.supervision == "sequential" or learner.recipe.n_sup <= MOST_STEPS
        names = ["step", "supervise"] if few else ["step"]
        # On a CPU Inductor's pooling and batch norm are slower than torch's: the tokenizer stays as it is.
        if learner.device.type != "cpu":
            names.append("tokens")
    # One shape each.  Workers need code that runs without Python's lock, which is what the C++ wrapper is.
    options: dict[str, str | int | bool | Callable[..., Any]] = {"cpp_wrapper": True} if learner.workers else {}
    plain = [{name: getattr(functions, name) for name in names} for functions in learner.functions]
    images = torch.rand(batch_size, 3, image_size, image_size, device=learner.device)
    # Batch norms count what they see: the trial must leave no trace in the weights.
    before = {k: v.clone() for k, v in learner.model.state_dict().items()}
    learner.model.train()
    try:
        for functions in learner.functions:
            for name in names:
                setattr(functions, name, torch.compile(getattr(functions, name), dynamic=False, options=options))
        if learner.workers is None:
            _try_out(learner, 0, images)
        else:
            parts = [images[learner.workers.part(worker, batch_size)] for worker in range(learner.workers.count)]
            learner.workers.map(lambda worker: _try_out(learner, worker, parts[worker]))
        return True
    except Exception as error:  # whatever a compiler may raise: eager always works
        for functions, own in zip(learner.functions, plain, strict=True):
            for name in names:
                setattr(functions, name, own[name])
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = " ".join(lines[:2])  # the first may only say who raised what the second says
        say(f"torch.compile does not work here ({reason[:160]}): training goes on uncompiled")
        return False
    finally:
        learner.model.load_state_dict(before)
        for functions in learner.functions:
            functions.model.zero_grad(set_to_none=True)


def _try_out(learner: Learner, part: int, images: torch.Tensor) -> None:
    """Forward and backward through the functions of a part of a batch."""
    import torch

    from vitrm.training.augment import Batch
    from vitrm.training.supervision import Part

    functions, classes = learner.functions[part], learner.model.config.classes
    label = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    batch = Batch(images, torch.full((len(images), classes), 1 / classes, device=images.device), label)
    taught = learner.ask(images)
    # The first state, expanded from learned embeddings, is compiled apart from later ones: those a second time, where any are met.
    recipe = learner.recipe
    later = recipe.free_steps > 0 or (recipe.supervision == "sequential" and recipe.n_sup > 1)
    state = None
    for _ in range(2 if later else 1):
        found = learner.compute(functions, Part(batch, taught, state))
        found.loss.backward()
        state = found.state
