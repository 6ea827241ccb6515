"""Which experts every token went to, sequence by sequence: what `record` makes and `replay` follows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

UNKNOWN = -1
"""In `ids`: no decision is known. In `tokens`: no id is known."""


@dataclass
class TracedSequence:
    """One sequence of n tokens.

    Attributes:
        tokens: [n] int64, `UNKNOWN` where the model was given embeddings.
        ids: [n, L, K] int16, see `Trace`.
    """

    tokens: Tensor
    ids: Tensor

    def extend(self, tokens: Tensor, ids: Tensor) -> None:
        """Append the next tokens: a decode step's."""
        self.tokens = torch.cat([self.tokens, tokens])
        self.ids = torch.cat([self.ids, ids])

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass
class Trace:
    """The routing of N tokens in sequences, on the CPU.

    Attributes:
        layers: names of the L routed layers, in the order in which they run; a looped model's with the pass.
        num_experts: E of each. top_k: k of each; K is the largest.
        sequences: in the order in which they began.
    """

    layers: tuple[str, ...] = ()
    num_experts: tuple[int, ...] = ()
    top_k: tuple[int, ...] = ()
    sequences: list[TracedSequence] = field(default_factory=list)

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

    def select(self, indices: Iterable[int]) -> Trace:
        """The trace of some of the sequences: of a batch, of the best samples."""
        kept = [self.sequences[index] for index in indices]
        return Trace(self.layers, self.num_experts, self.top_k, kept)

    @classmethod
    def from_arrays(
        cls,
        ids: Tensor,
        tokens: Tensor,
        lengths: Sequence[int],
        layers: Sequence[str],
        num_experts: Sequence[int],
    ) -> Trace:
        """A trace from what a file or a serving engine gives.

        Args:
            ids: [N, L, K]. tokens: [N].
            lengths: tokens of each sequence; their sum is N.
            layers, num_experts: of each of the L layers.
        """
        ids, tokens = ids.to(torch.int16), tokens.to(torch.int64)
        sequences = [
            TracedSequence(t, i)
            for t, i in zip(tokens.split(list(lengths)), ids.split(list(lengths)), strict=True)
        ]
        used = (ids != UNKNOWN).sum(-1).amax(0).tolist() if len(ids) else [0] * len(layers)
        return cls(tuple(layers), tuple(num_experts), tuple(used), sequences)
