"""Routing noise from a stream of its own.

Dropout draws from torch's default generator. If routing noise did too, a router that uses it would change every
dropout mask after it, and paired runs would no longer be paired. Here a number is a pure function of (key, layer,
use, position): recomputation under gradient checkpointing sees the same noise, and nothing has to be stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

# splitmix64 (Steele, Lea, Flood 2014), its three constants as two's-complement int64.
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX2 = 0x94D049BB133111EB - (1 << 64)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: int64's own is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def splitmix64(x: Tensor) -> Tensor:
    """Mix int64 values to pseudo-random int64 values, elementwise; multiplication wraps."""
    x = x + _GAMMA
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


def rank_seed(seed: int, rank: int) -> int:
    """A seed for each rank: equal positions on two ranks must not draw equal noise."""
    return (seed + 1_000_003 * rank) % 2**31


class Noise:
    """Noise keyed by a tensor, so that advancing the key recompiles nothing.

    Each call of `uniform`, `exponential` or `normal` is one use and draws new numbers, in `like`'s shape and dtype.

    Args:
        key: scalar int64, a new one each forward pass.
        layer: index of the layer.
    """

    def __init__(self, key: Tensor, layer: int = 0) -> None:
        self.key, self.layer, self.uses = key, layer, 0

    def for_layer(self, layer: int) -> Noise:
        """An independent stream for one layer."""
        return Noise(self.key, layer)

    def uniform(self, like: Tensor) -> Tensor:
        """In (0, 1)."""
        bounds = torch.finfo(like.dtype)
        return self._uniform(like).to(like.dtype).clamp(bounds.tiny, 1 - bounds.eps / 2)

    def exponential(self, like: Tensor) -> Tensor:
        """Exponential with rate 1."""
        return -self._uniform(like).log().to(like.dtype)

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal."""
        return torch.special.ndtri(self._uniform(like)).to(like.dtype)

    def _uniform(self, like: Tensor) -> Tensor:
        """In at least float32, where the next number below 1 is `1 - 2^-24`: its logarithm is not zero."""
        stream = splitmix64(splitmix64(self.key.to(like.device)) + (self.layer << 8) + self.uses)
        self.uses += 1
        position = torch.arange(like.numel(), device=like.device)
        bits = _shift(splitmix64(stream + position), 40)  # 24 of them
        dtype = torch.promote_types(like.dtype, torch.float32)
        # In float32 the largest, 2^24 - 0.5, rounds up to 2^24: the normal number would be infinite.
        return ((bits.to(dtype) + 0.5) * 2**-24).clamp(max=1 - 2**-24).view(like.shape)
