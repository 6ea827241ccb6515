"""Which tokens (or bytes) an expert takes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rmoe.analysis.histogram import add_counts

MAX_TABLE = 1 << 25  # counters: 256 MiB


def tracked_tokens(token_counts: np.ndarray, num_layers: int, num_experts: int) -> np.ndarray:
    """The token ids to count: all that occur, or the most frequent if the table would outgrow `MAX_TABLE`.

    Args:
        token_counts: [V] how often each id occurs in the text.

    Returns:
        Ascending ids.
    """
    room = max(MAX_TABLE // (num_layers * (num_experts + 1)) - 1, 1)
    occurring = int((token_counts > 0).sum())
    most = np.argsort(-token_counts, kind="stable")[: min(room, occurring)]
    return np.sort(most)


class TokenAffinity:
    """Counts assignments per layer, expert and token id. Memory is O(L E ids).

    Args:
        num_layers, num_experts: L, E.
        vocab_size: V; token ids are below it.
        ids: the ids to count, ascending; see `tracked_tokens`.
    """

    def __init__(self, num_layers: int, num_experts: int, vocab_size: int, ids: np.ndarray) -> None:
        self.ids = ids
        self._column = torch.full((vocab_size,), len(ids))  # the last column: ids that are not counted
        self._column[torch.from_numpy(ids)] = torch.arange(len(ids))
        self._counts = torch.zeros(num_layers, num_experts + 1, len(ids) + 1, dtype=torch.int64)

    def update(self, experts: Tensor, token_ids: Tensor) -> None:
        """Add tokens, [L, T, K] experts (E in an empty slot) and [T] int64 ids."""
        layers, rows, columns = self._counts.shape
        row = torch.arange(layers)[:, None, None] * rows + experts  # [L, T, K]
        add_counts(self._counts, row * columns + self._column[token_ids][:, None])

    def top(self, k: int) -> list[list[list[tuple[int, int, float]]]]:
        """For each layer and expert the k ids it takes most: (id, assignments, share of its assignments)."""
        counts = self._counts[:, :-1].numpy()
        totals = counts.sum(axis=-1)
        order = np.argsort(-counts[..., :-1], axis=-1, kind="stable")[..., :k]

        def entries(layer: int, expert: int) -> list[tuple[int, int, float]]:
            row = counts[layer, expert]
            taken = [column for column in order[layer, expert] if row[column] > 0]
            return [(int(self.ids[c]), int(row[c]), float(row[c] / totals[layer, expert])) for c in taken]

        return [[entries(layer, expert) for expert in range(counts.shape[1])] for layer in range(len(counts))]
