"""What this machine has: cores, memory, and GPUs, of which each run sees its own. Imports torch only to count GPUs."""

from __future__ import annotations

import os

from rmoe.errors import RequestError

SIMULATED = "RMOE_SIMULATED_DEVICES"


def devices() -> list[str]:
    """The GPUs this process may use, as `CUDA_VISIBLE_DEVICES` names them; `RMOE_SIMULATED_DEVICES=N` pretends N."""
    if SIMULATED in os.environ:
        return [str(number) for number in range(int(os.environ[SIMULATED]))]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip() not in ("", "-1")]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def slots_of(jobs: int | None, gpus: int, runs_per_gpu: int) -> list[list[str]]:
    """What each run that computes on GPUs sees: its own block of devices.

    Args:
        jobs: runs at once, at most; None is as many as fit.
        gpus: of each run.
        runs_per_gpu: that share a block.

    Raises:
        RequestError: a run wants more than there are.
    """
    found = devices()
    if gpus > len(found):
        raise RequestError("engine.gpus", gpus, f"at most {len(found)}, the GPUs of this machine")
    blocks = [found[start : start + gpus] for start in range(0, len(found) - gpus + 1, gpus)]
    slots = [block for _ in range(runs_per_gpu) for block in blocks]
    return slots[:jobs]


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def require_here(cpus: int | None, memory_gib: float | None) -> None:
    """Check that this machine has what was asked for a run; None asks for nothing.

    Raises:
        RequestError: it has not.
    """
    if cpus is not None and cpus > cores():
        raise RequestError("engine.cpus", cpus, f"at most {cores()}, the cores of this machine")
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    if memory_gib is not None and memory_gib > most:
        raise RequestError("engine.memory_gib", memory_gib, f"at most {most:.1f}, the memory of this machine")
