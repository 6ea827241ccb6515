"""The batches of a run: which sequences a process sees at which step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler

from rmoe.data.blocks import BlockSampler
from rmoe.training.place import Ranks


class StepBatches(Sampler[list[int]]):
    """The sequences of each micro-batch of one process: a pure function of (seed, step, rank).

    The run's sequences (`BlockSampler`) are cut into micro-batches, which are dealt in turn to the groups of
    processes that see different ones. So a step sees the same sequences however many processes there are.

    Args:
        num_blocks: of the dataset.
        size: sequences of a micro-batch.
        parts: micro-batches of a process in a step.
        steps: the steps to take, counted from 0.
        ranks: this process among the others.
    """

    def __init__(
        self, num_blocks: int, seed: int, *, size: int, parts: int, steps: range, ranks: Ranks
    ) -> None:
        self.num_blocks, self.seed, self.size = num_blocks, seed, size
        self.turns = range(steps.start * parts, steps.stop * parts)
        self.ranks = ranks

    def __len__(self) -> int:
        return len(self.turns)

    def __iter__(self) -> Iterator[list[int]]:
        for turn in self.turns:
            first = (turn * self.ranks.data + self.ranks.data_rank) * self.size
            yield list(BlockSampler(self.num_blocks, self.seed, start=first, stop=first + self.size))


def loader(
    dataset: Dataset[Any], sampler: StepBatches, collate: Callable[..., Any] | None, pin_memory: bool
) -> DataLoader[Any]:
    """Read the sampler's batches; `collate` None stacks tensors of one shape."""
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, pin_memory=pin_memory)
