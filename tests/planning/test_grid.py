"""A grid on paper: from a pilot's measured rate; micro-batches chosen."""

from __future__ import annotations

import json
import time

import pytest

from rmoe.cli.main import main
from rmoe.compare.compare import Options, compare
from rmoe.planning.grid import Pilot, pilots_in, plan_grid
from rmoe.training.run import train
from tests.compare.test_compare import config_of


@pytest.fixture(scope="module")
def pilot(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pilot")
    train(config_of(folder, 20).with_setting("router", "smoe"), folder / "pilot", progress=False)
    return folder


def test_a_grid_from_its_pilot(pilot, capsys):
    config = config_of(pilot, 40)
    pilots = pilots_in(pilot / "pilot")
    one = pilots["smoe"]
    plan = plan_grid(config, ["smoe", "rmoe"], 4, pilots, 2, 1, 6.0, starts_once=True)
    assert plan.runs == 8
    assert plan.run_seconds["smoe"] == pytest.approx(40 * one.seconds_per_step + one.other_seconds)
    assert plan.device_hours == pytest.approx(8 * plan.run_seconds["smoe"] / 3600)
    assert plan.hours_on[1] == pytest.approx((8 * plan.run_seconds["smoe"] + 6) / 3600)
    assert plan.hours_on[8] == plan.hours_on[64]
    assert any("no pilot for rmoe" in line for line in plan.assumptions)
    each = plan_grid(config, ["smoe"], 2, pilots, 1, 1, 6.0, starts_once=False)
    assert each.hours == pytest.approx(2 * (plan.run_seconds["smoe"] + 6) / 3600)
    arguments = [
        "plan",
        "--grid",
        "--pilot",
        str(pilot / "pilot"),
        "--jobs",
        "2",
        "--routers",
        "smoe",
        "--seeds",
        "2",
    ]
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"] == 2
    assert main(arguments) == 0
    assert "device-hours" in capsys.readouterr().out


def test_each_run_goes_to_the_first_worker_that_is_free(tmp_path):
    config = config_of(tmp_path, 1)
    tokens = config.training.batch_size * config.training.sequence_length
    lengths = {"smoe": 5.0, "rmoe": 3.0, "xmoe": 3.0, "np": 3.0}
    pilots = {name: Pilot(name, length, 0.0, tokens, 0) for name, length in lengths.items()}
    plan = plan_grid(config, list(lengths), 1, pilots, 2, 1, 6.0, starts_once=True)
    assert plan.hours == pytest.approx((8 + 6) / 3600)


def test_a_cluster_has_its_own_gpus_and_takes_all_runs(pilot, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    grid = ["plan", "--grid", "--pilot", str(pilot / "pilot"), "--routers", "smoe", "--seeds", "50"]
    slurm = ["--engine", "slurm", "--engine.gpus", "1"]
    for limit, at_once in ([], 50), (["--engine.at-once", "7"], 7):
        assert main([*grid, *slurm, *limit, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["at_once"] == at_once


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--grid"], "--pilot is None"),
        (
            ["--grid", "--pilot", "x", "--jobs", "2", "--engine", "slurm"],
            "--jobs is 2; allowed: unset with --engine",
        ),
        (["--grid", "--pilot", "nowhere"], "nowhere"),
        (["--grid", "--pilot", "nowhere", "--seeds", "0"], "--seeds is 0"),
        (["--grid", "--pilot", "nowhere", "--jobs", "0"], "--jobs is 0"),
        (["--grid", "--pilot", "nowhere", "--jobs", "-3"], "--jobs is -3"),
        (["--seeds", "4"], "--seeds is 4; allowed: unset without --grid"),
        (["--jobs", "2"], "--jobs is 2; allowed: unset without --grid"),
        (["--grid", "--pilot", "nowhere", "--devices", "16"], "--devices is 16; allowed: unset with --grid"),
    ],
)
def test_wrong_requests(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "--preset", "quick", *arguments]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert said in line


@pytest.mark.slow
def test_the_plan_of_a_real_grid(tmp_path):
    """The pilot shares the machine as the grid's runs will: a first pair of seeds, both at once."""
    config = config_of(tmp_path, 1500)
    options = Options(jobs=2, timing_rounds=0, analysis_tokens=0)
    compare(config, ["smoe", "rmoe"], 1, tmp_path / "pilot", options=options)
    plan = plan_grid(config, ["smoe", "rmoe"], 3, pilots_in(tmp_path / "pilot"), 2, 1, 6.0, starts_once=True)
    started = time.monotonic()
    compare(config, ["smoe", "rmoe"], 3, tmp_path / "grid", options=options)
    assert time.monotonic() - started == pytest.approx(plan.hours * 3600, rel=0.3)


@pytest.mark.slow
def test_the_preset_s_micro_batch_does_not_bind(capsys):
    """The 70B preset's own micro-batch of 1 makes 64 devices network-bound, with most of their memory free."""
    arguments = ["plan", "--preset", "pretrain-70b", "--devices", "64", "--json"]
    best = {}
    for name, more in {
        "chosen": [],
        "as set": ["--as-set"],
        "told": ["--training.micro-batch-size", "2"],
    }.items():
        assert main([*arguments, *more]) == 0
        best[name] = json.loads(capsys.readouterr().out)["layouts"][0]
    assert best["as set"]["micro_batch_size"] == 1
    assert best["told"]["micro_batch_size"] == 2
    assert best["chosen"]["micro_batch_size"] > 2
    assert best["chosen"]["tokens_per_second"] > 1.2 * best["as set"]["tokens_per_second"]
