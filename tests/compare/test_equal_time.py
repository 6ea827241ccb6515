"""Equal time: the law, what it says of a slower router, and the gate over two sizes."""

from __future__ import annotations

import math

import msgspec
import pytest

from rmoe.compare import plan as plans
from rmoe.compare.equal_time import at_baseline_seconds, equal_time, fit_law, speedup, with_branch_points
from rmoe.compare.gate import gated, read_other
from rmoe.compare.plan import ComparisonPlan, ComparisonRecord
from rmoe.compare.summary import summarise
from rmoe.errors import RequestError
from rmoe.records import read_record, write_record
from rmoe.report.page import render
from rmoe.report.table import columns, markdown, rows
from rmoe.results.comparison import SUMMARY_VERSION, Summary
from rmoe.results.rows import Timing
from rmoe.training.config import ModelConfig, RunConfig, TrainingConfig
from tests.compare.rows import changed, row


def loss(steps: float, scale: float = 9.0) -> float:
    return 1.5 + scale * steps**-0.4


@pytest.mark.parametrize("steps", [(500, 1000, 2000), (300, 1000, 2000), (10, 11, 4000)])
def test_the_law_is_found_again(steps):
    law = fit_law(steps, [loss(n) for n in steps])
    assert law.exponent == pytest.approx(0.4, rel=1e-5)
    assert law.floor == pytest.approx(1.5, rel=1e-5)


@pytest.mark.parametrize("losses", [(2.0, 2.0, 1.9), (2.0, 1.9, 1.95), (2.0, 1.95, 1.8), (2.0, 1.9, 1.8)])
def test_no_law_where_the_loss_does_not_bend(losses):
    assert fit_law((500, 1000, 2000), losses) is None


def test_a_slower_router_is_moved_along_its_own_curve():
    """Against the curve itself: 2,000 steps of a router that takes 1.25 times as long are 1,600 in equal time."""
    law = fit_law((500, 1000, 2000), [loss(n) for n in (500, 1000, 2000)])
    mine = loss(2000, scale=8.5)
    assert at_baseline_seconds(mine, law, 1.25) == pytest.approx(loss(1600, scale=8.5), rel=1e-9)
    times = speedup(loss(2000), mine, law, 1.25)
    seconds = 2000 * 1.25  # of the router
    assert loss(times * seconds) == pytest.approx(mine, rel=1e-9)  # so long the baseline takes to get there
    assert (times > 1) == (at_baseline_seconds(mine, law, 1.25) < loss(2000))


def test_intervals_are_over_pairs():
    law = fit_law((500, 1000, 2000), [loss(n) for n in (500, 1000, 2000)])
    base = {seed: loss(2000) + seed / 100 for seed in range(4)}
    mine = {seed: value - 0.05 - seed / 1000 for seed, value in base.items()}

    def compared(**bits):
        seconds = {"smoe": 1.0, "rmoe": 1.1}
        return equal_time({"smoe": base, **bits}, seconds, "smoe", law, "bits_per_byte", "test", 0.005)

    found = compared(rmoe=mine, untimed=mine)
    assert set(found) == {"rmoe"}
    expected = [at_baseline_seconds(mine[s], law, 1.1) - base[s] for s in range(4)]
    assert found["rmoe"].difference.values == pytest.approx(expected)
    logs = [math.log(speedup(base[s], mine[s], law, 1.1)) for s in range(4)]
    assert found["rmoe"].speedup == pytest.approx(math.exp(sum(logs) / 4))
    assert found["rmoe"].speedup_interval.low < found["rmoe"].speedup < found["rmoe"].speedup_interval.high
    assert compared(rmoe=dict.fromkeys(base, 1.4)) == {}  # below the law's floor


def timed(router: str, seed: int, value: float, seconds: float, steps: int = 2000):
    timing = Timing(seconds_per_1k_steps=seconds, peak_mib=1.0, steps=8, rounds=3) if seed == 0 else None
    return changed(row(router, seed, value, test=value, timing=timing), steps=steps)


