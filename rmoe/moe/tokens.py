"""Which sequences the tokens of a forward pass belong to: batch rows, padding, packed rows, decode steps."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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
        past: for each sequence how many of its tokens the cache holds; None where the mask does not say it.
    """

    total: int
    ids: Tensor
    rows: tuple[Tensor, ...]
    continues: bool
    past: tuple[int | None, ...]


def tokens_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tokens:
    """What a model's forward is called with, as sequences.

    Sequences packed into one row are told apart by `position_ids` that begin anew, where no mask is given.

    Raises:
        RequestError: neither input_ids nor inputs_embeds are given.
    """
    given = _given(model, args, kwargs)
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    source = ids if isinstance(ids, Tensor) else embeds
    if not isinstance(source, Tensor):
        raise RequestError("input_ids", None, "a batch of token ids [B, S], or inputs_embeds")
    batch, length = source.shape[:2]
    flat = torch.full((batch * length,), UNKNOWN)
    if isinstance(ids, Tensor):
        flat = ids.detach().reshape(-1).cpu().long()
    cache = _cache_in(given.values())
    held = 0 if cache is None else int(cache.get_seq_length())
    continues = held > 0
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    if isinstance(mask, Mapping):  # one for each kind of attention
        mask = mask.get("full_attention")
    real = torch.ones(batch, length, dtype=torch.bool)
    past: int | Tensor | None = held if mask is None else None
    if isinstance(mask, Tensor) and mask.dim() == 2:
        first = min(held, mask.shape[1] - length)  # a static cache's mask may go on behind this call's tokens
        real = mask[:, first : first + length].bool().cpu()
        past = mask[:, :held].bool().sum(-1) if first == held else None
    elif isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[2] == length <= mask.shape[3] - held:
        own = mask[:, 0].diagonal(held, -2, -1)  # a static cache's: whether a token may attend to itself
        real = (own if own.dtype == torch.bool else own == 0).expand(batch, -1).cpu()
    rows: list[Tensor] = []
    for row in range(batch):
        places = torch.arange(row * length, (row + 1) * length)[real[row]]
        if mask is None and isinstance(positions, Tensor) and positions.dim() == 2 and not continues:
            of_row = positions[row if len(positions) > 1 else 0].cpu()
            starts = (of_row[1:] != of_row[:-1] + 1).nonzero().flatten() + 1
            rows.extend(places.tensor_split(starts.tolist()))
        else:
            rows.append(places)
    pasts = past.tolist() if isinstance(past, Tensor) else [past] * len(rows)
    return Tokens(batch * length, flat, tuple(rows), continues, tuple(pasts))


def cache_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
    """The cache that a call of a model was given, else the one it returned; None without any."""
    given = _cache_in(_given(model, args, kwargs).values())
    if given is not None or not isinstance(output, tuple | Mapping):
        return given
    return _cache_in(output.values() if isinstance(output, Mapping) else output)


def _given(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | dict(kwargs)


def _cache_in(values: Iterable[Any]) -> Any:
    return next((one for one in values if hasattr(one, "get_seq_length")), None)


def first_tensor(*values: Any) -> Tensor | None:
    """The first tensor in nested arguments or results."""
    for value in values:
        if isinstance(value, Tensor):
            return value
        inner = (
            value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
        )
        if (found := first_tensor(*inner)) is not None:
            return found
    return None
