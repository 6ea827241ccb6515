"""Paired comparison over seeds: intervals, equivalence, correction for many routers, and power.

Two runs with one seed share their initial weights and their batches, so differences are taken seed by seed
and the spread that both runs have in common cancels. Figures are bits per byte, or log2 of perplexity (bits
per token); lower is better. scipy does the statistics; only Holm's step-down is written here, scipy has none.

With three seeds a percentile bootstrap of the mean covers 75% where the t interval covers 95% (measured), so
the bootstrap appears only from ten seeds, beside the t interval, with its own simulated coverage.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import msgspec
import numpy as np
from scipy import stats

from rmoe.compare.sequential import Looks, nominal_levels, sequential_p
from rmoe.results.comparison import (
    BitsUnit,
    Bootstrap,
    Difference,
    Equivalence,
    Interval,
    Power,
    Split,
    Spread,
    Verdict,
)
from rmoe.results.run import TextLosses, Unit

CONFIDENCE = 0.95
MARGIN_BITS = 0.01  # a smaller difference counts as none
REFERENCE_BITS = 0.01  # the difference whose price in seeds is reported
POWER = 0.8
BOOTSTRAP_FROM = 10  # seeds
MOST_SEEDS = 10_000
_RESAMPLES, _SIMULATIONS = 999, 400


def bits(value: float, unit: Unit) -> float:
    """A value on the scale differences are taken on.

    >>> bits(1.25, "bits_per_byte"), bits(32.0, "perplexity")
    (1.25, 5.0)
    """
    return math.log2(value) if unit == "perplexity" else value


def spread(by_seed: dict[int, float]) -> Spread | None:
    """Mean and sample standard deviation over seeds; None without any."""
    if not by_seed:
        return None
    seeds = sorted(by_seed)
    values = [by_seed[seed] for seed in seeds]
    return Spread(seeds=seeds, values=values, mean=float(np.mean(values)), sd=_sd(values))


def _sd(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def t_interval(differences: Sequence[float], level: float | None = None) -> tuple[Interval, float]:
    """Paired t interval of the mean difference, and the two-sided p of no difference.

    Args:
        differences: one per seed, at least two.
        level: how often the interval may miss the mean; None is `1 - CONFIDENCE`. Not its complement, which rounds
            to 1 at the first of many looks.
    """
    if np.ptp(differences) == 0:  # no spread: scipy divides zero by zero
        mean = float(differences[0])
        return Interval(low=mean, high=mean), float(mean == 0)
    level = 1 - CONFIDENCE if level is None else level
    mean, error = float(np.mean(differences)), float(stats.sem(differences))
    half = float(stats.t.isf(level / 2, len(differences) - 1)) * error
    return Interval(low=mean - half, high=mean + half), float(stats.ttest_1samp(differences, 0.0).pvalue)


STRETCHES = 250  # of the test text: long enough that neighbours hardly depend on each other


def text_interval(mine: Sequence[TextLosses], theirs: Sequence[TextLosses]) -> Interval | None:
    """t interval of the difference over stretches of text, in bits per token, the mean over pairs in each stretch.

    It says what more text of this kind would give the same models, nothing about training them again.

    Args:
        mine, theirs: pair by pair, over the same text.
    """
    if not mine or len({(one.blocks, one.targets, len(one.nats)) for one in (*mine, *theirs)}) > 1:
        return None
    nats = np.mean([np.subtract(a.nats, b.nats) for a, b in zip(mine, theirs, strict=True)], axis=0)
    count = min(STRETCHES, len(nats))
    if count < 2:
        return None
    per_target = len(nats) / mine[0].targets / math.log(2)
    bits_per_token = np.array([part.mean() for part in np.array_split(nats, count)]) * per_target
    return t_interval(bits_per_token.tolist())[0]


def equivalence_p(differences: Sequence[float], margin: float) -> float:
    """TOST: p of "the mean difference is not inside (-margin, margin)" (Schuirmann 1987)."""
    if np.ptp(differences) == 0:
        return float(not -margin < differences[0] < margin)
    above = stats.ttest_1samp(differences, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(differences, margin, alternative="less").pvalue
    return float(max(above, below))


def holm(p_values: Sequence[float], planned: int = 0) -> list[float]:
    """Holm's step-down adjustment of several p values (Holm 1979, Scand. J. Statist. 6, 65).

    The i-th smallest of m (from 0) is multiplied by m - i; the results never fall and never pass 1.

    Args:
        planned: tests that belong to the family, those still to come included; they count as the largest.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted, tests = [0.0] * len(p_values), max(planned, len(p_values))
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (tests - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def power_of(seeds: int, difference: float, sd: float) -> float:
    """Power of the two-sided paired t test: t^2 is noncentral F(1, n - 1), shift n (difference / sd)^2.

    By F rather than the noncentral t, whose far tail is NaN in scipy for large effects.
    """
    critical = stats.f.isf(1 - CONFIDENCE, 1, seeds - 1)
    return float(stats.ncf.sf(critical, 1, seeds - 1, seeds * (difference / sd) ** 2))


def seeds_needed(sd: float, difference: float = REFERENCE_BITS) -> int | None:
    """Smallest number of paired seeds that sees `difference` with `POWER`; None beyond `MOST_SEEDS`.

    Args:
        sd: standard deviation of the paired differences.

    >>> seeds_needed(sd=0.01)
    10
    """
    if sd == 0:
        return 2
    numbers = range(2, MOST_SEEDS + 1)
    # Power rises with seeds; scipy's NaN, far beyond any doubt, counts as enough.
    first = bisect_left(numbers, POWER, key=lambda seeds: power_of(seeds, difference, sd))
    return numbers[first] if first < len(numbers) else None


def bootstrap_interval(differences: Sequence[float]) -> Bootstrap:
    """BCa bootstrap interval of the mean difference, with the coverage such intervals reach at this n."""
    low, high = _bca(np.asarray(differences), np.random.default_rng(0))
    interval = Interval(low=float(low), high=float(high))
    return Bootstrap(interval=interval, simulated_coverage=bootstrap_coverage(len(differences)))


@lru_cache
def bootstrap_coverage(n: int) -> float:
    """How often the BCa interval of n normal draws holds their true mean (standard error about 0.01)."""
    rng = np.random.default_rng(0)
    low, high = _bca(rng.standard_normal((_SIMULATIONS, n)), rng)
    return float(np.mean((low <= 0) & (high >= 0)))


def _bca(samples: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the intervals of the means of `[..., n]` samples."""
    interval = stats.bootstrap(
        (samples,),
        np.mean,
        axis=-1,
        n_resamples=_RESAMPLES,
        confidence_level=CONFIDENCE,
        method="BCa",
        batch=100,
        rng=rng,
    ).confidence_interval
    return interval.low, interval.high


class Decision(NamedTuple):
    """Paired differences to the baseline, tested; `_holm`: corrected over all routers.

    `p_differs` and `p_equal` are of one look, `p_all_looks` of all so far (without looks `p_differs`).
    """

    interval: Interval
    p_differs: float
    p_all_looks: float
    p_holm: float
    p_equal: float
    p_equal_holm: float
    verdict: Verdict


def paired(routers: Mapping[str, Mapping[int, float]], baseline: str) -> dict[str, dict[int, float]]:
    """Router -> seed -> value minus the baseline's, over the seeds both have; routers that share none are skipped."""
    against = routers.get(baseline, {})
    return {
        name: {seed: by_seed[seed] - against[seed] for seed in sorted(by_seed.keys() & against.keys())}
        for name, by_seed in routers.items()
        if name != baseline and by_seed.keys() & against.keys()
    }


def decide(
    differences: Mapping[str, Mapping[int, float]],
    margin: float,
    looks: Looks | None = None,
    planned: int = 0,
) -> dict[str, Decision]:
    """Test every router's differences, of which there are two or more; the others are skipped."""
    values = {name: list(by_seed.values()) for name, by_seed in differences.items() if len(by_seed) > 1}
    tests = {name: t_test(found, looks) for name, found in values.items()}
    p_equal = {name: equivalence_p(found, margin) for name, found in values.items()}
    p_differs, p_same = {name: p for name, (_, p) in tests.items()}, p_equal
    if looks is not None:

        def over_looks(p_of: Callable[[Sequence[float]], float]) -> dict[str, float]:
            return {
                name: sequential_p([p_of(found[:n]) for n in looks if n <= len(found)], looks)
                for name, found in values.items()
            }

        p_differs = over_looks(lambda found: t_interval(found)[1])
        # One-sided tests: a boundary of 5% on one side is that of 10% on both.
        doubled = over_looks(lambda found: min(1.0, 2 * equivalence_p(found, margin)))
        p_same = {name: p / 2 for name, p in doubled.items()}
    p_holm = dict(zip(values, holm(list(p_differs.values()), planned), strict=True))
    p_equal_holm = dict(zip(values, holm(list(p_same.values()), planned), strict=True))
    return {
        name: Decision(
            *tests[name],
            p_differs[name],
            p_holm[name],
            p_equal[name],
            p_equal_holm[name],
            verdict_of(float(np.mean(found)), p_holm[name], p_equal_holm[name]),
        )
        for name, found in values.items()
    }


def compare_to_baseline(
    routers: Mapping[str, Mapping[int, float]],
    baseline: str,
    unit: BitsUnit,
    split: Split,
    margin: float = MARGIN_BITS,
    looks: Looks | None = None,
    planned: int = 0,
) -> dict[str, Difference]:
    """Compare every router with the baseline, over the seeds both finished.

    Args:
        routers: router -> seed -> value on the scale of `bits`.
        unit: what to call them.
        margin: half-width of "equivalent", in bits.
        looks: pairs at which the verdicts were or will be looked at, see `rmoe.compare.sequential`; None is one look,
            at all there are.
        planned: routers that will be compared, where some are still to come.

    Returns:
        router -> difference, without the baseline and without routers that share no seed with it. The p
        values are corrected over all routers returned or planned (Holm); intervals are not.
    """
    differences = paired(routers, baseline)
    tests = decide(differences, margin, looks, planned)

    def difference(name: str) -> Difference:
        by_seed = differences[name]
        values = list(by_seed.values())
        found = Difference(
            split=split,
            unit=unit,
            seeds=list(by_seed),
            values=values,
            mean=float(np.mean(values)),
            verdict="one seed: no verdict",
        )
        if name not in tests:
            return found
        test, sd = tests[name], float(np.std(values, ddof=1))
        boot = len(values) >= BOOTSTRAP_FROM and sd > 0
        return msgspec.structs.replace(
            found,
            sd=sd,
            interval=test.interval,
            bootstrap=bootstrap_interval(values) if boot else None,
            p=test.p_differs,
            p_holm=test.p_holm,
            p_sequential=None if looks is None else test.p_all_looks,
            equivalence=Equivalence(margin=margin, p=test.p_equal, p_holm=test.p_equal_holm),
            power=Power(difference=REFERENCE_BITS, power=POWER, seeds=seeds_needed(sd)),
            verdict=test.verdict,
        )

    return {name: difference(name) for name in differences}


def stands(difference: Difference) -> bool:
    """Whether more pairs are not needed: it has a verdict."""
    return difference.verdict not in ("not decided", "one seed: no verdict")


def t_test(differences: Sequence[float], looks: Looks | None) -> tuple[Interval, float]:
    """`t_interval`; with looks, one that holds the mean at every look so far with `CONFIDENCE`."""
    if looks is None:
        return t_interval(differences)
    # Between two looks, and before the first (a run has failed), the next one's level holds.
    look = next((i for i, pairs in enumerate(looks) if pairs >= len(differences)), len(looks) - 1)
    return t_interval(differences, nominal_levels(round(1 - CONFIDENCE, 12), looks)[look])


def verdict_of(mean: float, p_differs: float, p_equal: float) -> Verdict:
    """What two p values decide at `CONFIDENCE`; lower is better."""
    differs, equal = p_differs < 1 - CONFIDENCE, p_equal < 1 - CONFIDENCE
    if differs and equal:
        return "better by less than the margin" if mean < 0 else "worse by less than the margin"
    if differs:
        return "better" if mean < 0 else "worse"
    return "equivalent" if equal else "not decided"
