"""`summary.json` of a comparison: everything the table and the report's first part show."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from rmoe.records import Record
from rmoe.results.rows import SweepValue, Timing
from rmoe.results.run import CorpusInfo, Hardware, LayerCurve, Parameters, Unit, Versions

SUMMARY_VERSION = 1

Split: TypeAlias = Literal["val", "test"]
BitsUnit: TypeAlias = Literal["bits_per_byte", "bits_per_word", "bits_per_token"]

UNITS = {
    "bits_per_byte": "bits per byte",
    "bits_per_word": "bits per word",
    "bits_per_token": "bits per word",  # as earlier releases called it
    "perplexity": "perplexity",
}
SPLITS: dict[Split, str] = {"val": "validation", "test": "test"}


def unit_of_differences(unit: Unit) -> BitsUnit:
    """What differences between values of a unit are given in: bits per byte, or per word (of perplexities)."""
    return "bits_per_byte" if unit == "bits_per_byte" else "bits_per_word"


class Spread(Record, frozen=True, kw_only=True):
    """A metric over seeds: `values[j]` belongs to `seeds[j]`; `sd` is the sample's (n - 1)."""

    seeds: list[int]
    values: list[float]
    mean: float
    sd: float | None  # None with one seed


class Interval(Record, frozen=True, kw_only=True):
    """An interval at the summary's confidence level."""

    low: float
    high: float


class Equivalence(Record, frozen=True, kw_only=True):
    """Two one-sided t tests (TOST): is the difference inside (-margin, margin)?"""

    margin: float
    p: float
    p_holm: float


class Power(Record, frozen=True, kw_only=True):
    """Paired seeds a two-sided t test needs to see `difference`, given the spread of the differences seen."""

    difference: float
    power: float
    seeds: int | None  # None: more than the search went to


class Bootstrap(Record, frozen=True, kw_only=True):
    """Bootstrap interval, and how often such an interval covers a known normal difference at this n."""

    interval: Interval
    simulated_coverage: float


Verdict: TypeAlias = Literal[
    "better",
    "worse",
    "better by less than the margin",
    "worse by less than the margin",
    "equivalent",
    "not decided",
    "one seed: no verdict",
]


class Difference(Record, frozen=True, kw_only=True):
    """Router minus baseline over the seeds both finished, in bits (of perplexity: its log2)."""

    split: Split
    unit: BitsUnit
    seeds: list[int]
    values: list[float]
    mean: float
    sd: float | None = None
    interval: Interval | None = None  # paired t
    bootstrap: Bootstrap | None = None
    p: float | None = None
    p_holm: float | None = None
    p_sequential: float | None = None  # with looks: `p` and `p_holm` are of one look, this one of all so far
    equivalence: Equivalence | None = None
    power: Power | None = None
    text_interval: Interval | None = (
        None  # over stretches of the test text: what more of it would give these models
    )
    verdict: Verdict


class LossLaw(Record, frozen=True, kw_only=True):
    """`loss(n) = floor + c n^-exponent`, in bits, through the baseline's loss at three lengths."""

    steps: list[int]
    losses: list[float]
    exponent: float
    floor: float


class EqualTime(Record, frozen=True, kw_only=True):
    """A router against the baseline at equal seconds.

    Attributes:
        seconds_ratio: of a step, the router's over the baseline's, each timed alone.
        difference: router minus baseline, the router trained for as long as the baseline took.
        speedup: how many times as long the baseline has to train to reach the router's loss; above 1 is a gain.
        speedup_interval: over pairs, on a log scale; the law and the seconds are taken as exact. None of one pair, and
            where it is wider than floats are.
    """

    seconds_ratio: float
    difference: Difference
    speedup: float
    speedup_interval: Interval | None


class Band(Record, frozen=True, kw_only=True):
    """A curve over seeds: mean, lowest and highest at each step every seed has; `n` seeds."""

    unit: str
    n: int
    step: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


class RouterSummary(Record, frozen=True, kw_only=True):
    """One row of the table."""

    router: str
    summary: str  # what the router is, in a phrase
    sweep: dict[str, SweepValue]  # the point chosen on validation; {} without a sweep
    finished: int
    failed: int
    val: Spread | None
    test: Spread | None
    difference: Difference | None  # None for the baseline, or where no seed is shared
    parameters: Parameters | None
    timing: Timing | None
    curves: dict[str, Band] = msgspec.field(default_factory=dict)
    val_difference: Band | None = None  # validation curve minus the baseline's, in bits, paired by seed
    initial_logit_std: float | None = None  # mean over layers and seeds, as training starts
    layer_curves: dict[str, LayerCurve] = msgspec.field(default_factory=dict)  # means over seeds
    equal_time: EqualTime | None = None
    averaged: Difference | None = None  # between averaged weights, where both have them
    gate: Literal["better", "not better"] | None = None  # at this size and at the other one


class SweepPoint(Record, frozen=True, kw_only=True):
    """Mean validation loss of one sweep point of one router, over the seeds that finished it."""

    router: str
    sweep: dict[str, SweepValue]
    n: int
    val: float
    chosen: bool


class Summary(Record, frozen=True, kw_only=True):
    """`summary.json`: everything the table and the report's first part show."""

    schema_version: int = SUMMARY_VERSION
    preset: str
    baseline: str
    corpus: CorpusInfo
    confidence: float
    verdict: str
    notes: list[str]
    routers: list[RouterSummary]
    sweep_points: list[SweepPoint] = msgspec.field(default_factory=list)
    law: LossLaw | None = None
    failed_branches: int = 0  # of the baseline's shorter runs, which the law needs
    hardware: Hardware
    versions: Versions
