"""How much memory this process may still take, and what keeps it from taking more than it needs."""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch


def free_memory(device: torch.device) -> int:
    """Bytes: a GPU's free memory, or the least of what the machine, this process's limits and its cgroups leave."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    # Not Linux: nothing is known, and a model is loaded as always.
    limits = [_field("/proc/meminfo", "MemAvailable", 1 << 62)]
    for kind, used in ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            limits.append(max(soft - _field("/proc/self/status", used, 0), 0))
    return min([*limits, *_left_in_cgroups()])


CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def _left_in_cgroups() -> Iterator[int]:
    """What a container's, a Slurm job's and their owners' limits leave, page cache that can go not counted as used."""
    with suppress(OSError):
        for line in OWN_CGROUPS.read_text().splitlines():
            _, controllers, place = line.split(":", 2)
            if controllers == "":
                root, names = CGROUPS, ("memory.max", "memory.current", "inactive_file")
            elif controllers == "memory":  # version 1
                root = CGROUPS / "memory"
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            else:
                continue
            own = Path(place.lstrip("/"))
            for group in (own, *own.parents):  # a container may have the host's path, and only the root of it
                with suppress(OSError, ValueError):  # no such file; no limit, which is "max"
                    limit, used = (int((root / group / name).read_text()) for name in names[:2])
                    stat = dict(
                        each.split() for each in (root / group / "memory.stat").read_text().splitlines()
                    )
                    yield max(limit - used + int(stat.get(names[2], 0)), 0)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_SMALLEST, _LARGEST = 1 << 20, 32 << 20  # glibc refuses a threshold above 32 MiB
_NEVER = (1 << 31) - 1


@contextmanager
def weights_apart() -> Iterator[None]:
    """Have glibc map what is allocated inside by itself, so that freeing it gives it back; elsewhere nothing happens.

    Its heap keeps what was freed for later, and raises by itself the size from which an allocation is mapped: after the
    first layer an expert's matrix would no longer be, and every layer would leave more behind. Outside, the heap keeps
    what was freed: activations are allocated again and again, and each mapping of new pages costs more than the
    arithmetic on them (a third of the processor time, measured).
    """
    _mallopt(_M_MMAP_THRESHOLD, _SMALLEST)
    try:
        yield
    finally:
        _mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        _mallopt(_M_TRIM_THRESHOLD, _NEVER)


def give_back_freed_memory() -> None:
    """Have glibc return what its heap has kept to the system; elsewhere nothing happens."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _mallopt(option: int, value: int) -> None:
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(option, value)


def bound_kernel_cache() -> None:
    """Have oneDNN keep few of the kernels it has compiled; no effect where it has already run in this process.

    It compiles one for every number of tokens that an expert may get, about 2 MiB each in bfloat16, and keeps 1,024.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")


def _field(path: str, name: str, unknown: int) -> int:
    """Bytes by a line `name: N kB` of a file of Linux; `unknown` where there is none."""
    with suppress(OSError):
        for line in Path(path).read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return unknown
