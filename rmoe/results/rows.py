"""`results.jsonl` of a comparison: one line per run.

It is a log that is only ever appended to. A run is known by its key (router, seed, sweep point); when a later line
has the same key (its test metric came later, or it was timed), the later line stands.

Version 2 holds the run's whole `RunResult`. Version 1 copied some of its fields; its lines are read as version 2.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec

from rmoe.errors import RequestError
from rmoe.records import Record, read_lines, version_of
from rmoe.results.run import (
    CorpusInfo,
    Hardware,
    Parameters,
    RunResult,
    Versions,
)

ROWS_VERSION = 2

SweepValue: TypeAlias = float | int | str | bool


class Timing(Record, frozen=True, kw_only=True):
    """Cost of training with nothing else running: medians over `rounds`, interleaved with other routers.

    Attributes:
        machine, hardware: None in rows of earlier releases, which were timed where they were trained.
        begun: when the phase began, UTC: of one phase are the rows that agree. Earlier releases did not say.
    """

    seconds_per_1k_steps: float
    peak_mib: float
    steps: int
    rounds: int
    machine: str | None = None
    hardware: Hardware | None = None
    begun: str | None = None


class Failure(Record, frozen=True, kw_only=True):
    """A run that ended without a result: `error`, and what it was started with."""

    error: str | None
    router_spec: dict[str, Any]
    config: dict[str, Any]
    versions: Versions
    hardware: Hardware
    corpus: CorpusInfo


class ResultRow(Record, frozen=True, kw_only=True):
    """One line of `results.jsonl`: a trained model with its `result`, or a run with its `failure`.

    `result.test` is None except at the sweep point chosen on validation.
    """

    schema_version: int = ROWS_VERSION
    router: str
    seed: int
    sweep: dict[str, SweepValue]
    result: RunResult | None = None
    failure: Failure | None = None
    timing: Timing | None = None

    def __post_init__(self) -> None:
        if (self.result is None) == (self.failure is None):
            raise ValueError("a row has either a `result` or a `failure`")

    @property
    def run(self) -> RunResult | Failure:
        """What both kinds of row know: configuration, versions, hardware, corpus."""
        found = self.result or self.failure
        assert found is not None
        return found

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


def finished(rows: Iterable[ResultRow]) -> dict[str, RunResult]:
    """Key -> result, of the runs that finished."""
    return {row.key: row.result for row in rows if row.result is not None}


def read_rows(path: Path) -> tuple[list[ResultRow], list[str]]:
    """Read `results.jsonl`; a file that is not there yet has no rows.

    Returns:
        The rows, one per key (the last line of a key stands, in the order keys first appeared), and one line
        for each problem that was passed over.

    Raises:
        RequestError: a version this code does not read, or two corpora in one file.
    """
    if not path.exists():
        return [], []
    rows, problems = read_lines(path, _read_row)
    check_comparable(rows, path.name)
    return rows, problems


def check_comparable(rows: list[ResultRow], where: str) -> None:
    """Refuse rows that were evaluated on different text, or in different units.

    Raises:
        RequestError: naming both corpora.
    """
    corpora = {(row.run.corpus.sha256, row.run.corpus.unit): row.run.corpus for row in rows}
    if len(corpora) > 1:
        names = " and ".join(sorted(f"{c.name} ({c.unit}, sha256 {c.sha256[:12]})" for c in corpora.values()))
        raise RequestError(f"{where}: corpus", names, "one corpus in one comparison")


class _Row1(RunResult, frozen=True, kw_only=True):
    """A line of version 1: most of a result's fields, with what now stands beside the result."""

    sweep: dict[str, SweepValue]
    status: Literal["finished", "failed"]
    error: str | None
    timing: Timing | None
    parameters: Parameters | None  # type: ignore[assignment]  # of a failed run
    skipped_batches: None = None
    context: None = None
    seconds_per_1k_steps: None = None
    peak_mib: None = None
    folder: None = None
    model: None = None


def _read_row(line: bytes, name: str) -> ResultRow:
    """Raises RequestError on a line of an unknown version, DecodeError on one that is no row."""
    if version_of(line, name, 1, ROWS_VERSION) == ROWS_VERSION:
        return msgspec.json.decode(line, type=ResultRow)
    old = msgspec.json.decode(line, type=_Row1)
    finished = old.status == "finished"
    return ResultRow(
        router=old.router,
        seed=old.seed,
        sweep=old.sweep,
        result=msgspec.convert(old, RunResult, from_attributes=True) if finished else None,
        failure=None if finished else msgspec.convert(old, Failure, from_attributes=True),
        timing=old.timing,
    )
