"""What every test shares: quiet surroundings, fixed before any library is imported."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# One thread per process: sums are taken in one order, and parallel test processes do not fight for cores.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"
# A test that would reach for the network fails at once instead.
for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ[variable] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# The same examples every time, and no deadline: another process on the machine is not a failure.
settings.register_profile("rmoe", deadline=None, derandomize=True)
settings.load_profile("rmoe")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def corpus_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus cache of this test process: never the user's own."""
    cache = tmp_path_factory.mktemp("corpus-cache")
    os.environ["RMOE_CACHE"] = str(cache)
    return cache


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """`../shared/data` beside the checkout; a test that wants it is skipped where it is missing."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside this checkout")
    return folder


@pytest.fixture(scope="session")
def note() -> Callable[..., None]:
    """Append a line of figures to $RMOE_TORTURE_REPORT, where that is set: the table of docs/reliability.md."""

    def write(**figures: object) -> None:
        if path := os.environ.get("RMOE_TORTURE_REPORT"):
            with Path(path).open("a") as file:
                file.write(json.dumps(figures) + "\n")

    return write


@pytest.fixture
def drawn_from(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens could be drawn, at each draw so far."""
    import torch

    counts: list[int] = []
    multinomial = torch.multinomial

    def draw(probabilities: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        counts.extend((probabilities > 0).sum(-1).tolist())
        return multinomial(probabilities, *args, **options)

    monkeypatch.setattr(torch, "multinomial", draw)
    return counts
