"""Who gets the work: selection frequency (Fig. 12), imbalance, what a capacity limit drops (Table 11)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rmoe.analysis.histogram import add_counts

CAPACITY_FACTORS = (1.0, 1.25, 1.5, 2.0)
WINDOW_TOKENS = 4096


def frequency(counts: np.ndarray) -> np.ndarray:
    """Share of a layer's assignments each expert takes, [..., E] -> [..., E]; zeros where there are none."""
    return counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)


def load_imbalance(counts: np.ndarray, layer_experts: Sequence[int] = ()) -> np.ndarray:
    """Largest load over mean load, [..., L, E] -> [..., L]: 1 is perfect balance, E one expert doing all the work.

    Args:
        counts: assignments per expert.
        layer_experts: E of each layer, where some have fewer than the last dimension.
    """
    return frequency(counts).max(axis=-1) * (np.asarray(layer_experts) if layer_experts else counts.shape[-1])


QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)


def relative_load_quantiles(counts: np.ndarray, layer_experts: Sequence[int] = ()) -> np.ndarray:
    """`QUANTILES` of load over mean load, [L, E] -> [L, 5]; between two experts interpolated, as `numpy.quantile`.

    `layer_experts` as of `load_imbalance`: the experts that a layer does not have do not count.
    """
    own = layer_experts or (counts.shape[-1],) * len(counts)
    shares = frequency(counts)
    return np.stack([np.quantile(row[:e] * e, QUANTILES) for row, e in zip(shares, own, strict=True)])


def dead_experts(counts: np.ndarray, layer_experts: Sequence[int] = ()) -> np.ndarray:
    """Experts of each layer that no token chose, [L, E] -> [L]."""
    missing = counts.shape[-1] - np.asarray(layer_experts or (counts.shape[-1],) * len(counts))
    return (counts == 0).sum(axis=-1) - missing


def max_violation(counts: np.ndarray, layer_experts: Sequence[int] = ()) -> np.ndarray:
    """MaxVio = (largest load - mean load) / mean load, [L, E] -> [L] (arXiv:2408.15664): 0 is perfect balance."""
    return load_imbalance(counts, layer_experts) - 1


def hottest_steps(num_experts: int) -> list[int]:
    """1, 2, 4 and so on up to E, E itself last."""
    steps = [2**i for i in range(num_experts.bit_length()) if 2**i < num_experts]
    return [*steps, num_experts]


def coverage(counts: np.ndarray, hottest: Sequence[int]) -> np.ndarray:
    """Share of assignments that the m most chosen experts of each layer take, [L, E] -> [L, M]."""
    shares = np.sort(frequency(counts), axis=-1)[:, ::-1].cumsum(axis=-1)
    return shares[:, np.asarray(hottest) - 1]


def capacity(capacity_factor: float, num_tokens: int, experts_per_token: int, num_experts: int) -> int:
    """`ceil(factor * T * k / E)`: what one expert accepts among T tokens; the rule of the gates here."""
    return math.ceil(num_tokens * (capacity_factor * experts_per_token / num_experts))


class Load:
    """Streams assignments per expert, and the drop ratio over windows of consecutive tokens.

    A capacity limit applies to the tokens that are routed together. Here they are windows of exactly
    `min(window_tokens, total_tokens)` tokens in the order of the text, so the figure does not depend on the
    batch size of the analysis; an incomplete last window is left out. Which of an expert's tokens would be
    dropped depends on their order, how many does not. Memory is O(L E).

    Args:
        num_layers, num_experts, experts_per_token: L, E, k.
        total_tokens: tokens that `update` will see in all.
        capacity_factors: C factors.
        window_tokens: T.
        layers: E and k of each layer, where they differ.
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        experts_per_token: int,
        total_tokens: int,
        capacity_factors: Sequence[float] = CAPACITY_FACTORS,
        window_tokens: int = WINDOW_TOKENS,
        layers: tuple[Sequence[int], Sequence[int]] = ((), ()),
    ) -> None:
        self.window_tokens = min(window_tokens, total_tokens)
        self.capacity_factors = list(capacity_factors)
        own_experts = layers[0] or (num_experts,) * num_layers
        own_top_k = layers[1] or (experts_per_token,) * num_layers
        self._capacity = torch.tensor(
            [
                [capacity(f, self.window_tokens, k, e) for e, k in zip(own_experts, own_top_k, strict=True)]
                for f in capacity_factors
            ]
        )  # [F, L]
        self.counts = torch.zeros(num_layers, num_experts, dtype=torch.int64)
        self._window = torch.zeros(num_layers, num_experts + 1, dtype=torch.int64)  # last column: no expert
        self._window_seen = 0
        self._dropped = torch.zeros(len(self.capacity_factors), num_layers, dtype=torch.int64)
        self._offered = torch.zeros(num_layers, dtype=torch.int64)
        self._offset = torch.arange(num_layers)[:, None, None] * (num_experts + 1)
        self.n = 0

    def update(self, experts: Tensor) -> None:
        """Add the next tokens, [L, T, K] int64, E in an empty slot."""
        start = 0
        while start < experts.shape[1]:
            taken = min(experts.shape[1] - start, self.window_tokens - self._window_seen)
            add_counts(self._window, experts[:, start : start + taken] + self._offset)
            start += taken
            self._window_seen += taken
            if self._window_seen == self.window_tokens:
                self._close_window()
        self.n += experts.shape[1]

    def _close_window(self) -> None:
        load = self._window[:, :-1]
        self._dropped += (load - self._capacity[..., None]).clamp(min=0).sum(-1)
        self._offered += load.sum(-1)
        self.counts += load
        self._window.zero_()
        self._window_seen = 0

    def total_counts(self) -> np.ndarray:
        """[L, E] int64, assignments of all tokens seen."""
        return (self.counts + self._window[:, :-1]).numpy()

    def drop_ratio(self) -> tuple[np.ndarray, np.ndarray]:
        """Share of assignments beyond capacity: [C, L], and over all layers, [C]."""
        offered = self._offered.clamp(min=1).numpy()
        dropped = self._dropped.numpy()
        return dropped / offered, dropped.sum(axis=-1) / offered.sum()
