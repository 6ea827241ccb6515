"""A recording: which experts every token went to, sequence by sequence. `record` makes it and `replay` follows it.

It grows while a model works, in memory, beside the model. `rmoe.results.trace.Trace` is the table that is kept on file,
of this package's routing or of a serving engine's; `Recording.trace` and `Recording.of` turn one into the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from rmoe.errors import RequestError
from rmoe.results.trace import NO_EXPERT, Trace, TraceMeta

UNKNOWN = -1
"""In `ids`: no decision is known. In `tokens`: no id is known."""


@dataclass
class RecordedSequence:
    """One sequence of n tokens.

    Attributes:
        tokens: [n] int64, `UNKNOWN` where the model was given embeddings.
        ids: [n, L, K] int16, see `Recording`.
    """

    tokens: Tensor
    ids: Tensor

    def extend(self, tokens: Tensor, ids: Tensor) -> None:
        """Append the next tokens: a decode step's."""
        self.tokens = torch.cat([self.tokens, tokens])
        self.ids = torch.cat([self.ids, ids])

    def cut(self, length: int) -> None:
        """Forget what a cache no longer holds: candidates that assisted generation has rejected.

        Raises:
            RequestError: the cache holds more: it was filled outside the recording too.
        """
        if length > len(self):
            raise RequestError("cache", f"{length} tokens", f"the {len(self)} that were recorded with it")
        self.tokens, self.ids = self.tokens[:length], self.ids[:length]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass
class Recording:
    """The routing of N tokens in sequences, on the CPU.

    Attributes:
        layers: names of the L routed layers, in the order in which they run; a looped model's with the pass.
        num_experts: E of each. top_k: k of each; K is the largest.
        sequences: in the order in which they began.
    """

    layers: tuple[str, ...] = ()
    num_experts: tuple[int, ...] = ()
    top_k: tuple[int, ...] = ()
    sequences: list[RecordedSequence] = field(default_factory=list)

    @property
    def ids(self) -> Tensor:
        """[N, L, K] int16, the chosen experts in the order of their slots.

        A layer's E is an empty slot (skipped, dropped or not used), `UNKNOWN` a slot beyond its k or a token whose
        routing is not known.
        """
        width = max(self.top_k, default=0)
        empty = torch.empty(0, len(self.layers), width, dtype=torch.int16)
        return torch.cat([empty, *(one.ids for one in self.sequences)])

    @property
    def tokens(self) -> Tensor:
        """[N] int64 token ids."""
        return torch.cat([torch.empty(0, dtype=torch.int64), *(one.tokens for one in self.sequences)])

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [len(one) for one in self.sequences]

    def select(self, indices: Iterable[int]) -> Recording:
        """Some of the sequences: of a batch, of the best samples."""
        return replace(self, sequences=[self.sequences[index] for index in indices])

    @classmethod
    def of(cls, trace: Trace) -> Recording:
        """What a trace says: slots in its order, tokens `UNKNOWN` if it has none."""
        meta = trace.meta
        ids = torch.from_numpy(trace.experts.astype(np.int16))
        slots = torch.arange(ids.shape[-1])
        for layer, (experts, k) in enumerate(zip(meta.num_experts, meta.experts_per_token, strict=True)):
            ids[:, layer] = torch.where((ids[:, layer] == NO_EXPERT) & (slots < k), experts, ids[:, layer])
        tokens = torch.full((len(ids),), UNKNOWN)
        if trace.tokens is not None:
            tokens = torch.from_numpy(trace.tokens.astype(np.int64))
        lengths = trace.sequences.tolist()
        parts = zip(tokens.split(lengths), ids.split(lengths), strict=True)
        sequences = [RecordedSequence(*part) for part in parts]
        return cls(tuple(meta.layer_names), tuple(meta.num_experts), tuple(meta.experts_per_token), sequences)

    def trace(self, model: str = "") -> Trace:
        """The trace to be kept on file; its slots are not ranked.

        Args:
            model: whose routing it is.

        Raises:
            RequestError: nothing was recorded.
        """
        ids, tokens = self.ids, self.tokens
        limit = torch.tensor(self.num_experts)[:, None]
        meta = TraceMeta(
            model=model,
            source="rmoe",
            layer_names=list(self.layers),
            num_experts=list(self.num_experts),
            experts_per_token=list(self.top_k),
        )
        return Trace(
            ids.masked_fill(ids >= limit, NO_EXPERT).numpy(),
            None if (tokens == UNKNOWN).any() else tokens.to(torch.int32).numpy(),
            np.array([length for length in self.lengths if length], np.int64),
            meta,
        )
