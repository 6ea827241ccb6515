"""What a router costs: seconds per step and peak memory, of training steps with nothing else running.

Each router gets a process of its own, since peak memory is a process's. They take turns, so that whatever else slows
the machine slows all alike; the median over all turns is reported. All of them run on one machine.
"""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from rmoe.compare.engines.engine import Failed, Wants
from rmoe.compare.engines.process import Process, threads_of
from rmoe.records import Record
from rmoe.results.rows import Timing
from rmoe.results.run import Hardware
from rmoe.training.config import RunConfig

WARM_UP_STEPS = 3
STEPS = 8
GROUP = 6  # routers that take turns: as many processes are in memory at once


class Measured(Record, frozen=True, kw_only=True):
    """Wall clock of each step, the process's peak memory so far, and what it ran on."""

    step_seconds: list[float]
    peak_mib: float
    hardware: Hardware


class TimeSteps(Record, frozen=True, kw_only=True):
    """Train a fresh model a few steps; gives `Measured`."""

    config: dict[str, Any]
    steps: int

    def carry_out(self) -> Measured:
        return time_steps(RunConfig.from_dict(self.config), self.steps)


class TimeAlone(Record, frozen=True, kw_only=True):
    """Time every router on one machine; gives router -> `Timing`.

    Attributes:
        configs: router -> the configuration of one of its runs.
        threads: of each process.
        processes: of each run.
        rounds: turns each router gets.
        logs: folder for what its processes print.
    """

    configs: dict[str, dict[str, Any]]
    threads: int
    processes: int
    rounds: int
    logs: str

    def carry_out(self) -> dict[str, Timing]:
        """Router -> timing.

        Raises:
            RunError: a process failed.
        """
        names, found = list(self.configs), dict[str, Timing]()
        begun = datetime.now(UTC).isoformat()
        for start in range(0, len(names), GROUP):
            group = names[start : start + GROUP]
            turns: dict[str, list[Measured]] = {name: [] for name in group}
            with ExitStack() as stack:
                workers = {
                    name: Process(threads_of(self.threads), Path(self.logs, f"timing-{name}.log"))
                    for name in group
                }
                for worker in workers.values():
                    worker.start()
                    stack.callback(worker.close)
                for _ in range(self.rounds):
                    for name in group:
                        turns[name].append(self._turn(workers[name], name))
            found |= {name: self._timing(turns[name], begun) for name in group}
        return found

    def _turn(self, worker: Process, name: str) -> Measured:
        answer = worker.do(TimeSteps(config=self.configs[name], steps=STEPS), Wants(processes=self.processes))
        if answer.error is not None:
            raise Failed(f"timing {name} failed: {answer.error}")
        measured: Measured = answer.value
        return measured

    def _timing(self, turns: list[Measured], begun: str) -> Timing:
        seconds = [second for turn in turns for second in turn.step_seconds]
        return Timing(
            seconds_per_1k_steps=1000 * median(seconds),
            peak_mib=turns[-1].peak_mib,
            steps=len(seconds),
            rounds=self.rounds,
            machine=os.uname().nodename,
            hardware=turns[-1].hardware,
            begun=begun,
        )


def time_steps(config: RunConfig, steps: int) -> Measured:
    """Train a fresh model through the loop of real runs, without evaluation and checkpoints.

    Returns:
        The seconds of each of `steps` optimizer steps, after some for warming up.
    """
    from rmoe.data import prepare
    from rmoe.training.build import build_model, load_plugins, model_config
    from rmoe.training.checkpoint import CheckpointStore
    from rmoe.training.environment import hardware
    from rmoe.training.loop import Loop, peak_mib
    from rmoe.training.place import place_of, torch_settings
    from rmoe.training.plan import StepPlan
    from rmoe.training.run import make_learner, spread_model

    load_plugins(config.plugin)
    training = config.training
    corpus = prepare(config.data, training.sequence_length)
    with torch_settings(config) as threads, tempfile.TemporaryDirectory() as scratch:
        out, place = Path(scratch), place_of(config)
        model = build_model(model_config(config, corpus.vocab_size), training.seed)
        learner, accelerator = make_learner(spread_model(model, config, place), config, out, place)
        clock = _clock()
        loop = Loop(
            learner,
            training,
            StepPlan(max_steps=WARM_UP_STEPS + steps, log_every=config.logging.every),
            accelerator,
            dataset=corpus.train,
            data_sha256=corpus.manifest.key,
            store=CheckpointStore(out, "timing"),
            in_unit=lambda split, loss: {},
            hooks=[clock],
        )
        loop.run()
        marks: list[float] = clock.marks
        return Measured(
            step_seconds=[end - start for start, end in pairwise(marks)][WARM_UP_STEPS - 1 :],
            peak_mib=peak_mib(loop.device),
            hardware=hardware(threads, training.device),
        )


def _clock() -> Any:
    """A hook that notes when each step ends."""
    from rmoe.training.hooks import Hook

    class Clock(Hook):
        def __init__(self) -> None:
            self.marks: list[float] = []

        def step_end(self, loop: Any) -> None:
            self.marks.append(time.perf_counter())

    return Clock()
