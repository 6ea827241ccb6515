"""How much memory this process may still take, and whether a checkpoint fits."""

from __future__ import annotations

import ctypes
import os
import resource
from pathlib import Path

import torch


def free_memory(device: torch.device) -> int:
    """Bytes: a GPU's free memory, or what the machine has available less than this process's own limits."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = [_available()]
    used = _own("VmData")
    for kind in (resource.RLIMIT_DATA, resource.RLIMIT_AS):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            limits.append(max(soft - (used if kind == resource.RLIMIT_DATA else _own("VmSize")), 0))
    return min(limits)


_M_MMAP_THRESHOLD = -3  # malloc.h
_LARGE = 1 << 20


def give_back_freed_memory() -> None:
    """Have glibc return freed memory to the system; elsewhere nothing happens.

    Its heap keeps what was freed for later, and raises by itself the size from which an allocation is one that can be
    returned: after the first layer an expert's matrix no longer is, and every layer leaves more behind.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)
        libc.malloc_trim(0)
    except (OSError, AttributeError):
        return


def bound_kernel_cache() -> None:
    """Have oneDNN keep few of the kernels it has compiled; no effect where it has already run in this process.

    It compiles one for every number of tokens that an expert may get, about 2 MiB each in bfloat16, and keeps 1,024.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")


def checkpoint_bytes(path: Path) -> int:
    """Of a model folder's weight files."""
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def _available() -> int:
    try:
        return _field(Path("/proc/meminfo"), "MemAvailable")
    except (OSError, KeyError):
        return 1 << 62  # not Linux: nothing is known, and a model is loaded as always


def _own(name: str) -> int:
    try:
        return _field(Path("/proc/self/status"), name)
    except (OSError, KeyError):
        return 0


def _field(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)
