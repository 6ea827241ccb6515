"""One grid on every engine: equal bits and summary; runs that span devices; results without a shared disk."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from rmoe.compare import plan as plans
from rmoe.compare.compare import Options, compare
from rmoe.compare.engines import EngineConfig
from rmoe.errors import RequestError
from rmoe.parallel import ParallelConfig
from rmoe.results.rows import read_rows
from tests.compare.test_compare import config_of, weights

pytestmark = pytest.mark.slow

QUIET = Options(timing_rounds=0, analysis_tokens=0)
PINNED = """
import os
from pathlib import Path
with open(os.environ["SEEN"], "a") as file:
    file.write(f'{os.environ.get("CUDA_VISIBLE_DEVICES")} {os.getpid()}\\n')
"""


def on(engine: EngineConfig, **options: object) -> Options:
    return replace(QUIET, engine=engine, **options)


@pytest.fixture(scope="module")
def cluster():
    from tests.compare.engines.cluster import Cluster

    pytest.importorskip("ray")
    found = Cluster(cpus=1)
    try:
        found.add("second")
        yield found
    finally:
        found.close()


def test_three_engines_give_the_same_bits_and_the_same_summary(cluster, tmp_path):
    pytest.importorskip("submitit")
    config = config_of(tmp_path)
    engines = {
        "local": EngineConfig(),
        "ray": EngineConfig(kind="ray", address=cluster.address),
        "slurm": EngineConfig(kind="slurm", submitit="local"),
    }
    found = {
        name: compare(config, ["smoe", "rmoe"], 4, tmp_path / name, options=on(engine))
        for name, engine in engines.items()
    }
    keys = [f"{router}-seed{seed}" for router in ("smoe", "rmoe") for seed in range(4)]
    bits = {name: [weights(tmp_path / name, key) for key in keys] for name in engines}
    assert len(set(bits["local"])) == 8
    assert bits["local"] == bits["ray"] == bits["slurm"]
    assert found["local"] == found["ray"] == found["slurm"]
    # An engine changed in mid-grid: allowed, said, and what is there stays.
    lines = (tmp_path / "ray" / plans.RESULTS).read_bytes()
    again = compare(config, ["smoe", "rmoe"], 4, tmp_path / "ray", options=QUIET)
    assert (tmp_path / "ray" / plans.RESULTS).read_bytes() == lines
    assert any("The grid was begun on ray and is continued on local" in note for note in again.notes)


def test_results_without_a_shared_disk(cluster, tmp_path):
    engine = EngineConfig(kind="ray", address=cluster.address, fetch="model")
    config = config_of(tmp_path)
    out = tmp_path / "out"
    options = Options(timing_rounds=1, analysis_tokens=512, engine=engine)
    summary = compare(config, ["smoe", "rmoe"], 1, out, options=options)
    compare(config, ["smoe", "rmoe"], 1, tmp_path / "near", options=replace(QUIET, jobs=2))
    for key in ("smoe-seed0", "rmoe-seed0"):
        assert weights(out, key) == weights(tmp_path / "near", key)
        assert not (out / "runs" / key / "checkpoints").exists()
        assert (out / "runs" / key / "metrics.jsonl").exists()
    assert any("without a shared folder" in note for note in summary.notes)
    assert (out / "analysis.json").exists()
    rows, _ = read_rows(out / plans.RESULTS)
    assert {row.timing.machine for row in rows} == {os.uname().nodename}
    assert all(row.result.model == str(out / "runs" / row.key / "model") for row in rows)
    light = on(replace(engine, fetch="result"), timing_rounds=0)
    compare(config, ["smoe"], 1, tmp_path / "light", options=light)
    assert sorted(path.name for path in (tmp_path / "light" / "runs" / "smoe-seed0").iterdir()) == [
        "config.json",
        "metrics.jsonl",
        "result.json",
        "run.lock",
    ]
    with pytest.raises(RequestError, match=r"engine\.fetch is 'result'; allowed: model with --sweep"):
        compare(config, ["smoe"], 1, tmp_path / "sweep", sweep=["learning_rate=1e-3,1e-2"], options=light)


def test_a_run_that_spans_two_devices(tmp_path, monkeypatch):
    """Under torchrun, each of its processes a rank, pinned to a block of devices; with the losses of one process."""
    monkeypatch.setenv("RMOE_SIMULATED_DEVICES", "2")
    seen, plugin = tmp_path / "seen", tmp_path / "plugin.py"
    monkeypatch.setenv("SEEN", str(seen))
    plugin.write_text(PINNED)
    config = config_of(tmp_path).with_setting("hidden_dropout", 0.0)  # each rank draws its own
    # The balance loss is over a micro-batch: one process is given those that two would have.
    config = replace(config, plugin=(str(plugin),)).with_setting("training.micro_batch_size", 1)
    spread = replace(config, parallel=ParallelConfig(fsdp=2))
    options = replace(QUIET, timing_rounds=1)
    two = compare(spread, ["smoe", "rmoe"], 1, tmp_path / "two", options=options)
    blocks = {tuple(line.split()) for line in seen.read_text().splitlines()} - {("None", str(os.getpid()))}
    ranks = [block for block, _ in blocks if block == "0,1"]
    assert len(ranks) >= 4  # two runs of two ranks
    seen.write_text("")
    one = compare(config, ["smoe", "rmoe"], 1, tmp_path / "one", options=QUIET)
    pinned = {line.split()[0] for line in seen.read_text().splitlines()}
    assert {"0", "1"} <= pinned  # one run on each
    values = [[router.test.mean for router in summary.routers] for summary in (one, two)]
    assert values[0] == pytest.approx(values[1], abs=1e-6)
    rows, _ = read_rows(tmp_path / "two" / plans.RESULTS)
    assert all(row.timing.steps == 8 for row in rows)
    with pytest.raises(RequestError, match=r"training\.batch_size is 2; allowed: a multiple of 4"):
        compare(
            replace(config, parallel=ParallelConfig(fsdp=4)), ["smoe"], 1, tmp_path / "four", options=QUIET
        )
    assert not (tmp_path / "four").exists()


def test_a_text_that_is_another_one_on_a_node_is_said(cluster, tmp_path):
    """The job's own check: the text changed after the grid was set up."""
    from rmoe.compare.engines import Wants
    from rmoe.compare.engines.local import LocalEngine
    from rmoe.compare.jobs import Train

    config = config_of(tmp_path)
    job = Train(config=config.to_dict(), folder=str(tmp_path / "run"), data_sha256="0" * 64)
    with LocalEngine([[]], 1, tmp_path / "logs") as engine:
        (answer,) = dict(engine.answers({"run": job}, Wants())).values()
    assert f"the text of {os.uname().nodename} is not the comparison's (sha256 " in answer.error
    assert not (tmp_path / "run").exists()
    assert msgspec.json.encode(job)


def test_a_folder_of_the_data_is_prepared_once(tmp_path):
    config = config_of(tmp_path)
    compare(config, ["smoe"], 2, tmp_path / "out", options=replace(QUIET, jobs=2))
    assert len(list(Path(config.data.cache_dir, "corpora").iterdir())) == 1
