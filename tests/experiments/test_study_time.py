"""The study at equal time: branches are shorter runs of the plan, and the table is what the law says."""

from __future__ import annotations

import msgspec
import pytest

from experiments import study, study_time
from experiments.lines import read_rows
from experiments.study_rows import study_row
from experiments.study_time import BranchRow, Times, section, train_branches
from rmoe.errors import RequestError
from rmoe.records import read_record, write_record
from rmoe.results.rows import Timing
from rmoe.results.run import Hardware, Versions
from rmoe.training.run import train
from tests.experiments.small import small_study, write_text
from tests.experiments.test_study import run_of

VERSIONS = Versions(code="none", python="3", libraries={})
MACHINE = Hardware(cpu="a CPU", cores=2, threads=1, memory_gib=1.0, accelerator=None)


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """One layer, 20 steps, shorter runs of 10 and 15; `smoe` is the only router."""
    write_text(tmp_path)
    monkeypatch.setattr(study, "TEXT", "text.txt")
    return small_study(["smoe"], max_steps=20, average_every=2, branch_points=[8, 12])


def test_branches_are_the_shorter_runs(plan, tmp_path, capsys):
    config = study.reference_config(plan, tmp_path)
    folder, results = tmp_path / "std-1", tmp_path / "branches.jsonl"
    train(config, folder / "runs" / "smoe-seed0", progress=False)
    assert train_branches(config, folder, results) == 2
    assert capsys.readouterr().out.count("bits\n") == 2
    assert train_branches(config, folder, results) == 0
    found = {row.key: row.test for row in read_rows(results, BranchRow)}
    assert sorted(found) == [(0, 10), (0, 15)]
    alone = train(config.shorter(10), tmp_path / "alone", progress=False)
    assert found[0, 10] == alone.test


def test_a_run_without_its_branch_points_has_no_branches(plan, tmp_path):
    config = study.reference_config(plan, tmp_path)
    (tmp_path / "std-1" / "runs" / "smoe-seed0").mkdir(parents=True)
    (tmp_path / "std-1" / "runs" / "smoe-seed0" / "result.json").write_text("{}")
    assert train_branches(config, tmp_path / "std-1", tmp_path / "branches.jsonl") == 0


def test_routers_are_timed_alone(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(study_time, "ROUNDS", 1)
    results = tmp_path / "times.json"
    found = study_time.time_routers(study.reference_config(plan, tmp_path), ["smoe", "rmoe"], results)
    assert list(found.timings) == ["smoe", "rmoe"]
    assert all(timing.seconds_per_1k_steps > 0 for timing in found.timings.values())
    assert read_record(results, Times, 1) == found


def files(tmp_path, lengths):
    """Two seeds; `rmoe` takes 1.5 times the baseline's seconds."""
    branches, times = tmp_path / "branches.jsonl", tmp_path / "times.json"
    lines = [
        BranchRow(seed=seed, steps=steps, test=test, versions=VERSIONS, hardware=MACHINE)
        for seed in range(2)
        for steps, test in lengths
    ]
    branches.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
    timings = {
        name: Timing(seconds_per_1k_steps=s, peak_mib=1.0, steps=48, rounds=6, hardware=MACHINE)
        for name, s in (("smoe", 200.0), ("rmoe", 300.0))
    }
    write_record(times, Times(timings=timings, versions=VERSIONS))
    return branches, times


def test_the_section_is_what_the_law_says(tmp_path):
    """L(n) = 1 + 40 / n: 1.02 after 2,000 steps; floor 1, exponent 1."""
    smoe = [study_row("std-1", run_of("smoe", seed, 1.02).result) for seed in range(2)]
    rmoe = [study_row("std-1", run_of("rmoe", seed, test).result) for seed, test in ((0, 1.01), (1, 1.012))]
    steps = smoe[0].steps
    lengths = [(steps // 4, 1.08), (steps // 2, 1.04)]
    found = section([*smoe, *rmoe], "smoe", 0.005, *files(tmp_path, lengths))
    assert "exponent 1.00 and floor 1.000 bits" in found
    assert "(2 seeds)" in found
    # At the baseline's seconds 0.01 -> 0.015 and 0.012 -> 0.018: differences -0.005 and -0.002; speed-ups 2 / 1.5
    # and 1.6667 / 1.5, their geometric mean 1.2172.
    line = next(line for line in found.splitlines() if line.startswith("| `rmoe` "))
    assert line.startswith("| `rmoe` | 2 | 1.50 | -0.0090 | -0.0035 | -0.0226 to +0.0156 | 1.22 | ")


def test_without_branches_or_times_there_is_no_section(tmp_path):
    one = [study_row("std-1", run_of("smoe", 0, 1.02).result)]
    branches, times = files(tmp_path, [])
    assert section(one, "smoe", 0.005, branches, times) == ""
    branches, times = files(tmp_path, [(one[0].steps // 4, 1.08), (one[0].steps // 2, 1.04)])
    assert section(one, "smoe", 0.005, branches, tmp_path / "none.json") == ""


def test_losses_that_no_law_goes_through_are_refused(tmp_path):
    one = [study_row("std-1", run_of("smoe", 0, 1.02).result)]
    branches, times = files(tmp_path, [(one[0].steps // 4, 1.0), (one[0].steps // 2, 1.04)])
    with pytest.raises(RequestError, match=r"branches\.jsonl is '1.0000 after"):
        section(one, "smoe", 0.005, branches, times)
