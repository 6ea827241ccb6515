"""What can be measured: how to build it, and the least work of one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple


class Work(NamedTuple):
    """What one phase cannot do without: FLOPs of matrix products, and bytes to and from memory."""

    flops: float = 0.0
    nbytes: float = 0.0


@dataclass(frozen=True)
class Contestant:
    """Something to be measured.

    Attributes:
        build: makes it; what it gives is called again and again.
        phases: the least work of one call, phase by phase; empty where nothing is to be said.
        tokens: that one call deals with.
        memory: what peak memory is. `tensors`: bytes in torch tensors at their peak, from nothing, by torch's own
            accounting (a CPU allocator keeps pages that nobody uses, and libraries take hundreds of MB, so
            resident memory says little about a model); `resident`: growth of the process, for what is no tensor;
            `child`: a call gives the resident memory, in MiB, of the command that it runs.
    """

    build: Callable[[], Callable[[], object]]
    phases: tuple[Work, ...] = ()
    tokens: int | None = None
    memory: Literal["tensors", "resident", "child"] = "tensors"
