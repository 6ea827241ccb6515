"""How hard to try: RMOE_TORTURE=short (the default, part of `make test`), normal (`make torture`) or full."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.training import tiny


@dataclass(frozen=True)
class Amount:
    """Kills per kind of run, seconds of fuzzing, and whether every case is tried or only a few."""

    kills: int
    fuzz_seconds: float
    everything: bool


AMOUNTS = {"short": Amount(1, 0, False), "normal": Amount(10, 300, True), "full": Amount(50, 3600, True)}
LEVEL = os.environ.get("RMOE_TORTURE", "short")
AMOUNT = AMOUNTS[LEVEL]


@pytest.fixture(scope="session")
def note() -> Callable[..., None]:
    """Append a line of figures to $RMOE_TORTURE_REPORT, where that is set."""

    def write(**figures: object) -> None:
        if path := os.environ.get("RMOE_TORTURE_REPORT"):
            with Path(path).open("a") as file:
                file.write(json.dumps({"level": LEVEL, **figures}) + "\n")

    return write


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 20 steps that has checkpoint-18 and checkpoint-20."""
    from rmoe.training.run import train

    out = tmp_path_factory.mktemp("runs") / "whole"
    train(tiny.config(text), out, progress=False)
    return out
