"""How things are measured: in turn, warmed up, medians; and what the machine could do at best."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch


class Timing(NamedTuple):
    """Medians over rounds.

    Attributes:
        wall_ms: wall clock.
        cpu_ms: processor time of all threads, which other processes on the machine stretch little.
        ratio: of the first contestant's `cpu_ms` (wall clock on a GPU), paired round by round.
    """

    wall_ms: float
    cpu_ms: float
    ratio: float


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def compare(
    contestants: dict[str, Callable[[], object]], rounds: int, device: str = "cpu"
) -> dict[str, Timing]:
    """Time each contestant once a round, forwards and backwards in turn (A B C, C B A), after two rounds unmeasured.

    Args:
        contestants: name -> one step of it; the first is what the others are divided by.
        rounds: at least 20 for a figure that is published.
    """
    wall: dict[str, list[float]] = {name: [] for name in contestants}
    cpu: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(-2, rounds):
        for name in list(contestants)[:: 1 if number % 2 else -1]:
            synchronize(device)
            started, used = time.perf_counter(), time.process_time()
            contestants[name]()
            synchronize(device)
            if number >= 0:
                cpu[name].append(time.process_time() - used)
                wall[name].append(time.perf_counter() - started)
    paired = cpu if device == "cpu" else wall
    first = paired[next(iter(contestants))]
    return {
        name: Timing(
            wall_ms=1e3 * median(wall[name]),
            cpu_ms=1e3 * median(cpu[name]),
            ratio=median(b / a for a, b in zip(first, paired[name], strict=True)),
        )
        for name in contestants
    }


class Roofline(NamedTuple):
    """The machine's best: `gflops` of matrix products in the given dtype, `gbytes` per second of a copy."""

    gflops: float
    gbytes: float

    def seconds(self, flops: float, nbytes: float = 0.0) -> float:
        """The least time for this work: whichever of the two takes longer."""
        return max(flops / self.gflops, nbytes / self.gbytes) / 1e9


def measure_roofline(device: str = "cpu", dtype: torch.dtype = torch.float32, repeats: int = 20) -> Roofline:
    """Best of some large matrix products (CPU: on processor time divided by threads) and of some large copies."""
    n, length = (1024, 1 << 25) if device == "cpu" else (8192, 1 << 28)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    source, target = torch.ones(length, device=device), torch.empty(length, device=device)
    out = torch.empty_like(a)

    def best(work: Callable[[], object]) -> float:
        times = []
        for _ in range(repeats):
            synchronize(device)
            started = time.perf_counter()
            work()
            synchronize(device)
            times.append(time.perf_counter() - started)
        return min(times)

    rate = 2 * n**3 / best(lambda: torch.mm(a, b, out=out)) / 1e9
    bandwidth = 2 * 4 * length / best(lambda: target.copy_(source)) / 1e9
    return Roofline(rate, bandwidth)
