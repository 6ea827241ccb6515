"""What an engine adds to a run, and how a grid of 1,000 runs would go on 64 workers that fail.

    python -m benchmarks.engines [--parts overhead simulate] [--steps 100] [--rounds 5] [--out benchmarks/results]

`overhead`: two runs of a small model, one after the other, on each engine, against `rmoe train` called by hand: wall
clock of everything, the engine's start and end included, per run; in turn, the median of the rounds' differences. Ray
makes a cluster of this machine; its workers are not `nice` here (by default they are, at 15, and wait for whatever else
the machine does). Slurm is submitit's local executor.
`simulate`: 1,000 runs of an hour on workers that fail, with the overheads measured.
"""

from __future__ import annotations

import argparse
import heapq
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks.results import write_result
from rmoe.compare.engines import EngineConfig, Wants, engine_of
from rmoe.compare.jobs import Train
from rmoe.data import prepare
from rmoe.training.config import RunConfig
from rmoe.training.run_folder import read_result

ENGINES = {
    "local": EngineConfig(),
    "ray": EngineConfig(kind="ray"),
    "slurm": EngineConfig(kind="slurm", submitit="local"),
}
RUNS = 2
GOAL = {"share": 0.03, "seconds": 2.0, "run_seconds": 300.0}
GRID = {
    "runs": 1000,
    "workers": 64,
    "run_seconds": 3600.0,
    "checkpoint_seconds": 360.0,
    "away_seconds": 600.0,
}
FAILURES_PER_HOUR = (0.0, 0.001, 0.01, 0.1, 1.0)  # of one worker


class Spent(NamedTuple):
    """Seconds of a run, all in all, and of one of its steps."""

    run: float
    step: float


def by_hand(steps: int, folder: Path) -> Spent:
    """A run of `rmoe train`."""
    asked = ["--preset", "quick", "--training.max-steps", str(steps), "--training.threads", "1"]
    command = [sys.executable, "-m", "rmoe.cli.main", "train", *asked, "--out", str(folder)]
    started = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return Spent(time.monotonic() - started, _step_seconds(folder))


def on(engine: EngineConfig, config: RunConfig, folder: Path) -> Spent:
    """A run on an engine, whose start and end are shared by the runs of this grid."""
    sha256 = prepare(config.data, config.training.sequence_length).manifest.key
    folders = [folder / "runs" / str(number) for number in range(RUNS)]
    jobs = {
        place.name: Train(config=config.to_dict(), folder=str(place), data_sha256=sha256) for place in folders
    }
    started = time.monotonic()
    with engine_of(engine, folder, Wants(cpus=2), 1, 1) as running:
        for name, answer in running.answers(jobs, Wants(cpus=2)):
            if answer.error is not None:
                raise RuntimeError(f"{name}: {answer.error}")
    return Spent((time.monotonic() - started) / RUNS, median(map(_step_seconds, folders)))


def _step_seconds(folder: Path) -> float:
    return (read_result(folder).seconds_per_1k_steps or 0.0) / 1000


def overhead(steps: int, rounds: int) -> dict[str, Any]:
    """Per engine: seconds that a run takes longer than by hand, and its steps' share; what is allowed at 5 minutes."""
    config = RunConfig.from_preset("quick").with_setting("training.max_steps", steps)
    config = config.with_setting("training.threads", 1)
    prepare(config.data, config.training.sequence_length)
    hand: list[Spent] = []
    found: dict[str, list[Spent]] = {name: [] for name in ENGINES}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as scratch:
            hand.append(by_hand(steps, Path(scratch, "hand")))
            for name, engine in ENGINES.items():
                found[name].append(on(engine, config, Path(scratch, name)))
    return {
        "steps": steps,
        "rounds": rounds,
        "by_hand_s": [spent.run for spent in hand],
        **{
            f"{name}_overhead_s": median(one.run - by.run for one, by in zip(spent, hand, strict=True))
            for name, spent in found.items()
        },
        **{
            f"{name}_step_ratio": median(one.step / by.step for one, by in zip(spent, hand, strict=True))
            for name, spent in found.items()
        },
        **{f"{name}_s": [one.run for one in spent] for name, spent in found.items()},
        "allowed_at_5_minutes_s": GOAL["share"] * GOAL["run_seconds"] + GOAL["seconds"],
    }


