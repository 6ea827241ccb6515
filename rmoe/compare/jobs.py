"""What a worker process can be asked to do, and what it answers: one JSON line each. Imports no torch."""

from __future__ import annotations

from typing import Any, TypeAlias

from rmoe.records import Record


class Train(Record, frozen=True, kw_only=True, tag="train"):
    """Train one model, or go on with it; answers with its `RunResult`.

    Attributes:
        branch_of: folder of the longer run that it begins at; None begins at step 0.
    """

    config: dict[str, Any]
    folder: str
    branch_of: str | None = None


class Judge(Record, frozen=True, kw_only=True, tag="judge"):
    """Judge a finished model on the test split; answers with a float in the corpus's unit."""

    config: dict[str, Any]
    folder: str


class Time(Record, frozen=True, kw_only=True, tag="time"):
    """Train a fresh model a few steps; answers with `Measured`."""

    config: dict[str, Any]
    steps: int


class Measure(Record, frozen=True, kw_only=True, tag="measure"):
    """Analyse the routing of a finished run; answers with a `ModelAnalysis`."""

    config: dict[str, Any]
    folder: str
    name: str
    tokens: int


Job: TypeAlias = Train | Judge | Time | Measure


class Measured(Record, frozen=True, kw_only=True):
    """Wall clock of each step, and the process's peak memory so far."""

    step_seconds: list[float]
    peak_mib: float


class Answer(Record, frozen=True, kw_only=True):
    """`value` when it worked, else `error` in one line; `stopped`: the worker was told to end and has saved."""

    value: Any = None
    error: str | None = None
    stopped: bool = False
