"""The statistics against their definitions, written down again; what a comparison makes of them."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from scipy import stats

from rmoe.compare import statistics


def t_of(values: list[float], centre: float) -> float:
    """Student's t, with n - 1 in the variance."""
    n = len(values)
    mean = sum(values) / n
    variance = sum((v - mean) ** 2 for v in values) / (n - 1)
    return (mean - centre) / (variance / n) ** 0.5


SAMPLE = [0.013, -0.004, 0.021, 0.008, 0.002]


def test_spread_is_the_sample_standard_deviation_in_the_seeds_order():
    found = statistics.spread({3: 1.0, 1: 2.0, 2: 4.5})
    assert (found.seeds, found.values, found.mean) == ([1, 2, 3], [2.0, 4.5, 1.0], 2.5)
    assert found.sd == pytest.approx((((0.5**2) + 2**2 + 1.5**2) / 2) ** 0.5)
    assert statistics.spread({4: 1.5}).sd is None
    assert statistics.spread({}) is None


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_t_interval_from_its_definition(confidence):
    interval, p = statistics.t_interval(SAMPLE, 1 - confidence)
    mean, t = sum(SAMPLE) / 5, stats.t(4)
    half = t.ppf(0.5 + confidence / 2) * mean / t_of(SAMPLE, 0.0)
    assert (interval.low, interval.high) == pytest.approx((mean - half, mean + half))
    assert p == pytest.approx(2 * t.sf(abs(t_of(SAMPLE, 0.0))))


@pytest.mark.parametrize("margin", [0.001, 0.01, 0.03])
def test_equivalence_is_the_larger_of_two_one_sided_tests(margin):
    """Schuirmann: both "above -margin" and "below margin" must be seen."""
    for sign in (1, -1):
        values = [sign * v for v in SAMPLE]
        above, below = stats.t(4).sf(t_of(values, -margin)), stats.t(4).cdf(t_of(values, margin))
        assert statistics.equivalence_p(values, margin) == pytest.approx(max(above, below))


def test_without_spread_inside_is_sure_and_the_margin_is_outside():
    for value, p in ((0.0, 0.0), (0.4, 0.0), (-0.4, 0.0), (0.5, 1.0), (-0.5, 1.0), (0.7, 1.0), (-2.0, 1.0)):
        assert statistics.equivalence_p([value] * 3, 0.5) == p
        interval, differs = statistics.t_interval([value] * 3)
        assert (interval.low, interval.high, differs) == (value, value, float(value == 0))


@pytest.mark.parametrize(
    ("seeds", "difference", "sd"), [(2, 0.02, 0.01), (5, 0.01, 0.012), (12, -0.01, 0.01)]
)
def test_power_is_the_noncentral_ts(seeds, difference, sd, monkeypatch: pytest.MonkeyPatch):
    for confidence in (0.9, 0.95):
        monkeypatch.setattr(statistics, "CONFIDENCE", confidence)
        shift, critical = seeds**0.5 * difference / sd, stats.t(seeds - 1).isf((1 - confidence) / 2)
        t = stats.nct(seeds - 1, shift)
        assert statistics.power_of(seeds, difference, sd) == pytest.approx(
            t.sf(critical) + t.cdf(-critical), abs=1e-8
        )


def test_seeds_needed_is_the_first_that_suffices(monkeypatch: pytest.MonkeyPatch):
    for sd in (0.003, 0.0061, 0.012, 0.03):
        enough = (n for n in range(2, 200) if statistics.power_of(n, 0.01, sd) >= 0.8)
        assert statistics.seeds_needed(sd) == next(enough)
    assert statistics.seeds_needed(1e-6) == statistics.seeds_needed(0.0) == 2
    needed = statistics.seeds_needed(0.01)
    assert statistics.seeds_needed(0.01, difference=0.02) < needed
    assert statistics.seeds_needed(0.35) == pytest.approx(0.35**2 / 0.01**2 * (1.96 + 0.8416) ** 2, rel=1e-3)
    assert statistics.seeds_needed(0.36) is None  # more than 10,000
    monkeypatch.setattr(statistics, "POWER", 0.95)
    assert statistics.seeds_needed(0.01) > needed


