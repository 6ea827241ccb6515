"""Baselines that decide without looking: every token to the same experts, or to each expert in turn."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rmoe.routing.contract import RouterContext, Routing, State
from rmoe.routing.options import Geometry
from rmoe.routing.router import BaseRouter, SharedRouter


def fixed(hidden: Tensor, experts: Tensor, weight: float, num_experts: int) -> Routing:
    """Given experts `[T, k]`, each with this weight; logits whose softmax is that: 0 for them, -1e4 for the others."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    off = torch.full((experts.shape[0], num_experts), -1e4, dtype=dtype, device=hidden.device)
    logits = off.scatter(-1, experts, 0.0)
    weights = torch.full(experts.shape, weight, dtype=dtype, device=hidden.device)
    return Routing(logits, F.softmax(logits, -1), weights, experts)


class FixedRouter(BaseRouter):
    """Base of routers without scorer and gate: which experts, `[T, k]`, and what each of them weighs."""

    class Config(BaseRouter.Config):
        uses_scorer = False
        uses_gate = False

    weight: float

    def choose(self, tokens: int, device: torch.device, mask: Tensor | None) -> Tensor:
        """`[T, k]` int64. `mask`: `[T]` bool, False at padding; None is no padding."""
        raise NotImplementedError

    def route(
        self, hidden: Tensor, state: State, shared: SharedRouter | None, context: RouterContext
    ) -> tuple[Routing, State]:
        experts = self.choose(hidden.shape[0], hidden.device, context.mask)
        return fixed(hidden, experts, self.weight, self.num_experts), state


class Dense(FixedRouter):
    """No routing: every token visits the same k experts, unweighted, which together are one MLP of k times the width.

    The model builds those k experts and no others: the dense model of equal active parameters.
    """

    class Config(FixedRouter.Config):
        kind = "dense"
        equation = "n = 1 ... k, g = 1"

        def built_experts(self, geometry: Geometry) -> int:
            return geometry.top_k

    weight = 1.0

    def choose(self, tokens: int, device: torch.device, mask: Tensor | None) -> Tensor:
        return torch.arange(self.geometry.top_k, device=device).expand(tokens, -1)


class RoundRobin(FixedRouter):
    """Forced uniform routing: experts are dealt out in turn, weights 1/k.

    `t` counts the real tokens of a call. Exactly balanced loads at the router's least cost: a baseline for timing, and
    for finding out whether what goes wrong is the router. Layers start one expert further each, so that no expert
    always meets the same tokens.
    """

    class Config(FixedRouter.Config):
        kind = "round_robin"
        equation = "n = (t k + 0 ... k - 1) mod E, g = 1 / k"
        reads_sequence = True  # a token's place in the call decides

    def __init__(self, options: Config, spec, geometry: Geometry) -> None:  # type: ignore[no-untyped-def]
        super().__init__(options, spec, geometry)
        self.weight = 1 / geometry.top_k

    def choose(self, tokens: int, device: torch.device, mask: Tensor | None) -> Tensor:
        k = self.geometry.top_k
        place = torch.arange(tokens, device=device) if mask is None else mask.cumsum(0) - 1
        slots = place[:, None] * k + torch.arange(k, device=device)
        return (slots + self.layer_index) % self.num_experts
