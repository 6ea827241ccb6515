"""What an engine adds to a run, and how a grid of 1,000 runs would go on 64 workers that fail.

    python -m benchmarks.engines [--parts overhead simulate] [--steps 1500] [--out benchmarks/results]

`overhead`: two runs of a small model, one after the other, on each engine, against `rmoe train` called twice by hand:
wall clock of everything, the engine's start and end included, per run. Ray makes a cluster of this machine, Slurm is
submitit's local executor.
`simulate`: `rmoe.planning.grid.simulate` with the overheads measured: 1,000 runs of an hour.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.results import write_result
from rmoe.compare.engines import EngineConfig, Wants, engine_of
from rmoe.compare.jobs import Train
from rmoe.data import prepare
from rmoe.planning.grid import simulate
from rmoe.training.config import RunConfig

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


def by_hand(config: RunConfig, steps: int, folder: Path) -> float:
    """Seconds of a run of `rmoe train`."""
    asked = [
        "--preset",
        "quick",
        "--training.max-steps",
        str(steps),
        "--training.seed",
        "7",
        "--out",
        str(folder),
    ]
    started = time.monotonic()
    command = [sys.executable, "-m", "rmoe.cli.main", "train", *asked]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.monotonic() - started


def on(engine: EngineConfig, config: RunConfig, folder: Path) -> float:
    """Seconds of a run on an engine, its start and end shared by the runs of this grid."""
    sha256 = prepare(config.data, config.training.sequence_length).manifest.key
    jobs = {
        f"rmoe-seed{seed}": Train(
            config=config.with_setting("training.seed", seed).to_dict(),
            folder=str(folder / "runs" / str(seed)),
            data_sha256=sha256,
        )
        for seed in range(RUNS)
    }
    started = time.monotonic()
    with engine_of(engine, folder, Wants(cpus=2), 1, 1) as running:
        for name, answer in running.answers(jobs, Wants(cpus=2)):
            if answer.error is not None:
                raise RuntimeError(f"{name}: {answer.error}")
    return (time.monotonic() - started) / RUNS


def overhead(steps: int) -> dict[str, Any]:
    """Per engine: seconds that a run takes longer than by hand, and what that is of the goal at a 5-minute run."""
    config = RunConfig.from_preset("quick").with_setting("training.max_steps", steps)
    prepare(config.data, config.training.sequence_length)
    with tempfile.TemporaryDirectory() as scratch:
        hand = sum(by_hand(config, steps, Path(scratch, f"hand{n}")) for n in range(RUNS)) / RUNS
        found = {name: on(engine, config, Path(scratch, name)) for name, engine in ENGINES.items()}
    allowed = GOAL["share"] * GOAL["run_seconds"] + GOAL["seconds"]
    return {
        "steps": steps,
        "by_hand_s": hand,
        **{f"{name}_s": seconds for name, seconds in found.items()},
        **{f"{name}_overhead_s": seconds - hand for name, seconds in found.items()},
        "allowed_at_5_minutes_s": allowed,
    }


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
    parser.add_argument("--steps", type=int, default=1500, help="of each run that is timed")
    parser.add_argument("--start-seconds", type=float, default=6.0, help="simulate: until a run trains")
    parser.add_argument("--out", type=Path, help="folder for a dated result")
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    if "overhead" in options.parts:
        figures["overhead"] = overhead(options.steps)
    if "simulate" in options.parts:
        figures["grid"], figures["simulate"] = GRID, scale_out(options.start_seconds)
    write_result("-".join(["engines", *options.parts]), figures, options.out)


if __name__ == "__main__":
    main()
