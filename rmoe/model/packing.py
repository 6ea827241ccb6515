"""Packed sequences with padding: examples kept apart in attention, padding kept out of routing.

transformers keeps the examples of a packed sequence apart by their positions, but only where there is no attention
mask; and routing needs the mask. So the mask is for routing, and attention is told of padding by its positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_PADDING = -2  # neither continues a position nor is continued by one


def split_packed(attention_mask: Any, position_ids: Tensor, cache: Any) -> tuple[Any, Tensor]:
    """The mask and positions that attention is given.

    Args:
        attention_mask: `[B, S]`, 0 at padding; anything else is returned as it is.
        position_ids: `[B, S]`; in a packed sequence they start again with each example.
        cache: of keys and values; nothing is packed where there is one.

    Returns:
        Both as they were; or, for packed sequences and in compiled code, no mask, and positions by which transformers
        takes each token of padding for an example of its own.
    """
    real = _real(attention_mask, position_ids)
    if cache is not None or real is None:
        return attention_mask, position_ids
    # Compiled code cannot ask, and needs not: without a cache the positions say as much as the mask.
    if not torch.compiler.is_compiling() and not starts_again(attention_mask, position_ids):
        return attention_mask, position_ids
    return None, position_ids.masked_fill(~real, _PADDING)


def starts_again(attention_mask: Any, position_ids: Tensor) -> bool:
    """Whether a row `[B, S]` holds several examples: the position of a real token is not beyond all before it."""
    real = _real(attention_mask, position_ids)
    if real is None:
        return bool((position_ids.diff(dim=-1) <= 0).any())
    seen = position_ids.masked_fill(~real, -1).cummax(-1).values
    return bool((real[:, 1:] & (position_ids[:, 1:] <= seen[:, :-1])).any())


def _real(attention_mask: Any, position_ids: Tensor) -> Tensor | None:
    """`[B, S]` bool, False at padding; None for what is no mask of these positions."""
    is_mask = isinstance(attention_mask, Tensor) and attention_mask.shape == position_ids.shape
    return attention_mask.bool() if is_mask else None
