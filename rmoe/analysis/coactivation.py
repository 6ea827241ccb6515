"""Which experts are chosen together: within a layer, and from one layer to the next."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rmoe.analysis.histogram import add_counts


class Coactivation:
    """Counts tokens for which two experts are both chosen. Memory is O(L E^2).

    Args:
        num_layers, num_experts: L, E.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.num_experts = num_experts
        side = num_experts + 1  # the last row and column: no expert
        self._within = torch.zeros(num_layers, side, side, dtype=torch.int64)
        self._across = torch.zeros(max(num_layers - 1, 0), side, side, dtype=torch.int64)
        self.n = 0

    def update(self, experts: Tensor) -> None:
        """Add tokens, [L, T, K] int64, E in an empty slot."""
        _add_pairs(self._within, experts, experts)
        _add_pairs(self._across, experts[:-1], experts[1:])
        self.n += experts.shape[1]

    def within(self) -> np.ndarray:
        """[L, E, E] share of tokens that choose a and b in layer l; the diagonal: that choose a at all."""
        return self._shares(self._within)

    def across(self) -> np.ndarray:
        """[L - 1, E, E] share of tokens that choose a in layer l and b in layer l + 1."""
        return self._shares(self._across)

    def _shares(self, counts: torch.Tensor) -> np.ndarray:
        return counts[:, : self.num_experts, : self.num_experts].numpy() / max(self.n, 1)


def _add_pairs(counts: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> None:
    """Count each (row, column) pair of each token: rows, columns [M, T, K] into counts [M, S, S]."""
    side = counts.shape[-1]
    table = torch.arange(len(counts))[:, None, None] * side
    index = (table + rows)[..., :, None] * side + columns[..., None, :]  # [M, T, K, K]
    add_counts(counts, index)
