"""Bits at equal seconds, and the effective speed-up: what a slower router must win per step to be worth its time.

A law `L(n) = L_inf + c n^-a` goes through the baseline's loss at three lengths (two of them branches of its `wsd` runs,
`rmoe.training.branch`). A router B with loss `L_B` after the same steps follows, by assumption, the same `L_inf` and
`a` with its own `c`. With `t` the seconds of a step:

    at the baseline's seconds   L_B' = L_inf + (L_B - L_inf) (t_B / t_A)^a
    effective speed-up          ((L_A - L_inf) / (L_B - L_inf))^(1/a) t_A / t_B

Above 1 exactly when `L_B' < L_A`. Intervals are over pairs; law and seconds are taken as exact. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from scipy import optimize

from rmoe.compare.sequential import Looks
from rmoe.compare.statistics import compare_to_baseline, t_test
from rmoe.errors import RequestError
from rmoe.results.comparison import BitsUnit, Difference, EqualTime, Interval, LossLaw, Split
from rmoe.training.config import RunConfig

SMALLEST, LARGEST = 1e-3, 20.0  # exponents that are looked for


def fit_law(steps: Sequence[int], losses: Sequence[float]) -> LossLaw | None:
    """The law through three points; None where none goes through: the loss must fall, and by less and less.

    >>> law = fit_law([100, 200, 400], [1 + 5 * n**-0.5 for n in (100, 200, 400)])
    >>> round(law.exponent, 6), round(law.floor, 6)
    (0.5, 1.0)
    """
    (n1, n2, n3), (l1, l2, l3) = steps, losses
    if not l1 > l2 > l3:
        return None
    ratio = (l1 - l2) / (l2 - l3)

    def excess(a: float) -> float:
        return (n1**-a - n2**-a) / (n2**-a - n3**-a) - ratio

    if excess(SMALLEST) > 0 or excess(LARGEST) < 0:
        return None
    a = float(optimize.brentq(excess, SMALLEST, LARGEST))
    floor = l3 - (l2 - l3) / (n2**-a - n3**-a) * n3**-a
    return LossLaw(steps=list(steps), losses=list(losses), exponent=a, floor=floor)


def at_baseline_seconds(loss: float, law: LossLaw, seconds_ratio: float) -> float:
    """A router's loss had it trained for as long as the baseline; `seconds_ratio` is its step's over the baseline's."""
    return law.floor + (loss - law.floor) * seconds_ratio**law.exponent


def speedup(baseline: float, loss: float, law: LossLaw, seconds_ratio: float) -> float:
    """Baseline seconds to the router's loss, over the router's."""
    return ((baseline - law.floor) / (loss - law.floor)) ** (1 / law.exponent) / seconds_ratio


def equal_time(
    bits: Mapping[str, Mapping[int, float]],
    seconds: Mapping[str, float],
    baseline: str,
    law: LossLaw,
    unit: BitsUnit,
    split: Split,
    margin: float,
    looks: Looks | None = None,
    planned: int = 0,
) -> dict[str, EqualTime]:
    """Every router that was timed, against the baseline at equal seconds.

    Args:
        bits: router -> seed -> loss after equal steps.
        seconds: router -> seconds of a step (of any number of steps), timed alone.
        unit, planned: see `compare_to_baseline`.

    Returns:
        Router -> comparison, without those that are `below_floor`.
    """
    if baseline not in seconds:
        return {}
    ratios = {name: seconds[name] / seconds[baseline] for name in bits if name in seconds}
    ratios = {name: ratio for name, ratio in ratios.items() if name not in below_floor(bits, law)}
    moved = {
        name: {seed: at_baseline_seconds(loss, law, ratio) for seed, loss in bits[name].items()}
        for name, ratio in ratios.items()
    }
    found = compare_to_baseline(moved, baseline, unit, split, margin, looks, planned)
    return {
        name: _equal_time(difference, bits[name], bits[baseline], law, ratios[name], looks)
        for name, difference in found.items()
    }


def below_floor(bits: Mapping[str, Mapping[int, float]], law: LossLaw) -> list[str]:
    """Routers with a loss that the law can never reach: it says nothing of them."""
    return [name for name, losses in bits.items() if any(loss <= law.floor for loss in losses.values())]


def _equal_time(
    difference: Difference,
    mine: Mapping[int, float],
    theirs: Mapping[int, float],
    law: LossLaw,
    ratio: float,
    looks: Looks | None,
) -> EqualTime:
    logs = [math.log(speedup(theirs[seed], mine[seed], law, ratio)) for seed in difference.seeds]
    interval = t_test(logs, looks)[0] if len(logs) > 1 else None
    return EqualTime(
        seconds_ratio=ratio,
        difference=difference,
        speedup=math.exp(sum(logs) / len(logs)),
        speedup_interval=interval and _exponential(interval),
    )


def _exponential(interval: Interval) -> Interval | None:
    """Of both ends; None where one is no float: the first of many looks knows next to nothing."""
    try:
        return Interval(low=math.exp(interval.low), high=math.exp(interval.high))
    except OverflowError:
        return None


def with_branch_points(config: RunConfig, lengths: Sequence[int]) -> RunConfig:
    """The configuration whose runs keep a checkpoint where each shorter length begins to decay.

    Raises:
        RequestError: the lengths are not two, not below the run's steps, or the schedule is not `wsd`.
    """
    training, said = config.training, " ".join(map(str, lengths))
    if training.schedule != "wsd":
        raise RequestError("--lengths", said, f"given with --training.schedule wsd, not {training.schedule}")
    if len(set(lengths)) != 2:
        raise RequestError("--lengths", said, "two, so that with the run's own a law has three points")
    if not all(0 < length < training.max_steps for length in lengths):
        allowed = f"1 to {training.max_steps - 1}: a branch ends before its run, which has {training.max_steps} steps"
        raise RequestError("--lengths", said, allowed)
    points = {config.shorter(length).training.constant_steps for length in lengths}
    kept = tuple(sorted(points | set(training.branch_points)))
    return replace(config, training=replace(training, branch_points=kept))
