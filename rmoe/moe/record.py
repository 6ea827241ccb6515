"""The common form in which every model's routing is recorded, whatever its routers return."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rmoe.routing.contract import Routing


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
        return cls(routing.logits, routing.probs, routing.experts, routing.weights, num_experts)

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
        num_experts: E.
    """

    probs: Tensor
    experts: Tensor
    weights: Tensor
    num_experts: int

    @classmethod
    def stack(cls, records: Sequence[RoutingRecord]) -> RoutingBatch:
        """Stack the layers' records, lowest layer first. All must have the same T, C, K and E."""
        return cls(
            torch.stack([record.probs.detach().float() for record in records]).cpu(),
            torch.stack([record.experts for record in records]).cpu(),
            torch.stack([record.weights.detach().float() for record in records]).cpu(),
            records[0].num_experts,
        )

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.experts.shape[1]

    def chosen_probs(self) -> Tensor:
        """[L, T, K] probability of each chosen class, the skip class among them; 0 in an empty slot."""
        num_classes = self.probs.shape[-1]
        inside = self.experts < num_classes
        return self.probs.gather(-1, self.experts.clamp(max=num_classes - 1)) * inside

    def first_choice(self) -> Tensor:
        """[L, T] int64: the chosen expert of largest probability; E for a token that no expert takes."""
        ranked = self.chosen_probs().masked_fill(self.experts == self.num_experts, -1.0)
        return self.experts.gather(-1, ranked.argmax(-1, keepdim=True)).squeeze(-1)
