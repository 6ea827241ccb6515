"""The study at equal time: shorter runs of the baseline give the law of its loss, steps run alone give the times.

    python -m experiments.study branches --data-dir ../shared/data --out runs/study   # results/study_branches.jsonl
    python -m experiments.study times --data-dir ../shared/data                       # results/study_times.json
    python -m experiments.study table                                                 # both stand in results/study.md

See `rmoe.compare.equal_time` for the law and what it takes for granted.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.lines import read_rows
from experiments.study_rows import StudyRow
from rmoe.compare.equal_time import equal_time, fit_law
from rmoe.compare.timing import TimeAlone
from rmoe.errors import RequestError
from rmoe.records import Record, append_records, read_record, write_record
from rmoe.results.comparison import Interval
from rmoe.results.rows import Timing
from rmoe.results.run import Hardware, Versions
from rmoe.training.config import RunConfig
from rmoe.training.environment import versions
from rmoe.training.run import train

VERSION = 1
ROUNDS = 6


class BranchRow(Record, frozen=True, kw_only=True):
    """A shorter run of the baseline: bits per byte on the test text."""

    seed: int
    steps: int
    test: float
    versions: Versions
    hardware: Hardware

    @property
    def key(self) -> tuple[int, int]:
        return self.seed, self.steps


class Times(Record, frozen=True, kw_only=True):
    """Router -> its time and memory, each run alone, in turn, on one machine."""

    schema_version: int = VERSION
    timings: dict[str, Timing]
    versions: Versions


def train_branches(config: RunConfig, folder: Path, results: Path) -> int:
    """Train the shorter runs of every finished run in `folder` that kept its branch points; returns how many.

    Args:
        config: of the baseline's runs, but for the seed.
        folder: of a grid, with `runs/ROUTER-seedN`.
    """
    known = {row.key for row in read_rows(results, BranchRow)}
    added = 0
    for whole in sorted(folder.glob(f"runs/{config.router}-seed*/result.json")):
        seed = int(whole.parent.name.rpartition("-seed")[2])
        for point in config.training.branch_points:
            steps = point * 5 // 4  # the last fifth is the decay
            branch = config.with_setting("training.seed", seed).shorter(steps)
            kept = whole.parent / "checkpoints" / f"checkpoint-{point}"
            if (seed, steps) in known or not kept.exists():
                continue
            out = folder / "branches" / f"{config.router}-seed{seed}-steps{steps}"
            found = train(branch, out, resume=out.exists(), progress=False, branch_of=whole.parent)
            assert found.test is not None
            row = BranchRow(
                seed=seed, steps=steps, test=found.test, versions=found.versions, hardware=found.hardware
            )
            append_records(results, row)
            print(f"seed {seed}, {steps} steps: {found.test:.4f} bits", flush=True)
            added += 1
    return added


def time_routers(config: RunConfig, routers: Sequence[str], results: Path) -> Times:
    """Time training steps of every router, taking turns, and write them to `results`."""
    with tempfile.TemporaryDirectory() as logs:
        configs = {router: config.with_setting("router", router).to_dict() for router in routers}
        timed = TimeAlone(
            configs=configs, threads=config.training.threads or 1, processes=1, rounds=ROUNDS, logs=logs
        )
        found = Times(timings=timed.carry_out(), versions=versions())
    write_record(results, found)
    return found


def section(rows: Sequence[StudyRow], baseline: str, margin: float, branches: Path, times: Path) -> str:
    """Markdown: the arms of one grid against its baseline at equal seconds; empty without branches or times.

    Args:
        rows: of one grid.
    """
    by_seed: dict[int, dict[int, float]] = defaultdict(dict)
    bits: dict[str, dict[int, float]] = defaultdict(dict)
    for row in rows:
        bits[row.router][row.seed] = row.test
        if row.router == baseline:
            by_seed[row.seed][row.steps] = row.test
    for branch in read_rows(branches, BranchRow):
        by_seed[branch.seed][branch.steps] = branch.test
    whole = [lengths for lengths in by_seed.values() if len(lengths) == 3]
    if not whole or not times.exists():
        return ""
    timings = read_record(times, Times, VERSION).timings
    steps = sorted(whole[0])
    losses = [float(np.mean([lengths[n] for lengths in whole])) for n in steps]
    law = fit_law(steps, losses)
    shown = ", ".join(f"{loss:.4f} after {n:,}" for n, loss in zip(steps, losses, strict=True))
    if law is None:
        raise RequestError(branches.name, shown, "losses that fall with the steps, and by less and less")
    seconds = {name: timing.seconds_per_1k_steps for name, timing in timings.items()}
    found = equal_time(bits, seconds, baseline, law, "bits_per_byte", "test", margin)
    machine = timings[baseline].hardware
    lines = [
        f"**At equal time.** `{baseline}`'s test bits, {shown} steps ({len(whole)} seeds), follow a power law with "
        f"exponent {law.exponent:.2f} and floor {law.floor:.3f} bits; each router is taken to share both. Times: "
        f"training steps run alone, in turn, median of {timings[baseline].steps} steps"
        + (f" ({machine.cpu}, {machine.threads} thread)" if machine else "")
        + ". Intervals are 95% over pairs.",
        "",
        "| router | pairs | step time over the baseline's | difference at equal steps | at equal seconds | interval "
        "| effective speed-up | interval |",
        "|---|---:|---:|---:|---:|---|---:|---|",
    ]
    for name, one in found.items():
        plain = [bits[name][seed] - bits[baseline][seed] for seed in one.difference.seeds]
        cells = [
            f"`{name}`",
            str(len(plain)),
            f"{one.seconds_ratio:.2f}",
            f"{np.mean(plain):+.4f}",
            f"{one.difference.mean:+.4f}",
            _range(one.difference.interval, "+.4f"),
            f"{one.speedup:.2f}",
            _range(one.speedup_interval, ".2f"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _range(interval: Interval | None, form: str) -> str:
    return f"{interval.low:{form}} to {interval.high:{form}}" if interval else ""
