"""What probes write: `results.jsonl`, one line per (router, probe, seed, knobs), and `summary.json`.

`results.jsonl` is a log that is only ever appended to; when two lines have one key, the later one stands.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from rmoe.errors import RequestError
from rmoe.records import Record, read_lines, version_of
from rmoe.results.comparison import Interval, Verdict

RESULTS_VERSION = 1
SUMMARY_VERSION = 1
MEAN = "mean"  # over all probes of a summary, seed by seed
MOST_CHOICES = 2000  # ways to choose k of E experts that the oracle goes through for every token


class Knobs(Record, frozen=True, kw_only=True):
    """How hard a probe is, and how long a router learns. The same for every router of a run.

    Attributes:
        noise: standard deviation of the noise on a cue; None is the probe's own.
        layers: `L`, routed layers.
        experts: `E`, experts of a layer and classes of the world.
        top_k: `k`; a row that is defined for one k only keeps its own.
        width: `p`, what the zoo's state width of 128 becomes here; other state widths in proportion.
        steps: optimizer steps.
        tokens: per step.
        learning_rate: Adam's for routers, decayed to zero by a cosine; that of experts is 4 times as high.
        balance: weight of balance losses that name none of their own.
    """

    noise: Annotated[float, Meta(gt=0, le=100)] | None = None
    layers: Annotated[int, Meta(ge=2, le=64)] = 6
    experts: Annotated[int, Meta(ge=2, le=64)] = 8
    top_k: Annotated[int, Meta(ge=1)] = 2
    width: Annotated[int, Meta(ge=1, le=1024)] = 32
    steps: Annotated[int, Meta(ge=1, le=1_000_000)] = 800
    tokens: Annotated[int, Meta(ge=2, le=65_536)] = 64
    learning_rate: Annotated[float, Meta(gt=0, le=1)] = 8e-3
    balance: Annotated[float, Meta(ge=0, le=100)] = 0.01


KNOBS = tuple(field.name for field in msgspec.structs.fields(Knobs))


def knobs_with(changes: Mapping[str, object], base: Knobs | None = None) -> Knobs:
    """Knobs with some changed; text is read as the knob's type.

    Raises:
        RequestError: an unknown knob, or a value that is not allowed.
    """
    knobs = base or Knobs()
    for name, value in changes.items():
        if name not in KNOBS:
            raise RequestError("knob", name, ", ".join(KNOBS))
        try:
            read = msgspec.convert({name: value}, Knobs, strict=False)
        except msgspec.ValidationError as error:
            raise RequestError(name, value, str(error).partition(" - at")[0]) from None
        knobs = msgspec.structs.replace(knobs, **{name: getattr(read, name)})
    return checked(knobs)


def checked(knobs: Knobs) -> Knobs:
    """The knobs.

    Raises:
        RequestError: they cannot go together.
    """
    if knobs.top_k > knobs.experts:
        raise RequestError("top_k", knobs.top_k, f"1 to experts ({knobs.experts})")
    choices = math.comb(knobs.experts, knobs.top_k)
    if choices > MOST_CHOICES:
        allowed = f"few enough that top_k of them ({choices} ways to choose) are at most {MOST_CHOICES}"
        raise RequestError("experts", knobs.experts, allowed)
    return knobs


class Reference(Record, frozen=True, kw_only=True):
    """The computed lines, mean squared error per layer: optimal without a cue, with this layer's, with all so far."""

    blind: list[float]
    stateless: list[float]
    oracle: list[float]


