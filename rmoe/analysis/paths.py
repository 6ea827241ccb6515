"""The paths tokens take: the first-choice expert of every layer, counted in bounded memory."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

CAPACITY = 1 << 16
_BUFFER_TOKENS = 1 << 15
_HASH_SEED = 20_408


class FrequentPaths:
    """Counts paths with the Misra-Gries summary of Agarwal et al., "Mergeable Summaries" (2012).

    At most `capacity` paths are kept. While no more than that many have been seen, every count is exact
    (`max_undercount` is 0). Beyond, counts are lower bounds, each at most `max_undercount` <= n / (capacity
    + 1) too low, so a path taken more often than that is never missed.

    A path is counted under a 64-bit key: its digits in base S where S^L fits, else a random linear hash,
    which confuses two given paths with probability 2^-63.

    Args:
        num_layers: L.
        num_choices: S, experts plus one for "none".
        capacity: most paths kept.
    """

    def __init__(self, num_layers: int, num_choices: int, capacity: int = CAPACITY) -> None:
        self.capacity = capacity
        self.n = 0
        self.max_undercount = 0
        self._most = 0  # paths that were told apart at one time
        if num_choices**num_layers < 2**63:
            multipliers = [num_choices**layer for layer in range(num_layers)]
        else:
            rng = np.random.default_rng(_HASH_SEED)
            multipliers = (rng.integers(0, 2**64, num_layers, dtype=np.uint64) | np.uint64(1)).tolist()
        self._multipliers = np.array(multipliers, dtype=np.uint64)
        self._keys = np.empty(0, np.uint64)  # sorted
        self._counts = np.empty(0, np.int64)
        self._paths = np.empty((0, num_layers), np.int32)
        self._buffer: list[np.ndarray] = []
        self._buffered = 0

    def update(self, first_choice: Tensor) -> None:
        """Add tokens.

        Args:
            first_choice: [L, T] int64 in [0, S).
        """
        self._buffer.append(first_choice.T.to(torch.int32).numpy().copy())
        self._buffered += first_choice.shape[1]
        self.n += first_choice.shape[1]
        if self._buffered >= _BUFFER_TOKENS:
            self._merge()

    def _merge(self) -> None:
        if not self._buffer:
            return
        paths = np.concatenate([self._paths, *self._buffer])
        weights = np.concatenate([self._counts, np.ones(self._buffered, np.int64)])
        new = paths[len(self._keys) :].astype(np.uint64) * self._multipliers
        keys = np.concatenate([self._keys, new.sum(axis=1, dtype=np.uint64)])
        self._buffer, self._buffered = [], 0
        keys, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        counts = np.bincount(inverse, weights).astype(np.int64)
        self._most = max(self._most, len(keys))
        if len(keys) > self.capacity:
            cut = int(np.partition(counts, -self.capacity - 1)[-self.capacity - 1])
            counts -= cut
            self.max_undercount += cut
            keep = counts > 0
            keys, first, counts = keys[keep], first[keep], counts[keep]
        self._keys, self._counts, self._paths = keys, counts, paths[first]

    @property
    def distinct(self) -> int:
        """Different paths seen; a lower bound once `max_undercount` is above 0."""
        self._merge()
        return self._most

    def top(self, k: int) -> list[tuple[list[int], int]]:
        """The k most frequent paths, each [L], with their counts; ties in ascending order of path."""
        self._merge()
        order = np.lexsort((*self._paths.T[::-1], -self._counts))[:k]  # the last key sorts first
        return [(self._paths[i].tolist(), int(self._counts[i])) for i in order]
