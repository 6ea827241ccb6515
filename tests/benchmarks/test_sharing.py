"""The measurement of sharing, on runs of a few steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.sharing import GRIDS, LADDER, steps_per_second, whole_grid, with_steps, with_threads
from rmoe.compare.sharing import SMALL_STEP, share, step_work
from rmoe.data.config import DataConfig
from rmoe.training.config import ModelConfig, RunConfig, TrainingConfig


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i}: the cat sat on mat {i * 7919 % 101}\n" for i in range(800)))
    return RunConfig(
        model=ModelConfig(16, 2, 2, num_experts=4, moe_intermediate_size=8),
        data=DataConfig(path=str(text), cache_dir=str(tmp_path / "cache")),
        training=TrainingConfig(max_steps=4, batch_size=2, sequence_length=32),
    )


@pytest.mark.slow
def test_a_grid_each_way(config: RunConfig) -> None:
    found = whole_grid(config, seeds=1)
    assert found["same_bits_as_one_by_one"]
    assert found["runs"] == 2
    assert found["faster"] == found["one_by_one_all_threads_s"] / found["shared_s"]


@pytest.mark.slow
def test_steps_of_all_workers_add_up(config: RunConfig) -> None:
    assert steps_per_second(config, jobs=2, threads=1, steps=2) > 0


def test_the_ladder_reaches_the_threshold() -> None:
    """Beyond the largest size that was tried, `rmoe compare` does not share by itself."""
    largest = max(step_work(one.model, one.training) for one in LADDER.values())
    assert SMALL_STEP / 2 < largest < SMALL_STEP
    for one in LADDER.values():
        assert share(one.model, with_threads(one, 1).training, None, on_gpu=False).jobs >= 1


def test_steps_and_threads_are_all_that_changes() -> None:
    changed = with_steps(with_threads(GRIDS["quick"], 2), 7).training
    assert (changed.max_steps, changed.threads) == (7, 2)
    assert with_steps(GRIDS["quick"], None) == GRIDS["quick"]
