"""What a grid of runs costs, from one measured pilot run: hours, device-hours, disk.

Imports no torch.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rmoe.errors import RequestError
from rmoe.records import Record
from rmoe.training.config import RunConfig
from rmoe.training.run_folder import CONFIG, RESULT, read_result

DEVICES = (1, 8, 64)


@dataclass(frozen=True)
class Pilot:
    """A finished run as a measure of others.

    Attributes:
        router: its name.
        seconds_per_step: of training alone, at its batch.
        other_seconds: evaluation, checkpoints, the final model: of a whole run.
        tokens_per_step: of its batch.
        disk_bytes: of its folder.
    """

    router: str
    seconds_per_step: float
    other_seconds: float
    tokens_per_step: int
    disk_bytes: int

    def seconds(self, steps: int, tokens_per_step: int) -> float:
        """Of a run with so many steps of such a batch."""
        return self.seconds_per_step * steps * tokens_per_step / self.tokens_per_step + self.other_seconds


def pilots_in(folder: Path) -> dict[str, Pilot]:
    """Router -> pilot: of a finished run, or of the last finished run of each router of a comparison.

    The pilot must have run through: a run that was resumed has the pause in its time.

    Raises:
        RequestError: there is none.
    """
    folders = (
        [folder] if (folder / RESULT).exists() else sorted(p.parent for p in folder.glob(f"runs/*/{RESULT}"))
    )
    if not folders:
        raise RequestError("--pilot", str(folder), "a finished run, or a comparison with one")
    found = [_pilot(one) for one in folders]
    return {pilot.router: pilot for pilot in found}


def _pilot(folder: Path) -> Pilot:
    result = read_result(folder)
    if result.seconds_per_1k_steps is None:
        raise RequestError("--pilot", str(folder), "a run that was timed as it trained")
    wall = (folder / RESULT).stat().st_mtime - (folder / CONFIG).stat().st_mtime
    per_step = result.seconds_per_1k_steps / 1000
    return Pilot(
        router=result.router,
        seconds_per_step=per_step,
        other_seconds=max(0.0, wall - per_step * result.steps),
        tokens_per_step=result.tokens // result.steps,
        disk_bytes=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
    )


class GridPlan(Record, frozen=True, kw_only=True):
    """`rmoe plan --grid --json`.

    Attributes:
        runs: of the grid.
        run_seconds: router -> of one of its runs, its start included.
        at_once: runs at the same time.
        hours: of all runs, that many at once.
        device_hours: runs times their devices.
        disk_gib: of all runs' folders.
        hours_on: devices -> hours with so many, one run on each (or on as many as it spans).
        assumptions: in words.
    """

    runs: int
    run_seconds: dict[str, float]
    at_once: int
    hours: float
    device_hours: float
    disk_gib: float
    hours_on: dict[int, float]
    assumptions: list[str]


def plan_grid(
    config: RunConfig,
    routers: Sequence[str],
    seeds: int,
    pilots: Mapping[str, Pilot],
    at_once: int,
    devices_per_run: int,
    start_seconds: float,
    starts_once: bool,
) -> GridPlan:
    """Plan a grid.

    Args:
        pilots: by router; a router without one is taken to cost the mean of those there are.
        at_once: runs at the same time.
        devices_per_run: of each run.
        start_seconds: until a process trains.
        starts_once: a worker starts once and carries out run after run.
    """
    training = config.training
    tokens = training.batch_size * training.sequence_length
    each = {name: pilot.seconds(training.max_steps, tokens) for name, pilot in pilots.items()}
    mean = sum(each.values()) / len(each)
    seconds = {name: each.get(name, mean) + (0.0 if starts_once else start_seconds) for name in routers}
    work = [seconds[name] for _ in range(seeds) for name in routers]

    def hours(workers: int) -> float:
        free = [start_seconds if starts_once else 0.0] * workers  # when each takes its next run
        for length in work:
            heapq.heapreplace(free, free[0] + length)
        return max(free) / 3600

    disk = sum(pilot.disk_bytes for pilot in pilots.values()) / len(pilots)
    assumed = [
        f"{start_seconds:g} s until a process trains, {'once a worker' if starts_once else 'every run'}"
    ]
    if missing := sorted(set(routers) - set(pilots)):
        assumed.append(f"no pilot for {', '.join(missing)}: the mean of {', '.join(sorted(pilots))}")
    assumed.append("a run's rate is the pilot's: make it share its machine as the grid's runs will")
    return GridPlan(
        runs=len(work),
        run_seconds=seconds,
        at_once=at_once,
        hours=hours(at_once),
        device_hours=sum(work) * devices_per_run / 3600,
        disk_gib=disk * len(work) / 2**30,
        hours_on={n: hours(n // devices_per_run) for n in DEVICES if n >= devices_per_run},
        assumptions=assumed,
    )
