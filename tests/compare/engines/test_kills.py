"""kill -9 in mid-grid on a real Ray cluster: a worker, a node, the driver, each once in one grid, in any order.

All runs finish with the bits of a grid that nobody touched, and no run that had a checkpoint begins again from zero.

    RMOE_KILLS=10 python -m pytest tests/compare/engines/test_kills.py -m slow -s
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

from tests.compare.engines.cluster import Cluster, descendants

pytest.importorskip("ray")

from rmoe.compare.compare import Options, compare
from tests.compare.test_compare import config_of, weights

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
TIMES = int(os.environ.get("RMOE_KILLS", "1"))
STEPS, KEYS = 300, [f"{router}-seed{seed}" for router in ("smoe", "rmoe") for seed in (0, 1)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    options = Options(jobs=2, timing_rounds=0, analysis_tokens=0)
    compare(config_of(folder, STEPS), ["smoe", "rmoe"], 2, folder / "whole", options=options)
    return folder, {key: weights(folder / "whole", key) for key in KEYS}


@pytest.fixture(scope="module")
def cluster():
    found = Cluster(cpus=1)
    try:
        yield found
    finally:
        found.close()


def start(cluster: Cluster, folder: Path, out: Path) -> subprocess.Popen:
    code = (
        "from pathlib import Path; from tests.compare.test_compare import config_of;"
        "from rmoe.compare.compare import Options, compare; from rmoe.compare.engines import EngineConfig;"
        f"engine = EngineConfig(kind='ray', address={cluster.address!r});"
        f"compare(config_of(Path({str(folder)!r}), {STEPS}), ['smoe', 'rmoe'], 2, Path({str(out)!r}),"
        " options=Options(timing_rounds=0, analysis_tokens=0, engine=engine))"
    )
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=open(f"{out}.err", "ab"))


def under_way(out: Path) -> list[str]:
    """Runs with a checkpoint and without a result."""
    return [
        key
        for key in KEYS
        if list(out.glob(f"runs/{key}/checkpoints/checkpoint-*"))
        and not (out / "runs" / key / "result.json").exists()
    ]


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def carriers(cluster: Cluster) -> list[int]:
    """Processes that carry runs out: Ray's workers and their children."""
    below = [pid for node in cluster.nodes.values() for pid in descendants(node.pid)]
    children = [pid for pid in below if b"rmoe.compare.engines.child" in _command(pid)]
    return children and [*cluster.workers(), *children]


def wait_for_work(cluster: Cluster, out: Path, driver: subprocess.Popen) -> list[int]:
    """Until a run with a checkpoint is carried out; gives the processes that do."""
    deadline = time.monotonic() + 300
    while not (under_way(out) and (found := carriers(cluster))):
        assert driver.poll() is None, f"no run is left: {Path(f'{out}.err').read_text()}"
        assert time.monotonic() < deadline, "no run has a checkpoint"
        time.sleep(0.02)
    return found


def begun_at_zero(out: Path, key: str) -> int:
    log = out / "logs" / f"{key}.log"
    return log.read_text().count("starting at step 0") if log.exists() else 0


@pytest.mark.parametrize("trial", range(TIMES))
def test_killed_in_mid_grid(trial, cluster, reference, tmp_path, note):
    folder, bits = reference
    name = f"node{trial}"
    cluster.add(name)
    out, chance = tmp_path / "out", random.Random(trial)
    caught: dict[str, int] = {}  # run with a checkpoint at a kill -> how often it had begun at step 0
    driver = start(cluster, folder, out)
    try:
        for victim in chance.sample(["worker", "node", "driver"], 3):
            wait_for_work(cluster, out, driver)
            time.sleep(chance.random())
            below = wait_for_work(cluster, out, driver)  # the run may have ended meanwhile
            found = under_way(out)
            caught |= {key: begun_at_zero(out, key) for key in found if key not in caught}
            if victim == "worker":
                os.kill(chance.choice(below), signal.SIGKILL)
            elif victim == "node":
                cluster.kill(name)
            else:
                driver.kill()
                driver.wait()
                driver = start(cluster, folder, out)
            note(kind=f"ray: {victim} killed", trial=trial, under_way=len(found))
        assert driver.wait(timeout=900) == 0, Path(f"{out}.err").read_text()
    finally:
        driver.kill()
        if name in cluster.nodes:
            cluster.kill(name)
    assert {key: weights(out, key) for key in KEYS} == bits
    for key, times in caught.items():
        assert begun_at_zero(out, key) == times, key
