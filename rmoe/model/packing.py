"""Packed sequences: examples of one row kept apart in attention, padding kept out of routing.

transformers keeps the examples of a packed row apart by their positions, but only where there is no attention mask, and
under FlashAttention in batches of one row alone; and routing needs the mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""`(batch, head, query, key) -> bool`, indices as transformers' masks take them."""


class Apart(NamedTuple):
    """What attention is given.

    Attributes:
        mask: the attention mask, or None.
        same_example: what else a query must fulfil to see a key.
        lengths: FlashAttention's keywords for sequences that lie one behind the other.
    """

    mask: Any
    same_example: MaskFunction | None = None
    lengths: dict[str, Any] = {}  # noqa: RUF012 - read only


def kept_apart(attention_mask: Any, position_ids: Tensor, cache: Any, varlen: bool) -> Apart:
    """How attention is told of packed examples.

    Compiled code cannot ask whether rows are packed: each query looks at its own example there. Under FlashAttention,
    which has no such function, padding inside an example splits it, and packed rows with a mask are not told apart in
    compiled code.

    Args:
        attention_mask: `[B, S]`, 0 at padding; anything else is returned as it is.
        position_ids: `[B, S]` or `[1, S]`; in a packed sequence they start again with each example.
        cache: of keys and values, given by the caller; nothing is packed where there is one.
        varlen: attention takes lengths of sequences and no mask of pairs (FlashAttention's).
    """
    real = _real(attention_mask, position_ids)
    compiling = torch.compiler.is_compiling()
    if cache is not None or (attention_mask is not None and real is None):
        return Apart(attention_mask)
    if varlen:
        if compiling or not starts_again(attention_mask, position_ids):
            return Apart(attention_mask)
        return Apart(
            None,
            lengths=_lengths(torch.ones_like(position_ids).bool() if real is None else real, position_ids),
        )
    if real is None or not (compiling or starts_again(attention_mask, position_ids)):
        return Apart(attention_mask)
    examples = _starts(real, position_ids).cumsum(-1)
    return Apart(attention_mask, lambda b, _, q, k: examples[b, q] == examples[b, k])


def starts_again(attention_mask: Any, position_ids: Tensor) -> bool:
    """Whether a row `[B, S]` holds several examples: positions of real tokens do not grow throughout."""
    real = _real(attention_mask, position_ids)
    if real is None:
        return bool((position_ids.diff(dim=-1) <= 0).any())
    return bool(_starts(real, position_ids).any())


def _lengths(real: Tensor, position_ids: Tensor) -> dict[str, Any]:
    """Where sequences begin in all rows, one behind the other; a run of padding is one."""
    begins = _starts(real, position_ids)
    begins[:, 1:] |= real[:, 1:] != real[:, :-1]
    begins[:, 0] = True
    starts = begins.flatten().nonzero().flatten()
    bounds = torch.cat((starts, starts.new_tensor([real.numel()]))).int()
    longest = int(bounds.diff().max())
    return {
        "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest,
    }  # fmt: skip


def _starts(real: Tensor, position_ids: Tensor) -> Tensor:
    """`[B, S]` bool: real tokens whose position is not beyond that of the last real one before them."""
    position_ids = position_ids.expand_as(real)
    places = torch.arange(real.shape[1], device=real.device)
    last = torch.where(real, places, -1).cummax(-1).values  # of the row so far; -1: none
    before = position_ids.gather(-1, last.clamp(min=0))[:, :-1]
    follows = real[:, 1:] & (last[:, :-1] >= 0)
    return nn.functional.pad(follows & (position_ids[:, 1:] <= before), (1, 0))


def _real(attention_mask: Any, position_ids: Tensor) -> Tensor | None:
    """`[B, S]` bool, False at padding; None for what is no mask of these positions."""
    is_mask = (
        isinstance(attention_mask, Tensor)
        and attention_mask.dim() == position_ids.dim() == 2
        and attention_mask.shape[1] == position_ids.shape[1]
        and position_ids.shape[0] in (1, attention_mask.shape[0])
    )
    return attention_mask.bool() if is_mask else None
