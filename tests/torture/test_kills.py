"""SIGKILL at random moments, one process and two ranks: every run ends in the bits of an uninterrupted one.

A checkpoint is written after every step, so many of the kills fall into the middle of saving.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.torture.conftest import AMOUNT
from tests.training import tiny
from tests.training.test_kill import ROOT, SETTINGS

STEPS = 40
RUN = [*SETTINGS, "--training.max-steps", str(STEPS), "--checkpoints.every", "1", "--training.threads", "1"]
TIMEOUT = 300.0
"""No process here needs a tenth of it: whoever is not done by then is stuck."""


def start(ranks: int, text: Path, out: Path, *more: str) -> subprocess.Popen:
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*launch, "-m", "rmoe.cli.main", "train", "--data", str(text), "--out", str(out), *more]
    # A session of its own, so that all of it can be killed in one blow, as when a machine dies.
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> str:
    try:
        _, stderr = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"stuck: {process.communicate()[1]}") from None
    assert process.returncode == 0, stderr
    return stderr


def wait_until_training(process: subprocess.Popen, out: Path) -> None:
    """Until this process, not an earlier one, has published a checkpoint."""
    before = newest(out)
    deadline = time.monotonic() + TIMEOUT
    while process.poll() is None and newest(out) == before:
        assert time.monotonic() < deadline, "stuck before the first checkpoint"
        time.sleep(0.002)


def newest(out: Path) -> int:
    names = [path.name.rpartition("-")[2] for path in (out / "checkpoints").glob("checkpoint-*")]
    return max((int(name) for name in names if name.isdigit()), default=-1)


def torture(kind: str, text: Path, folder: Path, kills: int, seed: int) -> dict[str, object]:
    """Kill runs until `kills` kills have hit; finish each run and compare it with an uninterrupted one."""
    ranks = 1 if kind == "one process" else 2
    more = [*RUN, "--parallel.fsdp", "2"] if kind == "fsdp2" else RUN
    moments = random.Random(seed)
    finish(start(ranks, text, folder / "whole", *more))
    expected = tiny.weights(folder / "whole")
    hit = staged = runs = 0
    while hit < kills:
        runs += 1
        out = folder / f"run-{runs}"
        while hit < kills and not (out / "result.json").exists():
            process = start(ranks, text, out, *(["--resume"] if (out / "config.json").exists() else more))
            wait_until_training(process, out)
            time.sleep(moments.uniform(0, 0.6))
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                hit += 1
                staged += any((out / "staging").glob("*"))
            process.communicate()
        if not (out / "result.json").exists():
            finish(start(ranks, text, out, "--resume"))
        assert tiny.weights(out) == expected
    return {"kind": kind, "kills": hit, "while_saving": staged, "runs": runs, "identical": runs}


@pytest.mark.parametrize(
    "kind",
    ["one process"] if not AMOUNT.everything else ["one process", "two ranks", "fsdp2"],
)
@pytest.mark.slow
def test_killed_at_random_moments(kind, text, tmp_path, note, capsys):
    figures = torture(kind, text, tmp_path, AMOUNT.kills, seed=int(os.environ.get("RMOE_TORTURE_SEED", "0")))
    note(**figures)
    with capsys.disabled():
        print(f"\n{figures}")
