"""The chart of the findings: it asks for arms that a plan has, and shows what the tables say."""

from __future__ import annotations

import pytest

from experiments.findings_chart import CHART, HERE, differences
from experiments.graft_study import WAYS
from experiments.study import read_study
from rmoe.compare.statistics import t_interval

ASKED = [one for group in CHART.values() for one in group]


@pytest.mark.parametrize("one", ASKED, ids=lambda one: f"{one.file}:{one.of}")
def test_every_arm_is_planned(one):
    if one.file == "graft":
        arms = set(WAYS)
    else:
        plan = read_study(HERE / f"{one.file}.toml")
        arms = {f"{grid.folder}/{router}" for grid in plan.grids for router in grid.routers}
    assert {one.of, one.minus} <= arms


def test_it_shows_what_the_table_says():
    shown = {(one.of, one.minus): pairs for _, found in differences() for one, pairs in found}
    pairs = shown["std-1/rmoe-norm-p32", "std-1/smoe"]
    mean, interval = sum(pairs) / len(pairs), t_interval(pairs)[0]
    table = (HERE / "results" / "study.md").read_text(encoding="utf-8")
    (line,) = [line for line in table.splitlines() if line.startswith("| std-1 | `rmoe-norm-p32` | 1.00 |")]
    assert f"| {mean:+.4f} | {interval.low:+.4f} to {interval.high:+.4f} |" in line
    assert shown["rmoe", "nothing new"]
