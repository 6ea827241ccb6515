"""Which sequences the tokens of a forward pass belong to: batch rows, padding, packed rows, decode steps."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rmoe.compat import CACHE_NAMES
from rmoe.errors import RequestError
from rmoe.moe.recording import UNKNOWN


@dataclass(frozen=True)
class Tokens:
    """The T = B * S tokens of one call.

    Attributes:
        total: T.
        ids: [T] int64 on the CPU, `UNKNOWN` with embeddings.
        rows: for each sequence the positions of its tokens in T, padding left out.
        continues: the sequences are those of the call before, further on: a cache holds what came before.
    """

    total: int
    ids: Tensor
    rows: tuple[Tensor, ...]
    continues: bool


def tokens_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tokens:
    """What a model's forward is called with, as sequences.

    Sequences packed into one row are told apart by `position_ids` that begin anew, where no mask is given.

    Raises:
        RequestError: neither input_ids nor inputs_embeds are given.
    """
    given = dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | dict(kwargs)
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    source = ids if isinstance(ids, Tensor) else embeds
    if not isinstance(source, Tensor):
        raise RequestError("input_ids", None, "a batch of token ids [B, S], or inputs_embeds")
    batch, length = source.shape[:2]
    flat = torch.full((batch * length,), UNKNOWN)
    if isinstance(ids, Tensor):
        flat = ids.detach().reshape(-1).cpu().long()
    cache = next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)
    continues = cache is not None and hasattr(cache, "get_seq_length") and int(cache.get_seq_length()) > 0
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    real = torch.ones(batch, length, dtype=torch.bool)
    if isinstance(mask, Tensor) and mask.dim() == 2:
        real = mask[:, -length:].bool().cpu()
    rows: list[Tensor] = []
    for row in range(batch):
        places = torch.arange(row * length, (row + 1) * length)[real[row]]
        if mask is None and isinstance(positions, Tensor) and positions.dim() == 2 and not continues:
            of_row = positions[row if len(positions) > 1 else 0].cpu()
            starts = (of_row[1:] != of_row[:-1] + 1).nonzero().flatten() + 1
            rows.extend(places.tensor_split(starts.tolist()))
        else:
            rows.append(places)
    return Tokens(batch * length, flat, tuple(rows), continues)
