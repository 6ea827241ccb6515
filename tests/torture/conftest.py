"""How hard to try: RMOE_TORTURE=short (the default, part of `make test`), normal (`make torture`) or full."""

from __future__ import annotations

import os
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
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 20 steps that has checkpoint-18 and checkpoint-20."""
    from rmoe.training.run import train

    out = tmp_path_factory.mktemp("runs") / "whole"
    train(tiny.config(text), out, progress=False)
    return out