def bca(samples: np.ndarray, confidence: float, rng: np.random.Generator, resamples: int) -> np.ndarray:
    """Efron's BCa interval of the mean of each row of `[M, n]`: `[M, 2]`."""
    rows, n = samples.shape
    means = np.stack([row[rng.integers(0, n, (resamples, n))].mean(1) for row in samples])
    z0 = stats.norm.ppf((means < samples.mean(1, keepdims=True)).mean(1))
    left_out = (samples.sum(1, keepdims=True) - samples) / (n - 1)
    deviation = left_out.mean(1, keepdims=True) - left_out
    a = (deviation**3).sum(1) / (6 * (deviation**2).sum(1) ** 1.5)
    ends = []
    for z in stats.norm.ppf([(1 - confidence) / 2, (1 + confidence) / 2]):
        level = stats.norm.cdf(z0 + (z0 + z) / (1 - a * (z0 + z)))
        ends.append([np.quantile(m, q) for m, q in zip(means, level, strict=True)])
    return np.array(ends).T.reshape(rows, 2)


def test_bootstrap_is_bca(monkeypatch: pytest.MonkeyPatch):
    values = np.random.default_rng(3).exponential(
        1.0, 14
    )  # skewed: a plain percentile interval lies elsewhere
    monkeypatch.setattr(statistics, "bootstrap_coverage", statistics.bootstrap_coverage.__wrapped__)
    for confidence in (0.8, 0.95):
        monkeypatch.setattr(statistics, "CONFIDENCE", confidence)
        found = statistics.bootstrap_interval(list(values))
        low, high = bca(values[None], confidence, np.random.default_rng(1), 20_000)[0]
        assert (found.interval.low, found.interval.high) == pytest.approx(
            (low, high), abs=0.08 * (high - low)
        )
        assert found == statistics.bootstrap_interval(list(values))
        assert found.simulated_coverage == statistics.bootstrap_coverage(14)