def comparison(gain: float, seconds: float, branches: bool = True, is_timed: bool = True):
    wobble = (0.0, 0.001, -0.001)
    rows_ = [timed("smoe", s, loss(2000) + w, 100.0) for s, w in enumerate(wobble)]
    rows_ += [timed("rmoe", s, loss(2000) - gain + 1.1 * w, seconds) for s, w in enumerate(wobble)]
    if not is_timed:
        rows_ = [msgspec.structs.replace(one, timing=None) for one in rows_]
    shorter = [timed("smoe", s, loss(n) + w, 0.0, n) for s, w in enumerate(wobble) for n in (500, 1000)]
    return summarise(rows_, preset="small", baseline="smoe", branches=shorter if branches else ())


def test_better_at_equal_steps_can_be_worse_at_equal_time():
    summary = comparison(gain=0.01, seconds=120.0)
    rmoe = next(r for r in summary.routers if r.router == "rmoe")
    assert rmoe.difference.verdict.startswith("better")
    assert rmoe.equal_time.difference.verdict.startswith("worse")
    assert rmoe.equal_time.speedup < 1
    titles = [column.title for column in columns(summary)]
    assert titles[-2:] == ["difference at equal time", "effective speed-up"]
    assert all(len(cells) == len(titles) for cells in rows(summary))
    assert "effective speed-up" in markdown(summary)
    assert any("follow a power law with exponent 0.400" in note for note in summary.notes)


def test_without_times_or_branches_there_is_no_column_of_guesses():
    assert comparison(0.01, 120.0, branches=False).law is None
    untimed = comparison(0.01, 120.0, is_timed=False)
    assert all(router.equal_time is None for router in untimed.routers)
    assert any("were not timed alone" in note for note in untimed.notes)


def test_a_router_below_the_laws_floor_is_named():
    summary = comparison(gain=loss(2000) - 1.4, seconds=101.0)
    assert all(router.equal_time is None for router in summary.routers)
    said = "rmoe: a loss is not above the law's floor, so it is not compared at equal time."
    assert said in summary.notes


def test_shorter_runs_that_fail_are_said_and_counted():
    rows_ = [timed(router, s, loss(2000), 100.0) for router in ("smoe", "rmoe") for s in range(3)]
    failed = [
        row("smoe", s, None, status="failed", sweep={"training.max_steps": n})
        for s in range(3)
        for n in (500, 1000)
    ]
    summary = summarise(rows_, preset="small", baseline="smoe", branches=failed)
    assert summary.law is None
    assert summary.failed_branches == 6
    assert "No comparison at equal time: no seed of smoe has finished all three lengths." in summary.notes
    why = "smoe-seed0-training.max_steps=500, a shorter run of smoe, failed: loss is NaN at step 3"
    assert why in summary.notes


@pytest.mark.parametrize("last", [8, 20])
def test_runs_that_fail_after_the_first_of_many_looks_leave_numbers(tmp_path, last):
    """Its interval is that of a look at which next to nothing of the 5% may be used: wide, but it can be written."""
    wobble = [0.01 * math.sin(s) for s in range(last)]
    rows_ = [
        timed(r, s, loss(2000) + w * (1 + 0.1 * (r == "rmoe")), 100.0)
        for s, w in enumerate(wobble)
        for r in ("smoe", "rmoe")
    ]
    rows_ += [timed("bad", s, loss(2000) + 0.01 * s, 100.0) for s in range(2)]
    rows_.append(row("bad", 2, None, status="failed"))
    shorter = [timed("smoe", s, loss(n) + w, 0.0, n) for s, w in enumerate(wobble) for n in (500, 1000)]
    looks = tuple(range(2, last + 1))
    summary = summarise(rows_, preset="small", baseline="smoe", branches=shorter, looks=looks, planned=2)
    write_record(tmp_path / "summary.json", summary)
    assert read_record(tmp_path / "summary.json", Summary, SUMMARY_VERSION) == summary
    bad = next(r for r in summary.routers if r.router == "bad")
    assert bad.difference.verdict == "not decided"
    assert 1e3 < bad.difference.interval.high < 1e30
    assert bad.equal_time.speedup_interval is None
    assert markdown(summary)
    assert render(summary, None)


