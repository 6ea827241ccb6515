"""What a comparison writes: `results.jsonl` (one line per run) and `summary.json`, typed and versioned.

`results.jsonl` is a log that is only ever appended to. A run is known by its key (router, seed, sweep point);
when a later line has the same key (its test figure came later, or it was timed), the later line stands.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec

from rmoe.errors import RequestError
from rmoe.records import Record, Versioned, append_lines
from rmoe.results.run import (
    Averaged,
    Corpus,
    Curve,
    Hardware,
    InitialLogits,
    LayerCurve,
    Parameters,
    RoutingSummary,
    TextLosses,
    Unit,
    Versions,
)

RESULTS_VERSION = 1
SUMMARY_VERSION = 1

Split: TypeAlias = Literal["val", "test"]
BitsUnit: TypeAlias = Literal["bits_per_byte", "bits_per_token"]

UNITS = {"bits_per_byte": "bits per byte", "bits_per_token": "bits per token", "perplexity": "perplexity"}
SPLITS: dict[Split, str] = {"val": "validation", "test": "test"}


def unit_of_differences(unit: Unit) -> BitsUnit:
    """The scale that differences between values of a unit are given on: bits, per byte or per token."""
    return "bits_per_byte" if unit == "bits_per_byte" else "bits_per_token"


SweepValue: TypeAlias = float | int | str | bool


class Timing(Record, frozen=True, kw_only=True):
    """Cost of training with nothing else running: medians over `rounds`, interleaved with other routers."""

    seconds_per_1k_steps: float
    peak_mib: float
    steps: int
    rounds: int


class ResultRow(Record, frozen=True, kw_only=True):
    """One line of `results.jsonl`: one trained model, or one that failed."""

    schema_version: int = RESULTS_VERSION
    router: str
    router_spec: dict[str, Any]
    seed: int
    sweep: dict[str, SweepValue]
    config: dict[str, Any]
    versions: Versions
    hardware: Hardware
    corpus: Corpus
    status: Literal["finished", "failed"]
    error: str | None = None
    steps: int = 0
    tokens: int = 0
    val: float | None = None  # in the corpus's unit, lower is better
    test: float | None = None  # only for the sweep point chosen on validation
    parameters: Parameters | None = None
    curves: dict[str, Curve] = msgspec.field(default_factory=dict)
    timing: Timing | None = None
    routing: RoutingSummary | None = None
    initial_logits: InitialLogits | None = None
    layer_curves: dict[str, LayerCurve] = msgspec.field(default_factory=dict)
    test_losses: TextLosses | None = None
    averaged: Averaged | None = None

    @property
    def key(self) -> str:
        """The run's name, also its folder's: `rmoe-seed0` or `rmoe-seed0-learning_rate=0.001`."""
        return run_key(self.router, self.seed, self.sweep)


def run_key(router: str, seed: int, sweep: dict[str, SweepValue]) -> str:
    """The name of a run.

    >>> run_key("rmoe", 0, {"learning_rate": 0.001})
    'rmoe-seed0-learning_rate=0.001'
    """
    return "-".join([router, f"seed{seed}", *(f"{name}={value}" for name, value in sorted(sweep.items()))])


class Spread(Record, frozen=True, kw_only=True):
    """A figure over seeds: `values[j]` belongs to `seeds[j]`; `sd` is the sample's (n - 1)."""

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
        speedup_interval: over pairs, on a log scale; the law and the seconds are taken as exact.
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
    """Mean validation figure of one sweep point of one router, over the seeds that finished it."""

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
    corpus: Corpus
    confidence: float
    verdict: str
    notes: list[str]
    routers: list[RouterSummary]
    sweep_points: list[SweepPoint] = msgspec.field(default_factory=list)
    law: LossLaw | None = None
    hardware: Hardware
    versions: Versions


def append_row(path: Path, row: ResultRow) -> None:
    """Append one row, by `append_lines`."""
    append_lines(path, msgspec.json.encode(row) + b"\n")


def read_rows(path: Path) -> tuple[list[ResultRow], list[str]]:
    """Read `results.jsonl`.

    Returns:
        The rows, one per key (the last line of a key stands, in the order keys first appeared), and one line
        for each problem that was passed over.

    Raises:
        RequestError: two schema versions, a version this code does not read, or two corpora in one file.
    """
    rows: dict[str, ResultRow] = {}
    problems: list[str] = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            _check_version(line, path, number)
            row = msgspec.json.decode(line, type=ResultRow)
        except msgspec.DecodeError as error:
            problems.append(f"{path.name} line {number} cannot be read and is left out: {error}")
            continue
        rows[row.key] = row
    check_comparable(list(rows.values()), path.name)
    return list(rows.values()), problems


def _check_version(line: bytes, path: Path, number: int) -> None:
    """Raises RequestError on a line of another schema version, DecodeError on one that is not JSON at all."""
    version = msgspec.json.decode(line, type=Versioned).schema_version
    if version != RESULTS_VERSION:
        raise RequestError(f"{path.name} line {number}: schema_version", version, str(RESULTS_VERSION))


def check_comparable(rows: list[ResultRow], where: str) -> None:
    """Refuse rows that were judged on different text, or in different units.

    Raises:
        RequestError: naming both corpora.
    """
    corpora = {(row.corpus.sha256, row.corpus.unit): row.corpus for row in rows}
    if len(corpora) > 1:
        names = " and ".join(sorted(f"{c.name} ({c.unit}, sha256 {c.sha256[:12]})" for c in corpora.values()))
        raise RequestError(f"{where}: corpus", names, "one corpus in one comparison")
