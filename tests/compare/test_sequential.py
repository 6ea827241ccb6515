"""Sequential looks: the boundary against known tables and against simulation, and what it costs and saves."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from rmoe.compare.sequential import nominal_levels, sequential_p, spent
from rmoe.compare.statistics import compare_to_baseline
from rmoe.results.comparison import Split
from rmoe.results.run import Unit

UNIT: Unit = "bits_per_byte"
SPLIT: Split = "test"


def p_by_look(samples: np.ndarray, looks: tuple[int, ...]) -> np.ndarray:
    """Two-sided p of the paired t test at each look, `[N, looks]`."""
    return np.stack([stats.ttest_1samp(samples[:, :n], 0, axis=1).pvalue for n in looks], 1)


def test_the_boundary_is_the_published_one():
    """Five equal looks at 5%: z = 4.877, 3.357, 2.680, 2.290, 2.031 (Lan-DeMets, O'Brien-Fleming spending)."""
    levels = nominal_levels(0.05, tuple(1 + 100 * k for k in range(1, 6)))
    assert stats.norm.isf(np.array(levels) / 2) == pytest.approx(
        [4.877, 3.357, 2.680, 2.290, 2.031], abs=0.002
    )


def test_one_look_is_the_plain_test():
    assert nominal_levels(0.05, (5,)) == pytest.approx((0.05,))
    assert sequential_p([0.0123], (5,)) == pytest.approx(0.0123, rel=1e-4)
    assert spent(0.05, 0.5) == pytest.approx(0.003051, rel=1e-3)


@pytest.mark.parametrize("looks", [(2, 3, 4, 5), (3, 4, 5, 6, 7, 8), (5, 8), tuple(range(3, 13))])
def test_its_size_is_within_a_point_of_5_percent(looks):
    samples = np.random.default_rng(1).standard_normal((40_000, looks[-1]))
    crossed = (p_by_look(samples, looks) < np.array(nominal_levels(0.05, looks))).any(1)
    assert abs(crossed.mean() - 0.05) < 0.01
    naive = (p_by_look(samples, looks) < 0.05).any(1)
    assert naive.mean() > crossed.mean() + 0.015  # looking without a boundary errs far more often


def test_what_it_costs_in_power_and_saves_in_pairs():
    """Three to eight pairs, a difference of 1.5 standard deviations of a pair, against eight pairs and one look."""
    looks = (3, 4, 5, 6, 7, 8)
    samples = 1.5 + np.random.default_rng(2).standard_normal((10_000, 8))
    crossed = p_by_look(samples, looks) < np.array(nominal_levels(0.05, looks))
    pairs = np.where(crossed.any(1), np.array(looks)[crossed.argmax(1)], 8)
    fixed = (p_by_look(samples, (8,)) < 0.05).mean()
    assert fixed - 0.03 < crossed.any(1).mean() < fixed
    assert pairs.mean() < 6.5


def test_the_sequential_p_value_is_the_level_at_which_it_would_have_stopped():
    looks = (3, 4, 5, 6)
    p_values = [0.04, 0.009, 0.03]
    found = sequential_p(p_values, looks)
    below, above = nominal_levels(found * 0.999, looks), nominal_levels(found * 1.001, looks)
    assert not any(p < level for p, level in zip(p_values, below, strict=False))
    assert any(p < level for p, level in zip(p_values, above, strict=False))
    assert sequential_p([], looks) == 1.0


def figures(differences: dict[str, list[float]]) -> dict[str, dict[int, float]]:
    base = {seed: 2.0 + seed / 100 for seed in range(8)}
    others = {name: {s: base[s] + d for s, d in enumerate(values)} for name, values in differences.items()}
    return {"smoe": base} | others


def test_verdicts_use_the_boundary_of_all_looks():
    looks = (3, 4, 5, 6, 7, 8)
    almost = [-0.011, -0.019, -0.016]  # p = 0.024: decided if looked at once, not at the first of six looks
    clear = [-0.01501, -0.0150, -0.01499]
    once = compare_to_baseline(figures({"a": almost}), "smoe", UNIT, SPLIT, margin=0.001)["a"]
    found = compare_to_baseline(
        figures({"a": almost, "b": clear}), "smoe", UNIT, SPLIT, margin=0.001, looks=looks
    )
    assert once.verdict == "better"
    assert found["a"].verdict == "not decided"
    assert found["b"].verdict == "better"
    assert found["a"].interval.high - found["a"].interval.low > 5 * (once.interval.high - once.interval.low)
    assert found["a"].p == once.p
    assert found["a"].p_sequential > 0.05


def test_equivalence_is_sequential_too():
    looks = (3, 4, 5, 6, 7, 8)
    near = [0.0001, -0.0001, 0.00005]
    loose = [0.004, -0.005, 0.003]
    found = compare_to_baseline(
        figures({"a": near, "b": loose}), "smoe", UNIT, SPLIT, margin=0.01, looks=looks
    )
    assert found["a"].verdict == "equivalent"
    assert found["b"].verdict == "not decided"


@pytest.mark.slow
def test_the_size_of_the_equivalence_looks():
    """At a true difference of exactly the margin, "equivalent" is said in at most 5% (plus a point) of the grids."""
    looks = (3, 4, 5, 6, 7, 8)
    samples = 1.0 + 0.5 * np.random.default_rng(3).standard_normal((20_000, 8))  # margin 1
    levels = np.array(nominal_levels(0.10, looks)) / 2
    p = np.stack(
        [
            np.maximum(
                stats.ttest_1samp(samples[:, :n], 1.0, axis=1, alternative="less").pvalue,
                stats.ttest_1samp(samples[:, :n], -1.0, axis=1, alternative="greater").pvalue,
            )
            for n in looks
        ],
        1,
    )
    assert (p < levels).any(1).mean() < 0.06
