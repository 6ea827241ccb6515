"""The batches of a run: which sequences a process sees at which step."""

from __future__ import annotations

from collections.abc import Iterator

from rmoe.data.order import block_number
from rmoe.training.place import Ranks


def step_batches(
    num_blocks: int, seed: int, *, size: int, parts: int, steps: range, ranks: Ranks
) -> Iterator[list[int]]:
    """The sequences of each micro-batch of one process: a pure function of (seed, step, rank).

    The run's sequences (`block_number`) are cut into micro-batches, which are dealt in turn to the groups of
    processes that see different ones. So a step sees the same sequences however many processes there are.

    Args:
        num_blocks: of the dataset.
        size: sequences of a micro-batch.
        parts: micro-batches of a process in a step.
        steps: the steps to take, counted from 0.
        ranks: this process among the others.
    """
    for turn in range(steps.start * parts, steps.stop * parts):
        first = (turn * ranks.data + ranks.data_rank) * size
        yield [block_number(num_blocks, seed, example) for example in range(first, first + size)]
