"""What a run ran on: code, libraries, machine. Imports torch only when asked."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

from rmoe import __version__
from rmoe.results.run import Hardware, Versions

_LIBRARIES = ("transformers", "accelerate", "safetensors", "numpy")


def versions() -> Versions:
    """Versions of this package (with the commit, in a checkout) and of the libraries that decide results."""
    import torch

    return Versions(
        code=__version__ + _commit(),
        python=platform.python_version(),
        # torch's own word: it names the build ("+cpu", "+cu130"), which the package's metadata on PyPI does not
        libraries={"torch": str(torch.__version__)} | {name: version(name) for name in _LIBRARIES},
    )


def hardware(threads: int, device: str = "auto") -> Hardware:
    """The machine.

    Args:
        threads: what torch was told to use.
        device: what was computed on, in the words of `training.device`; on a `cpu` no GPU counts.
    """
    import torch

    used = device != "cpu" and torch.cuda.is_available()
    accelerator = torch.cuda.get_device_name() if used else None
    return Hardware(
        cpu=_cpu_model(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=threads,
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        accelerator=accelerator,
    )


def _commit() -> str:
    """`+g1a2b3c4`, with `.dirty` where files differ from the commit; empty outside a checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        commit, changed = (
            subprocess.run(
                ["git", "-C", str(root), *command], capture_output=True, text=True, check=True
            ).stdout
            for command in (["rev-parse", "--short=8", "HEAD"], ["status", "--porcelain", "--", "rmoe"])
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"+g{commit.strip()}" + (".dirty" if changed.strip() else "")


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
