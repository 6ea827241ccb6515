"""A simulated grid against arithmetic."""

from __future__ import annotations

import pytest

from benchmarks.engines import simulate


def test_simulated_without_failures_is_a_list_schedule():
    assert simulate([5.0, 3.0, 3.0, 3.0], 2).seconds == 8.0
    assert simulate([1.0] * 1000, 64).seconds == 16.0
    assert simulate([1.0] * 3, 8).busy == pytest.approx(3 / 8)


@pytest.mark.parametrize("interval", [60.0, 600.0])
def test_failures_lose_half_an_interval_each(interval):
    found = simulate(
        [3600.0] * 2000,
        64,
        failures_per_hour=0.5,
        checkpoint_seconds=interval,
        restart_seconds=5.0,
        away_seconds=60.0,
    )
    # Each failure ends an exponential time; what is past the last checkpoint is about half an interval.
    assert found.failures == pytest.approx(0.5 * 2000, rel=0.15)
    assert found.lost_seconds / found.failures == pytest.approx(interval / 2, rel=0.1)
    assert found.seconds > simulate([3600.0] * 2000, 64).seconds


def test_every_second_of_work_is_done():
    found = simulate([100.0] * 50, 4, failures_per_hour=20.0, checkpoint_seconds=10.0, restart_seconds=2.0)
    done = found.busy * found.seconds * 4
    assert done == pytest.approx(50 * 100 + found.lost_seconds + 2.0 * found.failures, rel=1e-9)
