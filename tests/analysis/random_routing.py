"""Random routing decisions, for the measures' tests."""

from __future__ import annotations

import torch
from torch import Tensor

from rmoe.moe.records import RoutingBatch


def random_routing(
    num_layers: int, num_tokens: int, num_experts: int, top_k: int, seed: int = 0, scale: float = 2.0
) -> RoutingBatch:
    """Independent layers: softmax of normal logits, top-k renormalised."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(num_layers, num_tokens, num_experts, generator=generator)
    probs = logits.softmax(-1)
    weights, experts = probs.topk(top_k, dim=-1)
    return RoutingBatch(probs, experts, weights / weights.sum(-1, keepdim=True), num_experts)


def split(batch: RoutingBatch, sizes: list[int]) -> list[RoutingBatch]:
    """The same tokens in consecutive batches of these sizes."""
    parts: list[tuple[Tensor, ...]] = list(
        zip(
            *(tensor.split(sizes, dim=1) for tensor in (batch.probs, batch.experts, batch.weights)),
            strict=True,
        )
    )
    return [RoutingBatch(*part, batch.num_experts) for part in parts]
