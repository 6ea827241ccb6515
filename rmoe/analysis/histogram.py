"""Distributions and medians of a stream in fixed memory."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def add_counts(counts: Tensor, index: Tensor) -> None:
    """Add one to `counts`, flattened, at each entry of `index`, in place. Integers: the order cannot matter."""
    one = torch.ones(1, dtype=counts.dtype).expand(index.numel())
    counts.view(-1).index_add_(0, index.reshape(-1), one)


class StreamingHistogram:
    """Counts of L streams of values in equal bins on [low, high]; values outside count in the outermost bins.

    A quantile read from it is the centre of the bin that holds the order statistic, so for values inside the
    range it is off by at most half a bin, however long the stream. Memory is O(L * bins).

    Args:
        num_layers: L.
        low, high: range.
        num_bins: bins per layer.
    """

    def __init__(self, num_layers: int, low: float, high: float, num_bins: int) -> None:
        self.low, self.high, self.num_bins = low, high, num_bins
        self.counts = torch.zeros(num_layers, num_bins, dtype=torch.int64)
        self._offset = torch.arange(num_layers)[:, None] * num_bins

    @property
    def edges(self) -> np.ndarray:
        """[bins + 1]."""
        return np.linspace(self.low, self.high, self.num_bins + 1)

    @property
    def n(self) -> int:
        """Values counted in each layer."""
        return int(self.counts[0].sum())

    def update(self, values: Tensor) -> None:
        """Count [L, T] values."""
        position = (values.double() - self.low) * (self.num_bins / (self.high - self.low))
        add_counts(self.counts, position.clamp(0, self.num_bins - 1).long() + self._offset)

    def medians(self) -> tuple[np.ndarray, float]:
        """Each layer's median, [L], and that of all layers together.

        For an even number of values, the mean of the two middle ones, as `numpy.median`. NaN for an empty
        stream.
        """
        counts = self.counts.numpy()
        return np.array([self._median(row) for row in counts]), self._median(counts.sum(axis=0))

    def _median(self, counts: np.ndarray) -> float:
        n = int(counts.sum())
        if n == 0:
            return float("nan")
        lower, upper = np.searchsorted(counts.cumsum(), [(n - 1) // 2, n // 2], side="right")
        width = (self.high - self.low) / self.num_bins
        return float(self.low + width * ((lower + upper) / 2 + 0.5))
