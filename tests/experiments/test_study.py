"""The study at depth: its plan is whole, its rows are small and of one code, its table says what the rows say."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from scipy import stats

from experiments import study
from experiments.study_rows import append_missing, coarser, read_study_rows, study_row, thinner
from experiments.study_table import markdown
from rmoe.compare.schema import append_row
from rmoe.routing.zoo import find
from rmoe.training.build import load_plugins
from rmoe.training.result import Averaged, InitialLogits, LayerCurve, TextLosses
from tests.compare.rows import row

ROOT = Path(__file__).parents[2]


def run_of(router: str, seed: int, test: float, code: str = "0.1.0+gabc"):
    plain = row(router, seed, test, test=test)
    nats = [round(100 * test + index % 3, 3) for index in range(600)]
    losses = TextLosses(blocks=1, targets=60_000, nats=nats)
    curve = LayerCurve(unit="nats", step=list(range(0, 2000, 20)), value=[[0.123456, 1.0]] * 100)
    return msgspec.structs.replace(
        plain,
        versions=msgspec.structs.replace(plain.versions, code=code),
        initial_logits=InitialLogits(drawn=[0.16, 0.16], start=[1.0, 1.0], tokens=4096),
        layer_curves={"gate_entropy": curve},
        test_losses=losses,
        averaged=Averaged(steps=[1960, 2000], val=test, test=test - 0.01, test_losses=losses),
    )


def rows(code: str = "0.1.0+gabc"):
    """smoe at 2.0, 2.01, 2.02; rmoe better by 0.03, 0.02, 0.04."""
    smoe = [run_of("smoe", seed, 2.0 + 0.01 * seed, code) for seed in range(3)]
    rmoe = [
        run_of("rmoe-p32", seed, 2.0 + 0.01 * seed - d, code) for seed, d in enumerate((0.03, 0.02, 0.04))
    ]
    return [study_row("std-1", one) for one in (*smoe, *rmoe)]


def test_every_grid_has_a_configuration_and_routers_that_exist():
    plan = study.read_study()
    load_plugins((str(ROOT / study.PLUGIN),))
    for stage in plan.stage:
        for grid in stage.grid:
            config = plan.config(grid, Path("text.txt"))
            assert config.training.schedule == "wsd"
            assert max(config.average_steps) == config.training.max_steps
            for router in grid.routers:
                find(router)
    keys = {
        (g.folder, r, s)
        for stage in plan.stage
        for g in stage.grid
        for r in g.routers
        for s in range(stage.seeds)
    }
    assert len(keys) == 160


def test_seeds_come_before_grids():
    plan = study.read_study()
    first = [(grid.folder, seeds) for grid, seeds in study.steps(plan)][:4]
    assert first == [("std-1", 1), ("as-they-stand", 1), ("std-1", 2), ("as-they-stand", 2)]


def test_collecting_adds_what_is_new_and_the_table_says_it(tmp_path):
    path = tmp_path / "study.jsonl"
    assert append_missing(path, rows()[:4]) == 4
    assert append_missing(path, rows()) == 2
    assert append_missing(path, rows()) == 0
    found = read_study_rows(path)
    assert len(found) == 6
    table = markdown(found, "smoe", 0.005)
    line = next(line for line in table.splitlines() if "`rmoe-p32`" in line)
    interval = stats.ttest_1samp([-0.03, -0.02, -0.04], 0.0).confidence_interval(0.95)
    assert (
        f"| -0.0300 | {interval.low:+.4f} to {interval.high:+.4f} | {np.std([3, 2, 4], ddof=1) / 100:.4f} | better |"
        in line
    )
    assert "| 1.00 | 3 |" in line


def test_rows_are_small_and_keep_the_sums():
    one = rows()[0]
    assert len(msgspec.json.encode(one)) < 12_000
    losses = run_of("smoe", 0, 2.0).test_losses
    assert len(coarser(losses).nats) <= 250
    assert sum(coarser(losses).nats) == pytest.approx(sum(losses.nats), abs=0.01)
    thin = thinner(run_of("smoe", 0, 2.0).layer_curves["gate_entropy"])
    assert thin.step[0] == 0
    assert thin.step[-1] == 1980
    assert len(thin.step) == 11


def refused(capsys, *arguments: str) -> str:
    assert study.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_runs_of_two_versions_of_the_code_are_refused(tmp_path, capsys):
    folder = tmp_path / "out" / "std-1"
    folder.mkdir(parents=True)
    append_row(folder / "results.jsonl", run_of("smoe", 0, 2.0, "0.1.0+gaaa"))
    append_row(folder / "results.jsonl", run_of("rmoe-p32", 0, 2.0, "0.1.0+gbbb"))
    results = tmp_path / "study.jsonl"
    said = refused(capsys, "collect", "--out", str(tmp_path / "out"), "--results", str(results))
    assert said.startswith("error: code is '0.1.0+gbbb'; allowed: 0.1.0+gaaa")
    assert not results.exists()
    assert refused(capsys, "run", "--out", str(tmp_path / "out")).startswith("error: code is")


def test_a_run_of_the_early_study_is_refused(tmp_path, capsys):
    folder = tmp_path / "out" / "std-1"
    folder.mkdir(parents=True)
    append_row(folder / "results.jsonl", row("smoe", 0, 2.0))
    said = refused(capsys, "collect", "--out", str(tmp_path / "out"), "--results", str(tmp_path / "s.jsonl"))
    assert said.startswith("error: results is 'smoe-seed0 in std-1'; allowed: runs of this study")
    assert refused(capsys, "table", "--results", str(tmp_path / "none.jsonl")).startswith(
        "error: --results is"
    )
