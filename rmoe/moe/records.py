"""The common form in which every model's routing is recorded, whatever its routers return."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rmoe.routing.contract import Routing, dispatched_experts


class RoutingRecord(NamedTuple):
    """What one MoE layer decided for T tokens.

    Attributes:
        logits: [T, C] raw scores; C is E, or E + 1 with a skip class.
        probs: [T, C] float32, the full distribution over classes; rows sum to one.
        experts: [T, K] int64; the value E marks a slot without an expert (skipped, dropped or not used).
        weights: [T, K] float32, what each chosen expert's output (Llama 4: input) is multiplied by; 0
            without one.
        num_experts: E.
    """

    logits: Tensor
    probs: Tensor
    experts: Tensor
    weights: Tensor
    num_experts: int

    @classmethod
    def from_routing(cls, routing: Routing, num_experts: int) -> RoutingRecord:
        """The record of one layer of an RMoE model."""
        experts = dispatched_experts(routing, num_experts)
        return cls(routing.logits, routing.probs, experts, routing.weights, num_experts)

    def select(self, keep: Tensor) -> RoutingRecord:
        """Only the tokens where `keep`, [T] bool, is true: leaves padding out."""
        return self._replace(
            logits=self.logits[keep],
            probs=self.probs[keep],
            experts=self.experts[keep],
            weights=self.weights[keep],
        )


class RoutingBatch(NamedTuple):
    """What all L MoE layers decided for the same T tokens, on the CPU; what every measure reads.

    Attributes:
        probs: [L, T, C] float32.
        experts: [L, T, K] int64, E without an expert.
        weights: [L, T, K] float32.
        num_experts: E, the largest of all layers.
        layer_experts: E of each layer; empty where all have the same.
    """

    probs: Tensor
    experts: Tensor
    weights: Tensor
    num_experts: int
    layer_experts: tuple[int, ...] = ()

    @classmethod
    def stack(cls, records: Sequence[RoutingRecord]) -> RoutingBatch:
        """Stack the layers' records, lowest layer first, all of the same T.

        With layers of different sizes E, K and C are the largest: a smaller layer never chooses the experts it does not
        have, and its further slots are empty.
        """
        most = max(record.num_experts for record in records)
        slots = max(record.experts.shape[1] for record in records)
        skip = max(record.probs.shape[1] - record.num_experts for record in records)
        return cls(
            torch.stack([_padded_probs(record, most, skip).cpu() for record in records]),
            torch.stack([_more_slots(_empty_at(record, most), slots, most).cpu() for record in records]),
            torch.stack([_more_slots(record.weights.detach().float(), slots, 0).cpu() for record in records]),
            most,
            tuple(record.num_experts for record in records),
        )

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.experts.shape[1]

    def chosen_probs(self) -> Tensor:
        """[L, T, K] probability of each chosen class.

        Which null class an empty slot stands for is not recorded: a token's empty slots get the largest probabilities
        of its null classes, as a gate that takes the best chooses; 0 where there are no more.
        """
        inside = self.experts < self.num_experts
        own = self.probs.gather(-1, self.experts.clamp(max=self.num_experts - 1))
        null = nn.functional.pad(self.probs[..., self.num_experts :].sort(-1, descending=True).values, (0, 1))
        rank = ((~inside).cumsum(-1) - 1).clamp(0, null.shape[-1] - 1)
        return torch.where(inside, own, null.gather(-1, rank))

    def first_choice(self) -> Tensor:
        """[L, T] int64: the chosen expert of largest probability; E for a token that no expert takes."""
        ranked = self.chosen_probs().masked_fill(self.experts == self.num_experts, -1.0)
        return self.experts.gather(-1, ranked.argmax(-1, keepdim=True)).squeeze(-1)


def _empty_at(record: RoutingRecord, empty: int) -> Tensor:
    return record.experts.masked_fill(record.experts >= record.num_experts, empty)


def _more_slots(values: Tensor, slots: int, fill: float) -> Tensor:
    return nn.functional.pad(values, (0, slots - values.shape[1]), value=fill)


def _padded_probs(record: RoutingRecord, num_experts: int, skip: int) -> Tensor:
    """`[T, E + skip]`: zero for experts that the layer does not have; its skip class stays the last."""
    probs = record.probs.detach().float()
    own, rest = probs[:, : record.num_experts], probs[:, record.num_experts :]
    own = nn.functional.pad(own, (0, num_experts - record.num_experts))
    return torch.cat([own, nn.functional.pad(rest, (0, skip - rest.shape[1]))], dim=-1)
