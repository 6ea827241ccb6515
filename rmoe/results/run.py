"""`result.json`: what a finished run reports."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import msgspec

from rmoe.records import Record

RESULT_VERSION = 1

Unit: TypeAlias = Literal["bits_per_byte", "perplexity"]
"""What a corpus is measured in."""


class CorpusInfo(Record, frozen=True, kw_only=True):
    """The text a run was trained and evaluated on."""

    name: str
    sha256: str  # of the encoded text, so a renamed file is the same corpus and an edited one is not
    unit: Unit


class Hardware(Record, frozen=True, kw_only=True):
    """What a run was computed on; `threads` is what torch was told, part of the run's configuration."""

    cpu: str
    cores: int
    threads: int
    memory_gib: float
    accelerator: str | None = None


class Versions(Record, frozen=True, kw_only=True):
    """`code` is the package version plus the commit, when one is known; `libraries` maps name to version."""

    code: str
    python: str
    libraries: dict[str, str]


class Parameters(Record, frozen=True, kw_only=True):
    """Counts. `router`: projectors, cells and scorers; `active`: what one token passes through."""

    total: int
    non_embedding: int
    router: int
    active: int


class Curve(Record, frozen=True, kw_only=True):
    """A metric over training: `value[j]` was measured after optimizer step `step[j]`."""

    unit: str
    step: list[int]
    value: list[float]


class LayerCurve(Record, frozen=True, kw_only=True):
    """A metric of every layer over training: `value[j][l]` was measured after step `step[j]`."""

    unit: str
    step: list[int]
    value: list[list[float]]


class InitialLogits(Record, frozen=True, kw_only=True):
    """Standard deviation of the raw logits over experts before step 0, by layer, on `tokens` fixed tokens."""

    drawn: list[float]  # with the weights as they were drawn
    start: list[float]  # as training starts: differs where `training.initial_logit_std` is set
    tokens: int


class TextLosses(Record, frozen=True, kw_only=True):
    """Loss by stretch of text, in order: `nats[j]` is the sum over `blocks` neighbours (the last may have fewer)."""

    blocks: int
    targets: int  # in all
    nats: list[float]


class Averaged(Record, frozen=True, kw_only=True):
    """The metrics of the weights averaged over `steps`, beside those of the last weights alone."""

    steps: list[int]
    val: float | None
    test: float | None
    test_losses: TextLosses | None = None


class Histogram(Record, frozen=True, kw_only=True):
    """`counts[j]` samples fell into `[edges[j], edges[j + 1])`; the last bin is closed."""

    edges: list[float]
    counts: list[int]


class RoutingSummary(Record, frozen=True, kw_only=True):
    """How the finished model routes the validation text, per layer; None where it was not recorded."""

    tokens: int
    entropy_nats: list[float] | None = None  # [L] mean gate entropy
    entropy_histogram: list[Histogram] | None = None  # [L]
    load: list[list[float]] | None = None  # [L][E] share of assignments
    inner_balance: list[float] | None = None  # [L] median top-1 / top-2 score
    outer_balance: list[float] | None = None  # [L] median sum of the selected scores


class RunResult(Record, frozen=True, kw_only=True):
    """A finished run. The fields that rows of version 1 did not keep are None when read from one.

    Attributes:
        router, router_spec: the zoo row and its three stages spelled out.
        seed: of the initial weights, the order of the data, dropout and routing noise.
        config: the resolved `RunConfig`.
        steps, tokens: optimizer steps done and training tokens seen.
        skipped_batches: steps skipped because a loss or gradient was not finite.
        val, test: the finished model's loss on the whole split, in `corpus.unit`, lower is better; None
            where it was not asked for or the corpus has no such split.
        context, test_context: tokens of context that `val` and `test` were measured with, and how much of their split,
            in words; `test_context` is None in a result of an earlier version.
        parameters: counts.
        curves: by the name of a metrics field: `train`, `val`, `lm_loss`, `balance_loss`, ...
        seconds_per_1k_steps: wall clock of the training steps alone, without evaluation, saving and hooks. Other
            runs may have shared the machine: compare it only between runs timed alone.
        peak_mib: the process's peak memory: the allocator's on a GPU, resident size on a CPU.
        routing: how the finished model routes the validation text.
        initial_logits: the scale of the scores at the start; None for a router without a scorer.
        layer_curves: `gate_entropy`, `logit_std` and `load_imbalance` by layer.
        test_losses: of `test`, by stretch of text, so that a difference has an interval over text too.
        averaged: what the averaged weights reach; None without `training.average`.
        folder, model: where the run and its final model are.
    """

    schema_version: int = RESULT_VERSION
    router: str
    router_spec: dict[str, Any]
    seed: int
    config: dict[str, Any]
    versions: Versions
    hardware: Hardware
    corpus: CorpusInfo
    steps: int
    tokens: int
    skipped_batches: int | None
    val: float | None
    test: float | None
    context: str | None
    parameters: Parameters
    curves: dict[str, Curve] = msgspec.field(default_factory=dict)
    seconds_per_1k_steps: float | None
    peak_mib: float | None
    routing: RoutingSummary | None = None
    initial_logits: InitialLogits | None = None
    layer_curves: dict[str, LayerCurve] = msgspec.field(default_factory=dict)
    test_losses: TextLosses | None = None
    averaged: Averaged | None = None
    test_context: str | None = None
    folder: str | None
    model: str | None
