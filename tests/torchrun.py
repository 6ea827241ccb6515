"""Several processes of one command, as `torchrun` starts them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

CRASH = re.compile(r"exitcode\s*: -(6|11)\b")
"""A rank that glibc or the kernel ended (SIGABRT, SIGSEGV): no exception of Python's does that."""


def torchrun(*arguments: str, ranks: int = 2, timeout: float = 400) -> subprocess.CompletedProcess[str]:
    """Run `arguments` (a script, or `-m` and a module) with this interpreter, from the repository's root."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.run(
        [*launch, *arguments], cwd=ROOT, env={**os.environ, "PYTHONFAULTHANDLER": "1"},
        capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip


def report_of(module: str, out: Path) -> dict[str, Any]:
    """What two processes of a test's own module wrote to `out`, as JSON.

    Gloo has crashed in a rank's native code ("double free detected in tcache", torch 2.13, once in some hundred
    launches; 400 rounds in search of it passed). Such a launch is repeated once; a second crash fails.
    """
    done = torchrun("-m", module, str(out))
    if CRASH.search(done.stderr):
        print(done.stderr)
        done = torchrun("-m", module, str(out))
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def end_with(report: dict[str, Any], out: str) -> None:
    """In a worker: the first rank writes what `report_of` reads, and all leave together."""
    import torch.distributed as dist

    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(report))
    dist.barrier()
    dist.destroy_process_group()
