"""Ten families' records against hooks written by hand for each: which module, which formula, nothing discovered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rmoe.moe import Recorder
from tests.analysis.tiny_families import TINY

Route = Callable[[Tensor, nn.Module], tuple[Tensor, Tensor, Tensor]]
"""Logits [T, E] and the gate -> distribution [T, E], experts [T, k], weights [T, k]."""

IDS = torch.randint(3, 256, (2, 24), generator=torch.Generator().manual_seed(1))


def softmax_then_top(k: int, normalised: bool) -> Route:
    def route(logits: Tensor, gate: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        probs = logits.softmax(-1)
        weights, experts = probs.topk(k)
        return probs, experts, weights / weights.sum(-1, keepdim=True) if normalised else weights

    return route


def top_then_softmax(k: int) -> Route:
    def route(logits: Tensor, gate: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        top, experts = logits.topk(k)
        return logits.softmax(-1), experts, top.softmax(-1)

    return route


def deepseek_v2(logits: Tensor, gate: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Top 3 of the one of two groups that has the largest score; weights as they are."""
    probs = logits.softmax(-1)
    weights, experts = _of_the_best_group(probs, probs.view(-1, 2, 4).amax(-1)).topk(3)
    return probs, experts, weights


def deepseek_v3(logits: Tensor, gate: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Sigmoids; groups by their two largest, biased; the bias chooses and does not weigh; 2.5 times the weights."""
    scores = logits.sigmoid()
    biased = scores + gate.e_score_correction_bias
    experts = _of_the_best_group(biased, biased.view(-1, 2, 4).topk(2).values.sum(-1)).topk(3).indices
    weights = scores.gather(-1, experts)
    return scores / scores.sum(-1, keepdim=True), experts, 2.5 * weights / weights.sum(-1, keepdim=True)


def _of_the_best_group(scores: Tensor, by_group: Tensor) -> Tensor:
    """[T, 8] with all but the best group's four at -inf."""
    best = by_group.argmax(-1, keepdim=True)
    return scores.masked_fill(torch.arange(8) // 4 != best, -torch.inf)


def llama4(logits: Tensor, gate: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    top, experts = logits.topk(2)
    scores = logits.sigmoid()
    return scores / scores.sum(-1, keepdim=True), experts, top.sigmoid()


@dataclass(frozen=True)
class ByHand:
    """Where a family's gates are, by its source, and what they do."""

    gate: str
    layers: tuple[int, ...]
    route: Route


FAMILIES = {
    "olmoe": ByHand("mlp.gate", (0, 1, 2), softmax_then_top(2, normalised=False)),
    "mixtral": ByHand("mlp.gate", (0, 1, 2), softmax_then_top(2, normalised=True)),
    "qwen2_moe": ByHand("mlp.gate", (1, 2), softmax_then_top(2, normalised=False)),
    "qwen3_moe": ByHand("mlp.gate", (0, 1, 2), softmax_then_top(3, normalised=True)),
    "deepseek_v2": ByHand("mlp.gate", (1, 2), deepseek_v2),
    "deepseek_v3": ByHand("mlp.gate", (1, 2), deepseek_v3),
    "gpt_oss": ByHand("mlp.router", (0, 1, 2), top_then_softmax(2)),
    "granitemoe": ByHand("block_sparse_moe.router", (0, 1, 2), top_then_softmax(2)),
    "jamba": ByHand("feed_forward.router", (1, 3), softmax_then_top(2, normalised=False)),
    "llama4": ByHand("feed_forward.router", (0, 1, 2), llama4),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_record_is_what_hooks_by_hand_give(family: str) -> None:
    hand, model = FAMILIES[family], TINY[family].build()
    inputs: list[Tensor] = []
    gates: list[Any] = [model.get_submodule(f"model.layers.{layer}.{hand.gate}") for layer in hand.layers]

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.append(args[0].detach().flatten(0, -2))

    handles = [gate.register_forward_pre_hook(keep) for gate in gates]
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    records = Recorder(model)(IDS)
    for record, hidden, gate in zip(records, inputs, gates, strict=True):
        (matrix,) = [p.detach() for p in gate.parameters() if p.dim() == 2]
        bias = 0 if getattr(gate, "bias", None) is None else gate.bias.detach()
        probs, experts, weights = hand.route(hidden @ matrix.T + bias, gate)
        torch.testing.assert_close(record.probs, probs, atol=1e-5, rtol=1e-4)
        by_expert = torch.zeros_like(probs)
        torch.testing.assert_close(
            by_expert.scatter(-1, record.experts, record.weights),
            by_expert.scatter(-1, experts, weights),
            atol=1e-5,
            rtol=1e-4,
        )
        assert record.experts.shape == experts.shape
