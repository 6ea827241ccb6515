"""One finished run that several tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training import tiny


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run of `tiny.config`."""
    from rmoe.training.run import train

    out = tmp_path_factory.mktemp("runs") / "whole"
    train(tiny.config(text), out, progress=False)
    return out
