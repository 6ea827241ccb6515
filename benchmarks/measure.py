"""How things are measured: in turn, warmed up, medians; what the machine could do at best; memory of tensors."""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from benchmarks.contestant import Contestant, Work
from rmoe.errors import RunError
from rmoe.training.profile import matrix_rate

ROOT = Path(__file__).resolve().parents[1]
LEAST_SECONDS = 0.02
"""A contestant's turn lasts at least so long; one that needs less is called several times."""


BUSY = 0.05
"""Share of the cores that others may keep busy in a round that counts as undisturbed."""


class Timing(NamedTuple):
    """Medians over rounds, of one call.

    Attributes:
        wall_ms: wall clock.
        cpu_ms: processor time of all threads; beyond threads x wall clock something is wrong, far below it the
            machine was busy or the work did not spread.
        ratio: of the first contestant's wall clock, paired round by round.
        spread: half the distance between the ratio's quartiles.
    """

    wall_ms: float
    cpu_ms: float
    ratio: float
    spread: float


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def busy_seconds() -> tuple[float, float]:
    """Processor seconds that this machine and this process (with its children) have spent so far."""
    mine = os.times()
    try:
        fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    except OSError:  # not Linux: others are not seen
        return sum(mine[:4]), sum(mine[:4])
    user, nice, system, _, _, irq, softirq = fields[:7]
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK"), sum(mine[:4])


class Round(NamedTuple):
    """Of each call its seconds on the wall and of the processor; and how many cores others kept busy meanwhile."""

    wall: dict[str, float]
    cpu: dict[str, float]
    others: float


def one_round(
    calls: dict[str, Callable[[], object]], order: list[str], repeats: dict[str, int], device: str
) -> Round:
    """Each call in turn."""
    wall, cpu = {}, {}
    (machine, mine), began = busy_seconds(), time.perf_counter()
    for name in order:
        synchronize(device)
        started, used = time.perf_counter(), time.process_time()
        for _ in range(repeats[name]):
            calls[name]()
        synchronize(device)
        wall[name] = (time.perf_counter() - started) / repeats[name]
        cpu[name] = (time.process_time() - used) / repeats[name]
    machine_after, mine_after = busy_seconds()
    others = (machine_after - machine - (mine_after - mine)) / (time.perf_counter() - began)
    return Round(wall, cpu, max(0.0, others))


def compare(
    calls: dict[str, Callable[[], object]], rounds: int, device: str = "cpu"
) -> tuple[dict[str, Timing], float]:
    """Time each call once a round, forwards and backwards in turn (A B C, C B A), after two rounds unmeasured.

    Rounds during which other processes kept more than `BUSY` of the cores busy are measured again, up to as many more;
    what is used are the `rounds` least disturbed.

    Args:
        calls: name -> one step of it; the first is what the others are divided by.
        rounds: at least 20 for a figure that is published.

    Returns:
        By name; and the cores that others kept busy during the rounds used, on average.
    """
    names, repeats = list(calls), dict.fromkeys(calls, 1)
    one_round(calls, names, repeats, device)
    for name, seconds in one_round(calls, names[::-1], repeats, device).wall.items():
        repeats[name] = max(1, math.ceil(LEAST_SECONDS / seconds)) if rounds > 2 else 1
    done: list[Round] = []
    allowed = BUSY * (os.cpu_count() or 1)
    while sum(one.others <= allowed for one in done) < rounds and len(done) < 2 * rounds:
        done.append(one_round(calls, names[:: -1 if len(done) % 2 else 1], repeats, device))
    used = sorted(done, key=lambda one: one.others)[:rounds]
    found = {}
    for name in names:
        ratios = sorted(one.wall[name] / one.wall[names[0]] for one in used)
        quarter = len(ratios) // 4
        found[name] = Timing(
            wall_ms=1e3 * median(one.wall[name] for one in used),
            cpu_ms=1e3 * median(one.cpu[name] for one in used),
            ratio=median(ratios),
            spread=(ratios[-1 - quarter] - ratios[quarter]) / 2,
        )
    return found, sum(one.others for one in used) / len(used)


class Roofline(NamedTuple):
    """The machine's best: `gflops` of matrix products in the given dtype, `gbytes` per second of a copy."""

    gflops: float
    gbytes: float

    def seconds(self, *phases: Work) -> float:
        """The least time: of each phase whichever of the two takes longer."""
        return sum(max(work.flops / self.gflops, work.nbytes / self.gbytes) for work in phases) / 1e9

    def best(self, other: Roofline) -> Roofline:
        return Roofline(max(self.gflops, other.gflops), max(self.gbytes, other.gbytes))