def test_simulated_coverage_is_that_of_an_own_simulation(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(5)
    intervals = bca(rng.standard_normal((600, 6)), 0.9, rng, 400)
    own = np.mean((intervals[:, 0] <= 0) & (intervals[:, 1] >= 0))
    monkeypatch.setattr(statistics, "CONFIDENCE", 0.9)
    coverage = statistics.bootstrap_coverage.__wrapped__
    assert coverage(6) == pytest.approx(own, abs=0.045)
    monkeypatch.setattr(statistics, "_SIMULATIONS", 50)
    assert coverage(6) == coverage(6)


def test_the_simulated_intervals_are_made_as_the_shown_one(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict] = []
    plain = stats.bootstrap

    def record(data: tuple, statistic: object, **options: object) -> object:
        made.append({name: options.get(name) for name in ("n_resamples", "confidence_level", "method")})
        return plain(data, statistic, **options)

    monkeypatch.setattr(stats, "bootstrap", record)
    statistics.bootstrap_interval([0.1, 0.4, -0.2, 0.3, 0.7, 0.1, 0.15])
    assert len(made) == 2
    assert made[0] == made[1]
    assert made[0]["confidence_level"] == statistics.CONFIDENCE


# ---- what a comparison says ---------------------------------------------------------------------------------


def around(mean: float, sd: float, seeds: int = 6) -> dict[int, float]:
    """Figures with exactly this mean and sample standard deviation."""
    shape = np.arange(seeds) - (seeds - 1) / 2
    return dict(enumerate((1.7 + mean + sd * shape / shape.std(ddof=1)).tolist()))


ZERO = dict.fromkeys(range(6), 1.7)


def test_equivalence_is_corrected_for_how_many_routers_are_compared():
    """One router is equivalent alone, and not beside two others of the same kind."""
    alone = {"smoe": ZERO, "a": around(0.0, 0.01)}
    several = alone | {"b": around(0.0, 0.0101), "c": around(0.0, 0.0102)}
    one = statistics.compare_to_baseline(alone, "smoe", "bits_per_byte", "test")["a"]
    raw = one.equivalence.p
    assert one.equivalence.p_holm == raw < 0.05
    assert one.verdict == "equivalent"
    three = statistics.compare_to_baseline(several, "smoe", "bits_per_byte", "test")
    assert three["a"].equivalence.p == raw
    assert three["a"].equivalence.p_holm == pytest.approx(3 * raw)
    second = three["b"].equivalence
    assert second.p_holm == pytest.approx(max(3 * raw, 2 * second.p))
    assert 3 * raw > 0.05
    assert {found.verdict for found in three.values()} == {"not decided"}


def test_difference_is_corrected_for_how_many_routers_are_compared():
    alone = {"smoe": ZERO, "a": around(-0.02, 0.017)}
    several = alone | {"b": around(-0.02, 0.0171), "c": around(0.02, 0.0172)}
    one = statistics.compare_to_baseline(alone, "smoe", "bits_per_byte", "test")["a"]
    assert one.p == one.p_holm < 0.05 < 3 * one.p
    assert one.verdict == "better"
    three = statistics.compare_to_baseline(several, "smoe", "bits_per_byte", "test")
    assert three["a"].p_holm == pytest.approx(3 * one.p)
    assert {found.verdict for found in three.values()} == {"not decided"}


def test_a_comparison_holds_what_its_parts_say():
    routers = {"smoe": ZERO, "a": around(0.004, 0.003), "two": {0: 1.71, 5: 1.72, 9: 1.0}, "one": {3: 1.8}}
    found = statistics.compare_to_baseline(routers, "smoe", "bits_per_byte", "val", margin=0.02)
    assert list(found) == ["a", "two", "one"]
    a = found["a"]
    assert (a.seeds, a.unit, a.split) == (list(range(6)), "bits_per_byte", "val")
    assert a.mean == pytest.approx(0.004)
    assert a.sd == pytest.approx(0.003)  # over n - 1
    assert (a.interval, a.p) == statistics.t_interval(a.values)
    assert a.equivalence.margin == 0.02
    assert a.equivalence.p == statistics.equivalence_p(a.values, 0.02)
    assert (a.power.difference, a.power.power, a.power.seeds) == (0.01, 0.8, statistics.seeds_needed(a.sd))
    assert found["two"].seeds == [0, 5]
    assert found["two"].values == pytest.approx([0.01, 0.02])
    assert found["two"].p is not None
    assert found["one"].verdict == "one seed: no verdict"
    assert found["one"].sd is None
    assert found["one"].power is None


def test_confidence_sets_the_level_of_the_verdict(monkeypatch: pytest.MonkeyPatch):
    routers = {"smoe": ZERO, "a": around(0.012, 0.012)}
    verdicts = []
    for confidence in (0.9, 0.95, 0.99):
        monkeypatch.setattr(statistics, "CONFIDENCE", confidence)
        found = statistics.compare_to_baseline(routers, "smoe", "bits_per_byte", "test")["a"]
        verdicts.append(found.verdict)
    p = statistics.t_interval([v - 1.7 for v in around(0.012, 0.012).values()])[1]
    assert 0.05 < p < 0.1
    assert verdicts == ["worse", "not decided", "not decided"]


def test_within_the_margin_and_different_has_two_signs():
    for mean, verdict in ((0.004, "worse"), (-0.004, "better")):
        routers = {"smoe": ZERO, "a": around(mean, 0.001)}
        found = statistics.compare_to_baseline(routers, "smoe", "bits_per_byte", "test")["a"]
        assert found.verdict == f"{verdict} by less than the margin"


@pytest.mark.parametrize(("seeds", "spread", "shown"), [(9, 0.01, False), (10, 0.01, True), (10, 0.0, False)])
def test_bootstrap_from_ten_seeds_that_differ(seeds, spread, shown):
    routers = {
        "smoe": dict.fromkeys(range(seeds), 1.5),
        "a": {i: 1.75 + spread * (i % 4) for i in range(seeds)},
    }
    found = statistics.compare_to_baseline(routers, "smoe", "bits_per_byte", "test")["a"]
    assert (found.bootstrap is not None) == shown


def test_a_comparison_survives_its_file():
    """Every number is a plain JSON number of its type, also where numpy made it."""
    routers = {"smoe": ZERO, "a": around(0.004, 0.003), "same": dict(ZERO), "one": {3: 1.8}}
    for found in statistics.compare_to_baseline(routers, "smoe", "bits_per_byte", "val").values():
        assert msgspec.convert(msgspec.to_builtins(found), type(found), strict=True) == found


def test_no_seed_in_common_with_the_baseline():
    assert statistics.compare_to_baseline({"a": {0: 1.0}}, "smoe", "bits_per_byte", "test") == {}
    assert statistics.compare_to_baseline({"smoe": {}, "a": {0: 1.0}}, "smoe", "bits_per_byte", "test") == {}
