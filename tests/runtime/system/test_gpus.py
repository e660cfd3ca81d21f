"""GPUs by name: which one a device is, for the driver, for NVML and in messages."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from vitrm.errors import UserError
from vitrm.runtime.system import machine, power
from vitrm.runtime.system.gpus import Gpu, Gpus, gpu_index

TWO = Gpus(
    (Gpu("NVIDIA A", "sm80", 1, "GPU-00000000-0000-0000-0000-00000000000a"), Gpu("NVIDIA B", "sm90", 1, "GPU-b")),
    "13.0",
)


def test_devices_have_numbers() -> None:
    assert [gpu_index(d) for d in ("cuda", "cuda:0", "cuda:12")] == [0, 0, 12]
    for wrong in ("cuda:", "cuda:x", "gpu", "cuda:-1", ""):
        with pytest.raises(UserError, match="expected cpu, cuda, cuda:N or auto"):
            gpu_index(wrong)


def test_a_gpu_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert TWO.at("cuda:1").name == "NVIDIA B"
    with pytest.raises(UserError, match=r"device cuda:2 was asked for, but there are 2 GPUs here: cuda:0 to cuda:1"):
        TWO.at("cuda:2")
    with pytest.raises(UserError, match="cuda was asked for, but no driver: "):
        Gpus((), None, "no driver").at("cuda")
    monkeypatch.setattr(machine, "find_gpus", lambda: TWO)
    assert [machine.gpu_name(d) for d in ("cuda", "cuda:1", "cuda:2")] == ["NVIDIA A", "NVIDIA B", "CUDA device"]


class NVMLError(Exception):
    pass


def nvml(known: dict[str, str]) -> SimpleNamespace:
    """Stands in for pynvml on a machine that counts its GPUs otherwise than CUDA does: only what is asked is recorded."""

    def by_uuid(uuid: str) -> str:
        if uuid not in known:
            raise NVMLError("not found")
        return known[uuid]

    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=by_uuid,
        nvmlDeviceGetHandleByIndex=lambda index: f"number {index}",
        nvmlDeviceGetName=lambda handle: handle,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: 1000,
    )


def test_power_is_that_of_the_gpu_that_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(power, "find_gpus", lambda: TWO)
    monkeypatch.setitem(sys.modules, "pynvml", nvml({TWO.found[0].uuid: "board A", "GPU-b": "board B"}))
    scopes = [board.scope for board, _ in (power.find_nvml(0), power.find_nvml(1)) if board]
    assert scopes == ["GPU board board A (NVML)", "GPU board board B (NVML)"]
    monkeypatch.setitem(sys.modules, "pynvml", nvml({TWO.found[0].uuid: "board A", "MIG-b": "a part of B"}))
    board, _ = power.find_nvml(1)
    assert board is not None
    assert board.scope == "GPU board a part of B (NVML)"