@dataclass(frozen=True)
class Simulated:
    """How a grid went: wall clock, seconds of training done again, failures met, busy share of the workers."""

    seconds: float
    lost_seconds: float
    failures: int
    busy: float


def simulate(
    work: Sequence[float],
    workers: int,
    *,
    failures_per_hour: float = 0.0,
    checkpoint_seconds: float = 0.0,
    restart_seconds: float = 0.0,
    away_seconds: float = 0.0,
    seed: int = 0,
) -> Simulated:
    """Runs over workers, one after another as workers become free, in the order given.

    Args:
        work: seconds of each run.
        workers: that carry out a run each.
        failures_per_hour: of one worker; times between them are exponential.
        checkpoint_seconds: between a run's checkpoints: what it has done since the last is lost.
        restart_seconds: until a run that was lost trains again, elsewhere.
        away_seconds: until the worker is back.
        seed: of the failures.

    >>> simulate([3.0, 2.0, 2.0], 2).seconds
    4.0
    """
    chance = random.Random(seed)  # nosec B311  a simulation
    free = [(0.0, number) for number in range(workers)]
    todo = list(work)[::-1]
    lost = busy = end = 0.0
    failures = 0
    waiting: list[tuple[float, float]] = []  # (when it was lost, what is left of it)
    while todo or waiting:
        now, worker = heapq.heappop(free)
        if waiting and (waiting[0][0] <= now or not todo):
            since, left = heapq.heappop(waiting)
            now = max(now, since)
        else:
            left = todo.pop()
        until = chance.expovariate(failures_per_hour / 3600) if failures_per_hour else float("inf")
        if until >= left:
            busy += left
            end = max(end, now + left)
            heapq.heappush(free, (now + left, worker))
            continue
        kept = until // checkpoint_seconds * checkpoint_seconds if checkpoint_seconds else 0.0
        failures, lost, busy = failures + 1, lost + until - kept, busy + until
        heapq.heappush(waiting, (now + until, left - kept + restart_seconds))
        heapq.heappush(free, (now + until + away_seconds, worker))
    return Simulated(seconds=end, lost_seconds=lost, failures=failures, busy=busy / (end * workers))


def scale_out(start_seconds: float) -> list[dict[str, Any]]:
    """1,000 runs of an hour on 64 workers, by rate of failure."""
    rows = []
    for rate in FAILURES_PER_HOUR:
        work = [GRID["run_seconds"] + start_seconds] * int(GRID["runs"])
        found = simulate(
            work,
            int(GRID["workers"]),
            failures_per_hour=rate,
            checkpoint_seconds=GRID["checkpoint_seconds"],
            restart_seconds=start_seconds,
            away_seconds=GRID["away_seconds"],
        )
        rows.append(
            {
                "failures_per_worker_hour": rate,
                "failures": found.failures,
                "hours": found.seconds / 3600,
                "lost_share": found.lost_seconds / sum(work),
                "busy": found.busy,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts", nargs="+", choices=("overhead", "simulate"), default=["overhead", "simulate"]
    )
    parser.add_argument("--steps", type=int, default=100, help="of each run that is timed")
    parser.add_argument("--rounds", type=int, default=5, help="overhead: turns")
    parser.add_argument("--start-seconds", type=float, default=6.0, help="simulate: until a run trains")
    parser.add_argument("--out", type=Path, help="folder for a dated result")
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    if "overhead" in options.parts:
        os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
        figures["overhead"] = overhead(options.steps, options.rounds)
    if "simulate" in options.parts:
        figures["grid"], figures["simulate"] = GRID, scale_out(options.start_seconds)
    write_result("-".join(["engines", *options.parts]), figures, options.out)


if __name__ == "__main__":
    main()
