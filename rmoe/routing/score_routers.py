"""Routers that add something between scorer and gate: the scores of the layer below, or noise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from rmoe.routing.contract import RouterContext, Routing, State
from rmoe.routing.initial import ProjectionFP32, constant
from rmoe.routing.options import Geometry
from rmoe.routing.router import Router, SharedRouter
from rmoe.validation import Finite, require

if TYPE_CHECKING:
    from rmoe.routing.spec import RouterSpec


class ResidualScores(Router):
    """`logits_i = G_i h_i + a (G_{i-1} h_{i-1})` (Table 5): the state also carries the last layer's own scores.

    The scores carried are the layer's own, before the residual is added, as the table's formula has it.
    """

    class Config(Router.Config):
        kind = "residual_scores"
        equation = "s_i = G_i f_i + a G_{i-1} f_{i-1}"
        carries = "scores [E]"

        scale: Finite = 0.5
        detach: bool = False

    options: Config

    def route(
        self, hidden: Tensor, state: State, shared: SharedRouter | None, context: RouterContext
    ) -> tuple[Routing, State]:
        below, recurrent = state[:1], state[1:]
        _, own, recurrent = self.score(hidden, recurrent, shared, context)
        logits = own
        if below:
            logits = own + self.options.scale * (below[0].detach() if self.options.detach else below[0])
        return self.settle(self.decide(logits, context), hidden), (own, *recurrent)


class NoisyTopK(Router):
    """`H = x G + N(0, 1) * (softplus(x W_n) + 1e-2)`, top-k, softmax over the k (Shazeer et al. 2017, Eq. 3 to 5).

    Losses: squared coefficient of variation of the importance `sum_x g_n` and of the load, the sum of the
    probability that expert n stays among the k when its own noise is drawn again (their appendix A).
    From memory: zero initial weights for both maps there, weights 0.1. Here the scorer keeps the model's own
    initialisation, so that it starts as every other router does; the noise map starts at zero.
    """

    class Config(Router.Config):
        kind = "noisy_topk"
        takes_zero_experts = False
        equation = "s + N(0, 1) (softplus(W f) + 0.01)"
        uses_noise = True

        importance_weight: Finite = 0.1
        load_weight: Finite = 0.1

    options: Config

    def __init__(self, options: Config, spec: RouterSpec, geometry: Geometry) -> None:
        super().__init__(options, spec, geometry)
        require(not spec.skips, "router.kind", options.kind, "staged, with a skip class")
        features = spec.recurrence.features(geometry)
        self.noise_map = ProjectionFP32(features, geometry.num_experts, constant(0.0))

    def route(
        self, hidden: Tensor, state: State, shared: SharedRouter | None, context: RouterContext
    ) -> tuple[Routing, State]:
        features, clean, state = self.score(hidden, state, shared, context)
        if context.noise is None:
            return self.decide(clean, context), state
        std = F.softplus(self.noise_map(features)) + 1e-2
        noisy = clean + std * context.noise.normal(clean)
        routing = self.decide(noisy, context)
        return routing._replace(
            logits=clean, penalty=self._penalty(clean, noisy, std, routing, context)
        ), state

    def _penalty(
        self, clean: Tensor, noisy: Tensor, std: Tensor, routing: Routing, context: RouterContext
    ) -> Tensor:
        real = 1.0 if context.mask is None else context.mask[:, None]
        experts = torch.where(routing.experts < self.num_experts, routing.experts, 0)
        importance = torch.zeros_like(clean).scatter_add(-1, experts, routing.weights)
        penalty = self.options.importance_weight * _squared_variation((importance * real).sum(0))
        if self.top_k < self.num_experts:
            top = noisy.topk(self.top_k + 1, -1).values
            inside = noisy > top[:, -1:]
            # The bar to clear is the k-th best of the others: one lower for an expert already inside.
            bar = torch.where(inside, top[:, -1:], top[:, -2:-1])
            load = torch.special.ndtr((clean - bar) / std)
            penalty = penalty + self.options.load_weight * _squared_variation((load * real).sum(0))
        return penalty


def _squared_variation(per_expert: Tensor) -> Tensor:
    """`Var / Mean^2` over experts, population variance."""
    mean = per_expert.mean()
    return per_expert.var(correction=0) / (mean * mean + 1e-10)
