"""Routing stability between two checkpoints of one model (router saturation), or between two precisions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def shared_choice(experts: Tensor, other: Tensor, num_experts: int) -> Tensor:
    """Share of a token's chosen experts that two checkpoints agree on.

        |A and B| / max(|A|, |B|),  1 where neither chooses any

    With k experts in both this is OLMoE's saturation |A and B| / k.

    Args:
        experts, other: [..., K] int64, distinct within a token; `num_experts` in empty slots.

    Returns:
        [...] float64.

    Source: OLMoE, arXiv:2409.02060, section 5.1.
    """
    chosen, other_chosen = experts < num_experts, other < num_experts
    same = (experts[..., :, None] == other[..., None, :]) & chosen[..., :, None]
    size = torch.maximum(chosen.sum(-1), other_chosen.sum(-1))
    return torch.where(size > 0, same.sum((-1, -2)) / size.clamp(min=1), 1.0).double()


class Saturation:
    """Streams the mean of `shared_choice` per layer, and how often two models choose different sets of experts."""

    def __init__(self, num_layers: int) -> None:
        self.n = 0
        self._sum = torch.zeros(num_layers, dtype=torch.float64)
        self._changed = torch.zeros(num_layers, dtype=torch.int64)
        self._any = 0

    def update(self, experts: Tensor, other: Tensor, num_experts: int) -> None:
        """Add tokens: [L, T, K] int64 of both models, for the same tokens; `num_experts` in empty slots."""
        shared = shared_choice(experts, other, num_experts)
        changed = shared < 1
        self._sum += shared.sum(-1)
        self._changed += changed.sum(-1)
        self._any += int(changed.any(0).sum())
        self.n += experts.shape[1]

    def result(self) -> np.ndarray:
        """[L] float64 in [0, 1]."""
        return (self._sum / max(self.n, 1)).numpy()

    def flips(self) -> tuple[np.ndarray, float]:
        """Share of tokens whose experts differ, [L] and in any layer."""
        n = max(self.n, 1)
        return self._changed.numpy() / n, self._any / n
