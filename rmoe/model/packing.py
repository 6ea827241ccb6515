"""Packed sequences with padding: examples kept apart in attention, padding kept out of routing.

transformers keeps the examples of a packed sequence apart by their positions, but only where there is no attention
mask; and routing needs the mask. So the mask is for routing, and attention is told of padding by its positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_PADDING = -2  # neither continues a position nor is continued by one


MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""`(batch, head, query, key) -> bool`, indices as transformers' masks take them."""


def split_packed(
    attention_mask: Any, position_ids: Tensor, cache: Any, varlen: bool = False
) -> tuple[Any, Tensor, MaskFunction | None]:
    """The mask and positions that attention is given, and what else a query must fulfil to see a key.

    Args:
        attention_mask: `[B, S]`, 0 at padding; anything else is returned as it is.
        position_ids: `[B, S]`; in a packed sequence they start again with each example.
        cache: of keys and values; nothing is packed where there is one.
        varlen: attention reads positions and no mask (FlashAttention's).

    Returns:
        All as it was; or, for packed sequences, no mask, and positions by which transformers takes each token of
        padding for an example of its own. Compiled code cannot ask whether rows are packed: it keeps both, and each
        query looks at its own example. With `varlen` it is told by positions, and padding inside an example splits it.
    """
    real = _real(attention_mask, position_ids)
    if cache is not None or real is None:
        return attention_mask, position_ids, None
    if torch.compiler.is_compiling() and not varlen:
        examples = _starts(real, position_ids).cumsum(-1)
        return attention_mask, position_ids, lambda b, _, q, k: examples[b, q] == examples[b, k]
    if not torch.compiler.is_compiling() and not starts_again(attention_mask, position_ids):
        return attention_mask, position_ids, None
    return None, position_ids.masked_fill(~real, _PADDING), None


def starts_again(attention_mask: Any, position_ids: Tensor) -> bool:
    """Whether a row `[B, S]` holds several examples: positions of real tokens do not grow throughout."""
    real = _real(attention_mask, position_ids)
    if real is None:
        return bool((position_ids.diff(dim=-1) <= 0).any())
    return bool(_starts(real, position_ids).any())


def _starts(real: Tensor, position_ids: Tensor) -> Tensor:
    """`[B, S]` bool: real tokens whose position is not beyond that of the last real one before them."""
    places = torch.arange(real.shape[1], device=real.device)
    last = torch.where(real, places, -1).cummax(-1).values  # of the row so far; -1: none
    before = position_ids.gather(-1, last.clamp(min=0))[:, :-1]
    follows = real[:, 1:] & (last[:, :-1] >= 0)
    return nn.functional.pad(follows & (position_ids[:, 1:] <= before), (1, 0))


def _real(attention_mask: Any, position_ids: Tensor) -> Tensor | None:
    """`[B, S]` bool, False at padding; None for what is no mask of these positions."""
    is_mask = isinstance(attention_mask, Tensor) and attention_mask.shape == position_ids.shape
    return attention_mask.bool() if is_mask else None
