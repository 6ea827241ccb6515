"""SIGKILL at random moments and while saving, one process and two: every run ends in the bits of an uninterrupted one.

A checkpoint is written after every step, so many of the random kills fall into the middle of saving, too.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import pytest

from rmoe.parallel import ParallelConfig
from rmoe.training.config import CheckpointConfig, RunConfig
from tests.torture.conftest import AMOUNT
from tests.training import tiny
from tests.training.test_kill import ROOT, SETTINGS

STEPS = 40
RUN = [*SETTINGS, "--training.max-steps", str(STEPS), "--checkpoints.every", "1", "--training.threads", "1"]
TIMEOUT = 300.0
"""No process here needs a tenth of it: whoever is not done by then is stuck."""


class Running(Protocol):
    """A run at work."""

    def alive(self) -> bool: ...

    def kill(self) -> None:
        """All of it in one blow, as when a machine dies."""

    def finish(self) -> None:
        """Wait for its end, which must be a good one."""


class Launched:
    """`rmoe train` as its users start it."""

    def __init__(self, out: Path, arguments: list[str]) -> None:
        command = [sys.executable, "-m", "rmoe.cli.main", "train", "--out", str(out), *arguments]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def finish(self) -> None:
        try:
            _, stderr = self.process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"stuck: {self.process.communicate()[1]}") from None
        assert self.process.returncode == 0, stderr


class Forked:
    """Ranks forked from a process that has everything imported: no seconds to start, so kills by the dozen."""

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rmoe.training.run"])

    def __init__(self, ranks: int, fsdp: int, text: Path, out: Path, resume: bool) -> None:
        config = replace(
            tiny.config(text, max_steps=STEPS),
            checkpoints=CheckpointConfig(every=1),
            parallel=ParallelConfig(fsdp=fsdp),
        )
        surroundings = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": free_port()}
        self.processes = []
        for rank in range(ranks):
            own = {"RANK": rank, "LOCAL_RANK": rank, **surroundings} if ranks > 1 else {}
            arguments = (config, out, resume, {"MASTER_ADDR": "127.0.0.1"} | own)
            self.processes.append(self.context.Process(target=_train, args=arguments))
        for process in self.processes:
            process.start()

    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def finish(self) -> None:
        for process in self.processes:
            process.join(TIMEOUT)
            assert process.exitcode == 0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def _train(config: RunConfig, out: Path, resume: bool, surroundings: dict[str, object]) -> None:
    os.environ |= {name: str(value) for name, value in surroundings.items()}
    from rmoe.training.run import train

    train(config, out, resume=resume, progress=False)


@dataclass(frozen=True)
class Kind:
    """A way to run, and at which kills (every n-th) to wait until a checkpoint is being written; 0 is never."""

    start: Callable[[Path, Path, bool], Running]
    every_saving: int = 0


def _launched(text: Path, out: Path, resume: bool) -> Running:
    return Launched(out, ["--data", str(text), *(["--resume"] if resume else RUN)])


KINDS = {
    "one process": Kind(_launched),
    "one process, while saving": Kind(partial(Forked, 1, 1), every_saving=1),
    "two ranks": Kind(partial(Forked, 2, 1), every_saving=2),
    "two ranks, FSDP2": Kind(partial(Forked, 2, 2), every_saving=2),
}


def wait_for(process: Running, seen: Callable[[], bool], pause: float) -> None:
    deadline = time.monotonic() + TIMEOUT
    while process.alive() and not seen():
        assert time.monotonic() < deadline, "stuck"
        time.sleep(pause)


def newest(out: Path) -> int:
    names = [path.name.rpartition("-")[2] for path in (out / "checkpoints").glob("checkpoint-*")]
    return max((int(name) for name in names if name.isdigit()), default=-1)


def is_saving(out: Path) -> bool:
    """Something that is not a checkpoint yet, or not any more, lies there."""
    return any((out / "staging").glob("*"))


def torture(kind: Kind, text: Path, folder: Path, kills: int, seed: int) -> dict[str, object]:
    """Kill runs until `kills` kills have hit; finish each run and compare it with an uninterrupted one."""
    moments = random.Random(seed)
    kind.start(text, folder / "whole", False).finish()
    expected = tiny.weights(folder / "whole")
    hit = staged = runs = 0
    while hit < kills:
        runs += 1
        out = folder / f"run-{runs}"
        while hit < kills and not (out / "result.json").exists():
            before = newest(out)
            process = kind.start(text, out, (out / "config.json").exists())
            # This process, not an earlier one, has published a checkpoint.
            wait_for(process, lambda: newest(out) != before, 0.002)  # noqa: B023 - called before the next turn
            time.sleep(moments.uniform(0, 0.3))
            if kind.every_saving and hit % kind.every_saving == 0:
                wait_for(process, lambda: is_saving(out), 0.0)  # noqa: B023
                time.sleep(moments.uniform(0, 0.004))
            if process.alive():
                process.kill()
                hit += 1
                staged += is_saving(out)
            else:
                process.finish()
        if not (out / "result.json").exists():
            kind.start(text, out, True).finish()
        assert tiny.weights(out) == expected
    return {"kills": hit, "while_saving": staged, "runs": runs, "identical": runs}


SEED = int(os.environ.get("RMOE_TORTURE_SEED", "0"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
@pytest.mark.skipif(not AMOUNT.everything, reason="RMOE_TORTURE=normal or full")
def test_killed(kind, text, tmp_path, note, capsys):
    figures = {"kind": f"kill -9: {kind}"} | torture(KINDS[kind], text, tmp_path, AMOUNT.kills, SEED)
    note(**figures)
    with capsys.disabled():
        print(f"\n{figures}")


def test_killed_in_short(text, tmp_path):
    """The short form: a few kills, every other while saving, of processes that need no second to start."""
    figures = torture(Kind(partial(Forked, 1, 1), every_saving=2), text, tmp_path, kills=3, seed=SEED)
    assert figures["kills"] == 3