def test_the_gate_asks_for_both_sizes():
    good, slow = comparison(gain=0.05, seconds=101.0), comparison(gain=0.01, seconds=120.0)
    for here, there, expected in (
        (good, good, "better"),
        (good, slow, "not better"),
        (slow, good, "not better"),
    ):
        summary = gated(here, there)
        assert {r.router: r.gate for r in summary.routers} == {"rmoe": expected, "smoe": None}
        assert columns(summary)[-1].title == "at both sizes"
        assert summary.notes[0].startswith(
            "Better at both sizes: " + ("rmoe" if expected == "better" else "none")
        )


def test_a_gate_of_the_same_size_or_another_baseline_is_refused(tmp_path):
    config = RunConfig(router="smoe", model=ModelConfig(hidden_size=64))
    plan = ComparisonPlan(config=config, routers=("smoe", "rmoe"), seeds=3, baseline="smoe")
    record = ComparisonRecord(config=config.to_dict(), sweep={}, changes={}, data_sha256="a")
    write_record(tmp_path / plans.COMPARISON, record)
    with pytest.raises(RequestError, match=r"summary.json"):
        read_other(tmp_path, plan)
    write_record(tmp_path / plans.SUMMARY, comparison(0.01, 100.0))
    with pytest.raises(RequestError, match=r"--gate is .*another size: its model is this one's"):
        read_other(tmp_path, plan)
    earlier = config.to_dict()
    del earlier["model"]["dense_gradients"]  # a setting that came later
    write_record(tmp_path / plans.COMPARISON, msgspec.structs.replace(record, config=earlier))
    with pytest.raises(RequestError, match=r"--gate is .*another size: its model is this one's"):
        read_other(tmp_path, plan)
    with pytest.raises(RequestError, match=r"--gate is .*one with baseline rmoe"):
        read_other(tmp_path, ComparisonPlan(config, ("rmoe",), 3, "rmoe"))
    wider = plan.config.with_setting("hidden_size", 96)
    assert read_other(tmp_path, ComparisonPlan(wider, ("smoe", "rmoe"), 3, "smoe")).baseline == "smoe"


@pytest.mark.parametrize(
    ("lengths", "schedule", "said"),
    [
        ((50, 100), "cosine", "given with --training.schedule wsd, not cosine"),
        ((50,), "wsd", "two, so that"),
        ((50, 50), "wsd", "two, so that"),
        ((50, 200), "wsd", "1 to 199: a branch ends before its run, which has 200 steps"),
        ((10, 100), "wsd", "0 to 8, where the decay begins"),
    ],
)
def test_lengths_that_cannot_be_branched_are_refused(lengths, schedule, said):
    config = RunConfig(training=TrainingConfig(schedule=schedule))
    with pytest.raises(RequestError, match=said):
        with_branch_points(config, lengths)


def test_branch_points_are_where_the_decay_begins():
    config = RunConfig(training=TrainingConfig(schedule="wsd", max_steps=2000, branch_points=(100,)))
    assert with_branch_points(config, (1000, 500)).training.branch_points == (100, 400, 800)


def test_with_looks_the_speedup_has_the_interval_of_the_look():
    """Its 1 is the difference's 0: either both intervals hold it or neither does, at a look's level too."""
    law = fit_law((500, 1000, 2000), [loss(n) for n in (500, 1000, 2000)])
    bits = {"a": {s: 2.0 + 0.01 * s for s in range(4)}, "b": {s: 1.99 + 0.011 * s for s in range(4)}}
    once, looked = (
        equal_time(bits, {"a": 1.0, "b": 1.0}, "a", law, "bits_per_byte", "test", 0.01, looks=looks)["b"]
        for looks in (None, (2, 4, 8))
    )
    assert looked.speedup_interval.low < once.speedup_interval.low
    assert looked.speedup_interval.high > once.speedup_interval.high
