"""Requests for texts made on the spot, each test with a cache of its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rmoe.data import DataConfig
from tests.data.texts import TEXT


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def request_for(tmp_path: Path, cache: Path) -> Callable[..., DataConfig]:
    """Writes a text to a file and asks for it."""

    def make(data: bytes = TEXT, name: str = "text.txt", **options: Any) -> DataConfig:
        path = tmp_path / name
        path.write_bytes(data)
        return DataConfig(path=str(path), cache_dir=str(cache), **options)

    return make