class ProbeRow(Record, frozen=True, kw_only=True):
    """One router on one probe with one seed. Lists are per layer, measured on test tokens, unless said otherwise.

    Attributes:
        key fields: router, probe, seed, knobs.
        plugins: sha256 of the plugins' sources, where one of them has registered the router; None also in rows of
            releases that did not keep it.
        stacked: how many models were trained in one pass; 1 where the router cannot be stacked, and `note` says why.
        seconds: wall clock of its unit over the runs in it.
        parameters: of all routers and what they share, frozen ones included; experts do not count.
        regret: `(loss - oracle) / (blind - oracle)` of the means over layers.
        curve_step, curve_regret: regret on other tokens during training.
        steps_to_half, steps_to_tenth: first such step with regret below 0.5, 0.1; None if there is none.
        accuracy: share of tokens whose first expert is their class's, under the best one-to-one naming of experts.
            A token without an expert is in nobody's class; rows of before 2026-11-27 count it as expert 0's.
        mutual_information: of class and first expert, nats; no expert is one more outcome.
        entropy, inner_balance, outer_balance: of the gate (Fig. 4, Table 8): mean, median and median over tokens.
            An inner balance is at most e^30; rows of before 2026-11-28 have up to 1e38 where no second is left.
        load: busiest expert's assignments over the mean.
        recurrent_share: norm of the part of the routers' task gradient that comes through the state, over the norm of
            all of it, mean over the points of the curve; None without a state.
        decodability: accuracy of a ridge regression from the state to the class, on tokens it was not fitted on.
    """

    schema_version: int = RESULTS_VERSION
    router: str
    router_spec: dict[str, Any]
    probe: str
    seed: int
    knobs: Knobs
    code: str
    torch: str
    plugins: list[str] | None = None
    stacked: int
    note: str = ""
    seconds: float
    parameters: int
    reference: Reference
    loss: list[float]
    regret: float
    regret_by_layer: list[float]
    curve_step: list[int]
    curve_regret: list[float]
    steps_to_half: int | None
    steps_to_tenth: int | None
    accuracy: list[float]
    mutual_information: list[float]
    entropy: list[float]
    inner_balance: list[float]
    outer_balance: list[float]
    load: list[float]
    recurrent_share: float | None
    decodability: list[float] | None

    @property
    def key(self) -> tuple[str, str, int, Knobs]:
        return self.router, self.probe, self.seed, self.knobs


def read_rows(path: Path) -> tuple[list[ProbeRow], list[str]]:
    """Read `results.jsonl`.

    Returns:
        The rows, one per key, and one line for each line that cannot be read.

    Raises:
        RequestError: a version this code does not read.
    """

    def read(line: bytes, name: str) -> ProbeRow:
        version_of(line, name, RESULTS_VERSION, RESULTS_VERSION)
        return msgspec.json.decode(line, type=ProbeRow)

    return read_lines(path, read)


class Against(Record, frozen=True, kw_only=True):
    """Regret minus the baseline's, paired by seed. `p` values are corrected over the probe's routers (Holm)."""

    mean: float
    interval: Interval
    p: float
    p_holm: float
    p_equivalent: float
    verdict: Verdict


class Score(Record, frozen=True, kw_only=True):
    """One router's regret on one probe: `regrets[j]` belongs to `seeds[j]`. With one seed no interval, no verdict."""

    seeds: list[int]
    regrets: list[float]
    mean: float
    interval: Interval | None = None
    against: Against | None = None


class Detail(Record, frozen=True, kw_only=True):
    """Means over seeds; steps are medians, None if half the seeds never came there.

    Attributes:
        by_layer: by the name of the rows' list.
        curve_regret: at `curve_step`.
    """

    by_layer: dict[str, list[float]]
    curve_step: list[int]
    curve_regret: list[float]
    steps_to_half: float | None
    steps_to_tenth: float | None
    recurrent_share: float | None


class Card(Record, frozen=True, kw_only=True):
    """One router. `scores` and `details` are by probe; `scores` also has the mean over probes."""

    router: str
    parameters: int
    seconds: float  # per (probe, seed), mean
    note: str
    scores: dict[str, Score]
    details: dict[str, Detail]


class Point(Record, frozen=True, kw_only=True):
    """Mean regret of a router on a probe at one value of a swept knob."""

    router: str
    probe: str
    value: float
    regret: float


class Summary(Record, frozen=True, kw_only=True):
    """`summary.json`. `knobs` and cards are of the first setting; `points` are of all, where a knob was swept.

    Attributes:
        references: by probe, mean over seeds.
    """

    schema_version: int = SUMMARY_VERSION
    baseline: str
    margin: float
    knobs: Knobs
    probes: list[str]
    references: dict[str, Reference]
    cards: list[Card]
    swept: str | None
    points: list[Point]
    code: str
    torch: str