def measure_roofline(device: str = "cpu", dtype: torch.dtype = torch.float32, repeats: int = 12) -> Roofline:
    """By wall clock, with the threads that the cases use: best of some large products and of some large copies.

    Measured right before and right after each case, the better of the two counting, so that a rate taken while the
    machine was busy does not flatter what was measured while it was not.
    """
    sizes, length = ((1024, 2048), 1 << 25) if device == "cpu" else ((8192,), 1 << 28)

    def best(work: Callable[[], object]) -> float:
        times = []
        for _ in range(repeats):
            synchronize(device)
            started = time.perf_counter()
            work()
            synchronize(device)
            times.append(time.perf_counter() - started)
        return min(times)

    rate = 0.0
    for n in sizes:
        a, b, out = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(3))
        rate = max(rate, 2 * n**3 / best(lambda a=a, b=b, out=out: torch.mm(a, b, out=out)) / 1e9)
    source, target = torch.ones(length, device=device), torch.empty(length, device=device)
    return Roofline(rate, 2 * 4 * length / best(lambda: target.copy_(source)) / 1e9)


PRODUCTS = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::_grouped_mm",
    "aten::mv",
    "aten::addmv_",
)
ATTENTION = tuple(
    f"aten::_{kernel}{way}"
    for kernel, ways in {
        "scaled_dot_product_flash_attention_for_cpu": ("", "_backward"),
        "flash_attention": ("_forward", "_backward"),
        "efficient_attention": ("_forward", "_backward"),
        "cudnn_attention": ("_forward", "_backward"),
    }.items()
    for way in ways
)


def kernel_ms(
    call: Callable[[], object], device: str, dtype: torch.dtype, repeats: int = 5
) -> dict[str, float]:
    """Milliseconds of one call inside matrix products and attention's kernels, from torch's profiler; medians.

    `product_room_gflop` is what a large product could have done in the time of the call's products: a virtual
    machine's rate changes by the minute, so it is measured right before and after each call.
    """
    activity = torch.profiler.ProfilerActivity
    spent = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    found: dict[str, list[float]] = {"product_ms": [], "attention_ms": [], "product_room_gflop": []}
    for _ in range(repeats):
        before = matrix_rate(torch.device(device), dtype)
        with torch.profiler.profile(
            activities=[activity.CPU, *([activity.CUDA] if device == "cuda" else [])]
        ) as profiler:
            call()
            synchronize(device)
        events = profiler.key_averages()
        for kind, names in (("product_ms", PRODUCTS), ("attention_ms", ATTENTION)):
            found[kind].append(sum(getattr(event, spent) for event in events if event.key in names) / 1e3)
        rate = max(before, matrix_rate(torch.device(device), dtype)) / 1e9
        found["product_room_gflop"].append(rate * found["product_ms"][-1] / 1e3)
    return {kind: median(values) for kind, values in found.items()}


# --- memory ------------------------------------------------------------------------------------------------------


def peak_in_own_process(case: str, size: str, device: str, contestant: str, threads: int) -> float:
    """Peak memory of a contestant, MiB, of three calls in a process of its own.

    It is forked from a server that has done the imports and nothing else, which saves seconds and leaves no trace:
    of `tensors` none was there before, and a forked process counts its own resident memory.

    Raises:
        RunError: it fails there.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.cases"])
    with ProcessPoolExecutor(1, context) as pool:
        try:
            return pool.submit(_peak_of, case, size, device, contestant, threads).result()
        except BrokenProcessPool as error:
            what = f"memory of {contestant} in {case} failed: {error}"
            raise RunError(what, "the timings", "run the same command again") from error


def _peak_of(case: str, size: str, device: str, contestant: str, threads: int) -> float:
    from benchmarks.cases import CASES, setting_for

    torch.set_num_threads(threads)
    return peak_mib(CASES[case].contestants(setting_for(size, device))[contestant], device)


def peak_mib(contestant: Contestant, device: str) -> float:
    """Build, and the peak of three calls, here and now; see `Contestant.memory`."""
    if contestant.memory == "child":
        return float(contestant.build()())  # type: ignore[arg-type]
    if contestant.memory == "resident":
        before = resident_peak_mib()
        call = contestant.build()
        for _ in range(3):
            call()
        return resident_peak_mib() - before
    return tensor_peak(contestant.build) / 2**20


def resident_peak_mib() -> float:
    """Of this process since its program started. `ru_maxrss` would begin with that of the process that started it."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    return int(line.split()[1]) / 1024


CALLS = "what is measured"


def tensor_peak(build: Callable[[], Callable[[], object]]) -> int:
    """Bytes that torch's CPU allocator has given out at most during three calls, what was built included.

    What building itself needs for a moment (initial values) does not count.
    """
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profiler:
        call = build()
        with torch.profiler.record_function(CALLS):
            for _ in range(3):
                call()
    results: Any = profiler.profiler.kineto_results  # type: ignore[union-attr]
    events, waiting = [], list(results.experimental_event_tree())
    while waiting:
        events.append(waiting.pop())
        waiting.extend(events[-1].children)
    began = next(event.start_time_ns for event in events if event.name == CALLS)
    allocation = torch._C._profiler._EventType.Allocation
    changes = sorted(
        (event.start_time_ns, event.extra_fields.total_allocated, event.extra_fields.alloc_size)
        for event in events
        if event.tag == allocation and event.extra_fields.device.type == "cpu"
    )
    if not changes:
        return 0
    before = changes[0][1] - changes[0][2]  # what an earlier profile left in the books
    return max((total for at, total, _ in changes if at >= began), default=before) - before
