"""The statistics against scipy's paired test, simulation, and hand-worked cases."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from rmoe.compare import statistics
from rmoe.results.comparison import unit_of_differences


def test_t_interval_is_scipys_paired_test():
    rng = np.random.default_rng(1)
    a, b = rng.normal(1.70, 0.02, 5), rng.normal(1.72, 0.02, 5)
    interval, p = statistics.t_interval(list(a - b))
    expected = stats.ttest_rel(a, b)
    assert p == pytest.approx(expected.pvalue, abs=1e-12)
    assert (interval.low, interval.high) == pytest.approx(
        tuple(expected.confidence_interval(0.95)), abs=1e-12
    )


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_intervals_cover_a_known_difference(seeds):
    """Simulated grids: a common effect per seed, a true difference, noise of each run's own."""
    rng = np.random.default_rng(seeds)
    truth, covered, simulations = -0.01, 0, 2000
    common = rng.normal(1.7, 0.05, (simulations, seeds))
    router = common + truth + rng.normal(0, 0.006, (simulations, seeds))
    baseline = common + rng.normal(0, 0.006, (simulations, seeds))
    for row, base in zip(router, baseline, strict=True):
        interval, _ = statistics.t_interval(row - base)
        covered += interval.low <= truth <= interval.high
    assert 0.93 <= covered / simulations <= 0.97


def test_pairing_is_what_narrows_the_interval():
    rng = np.random.default_rng(0)
    common = rng.normal(1.7, 0.05, 5)
    a, b = common + rng.normal(-0.01, 0.002, 5), common + rng.normal(0, 0.002, 5)
    interval, _ = statistics.t_interval(a - b)
    unpaired = stats.ttest_ind(a, b).confidence_interval(0.95)
    assert interval.high - interval.low < 0.2 * (unpaired.high - unpaired.low)


def test_bootstrap_covers_too_little_at_ten_seeds_and_says_so():
    coverage = statistics.bootstrap_coverage(10)
    assert 0.85 < coverage < 0.95
    shown = statistics.bootstrap_interval(list(np.random.default_rng(0).normal(0, 1, 10)))
    assert shown.simulated_coverage == coverage
    assert shown.interval.low < shown.interval.high


def test_holm_is_the_textbook_example():
    # Holm (1979) by hand: 4 x 0.005, 3 x 0.01, then 2 x 0.03 and 1 x 0.04 held up by monotony
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([]) == []
    # Two more are to come: the smallest counts five times, the next four times.
    assert statistics.holm([0.01, 0.04, 0.03], planned=5) == pytest.approx([0.05, 0.12, 0.12])
    assert statistics.holm([0.01, 0.04, 0.03], planned=1) == statistics.holm([0.01, 0.04, 0.03])


def test_power_agrees_with_simulation():
    seeds = statistics.seeds_needed(sd=0.012, difference=0.01)
    draws = np.random.default_rng(0).normal(0.01, 0.012, (5_000, seeds))
    seen = np.mean(stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05)
    assert seen == pytest.approx(statistics.power_of(seeds, 0.01, 0.012), abs=0.02)
    assert seen >= 0.78
    assert statistics.power_of(seeds - 1, 0.01, 0.012) < 0.8
    assert statistics.seeds_needed(sd=100.0) is None


def grid(**offsets):
    """router -> seed -> bits, around seed effects that all routers share."""
    effects = {0: 1.70, 1: 1.74, 2: 1.69}
    wobble = {0: 0.0003, 1: -0.0002, 2: 0.0001}
    return {
        name: {seed: effects[seed] + offset + (wobble[seed] if name != "smoe" else 0) for seed in effects}
        for name, offset in offsets.items()
    }


def test_verdicts():
    found = statistics.compare_to_baseline(
        grid(smoe=0, rmoe=-0.03, worse=0.05, same=0.0, little=0.004), "smoe", "bits_per_byte", "test"
    )
    assert {name: d.verdict for name, d in found.items()} == {
        "rmoe": "better",
        "worse": "worse",
        "same": "equivalent",
        "little": "worse by less than the margin",
    }
    assert found["rmoe"].mean == pytest.approx(-0.03 + 0.0002 / 3)
    assert found["rmoe"].p_holm > found["rmoe"].p
    assert found["rmoe"].bootstrap is None  # three seeds


def test_wide_spread_is_not_decided():
    routers = {"smoe": {0: 1.7, 1: 1.7, 2: 1.7}, "rmoe": {0: 1.6, 1: 1.75, 2: 1.71}}
    found = statistics.compare_to_baseline(routers, "smoe", "bits_per_byte", "val")["rmoe"]
    assert found.verdict == "not decided"
    assert found.power.seeds > 100


def test_one_seed_gives_no_verdict():
    found = statistics.compare_to_baseline(
        {"smoe": {0: 1.7}, "rmoe": {0: 1.1}}, "smoe", "bits_per_byte", "test"
    )["rmoe"]
    assert found.verdict == "one seed: no verdict"
    assert found.interval is None
    assert found.p is None
    assert found.mean == pytest.approx(-0.6)


def test_only_shared_seeds_are_compared():
    routers = {"smoe": {0: 1.7, 1: 1.8}, "rmoe": {1: 1.7, 2: 1.0}, "alone": {7: 1.0}}
    found = statistics.compare_to_baseline(routers, "smoe", "bits_per_byte", "test")
    assert set(found) == {"rmoe"}
    assert found["rmoe"].seeds == [1]


def test_perplexities_differ_in_bits():
    found = statistics.compare_to_baseline(
        {name: {0: statistics.bits(value, "perplexity")} for name, value in (("smoe", 32.0), ("rmoe", 16.0))},
        "smoe",
        unit_of_differences("perplexity"),
        "test",
    )["rmoe"]
    assert found.mean == pytest.approx(-1.0)
    assert found.unit == "bits_per_word"


def test_identical_runs_are_equivalent_not_a_division_by_zero():
    routers = {"smoe": {0: 1.7, 1: 1.8}, "copy": {0: 1.7, 1: 1.8}}
    found = statistics.compare_to_baseline(routers, "smoe", "bits_per_byte", "test")["copy"]
    assert (found.p, found.verdict) == (1.0, "equivalent")


def test_the_interval_over_text_is_a_t_interval_over_stretches():
    from rmoe.compare.statistics import text_interval
    from rmoe.results.run import TextLosses

    rng = np.random.default_rng(0)
    theirs = rng.normal(180, 20, 500)
    mine = [
        TextLosses(blocks=1, targets=500 * 127, nats=(theirs + d).tolist())
        for d in rng.normal(-2, 1, (2, 500))
    ]
    base = TextLosses(blocks=1, targets=500 * 127, nats=theirs.tolist())
    found = text_interval(mine, [base, base])
    pairs = np.mean([np.array(one.nats) - theirs for one in mine], axis=0) / 127 / np.log(2)
    expected = stats.ttest_1samp(pairs.reshape(250, 2).mean(1), 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    other = TextLosses(blocks=2, targets=500 * 127, nats=theirs.tolist())
    assert text_interval([base], [other]) is None
    assert text_interval([], []) is None
