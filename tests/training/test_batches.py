"""Which sequences a process sees at which step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from rmoe.data.blocks import BlockSampler
from rmoe.training.batches import step_batches
from rmoe.training.config import RunConfig
from rmoe.training.pipelined import build_pipeline
from rmoe.training.place import Ranks

BLOCKS, SEED, STEPS, BATCH = 17, 5, 6, 24


def batches(ranks: Ranks, size: int, first: int = 0) -> list[list[int]]:
    parts = BATCH // ranks.data // size
    steps = range(first, STEPS)
    found = list(step_batches(BLOCKS, SEED, size=size, parts=parts, steps=steps, ranks=ranks))
    assert len(found) == parts * len(steps)
    return found


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_dealt_as_accelerate_deals(world: int, size: int) -> None:
    """So a run of an earlier release, which accelerate dealt its batches to, goes on with the same ones."""
    everything = BatchSampler(BlockSampler(BLOCKS, SEED, stop=STEPS * BATCH), size, drop_last=True)
    for rank in range(world):
        shard = BatchSamplerShard(everything, world, rank)
        assert batches(Ranks(world, rank), size) == list(shard)


@pytest.mark.parametrize(("world", "same"), [(4, 2), (4, 4), (6, 3)])
def test_those_that_work_together_see_the_same(world: int, same: int) -> None:
    for rank in range(world):
        assert batches(Ranks(world, rank, same), 2) == batches(Ranks(world // same, rank // same), 2)


def test_a_resumed_run_sees_what_is_left() -> None:
    ranks = Ranks(2, 1)
    assert batches(ranks, 3, first=4) == batches(ranks, 3)[4 * 4 :]


def test_a_step_sees_the_same_sequences_however_many_processes_there_are() -> None:
    alone = batches(Ranks(), BATCH)
    for world, size in ((2, 3), (3, 2), (4, 3), (12, 1)):
        parts = BATCH // world // size
        dealt = [batches(Ranks(world, rank), size) for rank in range(world)]
        for step, expected in enumerate(alone):
            seen = [s for rank in dealt for micro in rank[step * parts : (step + 1) * parts] for s in micro]
            assert sorted(seen) == sorted(expected)


@pytest.mark.parametrize(("batch", "stages", "micro_batches"), [(9, 2, 3), (8, 2, 2), (7, 2, 7)])
def test_the_default_micro_batch_of_a_pipeline_divides_its_share(
    batch: int, stages: int, micro_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rmoe.training.pipelined.Pipeline", lambda model, number, *_: number)
    config = RunConfig.from_dict(
        {
            "training": {"batch_size": batch},
            "model": {"num_hidden_layers": 4},
            "parallel": {"pipeline": stages},
        }
    )
    place = SimpleNamespace(ranks=SimpleNamespace(data=1), bf16=False)
    assert build_pipeline(None, config, place) == micro_batches
