"""What a router costs: seconds per step and peak memory, of training steps with nothing else running.

Each router gets a process of its own, since peak memory is a process's. They take turns, so that whatever else slows
the machine slows all alike; the median over all turns is reported.
"""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from rmoe.compare.jobs import Measured, Time
from rmoe.compare.pool import Worker
from rmoe.errors import RunError
from rmoe.results.rows import Timing
from rmoe.training.config import RunConfig

WARM_UP_STEPS = 3
STEPS = 8
GROUP = 6  # routers that take turns: as many processes are in memory at once


def time_alone(configs: dict[str, RunConfig], threads: int, rounds: int, logs: Path) -> dict[str, Timing]:
    """Time every router.

    Args:
        configs: router -> the configuration of one of its runs.
        rounds: turns each router gets.

    Raises:
        RunError: a worker failed.
    """
    names, found = list(configs), {}
    for start in range(0, len(names), GROUP):
        group = names[start : start + GROUP]
        with ExitStack() as stack:
            workers = {name: Worker(threads, logs / f"timing-{name}.log") for name in group}
            for worker in workers.values():
                worker.start()
                stack.callback(worker.close)
            seconds: dict[str, list[float]] = {name: [] for name in group}
            peak = dict.fromkeys(group, 0.0)
            for _ in range(rounds):
                for name in group:
                    measured = _turn(workers[name], name, configs[name])
                    seconds[name] += measured.step_seconds
                    peak[name] = measured.peak_mib
        for name in group:
            found[name] = Timing(
                seconds_per_1k_steps=1000 * median(seconds[name]),
                peak_mib=peak[name],
                steps=len(seconds[name]),
                rounds=rounds,
            )
    return found


def _turn(worker: Worker, name: str, config: RunConfig) -> Measured:
    answer = worker.do(Time(config=config.to_dict(), steps=STEPS))
    if answer.error is not None:
        raise RunError(f"timing {name} failed: {answer.error}", "every run", "run the same command again")
    return msgspec.convert(answer.value, Measured)


def time_steps(config: RunConfig, steps: int) -> Measured:
    """In a worker: train a fresh model through the loop of real runs, without evaluation and checkpoints.

    Returns:
        The seconds of each of `steps` optimizer steps, after some for warming up.
    """
    from rmoe.data import prepare
    from rmoe.training.build import build_model, load_plugins, model_config
    from rmoe.training.checkpoint import CheckpointStore
    from rmoe.training.loop import Loop, peak_mib
    from rmoe.training.metrics import MetricsLog
    from rmoe.training.place import place_of, torch_settings
    from rmoe.training.plan import Plan
    from rmoe.training.run import make_learner

    load_plugins(config.plugin)
    training = config.training
    corpus = prepare(config.data, training.sequence_length)
    with torch_settings(config), tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        model = build_model(model_config(config, corpus.vocab_size), training.seed)
        learner, accelerator = make_learner(model, config, out, place_of(config))
        clock = _clock()
        loop = Loop(
            learner,
            training,
            Plan(max_steps=WARM_UP_STEPS + steps, log_every=config.logging.every),
            accelerator,
            dataset=corpus.train,
            data_sha256=corpus.manifest.key,
            store=CheckpointStore(out, "timing"),
            metrics=MetricsLog(out / "metrics.jsonl"),
            in_unit=lambda split, loss: {},
            hooks=[clock],
        )
        loop.run()
        marks: list[float] = clock.marks
        return Measured(
            step_seconds=[end - start for start, end in pairwise(marks)][WARM_UP_STEPS - 1 :],
            peak_mib=peak_mib(loop.device),
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
