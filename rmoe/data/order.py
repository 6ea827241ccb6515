"""The order of training blocks: a pure function of (seed, epoch, index). Imports no torch."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


@lru_cache(maxsize=2)
def epoch_order(num_blocks: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The permutation of an epoch.

    Blocks are sorted by the raw 64-bit output of Philox-4x64 keyed by (seed, epoch), ties by number. NumPy promises
    the raw output of a bit generator for ever (NEP 19), and makes no such promise for `Generator.permutation`.

    Args:
        num_blocks: blocks in the split.
        seed: of the data order, 0 to 2**64 - 1.
        epoch: from 0.

    Returns:
        Block numbers, [num_blocks] int64, read only.

    >>> epoch_order(8, seed=0, epoch=0).tolist() == epoch_order(8, seed=0, epoch=1).tolist()
    False
    >>> sorted(epoch_order(8, seed=0, epoch=0).tolist())
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    keys = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(num_blocks)
    order = np.argsort(keys, kind="stable")
    order.flags.writeable = False
    return order


def block_number(num_blocks: int, seed: int, example: int) -> int:
    """The block that is the run's `example`-th, counted from 0 through all epochs."""
    epoch, index = divmod(example, num_blocks)
    return int(epoch_order(num_blocks, seed, epoch)[index])
